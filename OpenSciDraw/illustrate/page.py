"""The page of an illustration, in the look of the report: what was asked for, and pictures with score, seed and findings."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from OpenSciDraw.reporting import page

PAGE = "illustrate.html"
_MOST_CONTEXT = 1500  # characters of a subject's context


def page_of(folder: Path, summary: Mapping[str, Any]) -> str:
    """The whole page as HTML; `folder` holds the pictures, `summary` is what illustrate.json holds."""
    settings = summary["settings"]
    facts = page.facts([
        ("model", settings.get("model")), ("sampling steps", settings.get("steps")), ("guidance", settings.get("guidance")),
        ("descriptions by", settings.get("writer_model") or "the source itself"), ("pictures of each", settings["pictures"]),
        ("rounds of refining", settings["refine"]),
    ])  # fmt: skip
    lead = f'<p class="lead">{escape(summary["what"])} on {escape(summary["source"])}</p>{facts}{page.remarks(summary["remarks"])}'
    pictures = page.Pictures()
    sections = [(_heading(subject), _subject(subject, folder, pictures)) for subject in summary["subjects"]]
    return page.document("Illustrations", lead, sections, "scienceflow illustrate")


def _heading(subject: Mapping[str, Any]) -> str:
    text = subject["caption"] or subject["context"]
    return f"{subject['id']}: {text if len(text) <= 70 else text[:67] + '…'}"


def _subject(subject: Mapping[str, Any], folder: Path, pictures: page.Pictures) -> str:
    asked = "".join(f"<p>{escape(text[:_MOST_CONTEXT])}</p>" for text in (subject["caption"], subject["context"]) if text)
    shown = [candidate for candidate in subject["candidates"] if pictures.left > 0 or candidate["kept"]]
    cards = [(_about(candidate), [_picture(found, folder, pictures) for found in candidate["pictures"]]) for candidate in shown]
    return f"<details><summary>What was asked for</summary>{asked}</details>{page.side_by_side(cards)}"


def _about(candidate: Mapping[str, Any]) -> str:
    score = "not scored" if candidate["score"] is None else f"score {candidate['score']:.2f}"
    kept = ", kept" if candidate["kept"] else ""
    what = f"Description: {candidate['by']}"
    if candidate["instruction"] is not None:
        what = f"Edit of {candidate['edited']}: {candidate['instruction']}"
    elif candidate["round"]:
        what += f", round {candidate['round']}"
    found = candidate["pictures"][0]["findings"]
    errors = f" Found in the best one: {'; '.join(found[:6])}." if found else ""
    return f"{candidate['id']} ({score}{kept}). {what}. {candidate['text']}{errors}"


def _picture(found: Mapping[str, Any], folder: Path, pictures: page.Pictures) -> tuple[str, str]:
    score = "–" if found["score"] is None else f"{found['score']:.2f}"
    name = f"{score}, seed {found['seed']}"
    return name, page.picture(pictures, folder / found["file"], f"{found['id']}: {found['prompt'][:300]}")
