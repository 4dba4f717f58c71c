"""Illustrate, Bench and editable figures in a real Chromium, by clicking alone, with a scripted judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripted_server import says
from test_in_browser import CHROMIUM, page_of, serving, shot, tab, until
from test_results import EVIL, illustration

pytestmark = pytest.mark.slow
api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
OVER = "document.querySelector('p > .badge.done, p > .badge.failed, p > .badge.stopped') !== null"


def test_a_paper_is_illustrated_and_a_bench_judged_and_a_picture_made_editable_by_clicking(tmp_path: Path, serve: Any) -> None:
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    for module in ("cv2", "resvg_py", "pptx"):
        pytest.importorskip(module, reason="needs the extra vectorize")
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "main.tex").write_text(
        "\\documentclass{article}\\begin{document}\\begin{figure}\\includegraphics{x}"
        "\\caption{A yellow ellipse labelled 'S'.}\\label{fig:a}\\end{figure}\\end{document}"
    )
    illustration(tmp_path / "evil", EVIL)
    rubric = {"components": [{"name": "S"}], "arrows": [], "text_labels": []}
    for name, value in {
        "prompts": {"validation_prompts": ["A yellow ellipse labelled 'S'."] * 2, "resolution_list": [[128, 128]] * 2},
        "rubrics": {"entries": [{"index": at, "stage1_abstraction": rubric} for at in range(2)]},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "simple.json").write_text(json.dumps(value))
    with api.sync_playwright() as playwright, serving(tmp_path) as address:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        with page_of(browser, address) as page:
            _illustrate(page)
            _bench(page, serve(says({"components": [], "arrows": [], "text": []})).url)
            _editable(page)
        for dark in (False, True):
            with page_of(browser, address, 390, dark) as page:
                for name in ("Illustrate", "Bench"):
                    tab(page, name)
                    page.wait_for_selector(f"h1:text-is('{name}')")
                    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0, name
        browser.close()


def _illustrate(page: Any) -> None:
    tab(page, "Illustrate")
    page.get_by_role("link", name="evil").click()
    page.wait_for_selector(f"p:text-is('{EVIL}')")  # as text: an alert would be an error of the policy
    tab(page, "Illustrate")
    page.wait_for_selector("#source")
    page.fill("#source", "paper")
    page.fill("#candidates", "1")
    page.fill("#pictures", "2")
    page.locator("summary", has_text="How is drawn").click()
    page.fill("#steps", "2")
    page.get_by_role("button", name="Illustrate", exact=True).click()
    page.wait_for_selector("h1:text-is('illustrations/paper-1')")
    until(page, OVER, 900)
    assert page.locator(".badge.done").count() >= 1
    until(page, "[...document.querySelectorAll('.draws img')].filter(image => image.naturalWidth === 128).length === 2")
    assert page.locator("figure.best").count() == 1
    page.wait_for_selector("[data-candidate] p:has-text('A yellow ellipse')")
    page.locator("summary", has_text="The same in a shell").click()
    assert page.locator("pre").inner_text().startswith("scienceflow illustrate ")
    shot(page, "illustrate")


def _bench(page: Any, judge: str) -> None:
    tab(page, "Bench")
    page.wait_for_selector("#prompts")
    for name in ("prompts", "rubrics"):
        page.fill(f"#{name}", name)
    for summary in ("Who judges, and how", "How is drawn"):
        page.locator("summary", has_text=summary).click()
    page.fill("#judge", judge)
    page.fill("#judge_model", "eye")
    page.fill("#steps", "2")
    page.get_by_role("button", name="Start", exact=True).click()
    page.wait_for_selector("h1:text-is('benches/recipe-tiny-prompts-1')")
    until(page, OVER, 900)
    page.wait_for_selector("td:text-is('100.0 (15.8 to 100.0)') >> nth=0")
    shot(page, "bench")
    with page.expect_download() as download:
        page.get_by_role("link", name="Save bench.html").click()
    assert "<html" in Path(download.value.path()).read_text()[:300]


def _editable(page: Any) -> None:
    tab(page, "Playground")
    page.wait_for_selector("#prompt")
    page.fill("#prompt", "A yellow ellipse labelled 'S'.")
    page.fill("#seeds", "3")
    page.fill("#steps", "2")
    page.get_by_role("button", name="Draw").click()
    until(page, "document.querySelectorAll('.draws img').length === 1", 900)
    page.locator(".draws button.picture").click()
    page.get_by_role("button", name="Editable: SVG, TikZ, PPTX").click()
    page.wait_for_selector("dialog p:has-text('of the ink')")
    shot(page, "editable")
    with page.expect_download() as download:
        page.get_by_role("link", name="SVG", exact=True).click()
    assert "<svg" in Path(download.value.path()).read_text()
