"""DPO and M-DPO against formulas written by hand in float64: modes, masks, weights, the cap; the reference; training with them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import merged
from safetensors.torch import load_file
from torch import Tensor

from OpenSciDraw import flow
from OpenSciDraw.config import Config, PreferenceConfig
from OpenSciDraw.datasets.batch import AXES, Batch
from OpenSciDraw.datasets.preference_groups import PreferenceGroups
from OpenSciDraw.errors import UserError
from OpenSciDraw.parallel.sharding import repeated_blocks
from OpenSciDraw.registry import TRAIN_ITERATION_FUNCS
from OpenSciDraw.train_iteration_funcs import preference
from OpenSciDraw.train_iteration_funcs.flow_matching import LossOutput, Place
from OpenSciDraw.training.run import Training
from train_OpenSciDraw_loop import train

MODES = ("pooled", "contrastive", "adaptive", "mean")


# -- from logits to losses ------------------------------------------------------------------------------------
def by_hand(
    logits: list[float | None], mode: str, beta: float, weights: tuple[float, ...] = (1, 1, 1), cap: float | None = None,
    tau: float | None = None, harder: list[float] | None = None,
) -> float:  # fmt: skip
    """The loss of one group, axis by axis; None: no loser."""
    there = [axis for axis, logit in enumerate(logits) if logit is not None]
    n = len(there)
    z = {d: beta * (logits[d] if cap is None else min(logits[d], cap)) for d in there}  # type: ignore[type-var, operator]
    total = sum(weights[d] for d in there)
    w = {d: weights[d] * n / total for d in there}
    term = {d: math.log(1 + math.exp(-z[d])) for d in there}  # -log sigmoid(z)
    if mode == "contrastive":
        return math.log(1 + sum(w[d] * math.exp(-z[d]) for d in there)) / n
    if mode == "adaptive":
        share = {d: w[d] * math.exp(-z[d]) for d in there}
    elif mode == "mean" and tau is not None:
        share = {d: w[d] * math.exp(harder[d] / tau) for d in there}  # type: ignore[index]
    else:
        share = w
    return sum(share[d] * term[d] for d in there) / sum(share.values())


GROUPS: list[list[float | None]] = [
    [0.01, -0.02, 0.03], [0.015, None, -0.005], [None, None, 0.004], [-0.3, 0.2, None], [0.0, 0.0, 0.0],
]  # fmt: skip
HARDER = [[0.1, -0.2, 0.05]] * len(GROUPS)


def tensors(groups: list[list[float | None]] = GROUPS) -> tuple[Tensor, Tensor]:
    """Logits, with NaN where nobody is, and the mask."""
    numbers = [[math.nan if logit is None else logit for logit in group] for group in groups]
    logits = torch.tensor(numbers, dtype=torch.float64, requires_grad=True)
    return logits, ~logits.isnan()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "settings",
    [
        {}, {"beta": 2000.0, "max_margin": None}, {"max_margin": 0.01}, {"axis_weights": {"component": 2.0, "arrow": 0.5}},
        {"tau": 0.1, "mode": "mean"},
    ],
)  # fmt: skip
def test_losses_are_the_formulas(mode: str, settings: dict[str, Any]) -> None:
    rules = PreferenceConfig.model_validate(settings)
    logits, present = tensors()
    harder = torch.tensor(HARDER, dtype=torch.float64)
    weights = preference.axis_weights(rules, present).double()
    found = preference.losses_of_groups(logits, present, weights, mode, rules, harder)
    named = rules.axis_weights.model_dump()
    for value, group, each in zip(found.tolist(), GROUPS, HARDER, strict=True):
        expected = by_hand(group, mode, rules.beta, tuple(named[axis] for axis in AXES), rules.max_margin, rules.tau, each)
        assert value == pytest.approx(expected, rel=1e-6)  # the weights are fp32
    found.sum().backward()
    assert torch.isfinite(logits.grad[present]).all() and (logits.grad[~present] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_an_axis_without_a_loser_changes_nothing(mode: str) -> None:
    """A group of two losers out of three is the group of two; the published code has a logit of 0 there, which is another loss."""
    rules, none = PreferenceConfig(), torch.zeros(1, 2, dtype=torch.float64)
    three, present = tensors([[0.004, None, -0.01]])
    two = torch.tensor([[0.004, -0.01]], dtype=torch.float64)
    here = preference.losses_of_groups(three, present, present.double(), mode, rules, torch.zeros_like(three))
    alone = preference.losses_of_groups(two, torch.ones(1, 2).bool(), torch.ones(1, 2).double(), mode, rules, none)
    assert torch.equal(here, alone)
    mistaken = by_hand([0.004, 0.0, -0.01], mode, rules.beta)
    assert abs(here.item() - mistaken) > 0.01


@pytest.mark.parametrize("mode", MODES)
def test_with_one_loser_every_mode_is_dpo(mode: str) -> None:
    logits = torch.tensor([[0.013]], dtype=torch.float64)
    there = torch.ones(1, 1).bool()
    rules = PreferenceConfig(max_margin=None)
    found = preference.losses_of_groups(logits, there, there.double(), mode, rules, torch.zeros_like(logits))
    assert found.item() == pytest.approx(-math.log(1 / (1 + math.exp(-1.3))))


@pytest.mark.parametrize("mode", MODES)
def test_beyond_the_cap_no_gradient_pushes_the_loser_away(mode: str) -> None:
    rules = PreferenceConfig(max_margin=0.02)
    logits, present = tensors([[0.021, 0.019, -0.01]])
    preference.losses_of_groups(logits, present, present.double(), mode, rules, torch.zeros_like(logits)).sum().backward()
    assert logits.grad[0, 0] == 0 and (logits.grad[0, 1:] < 0).all()


def test_the_adaptive_weights_have_no_gradient() -> None:
    rules = PreferenceConfig(max_margin=None)
    logits, present = tensors([[0.01, -0.02, 0.03]])
    preference.losses_of_groups(logits, present, present.double(), "adaptive", rules, torch.zeros_like(logits)).sum().backward()
    z = rules.beta * logits.detach()[0]
    share = torch.exp(-z) / torch.exp(-z).sum()
    torch.testing.assert_close(logits.grad[0], -share * rules.beta * torch.sigmoid(-z))


# -- from pictures to logits -------------------------------------------------------------------------------------
def built(group_config: dict, folder: Path, reset: Any = None, **changes: Any) -> Training:
    """A run that has not trained, with an adapter that does something."""
    if reset is not None:
        reset()
    run = Training(Config.model_validate(merged(group_config, model_output_dir=str(folder), **changes)))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
            elif run.config.use_lora is False and parameter.ndim > 1:
                parameter.add_(0.01 * torch.randn_like(parameter) * parameter.std())
    return run


def with_mask(batch: Batch, mask: list[list[bool]]) -> Batch:
    """Losers that are not there are NaN: whoever reads one shows it."""
    axes = torch.tensor(mask)
    assert batch.losers is not None
    losers = batch.losers.clone()
    losers[~axes] = math.nan
    return replace(batch, losers=losers, axes=axes)


MASK = [[True, True, True], [True, False, True]]


def output(run: Training, batch: Batch, name: str | None = None, **settings: Any) -> LossOutput:
    config = Config.model_validate({**run.config.model_dump(), "preference": {**run.config.preference.model_dump(), **settings}})
    objective = TRAIN_ITERATION_FUNCS.get(name or config.train_iteration_func_name)
    return objective(run.model, batch, Place(3, 5, 0, 1), config, run.empty_text)


def alone(run: Training, latents: Tensor, noise: Tensor, sigma: Tensor, text: Tensor) -> float:
    """L of one picture, written out: mean squared error of the velocity, in float64."""
    clean = run.model.normalize(latents[None])
    with torch.no_grad():
        noisy = (1 - sigma) * clean + sigma * noise
        found = run.model.velocity(noisy, sigma[None], run.model.collate_text([text]))
    return (found.double() - (noise - clean).double()).pow(2).mean().item()


@pytest.mark.parametrize("name", ["dpo", "mdpo"])
def test_the_objective_is_the_formula_over_pictures_that_are_run_one_by_one(
    name: str, group_config: dict, tmp_path: Path, fresh_accelerate: Any
) -> None:
    """One noise and one noise level for a group; reference and policy; the mean over groups, and the winner's own loss."""
    run = built(group_config, tmp_path, weighting_scheme="sigma_sqrt")
    batch = with_mask(run.dataset.batch([0, 1]), MASK)
    found = output(run, batch, name, winner_weight=0.3, beta=50.0, max_margin=0.05)
    run.model.transformer.disable_adapters()  # PEFT's own switch, and one transformer for both
    base, policy = run.model.transformer, built(group_config, tmp_path / "again", fresh_accelerate).model.transformer
    noises = flow.keyed_noise(3, 5, batch.sample_ids, batch.latents[0].shape)  # type: ignore[index]
    quantile = flow.stratified_quantiles(3, 5, batch.sample_ids, 0, 2)
    sigmas = (1 - quantile).clamp(flow.SIGMA_MIN, 1)  # uniform
    losses, winners, sums, counts = [], [], torch.zeros(3, 3).double(), torch.zeros(3).double()
    for group in (0, 1):
        noise, sigma, text = noises[group], sigmas[group], batch.text[group]  # type: ignore[index]
        noise = noise.view(1, *run.model.normalize(batch.latents[:1]).shape[1:])  # type: ignore[index]
        pictures = [batch.latents[group], *batch.losers[group]]  # type: ignore[index]
        value: dict[str, list[float]] = {}
        for kind, transformer in (("ref", base), ("policy", policy)):
            run.model.transformer = transformer
            value[kind] = [sigma.item() ** -2 * alone(run, picture, noise, sigma, text) for picture in pictures]
        change = [after - before for after, before in zip(value["policy"], value["ref"], strict=True)]
        logits = [-change[0] + change[1 + d] if MASK[group][d] else None for d in range(3)]
        losses.append(by_hand(logits, "pooled" if name == "dpo" else "contrastive", 50.0, cap=0.05))
        winners.append(value["policy"][0])
        for d in range(3):
            if MASK[group][d]:
                counts[d] += 1
                sums[:, d] += torch.tensor([logits[d] > 0, logits[d], change[1 + d]]).double()  # type: ignore[operator]
    assert found.loss.item() == pytest.approx(sum(losses) / 2 + 0.3 * sum(winners) / 2, rel=2e-4)
    assert found.sigma.tolist() == pytest.approx(sigmas.tolist())  # type: ignore[union-attr]
    unweighted = [winner * sigma**2 for winner, sigma in zip(winners, sigmas.tolist(), strict=True)]
    assert found.per_sample.tolist() == pytest.approx(unweighted, rel=1e-4)
    named = dict(zip(found.means.names, found.means.sums.T.tolist(), strict=True))  # type: ignore[union-attr]
    for at, what in enumerate(("accuracy", "margin", "loser_change")):
        for d, axis in enumerate(AXES):
            assert named[f"preference_{what}_{axis}"] == pytest.approx([sums[at, d].item(), counts[d].item()], rel=1e-2, abs=1e-4)
    assert named["preference_winner_change"][1] == 2 and named["preference_loss"][0] == pytest.approx(sum(losses), rel=2e-4)


