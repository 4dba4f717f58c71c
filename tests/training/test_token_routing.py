"""Token routing (TREAD): which tokens run through which blocks, held against the released transformers on those tokens alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BASE, make_model, merged, train_and_resume
from torch import Tensor

from OpenSciDraw import flow
from OpenSciDraw.config import Config, TokenRoutingConfig
from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import FigureModel, build_model
from OpenSciDraw.parallel.sharding import repeated_blocks
from OpenSciDraw.planning.plan import make_plan
from OpenSciDraw.planning.step_cost import count_flops, norms_as_on_a_gpu
from OpenSciDraw.train_iteration_funcs.flow_matching import Place
from OpenSciDraw.training.memory.activations import ActivationBudget, measure_saved_bytes
from OpenSciDraw.training.run import Training
from OpenSciDraw.training.token_routing import TokenRouting

SIDE, SIGMA = 4, torch.tensor([0.5, 0.8])
ALL_BLOCKS = TokenRoutingConfig(share=0.5, first_block=0, last_block=-1)


def kept_tokens(key: object) -> Tensor:
    order = torch.randperm(SIDE * SIDE, generator=flow.keyed_generator("token_routing", key))
    return order[: SIDE * SIDE // 2].sort().values


@pytest.fixture(params=["klein", "qwen"])
def model(request: pytest.FixtureRequest) -> Iterator[FigureModel]:
    if request.param == "klein":
        made: FigureModel = make_model()
    else:
        values = {**BASE, "model_type": "QwenImage", "pretrained_model_name_or_path": "embedded:qwen_image_tiny"}
        made = build_model(Config.model_validate({**values, "dataset": {"type": "FigureDataset", "figures": "drawn:2"}}))
        made.load_vae()
        made.load_text_encoder()
        made.load_transformer()
    yield made


def inputs_of(model: FigureModel) -> tuple[Tensor, Any]:
    channels = model.normalize(torch.zeros(1, *model.latent_shape(64, 64))).shape[1]
    noisy = torch.randn(2, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return noisy, model.collate_text(model.encode_prompts(["a red box", "two ellipses with an arrow between them"]))


def test_kept_tokens_see_what_a_picture_of_them_alone_would(model: FigureModel) -> None:
    """The released transformer on these tokens, with the rotary embedding of their places."""
    noisy, text = inputs_of(model)
    kept = kept_tokens("k")
    plain = model.transformer

    def shorten(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = {**kwargs, "hidden_states": kwargs["hidden_states"][:, kept]}
        if "img_ids" in kwargs:
            kwargs["img_ids"] = kwargs["img_ids"][:, kept] if kwargs["img_ids"].ndim == 3 else kwargs["img_ids"][kept]
        return args, kwargs

    def lengthen(module: Any, args: Any, out: Any) -> Any:  # to a whole picture, as `velocity` expects it
        return (torch.zeros(2, SIDE * SIDE, out[0].shape[-1]).index_copy(1, kept, out[0]),)

    hooks = [plain.register_forward_pre_hook(shorten, with_kwargs=True), plain.register_forward_hook(lengthen)]
    if model.family == "QwenImage":
        hooks.append(plain.pos_embed.register_forward_hook(lambda m, a, out: (out[0][kept], out[1])))
    expected = model.velocity(noisy, SIGMA, text).flatten(2)[..., kept]
    for hook in hooks:
        hook.remove()

    TokenRouting(model, plain, ALL_BLOCKS)
    assert model.route_tokens is not None
    model.route_tokens("k")
    torch.testing.assert_close(model.velocity(noisy, SIGMA, text).flatten(2)[..., kept], expected, rtol=1e-5, atol=1e-5)


def test_the_others_come_back_unchanged_behind_the_last_routed_block(model: FigureModel) -> None:
    noisy, text = inputs_of(model)
    kept = kept_tokens("k")
    others = torch.tensor(sorted(set(range(SIDE * SIDE)) - set(kept.tolist())))
    TokenRouting(model, model.transformer, TokenRoutingConfig(share=0.5, first_block=1, last_block=2))
    blocks = repeated_blocks(model.transformer)
    states: dict[str, Tensor] = {}

    def image(out: Any) -> Tensor:
        return (out if isinstance(out, Tensor) else out[1])[:, -SIDE * SIDE :]

    blocks[0].register_forward_hook(lambda m, a, out: states.update(before=image(out)))
    blocks[2].register_forward_hook(lambda m, a, out: states.update(after=image(out)))
    assert model.route_tokens is not None
    model.route_tokens("k")
    model.velocity(noisy, SIGMA, text)
    assert torch.equal(states["before"][:, others], states["after"][:, others])
    assert not torch.isclose(states["before"][:, kept], states["after"][:, kept]).all(-1).any()


def test_a_picture_that_is_not_trained_on_runs_whole(model: FigureModel) -> None:
    noisy, text = inputs_of(model)
    whole = model.velocity(noisy, SIGMA, text)
    TokenRouting(model, model.transformer, ALL_BLOCKS)
    assert model.route_tokens is not None
    model.route_tokens("k")
    with torch.no_grad():  # validation, the held-out loss, the base of prior preservation
        assert torch.equal(model.velocity(noisy, SIGMA, text), whole)
    assert not torch.equal(model.velocity(noisy, SIGMA, text), whole)
    assert torch.equal(model.velocity(noisy, SIGMA, text), whole)  # tokens are drawn for one forward


def test_recomputed_blocks_run_on_the_same_tokens(model: FigureModel) -> None:
    noisy, text = inputs_of(model)
    TokenRouting(model, model.transformer, TokenRoutingConfig(share=0.5, first_block=1, last_block=-1))
    model.transformer.requires_grad_(True).train()
    gradients = []
    for recompute in (False, True):
        if recompute:
            ActivationBudget(model.transformer, None)
        assert model.route_tokens is not None
        model.route_tokens("k")
        model.velocity(noisy, SIGMA, text).pow(2).mean().backward()
        gradients.append([parameter.grad for parameter in model.transformer.parameters()])
        model.transformer.zero_grad(set_to_none=True)
    pairs = [(a, b) for a, b in zip(*gradients, strict=True) if a is not None]
    assert pairs and all(torch.equal(a, b) for a, b in pairs)


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    values = merged(
        BASE, model_output_dir=str(tmp_path / "run"), max_train_steps=3, checkpointing_steps=2, token_routing=ROUTED,
        dataset={"type": "ArXiVParquetDatasetV2", "base_dir": str(tmp_path), "parquet_base_path": "store"},
        encode={"figures": "drawn:16", "resolution": 128, "samples_per_shard": 16, "num_workers": 0, "batch_size": 8},
    )  # fmt: skip
    first, again = train_and_resume(values, tmp_path / "run")
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    whole, _ = train_and_resume({**values, "token_routing": {}, "model_output_dir": str(tmp_path / "whole")}, tmp_path / "whole")
    assert any(not torch.equal(first[key], whole[key]) for key in first)


ROUTED = {"share": 0.5, "first_block": 1, "last_block": -1}


@pytest.mark.slow  # eight runs of a few blocks
@pytest.mark.parametrize("recompute", [False, True])
def test_the_plan_is_that_of_a_real_step(recompute: bool, store_config: dict, tmp_path: Path, fresh_accelerate: Any) -> None:
    """FLOPs within 3 % (and fewer than without); kept bytes within 3 %, or 15 % where inputs of a few blocks are counted whole."""
    values = merged(
        store_config, model_output_dir=str(tmp_path), train_batch_size=1, gradient_checkpointing=recompute, token_routing=ROUTED
    )
    config = Config.model_validate(values)
    step = make_plan(config, "H100-80GB").steps[0]
    whole = make_plan(Config.model_validate({**values, "token_routing": {}}), "H100-80GB").steps[0]
    run = Training(config)
    sizes = [tuple(size) for size in run.dataset.buckets.tolist()]
    batch = run.dataset.batch([sizes.index((step.shape.height, step.shape.width))])

    def forward() -> Tensor:
        return run.objective(run.model, batch, Place(0, 0, 0, 1), config, run.empty_text).loss

    with norms_as_on_a_gpu(), count_flops() as counter:
        forward().backward()
    assert step.flops == pytest.approx(counter.get_total_flops(), rel=0.03) and step.flops < 0.93 * whole.flops
    with norms_as_on_a_gpu():
        kept = measure_saved_bytes(forward, run.model.transformer)
    assert step.kept == pytest.approx(kept, rel=0.15 if recompute else 0.03)


def test_what_cannot_be_routed_is_refused() -> None:
    start = {**BASE, "dataset": {"base_dir": "."}, "token_routing": {"share": 0.5}}
    for changes, said in (
        ({"train_iteration_func_name": "dpo", "dataset": {"base_dir": ".", "type": "PreferenceGroups"}}, "compares forwards"),
        ({"compile_blocks": True}, "compile_blocks = False"),
    ):
        with pytest.raises(ValueError, match=said):
            Config.model_validate({**start, **changes})
    model = make_model()
    with pytest.raises(UserError, match="a transformer with 4 blocks"):  # the defaults, 2 to -3, are for large ones
        TokenRouting(model, model.transformer, TokenRoutingConfig(share=0.5))
    model.routes_tokens = False  # type: ignore[misc]
    with pytest.raises(UserError, match="cannot do that yet"):
        TokenRouting(model, model.transformer, ALL_BLOCKS)
