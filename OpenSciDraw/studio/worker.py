"""`python -m OpenSciDraw.studio.worker`: does what workers.py asks for, a JSON object a line, and answers likewise."""

from __future__ import annotations

import importlib
import json
import os
import queue
import sys
import threading
import traceback
from typing import Any

from OpenSciDraw.errors import UserError
from OpenSciDraw.quiet import start_logging

# What can be asked for: module and function, which gets what was given and `report`, for what it says on the way.
TASKS = {
    "list": ("listing", "write_index"), "decode": ("decoding", "decode_row"), "plan": ("planning", "plan_here"),
    "paired": ("pairing", "paired"), "draw": ("drawing", "draw"), "read": ("drawing", "read_picture"),
    "vectorize": ("vectorizing", "vectorize"),
}  # fmt: skip


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log, not among the answers
    start_logging()
    asked: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()

    def answer(number: int, **said: Any) -> None:
        answers.write(json.dumps({"number": number, **said}) + "\n")
        answers.flush()

    while True:
        call = asked.get()
        number = call["number"]

        def report(said: Any, number: int = number) -> None:
            answer(number, progress=said)

        try:
            module, name = TASKS[call["what"]]
            function = getattr(importlib.import_module(f"OpenSciDraw.studio.{module}"), name)
            answer(number, result=function(report=report, **call["given"]))
        except UserError as error:
            answer(number, error=str(error))
        except Exception as error:  # a bug: the page says so, and the next thing is done all the same
            traceback.print_exc()
            answer(number, error=f"{type(error).__name__}: {error}. This is a bug; the log in .studio says where.")


def _listen(asked: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in sys.stdin.buffer:
        asked.put(json.loads(line))
    os._exit(0)  # the studio is gone: nobody waits for an answer


if __name__ == "__main__":
    sys.exit(main())
