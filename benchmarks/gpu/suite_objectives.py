"""Runs of the objectives beside flow matching: edits, preferences, rewards, and routed tokens. Data of their own, drawn here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from suite_bench import Bench, draw_figures
from suite_train import training

from OpenSciDraw.datasets.preference_groups import GROUPS_FILE


def _store(bench: Bench, kind: str, name: str, figures: Path) -> dict[str, Any]:
    """Encode `figures` for `kind`, where that has not been done; the section `dataset` that reads them."""
    from OpenSciDraw.encode import run as encode

    dataset = {"base_dir": str(bench.work), "parquet_base_path": f"store-{kind}-{name}"}
    done = bench.work / f"store-{kind}-{name}" / ".done"
    if not done.exists():
        config = bench.config(kind, f"encode-{name}", dataset=dataset)
        update = {"encode": config.encode.model_copy(update={"figures": str(figures)})}
        assert encode.main(config.model_copy(update=update)) == 0
        done.touch()
    return dataset


def _figures(bench: Bench, name: str, change: Callable[[Path, list[str]], None]) -> Path:
    """A folder of figures that `change` makes one of `name`, from its names without endings."""
    folder, building = bench.work / f"figures-{name}", bench.work / f".figures-{name}"
    if not folder.exists():
        shutil.rmtree(building, ignore_errors=True)
        draw_figures(building, bench.stored, bench.side)
        change(building, sorted(path.stem for path in building.glob("*.png")))
        building.rename(folder)
    return folder


def edits(bench: Bench, kind: str, **changes: Any) -> dict[str, Any]:
    """Each figure is an edit of the next one: as many tokens of the reference as of the result."""

    def with_sources(folder: Path, names: list[str]) -> None:
        for name, other in zip(names, names[1:] + names[:1], strict=True):
            shutil.copy(folder / f"{other}.png", folder / f"{name}.source.png")

    return training(bench, kind, "edit", dataset=_store(bench, kind, "edit", _figures(bench, "edit", with_sources)), **changes)


def preferences(bench: Bench, kind: str, name: str, **changes: Any) -> dict[str, Any]:
    """DPO on pairs: a sample is a winner and a loser of one caption, so two pictures of each policy a step."""

    def in_pairs(folder: Path, names: list[str]) -> None:
        for winner, loser in zip(names[::2], names[1::2], strict=True):
            shutil.copy(folder / f"{winner}.txt", folder / f"{loser}.txt")

    figures = _figures(bench, "dpo", in_pairs)
    dataset = _store(bench, kind, "dpo", figures)
    groups = bench.work / dataset["parquet_base_path"] / GROUPS_FILE
    if not groups.exists():
        names = sorted(path.name for path in figures.glob("*.png"))
        captions = [(figures / winner).with_suffix(".txt").read_text() for winner in names[::2]]
        rows = {"group_id": names[::2], "caption": captions, "winner": names[::2], "loser": names[1::2]}
        pq.write_table(pa.table(rows), groups)
    changes |= {"train_iteration_func_name": "dpo", "dataset": {**dataset, "type": "PreferenceGroups"}}
    return training(bench, kind, name, **changes)


def rewards(bench: Bench, kind: str) -> dict[str, Any]:
    """A round for each step: a group drawn in few steps without guidance, scored in processes beside, learned from."""
    side = bench.side if bench.side in (128, 256, 512) else 512
    reward = {"group_size": 2 if bench.rehearse else 4, "draw_steps": 2 if bench.rehearse else 8, "draw_guidance": 1.0}
    return training(
        bench, kind, "reward", train_iteration_func_name="reward", max_train_steps=bench.steps(6), logging_steps=1,
        dataset={"type": "FigureDataset", "figures": f"drawn:24:size={side}", "resolution": side},
        reward={**reward, "processes": 0 if bench.rehearse else 4, "watch": {}},
    )  # fmt: skip


def routed(bench: Bench) -> dict[str, Any]:
    """Half of the tokens go past all blocks but the outer ones; of a rehearsal's three past one."""
    return {"share": 0.5, **({"first_block": 1, "last_block": 1} if bench.rehearse else {})}
