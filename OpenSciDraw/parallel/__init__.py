"""One device or many: FSDP2, DeepSpeed's ZeRO, what each rank does of a whole.

May use: utils, config.
"""
