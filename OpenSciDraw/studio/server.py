"""`scienceflow studio [FOLDER]`: the page, on this machine alone, until Ctrl-C."""

from __future__ import annotations

import logging
import secrets
import socket
from argparse import Namespace
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from OpenSciDraw.errors import UserError
from OpenSciDraw.utils.sole_user import sole_user

_LOG = logging.getLogger("OpenSciDraw")
ADDRESS, PORT = "127.0.0.1", 8899
_PORTS = 20  # that are tried, from PORT on


def hosts_of(port: int) -> set[str]:
    """What a browser of this machine may call the server."""
    return {f"127.0.0.1:{port}", f"localhost:{port}"}


def listening(port: int | None) -> socket.socket:
    """A socket on this machine's own address. Raises UserError where the port is taken."""
    for number in [port] if port is not None else range(PORT, PORT + _PORTS):
        place = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind((ADDRESS, number))
        except OSError:
            place.close()
            continue
        place.listen(128)
        return place
    taken = f"port {port} is" if port is not None else f"ports {PORT} to {PORT + _PORTS - 1} are"
    raise UserError(f"{ADDRESS}: {taken} taken. Give another one with --port.")


def main(arguments: Namespace) -> int:
    """Serve the folder.

    Raises:
        UserError: no such folder, another studio works in it, a port that is taken, the extra is not installed.
    """
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise UserError("The studio needs Starlette and uvicorn: pip install 'OpenSciDraw[studio]'.")
    import uvicorn

    from OpenSciDraw.studio.app import build_app
    from OpenSciDraw.studio.state import Studio

    studio = Studio(Path(arguments.folder).expanduser())
    with sole_user(studio.places.own, "studio"):  # one queue in a folder
        place = listening(arguments.port)
        port, token = place.getsockname()[1], secrets.token_urlsafe(32)
        app = build_app(studio, token, hosts_of(port), f"scienceflow-studio-{port}")
        address = f"http://{ADDRESS}:{port}/?token={token}"
        print(f"{studio.places.root}\n\n  {address}\n\nOpen this address in a browser on this machine. Ctrl-C ends the page; "
              "what runs goes on.", flush=True)  # fmt: skip
        settings = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=2)
        server = uvicorn.Server(settings)
        app.state.is_over = lambda: server.should_exit  # the stream of events ends, for which the server waits
        with suppress(KeyboardInterrupt):  # Ctrl-C, after which uvicorn has ended in order
            server.run(sockets=[place])
    return 0
