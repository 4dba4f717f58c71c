"""The sections of a report: curves, pictures, scores, settings, where values came from, files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from OpenSciDraw.reporting.charts import Line, chart, short, smoothed
from OpenSciDraw.reporting.page import (
    Html,
    Pictures,
    code,
    image_attributes,
    picture,
    picture_button,
    side_by_side,
    table,
)
from OpenSciDraw.reporting.run_data import RunData, finite


def curves(run: RunData) -> str:
    loss = run.series("train_loss") or run.series("loss")
    bins, sigmas = run.keys("held_out_loss_q"), sorted(run.keys("loss_sigma_"))[::2]
    made = [
        chart("Training loss", [Line("as logged", loss, faint=True), Line("smoothed", smoothed(loss))], "loss", log=True),
        chart("Held-out loss", [Line("held out", run.series("held_out_loss"))], "loss"),
        chart(
            "Held-out loss by noise level (quantile of σ)",
            [Line(f"q {key.removeprefix('held_out_loss_q')}", run.series(key)) for key in bins], "loss", log=True,
        ),
        chart(
            "Training loss by noise level σ, every second bin",
            [Line(f"σ {key.removeprefix('loss_sigma_')}", smoothed(run.series(key), 0.1)) for key in sigmas],
            "loss", log=True,
        ),
    ]  # fmt: skip
    made += [chart(key, [Line(key, run.series(key))], key) for key in run.keys("") if key in ("psnr", "unseen_loss")]
    scored = [key for key in run.keys("") if "/" in key]
    for metric in dict.fromkeys(key.split("/")[0] for key in scored):
        lines = [Line(key.split("/", 1)[1], run.series(key)) for key in scored if key.startswith(f"{metric}/")]
        made.append(chart(f"{metric.capitalize()} of validation pictures", lines, "score"))
    return _charts(made)


def rewards(run: RunData) -> str:
    """Of training on rewards: what is rewarded, what is scored beside it, how far the policy has moved."""
    section = run.config.get("reward")
    weights = section.get("metrics") if isinstance(section, dict) else None
    known = {key.removeprefix("reward_"): run.series(key) for key in run.keys("reward_")}
    if not known:
        return ""
    rewarded = [name for name, weight in weights.items() if weight] if isinstance(weights, dict) else []
    moved = {"distance_to_start": "from the start", "distance_to_old": "from the policy that draws"}
    beside = [name for name in known if "." in name and name not in rewarded]

    def lines(names: Sequence[str]) -> list[Line]:
        return [Line(name, smoothed(known[name], 0.15)) for name in names if name in known]

    return _charts([
        chart("Rewards of the pictures drawn, smoothed", lines(rewarded), "score"),
        chart("Scores that are not rewarded, of the same pictures, smoothed", lines(beside), "score"),
        chart("Share of prompts whose pictures differ in score", lines(["groups_that_differ"]), "share"),
        chart("Distance of the velocity, squared", [Line(said, known[name]) for name, said in moved.items() if name in known],
              "mean square"),
    ])  # fmt: skip


def preferences(run: RunData) -> str:
    """Curves of training on preferences, by axis; "" for a run of another objective."""

    def by_axis(what: str) -> list[Line]:
        start = f"preference_{what}_"
        return [Line(key.removeprefix(start), run.series(key)) for key in run.keys(start)]

    winner = Line("winner", run.series("preference_winner_change"))
    return _charts([
        chart("Preferences: share of groups on the right side", by_axis("accuracy"), "accuracy"),
        chart("Preferences: margin before the cap", by_axis("margin"), "loss"),
        chart("Loss less the reference's: winner, and losers by axis", [winner, *by_axis("loser_change")], "loss"),
        chart("Preferences: the comparison alone", [Line("as logged", run.series("preference_loss"))], "loss"),
    ])  # fmt: skip


def pace(run: RunData) -> str:
    return _charts([
        chart("Learning rate", [Line("rate", run.series("lr"))], "rate"),
        chart("Gradient norm", [Line("norm before clipping", run.series("grad_norm"))], "L2 norm", log=True),
        chart("Throughput", [Line("images a second", run.series("images_per_second"))], "images / s"),
        chart("Waiting for data", [Line("share of the time", run.series("data_wait_share"))], "share"),
        chart("Peak memory", [Line("peak", run.series("memory_gb"))], "GB"),
    ])  # fmt: skip


def _charts(made: Sequence[str]) -> str:
    inner = "".join(item for item in made if item)
    return f'<div class="charts">{inner}</div>' if inner else ""


def samples(run: RunData, pictures: Pictures) -> str:
    """Pictures of the validation prompts, step by step."""
    steps = sorted(run.pictures)
    if not steps:
        return ""
    prompts = run.prompts
    halves = [2**k for k in range(len(steps).bit_length(), -1, -1)]  # what there is room for is spread over the steps
    order = [steps[-1], *(step for stride in halves for step in steps[::stride])]
    shown: dict[int, str] = {}
    for step in dict.fromkeys(order):
        if pictures.left < 0 and len(shown) >= 2:
            break
        cells, pairs = [], []
        for file in run.pictures[step]:
            number = int(file.stem) if file.stem.isdecimal() else None
            prompt = prompts[number] if number is not None and number < len(prompts) else file.stem
            button = picture(pictures, file, f"Step {step}: {prompt}")
            other = run.on_other.get(file)
            if other is not None:
                base, second = (str(run.config.get(key)) for key in ("pretrained_model_name_or_path", "validation_model"))
                pair = picture(pictures, other, f"Step {step}, on {second}: {prompt}")
                pairs.append((prompt, [(f"on {base}", button), (f"on {second}", pair)]))
                continue
            said = f'<figcaption title="{escape(prompt, quote=True)}">{escape(prompt)}</figcaption>'
            cells.append(f"<figure>{button}{said}</figure>")
        inner = f'<div class="pictures">{"".join(cells)}</div>' * bool(cells) + (side_by_side(pairs) if pairs else "")
        shown[step] = f'<div data-step="{step}"><h3>Step {step}</h3>{inner}</div>'
    left_out = len(steps) - len(shown)
    note = f'<p class="lead">{left_out} steps in between are left out, to keep the page small.</p>' if left_out else ""
    return f'{note}<div data-series>{"".join(shown[step] for step in sorted(shown))}</div>'


def scores(run: RunData) -> str:
    return "".join(_evaluation(name, found) for name, found in run.evaluations)


def _evaluation(name: str, found: dict[str, Any]) -> str:
    compared = found.get("comparison") if isinstance(found.get("comparison"), dict) else None
    other = (compared or {}).get("metrics") or {}
    rows = []
    for key, item in found["metrics"].items():
        if not isinstance(item, dict):
            continue
        row = [code(str(key)), _number(item.get("value")), _interval(item), _bar(item)]
        row += [item.get("examples", ""), item.get("failures", "")]
        rows.append(row + ([_difference(other.get(key))] if other else []))
    head = ["metric", "value", "95 % interval", "", "examples", "failures"]
    if other:
        head.append(f"against {(compared or {}).get('other', 'the other')}")
    return f"<h3>{escape(name)}</h3>" + table(head, rows, _about(found), (1, 2, 4, 5)) + _failures(found.get("failures"))


def _about(found: dict[str, Any]) -> str:
    """What was evaluated, in a line."""
    asked = found["settings"] if isinstance(found.get("settings"), dict) else {}
    about = [str(found[key]) for key in ("figures", "weights") if found.get(key)]
    about += [f"step {found['step']}"] if found.get("step") is not None else []
    about += [f"{asked['steps']} sampling steps"] if asked.get("steps") else []
    about += [f"guidance {asked['guidance']}"] if asked.get("guidance") is not None else []
    about += [f"{short(found['seconds_per_picture'])} s a picture"] if finite(found.get("seconds_per_picture")) else []
    absent = found["not_applicable"] if isinstance(found.get("not_applicable"), dict) else {}
    about += [f"{name} does not apply to {count} examples" for name, count in absent.items() if count]
    return ", ".join(about)


def _failures(failures: Any, most: int = 50) -> str:
    """Pictures that counted as wrong because they were missing or could not be scored."""
    found = [item for item in failures if isinstance(item, dict)] if isinstance(failures, list) else []
    if not found:
        return ""
    rows = [[item.get(key, "") for key in ("id", "metric", "reason")] for item in found[:most]]
    return f"<details><summary>Failures: {len(found)}</summary>{table(('picture', 'metric', 'reason'), rows)}</details>"


def _number(value: Any) -> str:
    return f"{value:.3f}" if finite(value) else "–"


def _interval(item: dict[str, Any]) -> str:
    return f"{item['low']:.3f} to {item['high']:.3f}" if finite(item.get("low")) and finite(item.get("high")) else "–"


def _bar(item: dict[str, Any]) -> str:
    """A score between 0 and 1 with its interval as a picture."""
    if not all(finite(item.get(key)) for key in ("value", "low", "high")) or not item.get("higher_is_better", True):
        return ""
    value, low, high = (float(item[key]) for key in ("value", "low", "high"))
    if not 0 <= low <= high <= 1:
        return ""
    return Html(
        f'<span class="bar" aria-hidden="true"><i style="left:{100 * low:.1f}%;width:{max(1.0, 100 * (high - low)):.1f}%"></i>'
        f'<b style="left:{100 * value:.1f}%"></b></span>'
    )


def _difference(item: Any) -> str:
    if not isinstance(item, dict) or not finite(item.get("difference")):
        return "–"
    ends = f" ({item['low']:+.3f} to {item['high']:+.3f})" if finite(item.get("low")) and finite(item.get("high")) else ""
    chance = f", p = {short(float(format(item['p'], '.2g')))}" if finite(item.get("p")) else ""
    said = {"this": ("better", "better"), "other": ("worse", "worse")}.get(str(item.get("better")), ("", "unclear"))
    return Html(f'<span class="keep">{item["difference"]:+.3f}{ends}{chance} <span class="{said[0]}">{said[1]}</span></span>')


def before_after(run: RunData, pictures: Pictures, most: int = 8) -> str:
    """Pictures of the same ids from the first and the last evaluation, with the figure asked for where it can be drawn."""
    folders = [run.folder / "evaluations" / name / "pictures" for name, _ in run.evaluations]
    folders = [folder for folder in folders if folder.is_dir()]
    if len(folders) < 2:
        return ""
    first, last = folders[0], folders[-1]
    names = sorted({f.name for f in first.glob("*.png")} & {f.name for f in last.glob("*.png")})[:most]
    asked = _references(run.evaluations[-1][1].get("figures"), names)
    rows = []
    for name in names:
        reference, prompt = asked.get(name, ("", name))
        named = [(f.parent.name, picture(pictures, f / name, f"{f.parent.name}: {prompt}")) for f in (first, last)]
        rows.append((prompt, ([("reference", reference)] if reference else []) + named))
    return side_by_side(rows) if rows else ""


def _references(spec: Any, names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Picture name -> (reference as HTML, prompt), for figures that the program draws itself."""
    if not isinstance(spec, str) or not spec.startswith("drawn:"):
        return {}
    from OpenSciDraw.errors import UserError
    from OpenSciDraw.figures.listing import DrawnRef, list_figures

    try:
        refs = list_figures(spec, max_figures=512)[0]
    except UserError:
        return {}
    found = {}
    for ref in refs:
        if f"{ref.id}.png" in names and isinstance(ref, DrawnRef):
            found[f"{ref.id}.png"] = (picture_button(image_attributes(ref.draw().image), f"Reference: {ref.caption}"), ref.caption)
    return found


