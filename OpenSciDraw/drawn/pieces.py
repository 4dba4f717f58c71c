"""What kinds of figures have in common: places, words, captions, arrows around others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from OpenSciDraw.drawn.canvas import LABEL_ROOM, Canvas, Node, Point, text_width

THEMES: dict[str, str] = {
    "image recognition": "Image,Patches,CNN,ViT,Encoder,Decoder,Features,Pool,MLP,Softmax,Loss,Logits,Mask,RoI,Conv,"
    "ResNet block,Class label,Feature map,Backbone,Classifier,Data augmentation,Pixel decoder,Box head,Norm",
    "language modelling": "Text,Tokens,BPE,Embed,Encoder,Decoder,Attention,Self-attention,Feed forward,Norm,LM,"
    "Softmax,Logits,LSTM,Query,Key,Value,Output,Prompt,Context,Memory,Beam search,Linear,Loss",
    "text-to-image synthesis": "Noise,VAE,U-Net,DiT,Text encoder,Prompt,Latents,Denoiser,Sampler,Decoder,Sample,CLIP,"
    "Time step,Cross attention,Image,Mask,Guidance,LoRA,T5,Noise level,Patchify,Velocity",
    "reinforcement learning": "Agent,Policy,Critic,Actor,Reward,State,Action,Replay buffer,Env,Value,TD error,Goal,"
    "World model,Planner,Q-net,Rollout,Target network,Return,Loss,GAE",
    "protein analysis": "DNA,RNA,MSA,Protein,Sequence,Folding,Structure,Cell,Gene,Alignment,Template,Reads,PCR,"
    "Pair features,Residues,Assay,Genome,Binding site,Docking,Score,Ligand",
    "climate modelling": "Ocean,Ice,Forcing,Solver,Grid,Model,Output,Data,Land,Wind,Rain,Satellite data,Forecast,"
    "Assimilation,Ensemble,Sea level,Boundary conditions,Flux,CO2,Regional model",
    "an optics experiment": "Laser,Lens,Beam,Sample,Filter,Camera,Detector,Mirror,Pump,Probe,Signal,ADC,Trigger,"
    "Vacuum cell,Amplifier,Spectrum,Beam splitter,Fibre,AOM,PC,Photodiode,Lock-in amplifier",
    "a data system": "API,Cache,Queue,Worker,Database,Index,Shard,Logs,Client,Server,Load balancer,Store,ETL,Query,"
    "Stream,Auth,Message broker,Web app,Backup,Monitor,Scheduler,User",
}
EDGE_WORDS = (
    "x",
    "z",
    "h",
    "y",
    "data",
    "query",
    "latent",
    "update",
    "features",
    "gradient",
    "tokens",
    "feedback",
)
CONTAINERS = (
    "Stage 1", "Training", "Backbone", "Module", "Shared weights", "Inner loop", "Model", "Core", "Phase 2",
    "Parallel branches", "Frozen", "Main block", "Level 1", "Part A",
)  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Area:
    """Where a figure may draw: pixels, x0 < x1 and y0 < y1."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def width(self) -> float:
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        return self.y1 - self.y0


