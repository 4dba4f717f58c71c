"""What our programs say on a terminal."""

from __future__ import annotations

import functools
import logging

# What these say while they are imported concerns none of our users: kernels for other GPUs and Python versions.
_AT_IMPORT = ("torchao", "torch.utils._pytree", "bitsandbytes", "diffusers.quantizers", "transformers.quantizers")


def start_logging() -> None:
    """Our own messages as they are; of optional libraries, errors alone."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in _AT_IMPORT:
        logging.getLogger(name).setLevel(logging.ERROR)


@functools.cache
def warn_once(text: str) -> None:
    """One process may come by a place more than once, e.g. to encode and to train."""
    logging.getLogger("OpenSciDraw").warning("%s", text)
