"""A run or pictures → scores with intervals: examples, drawing, metrics, statistics, results.

May use: utils, config, drawn, figures, reading, models, weights, datasets, inference.
"""
