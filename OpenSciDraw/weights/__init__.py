"""What trains and how it lies in files: LoRA or all weights, their average, precision, weights of other programs.

May use: utils, config, parallel, models.
"""
