"""Parameters in a family's original file of all weights (which ComfyUI loads), and back to diffusers' names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of checkpoints that hold other parts of a model too


@dataclass(frozen=True)
class Place:
    """A parameter's name in the original, and which of its rows it is: part `part` of `parts` equal ones (fused q, k, v)."""

    name: str
    part: int = 0
    parts: int = 1
    halves_swapped: bool = False  # of rows: the original has (shift, scale) where diffusers has (scale, shift)


def to_original(places: Mapping[str, Place], read: Callable[[str], Tensor]) -> Iterable[tuple[str, Tensor]]:
    """The original's tensors one by one, by name, from parameters that `read` gives by diffusers' names."""
    by_name: dict[str, dict[int, str]] = {}
    for parameter, place in places.items():
        by_name.setdefault(place.name, {})[place.part] = parameter
    for name, parts in by_name.items():
        tensors = [read(parts[part]) for part in sorted(parts)]
        whole = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        yield name, torch.cat(whole.chunk(2)[::-1]) if places[parts[0]].halves_swapped else whole


class FromOriginal:
    """An original file read by diffusers' names: `Weights` of other_programs.py.

    `there`: the file's names (with one of PREFIXES or without); `read` and `shape_of`: a tensor and its shape by the file's name.
    """

    def __init__(
        self, places: Mapping[str, Place], there: Iterable[str], read: Callable[[str], Any],
        shape_of: Callable[[str], tuple[int, ...]],
    ):  # fmt: skip
        self._in_file = {self._bare(name): name for name in there}
        self._places = {parameter: place for parameter, place in places.items() if place.name in self._in_file}
        self._read, self._shape_of = read, shape_of
        used = {place.name for place in self._places.values()}
        self.unknown = sorted(name for bare, name in self._in_file.items() if bare not in used)

    @staticmethod
    def _bare(name: str) -> str:
        return next((name.removeprefix(p) for p in PREFIXES if name.startswith(p)), name)

    @property
    def names(self) -> list[str]:
        return sorted([*self._places, *self.unknown])

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._places:
            return self._shape_of(name)
        place = self._places[name]
        first, *rest = self._shape_of(self._in_file[place.name])
        return (first // place.parts, *rest)

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        whole: Tensor = self._read(self._in_file[place.name])
        if place.parts > 1:
            whole = whole.chunk(place.parts)[place.part]
        return torch.cat(whole.chunk(2)[::-1]) if place.halves_swapped else whole
