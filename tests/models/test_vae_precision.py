"""In which precision the VAE encodes: chosen by measured error, recorded, and nobody else's flags are touched."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import BASE, merged

from OpenSciDraw.config import Config
from OpenSciDraw.encode import run as encode
from OpenSciDraw.errors import UserError
from OpenSciDraw.models import vae_precision
from OpenSciDraw.models.base import build_model
from OpenSciDraw.models.vae_precision import (
    ERROR_BOUND,
    drawn_pictures,
    fastest_within,
    latent_errors,
    products_in_tf32,
)
from OpenSciDraw.store.encoded import EncodedStore

DRAWN = {"figures": "drawn:6", "resolution": 128, "samples_per_shard": 3, "num_workers": 0, "batch_size": 2}


def config_for(folder: Path, **changes: object) -> Config:
    dataset = {"type": "ArXiVParquetDatasetV2", "base_dir": str(folder), "parquet_base_path": "store"}
    return Config.model_validate(merged({**BASE, "text": "online", "dataset": dataset, "encode": DRAWN}, **changes))


def stored(folder: Path) -> list[torch.Tensor]:
    store = EncodedStore(folder / "store", with_text=False)
    return [store.figures.tensor(row) for row in range(len(store.figures))]


def test_the_fastest_precision_within_the_bound_is_taken() -> None:
    assert fastest_within({"bf16": ERROR_BOUND / 2, "tf32": 1e-6}) == "bf16"
    assert fastest_within({"bf16": ERROR_BOUND * 2, "tf32": ERROR_BOUND}) == "tf32"
    assert fastest_within({"bf16": float("nan"), "tf32": float("nan")}) == "fp32"


def test_attention_by_products_is_the_vaes_own_within_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_precision, "QUERIES", 20)  # 96 pixels of the tiny VAE's latents in five parts
    model = build_model(config_for(Path("unused")))
    model.load_vae()
    pixels = torch.cat(list(drawn_pictures(64, 96))[:2])
    before = model.encode_images(pixels)
    own = copy.deepcopy(model.vae.encoder.state_dict())
    vae_precision.attend_by_products(model.vae.encoder)
    replaced = [type(module.processor) for module in model.vae.encoder.modules() if hasattr(module, "processor")]
    assert replaced == [vae_precision.AttentionByProducts]
    assert all(torch.equal(value, own[name]) for name, value in model.vae.encoder.state_dict().items())
    torch.testing.assert_close(model.encode_images(pixels), before, rtol=1e-4, atol=1e-5)


def test_the_error_of_bf16_is_measured_and_that_of_fp32_is_none() -> None:
    model = build_model(config_for(Path("unused")))
    model.load_vae()
    errors = latent_errors(model, list(drawn_pictures(64, 96)), ["bf16", "fp32"])
    assert errors["fp32"] == 0 and 2**-12 < errors["bf16"] < 0.1


def test_auto_on_a_cpu_is_fp32_to_the_bit_and_says_so_in_the_contract(tmp_path: Path) -> None:
    for name, chosen in (("auto", "auto"), ("exact", "fp32")):
        encode.main(config_for(tmp_path / name, encode={"vae_precision": chosen}))
        contract = EncodedStore(tmp_path / name / "store", with_text=False).figures.contract
        assert contract.latents["vae_precision"] == "fp32"
    for one, other in zip(stored(tmp_path / "auto"), stored(tmp_path / "exact"), strict=True):
        assert torch.equal(one, other)


def test_auto_finishes_a_store_in_the_precision_that_it_was_begun_in(tmp_path: Path) -> None:
    encode.main(config_for(tmp_path, encode={"vae_precision": "bf16"}))
    whole = stored(tmp_path)
    for file in (tmp_path / "store" / "figures").glob("00001.*"):
        file.unlink()
    encode.main(config_for(tmp_path))
    for one, other in zip(stored(tmp_path), whole, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UserError, match="latents.vae_precision: 'fp32' here, 'bf16' there"):
        encode.main(config_for(tmp_path, encode={"vae_precision": "fp32"}))


def test_a_store_that_records_no_precision_is_one_in_fp32() -> None:
    model = build_model(config_for(Path("unused")))
    model.load_empty_vae()
    differences = []
    for precision in ("auto", "fp32", "bf16"):
        model.vae_precision = precision
        ours = model.contract()
        old = replace(ours, latents={name: value for name, value in ours.latents.items() if name != "vae_precision"})
        differences.append([*ours.differences(old, ["latents"]), *old.differences(ours, ["latents"])])
    assert differences[:2] == [[], []] and len(differences[2]) == 2


def test_the_switches_for_tf32_are_as_before_afterwards_even_after_an_error() -> None:
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    for allowed in (True, False):
        with pytest.raises(ZeroDivisionError), products_in_tf32(allowed):
            assert [switch.allow_tf32 for switch in switches] == [allowed, allowed]
            _ = 1 / 0
        assert [switch.allow_tf32 for switch in switches] == before


def test_figures_encoded_while_training_choose_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(config_for(Path("unused")))
    model.load_vae()
    shapes: list[tuple[int, ...]] = []

    def choice(_, pictures) -> str:  # type: ignore[no-untyped-def]
        shapes.extend(picture.shape for picture in pictures)
        return "bf16"

    monkeypatch.setattr(vae_precision, "choose", choice)
    pixels = torch.rand(1, 3, 64, 96)
    latents = model.encode_images(pixels)
    assert model.vae_precision == "bf16" and shapes == [(1, 3, 64, 96)] * vae_precision.PICTURES
    assert latents.dtype == torch.float32 and torch.equal(latents, latents.bfloat16().float())
