"""Pictures of the explorer, on a desk and on a telephone: python scripts/draw_explorer.py CHECKPOINT FOLDER

Takes Chromium, and a checkpoint of the quickstart.
"""

import io
import os
import shutil
import sys
from functools import partial
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from debiformer.app.explorer import Explorer
from debiformer.app.page import Page, launch
from debiformer.app.seeing import load_model, untrained

SCREENS = {
    "explorer.png": dict(viewport=dict(width=1280, height=800)),
    "explorer_phone.png": dict(viewport=dict(width=390, height=844), is_mobile=True, has_touch=True),
}

if __name__ == "__main__":
    checkpoint, folder = sys.argv[1:]
    page = Page(
        Explorer(
            {
                "runs/quickstart": partial(load_model, checkpoint),
                "untrained: cross shaped window": partial(untrained, "cross_shaped_window"),
            }
        )
    )
    address = launch(page, "127.0.0.1", None)
    expect.set_options(timeout=30_000)
    with sync_playwright() as driver:
        own = driver.chromium.executable_path
        found = own if Path(own).exists() else shutil.which("chromium") or shutil.which("google-chrome")
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        for name, screen in SCREENS.items():
            tab = browser.new_context(**screen).new_page()
            tab.goto(address)
            expect(tab.locator("#results figure")).to_have_count(6)
            place = tab.locator("#picture img").bounding_box()
            tab.locator("#picture img").click(position=dict(x=0.42 * place["width"], y=0.55 * place["height"]))
            expect(tab.locator("#x input")).not_to_have_value("40")
            tab.wait_for_timeout(3000)
            if "phone" not in name:
                tab.locator("#other input").click()
                tab.get_by_role("option", name="untrained: cross shaped window").click()
                expect(tab.locator("#results figure")).to_have_count(10)
            tab.wait_for_timeout(1000)
            with Image.open(io.BytesIO(tab.screenshot(full_page=True))) as picture:
                picture.convert("RGB").quantize(192, dither=Image.Dither.NONE).save(Path(folder, name), optimize=True)
        browser.close()
    page.blocks.close()
