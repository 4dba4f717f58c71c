"""Fitting a model into memory: activations within a budget, a quantised base, blocks that come and go."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BASE, merged
from diffusers import Flux2Transformer2DModel, QwenImageTransformer2DModel
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import TextBatch, build_model
from OpenSciDraw.parallel.sharding import Sharding, repeated_blocks, shard
from OpenSciDraw.training.compile_trial import compile_blocks
from OpenSciDraw.training.memory.activations import (
    ActivationBudget,
    SavedBytes,
    automatic_budget,
    measure_saved_bytes,
)
from OpenSciDraw.training.memory.offload import BlockOffload, each
from OpenSciDraw.weights import trainable
from OpenSciDraw.weights.quantization import quantization_config

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
KLEIN = "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,linear_in,linear_out,to_qkv_mlp_proj,attn.to_out"
QWEN = (
    "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "img_mlp.net.0.proj,img_mlp.net.2,txt_mlp.net.0.proj,txt_mlp.net.2"
)


# -- activations -------------------------------------------------------------------------------
def wider(family: str, device: str, width: int = 12) -> nn.Module:
    """More than 100 M parameters of the real classes, with a LoRA."""
    with torch.device(device):
        if family == "klein":
            made: nn.Module = Flux2Transformer2DModel(
                in_channels=128, num_layers=4, num_single_layers=8, attention_head_dim=64, num_attention_heads=width,
                joint_attention_dim=768, axes_dims_rope=(16, 16, 16, 16), guidance_embeds=False,
            )  # fmt: skip
        else:
            made = QwenImageTransformer2DModel(
                num_layers=6, attention_head_dim=64, num_attention_heads=width, joint_attention_dim=768,
                axes_dims_rope=(16, 24, 24),
            )  # fmt: skip
    made.requires_grad_(False)
    layers = trainable.resolve_lora_layers(made, KLEIN if family == "klein" else QWEN)
    made.add_adapter(LoraConfig(r=16, target_modules=layers))  # type: ignore[operator]
    return made.train()


def forward(family: str, transformer: nn.Module, device: str, side: int = 16, text: int = 64) -> Tensor:
    common = {
        "encoder_hidden_states": torch.randn(1, text, 768, device=device), "timestep": torch.tensor([0.5], device=device),
        "return_dict": False,
    }  # fmt: skip
    if family == "klein":
        ids = {"img_ids": (side * side, 4), "txt_ids": (text, 4)}
        places = {name: torch.zeros(1, *shape, dtype=torch.long, device=device) for name, shape in ids.items()}
        return transformer(hidden_states=torch.randn(1, side * side, 128, device=device), **common, **places)[0]
    latents = torch.randn(1, side * side, 64, device=device)
    return transformer(hidden_states=latents, img_shapes=[[(1, side, side)]], encoder_hidden_states_mask=None, **common)[0]


def step(family: str, transformer: nn.Module) -> tuple[int, int]:
    """FLOPs of a training step, and bytes that autograd keeps between its forward and backward."""
    with FlopCounterMode(display=False) as counter:
        with SavedBytes(transformer) as saved:
            out = forward(family, transformer, "meta")
        out.float().pow(2).mean().backward()
    return counter.get_total_flops(), saved.total


def test_measuring_keeps_nothing_alive() -> None:
    """Without Python's search for cycles: on an H200 1.7 GB of the first step stayed for as long as that did not run."""
    layer = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid())
    gc.disable()
    try:
        with SavedBytes(layer, [x := torch.randn(4, 8)]) as saved:
            out = layer(x)
        activation = out.untyped_storage()._weak_ref()
        assert saved.total == 4 * 8 * 4
        del out
        assert torch.UntypedStorage._expired(activation)
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["klein", "qwen"])
def test_flops_fall_linearly_as_the_budget_grows_and_kept_bytes_stay_within_it(family: str) -> None:
    """On meta: none recomputed 1.0, all 1.48 to 1.49; what autograd keeps is what the budget counted, and nearly fills it."""
    transformer = wider(family, "meta")
    blocks = len(repeated_blocks(transformer))
    assert sum(p.numel() for p in transformer.parameters()) > 100e6
    plain, whole = step(family, transformer)
    ActivationBudget(transformer, None)
    recomputed = step(family, transformer)[0] / plain
    assert recomputed == pytest.approx(1.483 if family == "klein" else 1.492, abs=0.002)
    for share in (0.3, 0.6, 1.02) if family == "klein" else (0.5, 1.02):
        budget = ActivationBudget(transformer, int(share * whole))
        forward(family, transformer, "meta")  # meets every kind of block
        flops, kept = step(family, transformer)
        assert kept <= share * whole
        assert kept >= 0.9 * min(1, share) * whole - whole / blocks  # a block is the smallest step
        assert budget.used == pytest.approx(kept, rel=0.02)
        assert flops / plain == pytest.approx(recomputed - (recomputed - 1) * budget.kept / blocks, abs=0.02)
    assert flops == plain and budget.kept == blocks


