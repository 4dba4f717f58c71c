"""What our programs say on a terminal."""

from __future__ import annotations

import logging

# What these say while they are imported concerns none of our users: kernels for other GPUs and Python versions.
_AT_IMPORT = ("torchao", "torch.utils._pytree", "bitsandbytes", "diffusers.quantizers", "transformers.quantizers")


def start_logging() -> None:
    """Our own messages as they are; of optional libraries, errors alone."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in _AT_IMPORT:
        logging.getLogger(name).setLevel(logging.ERROR)
