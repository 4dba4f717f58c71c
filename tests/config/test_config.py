"""Configs: strict keys, bases, overrides, second spellings, and errors that say where and what to do."""

from __future__ import annotations

import logging
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from OpenSciDraw.config import Config, load_config, save_config
from OpenSciDraw.config.names import ALIASES, RETIRED
from OpenSciDraw.config.text import all_fields, format_config, schema_table
from OpenSciDraw.errors import UserError

REPO = Path(__file__).resolve().parents[2]
README = REPO.parent / "shared" / "spec" / "ScienceFlow-README.md"
CONFIGS = sorted((REPO / "configs").rglob("*.py"))
GOOD = "pretrained_model_name_or_path = 'some/model'\nmixed_precision = 'no'\ndataset = dict(base_dir='data')\n"
TOKEN = "hf_NeverPrintThis"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a config file (after three good lines unless `whole`) and return its path, relative to the folder."""
    monkeypatch.chdir(tmp_path)

    def make(text: str = "", name: str = "c.py", whole: bool = False) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if whole else GOOD + text)
        return path

    return make


def refusal(path: Path | str, *overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        load_config(path, overrides)
    return str(refused.value)


def minimal(**keys: Any) -> Config:
    base: dict[str, Any] = {"pretrained_model_name_or_path": "m", "mixed_precision": "no", "dataset": {"base_dir": "d"}}
    return Config(**(base | keys))


# -- what is refused, and how it is said -------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("learning_rat = 1e-4", "c.py:4: unknown key learning_rat (a float). Did you mean learning_rate?"),
        ("dataset['base_dirr'] = 'x'",
         "c.py:4: unknown key dataset.base_dirr (a str). Did you mean dataset.base_dir or dataset.cache_dir?"),
        ("encode = dict(\n  figures='x',\n  resolutoin=256)", "c.py:6: unknown key encode.resolutoin"),
        ("encode = {\n 'max_figure': 3}", "c.py:5: unknown key encode.max_figure (a int). Did you mean"),
        ("base_dir = 'x'", "c.py:4: unknown key base_dir (a str). Did you mean dataset.base_dir?"),
        ("outptu_dir = 'x'", "Did you mean output_dir"),
        ("zzz = 1", "`scienceflow config --schema` lists all keys"),
        ("transformer_cfg = dict(typ='X')", "transformer_cfg.type is missing"),
        ("dataset = {1: 2}", "unknown key dataset.1"),
        ("rank = '64'", "c.py:4: rank = '64' (str): expected int >= 1."),
        ("rank = 64.0", "rank = 64.0 (float): expected int >= 1."),
        ("rank = True", "rank = True (bool): expected int >= 1."),
        ("rank = 0", "rank = 0 (int): expected int >= 1."),
        ("lora_alpha = 0", "lora_alpha = 0 (int): expected int >= 1."),
        ("learning_rate = '1e-4'", "learning_rate = '1e-4' (str): expected float > 0."),
        ("learning_rate = float('nan')", "learning_rate = nan"),
        ("use_lora = 1", "use_lora = 1 (int): expected bool."),
        ("dataset = 'data'", "c.py:4: dataset = 'data' (str): expected dict."),
        ("dataset = dict(base_dir=3)", "dataset.base_dir = 3 (int): expected str."),
        ("dataset = dict(base_dir='d', contract={1: 2})", "dataset.contract = {1: 2} (dict): expected dict | None."),
        ("optimizer = 'adam'", "expected 'AdamW' | 'prodigy'. Did you mean 'AdamW'?"),
        ("lr_scheduler = 'piecewise_constant'", "lr_scheduler = 'piecewise_constant'"),
        ("weighting_scheme = 'logitnormal'", "Did you mean 'logit_normal'?"),
        ("report_to = ['wandb', 'comet']", "report_to = ['wandb', 'comet'] (list): expected 'wandb' | 'tensorboard'"),
        ("resume_from_checkpoint = 'last'", "must be 'latest', 'checkpoint-<step>' such as 'checkpoint-5000', or None"),
        ("resume_from_checkpoint = 'checkpoint-'", "must be 'latest'"),
        ("caption_dropout = 1.5", "expected float >= 0 <= 1"),
        ("max_sequence_length = 40000", "expected int >= 1 <= 32768"),
        ("timestep_shift = -1.0", "expected 'none' | 'resolution' | float > 0"),
        ("encode = dict(resolution=300)", "expected 128 | 256 | 512 | 768 | 1024"),
        ("resolution_list = [[1024, 1001]]", "must have sides that are multiples of 8"),
        ("resolution_list = [1024, 1024]", "expected list[[int, int]]"),
        ("resolution_list = [[1024., 1024]]", "expected list[[int, int]]"),
        ("text = 'cached'", "expected 'stored' | 'online'"),
        ("x = nothing", "c.py:4: NameError: name 'nothing' is not defined"),
        ("x = (", "c.py:4: not Python"),
        ("_base_ = 3", "c.py: _base_ = 3. Give the path of a config file"),
        ("_base_ = 'none.py'", "none.py (the _base_ of c.py): No such file"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_refused_with_its_place_and_a_remedy(write: Write, line: str, said: str) -> None:
    assert said in refusal(write(line + "\n"))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("optimizer = 'prodigy'", "c.py:4: learning_rate: 0.0002 with prodigy"),
        ("optimizer = 'Prodigy'\nlearning_rate = 20.0", "Set learning_rate = 1.0."),
        ("learning_rate = 1.0", "c.py:4: learning_rate: 1 is too high for AdamW"),
        ("optimizer = 'prodigy'\nlearning_rate = 1.0\nuse_8bit_adam = True", "8-bit state exists for AdamW only"),
        ("optimizer = 'prodigy'\nlearning_rate = 1.0\nscale_lr = True", "Set scale_lr = False"),
        ("lr_scheduler = 'cosine'\nmax_train_steps = 100", "500 is more than max_train_steps = 100"),
        ("validation_prompts = ['a', 'b']\nresolution_list = [[64, 64]] * 3", "3 sizes for 2 validation_prompts"),
        ("push_to_hub = True", "Set hub_model_id = 'owner/name'"),
        ("fuse_pretrained_lora = True", "Set pretrained_lora_ckpt_path"),
        ("use_lora = False\nlora_dropout = 0.1", "lora_dropout: 0.1 with use_lora = False"),
        ("use_lora = False\npretrained_lora_ckpt_path = 'x'", "or fuse_pretrained_lora = True."),
        ("use_lora = False\nquantization = 'int8'", "quantization is for a frozen base"),
        ("use_lora = False\noffload = True", "offload is for a frozen base"),
        ("quantization = 'nf4'\nbnb_quantization_config_path = 'q.json'", "both name a quantisation. Set one of them."),
        ("master_weights = 'bf16'", "LoRA weights are always fp32"),
        ("use_lora = False\nmaster_weights = 'bf16'\nmixed_precision = 'no'", "needs optimizer = 'AdamW'"),
        ("optimizer = 'prodigy'\nlearning_rate = 1.0\noffload_optimizer = True", "exists for AdamW only"),
        ("gradient_checkpointing = False\nactivation_memory_gb = 4.0", "Set it to True."),
        ("validate_unquantized = True", "Set validate_unquantized = False."),
        ("model_type = 'flux2_klein'", "Unknown model_type 'flux2_klein'. Known: Flux2Dev, Flux2Klein, "),
        ("dataset['type'] = 'ArxivParquetDataset'", "c.py:4: dataset.type: Unknown dataset type 'ArxivParquetDataset'"),
        ("data_sampler = dict(type='Bucket')", "Unknown sampler type 'Bucket'"),
        ("validation_func_name = 'generic'", "Did you mean 'generic_validation_func'?"),
        ("train_iteration_func_name = 'x'", "Unknown train_iteration_func_name 'x'"),

        ("train_iteration_func_name = 'Flux2Klein_fulltune_train_iteration'\nuse_lora = True", "use_lora is True"),
        ("transformer_cfg = dict(type='QwenImageTransformer2DModel')", "'Flux2Transformer2DModel'"),
        ("use_parquet_dataset = False", "Set it to True."),
        ("dataset = dict(_delete_=True)", "base_dir is missing"),
        ("dataset = dict(type='FigureDataset')", "FigureDataset needs figures"),
        ("dataset = dict(type='FigureDataset', figures='f')\ntext = 'stored'", "Set text = 'online'."),
        ("dataset['figures'] = 'f'", "set encode = dict(figures=...)"),
        ("dataset['num_workers'] = 3\ndataloader_num_workers = 2", "Set one of them."),
        ("data_sampler = dict(batch_size=3)\ntrain_batch_size = 2", "Set one of them."),
    ],
)  # fmt: skip
def test_keys_that_contradict_each_other_are_refused_with_a_remedy(write: Write, lines: str, said: str) -> None:
    assert said in refusal(write(lines + "\n"))


def test_bf16_is_refused_on_apple_silicon(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("mixed_precision = 'bf16'\n")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert "c.py:4: mixed_precision: 'bf16' is not supported on Apple Silicon" in refusal(path)
    assert load_config(path, ["mixed_precision=fp16"]).mixed_precision == "fp16"


def test_all_problems_are_reported_together(write: Write) -> None:
    text = refusal(
        write("rnak = 3\nlora_alpha = 'x'\nvalidate_unquantized = True\nencode = dict(batchsize=1)\n"), "seed=-1", "nokey"
    )
    assert text.startswith("6 problems in the config c.py")
    for said in (
        "c.py:4: unknown key rnak",
        "c.py:5: lora_alpha",
        "c.py:6: validate_unquantized",
        "encode.batchsize",
        "--cfg_options: seed",
        "'nokey'",
    ):
        assert said in text


def test_a_missing_file_and_missing_keys_are_named(write: Write) -> None:
    assert "Cannot read the config gone.py: No such file" in refusal("gone.py")
    text = refusal(write("seed = 1\n", whole=True))
    assert "pretrained_model_name_or_path is missing: Hub id, local diffusers folder" in text
    assert "dataset is missing" in text


# -- what is accepted --------------------------------------------------------------------------
def test_ints_are_accepted_for_floats_and_tuples_for_lists(write: Write) -> None:
    config = load_config(
        write(
            "guidance_scale = 3\nresolution_list = [(64, 32)]\nvalidation_prompts = ('a',)\nlora_layers = ('a', 'b')\n"
        )
    )
    assert (config.guidance_scale, config.resolution_list, config.validation_prompts) == (3.0, [(64, 32)], ["a"])
    assert config.lora_layers == ["a", "b"]


def test_only_simple_public_names_count(write: Write) -> None:
    config = load_config(write(
        "from __future__ import annotations\nimport os, sys\nfrom pathlib import Path\n_side = 64\n"
        "def helper():\n    hidden = 1\n    return hidden\nclass Thing: inner = 2\n"
        "pretrained_model_name_or_path = 'm'\nmixed_precision = 'no'\ndataset = dict(base_dir='d')\n"
        "rank = helper() * _side\n",
        whole=True,
    ))  # fmt: skip
    assert config.rank == 64
    assert config.provenance["rank"] == "c.py:12"


def test_values_follow_from_others_where_they_are_not_set(write: Write) -> None:
    config = load_config(write("dataset['num_workers'] = 5\ndata_sampler = dict(batch_size=3)\n"))
    assert (config.dataloader_num_workers, config.train_batch_size, config.use_parquet_dataset) == (5, 3, True)
    assert config.train_iteration_func_name == "Flux2Klein_train_iteration_func_parquet"
    assert config.provenance["dataloader_num_workers"] == "from dataset.num_workers"
    online = minimal(dataset={"type": "FigureDataset", "figures": "f"})
    assert (online.use_parquet_dataset, online.text) == (False, "online")
    assert online.train_iteration_func_name == "Flux2Klein_train_iteration_func"
    assert online.dataset_arguments()["encode"].figures == "f"


def test_relative_paths_start_from_base_filesys_path(tmp_path: Path) -> None:
    config = minimal(
        base_filesys_path=str(tmp_path), encode={"figures": "f"}, dataset={"base_dir": "/abs"}, image_output_dir="i"
    )
    assert config.dataset.base_dir == "/abs"
    paths = (config.encode.figures, config.image_output_dir, config.model_output_dir)
    assert paths == (str(tmp_path / "f"), str(tmp_path / "i"), str(tmp_path / "runs/scienceflow"))
    assert minimal(base_filesys_path=str(tmp_path), encode={"figures": "drawn:20"}).encode.figures == "drawn:20"


def test_a_config_does_not_change_after_loading() -> None:
    with pytest.raises(ValueError, match="frozen"):
        minimal().rank = 3


# -- bases and overrides -----------------------------------------------------------------------
def test_bases_merge_key_by_key_and_later_ones_win(write: Write) -> None:
    write(
        "rank = 8\nlora_alpha = 8\n"
        "dataset = dict(base_dir='a', parquet_base_path='p', contract=dict(x=1, y=dict(z=1, w=2)))\n",
        "base/one.py",
    )
    write("lora_alpha = 16\nseed = 7\n", "base/two.py")
    write(
        "dataset = dict(base_dir='b', contract=dict(y=dict(z=3)))\nseed = 8\n"
        "_base_ = ['../base/one.py', '../base/two.py']\n",
        "sub/c.py",
        whole=True,
    )
    config = load_config("sub/c.py")
    assert (config.rank, config.lora_alpha, config.seed) == (8, 16, 8)
    assert (config.dataset.base_dir, config.dataset.parquet_base_path) == ("b", "p")
    assert config.dataset.contract == {"x": 1, "y": {"z": 3, "w": 2}}
    assert config.provenance["rank"] == "base/one.py:4"
    assert config.provenance["lora_alpha"] == "base/two.py:4"
    assert config.provenance["seed"] == "sub/c.py:2"
    assert config.provenance["dataset.base_dir"] == "sub/c.py:1"
    assert config.provenance["dataset.parquet_base_path"] == "base/one.py:6"


def test_delete_replaces_a_dict_of_the_base(write: Write) -> None:
    write("dataset = dict(base_dir='a', parquet_base_path='p', num_train_examples=3)\n", "base.py")
    config = load_config(write("_base_ = 'base.py'\ndataset = dict(_delete_=True, base_dir='b')\n", whole=True))
    assert (config.dataset.base_dir, config.dataset.parquet_base_path, config.dataset.num_train_examples) == (
        "b",
        "",
        None,
    )


def test_a_circle_of_bases_is_refused(write: Write) -> None:
    write("_base_ = 'b.py'\n", "a.py", whole=True)
    write("_base_ = ['a.py']\n", "b.py", whole=True)
    assert "_base_ goes in a circle: a.py -> b.py -> a.py" in refusal("a.py")
    write("_base_ = 'd.py'\n", "d.py", whole=True)
    assert "d.py -> d.py" in refusal("d.py")


def test_one_base_may_be_reached_on_two_ways(write: Write) -> None:
    write("seed = 3\n", "root.py")
    write("_base_ = 'root.py'\n", "l.py", whole=True)
    write("_base_ = 'root.py'\nrank = 2\n", "r.py", whole=True)
    config = load_config(write("_base_ = ['l.py', 'r.py']\n", whole=True))
    assert (config.seed, config.rank) == (3, 2)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("learning_rate=1e-3", "learning_rate", 1e-3),
        ("allow_tf32=TRUE", "allow_tf32", True),
        ("shuffle", None, None),
        ("checkpoints_total_limit=null", "checkpoints_total_limit", None),
        ("max_train_steps=None", "max_train_steps", None),
        ("lora_layers=to_k,to_q", "lora_layers", "to_k,to_q"),
        ("run_name='123'", "run_name", "123"),
        ("negative_prompt=a=b", "negative_prompt", "a=b"),
        ("resolution_list=[[64,64]]", "resolution_list", [(64, 64)]),
        ("log_steps=3", "logging_steps", 3),
        ("report_to=['wandb','trackio']", "report_to", ["wandb", "trackio"]),
    ],
)
def test_overrides_are_parsed_as_python_else_text(write: Write, override: str, key: str | None, value: Any) -> None:
    path = write()
    if key is None:
        assert f"--cfg_options: {override!r} is not key=value" in refusal(path, override)
        return
    config = load_config(path, [override])
    assert dict(config)[key] == value
    assert config.provenance[key] == "--cfg_options"


def test_overrides_reach_into_dicts_and_win(write: Write) -> None:
    path = write("dataset = dict(base_dir='a', num_train_examples=3)\n")
    config = load_config(
        path, ["dataset.num_train_examples=9", "encode.figures=drawn:5", "dataset_cfg.parquet_base_path=p"]
    )
    assert (config.dataset.base_dir, config.dataset.num_train_examples, config.dataset.parquet_base_path) == (
        "a",
        9,
        "p",
    )
    assert config.encode.figures == "drawn:5"
    assert config.provenance["dataset.num_train_examples"] == "--cfg_options"
    assert config.provenance["dataset.base_dir"] == "c.py:4"
    assert "--cfg_options: unknown key dataset.num_wokers" in refusal(path, "dataset.num_wokers=4")
    assert "quote it twice" in refusal(path, "run_name=123")


# -- second spellings, retired keys, secrets ----------------------------------------------------
@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_second_spellings_are_accepted(write: Write, alias: str, name: str) -> None:
    values: dict[str, Any] = {
        "dataset": {"base_dir": "elsewhere"}, "data_sampler": {"seed": 3}, "report_to": "none", "logging_steps": 7,
        "train_iteration_func_name": "Flux2Klein_train_iteration_func_parquet",
        "validation_func_name": "generic_validation_func",
    }  # fmt: skip
    value = values.get(name, "text")
    head = GOOD.replace("dataset = dict(base_dir='data')\n", "") if name == "dataset" else GOOD
    direct = load_config(write(f"{head}{name} = {value!r}\n", "direct.py", whole=True))
    spelled = load_config(write(f"{head}{alias} = {value!r}\n", whole=True))
    assert spelled == direct
    assert spelled.provenance[name] == f"c.py:{len(head.splitlines()) + 1}"


def test_two_spellings_with_different_values_are_refused_with_both_places(write: Write) -> None:
    text = refusal(write("logging_steps = 3\nlog_steps = 4\n"))
    assert "c.py:5: log_steps and logging_steps (c.py:4) are the same key" in text
    assert "are the same key" in refusal(write(), "log_steps=3", "logging_steps=4")
    assert load_config(write("logging_steps = 3\nlog_steps = 3\n")).logging_steps == 3


def test_a_second_spelling_in_a_child_overrides_its_base(write: Write) -> None:
    write("logging_steps = 3\ndataset = dict(base_dir='a', parquet_base_path='p')\n", "base.py")
    path = write("_base_ = 'base.py'\nlog_steps = 4\ndataset_cfg = dict(base_dir='b')\n", whole=True)
    config = load_config(path)
    assert (config.logging_steps, config.dataset.base_dir, config.dataset.parquet_base_path) == (4, "b", "p")
    assert load_config(path, ["log_steps=5"]).logging_steps == 5


def test_retired_keys_warn_once_by_name_and_never_show_a_value(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    top = [name for name in RETIRED if "." not in name]
    lines = "".join(f"{name} = {TOKEN!r}\n" for name in top)
    lines += "dataset.update(debug_mode=True, is_main_process=True, vae_scaling_factor=1)\n"
    lines += "data_sampler = dict(num_replicas=1, rank=0, dataset=None)\n"
    path = write(lines)
    with caplog.at_level(logging.WARNING, "OpenSciDraw"):
        load_config(path)
        load_config(path)
    for name in RETIRED:
        assert sum(f": {name} has no effect" in message for message in caplog.messages) == 1, name
    assert "c.py:4: device has no effect" in caplog.text
    assert TOKEN not in caplog.text
    assert "Secrets belong in the environment" in next(m for m in caplog.messages if "wandb_api_key" in m)


def test_secrets_are_never_printed(write: Write, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.WARNING, "OpenSciDraw"):
        config = load_config(write(f"hub_token = {TOKEN!r}\nhuggingface_token = {TOKEN!r}\n"))
        save_config(config, "saved.py")
        texts = [
            caplog.text,
            repr(config),
            format_config(config),
            str(config.model_dump()),
            Path("saved.py").read_text(),
        ]
    assert config.hub_token == config.huggingface_token == TOKEN
    assert "hub_token = '***'" in texts[2]
    assert "c.py:4: hub_token is written out" in caplog.text
    texts += [
        refusal(write(f"hub_token = [{TOKEN!r}]\nrank = 'x'\n")),
        refusal(write(f"hub_tokne = {TOKEN!r}\n")),
        refusal(write(), f"hub_token={TOKEN}", "rank=x"),
    ]
    assert "a secret on the command line" in texts[-1]  # trackers record the command line
    for text in texts:
        assert TOKEN not in text


def test_secrets_taken_from_the_environment_give_no_warning(
    write: Write, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "SOME_TOKEN", TOKEN)
    with caplog.at_level(logging.WARNING, "OpenSciDraw"):
        assert load_config(write("import os\nhub_token = os.environ['SOME_TOKEN']\n")).hub_token == TOKEN
    assert not caplog.messages


def test_a_warm_up_that_the_schedule_does_not_use_is_said(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    load_config(write("lr_warmup_steps = 123\n"))
    assert "lr_warmup_steps has no effect with lr_scheduler = 'constant'" in caplog.text


# -- text --------------------------------------------------------------------------------------
@pytest.mark.parametrize("line", [
    "", "dataset['num_workers'] = 7", "data_sampler = dict(batch_size=4, seed=1)", "base_filesys_path = 'x'",
    "dataset = dict(type='FigureDataset', figures='drawn:3', base_dir='d')", "timestep_shift = 3",
    "transformer_cfg = dict(type='Flux2Transformer2DModel')", "report_to = ['none']", "run_name = 'it\\'s \"x\"\\n'",
    "dataset['contract'] = dict(a=[1, {'b': None}])",
    "validation_prompts = ['é', 'b']\nresolution_list = [[64, 128], (32, 32)]",
])  # fmt: skip
def test_a_saved_config_reads_back_equal(write: Write, line: str) -> None:
    config = load_config(write(line + "\n"))
    save_config(config, "saved.py")
    assert load_config("saved.py") == config


def test_equality_sees_every_value() -> None:
    assert minimal() == minimal()
    assert minimal() != minimal(seed=1)
    assert minimal() != minimal(encode={"batch_size": 5})


def test_the_table_lists_every_key_with_type_default_and_meaning() -> None:
    table = schema_table()
    for name, field in all_fields().items():
        assert f"| `{name}` |" in table
        assert field.description
        assert field.description[0].isupper() or not field.description[0].isalpha() or ":" in field.description
    for name in (*ALIASES, *RETIRED):
        assert f"`{name}`" in table
    assert "| `learning_rate` | `float > 0` | per optimizer step | `0.0002` |" in table


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("seed", 42), ("rank", 64), ("lora_alpha", 4), ("lora_layers", "to_k,to_q,to_v"), ("train_batch_size", 1),
        ("max_train_steps", 80000), ("learning_rate", 2e-4), ("lr_warmup_steps", 500), ("checkpointing_steps", 500),
        ("mixed_precision", "bf16"), ("weighting_scheme", "none"), ("mode_scale", 1.29), ("use_parquet_dataset", False),
        ("validation_guidance_scale", 1.0), ("logging_dir", "logs"), ("report_to", "wandb"), ("logging_steps", 10),
        ("ema_decay", 0.9999), ("adam_weight_decay", 1e-4), ("prodigy_safeguard_warmup", True),
        ("max_sequence_length", 512),
    ],
)  # fmt: skip
def test_defaults_are_the_documented_ones(name: str, default: Any) -> None:
    assert Config.model_fields[name].default == default


# -- the configs that exist --------------------------------------------------------------------
@pytest.mark.parametrize("path", CONFIGS, ids=[str(path.relative_to(REPO)) for path in CONFIGS])
def test_every_config_of_the_repository_loads_and_documents_itself(path: Path) -> None:
    load_config(path)
    assert path.read_text().startswith('"""')
    if "260120" in path.parts:
        for word in ("Command:", "Cost:", "Result:"):
            assert word in path.read_text()


