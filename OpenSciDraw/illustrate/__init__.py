"""A paper or a paragraph → descriptions of figures → pictures, scored, refined, kept.

May use: utils, config, figures, prepare, inference, evaluation, preferences, reporting, bench.
"""
