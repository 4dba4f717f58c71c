"""Changes as they happen, as server-sent events: of runs, of the queue, of what is being drawn."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import StreamingResponse

from OpenSciDraw.studio.calls import plain
from OpenSciDraw.studio.state import Studio

SECONDS = 1.0  # between two looks at the folder, while a page is open


def seen(studio: Studio) -> dict[str, Any]:
    """What the events are about, by name."""
    jobs = [[job.number, *asdict(studio.queue.state(job)).values()] for job in studio.queue.jobs()]
    return {"runs": [asdict(run) for run in studio.runs()], "queue": jobs, "work": list(studio.drawing.values())}


async def events(request: Request) -> StreamingResponse:
    """`event: NAME` with its new value, whenever it is another one than before."""
    studio: Studio = request.app.state.studio

    async def stream() -> AsyncIterator[str]:
        before: dict[str, str] = {}
        while not (await request.is_disconnected() or request.app.state.is_over()):
            for name, value in (await anyio.to_thread.run_sync(seen, studio)).items():
                text = json.dumps(plain(value))
                if before.get(name) != text:
                    before[name] = text
                    yield f"event: {name}\ndata: {text}\n\n"
            yield ": here\n\n"
            await anyio.sleep(SECONDS)

    return StreamingResponse(stream(), media_type="text/event-stream")
