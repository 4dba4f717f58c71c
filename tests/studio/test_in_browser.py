"""The studio in a real Chromium: the whole way by clicking alone, by keyboard, at two widths, in the dark, with many figures."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from OpenSciDraw.drawn.figure import write_folder

pytestmark = pytest.mark.slow
api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
SHOTS = os.environ.get("STUDIO_SCREENSHOTS")  # a folder: pictures of the pages go there, for the docs
MANY = 100_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--enable-precise-memory-info"])
        yield opened
        opened.close()


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a studio of `folder`, as the command prints it."""
    process = subprocess.Popen([sys.executable, "-m", "OpenSciDraw.cli", "studio", str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield next(match[0] for line in process.stdout if (match := re.search(r"http://\S+", line)))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


@contextmanager
def page_of(browser: Any, address: str, width: int = 1280, dark: bool = False) -> Iterator[Any]:
    """A page on which nothing may go wrong unseen: an error of a script, or of the policy against scripts, fails the test."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.goto(address)
    page.wait_for_selector("main h1")
    yield page
    context.close()
    assert not wrong


def shot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"studio_{name}.png"))


def until(page: Any, expression: str, seconds: float = 60) -> None:
    """Wait until it is true. (playwright's own wait_for_function is refused by the page's policy against scripts.)"""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(100)


def tab(page: Any, name: str) -> None:
    page.locator("#tabs a", has_text=name).click()
    page.wait_for_selector("main h1")


def test_from_a_folder_of_figures_to_a_lora_and_its_picture_by_clicking_alone(browser: Any, tmp_path: Path) -> None:
    write_folder(tmp_path / "figures", 24, 0, 128, "house")
    with serving(tmp_path) as address, page_of(browser, address) as page:
        page.get_by_role("link", name="figures", exact=True).click()
        page.wait_for_selector(".cell[data-row]", timeout=120_000)
        until(page, "[...document.querySelectorAll('.cell img')].every(image => image.complete && image.naturalWidth)")
        shot(page, "data")
        page.get_by_role("link", name="Train on it").click()
        page.fill("#name", "first")
        page.keyboard.press("Tab")
        changes = {"max_train_steps": 8, "train_batch_size": 4, "validation_steps": 4, "checkpointing_steps": 4, "rank": "four"}
        page.wait_for_selector("#key-rank")
        for key, value in changes.items():
            page.fill(f"#key-{key}", str(value))
        page.fill("#key-validation_prompts", repr(["A yellow ellipse labelled 'S'."]))
        until(page, "document.querySelector('#problems').textContent.includes('rank')")
        assert "expected int >= 1" in page.locator("#problems").inner_text()  # the command line's own words
        page.fill("#key-rank", "4")
        until(page, "document.querySelector('#problems').textContent.includes('the rate would never be reached')")
        for key, value in {"lr_warmup_steps": 2, "logging_steps": 1}.items():
            page.fill("#search", key)
            page.fill(f"#key-{key}", str(value))
        until(page, "!document.querySelector('#problems').textContent")
        page.get_by_role("button", name="Plan").click()
        page.wait_for_selector("text=Memory while training", timeout=180_000)
        page.fill("#search", "")
        shot(page, "new_run")
        page.get_by_role("button", name="Start").click()
        page.wait_for_selector("h1:text-is('Queue')")
        until(page, "document.querySelectorAll('.badge.done').length === 2", 600)
        shot(page, "queue")
        tab(page, "Runs")
        page.wait_for_selector(".badge.finished")
        page.get_by_role("link", name="first").click()
        page.wait_for_selector(".chart polyline")
        page.wait_for_selector("#pictures img")
        page.locator("#step").press("ArrowLeft")
        assert page.locator("#pictures output").inner_text() == "step 4"
        shot(page, "run")
        page.get_by_role("link", name="Draw with it").click()
        page.fill("#prompt", "A yellow ellipse labelled 'S'.")
        page.fill("#seeds", "3, 4")
        page.fill("#strengths", "0, 1")
        page.fill("#steps", "8")
        page.get_by_role("button", name="Draw").click()
        until(page, "document.querySelectorAll('.draws img').length === 4", 300)
        page.wait_for_selector("text=8 steps, guidance 3")
        shot(page, "playground")
        page.locator(".draws button.picture").last.click()
        page.get_by_role("button", name="Show the structure that is read").click()
        page.wait_for_selector(".overlay svg", timeout=120_000)
        shot(page, "structure")
        page.keyboard.press("Escape")
        assert page.locator("dialog[open]").count() == 0
        with page.expect_download() as download:
            page.get_by_role("link", name="Download").first.click()
        assert Image.open(download.value.path()).size == (128, 128)
    assert (tmp_path / "runs" / "first" / "pytorch_lora_weights.safetensors").is_file()
