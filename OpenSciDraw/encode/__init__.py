"""Figures → store: what there is to do, one shard, engines; a store checked (verify); older layouts → store (repack).

May use: utils, config, figures, store, models, datasets.
"""
