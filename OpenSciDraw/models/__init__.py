"""FigureModel, the only way by which anything reaches a model, and one file for each family.

May use: utils, config, drawn, store.
"""