def _readme_blocks() -> list[str]:
    """The Python blocks of the README; the quick start's has an end fence only."""
    if not README.exists():
        return []
    text = README.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    quick_start = re.search(r"^model_type = 'Flux2Klein'  # or.*?(?=^```)", text, re.M | re.S)
    return [quick_start[0] if quick_start else "", *blocks]


@pytest.mark.skipif(not README.exists(), reason="the specification is not beside this repository")
def test_every_config_snippet_of_the_readme_loads(write: Write) -> None:
    blocks = _readme_blocks()
    assert len(blocks) >= 7
    base = os.path.relpath(REPO / "configs" / "base_config.py")
    for block in blocks:
        load_config(write(f"_base_ = {base!r}\n{block}", whole=True))
    for whole in (block for block in blocks if "pretrained_model_name_or_path" in block):
        config = load_config(write(whole, whole=True))
        assert (config.optimizer, config.rank, config.lora_alpha) == ("prodigy", 128, 128)


def test_a_config_of_a_user_with_old_spellings_loads(write: Write) -> None:
    config = load_config(write(
        "model_type = 'Flux2Klein'\npretrained_model_name_or_path = 'black-forest-labs/FLUX.2-klein-base-9B'\n"
        "mixed_precision = 'no'\ndevice = 'cuda'\noptimizer = 'Prodigy'\nlearning_rate = 1\nlr_warmup_steps = 0\n"
        "dataset_cfg = dict(type='ArXiVParquetDatasetV3', base_dir='/d', parquet_base_path='p', num_workers=4,\n"
        "    num_train_examples=None, debug_mode=False, is_main_process=True, stat_data=True)\n"
        "sampler_cfg = dict(type='DistributedBucketSamplerV2', batch_size=2, num_replicas=None, rank=None,\n"
        "    drop_last=True, shuffle=True, seed=42)\ntrain_batch_size = 2\nlog_with = 'tensorboard'\n"
        "validation_func = 'generic_validation_func'\noutput_dir = 'out'\nuse_parquet_dataset = True\n", whole=True,
    ))  # fmt: skip
    assert config.data_sampler.drop_last and config.dataset.stat_data
    assert (config.dataloader_num_workers, config.model_output_dir, config.report_to) == (4, "out", "tensorboard")


