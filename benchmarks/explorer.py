"""Seconds from a click to the pictures of `debiformer app`, in a headless Chromium: python benchmarks/explorer.py CHECKPOINT [--clicks 9]

The path is there when the picture of where the attention ends up has changed, the evidence when all pictures are there. The first click on
a picture, which runs the model, and later ones are told apart. Medians, and the largest in brackets. The browser runs on the same machine.
"""

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import timm
import torch
from playwright.sync_api import Page as Tab
from playwright.sync_api import expect, sync_playwright
from record import save

from debiformer.app.explorer import Explorer
from debiformer.app.page import Page, launch
from debiformer.app.seeing import Model, classifier, load_model, untrained
from debiformer.cli import bench
from debiformer.tasks.classification import ClassificationTask

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
REACHED = "document.querySelector('#results section .panels').lastElementChild.querySelector('img')"
PICTURES = {"biformer_tiny": 5, "windows": 4}  # others have 6: their pixels listen to points too


def random(name: str) -> Model:
    """A preset with random weights, at 224."""
    torch.manual_seed(0)
    task = ClassificationTask(name, [f"class {n}" for n in range(1000)], input_size=(3, 224, 224))
    assert timm.is_model(name)
    return classifier(task.eval().requires_grad_(False))


def seconds(tab: Tab, act: Callable[[], None], whole: int) -> tuple[float, float]:
    """From an act to the path, and to the evidence, in a page of so many pictures; asked at each frame that the browser draws."""
    before = tab.evaluate(f"() => {REACHED}.src")
    begin = time.perf_counter()
    act()
    tab.wait_for_function(f"before => {REACHED} && {REACHED}.src !== before", arg=before, polling="raf")
    path = time.perf_counter() - begin
    tab.wait_for_function("whole => document.querySelectorAll('#results figure').length === whole", arg=whole, polling="raf")
    return path, time.perf_counter() - begin


def measure(tab: Tab, clicks: int, whole: int) -> dict[str, str]:
    """Clicks on one picture, then the first ones on others."""
    box = tab.locator("#picture img").bounding_box()
    assert box is not None

    def click(step: int) -> None:
        tab.mouse.click(box["x"] + (step + 1) / (clicks + 3) * box["width"], box["y"] + box["height"] / 3)

    later = [seconds(tab, partial(click, step), whole) for step in range(clicks)]
    samples = tab.locator("#samples button img")
    first = [seconds(tab, samples.nth(number).click, whole) for number in (1, 2, 0)]
    columns = {"another picture": first, "a click": later}
    found = {}
    for name, times in columns.items():
        for what, values in zip(("path", "evidence"), zip(*times, strict=True), strict=True):
            found[f"{name}: {what}, s"] = f"{statistics.median(values):.2f} ({max(values):.2f})"
    return found


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="of the quickstart")
    parser.add_argument("--clicks", type=int, default=9)
    options = parser.parse_args()
    nano = "debiformer_nano"
    sources = {nano: partial(load_model, options.checkpoint), "windows": partial(untrained, "shifted_window")}
    sources |= {name: partial(random, name) for name in ("biformer_tiny", "debiformer_tiny", "debiformer_base")}
    page, rows = Page(Explorer(sources)), []
    address = launch(page, "127.0.0.1", None)
    expect.set_options(timeout=120_000)
    with sync_playwright() as driver:
        own = driver.chromium.executable_path
        found = own if Path(own).exists() else shutil.which("chromium") or shutil.which("google-chrome")
        browser = driver.chromium.launch(executable_path=found, args=FLAGS)
        for name, other in [(nano, None), (nano, "windows"), ("biformer_tiny", None), ("debiformer_tiny", None), ("debiformer_base", None)]:
            tab = browser.new_page(viewport=dict(width=1440, height=1100))
            tab.goto(address)
            expect(tab.locator("#results figure")).to_have_count(6)
            for control, value in {"model": name, "other": other}.items():
                if value and value != nano:
                    tab.locator(f"#{control} input").click()
                    tab.get_by_role("option", name=value, exact=True).click()
                    expect(tab.locator("#results h2").last).to_have_text(value)
            whole = PICTURES.get(name, 6) + (PICTURES[other] if other else 0)
            expect(tab.locator("#results figure")).to_have_count(whole)
            bench.tell(name)
            rows.append(
                {"model": name if other is None else f"{name}, and untrained windows beside it"} | measure(tab, options.clicks, whole)
            )
            tab.close()
        browser.close()
    page.blocks.close()
    print(bench.table(rows))
    print(save("explorer", rows, packages=["gradio", "playwright"]))


if __name__ == "__main__":
    run()
