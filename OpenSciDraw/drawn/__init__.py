"""Figures that the program draws itself: kinds, styles, captions, exact ground truth.

May use: utils.
"""
