"""What a figure is and where figures come from: folders, lists, tables; which count; decoding; sizes.

May use: utils, config, drawn.
"""
