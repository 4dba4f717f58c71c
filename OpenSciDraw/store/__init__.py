"""Encoded samples on disk and in cloud storage: contract, shards with their index, the table over all, cache, staging.

May use: utils.
"""
