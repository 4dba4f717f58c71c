"""The paper that drawn figures are drawn on: a canvas that remembers, as ground truth, all it draws.

Positions are pixels of the finished picture, origin top left; `em` is the font size in those pixels, and
every stroke and gap is a multiple of it. The canvas is drawn `SUPERSAMPLE` times larger and averaged down,
because ImageDraw itself does not antialias. Text uses the TrueType font inside Pillow (basic layout, ASCII),
so a picture depends on no system font.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]
Rgb = tuple[int, int, int]

SUPERSAMPLE = 3
INK: Rgb = (32, 32, 32)
WHITE: Rgb = (255, 255, 255)
FAINT: Rgb = (222, 222, 222)
LINE_HEIGHT = 1.16  # in font sizes

# name: (pastel fill, saturated stroke)
PALETTE: dict[str, tuple[Rgb, Rgb]] = {
    "blue": ((208, 226, 248), (52, 104, 172)),
    "green": ((210, 234, 206), (62, 136, 68)),
    "orange": ((255, 225, 190), (214, 112, 10)),
    "red": ((250, 206, 202), (192, 58, 54)),
    "purple": ((226, 212, 240), (122, 82, 164)),
    "yellow": ((255, 241, 190), (190, 146, 16)),
    "teal": ((196, 232, 228), (20, 128, 124)),
    "pink": ((251, 214, 232), (196, 74, 140)),
    "gray": ((232, 232, 232), (100, 100, 100)),
}
COLORS = tuple(PALETTE)

# The share of a shape's (width, height) that a label may fill.
LABEL_ROOM = {
    "rectangle": (0.90, 0.86),
    "rounded rectangle": (0.88, 0.86),
    "ellipse": (0.74, 0.64),
    "circle": (0.78, 0.66),
    "diamond": (0.60, 0.50),
    "cylinder": (0.86, 0.62),
    "trapezoid": (0.84, 0.60),
    "hexagon": (0.72, 0.80),
}
BOX_SHAPES = ("rectangle", "rounded rectangle", "ellipse", "cylinder", "trapezoid")


@lru_cache(maxsize=128)
def font(pixels: int) -> ImageFont.FreeTypeFont:
    loaded = ImageFont.load_default(size=pixels)
    if not isinstance(loaded, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType; install the Pillow wheel (pip install pillow)")
    return loaded


@lru_cache(maxsize=65536)
def text_width(text: str, pixels: float) -> float:
    """Width of one line in finished pixels at a font size of `pixels`."""
    x0, _, x1, _ = font(round(pixels * SUPERSAMPLE)).getbbox(text)
    return (x1 - x0) / SUPERSAMPLE


@lru_cache(maxsize=65536)
def ink_box(text: str, pixels: int, anchor: str) -> tuple[int, int, int, int]:
    """The box of the inked pixels about the anchor: `getbbox` adds the blank that follows the last letter."""
    mask, (dx, dy) = font(pixels).getmask2(text, "L", anchor=anchor)
    x0, y0, x1, y1 = mask.getbbox() or (0, 0, *mask.size)
    return x0 + dx, y0 + dy, x1 + dx, y1 + dy


def wrap(text: str, max_width: float, max_height: float, pixels: float) -> tuple[str, ...]:
    """The text in one line, or in two broken at the best space; empty when it does not fit."""
    if max_height < pixels:
        return ()
    if text_width(text, pixels) <= max_width:
        return (text,)
    words = text.split(" ")
    breaks = [(" ".join(words[:i]), " ".join(words[i:])) for i in range(1, len(words))]
    if not breaks or max_height < (1 + LINE_HEIGHT) * pixels:
        return ()
    widths = [max(text_width(line, pixels) for line in lines) for lines in breaks]
    best = widths.index(min(widths))
    return breaks[best] if widths[best] <= max_width else ()


@dataclass(frozen=True)
class Node:
    """A shape on the canvas. `box` is (x0, y0, x1, y1), half-open pixels, stroke included."""

    id: str
    shape: str
    color: str
    label: str
    box: tuple[int, int, int, int]

    @property
    def x(self) -> float:
        return (self.box[0] + self.box[2]) / 2

    @property
    def y(self) -> float:
        return (self.box[1] + self.box[3]) / 2

    @property
    def slant(self) -> float:
        """How far the top edge of a trapezoid lies below the box at its middle."""
        return (self.box[3] - self.box[1]) * 0.09 if self.shape == "trapezoid" else 0.0

    def port(self, side: str) -> Point:
        x0, y0, x1, y1 = self.box
        ports = {
            "left": (x0, self.y),
            "right": (x1, self.y),
            "top": (self.x, y0 + self.slant),
            "bottom": (self.x, y1 - self.slant),
        }
        return ports[side]

    def toward(self, other: Node) -> Point:
        """Where the straight line to `other` leaves this ellipse or circle."""
        dx, dy = other.x - self.x, other.y - self.y
        rx, ry = (self.box[2] - self.box[0]) / 2, (self.box[3] - self.box[1]) / 2
        t = 1 / math.hypot(dx / rx, dy / ry)
        return self.x + t * dx, self.y + t * dy


class Canvas:
    """A white picture of width × height pixels with its style, its words and its ground truth."""

    def __init__(self, rng: random.Random, width: int, height: int, em: float) -> None:
        self.rng, self.width, self.height, self.em = rng, width, height, em
        self.stroke = max(1, round(em * 0.09))
        self.radius = em * rng.choice((0.35, 0.5, 0.8))
        self.dark_outline = rng.random() < 0.3
        self.colors = rng.sample(COLORS, len(COLORS))
        self.image = Image.new("RGB", (width * SUPERSAMPLE, height * SUPERSAMPLE), WHITE)
        self.draw = ImageDraw.Draw(self.image)
        self.components: list[dict[str, Any]] = []
        self.arrows: list[dict[str, Any]] = []
        self.labels: list[dict[str, Any]] = []
        self.extra: dict[str, Any] = {}  # what only plots or tables know
        self.spare = ["Net", "Sum", "Mix", "Fit", "Add", "Sort", "Max", "Top", *string.ascii_uppercase]

    def finish(self) -> Image.Image:
        return self.image.reduce(SUPERSAMPLE)

    # ---- words

    def take(self, words: list[str], max_width: float, max_height: float) -> str:
        """Remove and return the first word that fits; a spare one, at last a letter, where none does."""
        for pool in (words, self.spare):
            for word in pool:
                if wrap(word, max_width, max_height, self.em):
                    pool.remove(word)
                    return word
        return self.spare.pop()

    def text(
        self, x: float, y: float, text: str, role: str, *, scale: float = 1.0, anchor: str = "mm",
        lines: Sequence[str] = (), bold: bool = False, color: Rgb = INK, vertical: bool = False,
    ) -> None:  # fmt: skip
        """Write text at a point (Pillow's anchors) and record its exact box. `vertical` reads upward."""
        s, size = SUPERSAMPLE, max(8.0, self.em * scale)
        face = font(round(size * s))
        thicker = max(1, round(0.035 * size * s)) if bold else 0  # the font has no bold face
        boxes: list[tuple[float, float, float, float]] = []
        rows = list(lines) or [text]
        for i, line in enumerate(rows):
            top = y * s + (i - (len(rows) - 1) / 2) * LINE_HEIGHT * size * s
            bx0, by0, bx1, by1 = ink_box(line, face.size, anchor)
            if vertical:
                left, up = round(x * s - (by1 - by0) / 2), round(y * s - (bx1 - bx0) / 2)
                mask = Image.new("L", (math.ceil(bx1 - bx0), math.ceil(by1 - by0)), 0)
                ImageDraw.Draw(mask).text((-bx0, -by0), line, fill=255, font=face, anchor=anchor)
                self.draw.bitmap((left, up), mask.transpose(Image.Transpose.ROTATE_90), fill=color)
                boxes.append((left, up, left + by1 - by0, up + bx1 - bx0))
            else:
                px, py = round(x * s), round(top)
                for shift in range(thicker + 1):
                    self.draw.text((px + shift, py), line, fill=color, font=face, anchor=anchor)
                boxes.append((px + bx0, py + by0, px + bx1 + thicker, py + by1))
        self.labels.append({"text": text, "role": role, "box": self._outer_box(boxes)})

    def _outer_box(self, boxes: Sequence[tuple[float, float, float, float]]) -> list[int]:
        s = SUPERSAMPLE
        low = [math.floor(min(b[i] for b in boxes) / s) for i in (0, 1)]
        return low + [math.ceil(max(b[i] for b in boxes) / s) for i in (2, 3)]

    # ---- shapes

    def node(
        self, shape: str, x: float, y: float, width: float, height: float, color: str, label: str = "",
        scale: float = 1.0,
    ) -> Node:  # fmt: skip
        """A filled, outlined shape centred on (x, y) with its label inside."""
        cx, cy, half_w, half_h = round(x), round(y), round(width / 2), round(height / 2)
        if shape == "circle":
            half_w = half_h = min(half_w, half_h)
        box = (cx - half_w, cy - half_h, cx + half_w, cy + half_h)
        node = Node(f"n{len(self.components)}", shape, color, label, box)
        fill, edge = PALETTE[color]
        self._shape(node, fill, INK if self.dark_outline else edge)
        self.record(shape, color, box, label, fill)
        if label:
            room = LABEL_ROOM[shape]
            lines = wrap(label, 2 * half_w * room[0], 2 * half_h * room[1], max(8.0, self.em * scale))
            drop = 0.07 * 2 * half_h if shape == "cylinder" else 0.0
            self.text(cx, cy + drop, label, "component", scale=scale, lines=lines)
        return node

    def record(self, shape: str, color: str, box: Sequence[float], label: str, fill: Rgb) -> str:
        """Add a component to the ground truth and return its id."""
        ident = f"n{len(self.components)}"
        whole = [math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])]
        self.components.append(
            {"id": ident, "shape": shape, "color": color, "fill": list(fill), "label": label, "box": whole}
        )
        return ident

    def _shape(self, node: Node, fill: Rgb, edge: Rgb) -> None:
        s, w = SUPERSAMPLE, self.stroke * SUPERSAMPLE
        x0, y0 = float(node.box[0] * s), float(node.box[1] * s)
        x1, y1 = node.box[2] * s - 1.0, node.box[3] * s - 1.0  # ImageDraw's boxes include their last pixel
        if node.shape == "rectangle":
            self.draw.rectangle((x0, y0, x1, y1), fill, edge, w)
        elif node.shape == "rounded rectangle":
            self.draw.rounded_rectangle((x0, y0, x1, y1), min(self.radius * s, (y1 - y0) / 2), fill, edge, w)
        elif node.shape in ("ellipse", "circle"):
            self.draw.ellipse((x0, y0, x1, y1), fill, edge, w)
        elif node.shape == "cylinder":
            cap = (y1 - y0) * 0.2
            self.draw.ellipse((x0, y1 - cap, x1, y1), fill, edge, w)
            self.draw.rectangle((x0, y0 + cap / 2, x1, y1 - cap / 2), fill)
            self.draw.rectangle((x0, y0 + cap / 2, x0 + w - 1, y1 - cap / 2), edge)
            self.draw.rectangle((x1 - w + 1, y0 + cap / 2, x1, y1 - cap / 2), edge)
            self.draw.ellipse((x0, y0, x1, y0 + cap), fill, edge, w)
        else:
            h = w / 2
            x0, y0, x1, y1 = x0 + h, y0 + h, x1 - h, y1 - h
            mx, my, inset = (x0 + x1) / 2, (y0 + y1) / 2, 2 * node.slant * s
            corners: list[Point] = [(mx, y0), (x1, my), (mx, y1), (x0, my)]
            if node.shape == "trapezoid":
                corners = [(x0, y0), (x1, y0 + inset), (x1, y1 - inset), (x0, y1)]
            self.draw.polygon(corners, fill)
            self.draw.line([*corners, corners[0], corners[1]], edge, w, joint="curve")

    def container(self, x0: float, y0: float, x1: float, y1: float, color: str, dashed: bool) -> Node:
        """A box that encloses nodes: drawn before them, tinted half as strongly as they are."""
        box = (round(x0), round(y0), round(x1), round(y1))
        tint, edge = PALETTE[color]
        fill: Rgb = (255 + tint[0]) // 2, (255 + tint[1]) // 2, (255 + tint[2]) // 2
        s, w = SUPERSAMPLE, self.stroke
        if dashed:
            half = w / 2
            left, top, right, bottom = box[0] + half, box[1] + half, box[2] - half, box[3] - half
            self.draw.rectangle([v * s for v in (left, top, right, bottom)], fill)
            path = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
            self.polyline(path, edge, w, dashed=True)
        else:
            corners = (box[0] * s, box[1] * s, box[2] * s - 1, box[3] * s - 1)
            self.draw.rounded_rectangle(corners, self.radius * s, fill, edge, w * s)
        ident = self.record("container", color, box, "", fill)
        return Node(ident, "container", color, "", box)

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, fill: Rgb, edge: Rgb) -> None:
        """An outlined rectangle in whole pixels."""
        s = SUPERSAMPLE
        corners = (round(x0) * s, round(y0) * s, round(x1) * s - 1, round(y1) * s - 1)
        self.draw.rectangle(corners, fill, edge, self.stroke * s)

    def marker(self, shape: str, x: float, y: float, radius: float, color: Rgb) -> None:
        s = SUPERSAMPLE
        x, y, r = x * s, y * s, radius * s
        if shape == "circle":
            self.draw.ellipse((x - r, y - r, x + r, y + r), color)
        elif shape == "square":
            self.draw.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), color)
        elif shape == "triangle":
            self.draw.polygon([(x, y - 1.2 * r), (x + 1.1 * r, y + 0.8 * r), (x - 1.1 * r, y + 0.8 * r)], color)
        else:
            self.draw.polygon([(x, y - 1.3 * r), (x + 1.3 * r, y), (x, y + 1.3 * r), (x - 1.3 * r, y)], color)

    # ---- lines

    def polyline(self, points: Sequence[Point], color: Rgb, width: float, dashed: bool = False) -> None:
        s = SUPERSAMPLE
        if dashed:
            for a, b in zip(points, points[1:], strict=False):
                for p, q in _dashes(a, b, 0.42 * self.em, 0.3 * self.em):
                    self._segment(p, q, color, width)
        elif all(a[0] == b[0] or a[1] == b[1] for a, b in zip(points, points[1:], strict=False)):
            for a, b in zip(points, points[1:], strict=False):
                self._segment(a, b, color, width)
            for x, y in points[1:-1]:  # the corner pixels, which neither piece covers on every turn
                self._segment((x - width // 2, y), (x - width // 2 + width, y), color, width)
        else:
            scaled = [(x * s, y * s) for x, y in points]
            self.draw.line(scaled, color, round(width * s), joint="curve" if len(points) > 2 else None)

    def _segment(self, a: Point, b: Point, color: Rgb, width: float) -> None:
        """A straight piece; level and upright ones are filled to whole pixels, so that they stay crisp."""
        s = SUPERSAMPLE
        if a[0] != b[0] and a[1] != b[1]:
            self.draw.line((a[0] * s, a[1] * s, b[0] * s, b[1] * s), color, round(width * s))
            return
        back = width // 2
        x0, x1, y0, y1 = min(a[0], b[0]), max(a[0], b[0]), min(a[1], b[1]), max(a[1], b[1])
        if a[1] == b[1]:
            y0, y1 = math.floor(y0 - back), math.floor(y0 - back) + width
        if a[0] == b[0]:
            x0, x1 = math.floor(x0 - back), math.floor(x0 - back) + width
        self.draw.rectangle((round(x0 * s), round(y0 * s), round(x1 * s) - 1, round(y1 * s) - 1), color)

    def arrow(
        self, source: Node, target: Node, points: Sequence[Point], *, label: str = "", directed: bool = True,
        dashed: bool = False, label_segment: int = 0, color: Rgb = INK,
    ) -> None:  # fmt: skip
        """A line along `points` whose head's tip is the last one.

        A label stands above the middle of a level segment, right of the middle of an upright one.
        """
        width = self.stroke
        path = list(points)
        if directed:
            (ax, ay), (bx, by) = path[-2], path[-1]
            length = math.hypot(bx - ax, by - ay)
            ux, uy = (bx - ax) / length, (by - ay) / length
            long, half = min(0.62 * self.em, 0.7 * length), 0.27 * self.em
            base = (bx - ux * long, by - uy * long)
            centre = 0.5 * (width % 2)  # level and upright strokes of odd width sit half a pixel off
            ox, oy = (0.0, centre) if ay == by else (centre, 0.0) if ax == bx else (0.0, 0.0)
            corners = [
                (bx, by),
                (base[0] - uy * half, base[1] + ux * half),
                (base[0] + uy * half, base[1] - ux * half),
            ]
            path[-1] = (bx - ux * 0.8 * long, by - uy * 0.8 * long)
        self.polyline(path, color, width, dashed)
        if directed:
            self.draw.polygon([((x + ox) * SUPERSAMPLE, (y + oy) * SUPERSAMPLE) for x, y in corners], color)
        if label:
            (ax, ay), (bx, by) = points[label_segment], points[label_segment + 1]
            if ay == by:
                head = math.copysign(0.31 * self.em, bx - ax) if directed and label_segment == len(points) - 2 else 0
                drop = 0.5 if any(ch in label for ch in "gjpqy") else 0.32
                self.text((ax + bx) / 2 - head, ay - drop * self.em, label, "arrow", scale=0.9, anchor="ms")
            else:
                self.text(ax + 0.35 * self.em, (ay + by) / 2, label, "arrow", scale=0.9, anchor="lm")
        self.arrows.append(
            {
                "source": source.id, "target": target.id, "directed": directed, "label": label,
                "dashed": dashed, "points": [[round(x, 1), round(y, 1)] for x, y in points],
            }
        )  # fmt: skip


def _dashes(a: Point, b: Point, dash: float, gap: float) -> list[tuple[Point, Point]]:
    length = math.hypot(b[0] - a[0], b[1] - a[1])
    if length == 0:
        return []
    ux, uy = (b[0] - a[0]) / length, (b[1] - a[1]) / length

    def at(t: float) -> Point:
        # a coordinate that does not move keeps its exact value, so that level dashes stay level
        return (a[0] + ux * t if ux else a[0], a[1] + uy * t if uy else a[1])

    count = max(1, round((length + gap) / (dash + gap)))
    return [(at(i * (dash + gap)), at(min(length, i * (dash + gap) + dash))) for i in range(count)]
