"""A picture of a diagram becomes a figure that people can edit: SVG, TikZ and PowerPoint, with text as text and tied arrows.

May use: utils, drawn, reading.
"""
