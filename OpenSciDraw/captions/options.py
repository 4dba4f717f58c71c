"""The options of `scienceflow caption`. Nothing heavy is imported here: the command line is built from it."""

from __future__ import annotations

from argparse import ArgumentParser

NOTES = ("context", "parent_caption")  # columns that `scienceflow prepare` writes beside a caption


def add_options(parser: ArgumentParser) -> None:
    """The options, with their units and defaults."""
    parser.add_argument("source", metavar="SOURCE", help="figures: anything that encode.figures may be; captions may be missing")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for captions, answers, failures and contact sheet")
    parser.add_argument("--url", metavar="URL", help="OpenAI-compatible endpoint of a vision-language model")
    parser.add_argument("--model", metavar="NAME", help="the model's name there")
    parser.add_argument("--local", metavar="MODEL", help="in place of an endpoint: folder or hub id of a transformers model")
    parser.add_argument("--styles", nargs="+", default=["long"], metavar="STYLE[=WEIGHT]", help="long, short, source (the figure's "
                        "own caption) or a file with an instruction; several give several captions (default: long)")  # fmt: skip
    parser.add_argument("--notes", nargs="*", metavar="COLUMN", help="columns with texts about a figure that the model is told "
                        f"beside its caption (default: {' '.join(NOTES)}, where they are there)")  # fmt: skip
    parser.add_argument("--config", metavar="CONFIG", help="config whose encode keys say how SOURCE is read (columns, where, …), "
                        "and whose tokenizer measures the captions")  # fmt: skip
    parser.add_argument("--cfg_options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override its keys")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first figures")
    parser.add_argument("--requests", type=int, default=4, metavar="N", help="requests at the same time (default: 4)")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="longest time of one request (default: 120 s)")
    parser.add_argument("--retries", type=int, default=3, metavar="N", help="further tries of a failed request (default: 3)")
    parser.add_argument("--max_tokens", type=int, default=1024, metavar="N", help="most tokens of an answer (default: 1024)")
    parser.add_argument("--max_side", type=int, default=1536, metavar="PX", help="longer side of a sent picture (default: 1536)")
    parser.add_argument("--key_variable", default="OPENAI_API_KEY", metavar="NAME", help="environment variable with the access key "
                        "(default: OPENAI_API_KEY)")  # fmt: skip
    parser.add_argument("--pictures_inside", action="store_true", help="write Parquet with the pictures in it, also where they lie "
                        "in files of their own")  # fmt: skip
