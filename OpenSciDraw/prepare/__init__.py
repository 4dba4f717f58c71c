"""Papers → figures: unpacking, LaTeX → pairs of picture and caption, drawing, measuring, selection.

May use: utils, config, figures, reading.
"""
