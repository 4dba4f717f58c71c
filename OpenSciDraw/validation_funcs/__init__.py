"""Pictures and numbers while training.

May use: utils, config, drawn, figures, parallel, models, datasets, inference, evaluation.
"""
