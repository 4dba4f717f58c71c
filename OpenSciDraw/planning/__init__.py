"""Before a run: memory, FLOPs, time and disk of a config (plan); what a machine lacks (doctor).

May use: all rooms above it but prepare.
"""
