"""Optimizers by name: as their authors wrote them, over ranks too; in few bytes; in CPU memory."""
