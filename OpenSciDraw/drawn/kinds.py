"""The drawn diagrams: chains, flowcharts, method overviews, networks, graphs and trees.

Each function draws one diagram into an area of a canvas and returns its caption. Layouts keep their promises
by construction: nodes stand on a grid, arrows run in the lanes between its cells, and labels are chosen
among the words that fit the place they get.
"""

from __future__ import annotations

import math

from OpenSciDraw.drawn.canvas import BOX_SHAPES, Canvas, Node, Point, text_width
from OpenSciDraw.drawn.pieces import (
    Area,
    clear,
    describe_arrows,
    edge_word,
    elbow,
    intro,
    listing,
    named,
    new_words,
    number,
    put,
    sentence,
    split,
    spread,
    title_container,
)

# ---- kinds


def pipeline(c: Canvas, area: Area) -> str:
    """A chain of nodes on a grid, read like a snake: rows alternate in direction."""
    theme, words = new_words(c)
    em, rng = c.em, c.rng
    gap_x, gap_y = 2.0 * em, 1.6 * em
    grids = []
    for rows in range(1, 5):
        for cols in range(1, 7):
            w = (area.width - (cols - 1) * gap_x) / cols
            h = (area.height - (rows - 1) * gap_y) / rows
            if 2 <= rows * cols <= 9 and w >= 2.5 * em and h >= 1.8 * em and 0.6 <= w / h <= 4:
                grids += [(rows, cols)] * (1 if rows * cols == 2 else 4)
    rows, cols = rng.choice(grids) if grids else ((1, 2) if area.width > area.height else (2, 1))
    count = rows * cols - (rng.randrange(cols) if rows > 1 and cols > 1 and rows * cols > 4 else 0)
    w = (area.width - (cols - 1) * gap_x) / cols
    w = min(w, max(5.0 * em, rng.uniform(0.75, 1.0) * w), 8.5 * em)
    h = min((area.height - (rows - 1) * gap_y) / rows, w * rng.uniform(0.5, 0.8) + 0.4 * em, 4.5 * em)
    xs = spread(area.x0, area.x1, cols, w, 5.0 * em)
    ys = spread(area.y0, area.y1, rows, h, 3.4 * em)
    mixed = rng.random() < 0.6
    shape = rng.choice(("rectangle", "rounded rectangle"))
    nodes: list[Node] = []
    for i in range(count):
        row, col = divmod(i, cols)
        x = xs[col if row % 2 == 0 else cols - 1 - col]
        kind = rng.choice(BOX_SHAPES) if mixed else shape
        nodes.append(put(c, words, kind, x, ys[row], w, h, c.colors[i % len(c.colors)]))
    label_at = rng.randrange(count - 1) if rng.random() < 0.5 else -1
    for i, (left, right) in enumerate(zip(nodes, nodes[1:], strict=False)):
        row, side = i // cols, ("right", "left") if (i // cols) % 2 == 0 else ("left", "right")
        if (i + 1) // cols != row:
            side = ("bottom", "top")
        start, end = left.port(side[0]), right.port(side[1])
        level = start[1] == end[1]
        word = edge_word(c, abs(end[0] - start[0]) - 1.1 * em if level else w / 2 - 0.4 * em)
        c.arrow(left, right, (start, end), label=word if i == label_at else "")
    back = rows == 1 and count > 2 and ys[0] - h / 2 - area.y0 > 1.2 * em and rng.random() < 0.6
    if back:
        first, last = sorted(rng.sample(range(count), 2))
        if last - first > 1:
            lane = float(round(nodes[0].box[1] - 1.0 * em))
            path = [
                nodes[first].port("top"),
                (nodes[first].x, lane),
                (nodes[last].x, lane),
                nodes[last].port("top"),
            ]
            c.arrow(nodes[first], nodes[last], path, dashed=True)
    parts = listing([named(p) for p in c.components])
    order = "In order of processing there are" if rows > 1 else "From left to right there are"
    if cols == 1:
        order = "From top to bottom there are"
    return f"{intro(c, f'a {number(count)}-stage pipeline for {theme}')} {order} {parts}. {describe_arrows(c)}"


