"""What every room may use: files that must be on disk, threads, tensors in files, Arrow data looked over, one command in a folder.

May use: no other room.
"""
