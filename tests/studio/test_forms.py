"""The form of a config: every key, the command line's own checks and words, nothing outside of the folder, nothing in place."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from OpenSciDraw.config import SECRET_KEYS, load_config, save_config
from OpenSciDraw.config.text import all_fields, saved_values, section_of
from OpenSciDraw.errors import UserError
from OpenSciDraw.studio import forms
from OpenSciDraw.studio.recipes import RECIPES


def test_the_form_has_every_key_with_its_meaning_and_no_secret() -> None:
    found = {field["name"]: field for field in forms.fields()}
    keys = {name for name, field in all_fields().items() if section_of(field.annotation) is None}
    assert set(found) == keys - SECRET_KEYS
    assert all(field["meaning"] and field["type"] and field["group"] for field in found.values())
    assert found["lr_warmup_steps"]["unit"] == "optimizer steps" and found["optimizer"]["choices"][0] == "AdamW"
    assert found["use_ema"]["choices"] == ["False", "True"] and found["pretrained_model_name_or_path"]["default"] is None


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_loads_and_its_values_as_texts_give_the_same_config(studio: Any, name: str) -> None:
    base, figures = f"recipe:{name}", {"encode.figures": str(studio.places.root)}
    config = forms.checked(studio.places, base, figures)
    values = forms.values_of(studio.places, base)
    assert set(values) == {field["name"] for field in forms.fields()}
    unchanged = {key: text for key, text in values.items() if text != "None" and forms.shown(_default(key)) != text}
    assert forms.checked(studio.places, base, unchanged | figures) == config


def _default(key: str) -> Any:
    return forms._default(all_fields()[key])


def test_a_wrong_value_is_refused_in_the_words_of_the_command_line(studio: Any, client: Any, tmp_path: Path) -> None:
    changes = {"rank": "four", "optimizer": "adamm", "learning_rate": "-1", "no_such_key": "1"}
    said = client.post("/api/configs/check", json={"base": "recipe:tiny", "changes": changes}).json()["problems"]
    file = forms.base_file(studio.places, "recipe:tiny")
    with pytest.raises(UserError) as error:
        load_config(file, [f"{key}={text}" for key, text in changes.items()])
    assert said == str(error.value).splitlines() and any("expected int >= 1" in line for line in said)


def test_forms_are_checked_by_several_threads_at_once(studio: Any) -> None:
    changes = {"encode.figures": str(studio.places.root)}
    with ThreadPoolExecutor(8) as pool:  # Python 3.11 fails in ast.parse where two threads are in it: saved.py
        found = list(pool.map(lambda _: forms.checked(studio.places, "recipe:tiny", changes), range(24)))
    assert all(config == found[0] for config in found)


def test_a_text_of_a_form_stays_a_text(studio: Any) -> None:
    changes = {"run_name": "007", "negative_prompt": "none", "tracker_name": "[1]", "timestep_shift": "none", "rank": "8"}
    config = forms.checked(studio.places, "recipe:tiny", changes | {"encode.figures": str(studio.places.root)})
    assert (config.run_name, config.negative_prompt, config.tracker_name) == ("007", None, "[1]")
    assert (config.timestep_shift, config.rank) == ("none", 8)


PLACES = ("model_output_dir", "image_output_dir", "encode.figures", "dataset.base_dir", "evaluate.figures", "cache_dir")


@pytest.mark.parametrize("key", PLACES)
def test_a_config_that_leads_out_of_the_folder_is_refused(studio: Any, tmp_path: Path, key: str) -> None:
    (studio.places.root / "link").symlink_to(tmp_path)
    for place in (str(tmp_path / "other"), str(studio.places.root / "link" / "x"), "s3://bucket/x"):
        with pytest.raises(UserError, match="outside of the studio's folder|cloud|remote|://"):
            forms.checked(studio.places, "recipe:tiny", {key: place})
    for key, place in (("logging_dir", "../../../x"), ("dataset.parquet_base_path", "../../x")):
        with pytest.raises(UserError, match="outside of the studio's folder"):
            forms.checked(studio.places, "recipe:tiny", {key: place})
    with pytest.raises(UserError, match="uploads nothing"):
        forms.checked(studio.places, "recipe:tiny", {"push_to_hub": "True", "hub_model_id": "a/b"})


def test_a_config_is_never_changed_in_place(studio: Any) -> None:
    config = forms.checked(studio.places, "recipe:tiny", {"encode.figures": str(studio.places.root)})
    file = forms.save(studio.places, "mine", config)
    before = file.read_bytes()
    for name in ("mine", "../mine", "a/b", ".mine", "", "x" * 61):
        with pytest.raises(UserError):
            forms.save(studio.places, name, config)
    assert file.read_bytes() == before and studio.places.config("configs/mine.py") == config


def test_the_difference_of_two_configs_is_every_key_in_which_they_differ(studio: Any, tmp_path: Path) -> None:
    base = forms.checked(studio.places, "recipe:tiny", {"encode.figures": str(studio.places.root)})
    other = base.model_copy(update={"rank": 8, "encode": base.encode.model_copy(update={"resolution": 256})})
    values = []
    for name, config in (("a", base), ("b", other)):
        save_config(config, tmp_path / f"{name}.py")
        values.append(saved_values((tmp_path / f"{name}.py").read_bytes()))
    assert forms.differences(*values) == [
        {"key": "rank", "one": "32", "other": "8"}, {"key": "encode.resolution", "one": "128", "other": "256"},
    ] or {row["key"] for row in forms.differences(*values)} == {"rank", "encode.resolution"}  # fmt: skip
