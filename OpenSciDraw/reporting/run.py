"""`scienceflow report RUN`: a run, or a folder of runs, as one HTML file that needs no network."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from OpenSciDraw.config.text import all_fields
from OpenSciDraw.errors import UserError
from OpenSciDraw.reporting import page, sections
from OpenSciDraw.reporting.charts import Line, chart, short, smoothed
from OpenSciDraw.reporting.run_data import RunData, find_runs, finite, is_run, read_run
from OpenSciDraw.utils.files import write_text

NAME = "report.html"
_MOST_COMPARED = 8
_MOST_PROMPTS = 16
_LAST_VALUES = (
    ("step", "step"), ("held_out_loss", "held-out loss"), ("train_loss", "training loss"),
    ("images_per_second", "images a second"), ("memory_gb", "peak memory, GB"),
)  # fmt: skip


def defaults() -> dict[str, Any]:
    """The defaults of all keys, dotted; keys without one are left out."""
    optional = {name: field for name, field in all_fields().items() if not field.is_required()}
    values = {name: field.get_default(call_default_factory=True) for name, field in optional.items()}
    return {name: value for name, value in values.items() if not isinstance(value, BaseModel)}


def _number(value: Any) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None


def _key_facts(run: RunData) -> list[tuple[str, Any]]:
    """What was trained on what, and how far it came."""
    config, last = run.config, run.sessions[-1] if run.sessions else {}
    kind = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr", "loha": "LoHa"}.get(config.get("adapter_type", "lora"))
    adapter = f"OFT, blocks of {config.get('oft_block_size', '?')}" if kind is None else f"{kind}, rank {config.get('rank', '?')}"
    trained = adapter if config.get("use_lora", True) else "all weights"
    held = [value for _, value in run.series("held_out_loss") if finite(value)]
    steps = last.get("total_steps") or config.get("max_train_steps") or "?"
    speed, dataset = run.last("images_per_second"), config["dataset"] if isinstance(config.get("dataset"), dict) else {}
    place = "/".join(str(dataset[key]) for key in ("base_dir", "parquet_base_path", "figures") if dataset.get(key))
    return [
        ("model", config.get("pretrained_model_name_or_path")), ("trained", trained),
        ("trained parameters", _number(last.get("trained_parameters"))), ("data", place), ("rows", _number(last.get("rows"))),
        ("held-out rows", _number(last.get("held_out_rows"))), ("device", last.get("device")),
        ("step", f"{run.last_step} of {steps}"), ("effective batch", last.get("effective_batch")),
        ("batch of a device", None if last else config.get("train_batch_size")),
        ("held-out loss", " → ".join(short(value) for value in dict.fromkeys([*held[:1], *held[-1:]]))),
        ("images a second", None if speed is None else short(speed)), ("rows not readable", len(run.bad_rows) or None),
    ]  # fmt: skip


def run_page(run: RunData) -> str:
    """The page of one run."""
    pictures = page.Pictures()
    lead = f'<p class="lead">{escape(str(run.folder))}</p>{page.facts(_key_facts(run))}{page.remarks(run.remarks)}'
    bad = [[row.get("id"), row.get("reason")] for row in run.bad_rows[:50]]
    return page.document(f"Run {run.name}", lead, [
        ("Before and after", sections.before_after(run, pictures)),
        ("Scores", sections.scores(run)),
        ("Rewards", sections.rewards(run)),
        ("Loss", sections.curves(run)),
        ("Preferences", sections.preferences(run)),
        ("Pictures by step", sections.samples(run, pictures)),
        ("Rate, speed and memory", sections.pace(run)),
        ("Rows that could not be read", page.table(("row", "reason"), bad) if bad else ""),
        ("Files", sections.exports(run)),
        ("Settings", sections.settings(run, defaults()) if run.config else ""),
        ("Where it ran", sections.provenance(run)),
    ])  # fmt: skip


def comparison_page(folder: Path, runs: Sequence[RunData]) -> str:
    """The page of several runs: curves in one chart, what their configs differ in, their scores, their last pictures."""
    pictures = page.Pictures()
    names = [str(run.folder.relative_to(folder)) for run in runs]
    both = list(zip(names, runs, strict=True))
    charts = [
        chart("Held-out loss", [Line(name, run.series("held_out_loss")) for name, run in both], "loss"),
        chart("Training loss, smoothed", [Line(n, smoothed(r.series("train_loss"))) for n, r in both], "loss", log=True),
        chart(
            "Preferences: winner's loss less the reference's",
            [Line(name, run.series("preference_winner_change")) for name, run in both], "loss",
        ),
        chart("Throughput", [Line(name, smoothed(run.series("images_per_second"))) for name, run in both], "images / s"),
    ]  # fmt: skip
    flat = [sections.flatten(run.config) for run in runs]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    differing = [key for key in keys if len({repr(one.get(key)) for one in flat}) > 1]
    config_rows = [[page.code(key), *(page.code(repr(one.get(key))[:200]) for one in flat)] for key in differing]
    columns = range(1, len(runs) + 1)
    scores = [run.evaluations[-1][1]["metrics"] if run.evaluations else {} for run in runs]
    metrics = list(dict.fromkeys(key for one in scores for key in one))
    score_rows = [[page.code(key), *(_score(one.get(key)) for one in scores)] for key in metrics]
    last = [[label, *(_last(run, key) for run in runs)] for key, label in _LAST_VALUES]
    last = [row for row in last if set(row[1:]) != {"–"}]
    head = ["key", *names]
    found = [f"{name}: {text}" for name, run in both for text in run.remarks]
    lead = f'<p class="lead">{len(runs)} runs in {escape(str(folder))}</p>{page.remarks(found)}'
    return page.document(f"Runs in {folder.name or folder}", lead, [
        ("Curves", f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""),
        ("Last values", page.table(head, last, numbers=columns) if last else ""),
        ("Scores of the last evaluation of each", page.table(head, score_rows, numbers=columns) if score_rows else ""),
        ("Last pictures", _last_pictures(both, pictures)),
        ("What their settings differ in", page.table(head, config_rows) if config_rows else "<p>All keys are equal.</p>"),
    ])  # fmt: skip


def _last(run: RunData, key: str) -> str:
    value = float(run.last_step) if key == "step" else run.last(key)
    return "–" if value is None else short(value)


def _score(item: Any) -> str:
    if not isinstance(item, dict) or not finite(item.get("value")):
        return "–"
    ends = item.get("low"), item.get("high")
    interval = f" ({ends[0]:.3f} to {ends[1]:.3f})" if all(map(finite, ends)) else ""
    return f"{item['value']:.3f}{interval}"


def _last_pictures(both: Sequence[tuple[str, RunData]], pictures: page.Pictures) -> str:
    """A card for each prompt, with the picture of each run that drew it."""
    drawn: dict[str, dict[str, Path]] = {}
    for name, run in both[:_MOST_COMPARED]:
        prompts = run.prompts
        for file in run.pictures[max(run.pictures)] if run.pictures else []:
            if file.stem.isdecimal() and int(file.stem) < len(prompts):
                drawn.setdefault(prompts[int(file.stem)], {})[name] = file
    if not drawn:
        return ""
    rows = [
        (prompt, [(name, page.picture(pictures, file, f"{name}: {prompt}")) for name, file in found.items()])
        for prompt, found in list(drawn.items())[:_MOST_PROMPTS]
    ]
    over = [f"the first {_MOST_COMPARED} of {len(both)} runs"] if len(both) > _MOST_COMPARED else []
    over += [f"the first {_MOST_PROMPTS} of {len(drawn)} prompts"] if len(drawn) > _MOST_PROMPTS else []
    note = f'<p class="lead">Shown: {", ".join(over)}.</p>' if over else ""
    return note + page.side_by_side(rows)


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the page of a run, or of the runs below a folder; returns its file.

    Raises:
        UserError: no run there; the page cannot be written.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give the folder of a run (model_output_dir), or one with several runs.")
    if is_run(folder):
        html = run_page(read_run(folder))
    else:
        runs = find_runs(folder)
        if not runs:
            raise UserError(f"{folder} is no run (config.py and metrics.jsonl) and holds none. Give a training's model_output_dir.")
        html = comparison_page(folder, [read_run(path) for path in runs])
    file = out or folder / NAME
    try:
        write_text(file, html)
    except OSError as error:
        raise UserError(f"Cannot write {file}: {error.strerror}. Choose another place with --out.") from error
    return file


def main(arguments: Namespace) -> int:
    file = write_report(Path(arguments.run).expanduser(), Path(arguments.out).expanduser() if arguments.out else None)
    print(f"{file}  ({file.stat().st_size / 1e6:.1f} MB): open it in a browser")
    return 0
