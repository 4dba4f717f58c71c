"""The options of `scienceflow vectorize`."""

from __future__ import annotations

import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="PNG or JPEG of a diagram of boxes and arrows")
    parser.add_argument("--format", default="svg,tikz,pptx", metavar="A,B", help="svg, tikz, pptx (default: all three)")
    parser.add_argument("--out", metavar="DIR", help="folder for the files (default: where the picture is)")
    parser.add_argument("--compare", action="store_true", help="also NAME.compare.png: the original beside what was read")
    parser.add_argument("--json", action="store_true", help="what was read as JSON, a line for each picture")
