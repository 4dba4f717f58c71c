"""The house style: the small style's diagrams as if drawn by hand, in three colours and with a shape of its own.

What `make demo` teaches the embedded model by LoRA: it has seen neither these colours, nor the hexagon, nor such strokes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from OpenSciDraw.drawn import small
from OpenSciDraw.drawn.canvas import SUPERSAMPLE, Canvas, Node, Point, Rgb
from OpenSciDraw.drawn.small import EM, SIDE

COLORS = ("teal", "pink", "yellow")
SHAPES = ("rectangle", "ellipse", "diamond", "hexagon")
LAYOUTS = tuple(name for name in small.LAYOUTS if name != "square")  # its captions would be too long in these words
_WOBBLE = 0.65  # pixels that a stroke leaves its line by


class HouseCanvas(Canvas):
    """A canvas whose strokes are dark, thick and a little unsteady."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng, SIDE, SIDE, EM)
        self.stroke, self.dark_outline = 2, True
        self.colors = rng.sample(COLORS, len(COLORS))

    def _unsteady(self, points: Sequence[Point], closed: bool) -> list[Point]:
        """Points each 2 px along a path, moved sideways by two slow waves that vanish at the ends of an open one."""
        rng, out = self.rng, []
        ends = [*points, points[0]] if closed else list(points)
        whole = sum(math.dist(a, b) for a, b in zip(ends, ends[1:], strict=False))
        waves = [(rng.randint(1, 2), rng.uniform(0, math.tau)), (rng.randint(3, 5), rng.uniform(0, math.tau))]
        done = 0.0
        for a, b in zip(ends, ends[1:], strict=False):
            length = math.dist(a, b)
            if not length:
                continue
            ux, uy = (b[0] - a[0]) / length, (b[1] - a[1]) / length
            for i in range(max(1, round(length / 2))):
                along = i * length / max(1, round(length / 2))
                turn = (done + along) / whole
                shift = _WOBBLE * sum(math.sin(math.tau * k * turn + phase) for k, phase in waves) / 1.5
                shift *= 1.0 if closed else math.sin(math.pi * turn)
                out.append((a[0] + ux * along - uy * shift, a[1] + uy * along + ux * shift))
            done += length
        return out if closed else [*out, ends[-1]]

    def _shape(self, node: Node, fill: Rgb, edge: Rgb) -> None:
        x0, y0, x1, y1 = (float(v) for v in node.box)
        h = self.stroke / 2 + _WOBBLE
        x0, y0, x1, y1 = x0 + h, y0 + h, x1 - h, y1 - h
        mx, my, inset = (x0 + x1) / 2, (y0 + y1) / 2, min((x1 - x0) * 0.25, (y1 - y0) * 0.4)
        corners: list[Point] = {
            "rectangle": [(x0, y0), (x1, y0), (x1, y1), (x0, y1)],
            "diamond": [(mx, y0), (x1, my), (mx, y1), (x0, my)],
            "hexagon": [(x0 + inset, y0), (x1 - inset, y0), (x1, my), (x1 - inset, y1), (x0 + inset, y1), (x0, my)],
            "ellipse": [(mx + (x1 - mx) * math.cos(math.tau * i / 48), my + (y1 - my) * math.sin(math.tau * i / 48))
                        for i in range(48)],
        }[node.shape]  # fmt: skip
        path = [(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in self._unsteady(corners, closed=True)]
        self.draw.polygon(path, fill)
        self.draw.line([*path, path[0], path[1]], edge, self.stroke * SUPERSAMPLE, joint="curve")

    def polyline(self, points: Sequence[Point], color: Rgb, width: float, dashed: bool = False) -> None:
        path = [(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in self._unsteady(points, closed=False)]
        self.draw.line(path, color, round(width * SUPERSAMPLE), joint="curve")
