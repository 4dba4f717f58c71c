"""What a page of the studio consists of: calls, each a path and a function; and a script in static/."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from OpenSciDraw.errors import UserError

if TYPE_CHECKING:
    from OpenSciDraw.studio.state import Studio

MOST_TEXT = 20_000  # characters of one field of a call


class Given:
    """What a call was given: the query of a GET, the JSON object of a POST. Every field is checked when it is asked for."""

    def __init__(self, values: Mapping[str, Any], body: bytes = b""):
        self._values, self.body = values, body

    def text(self, name: str, default: str | None = None, most: int = MOST_TEXT) -> str:
        value = self._values.get(name, default)
        if not isinstance(value, str) or len(value) > most or "\0" in value:
            raise UserError(f"{name}: expected a text of at most {most} characters.")
        return value

    def number(self, name: str, default: float | None = None, low: float = 0, high: float = 1e9) -> float:
        value = self._values.get(name, default)
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = float("nan")
        if not low <= number <= high:
            raise UserError(f"{name} = {value!r:.80}: expected a number from {low:g} to {high:g}.")
        return number

    def whole(self, name: str, default: int | None = None, low: int = 0, high: int = 1_000_000_000) -> int:
        number = self.number(name, default, low, high)
        if number != int(number):
            raise UserError(f"{name} = {number:g}: expected a whole number.")
        return int(number)

    def texts(self, name: str, most: int = 64) -> list[str]:
        value = self._values.get(name, [])
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or len(value) > most or not all(isinstance(v, str) and len(v) <= MOST_TEXT for v in value):
            raise UserError(f"{name}: expected a list of at most {most} texts.")
        return value

    def numbers(self, name: str, most: int, low: float, high: float) -> list[float]:
        value = self._values.get(name, [])
        if not isinstance(value, list) or not 1 <= len(value) <= most:
            raise UserError(f"{name}: expected a list of 1 to {most} numbers.")
        return [Given({name: item}).number(name, low=low, high=high) for item in value]

    def table(self, name: str, most: int = 500) -> dict[str, str]:
        """Texts by name, as the changes of a form."""
        value = self._values.get(name, {})
        texts = isinstance(value, dict) and all(isinstance(v, str) and len(v) <= MOST_TEXT for v in value.values())
        if not isinstance(value, dict) or len(value) > most or not texts:
            raise UserError(f"{name}: expected at most {most} texts by name.")
        return value


@dataclass(frozen=True)
class Call:
    """`does` gets the studio and what was given; it returns what becomes JSON, or a Response. It runs in a thread."""

    method: str
    path: str
    does: Callable[[Studio, Given], Any]


@dataclass(frozen=True)
class Page:
    """A tab: its title, its script in static/, its calls."""

    title: str
    script: str
    calls: Sequence[Call]


def plain(value: Any) -> Any:
    """Numbers that JSON does not have, as None: a browser's parser refuses NaN."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
