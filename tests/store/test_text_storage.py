"""Prompt embeddings stored in int8 or fp8: how far they are from exact, and that a store is read as it was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import merged

from OpenSciDraw.config import Config
from OpenSciDraw.encode import run as encode
from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import build_model
from OpenSciDraw.store import codec as text_codec
from OpenSciDraw.store.shard import TEXT_PARTS
from OpenSciDraw.store.table import StoreTable


def there_and_back(tensor: torch.Tensor, codec: str) -> torch.Tensor:
    data = text_codec.encode(tensor, codec)
    assert len(data) == text_codec.encoded_bytes(tensor.shape, codec)
    return text_codec.decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), tensor.shape, codec)


@pytest.mark.parametrize("codec, bound, share", [("bfloat16", 0.0, 1.0), ("int8", 0.0075, 0.51), ("fp8", 0.03, 0.51)])
def test_the_error_and_the_size_are_those_of_the_codec(codec: str, bound: float, share: float) -> None:
    exact = torch.randn(64, 1536, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact[0, :3] *= 1000  # as a language model's first token
    back = there_and_back(exact, codec)
    errors = (back.double() - exact.double()).norm(dim=1) / exact.double().norm(dim=1)
    assert back.dtype == torch.bfloat16 and float(errors[1:].max()) <= bound
    assert text_codec.encoded_bytes(exact.shape, codec) <= share * text_codec.encoded_bytes(exact.shape, "bfloat16")


@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_zeros_and_odd_widths_survive_and_what_is_not_finite_is_refused(codec: str) -> None:
    assert there_and_back(torch.zeros(3, 128), codec).eq(0).all()
    odd = torch.randn(7, 33, generator=torch.Generator().manual_seed(1))
    assert (there_and_back(odd, codec).float() - odd).norm() / odd.norm() < 0.03
    with pytest.raises(ValueError, match="not finite"):
        text_codec.encode(torch.tensor([[1.0, float("inf")]]), codec)


def test_a_store_says_its_codec_and_training_on_it_must_ask_for_the_same(store_config: dict, tmp_path: Path) -> None:
    values = merged(store_config, dataset={"base_dir": str(tmp_path)}, encode={"text_storage": "int8"})
    config = Config.model_validate(values)
    assert encode.main(config) == 0
    stored = StoreTable(tmp_path / "store" / "text", TEXT_PARTS)
    exact = StoreTable(Path(store_config["dataset"]["base_dir"]) / "store" / "text", TEXT_PARTS)
    assert stored.contract.text["stored_dtype"] == "int8"
    for row in range(3):
        a, b = stored.tensor(row).double(), exact.tensor(row).double()
        assert 0 < float((a - b).norm() / b.norm()) < 0.01
    ratio = stored.numbers("nbytes").sum() / exact.numbers("nbytes").sum()
    assert 0.5 < ratio < 0.52
    asks, other = build_model(config), build_model(Config.model_validate(store_config))
    asks.load_vae()
    other.load_vae()
    asks.contract().require(stored.contract, ("text",), tmp_path)
    with pytest.raises(UserError, match="text.stored_dtype: 'bfloat16' here, 'int8' there"):
        other.contract().require(stored.contract, ("text",), tmp_path)


def test_training_reads_an_int8_store(store_config: dict, tmp_path: Path, run) -> None:  # type: ignore[no-untyped-def]
    values = merged(store_config, dataset={"base_dir": str(tmp_path)}, encode={"text_storage": "int8"})
    assert encode.main(Config.model_validate(values)) == 0
    change = {"dataset": values["dataset"], "encode": values["encode"], "caption_dropout": 0.0, "max_train_steps": 2}
    assert run(**change, model_output_dir=str(tmp_path / "run")).step == 2
