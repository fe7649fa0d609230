"""The explorer in a real Chromium, as its visitors use it."""

import io
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tasks_on_disk import CLASSES, random_task

from debiformer.app.explorer import Explorer
from debiformer.app.seeing import classifier, detector, segmenter, untrained
from debiformer.tasks.detection import DetectionTask
from debiformer.tasks.segmentation import SegmentationTask

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect

from debiformer.app.page import Page, launch  # noqa: E402

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
NANO = dict(backbone_args=dict(region_grid=[4, 4], feature_norms=True))
ERRORS = {"test_bad_file_is_named_and_the_page_goes_on", "test_what_is_too_large_is_refused", "test_crash_leaves_the_page_alive"}
ERRORS |= {"test_a_query_that_is_none_changes_nothing"}
WAIT = 15_000  # milliseconds: a machine that others use may be slow


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        own = Path(driver.chromium.executable_path)
        found = str(own) if own.exists() else next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if found is None:
            pytest.skip("no Chromium: `playwright install chromium`, or the chromium package of the system")
        browser = driver.chromium.launch(executable_path=found, args=QUIET)
        yield browser
        browser.close()


def broken():
    raise RuntimeError("a defect")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The explorer, served from this process, with a model of each task and one that fails."""
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("gradio"))
    torch.manual_seed(0)
    first, second = (random_task("debiformer_nano", input_size=(3, 64, 64), crop_pct=1.0) for _ in range(2))
    palette = [(0, 0, 0), (255, 0, 0), (0, 255, 0)]
    mask = SegmentationTask("debiformer_nano", CLASSES, palette, head="semantic_fpn", short_side=64, **NANO).eval()
    options = dict(detector_args=dict(score_thresh=0.3), short_side=64, long_side=128, milestones=[8, 11])
    box = DetectionTask("debiformer_nano", CLASSES, detector="retinanet", **options, **NANO).eval()
    page = Page(
        Explorer(
            {
                "first": lambda: classifier(first),
                "second": lambda: classifier(second),
                "masks": lambda: segmenter(mask),
                "boxes": lambda: detector(box),
                "windows": lambda: untrained("shifted_window", size=64),
                "broken": broken,
            }
        )
    )
    yield launch(page, "127.0.0.1", None).rstrip("/")
    page.blocks.close()
    del os.environ["GRADIO_TEMP_DIR"]


@pytest.fixture
def visit(browser, address, request):
    """Opens the explorer as a visitor of its own, who sees the first picture, and in the end no error but in tests of errors."""
    contexts = []

    def visit(**options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT)
        expect.set_options(timeout=WAIT)
        page.requested = []
        page.on("request", lambda request: page.requested.append(request.url))
        page.goto(address)
        wait_for(page, 6)
        return page

    yield visit
    toasts = [
        toast for context in contexts for page in context.pages for toast in page.locator("[data-testid=toast-text]").all_inner_texts()
    ]
    badges = [context.pages[0].locator("#results, #progress").get_by_text("Error", exact=True).count() for context in contexts]
    for context in contexts:
        context.close()
    if request.node.originalname not in ERRORS:
        assert not toasts
        assert not any(badges)


def wait_for(page, figures, stage=None):
    """Wait until all figures are there."""
    if stage is not None:
        expect(page.locator("#results")).to_contain_text(f"Stage {stage}")
    expect(page.locator("#results figure")).to_have_count(figures)


def choose(page, control, option):
    expect(page.get_by_role("option")).to_have_count(0)  # of the menu before
    page.locator(f"#{control} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def upload(page, name, content, taken=True):
    """Upload a file, and wait until it is the picture."""
    before = page.locator("#picture img").get_attribute("src")
    page.locator("#upload input[type=file]").set_input_files(dict(name=name, mimeType="image/png", buffer=content))
    if taken:
        expect(page.locator("#picture img")).not_to_have_attribute("src", before)


def encoded(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def picture(page):
    """The picture on the page, as it is shown."""
    source = page.locator("#picture img").get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")


def last_figure(page):
    return page.locator("#results figure img").nth(3).get_attribute("src")


def saved(page):
    """The file of figures and arrays, downloaded."""
    page.locator("#save").click()
    link = page.locator("#saved a[href]").first
    expect(link).to_be_visible()
    with page.expect_download() as download:
        link.click()
    return download.value.path()


def test_first_page_needs_no_network_and_no_knowledge(visit, address):
    page = visit()
    assert {url.split("/")[2] for url in page.requested if not url.startswith(("data:", "blob:"))} == {address.removeprefix("http://")}
    expect(page.locator("#results")).to_contain_text("What the model takes the picture for")
    for figure in page.locator("#results figure").all():
        sentence = figure.locator("figcaption").inner_text()
        assert sentence.endswith(".")
        assert figure.locator("img").get_attribute("alt")
        assert figure.locator("img").evaluate("image => image.naturalWidth") > 100


def test_click_takes_the_pixel_below_it(visit):
    page = visit()
    before = last_figure(page)
    box = page.locator("#picture img").bounding_box()
    page.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + 0.75 * box["height"])
    expect(page.locator("#x input")).to_have_value(re.compile("^(19|20)$"))  # of the 80 pixels of the picture
    expect(page.locator("#y input")).to_have_value(re.compile("^(59|60)$"))
    expect(page.locator("#results figure img").nth(3)).not_to_have_attribute("src", before)
    x, y = (round((int(page.locator(f"#{name} input").input_value()) + 0.5) * 8) for name in "xy")
    star = np.asarray(picture(page), dtype=int)[y - 3 : y + 4, x - 3 : x + 4].reshape(-1, 3)
    assert np.abs(np.median(star, axis=0) - (240, 228, 66)).max() < 20


def test_keyboard_alone(visit):
    page = visit()
    before = last_figure(page)
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#x') !== null"):
            break
    else:
        pytest.fail("the field for x is not reached by Tab")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("5")
    page.keyboard.press("Enter")
    expect(page.locator("#results figure img").nth(3)).not_to_have_attribute("src", before)
    wait_for(page, 6)
    page.locator("#stage input").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("#results")).to_contain_text(re.compile("Stage [234], block"))


def test_layers_and_heads(visit):
    page = visit()
    choose(page, "stage", "3")
    expect(page.locator("#results")).to_contain_text("Stage 3, block")
    wait_for(page, 6)
    choose(page, "block", "1")
    expect(page.locator("#results")).to_contain_text("Stage 3, block 1: BiLevelRoutingAttention, all heads averaged")
    wait_for(page, 5)  # which has no points
    choose(page, "head", "1")
    expect(page.locator("#results")).to_contain_text("head 1")
    choose(page, "stage", "1")
    expect(page.locator("#results")).to_contain_text(re.compile("Stage 1, block 1.*all heads averaged"))  # which has one
    wait_for(page, 5)
    choose(page, "stage", "3")
    choose(page, "block", "2")
    expect(page.locator("#results")).to_contain_text("Stage 3, block 2")
    choose(page, "stage", "4")
    expect(page.locator("#results")).to_contain_text("Stage 4, block 1")  # which has no second block
    wait_for(page, 6)


def test_two_models_on_one_click(visit):
    page = visit()
    choose(page, "other", "windows")
    expect(page.locator("#results h2")).to_have_text(["first", "windows"])
    wait_for(page, 6 + 4)
    expect(page.locator("#results")).to_contain_text("This model is untrained")
    assert page.locator("#results p strong").all_inner_texts() == [
        "Stage 1, block 2: DeformableBiLevelRoutingAttention, all heads averaged",
        "Stage 1, block 2: WindowAttention, all heads averaged",
    ]


def test_masks_and_boxes(visit):
    page = visit()
    choose(page, "model", "masks")
    expect(page.locator("#results")).to_contain_text("The class of every pixel")
    expect(page.locator("#results")).to_contain_text("What the model found, drawn over the picture.")
    expect(page.locator("#results")).to_contain_text("of the pixels; by the")
    choose(page, "model", "boxes")
    expect(page.locator("#results")).to_contain_text("boxes that the model is at least 30% sure of")
    expect(page.locator("#results")).to_contain_text("No evidence to show: nothing was found in the image.")


def test_another_class_and_method(visit):
    page = visit()
    page.get_by_text("Evidence: for which class").click()
    choose(page, "label", "c")
    expect(page.locator("#results")).to_contain_text("Evidence for c, ")
    choose(page, "method", "layer_cam")
    expect(page.locator("#results")).to_contain_text("(layer cam)")
    choose(page, "weighed", "stage 1")
    expect(page.locator("#results")).to_contain_text("by the 16x16 map of stage 1")


def test_own_picture(visit):
    page = visit()
    upload(page, "wide.png", encoded(noise(200, 100)))
    expect(page.locator("#x input")).to_have_value("100")
    expect(page.locator("#y input")).to_have_value("50")
    wait_for(page, 6)
    assert picture(page).size == (640, 320)


def test_photo_of_twelve_megapixels(visit):
    page = visit()
    photo = noise(400, 300).resize((4000, 3000))
    upload(page, "photo.jpg", encoded(photo, "jpeg", quality=90))
    expect(page.locator("#x input")).to_have_value("640")  # reduced to 1280x960
    wait_for(page, 6)


def test_animated_gif_is_its_first_frame(visit):
    page = visit()
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    upload(page, "moving.gif", encoded(frames[0], "gif", save_all=True, append_images=frames[1:], duration=100, loop=0))
    expect(page.locator("#x input")).to_have_value("32")
    wait_for(page, 6)
    red, _, blue = np.asarray(picture(page))[10, 10]
    assert (red > 200, blue < 50) == (True, True)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("torn.png", encoded(noise(50, 50))[:2000], "torn.png: "),
        ("letter.png", b"Dear Sir or Madam", "letter.png: not an image"),
        ("empty.png", b"", "empty.png: the file is empty"),
        ("thin.png", encoded(noise(1, 5000)), "one side is more than 20 times the other"),
        ("bomb.png", encoded(Image.new("1", (8000, 8000))), "more than 50 million: reduce it first"),
    ],
)
def test_bad_file_is_named_and_the_page_goes_on(name, content, said, visit):
    page = visit()
    upload(page, name, content, taken=False)
    toast = page.get_by_text(said)
    expect(toast).to_be_visible()
    assert "/" not in toast.inner_text()
    upload_again = page.locator("#upload").get_by_label(re.compile("clear|remove", re.I))
    upload_again.first.click()
    upload(page, "good.png", encoded(noise(30, 30)))
    expect(page.locator("#x input")).to_have_value("15")


def test_what_is_too_large_is_refused(visit, address):
    page = visit()
    upload(page, "huge.png", bytes(21 * 2**20), taken=False)
    expect(page.get_by_text("exceed the maximum allowed size of 20.0 Mb").first).to_be_visible()
    files = dict(files=dict(name="huge.png", mimeType="image/png", buffer=bytes(21 * 2**20)))
    assert page.request.post(f"{address}/gradio_api/upload", multipart=files).status == 413  # without the page's own check


def test_crash_leaves_the_page_alive(visit, capfd):
    page = visit()
    choose(page, "model", "broken")
    expect(page.get_by_text("a defect").first).to_be_visible()
    choose(page, "model", "second")
    expect(page.locator("#results h2")).to_have_text(["second"])
    wait_for(page, 6)
    assert "RuntimeError: a defect" in capfd.readouterr().err  # and is not swallowed


def test_two_visitors_at_once(visit):
    pages = [visit(), visit()]
    for page, (across, down) in zip(pages, [(0.125, 0.125), (0.875, 0.875)], strict=True):
        box = page.locator("#picture img").bounding_box()
        page.mouse.click(box["x"] + across * box["width"], box["y"] + down * box["height"])
    for page, value in zip(pages, ["^(9|10)$", "^(69|70)$"], strict=True):
        expect(page.locator("#x input")).to_have_value(re.compile(value))
        wait_for(page, 6)
    upload(pages[0], "own.png", encoded(noise(60, 40)))
    expect(pages[0].locator("#y input")).to_have_value("20")
    expect(pages[1].locator("#y input")).to_have_value(re.compile("^(69|70)$"))
    assert last_figure(pages[0]) != last_figure(pages[1])


def test_a_query_that_is_none_changes_nothing(visit):
    page = visit()
    source = page.locator("#picture img").get_attribute("src")
    page.locator("#x input").fill("80")
    page.keyboard.press("Enter")
    expect(page.get_by_text("x is from 0 to 79, y from 0 to 79")).to_be_visible()
    page.locator("#x input").fill("")
    page.keyboard.press("Enter")
    expect(page.get_by_text("give both x and y")).to_be_visible()
    assert page.locator("#picture img").get_attribute("src") == source
    page.locator("#x input").fill("3")
    page.keyboard.press("Enter")
    expect(page.locator("#picture img")).not_to_have_attribute("src", source)


def test_what_finds_nothing_is_saved_without_evidence(visit):
    page = visit()
    choose(page, "model", "boxes")
    expect(page.locator("#results")).to_contain_text("No evidence to show: nothing was found in the image.")
    with zipfile.ZipFile(saved(page)) as files:
        assert sorted(files.namelist()) == ["model-1/about.json", "model-1/arrays.npz", "model-1/attention.png"]
        assert json.loads(files.read("model-1/about.json"))["evidence"] == "none: nothing was found in the image"


def test_figures_and_arrays_are_saved(visit):
    page = visit()
    choose(page, "other", "second")
    expect(page.locator("#results h2")).to_have_text(["first", "second"])
    wait_for(page, 12)
    with zipfile.ZipFile(saved(page)) as files:
        kinds = ("about.json", "arrays.npz", "attention.png", "evidence.png")
        about = json.loads(files.read("model-2/about.json"))
        assert sorted(files.namelist()) == [f"model-{number}/{kind}" for number in (1, 2) for kind in kinds]
        arrays = [np.load(io.BytesIO(files.read(f"model-{number}/arrays.npz"))) for number in (1, 2)]
        assert Image.open(io.BytesIO(files.read("model-1/attention.png"))).width > 900
    assert {**about, "evidence": None} == dict(
        model="second", picture="BloodImage_00007_00.jpg", x=40, y=40, stage=1, block=2, head=None, evidence=None
    )
    assert [array["attention"].sum() for array in arrays] == pytest.approx([1, 1], abs=1e-4)
    assert not np.array_equal(arrays[0]["attention"], arrays[1]["attention"])


def test_fits_a_phone(visit):
    page = visit(viewport=dict(width=390, height=844), has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    sizes = page.locator("#results figcaption").evaluate_all("all => all.map(one => parseFloat(getComputedStyle(one).fontSize))")
    assert min(sizes) >= 14
    widths = page.locator("#results figure img").evaluate_all("all => all.map(one => one.clientWidth)")
    assert min(widths) >= 140
    image = page.locator("#picture img")
    image.tap(position=dict(x=0.75 * image.bounding_box()["width"], y=100))
    expect(page.locator("#x input")).to_have_value(re.compile("^(59|60)$"))


@pytest.mark.parametrize("file", ["/etc/passwd", "../../../../etc/passwd", str(Path(__file__)), "pyproject.toml"])
def test_nothing_else_on_the_disk_can_be_read(file, visit, address):
    page = visit()
    for route in ("gradio_api/file=", "file="):
        answer = page.request.get(f"{address}/{route}{file}")
        assert answer.status in (403, 404)
        assert b"root:" not in answer.body()


def test_a_forged_upload_is_refused(visit, address, capfd):
    """A request that claims a file of this machine as its upload gets an error, and nothing of the file."""
    page = visit()
    config = page.request.get(f"{address}/config").json()
    control = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == "upload")
    event = next(d for d in config["dependencies"] if control in d["inputs"])
    forged = {"path": str(Path(__file__).parents[1] / "golden"), "meta": {"_type": "gradio.FileData"}}
    data = [forged if c == control else None for c in event["inputs"]]
    joined = page.request.post(f"{address}/gradio_api/queue/join", data=dict(data=data, fn_index=event["id"], session_hash="forged"))
    assert joined.ok
    told = page.request.get(f"{address}/gradio_api/queue/data?session_hash=forged", timeout=WAIT).text()
    assert '"success":false' in told.replace(" ", "")
    assert "InvalidPathError" in capfd.readouterr().err


def test_hasty_clicks_leave_the_page_alive(visit):
    """Ten clicks in a second, then one when the page is at rest, which is taken."""
    page = visit()
    image = page.locator("#picture img")
    for step in range(1, 11):
        image.click(position=dict(x=20 * step, y=100), no_wait_after=True)
    wait_for(page, 6)
    page.wait_for_timeout(3000)
    image.click(position=dict(x=0.5 * image.bounding_box()["width"], y=10))
    expect(page.locator("#y input")).to_have_value(re.compile("^[23]$"))
    expect(page.locator("#x input")).to_have_value(re.compile("^(39|40)$"))
    wait_for(page, 6)
