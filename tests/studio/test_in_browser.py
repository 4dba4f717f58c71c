"""The studio in a real Chromium: the whole way by clicking alone, by keyboard, at two widths, in the dark, with many figures."""

from __future__ import annotations

import json
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

import psutil
import pytest
from PIL import Image

from OpenSciDraw.drawn.folders import write_drawn_figures

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
    size, scheme = {"width": width, "height": 900}, "dark" if dark else "light"
    context = browser.new_context(accept_downloads=True, viewport=size, color_scheme=scheme)
    page, wrong = context.new_page(), []
    page.set_default_timeout(120_000)  # machines of tests are shared
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


def until(page: Any, expression: str, seconds: float = 120) -> None:
    """Wait until it is true. (playwright's own wait_for_function is refused by the page's policy against scripts.)"""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(100)


def tab(page: Any, name: str) -> None:
    page.locator("#tabs a", has_text=name).click()
    page.wait_for_selector("main h1")


def test_from_a_folder_of_figures_to_a_lora_and_its_picture_by_clicking_alone(browser: Any, tmp_path: Path) -> None:
    write_drawn_figures(tmp_path / "figures", 24, 0, 128, "house")
    with serving(tmp_path) as address, page_of(browser, address) as page:
        page.get_by_role("link", name="figures", exact=True).click()
        page.wait_for_selector(".cell[data-row]", timeout=600_000)
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
        page.wait_for_selector("text=Memory while training", timeout=900_000)
        page.fill("#search", "")
        shot(page, "new_run")
        page.get_by_role("button", name="Start").click()
        page.wait_for_selector("h1:text-is('Queue')")
        until(page, "document.querySelectorAll('.badge.done').length === 2", 1800)
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
        until(page, "document.querySelectorAll('.draws img').length === 4", 900)
        page.wait_for_selector("text=8 steps, guidance 3")
        shot(page, "playground")
        page.locator(".draws button.picture").last.click()
        page.get_by_role("button", name="Show the structure that is read").click()
        page.wait_for_selector(".overlay svg", timeout=600_000)
        shot(page, "structure")
        page.keyboard.press("Escape")
        assert page.locator("dialog[open]").count() == 0
        with page.expect_download() as download:
            page.get_by_role("link", name="Download").first.click()
        assert Image.open(download.value.path()).size == (128, 128)
    assert (tmp_path / "runs" / "first" / "pytorch_lora_weights.safetensors").is_file()


def timed(name: str, seconds: float) -> float:
    """Also said on the terminal (`pytest -s`), for the docs."""
    print(f"\n{name}: {seconds:.2f} s")
    return seconds


def memory_of_the_page() -> float:
    """MB that belong to the largest page alone (USS), of all Chromiums that this process started."""
    pages = [child for child in psutil.Process().children(recursive=True) if "--type=renderer" in " ".join(child.cmdline())]
    return max(page.memory_full_info().uss for page in pages) / 1e6


