"""Adapters merged into all weights, all weights as ComfyUI's one file and back, and adapters extracted from two sets of weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import BASE, write_config
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from OpenSciDraw.cli import main
from OpenSciDraw.config import Config
from OpenSciDraw.models.base import build_model
from OpenSciDraw.weights.start import load_pretrained

SHARDS, FULL = "diffusion_pytorch_model.safetensors", "transformer"


def noise(*shape: int, key: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(key + sum(shape))) * 0.2


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    """A config, and two adapters: of fused q, k, v by original names, and by diffusers' names."""
    folder = tmp_path_factory.mktemp("merge")
    write_config(folder / "base.py", {**BASE, "dataset": {"base_dir": "x"}, "run_name": "tiny"})
    width = tiny.transformer.transformer_blocks[0].attn.to_q.in_features
    key = "diffusion_model.double_blocks.0.img_attn.qkv"
    one = {f"{key}.lora_A.weight": noise(4, width), f"{key}.lora_B.weight": noise(3 * width, 4, key=1)}
    save_file(one, folder / "one.safetensors")
    key = "transformer.transformer_blocks.0.attn.to_k"
    two = {f"{key}.lora_A.weight": noise(2, width, key=2), f"{key}.lora_B.weight": noise(width, 2, key=3)}
    save_file(two, folder / "two.safetensors")
    return folder


def loaded(folder: Path, weights: Path | None, **changes: object) -> dict[str, Tensor]:
    """The transformer's parameters when a run starts from `weights`."""
    start = {} if weights is None else {"pretrained_full_ckpt_path": str(weights)}
    config = Config.model_validate({**BASE, "dataset": {"base_dir": "x"}, "use_lora": False, **start, **changes})
    model = build_model(config)
    model.load_transformer()
    load_pretrained(model, config)
    return dict(model.transformer.named_parameters())


