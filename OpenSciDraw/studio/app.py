"""The web application: the pages' calls, their scripts, and the guard before all of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from OpenSciDraw.errors import UserError
from OpenSciDraw.studio import bench_page, data, editable, illustrate_page, playground, queue_page, runs
from OpenSciDraw.studio.calls import Call, Given, Page, plain
from OpenSciDraw.studio.devices import Scheduler
from OpenSciDraw.studio.guard import Guard
from OpenSciDraw.studio.live import events
from OpenSciDraw.studio.state import Studio

_LOG = logging.getLogger("OpenSciDraw")
PAGES: tuple[Page, ...] = (  # a tab each, in this order
    data.PAGE, runs.PAGE, queue_page.PAGE, playground.PAGE, illustrate_page.PAGE, bench_page.PAGE,
)  # fmt: skip
_STATIC = Path(str(files("OpenSciDraw.studio") / "static"))
_LOOK = Path(str(files("OpenSciDraw.reporting") / "page.css"))  # the report's
_KINDS = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}


def build_app(studio: Studio, token: str, hosts: Collection[str], cookie: str = "scienceflow-studio") -> Starlette:
    """The application; the queue runs while it does."""

    @asynccontextmanager
    async def working(app: Starlette) -> Any:
        scheduler = Scheduler(studio.queue, studio.places.root)
        scheduler.start()
        try:
            yield
        finally:
            scheduler.stop()
            studio.close()

    calls = [*editable.CALLS, *(call for page in PAGES for call in page.calls)]
    routes = [
        Route("/", _index), Route("/static/{name}", _static), Route("/api/pages", _pages), Route("/api/events", events),
        *(Route(call.path, _endpoint(call), methods=[call.method]) for call in calls),
    ]  # fmt: skip
    guard = Middleware(Guard, token=token, hosts=hosts, cookie=cookie)
    app = Starlette(routes=routes, middleware=[guard], lifespan=working)
    app.state.studio, app.state.is_over = studio, lambda: False
    return app


def _endpoint(call: Call) -> Any:
    async def endpoint(request: Request) -> Response:
        studio: Studio = request.app.state.studio
        try:
            given = await _given(request)
            answer = await anyio.to_thread.run_sync(call.does, studio, given)
        except ClientDisconnect:  # or a body that is longer than it may be: guard.py ends it
            return JSONResponse({"error": "Too large, or cut off."}, 413)
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400)
        except OSError as error:
            return JSONResponse({"error": f"{error.filename or call.path}: {error.strerror or error}"}, 400)
        return answer if isinstance(answer, Response) else JSONResponse(plain(answer))

    return endpoint


async def _given(request: Request) -> Given:
    if request.method == "GET":
        query = request.query_params
        return Given({name: values if len(values := query.getlist(name)) > 1 else values[0] for name in query})
    body = await request.body()
    if not request.headers["content-type"].startswith("application/json"):
        return Given(dict(request.query_params), body)
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UserError(f"This is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError("Expected a JSON object.")
    return Given(values)


async def _index(request: Request) -> Response:
    return FileResponse(_STATIC / "index.html", media_type="text/html")


async def _static(request: Request) -> Response:
    """One of our own files: by a name that is one of theirs, so that no path can be asked for."""
    name = request.path_params["name"]
    known = {path.name: path for path in [*_STATIC.iterdir(), _LOOK]}
    if name not in known:
        return JSONResponse({"error": "no such file"}, 404)
    return FileResponse(known[name], media_type=_KINDS[known[name].suffix], headers={"Cache-Control": "no-cache"})


async def _pages(request: Request) -> Response:
    studio: Studio = request.app.state.studio
    return JSONResponse({"folder": str(studio.places.root), "pages": [{"title": p.title, "script": p.script} for p in PAGES]})
