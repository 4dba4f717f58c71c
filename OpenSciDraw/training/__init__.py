"""A run: built, its steps, its state in checkpoints, its log; signals; trackers.

May use: all rooms above it but prepare and encode.
"""
