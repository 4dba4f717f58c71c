"""Every command, given what is not there, empty, something else, not allowed or damaged, says so in a line and ends with 2.

No traceback: an exception that leaves the command fails the test.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from conftest import merged, write_config
from PIL import Image

from OpenSciDraw import cli

NOBODY = 65534
INPUTS = ["missing", "empty file", "empty folder", "noise", "a folder below a file", "circle", "long name", "nested"]
COMMANDS: dict[str, Callable[[str, Path], list[str]]] = {
    "config": lambda given, out: ["config", given],
    "encode": lambda given, out: ["encode", given],
    "plan": lambda given, out: ["plan", given],
    "train": lambda given, out: ["train", given],
    "verify": lambda given, out: ["verify", given, "--out", str(out)],
    "repack": lambda given, out: ["repack", given, str(out)],
    "prepare": lambda given, out: ["prepare", given, "--out", str(out)],
    "sample": lambda given, out: ["sample", given, "--prompt", "x", "--out", str(out)],
    "report": lambda given, out: ["report", given, "--out", str(out / "report.html")],
    "export": lambda given, out: ["export", given, "--out", str(out)],
    "evaluate": lambda given, out: ["evaluate", given, "--figures", "drawn:2", "--out", str(out)],
    "evaluate --figures": lambda given, out: ["evaluate", str(out.parent / "pictures"), "--figures", given, "--out", str(out)],
}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says; it must end with 2 (or 1: what it looked at is damaged)."""
    code = cli.main(arguments)
    said = capsys.readouterr()
    assert code in (1, 2), (arguments, code, said.err)
    assert "Traceback" not in said.err
    return said.err


def make(kind: str, folder: Path) -> str:
    path = folder / "given"
    if kind == "empty file":
        path.touch()
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "noise":
        path.write_bytes(bytes(range(256)) * 4)
    elif kind == "a folder below a file":
        path.touch()
        path = path / "below"
    elif kind == "circle":
        path.symlink_to(path)
    elif kind == "long name":
        path = folder / ("x" * 300)
    elif kind == "nested":
        path.write_text("[" * 100_000)
    return str(path)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_cannot_be_read_is_refused_by_name(
    command: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = make(kind, tmp_path)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "pictures" / "0.png")
    if command == "config" and kind == "empty file":
        pytest.skip("a config that leaves everything to those that build on it")
    said = refused(COMMANDS[command](given, tmp_path / "out"), capsys)
    if command == "prepare" and kind in ("empty file", "noise", "nested"):  # a paper, and none that can be used
        assert "error: No picture was kept" in said and (tmp_path / "out" / "rejected.jsonl").exists()
        return
    assert "error: " in said and Path(given).name[:40] in said, said
    assert not (tmp_path / "out").exists()


# -- where nothing can be written ----------------------------------------------------------------------
@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to pass over all others."""
    if os.geteuid() == 0:
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        yield


@pytest.fixture
def trained(run, tmp_path: Path) -> Path:  # type: ignore[no-untyped-def]
    folder = tmp_path / "run"
    run(model_output_dir=str(folder), max_train_steps=1)
    return folder


def writing(command: str, out: Path, store_config: dict, tmp_path: Path, trained: Path | None) -> list[str]:
    """A command that has something to write into `out`."""
    store = Path(store_config["dataset"]["base_dir"]) / "store"
    changes = {
        "train": {"model_output_dir": str(out)},
        "encode": {"dataset": {"base_dir": str(out.parent), "parquet_base_path": out.name}},
    }  # fmt: skip
    config = write_config(tmp_path / "c.py", merged(store_config, **changes.get(command, {})))
    papers = tmp_path / "papers"
    papers.mkdir()
    (papers / "2401.00001.tex").write_text("\\documentclass{article}\\begin{document}x\\end{document}")
    return {
        "train": ["train", config], "encode": ["encode", config], "prepare": ["prepare", papers, "--out", out],
        "repack": ["repack", store, out], "draw": ["draw", out, "--count", "1"], "verify": ["verify", config, "--out", out],
        "export": ["export", trained, "--out", out], "report": ["report", trained, "--out", out / "report.html"],
        "sample": ["sample", trained, "--prompt", "x", "--steps", "1", "--out", out],
        "evaluate": ["evaluate", trained, "--figures", "drawn:1", "--steps", "1", "--out", out],
    }[command]  # type: ignore[return-value]  # fmt: skip


OUTPUTS = ["train", "encode", "prepare", "repack", "draw", "verify", "export", "report", "sample", "evaluate"]


@pytest.mark.parametrize(
    ("command", "place"), [(command, place) for command in OUTPUTS for place in ("a file", "below a file")]
    + [(command, "read-only") for command in ("train", "encode", "prepare", "draw")],  # the others read what is root's alone
)  # fmt: skip
def test_what_cannot_be_written_is_refused_by_name(  # type: ignore[no-untyped-def]
    command: str, place: str, store_config: dict, tmp_path: Path, capsys, request
) -> None:
    trained = request.getfixturevalue("trained") if command in ("export", "report", "sample", "evaluate") else None
    out = tmp_path / "out"
    if place == "read-only":
        out.mkdir(mode=0o555)
        for folder in tmp_path.parents:
            if folder.owner() == "root" and folder.stat().st_mode & 0o077 == 0 and os.geteuid() == 0:
                folder.chmod(0o755)  # pytest's own folders are for their owner alone
        tmp_path.chmod(0o755)
    else:
        out.write_text("precious")
        out = out / "below" if place == "below a file" else out
    arguments = [str(argument) for argument in writing(command, out, store_config, tmp_path, trained)]
    capsys.readouterr()
    with as_nobody() if place == "read-only" else nullcontext():
        said = refused(arguments, capsys)
    assert "error: " in said and "out" in said, said
    if place != "read-only":
        assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize("command", ["export", "sample", "train", "evaluate", "draw", "verify", "report"])
def test_a_full_disk_is_said(  # type: ignore[no-untyped-def]
    command: str, store_config: dict, tmp_path: Path, capsys, request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write of a picture, of weights and of text finds the disk full."""
    trained = request.getfixturevalue("trained") if command in ("export", "report", "sample", "evaluate") else None
    arguments = [str(argument) for argument in writing(command, tmp_path / "out", store_config, tmp_path, trained)]
    if command == "train":
        arguments += ["--cfg_options", "max_train_steps=1", "validation_prompts=['x']", "num_inference_steps=1"]

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("PIL.Image.Image.save", full)
        patched.setattr("OpenSciDraw.inference.export.save_file", full)
        if command in ("report", "train"):
            patched.setattr("pathlib.Path.write_text", full)
        said = refused(arguments, capsys)
    assert "disk is full" in said or "No space left on device" in said


