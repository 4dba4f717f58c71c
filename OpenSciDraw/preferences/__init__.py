"""Own pictures → groups of preferences: several pictures of each prompt, scored by metrics, winners and losers in a store.

May use: utils, config, figures, prepare, datasets, encode, inference, evaluation.
"""
