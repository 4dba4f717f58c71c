"""Published configs of M-DPO: what they say is what runs, or is named."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from OpenSciDraw.config import load_config
from OpenSciDraw.errors import UserError

PUBLISHED = """
model_type = 'Flux2Klein'
pretrained_model_name_or_path = 'black-forest-labs/FLUX.2-klein-base-9B'
use_lora = True
policy_init_path = '/data/stage2/ema_weights.pt'
ref_init_path = policy_init_path
ref_on_cpu = False
use_parquet_dataset = True
dataset_cfg = dict(
    type='ArXiVParquetDatasetMD3PO', base_dir='/data', parquet_base_path='groups', parquet_glob='gdro_*.parquet', num_workers=8,
    path_remapping={'/mnt/data/': '/data/'}, deterministic_latents=True, target_dims=('component_score', 'text_score'),
    winner_key='reward', min_winner_score=0.75, target_min_gap=0.25, other_max_gap=0.45, loser_balance_lambda=0.4,
    min_total_gap=0.15, strict_all_dims=True, require_distinct_losers=True, min_group_images=5, inject_global_worst=True,
    global_worst_min_gap=0.20)
train_iteration_func = 'Flux2Klein_md3po_train_iteration'
md3po_agg_mode = 'adaptive'
md3po_alpha_mode = 'uniform'
md3po_global_loss_weight = 0.0
dpo_beta = 1500.0
dpo_sft_weight = 0.25
dataloader_num_workers = 8
max_train_steps = 10
"""


def test_every_key_acts_or_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "mdpo.py"
    path.write_text(PUBLISHED)
    with caplog.at_level(logging.WARNING):
        config = load_config(path)
    rules = config.preference
    assert (rules.mode, rules.beta, rules.winner_weight, rules.max_margin) == ("adaptive", 1500.0, 0.25, None)
    assert (rules.min_reward, rules.min_gap, rules.other_gap_high, rules.other_gap_weight) == (0.75, 0.25, 0.45, 0.4)
    assert (rules.min_total_gap, rules.min_pictures) == (0.15, 5)
    assert dict(rules.axis_weights) == {"component": 1.0, "arrow": 0.0, "text": 1.0}
    assert config.train_iteration_func_name == "mdpo" and not config.use_lora
    assert config.dataset.type == "PreferenceGroups" and config.dataset.path_remapping == {"/mnt/data/": "/data/"}
    assert config.pretrained_full_ckpt_path == "/data/stage2/ema_weights.pt"
    said = caplog.text
    for name in ("parquet_glob", "deterministic_latents", "strict_all_dims", "inject_global_worst", "global_worst_min_gap"):
        assert f"dataset.{name} has no effect" in said, name
    assert "ArXiVParquetDatasetMD3PO is PreferenceGroups here" in said


@pytest.mark.parametrize(("was", "now", "said"), [
    ("winner_key='reward'", "winner_key='text_score'", "dataset.winner_key = 'text_score' is not known here"),
    ("'uniform'", "'exp'", "md3po_alpha_mode = 'exp' is not known here"),
    ("ref_init_path = policy_init_path", "ref_init_path = '/other'", "the reference is the model that training starts from"),
])  # fmt: skip
def test_what_cannot_run_is_refused(was: str, now: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mdpo.py"
    path.write_text(PUBLISHED.replace(was, now))
    with pytest.raises(UserError, match=said):
        load_config(path)
