"""Objectives: batch → loss.

May use: config, models, datasets.
"""