def test_a_budget_counts_activations_and_not_weights_that_are_gathered_for_the_forward() -> None:
    """Under FSDP2 autograd keeps views of gathered weights; they are freed, or counted as parameters."""
    used = []
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        for sharding in (None, Sharding(True), Sharding(False)):
            transformer = wider("klein", "cpu", width=2)
            if sharding:
                shard(transformer, sharding, torch.device("cpu"), torch.float32)
            budget = ActivationBudget(transformer, 10**12)
            forward("klein", transformer, "cpu", side=4).sum().backward()
            used.append(budget.used)
    finally:
        torch.distributed.destroy_process_group()
    assert used[0] > 0 and used == [used[0]] * 3


def test_blocks_that_train_differently_are_measured_separately() -> None:
    """A LoRA on the last block alone: the blocks before it keep nothing, and leave the budget to it."""
    transformer = wider("klein", "meta")
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_("lora_" in name and "single_transformer_blocks.7." in name)
    whole = step("klein", transformer)[1]
    budget = ActivationBudget(transformer, 10**12)
    forward("klein", transformer, "meta")
    assert budget.kept == 12 and len(budget._cost) > 2 and step("klein", transformer)[1] == whole


def gradients(transformer: nn.Module) -> list[Tensor]:
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            nn.init.constant_(parameter, 0.01)
    torch.manual_seed(1)
    transformer.zero_grad()
    forward("klein", transformer, "cpu", side=8).pow(2).mean().backward()
    return [p.grad for p in transformer.parameters() if p.grad is not None]


def test_gradients_are_the_same_bits_whatever_is_recomputed() -> None:
    transformer = wider("klein", "cpu", width=2)
    plain, whole = gradients(transformer), measure_saved_bytes(lambda: forward("klein", transformer, "cpu", side=8), transformer)
    for budget in (None, int(0.4 * whole), int(0.8 * whole)):
        chosen = ActivationBudget(transformer, budget)
        gradients(transformer)
        again = gradients(transformer)
        assert len(again) == len(plain) > 0 and all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
        assert chosen.kept < 12


def test_training_with_a_budget_equals_training_without(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    names = {"none": {}, "some": {"gradient_checkpointing": True, "activation_memory_gb": 0.004}}
    runs = {name: run(model_output_dir=str(tmp_path / name), max_train_steps=3, **given) for name, given in names.items()}
    files = [load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in names]
    for key in files[0]:
        assert torch.equal(files[0][key], files[1][key])
    assert 0 < runs["some"].activations.kept < 4


def test_auto_leaves_room_for_what_is_still_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**30)
    device = torch.device("cuda")
    assert automatic_budget(device, 0) == 62 * 2**30 - int(0.15 * 80 * 2**30)
    assert automatic_budget(device, 2**30) == automatic_budget(device, 0) - 2**30
    assert automatic_budget(device, 2**60) == 0


class Full:
    """A device that is full at the given calls of blocks (in order, recomputations included)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: set[int]):
        from OpenSciDraw.training.memory import activations

        self.calls, real = 0, activations.ActivationBudget.__call__

        def call(budget: ActivationBudget, block: Any, *args: Any) -> Any:
            self.calls += 1
            if self.calls in at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
            return real(budget, block, *args)

        monkeypatch.setattr(activations.ActivationBudget, "__call__", call)


@pytest.mark.parametrize("lora", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_step_that_does_not_fit_is_taken_again_with_more_recomputed_and_the_same_bits(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lora: bool  # type: ignore[no-untyped-def]
) -> None:
    """The second micro-step of an accumulation fails, twice: the first one's gradients come back too."""
    given = {"max_train_steps": 3, "gradient_checkpointing": True, "activation_memory_gb": 0.5, "gradient_accumulation_steps": 2,
             "use_lora": lora, "lora_dropout": 0.1 if lora else 0.0, "learning_rate": 1e-3}  # fmt: skip
    plain = run(model_output_dir=str(tmp_path / "plain"), **given)
    blocks = plain.activations.calls
    Full(monkeypatch, at={3 * blocks + 3, 4 * blocks + 3 + 2})
    full = run(model_output_dir=str(tmp_path / "full"), **given)
    for name, parameter in plain.parameters.items():
        assert torch.equal(parameter, full.parameters[name])
    said = [record.message for record in caplog.records if "does not fit" in record.message]
    assert len(said) == 2 and "step 1 does not fit (CUDA out of memory)" in said[0]


