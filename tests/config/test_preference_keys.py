"""Keys of training on preferences: what they need of others, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from OpenSciDraw.config import Config, load_config
from OpenSciDraw.errors import UserError

GOOD = "pretrained_model_name_or_path = 'some/model'\nmixed_precision = 'no'\n"
GROUPS = "dataset = dict(type='PreferenceGroups', base_dir='d')\ntrain_iteration_func_name = 'mdpo'\n"


def load(folder: Path, text: str) -> Config:
    path = folder / "c.py"
    path.write_text(GOOD + text)
    return load_config(path)


@pytest.mark.parametrize("name", ["dpo", "mdpo"])
def test_both_objectives_need_groups(tmp_path: Path, name: str) -> None:
    data = f"dataset = dict(base_dir='d')\ntrain_iteration_func_name = '{name}'\n"
    with pytest.raises(UserError, match=f"'{name}' compares winners with losers.*type='PreferenceGroups'"):
        load(tmp_path, data)
    assert load(tmp_path, GROUPS.replace("mdpo", name)).trains_preferences


def test_groups_go_with_other_objectives(tmp_path: Path) -> None:
    config = load(tmp_path, "dataset = dict(type='PreferenceGroups', base_dir='d')\n")
    assert not config.trains_preferences and config.dataset_arguments()["preference"] == config.preference


def test_the_rules_reach_the_dataset(tmp_path: Path) -> None:
    config = load(tmp_path, GROUPS + "preference = dict(min_reward=0.8, axis_weights=dict(arrow=2))\n")
    given = config.dataset_arguments()["preference"]
    assert given.min_reward == 0.8 and given.axis_weights.model_dump() == {"component": 1.0, "arrow": 2.0, "text": 1.0}
    assert Config.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("pretrained_lora_ckpt_path = 'x'", "Set fuse_pretrained_lora = True"),
        ("dataset['base_dir'] = 's3://b/x'", "PreferenceGroups reads a folder of this machine"),
        ("preference = dict(axis_weights=dict(component=0, arrow=0, text=0))", "no axis has a weight above 0"),
        ("preference = dict(other_gap_low=0.6)", "no loser lies between"),
        ("preference = dict(tau=0.1)", "Set tau = None, or mode = 'mean'"),
        ("preference = dict(mode='none')", "expected 'contrastive' | 'adaptive' | 'mean'"),
        ("preference = dict(beta=0)", "preference.beta = 0 (int): expected float > 0."),
        ("preference = dict(bta=1.0)", "unknown key preference.bta (a float). Did you mean preference.beta"),
        ("preference = dict(axis_weights=dict(arrows=1.0))", "Did you mean preference.axis_weights.arrow"),
        ("train_iteration_func_name = 'mpdo'", "Did you mean 'mdpo'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_a_remedy(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        load(tmp_path, GROUPS + line + "\n")
    assert said in str(refused.value)