# -- the configs of the program before this one, unchanged -----------------------------------------
OLD_FULL_FINE_TUNING = """
model_type = 'Flux2Klein'
pretrained_model_name_or_path = 'black-forest-labs/FLUX.2-klein-base-9B'
use_lora = False
lora_layers = None
mixed_precision = 'no'
train_batch_size = 1
max_sequence_length = 2048
dataset_cfg = dict(type='ArXiVParquetDatasetV3', base_dir='/d', parquet_base_path='p', vae_scaling_factor=0.3611)
sampler_cfg = dict(type='DistributedBucketSamplerV2', dataset=None, batch_size=2, num_replicas=None, rank=None)
train_iteration_func = 'Flux2Klein_fulltune_train_iteration'
validation_func = 'Flux2Klein_fulltune_validation_func_parquet'
tracker_project_name = 'first'
wandb_project = 'second'
vae_scale_factor = 8
validation_vae_path = '/models/vae'
"""


def test_a_full_fine_tuning_of_the_earlier_program_loads_and_says_what_counts(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(write(OLD_FULL_FINE_TUNING, whole=True))
    assert config.tracker_name == "second"  # which its loop of full fine-tuning read
    assert (config.train_batch_size, config.max_sequence_length, config.use_lora) == (2, 2048, False)
    for said in (
        "wandb_project = 'second' is the tracker's project; tracker_project_name = 'first' does not count",
        "sampler_cfg.batch_size = 2 is the batch, not train_batch_size = 1", "data_sampler.dataset has no effect",
        "dataset.vae_scaling_factor has no effect", "vae_scale_factor has no effect", "validation_vae_path has no effect",
    ):  # fmt: skip
        assert sum(said in record.message for record in caplog.records) == 1, said


def test_its_lora_loop_read_another_name_of_the_project(write: Write) -> None:
    names = "tracker_name = 'first'\nwandb_project = 'second'\ntracker_project_name = 'third'\n"
    assert load_config(write(names)).tracker_name == "first"
    assert load_config(write(names + "use_lora = False\n")).tracker_name == "second"


def test_names_of_functions_are_read_as_they_were_meant(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(write("validation_func_name = 'Qwen_Image_train_iteration_func'\nmodel_type = 'QwenImage'\n"
                               "train_iteration_func_name = 'Qwen_Image_train_iteration_func'\n"))  # fmt: skip
    assert config.validation_func_name == "generic_validation_func"
    assert config.train_iteration_func_name == "Qwen_Image_train_iteration_func_parquet"
    assert "is an objective: generic_validation_func is taken" in caplog.text
    assert "Qwen_Image_train_iteration_func_parquet is taken, since the figures of this dataset are" in caplog.text
    assert load_config(write("validation_func_name = 'Flux2Klein_validation_func'\n")).validation_func_name.startswith("Flux2Klein")


def test_lora_layers_that_are_none_need_a_run_without_lora(write: Write) -> None:
    assert load_config(write("use_lora = False\nlora_layers = None\n")).use_lora is False
    assert "lora_layers = None (NoneType): expected str | list[str]" in refusal(write("lora_layers = None\n"))


@pytest.mark.parametrize("text", ["seed = 7\n"] + [f"seed = 7\nuse_parquet_dataset = {value}\n" for value in (False, True)])
def test_a_file_that_others_build_on_is_refused_as_a_run_and_printed(write: Write, text: str) -> None:
    path = write(text + "mixed_precision = 'no'\n", whole=True)
    assert "dataset is missing" in refusal(path) and "pretrained_model_name_or_path is missing" in refusal(path)
    printed = format_config(load_config(path, complete=False))
    assert "pretrained_model_name_or_path = '?'  # missing: a run needs it" in printed and "seed = 7  # c.py:1" in printed
    assert re.search(r"dataset\.(base_dir|figures) = '.*'  # missing: a run needs it", printed)


# -- the configs of its successor ------------------------------------------------------------------
SUCCESSOR_BASE = "seed = 42\nmodel_type = 'QwenImage'\npretrained_model_name_or_path = 'Qwen/Qwen-Image-2512'\nuse_lora = True\n"
SUCCESSOR_STAGE_1 = """
_base_ = ['base_config.py']
model_type = 'Flux2Klein'
pretrained_model_name_or_path = 'black-forest-labs/FLUX.2-klein-base-9B'
transformer_cfg = dict(type='Flux2Transformer2DModel')
init_weights_path = '/data/checkpoint-140000/ema_weights.pt'
use_parquet_dataset = True
dataset_cfg = dict(type='ArXiVHFDatasetUnified', data_root='/data/set', splits=['gen_1024'], quality_filter='High', num_workers=8)
sampler_cfg = dict(type='DistributedBucketSamplerV2', dataset=None, batch_size=2, num_replicas=1, rank=0, shuffle=True)
train_iteration_func = 'Flux2Klein_fulltune_train_iteration'
train_batch_size = 2
max_train_steps = 200000
gradient_checkpointing = False
optimizer = 'adamw'
learning_rate = 1e-5
lr_scheduler = 'constant_with_warmup'
lr_warmup_steps = 1000
use_ema = True
ema_on_gpu = False
mixed_precision = 'no'
max_sequence_length = 1024
dataloader_num_workers = 8
pin_memory = True
model_output_dir = '/data/run'
output_dir = model_output_dir
log_with = 'wandb'
tracker_project_name = 'P'
tracker_run_name = 'r'
validation_func = 'Flux2Klein_fulltune_validation_func_parquet'
validation_guidance_scale = 4.0
"""


def test_a_first_stage_of_the_successor_loads_and_says_how_its_list_becomes_a_store(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write(SUCCESSOR_BASE, "base_config.py", whole=True)
    config = load_config(write(SUCCESSOR_STAGE_1, whole=True))
    assert config.use_lora is False and config.pretrained_full_ckpt_path == "/data/checkpoint-140000/ema_weights.pt"
    assert (config.dataset.type, config.dataset.location) == ("ArXiVParquetDatasetV2", "/data/set/scienceflow_gen_1024")
    encode = config.encode
    assert (encode.figures, encode.where, encode.min_quality) == ("/data/set/metadata.parquet", {"split": ["gen_1024"]}, "high")
    assert encode.resolution == 1024 and config.dataloader_num_workers == 8
    for said in ("use_lora = False is taken, not the True of base_config.py:4", "makes a store of /data/set/metadata.parquet",
                 "ema_on_gpu has no effect", "pin_memory has no effect"):  # fmt: skip
        assert sum(said in record.message for record in caplog.records) == 1, said


def test_a_full_fine_tuning_that_asks_for_lora_in_the_same_file_is_refused(write: Write) -> None:
    text = "train_iteration_func_name = 'Flux2Klein_fulltune_train_iteration'\nuse_lora = True\n"
    assert "trains all weights, but use_lora is True" in refusal(write(text))


def test_packaged_features_are_names_and_no_paths() -> None:
    values = {"pretrained_model_name_or_path": "embedded:x", "dataset": {"base_dir": "d"}, "base_filesys_path": "/data"}
    for given, wanted in (("figure-measures", "figure-measures"), ("clip", "/data/clip")):
        assert Config.model_validate({**values, "evaluate": {"features": given}}).evaluate.features == wanted
