"""What an adapter makes of a layer's weight W (out, in), by each kind's formula, and how it becomes a low-rank product.

LoRA: W + s B A (arXiv:2106.09685). LoHa: W + s (B1 A1) * (B2 A2), entry by entry; LoKr: W + s kron(W1, W2) (both arXiv:2309.14859).
DoRA: each row of the new W is scaled to a length of its own (arXiv:2402.09353). OFT: W R, R a block-diagonal rotation of the inputs
(arXiv:2306.07280), in PEFT's form, or R^T W, a rotation of the outputs, in LyCORIS's. A whole difference is one too (`diff`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from OpenSciDraw.errors import UserError
from OpenSciDraw.flow import keyed_generator

NEUMANN_TERMS = 5  # of the series by which PEFT makes a rotation, where its config does not say another number
ITERATIONS, OVERSAMPLING = 4, 16  # of the subspace iteration (arXiv:0909.4061, algorithm 4.4)


@dataclass(frozen=True)
class Update:
    """One layer's part of an adapter: tensors by the names of `KINDS`, and `scale`, which multiplies the difference.

    `magnitude`: DoRA's lengths, (out,) or (out, 1) of rows, or (1, in) of columns. `rows`: of a Kronecker product of fused layers,
    the rows that are this layer's. `terms`: of PEFT's OFT, 0 for the exact Cayley transform.
    """

    kind: str
    tensors: dict[str, Tensor]
    scale: float = 1.0
    magnitude: Tensor | None = None
    rows: Tensor | None = None
    terms: int = NEUMANN_TERMS

    @property
    def is_low_rank(self) -> bool:
        """Whether it is a LoRA and nothing else: `down` (r, in), `up` (out, r)."""
        return self.kind == "lora" and self.magnitude is None

    @property
    def rank(self) -> int:
        return self.tensors["down"].shape[0]

    @property
    def needs_weight(self) -> bool:
        """Whether the difference depends on the weight that it is added to."""
        return self.magnitude is not None or self.kind in ("oft", "oft_rows")

    def shape(self) -> tuple[int | None, int]:
        """(out, in) of the weight that it belongs to; of OFT in PEFT's form out is not known (None)."""
        t = self.tensors
        if self.kind == "lora":
            out, width = t["up"].shape[0], t["down"].shape[1]
        elif self.kind == "loha":
            out, width = t["hada_w1_a"].shape[0], t["hada_w1_b"].shape[1]
        elif self.kind == "lokr":
            (rows, columns), (more_rows, more_columns) = _factor_shape(t, "lokr_w1"), _factor_shape(t, "lokr_w2")
            out, width = rows * more_rows, columns * more_columns
        elif self.kind == "oft":
            return None, t["oft_R"].shape[0] * _block_side(t["oft_R"].shape[1])
        elif self.kind == "oft_rows":
            out, width = t["oft_blocks"].shape[0] * t["oft_blocks"].shape[1], -1
        else:
            out, width = tuple(t["diff"].shape)
        return (out if self.rows is None else len(self.rows)), width

    def of_rows(self, rows: Tensor) -> Update:
        """The part of a fused layer's update that belongs to `rows` (indices) of its weight.

        Raises:
            ValueError: it cannot be taken apart (a rotation of outputs across the layers, lengths of columns).
        """
        t, magnitude = self.tensors, self.magnitude
        if magnitude is not None:
            if magnitude.ndim == 2 and magnitude.shape[0] == 1:
                raise ValueError("its dora_scale holds lengths of columns, over all fused layers at once")
            magnitude = magnitude[rows]
        if self.kind == "lora":
            up = t["up"][rows]
            used = up.abs().amax(0) > 0  # a block-diagonal product falls apart into its blocks, to the bit
            if magnitude is None and not bool(used.all()):
                return replace(self, tensors={"down": t["down"][used].contiguous(), "up": up[:, used].contiguous()})
            return replace(self, tensors={**t, "up": up.contiguous()}, magnitude=magnitude)
        if self.kind == "loha":
            parts = {name: t[name][rows] for name in ("hada_w1_a", "hada_w2_a")}
            return replace(self, tensors={**t, **parts}, magnitude=magnitude)
        if self.kind == "diff":
            return replace(self, tensors={"diff": t["diff"][rows]}, magnitude=magnitude)
        if self.kind == "oft_rows":
            side = t["oft_blocks"].shape[1]
            first, last = int(rows[0]), int(rows[-1]) + 1
            if first % side or last % side or last - first != len(rows):
                raise ValueError("its rotation of the outputs mixes the fused layers")
            return replace(self, tensors={**t, "oft_blocks": t["oft_blocks"][first // side : last // side]})
        return self if self.kind == "oft" else replace(self, rows=rows, magnitude=magnitude)

    def difference(self) -> Tensor:
        """What is added to the weight (out, in), fp32, where it does not depend on it (DoRA's before its lengths)."""
        t = {name: tensor.float() for name, tensor in self.tensors.items()}
        if self.kind == "lora":
            made = t["up"] @ t["down"]
        elif self.kind == "loha":
            made = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
        elif self.kind == "lokr":
            made = torch.kron(_factor(t, "lokr_w1"), _factor(t, "lokr_w2").contiguous())
            made = made if self.rows is None else made[self.rows]
        else:
            made = t["diff"]
        return made * self.scale

    def applied(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """W + strength * (the adapted weight - W), fp32."""
        base = weight.float()
        if not self.needs_weight:
            return base + strength * self.difference().to(base.device)
        if self.kind == "oft":
            blocks = rotations(self.tensors["oft_R"].float(), self.terms).to(base.device)
            turned = torch.einsum("ork,rck->orc", base.unflatten(1, (len(blocks), -1)), blocks).flatten(1)
        elif self.kind == "oft_rows":
            blocks = _output_rotations(self.tensors["oft_blocks"].float(), self.scale).to(base.device)
            turned = torch.einsum("rnm,rni->rmi", blocks, base.unflatten(0, (len(blocks), -1))).flatten(0, 1)
            turned = turned * self.tensors["rescale"].float().to(base.device).flatten(1) if "rescale" in self.tensors else turned
        else:
            turned = base + self.difference().to(base.device)
        if self.magnitude is not None:
            lengths = self.magnitude.float().to(base.device)
            of_columns = lengths.ndim == 2 and lengths.shape[0] == 1 and base.shape[0] != 1
            axis = 0 if of_columns else 1
            turned = turned * (lengths.reshape((1, -1) if of_columns else (-1, 1)) / turned.norm(dim=axis, keepdim=True))
        return base + strength * (turned - base)

    def turned_into_difference(self, weight: Tensor) -> Update:
        """The same for this `weight`, as a whole difference."""
        return Update("diff", {"diff": self.applied(weight) - weight.float()})


def changed(weight: Tensor, updates: Sequence[tuple[Update, float]]) -> Tensor:
    """W + sum of strength * (what each makes of W - W), in fp32, rounded once to W's type; their order does not matter."""
    if len(updates) == 1:
        return updates[0][0].applied(weight, updates[0][1]).to(weight.dtype)
    total = weight.float()
    for update, strength in updates:
        total = total + (update.applied(weight, strength) - weight.float())
    return total.to(weight.dtype)


KINDS = {  # names that a kind's tensors have; a trailing ? marks those that may be missing
    "lora": ("down", "up"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "lokr": ("lokr_w1?", "lokr_w1_a?", "lokr_w1_b?", "lokr_w2?", "lokr_w2_a?", "lokr_w2_b?"),
    "oft": ("oft_R",),
    "oft_rows": ("oft_blocks", "rescale?"),
    "diff": ("diff",),
}


def _factor(tensors: dict[str, Tensor], name: str) -> Tensor:
    return tensors[name] if name in tensors else tensors[f"{name}_a"] @ tensors[f"{name}_b"]


def _factor_shape(tensors: dict[str, Tensor], name: str) -> tuple[int, int]:
    """Without computing it: a file's factors may be small and their product not."""
    if name in tensors:
        return tensors[name].shape[0], tensors[name].shape[1]
    return tensors[f"{name}_a"].shape[0], tensors[f"{name}_b"].shape[1]


def _block_side(elements: int) -> int:
    side = int((1 + (1 + 8 * elements) ** 0.5) / 2)
    if side * (side - 1) // 2 != elements:
        raise UserError(f"oft_R with {elements} numbers a block: they are no upper triangle of a square.")
    return side


def rotations(vectors: Tensor, terms: int) -> Tensor:
    """(blocks, n (n - 1) / 2) upper triangles of skew matrices Q -> (blocks, n, n): (I + Q)(I - Q)^-1.

    `terms` > 0: its series I + 2 Q + 2 Q^2 + … + Q^(terms - 1) with so many terms, as PEFT computes it; 0: exactly, in PEFT's other
    form, (I - Q)(I + Q)^-1.
    """
    side = _block_side(vectors.shape[1])
    skew = vectors.new_zeros(len(vectors), side, side)
    rows, columns = torch.triu_indices(side, side, 1)
    skew[:, rows, columns] = vectors
    skew = skew - skew.transpose(1, 2)
    identity = torch.eye(side, dtype=vectors.dtype)
    if not terms:
        return torch.linalg.solve(identity + skew, identity - skew, left=False)
    out, power = identity.repeat(len(vectors), 1, 1), identity.repeat(len(vectors), 1, 1)
    for term in range(1, terms):
        power = power @ skew
        out = out + power * (1.0 if term == terms - 1 and term > 1 else 2.0)
    return out


def _output_rotations(blocks: Tensor, limit: float) -> Tensor:
    """LyCORIS's blocks (k, n, n) -> (k, n, n); `limit` bounds the norm of the skew matrices, 0 = no bound."""
    skew = blocks - blocks.transpose(1, 2)
    norm = skew.norm() + 1e-8
    if 0 < limit < norm:
        skew = skew * limit / norm
    identity = torch.eye(blocks.shape[1], dtype=blocks.dtype)
    return (identity + skew) @ torch.linalg.inv(identity - skew)


# -- low rank --------------------------------------------------------------------------------------
def to_rank(update: Update, rank: int) -> tuple[Tensor, Tensor, float]:
    """(down (rank, in), up (out, rank), share): the nearest product of this rank, and which share of the norm it keeps.

    A smaller rank is not changed (share 1) and keeps its own; factors come in fp32, the scale in `up`.
    """
    if update.is_low_rank:
        down, up = update.tensors["down"].float(), update.tensors["up"].float()
        if update.rank <= rank:
            return down, up if update.scale == 1.0 else up * update.scale, 1.0
        up_base, up_small = torch.linalg.qr(up.double())
        down_base, down_small = torch.linalg.qr(down.double().T)
        left, values, right = torch.linalg.svd(up_small @ down_small.T)
        left, right = up_base @ left, right @ down_base.T
        total = values.square().sum()
        share = 1.0 if not total else float((values[:rank].square().sum() / total).sqrt())
        down, up = _balanced(left, values, right, rank)
        return down, up * update.scale, share
    return leading(update.difference(), rank)


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(down, up, share) of `matrix` (out, in): its first `rank` singular values, by subspace iteration where that saves work."""
    small, total = min(matrix.shape), matrix.double().norm()
    if rank + OVERSAMPLING < small // 4:
        noise = torch.randn(matrix.shape[1], rank + OVERSAMPLING, generator=keyed_generator("svd", *matrix.shape))
        base = torch.linalg.qr(matrix @ noise.to(matrix)).Q
        for _ in range(ITERATIONS):
            base = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ base).Q).Q
        left, values, right = torch.linalg.svd(base.T @ matrix, full_matrices=False)
        left = base @ left
    else:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    share = 1.0 if not total else min(1.0, float(values[:rank].double().norm() / total))
    return (*_balanced(left, values, right, min(rank, small)), share)


def rank_for(matrix: Tensor, share: float) -> int:
    """The smallest rank, at least 1, whose best product keeps `share` of the norm of `matrix`."""
    kept = torch.linalg.svdvals(matrix.double()).square().cumsum(0)
    return 1 if not kept[-1] else min(len(kept), 1 + int((kept < share**2 * kept[-1]).sum()))


def _balanced(left: Tensor, values: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    root = values[:rank].sqrt()
    return (root[:, None] * right[:rank]).float().contiguous(), (left[:, :rank] * root).float().contiguous()
