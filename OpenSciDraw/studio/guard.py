"""Who may talk to the studio: the browser that opened its address, from the studio's own page, and nobody else.

Against whom: other people's pages that this browser shows (they can send requests to localhost: CSRF, DNS rebinding) and other
users of this machine (they can connect to the port). So every request needs the token, which the first address carries and a cookie
keeps; the Host must be this machine's; an Origin must be the studio's own; what changes something must be sent as JSON.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_JSON, MOST_UPLOAD = 1 << 20, 64 << 20  # bytes of a body
UPLOADS = "/api/upload"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin", "X-Frame-Options": "DENY",
}  # fmt: skip


class Guard:
    """Middleware. `hosts`: the values of Host that are this server, with its port."""

    def __init__(self, app: ASGIApp, token: str, hosts: Collection[str], cookie: str):
        self.app, self.token, self.hosts, self.cookie = app, token, set(hosts), cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return  # no web sockets: the connection is closed

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        answer = self._answer(scope, Headers(scope=scope))
        if answer is not None:
            return await answer(scope, receive, with_headers)
        await self.app(scope, _bounded(receive, scope["path"]), with_headers)

    def _answer(self, scope: Scope, headers: Headers) -> Response | None:
        """What is said instead of the page; None where the request may pass."""
        if headers.get("host", "") not in self.hosts:
            return PlainTextResponse("This Host is not the studio's. Open the address that `scienceflow studio` printed.", 421)
        own = {f"http://{host}" for host in self.hosts}
        changes = scope["method"] not in ("GET", "HEAD")
        origin = headers.get("origin")
        if (origin is None and changes) or (origin is not None and origin not in own):
            return PlainTextResponse("Only the studio's own page may send this.", 403)
        given = parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=100).get("token", [""])[0]
        if scope["path"] == "/" and not changes and given:
            if not _same(given, self.token):
                return PlainTextResponse("This token is not that of this studio. Open the address that it printed.", 403)
            answer = RedirectResponse("/", 303)
            answer.set_cookie(self.cookie, self.token, httponly=True, samesite="strict", path="/")
            return answer
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return PlainTextResponse("Another page asked for this.", 403)
        if not _same(_cookie(headers, self.cookie), self.token):
            return PlainTextResponse("Open the address that `scienceflow studio` printed: it holds the token.", 401)
        kind, is_upload = headers.get("content-type", "").partition(";")[0].strip(), scope["path"] == UPLOADS
        if changes and not (kind.startswith("image/") if is_upload else kind == "application/json"):
            return PlainTextResponse("Expected JSON (or a picture, where one is uploaded).", 415)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > (MOST_UPLOAD if is_upload else MOST_JSON):
            return PlainTextResponse("Too large.", 413)
        return None


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _cookie(headers: Headers, name: str) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return ""
    return found[name].value if name in found else ""


def _bounded(receive: Receive, path: str) -> Receive:
    """`receive` that ends a body which is longer than it may be, also where it did not say its length."""
    left = MOST_UPLOAD if path == UPLOADS else MOST_JSON

    async def bounded() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        return message if left >= 0 else {"type": "http.disconnect"}

    return bounded
