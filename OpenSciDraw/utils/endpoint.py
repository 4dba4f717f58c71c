"""An OpenAI-compatible endpoint with pictures, called with patience and within bounds."""

from __future__ import annotations

import base64
import http.client
import ipaddress
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from email.utils import parsedate_to_datetime
from io import BytesIO
from typing import TYPE_CHECKING, Any

from OpenSciDraw.errors import UserError
from OpenSciDraw.utils.files import parse_json

if TYPE_CHECKING:
    from PIL import Image

_MOST_BYTES = 4_000_000  # of an answer
_LONGEST_WAIT = 60.0  # seconds between two tries
_MOST_DETAIL = 200  # characters of a server's own words in a message
_LIMITS = ("max_tokens", "max_completion_tokens")  # names of the limit of an answer's tokens: OpenAI's newer models take the second
_FILTERS = ("content_filter", "content_policy", "content_management_policy", "ResponsibleAI")  # names of filters in refusals


class BadAnswer(Exception):
    """The endpoint gave no usable answer. The reason is 'kind: details'; `final`: the same request would be answered so again."""

    def __init__(self, reason: str, final: bool = False):
        super().__init__(reason)
        self.final = final


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
    """One OpenAI-compatible chat endpoint. The key is read from the environment and appears in the request alone.

    `timeout` in seconds for one try, `retries` after the first; `most_tokens` of an answer (None: as the server has it);
    `setting` names the address in messages.
    """

    def __init__(
        self, url: str, model: str, key_variable: str, timeout: float, retries: int, most_tokens: int | None = None,
        setting: str = "evaluate.judge_url",
    ):  # fmt: skip
        try:
            parts = urllib.parse.urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # brackets or a port that are none
            usable = False
        if not usable or "@" in parts.netloc or parts.query:  # the address is not repeated: a secret may stand in it
            raise UserError(f"{setting}: give an address such as https://host/v1, without user, password or query.")
        self._key = os.environ.get(key_variable, "").strip() or None
        if self._key and not (self._key.isascii() and self._key.isprintable()):  # http.client's own error would quote it
            raise UserError(f"The key in {key_variable} holds a character that no header can carry. Set it again.")
        if self._key and parts.scheme == "http" and not _is_private(str(parts.hostname)):
            raise UserError(
                f"{setting} = {url!r}: the key in {key_variable} would travel unencrypted. Use https, or unset it."
            )
        self.url = url.rstrip("/")
        self.model, self.timeout, self.retries = model, timeout, retries
        self._sampling: dict[str, Any] = {"temperature": 0}  # without what the model has said that it does not take
        if most_tokens is not None:
            self._sampling[_LIMITS[0]] = most_tokens
        self._opener = urllib.request.build_opener(_NoRedirect)

    def ask(self, messages: list[dict[str, Any]], check: Any) -> dict[str, Any]:
        """The answer {"text", "usage"} once `check(text)` raises no BadAnswer.

        Raises:
            BadAnswer: what went wrong at the last of 1 + retries tries. A refusal, and an answer that ends at the limit of
                its tokens, are not asked for again.
        """
        reason = ""
        for attempt in range(self.retries + 1):
            try:
                answer = self._once(messages)
                check(answer["text"])
                return answer
            except BadAnswer as error:
                reason, wait, final = str(error), None, error.final
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
            accepted = _accepted(sampling, said) if error.code == 400 else sampling
            if accepted != sampling:
                self._sampling = accepted
                return self._once(messages)
            raise refused from None
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            raise _Refused(f"no answer: {type(error).__name__}: {self._hide(str(error))[:120]}") from None
        if len(raw) > _MOST_BYTES:
            raise BadAnswer(f"the answer has more than {_MOST_BYTES} bytes")
        try:
            answer = parse_json(raw)
            choice = answer["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason")
            text, declined = message.get("content"), message.get("refusal")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise BadAnswer(f"not an answer of a chat endpoint: {self._hide(raw.decode(errors='replace'))[:120]!r}") from error
        if finish == "content_filter" or (isinstance(declined, str) and declined):
            why = repr(self._hide(declined)[:_MOST_DETAIL]) if isinstance(declined, str) and declined else "by its content filter"
            raise BadAnswer(f"refused: {why}", final=True)
        if finish == "length":
            raise BadAnswer("truncated: the answer reached the limit of its tokens (finish_reason 'length')", final=True)
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
        filtered = error.code == 400 and any(name in said for name in _FILTERS)
        reason = ("refused: " if filtered else "") + f"HTTP {error.code}" + (f": {said[:_MOST_DETAIL]!r}" if said else "")
        return _Refused(reason, _retry_after(error.headers), not again), said

    def _hide(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _accepted(sampling: dict[str, Any], said: str) -> dict[str, Any]:
    """`sampling` without what a server refuses by name: no temperature, or the limit of tokens by its other name, or none."""
    kept = {name: value for name, value in sampling.items() if name != "temperature" or name not in said}
    limit = next((name for name in _LIMITS if name in kept), None)
    if kept == sampling and limit is not None and limit in said:
        value = kept.pop(limit)
        if limit == _LIMITS[0]:
            kept[_LIMITS[1]] = value
    return kept


def picture_url(picture: Image.Image, most_side: int) -> str:
    """The picture as PNG in a data: URL, as chat endpoints take it; its longer side at most `most_side` px."""
    sent = picture.convert("RGB")
    sent.thumbnail((most_side, most_side))
    png = BytesIO()
    sent.save(png, "PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


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
