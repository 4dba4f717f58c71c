"""What is kept for backward, what is recomputed, which blocks lie in CPU memory, what to change when a step does not fit."""
