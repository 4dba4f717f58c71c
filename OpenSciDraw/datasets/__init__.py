"""What training reads: rows of a store, of older layouts or of plain figures; batches; the sampler.

May use: utils, config, figures, store.
"""
