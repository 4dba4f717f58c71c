"""A drawn picture as a figure that can be edited: SVG, TikZ and PowerPoint, written in a worker by the functions of `vectorize`."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from OpenSciDraw.errors import UserError
from OpenSciDraw.studio.calls import Call, Given
from OpenSciDraw.studio.playground import image_file
from OpenSciDraw.studio.results import download
from OpenSciDraw.studio.state import Studio
from OpenSciDraw.utils.files import make_folder, real

_ENDINGS = {"svg": ".svg", "tikz": ".tex", "pptx": ".pptx"}


def make(studio: Studio, given: Given) -> Any:
    """Read a picture and write its formats; the share of it that is explained, in a line, and the id of the files."""
    file = real(image_file(studio, given.text("image")))
    status = file.stat()
    identity = blake2b(f"{file}\n{status.st_size}\n{status.st_mtime_ns}".encode(), digest_size=16).hexdigest()
    folder = make_folder(studio.places.own / "cache" / "editable" / identity)
    return studio.look.ask("vectorize", file=str(file), out=str(folder)) | {"id": identity, "formats": list(_ENDINGS)}


def get(studio: Studio, given: Given) -> Any:
    """One of the files, to be kept."""
    identity, kind = given.text("id", most=64), given.text("format")
    file = studio.places.own / "cache" / "editable" / identity / f"figure{_ENDINGS.get(kind, '')}"
    if not identity.isalnum() or kind not in _ENDINGS or not file.is_file():
        raise UserError("There is no such file: choose 'Editable' beside the picture again.")
    return download(file, file.name)


CALLS: Sequence[Call] = (Call("POST", "/api/editable/make", make), Call("GET", "/api/editable/get", get))
