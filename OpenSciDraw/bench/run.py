"""`scienceflow bench PROMPTS RUBRICS --from WHAT`: a benchmark drawn, judged, and set out by difficulty and axis.

In the folder (`--out`, or benches/ in the run) lies an evaluation of the benchmark's prompts, and

    bench.jsonl   the prompts with sizes, rubrics and references, as `evaluate --figures` reads them
    bench.json    the table, and with what it was made
    bench.html    the same to look at, with pictures and what the judge found

A command that was killed goes on where it stopped: what is drawn is kept, and so is every answer of the judge.
"""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from OpenSciDraw.bench.files import Bench, read_bench
from OpenSciDraw.bench.page import PAGE, page_of
from OpenSciDraw.bench.tables import heading, rows_of, text_table
from OpenSciDraw.config import EvaluateConfig
from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.evaluator import DRAWN, SUMMARY, Evaluator
from OpenSciDraw.evaluation.results import FILE as RESULTS
from OpenSciDraw.evaluation.run import Target, default_folder, evaluate, find_target, settings_of
from OpenSciDraw.evaluation.summary import Measured
from OpenSciDraw.utils.files import json_objects, make_folder, write_json, write_text

LIST, TABLE = "bench.jsonl", "bench.json"
PROTOCOLS = {"ours": ("judge",), "published": ("judge_published",), "both": ("judge", "judge_published")}
_OPTIONS = ("steps", "guidance", "seed", "batch_size", "reader", "judge_model")


@dataclass(frozen=True)
class BenchSettings:
    """What is asked for. `limit`: the first prompts of each difficulty; `text`: the words in the picture are read as well."""

    prompts: str
    rubrics: str
    references: str | None = None
    protocol: str = "ours"
    limit: int | None = None
    text: bool = False

    def metrics(self, judge_url: str | None) -> list[str]:
        """What scores the pictures; without a judge the words in quotation marks are looked for in them.

        Raises:
            UserError: the published protocol without a judge.
        """
        if judge_url is None and self.protocol != "ours":
            raise UserError(f"--protocol {self.protocol} needs a judge: --judge URL --judge_model NAME.")
        judges = PROTOCOLS[self.protocol] if judge_url is not None else ()
        return [*judges, *(["text"] if self.text or not judges else [])]


def run_bench(
    settings: BenchSettings, target: Target, measuring: EvaluateConfig, out: Path | None = None
) -> tuple[Path, dict[str, Any]]:
    """Draw, judge and set out the table; its folder, and what bench.json holds.

    `measuring`: how is drawn and judged; its `figures`, `metrics` and `limit` are not looked at.

    Raises:
        UserError: see `read_bench` and `evaluate`.
    """
    metrics = settings.metrics(measuring.judge_url)
    needed = settings.references if "judge_published" in metrics else None
    if "judge_published" in metrics and settings.references is None:
        raise UserError("The published protocol compares with the papers' figures: give their folder with --references DIR.")
    place = None if needed is None else Path(needed).expanduser().absolute()
    paths = [Path(text).expanduser() for text in (settings.prompts, settings.rubrics)]
    bench = read_bench(paths[0], paths[1], place, settings.limit)
    folder = out if out is not None else _folder(target, measuring, paths[0])
    make_folder(folder)
    file = folder / LIST
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bench.rows))
    asked = measuring.model_copy(update={"figures": str(file), "metrics": metrics, "limit": None})
    evaluator, measured, summary = evaluate(target, asked, folder)
    table = _table(settings, bench, evaluator, measured, summary)
    write_json(folder / TABLE, table)
    write_text(folder / PAGE, page_of(bench, evaluator, table))
    return folder, table


def _folder(target: Target, measuring: EvaluateConfig, prompts: Path) -> Path:
    """`RUN/benches/<weights>_<name of the prompts>`."""
    trained = None
    if target.kind == "run":
        from OpenSciDraw.inference.export import find_trained

        trained = find_trained(str(target.path), target.ema)
    place = default_folder(target, trained, measuring.model_copy(update={"figures": str(prompts)}))
    return place.parents[1] / "benches" / place.name


