"""A page in the browser, on this machine alone: data, runs and pictures. All that it does is a command or a function of the rooms.

May use: all rooms above it but prepare and preferences.
"""
