"""An OpenAI-compatible endpoint with pictures, called with patience and within bounds."""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from email.utils import parsedate_to_datetime
from typing import Any

from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.rubric import BadAnswer
from OpenSciDraw.utils.files import parse_json

_MOST_BYTES = 4_000_000  # of an answer
_LONGEST_WAIT = 60.0  # seconds between two tries
_MOST_DETAIL = 200  # characters of a server's own words in a message


class _Refused(Exception):
    """A failed request. `wait`: seconds that the server asks for, or None; `final`: another try would fail too."""

    def __init__(self, reason: str, wait: float | None = None, final: bool = False):
        super().__init__(reason)
        self.wait, self.final = wait, final


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another address; it is not even read: what is no address raised ValueError."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> None:
        return None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _is_private(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith((".local", ".localhost", ".internal"))
    return address.is_loopback or address.is_private


class Endpoint:
    """One OpenAI-compatible chat endpoint. The key is read from the environment and appears in the request alone."""

    def __init__(self, url: str, model: str, key_variable: str, timeout: float, retries: int):
        try:
            parts = urllib.parse.urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # brackets or a port that are none
            usable = False
        if not usable or "@" in parts.netloc or parts.query:  # the address is not repeated: a secret may stand in it
            raise UserError("evaluate.judge_url: give an address such as https://host/v1, without user, password or query.")
        self._key = os.environ.get(key_variable, "").strip() or None
        if self._key and not (self._key.isascii() and self._key.isprintable()):  # http.client's own error would quote it
            raise UserError(f"The key in {key_variable} holds a character that no header can carry. Set it again.")
        if self._key and parts.scheme == "http" and not _is_private(str(parts.hostname)):
            raise UserError(
                f"evaluate.judge_url = {url!r}: the key in {key_variable} would travel unencrypted. Use https, or unset it."
            )
        self.url = url.rstrip("/")
        self.model, self.timeout, self.retries = model, timeout, retries
        self._sampling = {"temperature": 0}  # {} once the model has said that it takes none
        self._opener = urllib.request.build_opener(_NoRedirect)

    def ask(self, messages: list[dict[str, Any]], check: Any) -> dict[str, Any]:
        """The answer {"text", "usage"} once `check(text)` raises no BadAnswer.

        Raises:
            BadAnswer: what went wrong at the last of 1 + retries tries.
        """
        reason = ""
        for attempt in range(self.retries + 1):
            try:
                answer = self._once(messages)
                check(answer["text"])
                return answer
            except BadAnswer as error:
                reason, wait, final = str(error), None, False
            except _Refused as error:
                reason, wait, final = str(error), error.wait, error.final
            if final or attempt == self.retries:
                break
            time.sleep(min(_LONGEST_WAIT, wait if wait is not None else 2.0**attempt))
        raise BadAnswer(reason)

    def _once(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        sampling = self._sampling
        body = json.dumps({"model": self.model, "messages": messages, **sampling}).encode()
        headers = {"Content-Type": "application/json", "User-Agent": "ScienceFlow"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                raw = _read(response, time.monotonic() + self.timeout)
        except urllib.error.HTTPError as error:
            refused, said = self._refusal(error)
            if error.code == 400 and sampling and "temperature" in said:
                self._sampling = {}
                return self._once(messages)
            raise refused from None
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            raise _Refused(f"no answer: {type(error).__name__}: {self._hide(str(error))[:120]}") from None
        if len(raw) > _MOST_BYTES:
            raise BadAnswer(f"the answer has more than {_MOST_BYTES} bytes")
        try:
            answer = parse_json(raw)
            text = answer["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise BadAnswer(f"not an answer of a chat endpoint: {self._hide(raw.decode(errors='replace'))[:120]!r}") from error
        if not isinstance(text, str):
            raise BadAnswer("the answer has no text")
        usage = answer.get("usage")
        counts = usage.items() if isinstance(usage, dict) else ()
        return {"text": self._hide(text), "usage": {name: count for name, count in counts if isinstance(count, int)}}

    def _refusal(self, error: urllib.error.HTTPError) -> tuple[_Refused, str]:
        """What to raise, and the server's words: shown where it dislikes the request, not where it dislikes the key."""
        said = ""
        with error:
            if error.code in (400, 404, 413, 422):
                try:
                    said = self._hide(_read(error, time.monotonic() + self.timeout)[:_MOST_BYTES].decode(errors="replace"))
                except (OSError, http.client.HTTPException):
                    said = ""
        again = error.code in (408, 409, 425, 429) or error.code >= 500
        reason = f"HTTP {error.code}" + (f": {said[:_MOST_DETAIL]!r}" if said else "")
        return _Refused(reason, _retry_after(error.headers), not again), said

    def _hide(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _read(response: Any, deadline: float) -> bytes:
    """The body, or as much of it as shows that it is too large; TimeoutError for one that drips past the deadline."""
    parts, size = [], 0
    while size <= _MOST_BYTES and (part := response.read1(65536)):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError("the answer took too long")
    return b"".join(parts)


def _retry_after(headers: Any) -> float | None:
    """Seconds that the header asks for, as a number or as a date (RFC 9110, 10.2.3)."""
    value = str(headers.get("Retry-After", "")).strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