def test_several_adapters_with_strengths_become_part_of_the_weights(files: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    loras = [f"{files / 'one.safetensors'}=0.5", f"{files / 'two.safetensors'}=-2"]
    assert main(["merge", str(files / "base.py"), "--lora", *loras, "--out", str(tmp_path), "--format", "both"]) == 0
    assert "a LoRA file with ai-toolkit or ComfyUI names, 3 layers, strength 0.5" in capsys.readouterr().out
    base, one, two = loaded(files, None), load_file(files / "one.safetensors"), load_file(files / "two.safetensors")
    (a1, b1), (a2, b2) = ([tensor.double() for tensor in one.values()], [tensor.double() for tensor in two.values()])
    found = loaded(files, tmp_path)
    parts = dict(zip(("to_q", "to_k", "to_v"), (b1 @ a1).chunk(3), strict=True))
    for name, before in base.items():
        wanted = before.detach().double()
        if name.startswith("transformer_blocks.0.attn.to_") and name.split(".")[3] in parts:
            wanted = wanted + 0.5 * parts[name.split(".")[3]] - (2 * b2 @ a2 if "to_k" in name else 0)
        torch.testing.assert_close(found[name].detach().double(), wanted, rtol=1e-5, atol=1e-6)
    # ComfyUI's file: read by diffusers' own converter of the original names, and by ours
    single = tmp_path / "tiny_comfyui.safetensors"
    theirs = convert_flux2_transformer_checkpoint_to_diffusers(dict(load_file(single)))
    again = loaded(files, single)
    assert theirs.keys() == found.keys() == again.keys()
    assert all(torch.equal(theirs[name], found[name]) and torch.equal(again[name], found[name]) for name in found)


def test_all_weights_of_a_checkpoint_file_with_its_prefix_are_read_and_others_refused(files: Path, tmp_path: Path) -> None:
    from OpenSciDraw.errors import UserError

    assert main(["merge", str(files / "base.py"), "--lora", f"{files / 'two.safetensors'}=0", "--out", str(tmp_path), "--format",
                 "comfyui", "--dtype", "bf16"]) == 0  # fmt: skip
    tensors = load_file(tmp_path / "tiny_comfyui.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "prefixed.safetensors")
    base, found = loaded(files, None), loaded(files, tmp_path / "prefixed.safetensors")
    assert all(torch.equal(found[name], base[name].bfloat16().float()) for name in base)
    save_file({**tensors, "vae.decoder.weight": torch.zeros(2)}, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match=r"1 unexpected \(vae.decoder.weight\)"):
        loaded(files, tmp_path / "more.safetensors")


def test_an_adapter_extracted_from_two_sets_of_weights_brings_one_to_the_other(files: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    base = str(files / "base.py")
    assert main(["merge", base, "--lora", str(files / "one.safetensors"), "--out", str(tmp_path / "tuned")]) == 0
    extract = ["extract", base, str(tmp_path / "tuned")]
    assert main([*extract, "--keep", "0.999999", "--out", str(tmp_path / "got"), "--format", "both"]) == 0
    assert "3 layers, rank 4: 1.0000 of the norm" in capsys.readouterr().out
    for name in ("pytorch_lora_weights.safetensors", "tiny_comfyui.safetensors"):
        assert main(["merge", base, "--lora", str(tmp_path / "got" / name), "--out", str(tmp_path / "again")]) == 0
        tuned, again = (load_file(tmp_path / place / FULL / SHARDS) for place in ("tuned", "again"))
        assert all(torch.allclose(tuned[key], again[key], atol=1e-5) for key in tuned)
    capsys.readouterr()
    assert main([*extract, "--rank", "2", "--out", str(tmp_path / "less")]) == 0
    share = float(re.search(r"rank 2: (0\.\d+) of the norm", capsys.readouterr().out)[1])  # type: ignore[index]
    before, after = loaded(files, None), load_file(tmp_path / "tuned" / FULL / SHARDS)
    names = [f"transformer_blocks.0.attn.to_{part}.weight" for part in "qkv"]
    values = [torch.linalg.svdvals((after[name] - before[name]).detach().double()) for name in names]
    kept = sum(v[:2].square().sum() for v in values) / sum(v.square().sum() for v in values)
    assert share == pytest.approx(float(kept) ** 0.5, abs=1e-3)


@pytest.mark.parametrize("rank, side", [(3, 200), (40, 60)])
def test_the_leading_product_of_a_large_matrix_is_that_of_the_whole_decomposition(rank: int, side: int) -> None:
    from OpenSciDraw.weights.updates import leading, rank_for

    left, right = torch.linalg.qr(noise(side, side)).Q, torch.linalg.qr(noise(side, side, key=1)).Q
    values = torch.logspace(0, -3, side)
    matrix = left @ torch.diag(values) @ right
    down, up, share = leading(matrix, rank)
    best = left[:, :rank] @ torch.diag(values[:rank]) @ right[:rank]
    torch.testing.assert_close(up @ down, best, rtol=0, atol=0.05 * float(values[rank]))
    assert share == pytest.approx(float(values[:rank].norm() / values.norm()), abs=1e-4)
    wanted = 1 + int((values.square().cumsum(0) < 0.81 * values.square().sum()).sum())
    assert rank_for(matrix, 0.9) == wanted > 3 and rank_for(torch.zeros(3, 4), 0.9) == 1


def test_sample_draws_a_config_with_adapters_as_the_merged_weights_draw(files: Path, tmp_path: Path) -> None:
    draw = ["--prompt", "a box", "--width", "64", "--height", "64", "--steps", "2", "--seed", "3"]
    lora = f"{files / 'one.safetensors'}=0.7"
    assert main(["sample", str(files / "base.py"), *draw, "--lora", lora, "--out", str(tmp_path / "a")]) == 0
    assert main(["merge", str(files / "base.py"), "--lora", lora, "--out", str(tmp_path / "m")]) == 0
    values = {**BASE, "dataset": {"base_dir": "x"}, "pretrained_full_ckpt_path": str(tmp_path / "m")}
    write_config(tmp_path / "merged.py", values)
    assert main(["sample", str(tmp_path / "merged.py"), *draw, "--out", str(tmp_path / "b")]) == 0
    assert main(["sample", str(files / "base.py"), *draw, "--out", str(tmp_path / "c")]) == 0
    pictures = [(tmp_path / place / "00_seed3.png").read_bytes() for place in "abc"]
    assert pictures[0] == pictures[1] != pictures[2]


def test_export_turns_a_file_of_another_program_into_both_formats(files: Path, tmp_path: Path, tiny) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.weights.adapter_files import read_adapter_file

    one = files / "one.safetensors"
    assert main(["export", str(one), "--config", str(files / "base.py"), "--out", str(tmp_path)]) == 0
    wanted = read_adapter_file(one, tiny).updates
    for path in sorted(tmp_path.glob("*.safetensors")):
        found = read_adapter_file(path, tiny).updates
        assert found.keys() == wanted.keys()
        assert all(torch.allclose(found[n].difference(), wanted[n].difference(), atol=1e-6) for n in wanted)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert main(["export", str(one), "--out", str(tmp_path)]) == 2  # whose model it is, nothing says
