"""How encoded rows were made, and how their tensors lie in bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from OpenSciDraw.errors import UserError
from OpenSciDraw.store import codec as text_codec
from OpenSciDraw.utils.files import parse_json

SCHEMA_VERSION = 2
_READABLE_SCHEMAS = (1, 2)  # 1 has crc32 checksums; they took four times as long as reading the row
SEEN = "those that an edit starts from"  # text["pictures"], where the text encoder reads pictures
_IF_ABSENT = {"vae_precision": "fp32"}  # a contract's fields that older shards lack


@dataclass(frozen=True)
class Contract:
    """How encoded rows were made. `origin` informs; every other field must agree before rows are used."""

    family: str
    origin: dict[str, Any]
    latents: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    picture: dict[str, Any] = field(default_factory=dict)  # resolution and fit: of a store, not of a model
    schema: int = SCHEMA_VERSION

    def differences(self, other: Contract, parts: Iterable[str]) -> list[str]:
        """Fields that differ, as text; fingerprints and precision count only where both sides know them."""
        found = [] if self.family == other.family else [f"family: {self.family!r} here, {other.family!r} there"]
        if not {self.schema, other.schema} <= set(_READABLE_SCHEMAS):
            found.append(f"schema: {self.schema} here, {other.schema} there (this program reads {_READABLE_SCHEMAS})")
        for part in parts:
            mine, theirs = getattr(self, part), getattr(other, part)
            for key in sorted(mine.keys() | theirs.keys()):
                a, b = (side.get(key, _IF_ABSENT.get(key)) for side in (mine, theirs))
                is_open = (key in ("fingerprint", "tokenizer") and None in (a, b)) or (key == "vae_precision" and "auto" in (a, b))
                if a != b and not is_open:
                    found.append(f"{part}.{key}: {a!r} here, {b!r} there")
        return found

    def require(self, other: Contract, parts: Iterable[str], where: Path | str) -> None:
        """Raises UserError, naming each field, when `other` (of `where`) was made in another way."""
        found = self.differences(other, parts)
        if found:
            raise UserError(
                f"{where} was encoded in another way than this config asks for ('here' is the config):\n  "
                + "\n  ".join(found)
                + "\nUse the model and settings it was encoded with, or encode into another folder."
            )

    def require_declared(self, declared: dict[str, Any]) -> None:
        """Raises UserError when a field of `dataset.contract` is none of this contract's, or has another value."""
        known = {**self.latents, **self.text, "family": self.family}
        for key, value in declared.items():
            if key not in known or known[key] not in (value, "auto"):  # "auto": a precision that the config leaves open
                has = known.get(key, "no such field")
                raise UserError(f"dataset.contract: {key} = {value!r}, but this config's model has {has!r}.")

    @classmethod
    def from_json(cls, text: str | bytes) -> Contract:
        return cls(**parse_json(text))

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def recorded_precision(contract: Contract) -> str:
    """In which the VAE computed a shard's latents."""
    return str(contract.latents.get("vae_precision", _IF_ABSENT["vae_precision"]))


def to_bytes(tensor: Tensor, contract: Contract) -> bytes:
    """A row's bytes, in C order: latents are bf16, text is what the contract says (store/codec.py)."""
    return text_codec.encode(tensor, _codec(contract))


def from_bytes(buffer: Tensor, shape: Sequence[int], contract: Contract) -> Tensor:
    """The tensor, bf16, of `buffer` (bytes,) uint8; where that is bf16 too, it shares the memory."""
    return text_codec.decode(buffer, shape, _codec(contract))


def bytes_of_shape(shape: Sequence[int], contract: Contract) -> int:
    return text_codec.encoded_bytes(shape, _codec(contract))


def _codec(contract: Contract) -> str:
    """A shard of figures has nothing about text in its contract."""
    codec: str = contract.text.get("stored_dtype", "bfloat16")
    return codec