# -- runs and evaluations that were damaged --------------------------------------------------------------
DAMAGE = {
    "empty": lambda data: b"", "noise": lambda data: bytes(range(256)), "half": lambda data: data[: len(data) // 2],
    "nested": lambda data: b"[" * 100_000, "a list": lambda data: b"[]", "numbers": lambda data: b"1\n2\n",
    "null": lambda data: b"null",
}  # fmt: skip


def ends_well_or_says_why(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) in (0, 1, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_damaged_files_of_a_run_never_end_a_command_by_a_traceback(  # type: ignore[no-untyped-def]
    trained: Path, store_config: dict, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    config = write_config(
        tmp_path / "c.py", merged(store_config, model_output_dir=str(trained), max_train_steps=1, resume_from_checkpoint="latest")
    )
    commands = {
        "config.py": ["report", "export", "plan"], "run.json": ["report", "train"], "metrics.jsonl": ["report", "train"],
        "pytorch_lora_weights.safetensors": ["report", "export", "sample"],
    }  # fmt: skip
    arguments = {
        "report": ["report", str(trained), "--out", str(out / "r.html")], "export": ["export", str(trained), "--out", str(out)],
        "plan": ["plan", str(trained / "config.py")], "train": ["train", str(config)],
        "sample": ["sample", str(trained), "--prompt", "x", "--steps", "1", "--out", str(out)],
    }  # fmt: skip
    out.mkdir()
    for name, used_by in commands.items():
        whole = (trained / name).read_bytes()
        for damage in DAMAGE.values():
            for command in used_by:
                (trained / name).write_bytes(damage(whole))
                ends_well_or_says_why(arguments[command], capsys)
        (trained / name).write_bytes(whole)


def test_damaged_results_are_measured_again_and_damaged_settings_refused(trained: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    folder, other = tmp_path / "evaluation", tmp_path / "other"
    arguments = ["evaluate", str(trained), "--figures", "drawn:2:size=96", "--steps", "1", "--out", str(folder)]
    assert cli.main(arguments) == 0
    whole = {name: (folder / name).read_bytes() for name in ("results.jsonl", "drawn.jsonl", "settings.json")}
    summary = (folder / "evaluation.json").read_text()
    for name, data in whole.items():
        for kind, damage in DAMAGE.items():
            (folder / name).write_bytes(damage(data))
            capsys.readouterr()
            code = cli.main(arguments)
            if name == "settings.json":
                assert code == 2 and "settings.json is damaged" in capsys.readouterr().err, kind
                (folder / name).write_bytes(data)
            else:
                assert code == 0, (name, kind)
    first, again = (sorted(line for line in text.splitlines() if '"value"' in line or "score" in line)
                    for text in (summary, (folder / "evaluation.json").read_text()))  # fmt: skip
    assert first == again
    shutil.rmtree(other, ignore_errors=True)


@pytest.mark.parametrize("manifest", ["", "[]", "1", "nested", "long", "null byte", "noise"])
def test_a_damaged_manifest_is_a_damaged_checkpoint(manifest: str, tmp_path: Path) -> None:
    from OpenSciDraw.training.checkpoint import DamagedCheckpoint, check

    others = {"nested": "[" * 100_000, "long": json.dumps({"x" * 300: "0"}), "null byte": json.dumps({"a\0b": "0"})}
    content = others.get(manifest, manifest)
    (tmp_path / "manifest.json").write_bytes(bytes(range(256)) if manifest == "noise" else content.encode())
    with pytest.raises(DamagedCheckpoint, match="manifest.json|is missing"):
        check(tmp_path)