def settings(run: RunData, defaults: dict[str, Any]) -> str:
    """Keys that differ from their defaults, where they were set, and all keys behind a click."""
    places = run.sessions[-1].get("set_at") if run.sessions else None
    places = places if isinstance(places, dict) else {}

    def row(key: str, value: Any, unset: str = "default") -> list[str]:
        text, name = repr(value), escape(key).replace("_", "_<wbr>").replace(".", ".<wbr>")
        cells = [Html(f"<code>{name}</code>"), code(text if len(text) <= 400 else text[:400] + " …")]
        return [*cells, *([str(places.get(key, unset))] if places else [])]

    flat = flatten(run.config)
    head = ("key", "value", "set at") if places else ("key", "value")
    follows = "follows from other keys"
    changed = [row(key, value, follows) for key, value in flat.items() if key not in defaults or defaults[key] != value]
    every = table(head, [row(key, value) for key, value in flat.items()], kind="pairs")
    few = table(head, changed, "Keys that differ from their defaults", kind="pairs")
    return f"{few}<details><summary>All keys</summary>{every}</details>"


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def provenance(run: RunData) -> str:
    """Sessions of training: versions, device, contract."""
    made = []
    for at, session in enumerate(run.sessions, 1):
        flat = flatten({key: value for key, value in session.items() if key != "set_at"})
        rows = [[key, code(json.dumps(value, ensure_ascii=False))] for key, value in flat.items()]
        shown = " open" if at == len(run.sessions) else ""
        inner = table(("what", "value"), rows, kind="pairs")
        made.append(f"<details{shown}><summary>Session {at}: {escape(str(session.get('started', '')))}</summary>{inner}</details>")
    return "".join(made)


def exports(run: RunData) -> str:
    rows = [[code(name), f"{size / 1e6:.2f} MB"] for name, size in run.exports]
    return table(("file", "size"), rows, numbers=(1,)) if rows else ""