def test_a_step_that_does_not_fit_at_all_says_which_keys_to_change(run, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    Full(monkeypatch, at={1})
    with pytest.raises(UserError, match="Step 0 does not fit .*offload = True; a rank below 4.*scienceflow plan"):
        run(model_output_dir=str(tmp_path), max_train_steps=1, gradient_checkpointing=True, activation_memory_gb=None)


@pytest.mark.slow
def test_compiled_blocks_give_what_eager_ones_give() -> None:
    transformer = wider("klein", "cpu", width=2)

    def result() -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        transformer.zero_grad()
        out = forward("klein", transformer, "cpu", side=8)
        out.pow(2).mean().backward()
        return out.detach(), torch.cat([p.grad.flatten() for p in transformer.parameters() if p.grad is not None])

    eager = result()
    compile_blocks(transformer)
    compiled = result()
    for mine, theirs in zip(compiled, eager, strict=True):
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()
    whole = measure_saved_bytes(lambda: forward("klein", transformer, "cpu", side=8), transformer)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for bytes_kept in (None, whole // 2, 2 * whole):
        budget = ActivationBudget(transformer, bytes_kept)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(result(), compiled, strict=True))
    assert budget.used == pytest.approx(whole, rel=0.02)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # the budget compiles nothing anew


# -- quantised base ----------------------------------------------------------------------------
def stored_bytes(parameter: Tensor) -> int:
    if hasattr(parameter, "__tensor_flatten__"):
        return sum(getattr(parameter, name).nbytes for name in parameter.__tensor_flatten__()[0])
    return parameter.nbytes


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.015), ("fp8", 0.03)])
def test_a_quantised_base_is_small_close_and_takes_a_lora(kind: str, error: float, tmp_path: Path) -> None:
    """Measured on the embedded klein under bf16: relative velocity error 0.005 (int8) and 0.012 (fp8)."""
    torch.manual_seed(0)
    noisy, text = torch.randn(1, 128, 8, 8), TextBatch(torch.randn(1, 64, 192))
    values = merged(BASE, mixed_precision="bf16", dataset={"type": "ArXiVParquetDatasetV2", "base_dir": "x"})
    velocities, sizes = [], []
    for quantization in (None, kind):
        config = Config.model_validate(merged(values, quantization=quantization))
        model = build_model(config)
        model.load_vae()
        model.load_transformer(quantization_config(config, model))
        layers = trainable.make_trainable(model.transformer, config)
        blocks = [p for name, p in model.transformer.named_parameters() if "blocks" in name and "lora_" not in name]
        sizes.append(sum(map(stored_bytes, blocks)))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            velocities.append(model.velocity(noisy, torch.tensor([0.5]), text).float())
    assert len(layers) == 28 and sizes[1] < 0.56 * sizes[0]  # 8 bits and scales instead of 16
    assert (velocities[1] - velocities[0]).norm() / velocities[0].norm() < error
    assert model.transformer.proj_out.weight.dtype == torch.bfloat16  # outside the blocks: as it was

    parameters = trainable.trainable_parameters(model.transformer)
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in parameters.items())
    optimizer, losses = torch.optim.AdamW(parameters.values(), lr=5e-3), []
    for _ in range(15):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (model.velocity(noisy, torch.tensor([0.5]), text).float() + noisy).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]

    trainable.save_weights(model, model.transformer, parameters, tmp_path, config, write=True)
    plain = build_model(config)
    plain.load_vae()
    plain.load_transformer()
    plain.transformer.load_lora_adapter(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = (each.velocity(noisy, torch.tensor([0.5]), text).float() for each in (plain, model))
    assert (a - b).norm() / b.norm() < 2 * error  # the adapter does on the plain base what it learned on the quantised one


@pytest.mark.slow
def test_a_lora_on_an_int8_base_trains_end_to_end_and_validates_on_either_base(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pictures, held_out = {}, {}
    for name, unquantized in (("int8", False), ("unquantized", True)):
        out = tmp_path / name
        run(model_output_dir=str(out), quantization="int8", validate_unquantized=unquantized, learning_rate=5e-3, max_train_steps=8,
            validation_prompts=["a red box"], resolution_list=[[64, 64]])  # fmt: skip
        pictures[name] = (out / "validation_images" / "step_000000" / "00.png").read_bytes()
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        held_out[name] = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    run(model_output_dir=str(tmp_path / "plain"), max_train_steps=1, validation_prompts=["a red box"], resolution_list=[[64, 64]])
    plain = (tmp_path / "plain" / "validation_images" / "step_000000" / "00.png").read_bytes()
    assert plain == pictures["unquantized"] != pictures["int8"]
    assert held_out["int8"][-1] < held_out["int8"][0] and held_out["int8"] != held_out["unquantized"]
    a, b = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in held_out)
    assert all(torch.equal(a[key], b[key]) for key in a)  # what validation draws with changes no training


def test_wrong_quantisation_files_are_refused_by_name(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("bitsandbytes")
    values = merged(BASE, dataset={"type": "ArXiVParquetDatasetV2", "base_dir": "x"})
    for given in ({"quantization": "nf4"}, {"bnb_quantization_config_path": "q.json"}):
        config = Config.model_validate(merged(values, **given))
        with pytest.raises(UserError, match="CUDA GPU"):
            quantization_config(config, build_model(config))
    path = tmp_path / "q.json"
    config = Config.model_validate(merged(values, bnb_quantization_config_path=str(path)))
    gpu = build_model(config, torch.device("cuda"))
    for text, said in (("{", "cannot be read as JSON"), ('{"load_in_4bits": true}', "unknown load_in_4bits")):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            quantization_config(config, gpu)
    path.write_text('{"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}')
    assert quantization_config(config, gpu).load_in_4bit


@pytest.mark.slow
# -- blocks that come and go -------------------------------------------------------------------
def test_training_with_offloaded_blocks_is_training_without_to_the_bit(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    common = {
        "gradient_checkpointing": True, "gradient_accumulation_steps": 2, "validation_prompts": ["a red box"], "lora_dropout": 0.1,
        "resolution_list": [[64, 64]], "max_train_steps": 2, "quantization": "int8", "mixed_precision": "bf16",
    }  # fmt: skip
    runs = {
        away: run(**common, model_output_dir=str(tmp_path / str(away)), offload=away, **({"resident_blocks": 2} if away else {}))
        for away in (False, True)
    }
    a, b = (load_file(tmp_path / str(away) / "pytorch_lora_weights.safetensors") for away in (False, True))
    assert all(torch.equal(a[key], b[key]) for key in a)
    picture = "validation_images/step_000002/00.png"
    assert (tmp_path / "False" / picture).read_bytes() == (tmp_path / "True" / picture).read_bytes()
    assert runs[True].offload.peak_resident == 2


def test_a_quantised_weight_is_moved_part_by_part() -> None:
    """Its class knows neither the copying stream nor a copy that the host does not wait for: its tensors do."""
    linear = nn.Sequential(nn.Linear(32, 16, bias=False)).bfloat16()
    quantize_(linear, Int8WeightOnlyConfig())
    weight, moved = linear[0].weight.data, []
    copy = each(weight, lambda part: moved.append(type(part)) or part.clone())
    assert type(copy) is type(weight) and copy.shape == weight.shape and set(moved) == {Tensor} and len(moved) >= 2
    assert torch.equal(copy.dequantize(), weight.dequantize()) and copy.qdata.data_ptr() != weight.qdata.data_ptr()


@pytest.mark.parametrize("resident", [2, 3])
def test_an_absent_block_cannot_be_used_and_each_is_fetched_once_a_pass_before_it_is_needed(resident: int) -> None:
    transformer: Any = wider("klein", "cpu", width=2)
    ActivationBudget(transformer, None)
    plain = gradients(transformer)
    offload = BlockOffload(transformer, torch.device("cpu"), resident)
    ran: list[tuple[int, set[int]]] = []
    for index, block in enumerate(offload.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: ran.append((index, set(offload._here))))
    away = [p for p in transformer.transformer_blocks[0].parameters() if not p.requires_grad]
    assert all(p.numel() == 0 for p in away)
    assert all(torch.equal(a, b) for a, b in zip(gradients(transformer), plain, strict=True))
    assert [index for index, _ in ran] == [*range(12), *reversed(range(12))]
    assert all(following in here for (_, here), (following, _) in zip(ran, ran[1:], strict=False))
    assert offload.peak_resident == resident
    assert offload.fetched == 12 + 12 - resident  # forward: each once; backward: all but those that are still here
    with torch.no_grad():
        forward("klein", transformer, "cpu", side=4)
    frozen = list(transformer.transformer_blocks[0].attn.to_q.base_layer.parameters())
    with pytest.raises(RuntimeError):
        torch.nn.functional.linear(torch.randn(1, 128), frozen[0])
