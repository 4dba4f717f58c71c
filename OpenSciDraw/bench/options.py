"""Options of `scienceflow bench`; nothing heavy is imported here."""

from __future__ import annotations

import argparse

from OpenSciDraw.utils.options import count


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of a bench alone; how is drawn and judged comes beside them."""
    parser.add_argument("prompts", metavar="PROMPTS", help="its prompts: the .json of one difficulty, or the folder of all")
    parser.add_argument("rubrics", metavar="RUBRICS", help="its rubrics: likewise")
    what = "run folder or checkpoint, config (the model before training), or pictures <difficulty>-<number>.png"
    parser.add_argument("--from", dest="what", required=True, metavar="WHAT", help=what)
    parser.add_argument("--base", metavar="MODEL", help="another base of the same shapes, on which a run's adapter is drawn")
    parser.add_argument("--protocol", choices=("ours", "published", "both"), default="ours", help="how is judged (default: ours)")
    parser.add_argument("--references", metavar="DIR", help="published: the papers' figures, <year>/<paper>/<file>")
    parser.add_argument("--instructions", metavar="FILE", help="published: the released eval_benchmark.py, or a .json of texts")
    parser.add_argument("--rounds", type=count, metavar="N", help="published: how often each picture is judged (default: 1)")
    parser.add_argument("--out", metavar="DIR", help="folder for all of it (default: benches/ in the run)")
