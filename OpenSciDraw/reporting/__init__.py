"""A run, or several → one HTML page.

May use: utils, config, figures.
"""
