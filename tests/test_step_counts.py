"""The counts that stand for speed where there is no GPU (benchmarks/run_step_counts.py)."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
from run_step_counts import count_step, settings  # noqa: E402
from step_counts import StepCount, launches  # noqa: E402


def test_a_step_of_klein_4b_launches_at_most_2500_kernels_with_at_most_200_copies_between_types() -> None:
    name = "black-forest-labs/FLUX.2-klein-base-4B"
    ours, bare = (count_step(settings(name), ours) for ours in (True, False))
    assert ours.kernels <= 2500 and ours.casts <= 200
    assert ours.kernels < 0.75 * bare.kernels and ours.other_bytes < 0.6 * bare.other_bytes


def test_what_is_counted_is_a_kernel_for_each_operation_and_a_copy_for_each_change_of_type() -> None:
    x = torch.empty(4, 6, device="meta")
    with StepCount() as count:
        y = (x.view(6, 4) * 2).bfloat16()
        torch._foreach_copy_([torch.empty(6, 4, device="meta")] * 3, [y] * 3)
    assert dict(count.by_name) == {"mul": 1, "_to_copy": 1, "_foreach_copy_": 1} and count.casts == 2
    assert count.other_bytes == 2 * 24 * 4 + 24 * (4 + 2) + 3 * 24 * (4 + 2) + 3 * 24 * 4 * 0


CASES = [([10] * 36, 1), ([10] * 37, 2), ([65536 * 320], 1), ([65536 * 320 + 1], 2), ([], 0)]


@pytest.mark.parametrize(("sizes", "kernels"), CASES)
def test_multi_tensor_kernels_hold_36_tensors_of_four_lists_and_320_blocks(sizes: list[int], kernels: int) -> None:
    assert launches(sizes, 4) == kernels
