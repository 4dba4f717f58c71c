"""What is read off a picture: components, arrows, texts, axes and curves."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np


@dataclass
class ReadComponent:
    """A shape: `box` [x0, y0, x1, y1] in pixels of the picture."""

    shape: str
    color: str
    label: str
    box: tuple[float, float, float, float]

    @property
    def middle(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass
class ReadArrow:
    """From component `source` to `target` (places in the list); without a head, `directed` is False."""

    source: int
    target: int
    directed: bool


@dataclass
class ReadText:
    text: str
    box: tuple[float, float, float, float]


@dataclass
class ReadFigure:
    """All that was read. `curves`: colour name -> (n, 2) points (x, y) in pixels, left to right; `axes`: an L of lines."""

    components: list[ReadComponent] = field(default_factory=list)
    arrows: list[ReadArrow] = field(default_factory=list)
    texts: list[ReadText] = field(default_factory=list)
    axes: tuple[float, float, float, float] | None = None
    curves: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Work:
    """The enlarged picture: rgb (h, w, 3) float, luma, and pixels of the work per pixel of the picture."""

    rgb: np.ndarray
    luma: np.ndarray
    scale: float

    @cached_property
    def low(self) -> np.ndarray:
        """(h, w) the darkest channel of each pixel; channel by channel, which is ten times faster than `min` over the last axis."""
        return np.minimum(np.minimum(self.rgb[..., 0], self.rgb[..., 1]), self.rgb[..., 2])

    @cached_property
    def high(self) -> np.ndarray:
        """(h, w) the lightest channel of each pixel."""
        return np.maximum(np.maximum(self.rgb[..., 0], self.rgb[..., 1]), self.rgb[..., 2])
