"""TREAD, "Token Routing for Efficient Architecture-agnostic Diffusion Training" (arXiv:2501.04765).

While the model trains, a share of a picture's tokens goes past its middle blocks: they leave before the first routed block and
come back, unchanged, behind the last one, where all tokens are together again. The loss is that of all tokens, and a block costs
less by what it does not see. Text tokens are never routed, and a picture that is drawn, validated or measured runs whole.

Which tokens stay is drawn anew for each micro-step, from (seed, micro-step, first sample), for all samples of the batch alike: one
rotary table serves them all, as in the released transformers.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from OpenSciDraw import flow
from OpenSciDraw.config import TokenRoutingConfig
from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import FigureModel
from OpenSciDraw.parallel.sharding import repeated_blocks

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class _Chosen:
    """Of one forward: image tokens (K,) that run through the routed blocks, in order, and how many tokens the text has."""

    kept: Tensor
    text: int


def routed_blocks(settings: TokenRoutingConfig, count: int) -> range:
    """The blocks that see only part of the tokens, of a transformer that has `count`; none where `share` is 0.

    Raises:
        UserError: there are no such blocks.
    """
    if not settings.share:
        return range(0)
    first, last = (at + count if at < 0 else at for at in (settings.first_block, settings.last_block))
    if not 0 <= first <= last < count:
        raise UserError(
            f"token_routing: first_block = {settings.first_block}, last_block = {settings.last_block} of a transformer with "
            f"{count} blocks. The first must not stand behind the last; -1 is the last block."
        )
    return range(first, last + 1)


class TokenRouting:
    """Hooks on `transformer`'s blocks; from now on `model.route_tokens(key)` draws the tokens of the next forward with gradients.

    Hidden states are (B, image tokens, width) of a block that takes the text beside them, and (B, text and image tokens, width) of
    one that does not. A block that is recomputed in the backward pass runs on the same tokens again.

    Raises:
        UserError: the family does not say how its blocks run on part of the tokens, or the transformer has no such blocks.
    """

    def __init__(self, model: FigureModel, transformer: nn.Module, settings: TokenRoutingConfig):
        blocks = repeated_blocks(transformer)
        if not model.routes_tokens:
            raise UserError(f"token_routing.share = {settings.share}: {model.family} cannot do that yet. Set it to 0.")
        routed = routed_blocks(settings, len(blocks))
        self.model, self.share = model, settings.share
        self._key: object = None
        self._chosen: _Chosen | None = None
        self._whole: Tensor | None = None  # image tokens as they came to the first routed block
        transformer.register_forward_pre_hook(self._begin, with_kwargs=True)
        for at in routed:
            names = list(inspect.signature(type(blocks[at]).forward).parameters)[1:]  # behind self
            blocks[at].register_forward_pre_hook(partial(self._enter, at == routed[0], names), with_kwargs=True)
        blocks[routed[-1]].register_forward_hook(self._join)
        model.route_tokens = self.choose

    def choose(self, key: object) -> None:
        """The next forward with gradients routes tokens that follow from `key`."""
        self._key = key

    def _begin(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        self._chosen = self._whole = None
        key, self._key = self._key, None
        if key is None:
            return
        image, text = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
        count = image.shape[1]
        order = torch.randperm(count, generator=flow.keyed_generator("token_routing", key))
        kept = order[: max(1, round(count * (1 - self.share)))].sort().values
        self._chosen = _Chosen(kept.to(image.device, non_blocking=True), text.shape[1])

    def _enter(
        self, is_first: bool, names: list[str], block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Arguments | None:
        chosen = self._chosen
        if chosen is None or not torch.is_grad_enabled():
            return None
        arguments = dict(zip(names, args, strict=False)) | kwargs
        joint = arguments["encoder_hidden_states"] is None  # text and picture are one sequence
        if is_first:
            text, self._whole = _split(arguments["hidden_states"], chosen.text if joint else 0)
            arguments["hidden_states"] = torch.cat([text, self._whole[:, chosen.kept]], dim=1)
        return (), self.model.of_tokens(arguments, chosen.kept, chosen.text)

    def _join(self, block: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        chosen, whole = self._chosen, self._whole
        if chosen is None or whole is None or not torch.is_grad_enabled():
            return None
        text, image = _split(out, chosen.text) if isinstance(out, Tensor) else out
        image = whole.index_copy(1, chosen.kept, image.to(whole.dtype))
        return torch.cat([text, image], dim=1) if isinstance(out, Tensor) else (text, image)


def _split(hidden: Tensor, text: int) -> tuple[Tensor, Tensor]:
    """(B, L + S, D) -> the first `text` tokens, and the others."""
    return hidden[:, :text], hidden[:, text:]
