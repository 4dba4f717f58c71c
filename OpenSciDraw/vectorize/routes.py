"""The way of a connector: from a stroke's pixels to a line with few points, with its width and its heads."""

from __future__ import annotations

import heapq
import math

import numpy as np

_LEVEL = 0.14  # rise over run below which a piece is level (or upright)
_LINE = 4.0  # pixels: width of a line too short to be measured
_NEAR = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


def route(ink: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(n, 2) points (x, y) of the way through the ink (h, w, 0/1) from near `start` to near `end`, along its middle.

    Dijkstra's algorithm over pixels, whose cost falls with the distance to the stroke's edge. Without a way: the two ends.
    """
    import cv2

    ys, xs = np.nonzero(ink)
    left, top = int(xs.min()), int(ys.min())
    part = np.pad(ink[top : int(ys.max()) + 1, left : int(xs.max()) + 1], 1)
    depth = cv2.distanceTransform(part, cv2.DIST_L2, 5)
    across = part.shape[1]
    cost = np.where(part > 0, 1 + 12 / np.maximum(depth, 0.5) ** 2, np.inf).ravel().tolist()
    points = np.stack([xs - left + 1, ys - top + 1], 1)

    def nearest(place: np.ndarray) -> int:
        x, y = points[int(((points + (left - 1, top - 1) - place) ** 2).sum(1).argmin())]
        return int(y) * across + int(x)

    first, last = nearest(start), nearest(end)
    steps = [(dy * across + dx, math.hypot(dx, dy)) for dy, dx in _NEAR]
    best, came = {first: 0.0}, {first: first}
    queue = [(0.0, first)]
    while queue:
        so_far, at = heapq.heappop(queue)
        if at == last:
            break
        if so_far > best[at]:
            continue
        for step, length in steps:
            to = at + step
            total = so_far + length * cost[to]
            if total < best.get(to, math.inf):
                best[to], came[to] = total, at
                heapq.heappush(queue, (total, to))
    if last not in came or last == first:
        return np.array([start, end], float)
    path = [last]
    while path[-1] != first:
        path.append(came[path[-1]])
    return np.array([(at % across + left - 0.5, at // across + top - 0.5) for at in reversed(path)], float)


def simplified(path: np.ndarray, unit: float) -> np.ndarray:
    """(m, 2) the corners of a path of pixels; `unit`: its pixels per pixel of the picture. Level and upright pieces become so."""
    import cv2

    rough = cv2.approxPolyDP(path.astype(np.float32).reshape(-1, 1, 2), 1.5 * unit, False).reshape(-1, 2).astype(float)
    corners = [0, *(int(((path - corner) ** 2).sum(1).argmin()) for corner in rough[1:-1]), len(path) - 1]
    while len(corners) > 2 and math.dist(path[corners[0]], path[corners[1]]) < 3 * unit:
        del corners[1]  # the way to a stroke's middle at its end is no bend
    while len(corners) > 2 and math.dist(path[corners[-1]], path[corners[-2]]) < 3 * unit:
        del corners[-2]
    points = path[corners].copy()
    for k, (a, b) in enumerate(zip(corners, corners[1:], strict=False)):
        dx, dy = np.abs(path[b] - path[a])
        own = path[a : b + 1]
        inner = own[len(own) // 5 : max(len(own) // 5 + 1, len(own) - len(own) // 5)]
        if dy <= max(_LEVEL * dx, unit) and dx > dy:
            points[k : k + 2, 1] = np.median(inner[:, 1])
        elif dx <= max(_LEVEL * dy, unit) and dy > dx:
            points[k : k + 2, 0] = np.median(inner[:, 0])
    return points


def to_edge(point: np.ndarray, before: np.ndarray, mask: np.ndarray, reach: float, inset: float) -> np.ndarray:
    """Where the line from `before` through `point` meets the shape (mask h, w), looked for `reach` pixels about the point.

    `inset`: how far the shape's edge lies inside the mask's."""
    ahead = point - before
    length = float(np.linalg.norm(ahead))
    if not length:
        return point
    ahead = ahead / length
    for along in np.arange(-min(reach, length), reach, 0.5):
        x, y = point + along * ahead
        if 0 <= round(y) < mask.shape[0] and 0 <= round(x) < mask.shape[1] and mask[round(y), round(x)]:
            return point + (along + inset) * ahead
    ys, xs = np.nonzero(mask)
    at = int(((xs - point[0]) ** 2 + (ys - point[1]) ** 2).argmin())
    meeting = np.array([xs[at], ys[at]], float)
    if abs(ahead[0]) < 1e-6:  # an upright end stays upright, a level one level
        meeting[0] = point[0]
    elif abs(ahead[1]) < 1e-6:
        meeting[1] = point[1]
    return meeting


def stroke_color(pixels: np.ndarray, solid: np.ndarray) -> np.ndarray:
    """Colour (3,) of a stroke in pixels (h, w, 3): that of its thickest places, which have no soft border."""
    import cv2

    depth = cv2.distanceTransform(solid, cv2.DIST_L2, 5)
    own = pixels[depth >= 0.7 * depth.max()]
    luma = own.sum(1)
    return np.median(own[luma <= np.percentile(luma, 50)], axis=0)


def line_width(pixels: np.ndarray, path: np.ndarray, color: np.ndarray) -> float:
    """Width of the line along a path (n, 2), in its pixels: across the path, the sum of the shares of the line's colour.

    Finer than a pixel; a thin line that is paler than `color` is so much thinner. The second half, where a head may be, does
    not count.
    """
    if len(path) < 8:
        return _LINE
    reach = 10
    away = color - 255
    widths = []
    for k in range(3, max(4, len(path) // 2 - 3), 3):
        ahead = path[k + 3] - path[k - 3]
        aside = np.array([-ahead[1], ahead[0]]) / max(1e-6, float(np.linalg.norm(ahead)))
        at = path[k] + np.arange(-reach, reach + 1)[:, None] * aside
        x, y = (np.clip(np.round(at[:, i]).astype(int), 0, pixels.shape[1 - i] - 1) for i in (0, 1))
        share = np.clip((pixels[y, x] - 255) @ away / max(1.0, float(away @ away)), 0, 1)
        empty = np.flatnonzero(share < 0.1)
        first, last = empty[empty < reach], empty[empty > reach]
        widths.append(share[(first[-1] if len(first) else 0) : (last[0] if len(last) else len(share))].sum())
    return max(1.0, float(np.percentile(widths, 30))) if widths else _LINE


def head_size(solid: np.ndarray, tip: np.ndarray, before: np.ndarray, width: float, unit: float) -> tuple[float, float]:
    """Length and width of the head at `tip`, where a line of `width` arrives from `before`, all in the stroke's pixels.

    What is left of the stroke where a disc wider than its line fits is its heads.
    """
    import cv2

    ahead = (tip - before) / max(1e-6, float(np.linalg.norm(tip - before)))
    disc = 2 * math.ceil(0.75 * width) + 1
    thick = cv2.morphologyEx(np.pad(solid, disc), cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (disc, disc)))
    count, blobs, _, middles = cv2.connectedComponentsWithStats(thick[disc:-disc, disc:-disc], connectivity=8)
    usual = (4 * width, 3 * width)
    if count < 2:
        return usual
    blob = 1 + int(((middles[1:] - tip) ** 2).sum(1).argmin())
    if math.dist(middles[blob], tip) > 14 * unit:
        return usual
    ys, xs = np.nonzero(blobs == blob)
    away = np.stack([xs, ys], 1) + 0.5 - tip
    length = float((-(away @ ahead)).max())
    ys, xs = np.nonzero(solid)
    away = np.stack([xs, ys], 1) + 0.5 - tip
    along, aside = -(away @ ahead), np.abs(away @ np.array([-ahead[1], ahead[0]]))
    area = int(((along > -unit) & (along < length) & (aside < length)).sum())
    wide = 2 * area / max(length, 1.0)  # of a triangle, whose sharp corners the disc cut off
    return (length, wide) if 0 < length < 16 * unit and wide < 16 * unit else usual
