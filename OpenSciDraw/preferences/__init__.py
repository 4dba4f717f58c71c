"""A model's own pictures, scored → groups of preferences in a store.

May use: utils, config, prepare, datasets, encode, inference, evaluation.
"""
