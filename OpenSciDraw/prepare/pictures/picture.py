"""A picture of a paper: drawn or taken as it is, or the reason why not."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


class RejectedPicture(ValueError):
    """A picture that cannot be used. The message is the reason: 'kind: details'."""


@dataclass(frozen=True)
class Picture:
    """A PNG or JPEG file's bytes, its pixels (RGB) and whether it was drawn from a vector file."""

    data: bytes
    image: Image.Image
    vector: bool

    @property
    def width(self) -> int:
        return self.image.width

    @property
    def height(self) -> int:
        return self.image.height