def listing(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def named(component: dict[str, Any]) -> str:
    return a(f"{component['color']} {component['shape']} labelled '{component['label']}'")


def intro(c: Canvas, subject: str) -> str:
    verbs = ("The figure illustrates", "The diagram shows", "The figure shows", "The schematic depicts")
    return f"{c.rng.choice(verbs)} {subject}."


def describe_arrows(c: Canvas) -> str:
    """Every connection by the labels of its two ends; container ends are named by their label too."""
    names = {p["id"]: f"'{p['label']}'" for p in c.components}
    plain = [e for e in c.arrows if not e["label"] and not e["dashed"]]
    parts = []
    for directed, verb in ((True, "arrow points from"), (False, "line connects")):
        joint = "to" if directed else "with"
        pairs = [f"{names[e['source']]} {joint} {names[e['target']]}" for e in plain if e["directed"] == directed]
        if len(pairs) == 1:
            parts.append(f"An {verb} {pairs[0]}." if directed else f"A {verb} {pairs[0]}.")
        elif pairs:
            parts.append(f"Arrows point from {listing(pairs)}." if directed else f"Lines connect {listing(pairs)}.")
    for e in c.arrows:
        if e["label"] or e["dashed"]:
            noun = a("dashed arrow" if e["dashed"] else "arrow") + (f" labelled '{e['label']}'" if e["label"] else "")
            parts.append(sentence(f"{noun} points from {names[e['source']]} to {names[e['target']]}"))
    return " ".join(parts)


def new_words(c: Canvas) -> tuple[str, list[str]]:
    theme = c.rng.choice(tuple(THEMES))
    words = THEMES[theme].split(",")
    c.rng.shuffle(words)
    return theme, words


def put(c: Canvas, words: list[str], shape: str, x: float, y: float, w: float, h: float, color: str) -> Node:
    """A node with the next word that fits it."""
    room = LABEL_ROOM[shape]
    inner_w, inner_h = 2 * round(w / 2) * room[0], 2 * round(h / 2) * room[1]
    if inner_h < 1.05 * c.em or inner_w < 2.1 * c.em:  # too small for this shape's label
        shape, room = "rectangle", LABEL_ROOM["rectangle"]
        inner_w, inner_h = 2 * round(w / 2) * room[0], 2 * round(h / 2) * room[1]
    return c.node(shape, x, y, w, h, color, c.take(words, inner_w, inner_h))


def edge_word(c: Canvas, room: float) -> str:
    """A word for an arrow with `room` pixels for it, or none."""
    fits = [w for w in EDGE_WORDS if text_width(w, 0.9 * c.em) <= room]
    return c.rng.choice(fits) if fits else ""


def elbow(start: Point, end: Point, horizontal: bool) -> list[Point]:
    """From start to end with one lane across, half way; straight where they are level."""
    (ax, ay), (bx, by) = start, end
    if (ay == by) if horizontal else (ax == bx):
        return [start, end]
    if horizontal:
        mid = float(round((ax + bx) / 2))
        return [start, (mid, ay), (mid, by), end]
    mid = float(round((ay + by) / 2))
    return [start, (ax, mid), (bx, mid), end]


def split(low: float, high: float, count: int, gap: float) -> list[tuple[float, float]]:
    """`count` equal (centre, length) cells with `gap` between them."""
    length = (high - low - (count - 1) * gap) / count
    return [(low + length / 2 + i * (length + gap), length) for i in range(count)]


def spread(low: float, high: float, count: int, length: float, most: float) -> list[float]:
    """Centres of `count` pieces of `length`, as far apart as there is room, but with gaps of at most `most`."""
    gap = min(most, (high - low - count * length) / max(1, count - 1))
    return [(low + high) / 2 + (i - (count - 1) / 2) * (length + gap) for i in range(count)]


def clear(nodes: Sequence[Node], i: int, k: int, margin: float) -> bool:
    """Whether the straight line from node i to node k passes every other ellipse at `margin` pixels or more."""
    p, q = nodes[i], nodes[k]
    for node in (n for j, n in enumerate(nodes) if j not in (i, k)):
        rx, ry = (node.box[2] - node.box[0]) / 2 + margin, (node.box[3] - node.box[1]) / 2 + margin
        ax, ay = (p.x - node.x) / rx, (p.y - node.y) / ry  # where the ellipse is the unit circle
        dx, dy = (q.x - p.x) / rx, (q.y - p.y) / ry
        if abs(ax * dy - ay * dx) < math.hypot(dx, dy):
            return False
    return True


def title_container(c: Canvas, box: tuple[float, float, float, float], level: bool, taken: Sequence[str]) -> None:
    """A container with its title inside, along the top or, reading upward, along the left."""
    em, rng = c.em, c.rng
    x0, y0, x1, y1 = box
    c.container(x0, y0, x1, y1, "gray" if rng.random() < 0.5 else c.colors[-1], rng.random() < 0.5)
    span = (x1 - x0 if level else y1 - y0) - 1.2 * em
    titles = [t for t in CONTAINERS if t not in taken and text_width(t, em) <= span]
    title = rng.choice(titles or ["M"])
    c.components[-1]["label"] = title
    if level:
        c.text((x0 + x1) / 2, y0 + 0.95 * em, title, "container")
    else:
        c.text(x0 + 0.95 * em, (y0 + y1) / 2, title, "container", vertical=True)
