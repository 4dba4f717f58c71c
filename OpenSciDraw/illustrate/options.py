"""Options of `scienceflow illustrate`; nothing heavy is imported here."""

from __future__ import annotations

import argparse

from OpenSciDraw.utils.options import count


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of an illustration alone; how is drawn and judged comes beside them."""
    meaning = "LaTeX project, e-print archive, .txt or .md file; - for standard input"
    parser.add_argument("source", metavar="SOURCE", help=meaning)
    what = "run folder or checkpoint, or config (the model before training)"
    parser.add_argument("--from", dest="what", required=True, metavar="WHAT", help=what)
    parser.add_argument("--only", nargs="+", default=[], metavar="FIG", help="figures of the paper: fig2, or labels")
    parser.add_argument("--candidates", type=count, default=2, metavar="N", help="descriptions of each figure (default: 2)")
    parser.add_argument("--pictures", type=count, default=4, metavar="N", help="pictures of each description (default: 4)")
    parser.add_argument("--writer", metavar="URL", help="OpenAI-compatible endpoint that writes the descriptions")
    parser.add_argument("--writer_model", metavar="NAME", help="the model's name there")
    parser.add_argument("--refine", type=count, default=0, metavar="K", help="rounds in which the best are tried again")
    parser.add_argument("--refine_by", choices=("text", "edit"), default="text", help="a better description, or an edit")
    parser.add_argument("--width", type=count, metavar="PX", help="default: as in validation")
    parser.add_argument("--height", type=count, metavar="PX", help="default: as in validation")
    parser.add_argument("--out", metavar="DIR", help="folder for all of it (default: illustrations/ in the run)")