def flowchart(c: Canvas, area: Area) -> str:
    """Steps and one decision along the main axis; "No" goes back to an earlier step beside them."""
    theme, words = new_words(c)
    em, rng = c.em, c.rng
    upright = area.width < 19 * em or area.height > rng.choice((0.5, 0.8)) * area.width
    main, cross = (area.height, area.width) if upright else (area.width, area.height)
    lane, gap, least = (3.1 * em, 1.5 * em, 1.8 * em) if upright else (2.4 * em, 2.9 * em, 3.6 * em)
    total = 2 + max(1, min(rng.randint(2, 4), int((main + gap - 3.7 * least - 2 * gap) // (least + gap))))
    decision = rng.randint(1, total - 2)
    unit = (main - (total - 1) * gap) / (total + 0.7)  # a decision is 1.7 units long
    thick = min(cross - lane, 10 * em if upright else 6 * em)
    most = (2.8 * em, 4.8 * em) if upright else (7 * em, 9 * em)
    lengths = [min(1.7 * unit, most[1]) if i == decision else min(unit, most[0]) for i in range(total)]
    gap += min((main - sum(lengths) - (total - 1) * gap) / (total - 1), 1.5 * em)
    at = (main - sum(lengths) - (total - 1) * gap) / 2
    middle = (cross - lane) / 2 if upright else (cross + lane) / 2
    questions = ["Valid?", "Converged?", "Better?", "Done?", "Error < tol?", "Last step?", "OK?", "?"]
    nodes: list[Node] = []
    for i, length in enumerate(lengths):
        m = at + length / 2
        x, y = (area.x0 + middle, area.y0 + m) if upright else (area.x0 + m, area.y0 + middle)
        color = c.colors[0 if i in (0, total - 1) else 1 if i == decision else 2]
        if i == decision:
            size = (thick, length) if upright else (length, thick)
            nodes.append(put(c, rng.sample(questions[:-1], 7) + questions[-1:], "diamond", x, y, *size, color))
        else:
            size = (0.84 * thick, length) if upright else (length, min(0.7 * thick, 3.4 * em))
            shape = "rounded rectangle" if i in (0, total - 1) else "rectangle"
            nodes.append(put(c, words, shape, x, y, *size, color))
        at += length + gap
    out, into, side = ("bottom", "top", "right") if upright else ("right", "left", "top")
    for i, (before, after) in enumerate(zip(nodes, nodes[1:], strict=False)):
        c.arrow(before, after, (before.port(out), after.port(into)), label="Yes" if i == decision else "")
    asks, earlier = nodes[decision], nodes[rng.randrange(decision)]
    (ax, ay), (bx, by) = asks.port(side), earlier.port(side)
    if upright:
        far = float(round(max(ax, bx) + 1.0 * em))
        c.arrow(asks, earlier, [(ax, ay), (far, ay), (far, by), (bx, by)], label="No", label_segment=1)
    else:
        far = float(round(min(ay, by) - 1.0 * em))
        c.arrow(asks, earlier, [(ax, ay), (ax, far), (bx, far), (bx, by)], label="No", label_segment=1)
    parts = listing([named(p) for p in c.components])
    start = intro(c, f"a flowchart for {theme} with {number(total - 1)} steps and a decision")
    direction = "From top to bottom" if upright else "From left to right"
    return f"{start} {direction} it has {parts}. {describe_arrows(c)}"


def method(c: Canvas, area: Area) -> str:
    """Stages of one or of several parallel nodes; neighbouring stages of equal width share a container."""
    theme, words = new_words(c)
    em, rng = c.em, c.rng
    horizontal = area.width >= area.height
    main, cross = (area.width, area.height) if horizontal else (area.height, area.width)
    least, gap = ((2.4 if main < 20 * em else 3.4) * em, 1.9 * em) if horizontal else (1.8 * em, 1.9 * em)
    band = 1.7 * em  # for the container's title, above it or on its left
    stages = max(2, min(rng.randint(3, 5), int((main + gap - 1.2 * em) // (least + gap))))
    room = cross - band - 1.2 * em
    narrow = 2.2 * em if horizontal else 3.0 * em
    lanes = max(2, min(rng.randint(2, 3), int((room + 0.8 * em) // (narrow + 0.8 * em))))
    first = 1 if stages > 2 and rng.random() < 0.8 else 0
    last = stages - 1 if stages - first <= 2 or rng.random() < 0.7 else stages
    inside = range(first, max(first + 1, last))
    pad = 0.6 * em
    gap += min(rng.uniform(0, 1.5) * em, (main - stages * least - (stages - 1) * gap) / (2 * stages))
    low, high = (pad if inside[0] == 0 else 0), (main - pad if inside[-1] == stages - 1 else main)
    slots = split(low, high, stages, gap)
    long = min(slots[0][1], 8 * em if horizontal else 4 * em)
    thick = (room - (lanes - 1) * 0.8 * em) / lanes
    thick = min(thick, max(2 * em, 0.9 * long) if horizontal else 8 * em)
    rows = spread(band + pad, cross - pad, lanes, thick, rng.uniform(0.8, 1.8) * em)

    def place(m: float, n: float) -> Point:
        return (area.x0 + m, area.y0 + n) if horizontal else (area.x0 + n, area.y0 + m)

    starts = (slots[inside[0]][0] - long / 2 - pad, slots[inside[-1]][0] + long / 2 + pad)
    half = (rows[-1] - rows[0] + thick) / 2
    middle = (rows[0] + rows[-1]) / 2
    low_n, high_n = max(0.0, middle - half - pad - band), middle + half + pad
    (x0, y0), (x1, y1) = place(starts[0], low_n), place(starts[1], high_n)
    title_container(c, (x0, y0, x1, y1), horizontal, words)
    shapes = rng.choice((("rectangle",), ("rounded rectangle",), BOX_SHAPES))
    grid: list[list[Node]] = []
    for i, (m, _) in enumerate(slots):
        color, shape = c.colors[i % 8], rng.choice(shapes)
        where = rows if i in inside else [middle]
        size = (long, thick) if horizontal else (thick, long)
        grid.append([put(c, words, shape, *place(m, n), *size, color) for n in where])
    out, into = ("right", "left") if horizontal else ("bottom", "top")
    for here, there in zip(grid, grid[1:], strict=False):
        pairs = (
            list(zip(here, there, strict=True)) if len(here) == len(there) else [(p, q) for p in here for q in there]
        )
        for p, q in pairs:
            c.arrow(p, q, elbow(p.port(out), q.port(into), horizontal))
    held = [node for i in inside for node in grid[i]]
    parts = listing([named(p) for p in c.components[1:]])
    quoted = listing([f"'{node.label}'" for node in held])
    note = sentence(f"{named(c.components[0])} encloses {quoted}")
    start = intro(c, f"an overview of a method for {theme} with {number(stages)} stages")
    return f"{start} It consists of {parts}. {note} {describe_arrows(c)}"


def network(c: Canvas, area: Area) -> str:
    """A fully connected neural network: layers of circles, named below (or beside) them."""
    em, rng = c.em, c.rng
    names = ["Input", "Output"]
    count = max(2, min(rng.randint(3, 5), int(area.width // (3.4 * em))))
    hidden = ["Hidden"] if count == 3 else [f"Hidden {i}" for i in range(1, count - 1)]
    if any(text_width(h, em) > area.width / count - 0.6 * em for h in hidden):
        hidden = [f"H{i}" for i in range(1, count - 1)]
    names[1:1] = hidden
    if any(text_width(n, em) > area.width / count - 0.4 * em for n in names):
        names = ["In", *hidden, "Out"]
    columns = split(area.x0, area.x1, count, 0.0)
    bottom = area.y1 - 1.6 * em
    most = max(2, min(6, int((bottom - area.y0) // (1.9 * em)), 1 + int(columns[0][1] / (1.1 * em))))
    sizes = [rng.randint(2, most) for _ in names]
    pitch = (bottom - area.y0) / max(sizes)
    # a line's rise is at most 1.5 times its run, so it passes its layer's other circles at 0.55 pitches
    pitch = min(pitch, 1.5 * columns[0][1] / (max(sizes) - 1), 4 * em)
    radius = min(0.36 * pitch, 0.26 * columns[0][1], 1.4 * em)
    middle = (area.y0 + bottom) / 2
    layers = []
    for i, ((x, _), size) in enumerate(zip(columns, sizes, strict=True)):
        color = c.colors[0 if i == 0 else 1 if i == count - 1 else 2]
        ys = [middle + (k - (size - 1) / 2) * pitch for k in range(size)]
        layers.append([c.node("circle", x, y, 2 * radius, 2 * radius, color) for y in ys])
        c.text(x, middle + (max(sizes) - 1) / 2 * pitch + radius + 0.9 * em, names[i], "layer")
    directed = rng.random() < 0.35 and max(sizes) <= 4 and columns[0][1] > 4 * em
    for here, there in zip(layers, layers[1:], strict=False):
        for p in here:
            for q in there:
                c.arrow(p, q, (p.toward(q), q.toward(p)), directed=directed, color=(96, 96, 96))
    layered = [
        f"the layer '{n}' has {number(len(row))} {row[0].color} circles" for n, row in zip(names, layers, strict=True)
    ]
    joined = "Arrows lead from every node of a layer to" if directed else "Lines connect every node of a layer with"
    start = intro(c, f"a fully connected neural network with {number(count)} layers")
    return f"{start} {sentence('from left to right, ' + listing(layered))} {joined} every node of the next layer."


def graph(c: Canvas, area: Area) -> str:
    """Nodes on an ellipse with straight edges that do not cross: the rim and a fan of chords."""
    em, rng = c.em, c.rng
    theme, words = new_words(c)
    rx0, ry0 = area.width / 2, area.height / 2
    count = rng.randint(4, 7 if min(rx0, ry0) > 6 * em else 5)
    letters = [chr(ord("A") + i) for i in range(count)]
    wide = min(rx0 * 0.5, 5.5 * em)
    tall = min(ry0 * 0.36, 2.6 * em)
    with_words = wide > 3.2 * em and tall > 1.7 * em and rng.random() < 0.6
    size = (wide, tall) if with_words else (min(wide, tall),) * 2
    shape, color = ("ellipse" if with_words else "circle"), c.colors[:2]
    rx, ry = rx0 - size[0] / 2, ry0 - size[1] / 2
    if not with_words:
        rx, ry = min(rx, 1.6 * ry), min(ry, 1.6 * rx)
    cx, cy = (area.x0 + area.x1) / 2, (area.y0 + area.y1) / 2
    turn = -math.pi / 2
    nodes = []
    for i in range(count):
        x, y = (
            cx + rx * math.cos(turn + 2 * math.pi * i / count),
            cy + ry * math.sin(turn + 2 * math.pi * i / count),
        )
        tint = color[int(rng.random() < 0.3)]
        if with_words:
            nodes.append(put(c, words, shape, x, y, *size, tint))
        else:
            nodes.append(c.node(shape, x, y, *size, tint, letters[i]))
    edges = [(i, (i + 1) % count) for i in range(count)]
    if rng.random() < 0.5:
        edges.pop(rng.randrange(count))
    chords = [(0, k) for k in range(2, count - 1) if clear(nodes, 0, k, 0.4 * em)]
    edges += rng.sample(chords, min(len(chords), rng.randint(1, 3)))
    directed = rng.random() < 0.5
    for i, k in edges:
        p, q = (nodes[i], nodes[k]) if rng.random() < 0.6 else (nodes[k], nodes[i])
        c.arrow(p, q, (p.toward(q), q.toward(p)), directed=directed)
    parts = listing([named(p) for p in c.components])
    what = f"{'a directed' if directed else 'an undirected'} graph with {number(count)} nodes"
    start = intro(c, what + (f" for {theme}" if with_words else ""))
    return f"{start} The nodes are {parts}. {describe_arrows(c)}"


def tree(c: Canvas, area: Area) -> str:
    """A layered tree, each parent above (or left of) the middle of its children."""
    theme, words = new_words(c)
    em, rng = c.em, c.rng
    upright = area.width >= 0.9 * area.height
    main, cross = (area.height, area.width) if upright else (area.width, area.height)
    least = 3.0 * em if upright else 1.9 * em
    leaves = max(2, min(8, int(cross // (least + 0.7 * em))))
    depth = 3 if leaves >= 3 and main >= (9.5 if upright else 11) * em else 2
    fans = [rng.randint(2, min(3, leaves))] if depth == 3 else [leaves if leaves <= 4 else rng.randint(2, 4)]
    if depth == 3:
        fans += [1] * fans[0]
        for _ in range(leaves - fans[0]):
            fans[rng.randint(1, fans[0])] += rng.random() < 0.8
    ends = sum(fans[1:]) or fans[0]
    slots = split(0, cross, ends, 0.7 * em)
    thick = min(slots[0][1], (6.5 if upright else 3.2) * em)
    levels = split(0, main, depth, (1.8 if upright else 2.2) * em)
    long = min(levels[0][1], (2.8 if upright else 7.5) * em)
    reach = min(levels[1][0] - levels[0][0], long + 5 * em)
    levels = [(main / 2 + (i - (depth - 1) / 2) * reach, long) for i in range(depth)]
    shape = rng.choice(("rectangle", "rounded rectangle", "ellipse"))

    def place(level: int, n: float) -> Node:
        m = levels[level][0]
        x, y = (area.x0 + n, area.y0 + m) if upright else (area.x0 + m, area.y0 + n)
        size = (thick, long) if upright else (long, thick)
        return put(c, words, shape, x, y, *size, c.colors[level])

    root = place(0, cross / 2)
    out, into = ("bottom", "top") if upright else ("right", "left")
    straight, directed = rng.random() < 0.4, rng.random() < 0.6
    links: list[tuple[Node, Node]] = []
    at = 0
    for i in range(fans[0]):
        mine = [n for n, _ in slots[at : at + (fans[i + 1] if depth == 3 else 1)]]
        at += len(mine)
        child = place(1, (mine[0] + mine[-1]) / 2)
        links.append((root, child))
        links += [(child, place(2, n)) for n in mine if depth == 3]
    for p, q in links:
        s, e = p.port(out), q.port(into)
        c.arrow(p, q, (s, e) if straight else elbow(s, e, not upright), directed=directed)
    parts = listing([named(p) for p in c.components])
    start = intro(c, f"a tree with {number(depth)} levels for {theme}, whose root is '{root.label}'")
    return f"{start} It has {parts}. {describe_arrows(c)}"
