"""Figures → captions: asked of a vision-language model once, kept, and written as a list that every command reads.

May use: utils, config, figures, prepare, models.
"""