def _table(
    settings: BenchSettings, bench: Bench, evaluator: Evaluator, measured: list[Measured], summary: dict[str, Any]
) -> dict[str, Any]:
    judges = {
        item.name: {**item.metric.identity(), "rows": rows_of(item, bench, evaluator.results, evaluator.settings.seed)}
        for item in measured
    }
    if "judge_published" in judges:
        from OpenSciDraw.evaluation.published import PublishedJudge

        metric = evaluator.metrics["judge_published"]
        assert isinstance(metric, PublishedJudge)
        judges["judge_published"]["wording"] = metric.instructions.wording
    kept = ("name", "created", "run", "weights", "step", "what", "settings", "versions", "seconds_per_picture", "failures")
    return {**{key: summary[key] for key in kept}, "bench": asdict(settings), "remarks": bench.remarks, "scores": judges}


def progress(folder: Path) -> dict[str, int]:
    """How far a bench in its folder has come, also while another process works on it: `pictures`, `drawn`, `measured`."""

    def lines(name: str) -> list[dict[str, Any]]:
        file = folder / name
        return json_objects(file.read_bytes())[0] if file.is_file() else []

    pictures = {row.get("id") for row in lines(LIST)}
    drawn = {row.get("id") for row in lines(DRAWN)} & pictures
    measured = {(row.get("metric"), row.get("id")) for row in lines(RESULTS) if row.get("id") in pictures}
    return {"pictures": len(pictures), "drawn": len(drawn), "measured": len(measured)}


# -- the command ---------------------------------------------------------------------------------
def main(arguments: Namespace) -> int:
    """Print the table of each protocol, and where the rest lies."""
    target = replace(find_target(arguments.what, arguments.cfg_options, arguments.ema), base=arguments.base)
    if target.base is not None and target.kind != "run":
        raise UserError(f"--base is for a run's adapter, and {target.given} is no run.")
    asked = ("prompts", "rubrics", "references", "protocol", "limit")
    settings = BenchSettings(**{name: getattr(arguments, name) for name in asked}, text=arguments.reader is not None)
    measuring = settings_of(target.config, _given(arguments), arguments.cfg_options)
    _refuse_unused(arguments, measuring)
    out = Path(arguments.out).expanduser().absolute() if arguments.out else None
    folder, table = run_bench(settings, target, measuring, out)
    for remark in table["remarks"]:
        print(remark)
    for name, found in table["scores"].items():
        print(f"\n{heading(name, found)}\n{text_table(found['rows'])}")
    reasons = [f"  {item['id']}: {item['reason']}" for item in table["failures"][:10]]
    if reasons:
        print("\n".join([f"\n{len(table['failures'])} failures, counted as wrong; a second run asks for them again:", *reasons]))
    print(f"\n{folder / TABLE}\n{folder / PAGE}  (numbers beside those in {SUMMARY})")
    return 0


def _given(arguments: Namespace) -> dict[str, Any]:
    given = {name: value for name in _OPTIONS if (value := getattr(arguments, name)) is not None}
    given |= {"judge_url": arguments.judge} if arguments.judge is not None else {}
    given |= {"judge_instructions": arguments.instructions} if arguments.instructions is not None else {}
    return given | ({"judge_rounds": arguments.rounds} if arguments.rounds is not None else {})


def _refuse_unused(arguments: Namespace, measuring: EvaluateConfig) -> None:
    """Options of the published protocol say nothing in ours."""
    if arguments.protocol == "ours" or measuring.judge_url is None:
        named = {"--references": arguments.references, "--instructions": arguments.instructions, "--rounds": arguments.rounds}
        unused = [name for name, value in named.items() if value is not None]
        if unused:
            raise UserError(f"{', '.join(unused)}: for the published protocol alone. Add --protocol published, or leave it out.")
