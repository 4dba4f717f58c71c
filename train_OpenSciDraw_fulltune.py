"""Train all weights. `python train_OpenSciDraw_fulltune.py CONFIG.py [--cfg_options key=value …]`, or by `accelerate launch`.

The same program as train_OpenSciDraw_loop.py with `use_lora = False`, under the name that scripts of earlier versions call.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import train_OpenSciDraw_loop


def main(argv: Sequence[str] | None = None) -> int:
    return train_OpenSciDraw_loop.main(argv, ["use_lora=False"])


if __name__ == "__main__":
    sys.exit(main())
