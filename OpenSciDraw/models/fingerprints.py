"""Short hashes of a component's weights and of a tokenizer, read without loading them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from OpenSciDraw.errors import UserError
from OpenSciDraw.utils.files import parse_json

if TYPE_CHECKING:
    pass


def fingerprint(folder: Path) -> str | None:
    """Short hash that changes with a component's weights, read without loading them.

    Covers the config, every tensor's name, dtype and shape, and 64 bytes at the start, middle and end
    of each tensor in the folder's safetensors files. None when the folder holds no safetensors.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    rows: list[str] = []
    for path in files:
        try:
            rows += _tensor_rows(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged, or no safetensors file ({type(error).__name__}). Copy it again.") from error
    for row in sorted(rows):  # independent of how the tensors are spread over files
        digest.update(row.encode())
    return digest.hexdigest()[:16]


def _tensor_rows(path: Path) -> Iterator[str]:
    """A line for each tensor of a safetensors file: name, type, shape, and a few of its bytes."""
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if header_size > 100_000_000:
            raise ValueError(f"a header of {header_size} bytes")
        for name, info in parse_json(file.read(header_size)).items():
            if name == "__metadata__":
                continue
            start, end = info["data_offsets"]
            windows = []
            for at in (start, (start + end) // 2, max(start, end - 64)):
                file.seek(8 + header_size + at)
                windows.append(file.read(min(64, end - at)).hex())
            yield f"{name} {info['dtype']} {info['shape']} {windows}"


def tokenizer_fingerprint(folder: Path) -> str | None:
    """Short hash of what decides which tokens a text becomes: vocabulary, merges, added tokens, chat template."""
    names = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")
    content = [path.read_bytes() for name in names if (path := folder / name).is_file()]
    if not content:
        return None
    template, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if template.is_file():
        content.append(template.read_bytes())
    elif settings.is_file():
        content.append(json.dumps(parse_json(settings.read_bytes()).get("chat_template")).encode())
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in content)).hexdigest()[:16]