def test_a_hundred_thousand_figures_scroll_and_filter(browser: Any, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(10):
        Image.new("RGB", (128, 96), (number * 25, 90, 160)).save(folder / f"{number}.png")
    with (folder / "metadata.jsonl").open("w") as file:
        for number in range(MANY):
            kind = ("diagram", "plot")[number % 2]
            file.write(json.dumps({"image": f"{number % 10}.png", "caption": f"figure {number} of many", "kind": kind}) + "\n")
    with serving(tmp_path) as address, page_of(browser, address) as page:
        page.get_by_role("link", name="many", exact=True).click()
        start = time.monotonic()
        page.wait_for_selector(".cell[data-row]", timeout=900_000)
        timed("listed for the first time", time.monotonic() - start)
        page.get_by_role("link", name="All sources").click()
        page.wait_for_selector("h1:text-is('Data')")
        start = time.monotonic()
        page.get_by_role("link", name="many", exact=True).click()
        page.wait_for_selector(".cell[data-row]")
        first = timed("first grid", time.monotonic() - start)
        script = """() => new Promise((done) => {
          const grid = document.querySelector('.grid-figures'), times = [];
          let last = performance.now(), left = 120;
          const step = (now) => {
            times.push(now - last); last = now; grid.scrollTop += 900;
            if (--left) requestAnimationFrame(step); else done(times);
          };
          requestAnimationFrame(step); })"""
        frames = sorted(page.evaluate(script))
        print(f"\nframes while scrolling: median {frames[60]:.0f} ms, 95 % {frames[114]:.0f} ms, longest {frames[-1]:.0f} ms")
        assert page.locator(".cell").count() < 120
        page.locator(".cell").first.focus()
        page.keyboard.press("End")
        until(page, "document.activeElement.className === 'cell' && document.activeElement.matches('[data-row]')")
        assert page.evaluate("document.querySelector('.grid-figures').scrollTop") > 1_000_000
        start = time.monotonic()
        page.fill("#f-text", "figure 77777")
        page.wait_for_selector("text=1 shown")
        timed("a search", time.monotonic() - start)
        page.select_option("#f-kind", "diagram")
        page.wait_for_selector("text=0 shown")
        memory = memory_of_the_page()
        print(f"\nmemory of the page: {memory:.0f} MB")
        assert memory < 200
        assert first < 1 or os.getloadavg()[0] > 2, "over a second on an idle machine"


def test_a_hundred_thousand_lines_of_metrics_open_at_once(browser: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.py").write_text("run_name = 'long'\nmax_train_steps = 200000\n")
    (run / "run.json").write_text("{}")
    bins = {f"loss_sigma_{i / 10:.1f}-{(i + 1) / 10:.1f}": 0.123456789012345 for i in range(10)}
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            values = {"step": step, "time": 1e9 + step, "loss": 1 / step, "train_loss": 1 / step, "lr": 1e-4, "memory_gb": 1.5}
            file.write(json.dumps(values | bins) + "\n")
    with serving(tmp_path) as address, page_of(browser, address) as page:
        tab(page, "Runs")
        page.wait_for_selector("text=100,000 of 200,000")
        start = time.monotonic()
        page.get_by_role("link", name="long").click()
        page.wait_for_selector(".chart polyline")
        opened = timed("a run of 100,000 lines", time.monotonic() - start)
        assert opened < 1 or os.getloadavg()[0] > 2, "over a second on an idle machine"


def test_by_keyboard_at_two_widths_and_in_the_dark(browser: Any, tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    folder.mkdir()
    for number in range(30):
        Image.new("RGB", (64, 48), (number * 8, 90, 160)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"<b>figure</b> {number}")
    with serving(tmp_path) as address:
        for width, dark in ((1280, False), (390, True)):
            with page_of(browser, address, width, dark) as page:
                page.keyboard.press("Tab")
                assert page.evaluate("document.activeElement.className") == "skip"  # the first stop leads past the tabs
                page.get_by_role("link", name="figures", exact=True).press("Enter")
                page.wait_for_selector(".cell[data-row]", timeout=600_000)
                page.locator(".cell").first.focus()
                for key, row in (("ArrowRight", "1"), ("End", "29"), ("Home", "0"), ("ArrowRight", "1")):
                    page.keyboard.press(key)
                    page.wait_for_selector(f".cell:focus[data-row='{row}']")
                page.keyboard.press("Enter")
                page.wait_for_selector("dialog[open] img")
                assert page.locator("#caption").input_value() == "<b>figure</b> 1"
                assert page.locator("main b:text('figure')").count() == 0
                page.fill("#caption", "another caption")
                page.get_by_role("button", name="Keep the edited caption").press("Enter")
                page.wait_for_selector("text=1 caption edited")
                wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
                paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
                assert wide == 0 and (paper == "rgb(20, 23, 27)") == dark
                shot(page, f"narrow_{'dark' if dark else 'light'}") if width < 500 else None
                for name in ("Runs", "Queue", "Playground"):
                    tab(page, name)
                    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0, name
