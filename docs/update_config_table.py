"""Write the table of all config keys into docs/config.md, between its two markers.

    python docs/update_config_table.py            rewrite it (`make schema`)
    python docs/update_config_table.py --check    change nothing; exit 1 when it is out of date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from OpenSciDraw.config.text import schema_table

PAGE = Path(__file__).with_name("config.md")
START, END = "<!-- keys -->", "<!-- /keys -->"


def with_table(text: str) -> str:
    """`text` with what stands between the markers replaced by the current table.

    Raises:
        SystemExit: the markers are not there exactly once, in order.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end) or text.count(START) != 1 or text.count(END) != 1:
        sys.exit(f"{PAGE}: expected {START} and then {END}, each once. Put them back.")
    return f"{before}{START}\n\n{schema_table().strip()}\n\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the table is out of date")
    arguments = parser.parse_args(argv)
    old = PAGE.read_text(encoding="utf-8")
    new = with_table(old)
    if arguments.check:
        if old != new:
            print(f"{PAGE} is out of date: run `make schema`.", file=sys.stderr)
        return int(old != new)
    if old != new:
        PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
