"""A local chat endpoint that answers from a script; conftest.py's fixture `serve` starts it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-very-secret-key"  # in the environment while a server of `serve` runs


class Scripted(ThreadingHTTPServer):
    """Answers requests from a list of functions (handler, body) -> None, the last one again and again."""

    def __init__(self, *script: Callable[[BaseHTTPRequestHandler, dict], None]):
        self.script, self.bodies, self.headers_seen = list(script), [], []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append((self.path, body))
        self.server.headers_seen.append(dict(self.headers))
        step = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
        step(self, body)

    def log_message(self, *arguments: Any) -> None:
        pass


def send(handler: BaseHTTPRequestHandler, status: int, data: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def says(text: str | dict | None, finish: str | None = None, **message: Any) -> Callable[[BaseHTTPRequestHandler, dict], None]:
    content = text if text is None or isinstance(text, str) else json.dumps(text)
    choice = {"message": {"content": content, **message}, **({"finish_reason": finish} if finish else {})}
    return lambda handler, body: send(handler, 200, json.dumps({"choices": [choice], "usage": {"total_tokens": 7}}).encode())


def drips(handler: BaseHTTPRequestHandler, body: dict) -> None:
    """Sends a byte now and then, so that no single read runs into its time limit."""
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(20):
            handler.wfile.write(b" ")
            time.sleep(0.1)


def fails(status: int, **headers: str) -> Callable[[BaseHTTPRequestHandler, dict], None]:
    return lambda handler, body: send(handler, status, b"no", **headers)