def test_before_training_every_logit_is_0_to_the_bit(group_config: dict, tmp_path: Path, fresh_accelerate: Any) -> None:
    for lora, precision in ((True, "bf16"), (False, "bf16"), (False, "no")):
        fresh_accelerate()
        values = {"use_lora": lora, "mixed_precision": precision, "model_output_dir": str(tmp_path / f"{lora}{precision}")}
        run = Training(Config.model_validate(merged(group_config, **values)))
        found = output(run, run.dataset.batch([0, 1]), "dpo", winner_weight=0.0)
        assert found.loss.item() == pytest.approx(math.log(2), rel=1e-6) and (found.means.sums[0] == 0).sum() == 10  # type: ignore[union-attr]


def test_captions_are_never_dropped_and_accumulated_halves_are_the_whole(
    group_config: dict, tmp_path: Path, fresh_accelerate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of a batch is the mean of its halves' gradients, also where a group has fewer losers than another."""
    run = built(group_config, tmp_path, caption_dropout=1.0)
    whole = with_mask(run.dataset.batch([0, 1]), MASK)

    def keyed(batch: Batch, place: Place, config: Config, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Noise without the place in the batch."""
        levels = flow.keyed_uniform("test", 0, 0, batch.sample_ids)
        return levels, flow.noise_of(None, 0, 0, batch.sample_ids, clean)

    monkeypatch.setattr(preference, "drawn_noise", keyed)
    parts = [
        replace(
            whole, sample_ids=[whole.sample_ids[at]], captions=[whole.captions[at]], latents=whole.latents[at : at + 1],  # type: ignore[index]
            text=[whole.text[at]], losers=whole.losers[at : at + 1], axes=whole.axes[at : at + 1],  # type: ignore[index]
        )
        for at in (0, 1)
    ]  # fmt: skip
    gradients = []
    for batches in ([whole], parts):
        run.model.transformer.zero_grad()
        for batch in batches:
            (output(run, batch).loss / len(batches)).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in run.parameters.items()})  # type: ignore[union-attr]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    other = replace(whole, text=[run.empty_text] * 2)
    assert not torch.equal(output(run, whole).loss, output(run, other).loss)


# -- the reference -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "no"},
        {"mixed_precision": "bf16", "lora_dropout": 0.5},
        {"mixed_precision": "bf16", "fp8_products": True},
        {"mixed_precision": "bf16", "quantization": "int8"},
        {"mixed_precision": "bf16", "use_lora": False},
        {"mixed_precision": "no", "use_lora": False},
        {"mixed_precision": "bf16", "use_lora": False, "master_weights": "bf16"},
    ],
)  # fmt: skip
def test_the_reference_is_the_model_without_what_was_trained_to_the_bit(
    changes: dict[str, Any], recompute: bool, group_config: dict, tmp_path: Path, fresh_accelerate: Any
) -> None:
    """Also after the policy has learned; and afterwards the policy is the policy, with its gradients and its dropout."""
    from OpenSciDraw.models.base import build_model
    from OpenSciDraw.weights.fp8 import use_fp8_products
    from OpenSciDraw.weights.quantization import quantization_config

    run = built(group_config, tmp_path, gradient_checkpointing=recompute, **changes)
    config, batch = run.config, run.dataset.batch([0, 1])
    plain = build_model(config)
    plain.load_vae()
    plain.load_transformer(quantization_config(config, plain))
    if config.fp8_products:
        use_fp8_products(plain.transformer, plain.device)
    inputs = (torch.randn(2, 128, 8, 8), torch.tensor([0.2, 0.7]), run.model.collate_text(batch.text))
    with torch.no_grad():
        expected = plain.velocity(*inputs)
    before = {name: p.requires_grad for name, p in run.model.transformer.named_parameters()}
    with run.model.as_reference():
        assert not torch.is_grad_enabled()
        found = run.model.velocity(*inputs)
    assert torch.equal(found, expected) and not found.requires_grad
    assert {name: p.requires_grad for name, p in run.model.transformer.named_parameters()} == before
    assert run.model.transformer.training
    policy = run.model.velocity(*inputs)
    assert policy.requires_grad and not torch.equal(policy, expected)
    policy.float().pow(2).mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in run.parameters.values())


def test_blocks_that_are_recomputed_give_the_same_gradients(group_config: dict, tmp_path: Path, fresh_accelerate: Any) -> None:
    """What the backward recomputes is the policy's forward, with the copies of adapters that it had, and not the reference's."""
    gradients = []
    for recompute in (True, False):
        changes = {"mixed_precision": "bf16", "gradient_checkpointing": recompute, "activation_memory_gb": None}
        run = built(group_config, tmp_path / str(recompute), fresh_accelerate, **changes)
        output(run, run.dataset.batch([0])).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in run.parameters.items()})
    for name, gradient in gradients[1].items():
        assert torch.equal(gradients[0][name], gradient) and gradient.abs().sum() > 0, name


@pytest.mark.slow  # tracing takes most of a minute
def test_compiled_blocks_have_a_graph_for_the_reference_too(group_config: dict, tmp_path: Path, fresh_accelerate: Any) -> None:
    run = built(group_config, tmp_path, mixed_precision="bf16")
    batch = run.dataset.batch([0])
    expected = output(run, batch)
    for block in repeated_blocks(run.model.transformer):
        block.compile(dynamic=True, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        found = output(run, batch)
        assert torch.equal(found.loss, expected.loss) and torch.equal(found.means.sums, expected.means.sums)  # type: ignore[union-attr]


def test_an_error_inside_gives_the_policy_back(group_config: dict, tmp_path: Path, fresh_accelerate: Any) -> None:
    run = built(group_config, tmp_path)
    own = run.model.transformer
    with pytest.raises(RuntimeError, match="inside"), run.model.as_reference():
        raise RuntimeError("inside")
    assert run.model.transformer is own
    assert not any(module.is_off for module in own.modules() if "is_off" in dir(module))


def test_without_training_on_preferences_there_is_no_reference(tiny: Any) -> None:
    with pytest.raises(RuntimeError, match="no reference policy"), tiny.as_reference():
        pass


# -- training --------------------------------------------------------------------------------------------------------
@pytest.fixture
def run_groups(fresh_accelerate: Any, group_config: dict) -> Any:
    """Train on the session's groups with changes; returns the run, after its end."""

    def go(**changes: Any) -> Training:
        fresh_accelerate()
        training = Training(Config.model_validate(merged(group_config, **changes)))
        assert train(training) == 0
        return training

    return go


def lines(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl by step: the last line of a step counts, as after a resume."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return list({row["step"]: row for row in rows if "loss" in row}.values())


LEARNS = {
    "max_train_steps": 16, "learning_rate": 2e-3, "logging_steps": 8, "train_batch_size": 1, "weighting_scheme": "logit_normal",
    "lora_layers": "to_k,to_q,to_v,to_out.0,to_qkv_mlp_proj,attn.to_out", "rank": 8, "lora_alpha": 16,
    "preference": {"beta": 200.0, "max_margin": 0.02, "winner_weight": 5.0},
}  # fmt: skip


def test_the_policy_learns_to_prefer_winners_and_does_not_unlearn_them(run_groups: Any, tmp_path: Path) -> None:
    """A model of random weights sees that a shape is missing; an arrow or a letter is less than it can tell in so few steps."""
    run_groups(**LEARNS, model_output_dir=str(tmp_path))
    first, last = lines(tmp_path)
    assert last["preference_accuracy_component"] == 1 > first["preference_accuracy_component"]
    assert last["preference_margin_component"] > 2 * first["preference_margin_component"] > 0
    assert last["preference_winner_change"] < 0 < last["preference_loser_change_component"] - last["preference_winner_change"]
    held_out = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "held_out_loss" in line]
    assert [row["step"] for row in held_out] == [0, 16] and held_out[1]["held_out_loss"] < held_out[0]["held_out_loss"]


def test_other_objectives_train_on_the_winners(run_groups: Any, tmp_path: Path) -> None:
    training = run_groups(train_iteration_func_name="flow_matching", model_output_dir=str(tmp_path), max_train_steps=1)
    assert isinstance(training.dataset, PreferenceGroups) and training.reference is None
    assert "preference_winner_change" not in lines(tmp_path)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_dropout": 0.1, "mixed_precision": "bf16"},
        pytest.param(
            {"use_lora": False, "learning_rate": 1e-4, "mixed_precision": "bf16", "gradient_checkpointing": True},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["LoRA", "full"],
)  # fmt: skip
def test_a_resumed_run_is_the_whole_one_bit_for_bit(changes: dict[str, Any], run_groups: Any, tmp_path: Path) -> None:
    """Of all weights the reference is read again from where training started, not from the checkpoint."""
    import shutil

    options = {**changes, "gradient_accumulation_steps": 2, "checkpointing_steps": 2, "max_train_steps": 4, "train_batch_size": 1}
    run_groups(**options, model_output_dir=str(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoint-4")
    resumed = run_groups(**options, model_output_dir=str(tmp_path / "parts"), resume_from_checkpoint="latest")
    assert resumed.resume_from.name == "checkpoint-2"
    for file in (tmp_path / "whole" / "checkpoint-4").rglob("*.safetensors"):
        a, b = load_file(file), load_file(tmp_path / "parts" / file.relative_to(tmp_path / "whole"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), file
    for one, two in zip(lines(tmp_path / "whole"), lines(tmp_path / "parts"), strict=True):
        same = [key for key in one if key.startswith(("loss", "train_loss", "preference_", "grad_norm"))]
        assert len(same) > 10 and all(one[key] == two[key] for key in same)


def test_a_checkpoint_of_another_reference_does_not_go_on(run_groups: Any, tmp_path: Path) -> None:
    """All weights: the file that the run started from has changed. LoRA: the run was no training on preferences."""
    start = tmp_path / "start"
    once = {"max_train_steps": 1, "train_batch_size": 1, "checkpointing_steps": 1, "held_out_examples": 0}
    full = {**once, "use_lora": False, "learning_rate": 1e-4}
    run_groups(**full, train_iteration_func_name="flow_matching", model_output_dir=str(start))
    given = {**full, "pretrained_full_ckpt_path": str(start), "model_output_dir": str(tmp_path / "full")}
    run_groups(**given)
    resumed = {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    run_groups(**{**given, **resumed})
    run_groups(**{**full, **resumed}, train_iteration_func_name="flow_matching", model_output_dir=str(start))
    with pytest.raises(UserError, match="was trained against another reference.*pretrained_full_ckpt_path"):
        run_groups(**{**given, **resumed, "max_train_steps": 3})
    other = {**once, "model_output_dir": str(tmp_path / "lora")}
    run_groups(**other, train_iteration_func_name="flow_matching")
    with pytest.raises(UserError, match="trained without a reference.*fuse_pretrained_lora = True"):
        run_groups(**{**other, **resumed})
