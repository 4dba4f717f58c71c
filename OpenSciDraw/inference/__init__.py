"""A trained run → pictures (sample), → files for other programs (export).

May use: utils, config, figures, models, weights.
"""
