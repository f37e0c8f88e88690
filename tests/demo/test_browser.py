"""The Space in a real browser: Debian's Chromium, driven by Playwright, on a desktop and on a phone.

An error on the console, or a request to any other host, fails the test that caused it. Screenshots are written to
`$PIVOT_SCREENSHOTS`, or to the test's own folder.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pivot_hub.demo import model_bundle
from pivot_hub.demo.launch import load_module
from pivot_hub.demo.model_bundle import BundleNames
from pivot_hub.demo.page_layout import TITLE
from pivot_hub.explain.heatmaps import colour
from pivot_hub.mllm.load import load_mllm
from tests.encoder.native_towers import write_tower
from tests.encoder.originals import make_vision
from tests.mllm.tiny_mllms import make_mllm
from tests.mllm.tiny_processors import add_processor

CHROMIUM = shutil.which("chromium")
DESKTOP, PHONE = {"width": 1400, "height": 1000}, {"width": 390, "height": 844}
SIZES = [pytest.param(DESKTOP, id="desktop"), pytest.param(PHONE, id="phone", marks=pytest.mark.slow)]
# CI requires a browser: without one the tests fail there, and are skipped elsewhere.
absent = (CHROMIUM is None or find_spec("playwright") is None) and os.environ.get("PIVOT_BROWSER") != "required"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(absent, reason="no Chromium or no Playwright: apt-get install chromium, pip install playwright"),
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    module = load_module()
    app = module.build_app()
    _, address, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **module.LAUNCH)
    yield address
    app.close()


@pytest.fixture
def url_with_runs(trained: Path) -> Iterator[str]:
    """Address of an app whose visitors may name the stages of a tiny run."""
    module = load_module()
    app = module.build_app(runs=trained)
    _, address, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **module.LAUNCH)
    yield address
    app.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"],
        )
        yield chromium
        chromium.close()


class Visit:
    """A page in a browser context of its own, which records errors and requests to other hosts."""

    def __init__(self, browser: Any, url: str, size: dict[str, int], scheme: str = "light", query: str = "") -> None:
        self.context = browser.new_context(
            viewport=size,
            screen=size,
            is_mobile=size is PHONE,
            color_scheme=scheme,
            has_touch=size is PHONE,
            accept_downloads=True,
            permissions=["clipboard-read", "clipboard-write", "camera"],
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.errors: list[str] = []
        self.other_hosts: list[str] = []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("request", lambda r: self._check_host(r.url, url))
        self.page.goto(url + query)
        self.wait()

    def _check_host(self, url: str, home: str) -> None:
        if not url.startswith((home, home.replace("http", "ws"), "data:", "blob:")):
            self.other_hosts.append(url)

    def wait(self) -> None:
        if "mode=encoders" in self.page.url:
            self.page.wait_for_selector("#encoder-panel section", timeout=60_000)
            return
        self.page.wait_for_selector("#comparison img.heat", timeout=60_000)
        self.page.wait_for_function("document.querySelector('#link textarea, #link input').value.length > 0")

    def act(self, action: Any) -> None:
        """Run an action, and wait until the maps have changed."""
        before = self.page.inner_html("#comparison section")
        action()
        changed = "before => document.querySelector('#comparison section').innerHTML !== before"
        self.page.wait_for_function(changed, arg=before, timeout=60_000)

    def linked(self, *parts: str, without: str = "?!") -> str:
        """Wait until the link contains all parts, and does not contain another text; return the link."""
        ready = (
            "([parts, without]) => parts.every(p => location.search.includes(p)) && !location.search.includes(without)"
        )
        self.page.wait_for_function(ready, arg=[list(parts), without])
        link = str(self.page.locator("#link textarea, #link input").input_value())
        assert link == self.page.url
        return link

    def heats(self, where: str = "#comparison") -> list[np.ndarray]:
        """Pixels (H, W, 4) of the displayed maps, in order."""
        return [pixels(s) for s in self.page.eval_on_selector_all(f"{where} img.heat", "all => all.map(i => i.src)")]

    def text(self, where: str = "#comparison") -> str:
        return str(self.page.inner_text(where))

    def colour(self, name: str) -> None:
        self.page.get_by_role("combobox", name="Colours").click()
        self.page.get_by_role("option", name=name).click()

    def open(self, label: str) -> None:
        self.page.locator("button.label-wrap", has_text=label).click()
        self.page.wait_for_timeout(500)  # Gradio builds the content now, and sets its values a moment later


def pixels(uri: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGBA"))


@pytest.fixture
def visit(browser: Any, url: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Open pages; at the end take a screenshot of each, and check for errors and requests to other hosts."""
    visits: list[Visit] = []

    def open_page(size: dict[str, int] = DESKTOP, scheme: str = "light", query: str = "", at: str = url) -> Visit:
        visits.append(Visit(browser, at, size, scheme, query))
        return visits[-1]

    yield open_page
    folder = Path(os.environ.get("PIVOT_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", request.node.name).strip("-")
    too_wide = []
    for number, opened in enumerate(visits):
        too_wide.append(
            opened.page.evaluate("document.documentElement.scrollWidth > innerWidth || innerWidth > screen.width")
        )
        opened.page.screenshot(path=folder / f"{name}-{number}.png", full_page=True)
        opened.context.close()
    assert [error for opened in visits for error in opened.errors] == []
    assert [url for opened in visits for url in opened.other_hosts] == []
    assert not any(too_wide), "the page is wider than the screen"


def on_scale(heat: np.ndarray, name: str) -> np.ndarray:
    """Position of each pixel on a colour scale, 0 to 255; a colour that is not on the scale fails."""
    table = np.asarray(colour(np.arange(256.0)[None], name, 0, 255)).reshape(256, 3)
    positions = {tuple(rgb): i for i, rgb in reversed(list(enumerate(table.tolist())))}
    flat = heat[..., :3].reshape(-1, 3)
    values = [positions.get(tuple(rgb)) for rgb in flat.tolist()]
    assert None not in values, "a pixel's colour is not on the scale"
    return np.array(values).reshape(heat.shape[:2])


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_first_view_shows_both_maps_on_one_scale(visit: Any, size: dict[str, int]) -> None:
    page = visit(size)
    first, second, difference = page.heats()
    sft, dpo = on_scale(first, "viridis"), on_scale(second, "viridis")
    assert (sft != dpo).any(), "both encoders have the same map"
    assert max(sft.max(), dpo.max()) == 255, "the scale does not end at the larger peak"
    assert min(sft.max(), dpo.max()) < 255, "each map has a scale of its own"
    assert len(np.unique(on_scale(difference, "PuOr"))) > 20
    text = page.text()
    for part in (
        "SFT",
        "DPO",
        "Difference",
        "says",
        "for the right answer against the wrong one",
        "of the picture",
        "overlap",
    ):
        assert part in text
    assert page.page.evaluate("document.documentElement.scrollWidth") <= size["width"], "the page scrolls sideways"
    separators = page.page.locator("footer > .divider:visible").count()
    assert separators == page.page.locator("footer > button:visible").count() - 1
    thumb = page.page.locator("#examples button").nth(1).bounding_box()
    assert thumb["width"] > 70, "the examples are too small"
    images = "#comparison img.image, #examples img"
    without_alt = page.page.eval_on_selector_all(images, "all => all.filter(i => !i.alt).length")
    assert without_alt == 0, "an image has no alternative text"


def test_the_difference_panel_shows_the_difference_of_the_maps(visit: Any) -> None:
    page = visit()
    first, second, difference = page.heats()
    expected = on_scale(second, "viridis").astype(float) - on_scale(first, "viridis")
    displayed = on_scale(difference, "PuOr") - 127.5
    assert np.corrcoef(expected.ravel(), displayed.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("size", SIZES)
def test_controls(visit: Any, size: dict[str, int]) -> None:
    """Examples, scenes, the visitor's own question, explained quantity, method, layer, colours and opacity work."""
    page = visit(size)
    p = page.page
    page.act(lambda: p.locator("#examples button").nth(1).click())
    assert "Where is the brown ring?" in page.text()
    assert p.get_by_role("textbox", name=re.compile("^Question")).input_value() == "Where is the brown ring?"
    p.wait_for_selector("#examples button:nth-of-type(2)[aria-pressed=true]")
    assert p.locator("#examples button[aria-pressed=true]").count() == 1
    page.act(lambda: p.get_by_label("Scene").fill("51"))
    page.linked("scene=51")
    page.act(lambda: p.locator("#another").click())
    page.linked(without="scene=51")
    page.act(lambda: p.get_by_label("Scene").fill("11"))
    before = page.heats()[0]
    page.act(
        lambda: (
            p.get_by_label("Right answer").fill(""),
            p.get_by_label("Wrong answer").fill(""),
            p.get_by_role("textbox", name=re.compile("^Question")).fill("How many shapes are there?"),
            p.locator("#compare").click(),
        )
    )
    assert "no right answer given" in page.text()
    assert "The object of the question is unknown." in page.text()
    assert (page.heats()[0] != before).any()
    page.act(lambda: p.locator("#examples button").nth(2).click())
    page.open("Settings")
    for label in ("SFT loss", "DPO loss", "answer"):
        page.act(lambda label=label: p.get_by_label(label, exact=True).check())
    cam = page.heats()[0]
    page.act(lambda: p.get_by_label("gradient map").check())
    assert (page.heats()[0] != cam).any()
    page.act(lambda: p.get_by_label("Grad-CAM").check())
    assert (page.heats()[0] == cam).all()
    layer = p.get_by_role("slider", name=re.compile("Layer"))
    page.act(lambda: (layer.focus(), layer.press("ArrowLeft"), layer.press("ArrowLeft")))
    assert (page.heats()[0] != cam).any()
    page.linked("layer=3")
    page.act(lambda: page.colour("magma"))
    on_scale(page.heats()[0], "magma")
    slider = p.get_by_role("slider", name=re.compile("Opacity"))
    slider.focus()
    for _ in range(3):
        slider.press("ArrowLeft")
    p.wait_for_function("getComputedStyle(document.querySelector('#comparison img.heat')).opacity === '0.7'")


@pytest.mark.parametrize("size", SIZES)
def test_details(visit: Any, size: dict[str, int]) -> None:
    page = visit(size)
    p = page.page
    # Swipe: by mouse or finger, and by keyboard.
    divider = p.locator("#details-panel .divider")
    divider.focus()
    for _ in range(20):
        divider.press("ArrowRight")
    clip_path = p.evaluate("getComputedStyle(document.querySelector('#details-panel .over')).clipPath")
    assert clip_path == "inset(0px 0px 0px 70%)"
    # Patches: one click, then the arrow keys; the selected patch is the most similar one, in both encoders.
    p.get_by_label("Similar patches").check()
    p.wait_for_selector("#details-panel .patch-grid")
    box = p.locator("#details-panel .patch-grid").bounding_box()
    p.locator("#details-panel .patch-grid").click(position={"x": box["width"] * 0.70, "y": box["height"] * 0.20})
    p.wait_for_selector("#details-panel .patch-grid[data-row='1'][data-column='5']")
    for heat in page.heats("#details-panel"):
        values = on_scale(heat, "viridis")
        assert values[1 * 16 + 8, 5 * 16 + 8] == 255
        assert len(np.unique(values)) > 10
    p.locator("#details-panel .patch-grid").focus()
    p.keyboard.press("ArrowDown")
    p.wait_for_selector("#details-panel .patch-grid[data-row='2'][data-column='5']")
    p.keyboard.press("ArrowLeft")
    p.wait_for_selector("#details-panel .patch-grid[data-row='2'][data-column='4']")
    assert "row 3, column 5" in page.text("#details-panel")
    # Colours: features of both encoders on the same principal components.
    p.get_by_label("Patch colours").check()
    p.wait_for_selector("#details-panel section[aria-label='Patch features as colours']")
    sources = p.eval_on_selector_all("#details-panel img.small", "all => all.slice(1).map(i => i.src)")
    first, second = (pixels(source) for source in sources)
    assert first.shape == second.shape == (8, 8, 4)
    assert (first != second).any()
    assert len(np.unique(first.reshape(-1, 4), axis=0)) > 30
    assert "Both encoders share the components" in page.text("#details-panel")
    # Token attribution: a map for each token.
    p.get_by_label("Token attribution").check()
    p.wait_for_selector("#details-panel .tokens figure")
    tokens = p.locator("#details-panel .tokens").nth(0).locator("b").all_inner_texts()
    assert [token.strip() for token in tokens] == ["It", "is", "at", "the", "top", "right", ".", "(end)"]
    maps = page.heats("#details-panel")
    assert len(maps) == 2 * len(tokens)
    assert len({m.tobytes() for m in maps}) > 5


def save_image(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def noise_image() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (90, 140, 3), dtype=np.uint8)).resize((280, 180))


@pytest.mark.parametrize("size", SIZES)
def test_own_image_by_upload_paste_and_webcam(visit: Any, size: dict[str, int], tmp_path: Path) -> None:
    page = visit(size)
    p = page.page
    p.get_by_role("tab", name="Your own image").click()
    file = save_image(noise_image(), tmp_path / "mine.png")
    page.act(lambda: p.locator("#upload input[type=file]").set_input_files(file))
    assert "Describe the image." in page.text()
    assert "no right answer given" in page.text()
    wide = p.locator("#comparison .frame").first.bounding_box()
    assert wide["width"] / wide["height"] == pytest.approx(280 / 180, rel=0.03), "the aspect ratio of the image changed"
    page.act(lambda: (p.get_by_label("Right answer").fill("It is a cat."), p.locator("#compare").click()))
    assert "probability of the right answer" in page.text()
    # Pasted from the clipboard.
    page.act(lambda: p.locator("#upload").get_by_label("Remove Image").click())
    p.evaluate(
        """async (bytes) => {
          const blob = new Blob([new Uint8Array(bytes)], { type: "image/png" });
          await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        }""",
        list(save_image(noise_image().rotate(180), tmp_path / "turned.png").read_bytes()),
    )
    page.act(lambda: p.locator("#upload").get_by_label(re.compile("clipboard", re.I)).click())
    assert "Describe the image." in page.text()
    # Taken with the browser's test camera.
    page.act(lambda: p.locator("#upload").get_by_label("Remove Image").click())
    p.locator("#upload").get_by_label("Capture from camera").click()
    p.locator("#upload").get_by_text(re.compile("access", re.I)).first.click()
    p.locator("#upload video").wait_for()
    p.wait_for_timeout(1000)
    page.act(lambda: p.locator("#upload").get_by_label(re.compile("capture|photo", re.I)).first.click())
    assert "Describe the image." in page.text()


@pytest.mark.parametrize("size", SIZES)
def test_sharing(visit: Any, size: dict[str, int], tmp_path: Path) -> None:
    """The link restores question, method, colours and details; figure and numbers are saved."""
    page = visit(size)
    p = page.page
    page.act(lambda: p.locator("#examples button").nth(3).click())
    page.open("Settings")
    page.act(lambda: p.get_by_label("gradient map").check())
    page.act(lambda: page.colour("cividis"))
    p.get_by_label("Similar patches").check()
    p.wait_for_selector("#details-panel .patch-grid")
    link = page.linked("details=patches", "method=gradient", "colours=cividis")
    reopened = visit(size, query="?" + link.partition("?")[2])
    reopened.page.wait_for_selector("#details-panel .patch-grid")
    assert [h.tobytes() for h in reopened.heats()] == [h.tobytes() for h in page.heats()]
    assert reopened.page.inner_html("#comparison section") == p.inner_html("#comparison section")
    reopened.open("Settings")
    assert reopened.page.get_by_label("gradient map").is_checked()
    with p.expect_download() as saved:
        p.locator("#save-figure").click()
    saved.value.save_as(tmp_path / "maps.png")
    with Image.open(tmp_path / "maps.png") as figure:
        assert figure.width > 2 * figure.height > 400
    with p.expect_download() as saved:
        p.locator("#save-animation").click()
    with Image.open(saved.value.path()) as swipe:
        assert (swipe.format, getattr(swipe, "n_frames", 1) > 1) == ("WEBP", True)
    embed = p.locator("#embed textarea, #embed input").input_value()
    assert embed.startswith("<iframe src=")
    assert html.unescape(embed.split('"')[1]) == p.url
    with p.expect_download() as saved:
        p.locator("#save-numbers").click()
    saved.value.save_as(tmp_path / "maps.json")
    numbers = json.loads((tmp_path / "maps.json").read_text())
    assert [m["name"] for m in numbers["models"]] == ["SFT", "DPO"]
    assert np.array(numbers["models"][0]["maps"]["gradient"]).shape == (8, 8)
    assert numbers["method"] == "gradient"
    assert numbers["link"] == "?" + link.partition("?")[2]


def test_the_link_contains_the_image(visit: Any, tmp_path: Path) -> None:
    page = visit()
    p = page.page
    p.get_by_role("tab", name="Your own image").click()
    file = save_image(noise_image(), tmp_path / "mine.png")
    page.act(lambda: p.locator("#upload input[type=file]").set_input_files(file))
    link = page.linked("image=")
    assert len(link) < 8000
    reopened = visit(query="?" + link.partition("?")[2])
    assert "Describe the image." in reopened.text()
    box = reopened.page.locator("#comparison .frame").first.bounding_box()
    assert box["width"] / box["height"] == pytest.approx(280 / 180, rel=0.03)


def test_a_bad_link_gets_a_message_and_the_page_works(visit: Any) -> None:
    page = visit(query="?colours=rainbow&scene=3")
    assert "colours is 'rainbow': it must be one of viridis, cividis, magma." in page.text("#message")
    page = visit(query="?first=../../etc&second=/etc")
    p = page.page
    assert "names no MLLM" in page.text("#message")
    page.act(lambda: page.page.locator("#examples button").nth(1).click())
    assert p.locator("#message .message").count() == 0


def test_wrong_models_get_a_message_and_the_current_ones_stay(visit: Any) -> None:
    page = visit()
    p = page.page
    before = page.heats()
    page.open("Other models")
    for first, second, message in (
        ("/etc", "/root", "names no MLLM"),
        ("no-such-owner/no-such-model", "no-such-owner/other", "could not be fetched"),
        ("only-one/given", "", "give both names"),
    ):
        p.get_by_label("First MLLM").fill(first)
        p.get_by_label("Second MLLM").fill(second)
        p.locator("#load").click()
        p.wait_for_function("text => document.querySelector('#status').innerText.includes(text)", arg=message)
        assert "The current models stay." in page.text("#status")
    page.act(lambda: p.locator("#examples button").nth(4).click())
    page.act(lambda: p.locator("#examples button").nth(0).click())
    assert [h.tobytes() for h in page.heats()] == [h.tobytes() for h in before]


@pytest.mark.parametrize("size", SIZES)
def test_other_models_by_field_and_by_link(
    visit: Any, url_with_runs: str, size: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading shows its progress; the models then answer and are in the link; the built-in ones can be restored."""
    load = load_mllm

    def slowly(folder: Path) -> Any:
        time.sleep(0.8)  # tiny models load too fast for the progress to appear
        return load(folder)

    monkeypatch.setattr(model_bundle, "load_mllm", slowly)
    page = visit(size, at=url_with_runs)
    p = page.page
    built_in = [h.tobytes() for h in page.heats()]
    page.open("Other models")
    offered_names = page.text(".controls").partition("Also here: ")[2].partition(".")[0].split(", ")
    # Other tests may have left more checkpoints in the folder.
    assert {"1-align", "2-instruct", "3-dpo", "3-sft"} <= set(offered_names)
    names = {"First MLLM": "3-sft", "Second MLLM": "3-dpo", "Parent": "2-instruct"}
    for label, name in names.items():
        p.get_by_label(label).fill(name)
    p.locator("#load").click()
    p.wait_for_function("document.querySelector('#status').innerText.includes('loading 3-')")
    assert "SFT" in page.text(), "the old models stay while the new ones load"
    p.wait_for_function("document.querySelector('#status').innerText.includes('Loaded: 3-sft and 3-dpo.')")
    assert p.locator("#comparison h2").all_inner_texts() == ["Image", "3-sft", "3-dpo", "Difference"]
    link = page.linked("first=3-sft", "second=3-dpo", "parent=2-instruct")
    reopened = visit(size, query="?" + link.partition("?")[2], at=url_with_runs)
    assert [h.tobytes() for h in reopened.heats()] == [h.tobytes() for h in page.heats()]
    assert reopened.page.locator("#comparison h2").nth(1).inner_text() == "3-sft"
    page.act(lambda: p.locator("#built-in").click())
    assert [h.tobytes() for h in page.heats()] == built_in
    assert "first=" not in page.linked(without="first=")


def test_a_tower_of_native_resolution_is_shown_in_the_shape_of_the_image(
    browser: Any, visit: Any, tmp_path: Path
) -> None:
    """Two MLLMs of Qwen2.5-VL's family on a wide image: maps, patches by click, token maps, figure and numbers."""
    for name, scale in (("qwen-sft", 1.5), ("qwen-dpo", 2.0)):
        make_mllm(tmp_path / name, "qwen2_5_vl", partial(_scale_weights, scale))
        add_processor(tmp_path / name, "qwen2_5_vl")
    module = load_module()
    app = module.build_app(BundleNames(str(tmp_path / "qwen-sft"), str(tmp_path / "qwen-dpo")))
    _, address, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **module.LAUNCH)
    try:
        page = visit(at=address)
        p = page.page
        assert p.locator("#comparison h2").all_inner_texts() == ["Image", "qwen-sft", "qwen-dpo", "Difference"]
        p.get_by_role("tab", name="Your own image").click()
        rng = np.random.default_rng(0)
        wide = Image.fromarray(rng.integers(0, 255, (6, 12, 3), np.uint8)).resize((336, 168))
        file = save_image(wide, tmp_path / "wide.png")
        page.act(lambda: p.locator("#upload input[type=file]").set_input_files(file))
        page.act(lambda: (p.get_by_label("Right answer").fill("It is red."), p.locator("#compare").click()))
        assert [heat.shape[:2] for heat in page.heats()] == [(160, 320)] * 3
        frame = p.locator("#comparison .frame").nth(1).bounding_box()
        assert frame["width"] / frame["height"] == pytest.approx(2, rel=0.03)
        p.get_by_label("Similar patches").check()
        p.wait_for_selector("#details-panel .patch-grid[data-rows='6'][data-columns='14']")
        box = p.locator("#details-panel .patch-grid").bounding_box()
        p.locator("#details-panel .patch-grid").click(position={"x": box["width"] * 0.96, "y": box["height"] * 0.7})
        p.wait_for_selector("#details-panel .patch-grid[data-row='4'][data-column='13']")
        for heat in page.heats("#details-panel"):
            assert heat.shape[:2] == (6 * 16, 14 * 16)
            assert on_scale(heat, "viridis")[4 * 16 + 8, 13 * 16 + 8] == 255
        page.linked("row=4", "column=13")
        with p.expect_download() as download:
            p.locator("#save-numbers").click()
        numbers = json.loads(Path(download.value.path()).read_text())
        assert [np.shape(model["maps"]["gradcam"]) for model in numbers["models"]] == [(6, 14)] * 2
        with p.expect_download() as download:
            p.locator("#save-figure").click()
        with Image.open(download.value.path()) as figure:
            assert figure.width > 2 * figure.height
        p.get_by_label("Token attribution").check()
        p.wait_for_selector("#details-panel .tokens figure")
        token = p.locator("#details-panel .tokens .frame").first.bounding_box()
        assert token["width"] / token["height"] == pytest.approx(2, rel=0.05)
        p.get_by_label("Similar patches").check()  # for the screenshot
        p.wait_for_selector("#details-panel .patch-grid")
    finally:
        app.close()


def _scale_weights(scale: float, model: Any) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(scale)


@pytest.fixture
def url_with_encoders(tmp_path: Path) -> Iterator[str]:
    """Address of an app whose visitors may name tiny encoders of other kinds."""
    for kind in ("clip", "dinov2"):
        make_vision(tmp_path / "runs" / kind, kind)
    write_tower("pixtral", tmp_path / "runs")
    module = load_module()
    app = module.build_app(runs=tmp_path / "runs")
    _, address, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **module.LAUNCH)
    yield address
    app.close()


def shown(page: Visit, action: Any) -> None:
    """Run an action in the mode for any two encoders, and wait until its panel has changed."""
    before = (
        page.page.inner_html("#encoder-panel section") if page.page.locator("#encoder-panel section").count() else ""
    )
    action()
    changed = "before => (document.querySelector('#encoder-panel section')?.innerHTML ?? '') !== before"
    page.page.wait_for_function(changed, arg=before, timeout=60_000)


@pytest.mark.parametrize("size", SIZES)
def test_any_two_encoders(visit: Any, size: dict[str, int]) -> None:
    """A patch by click and by key, a layer by slider and by thumbnail, every view, and the link of each mode."""
    page = visit(size)
    p = page.page
    compared = p.url
    shown(page, lambda: p.get_by_role("tab", name="Any two encoders").click())
    p.wait_for_function("location.search === '?mode=encoders&row=6&column=1'")
    assert p.locator("#encoder-panel h2").all_inner_texts() == ["Image", "SFT", "DPO"]
    grid = p.locator("#encoder-panel .patch-grid").nth(1)
    grid.scroll_into_view_if_needed()
    box = grid.bounding_box()
    shown(page, lambda: grid.click(position={"x": box["width"] * 0.8, "y": box["height"] * 0.3}))
    p.wait_for_function("location.search.includes('row=2&column=6')")
    for heat in page.heats("#encoder-panel"):
        side = heat.shape[0] // 8
        assert on_scale(heat, "viridis")[2 * side, 6 * side] == 255, "the chosen patch has not the highest similarity"
    image = p.locator("#encoder-panel .patch-grid").first
    shown(page, lambda: (image.focus(), p.keyboard.press("ArrowDown")))
    shown(page, lambda: p.keyboard.press("ArrowLeft"))
    p.wait_for_function("location.search.includes('column=5')")
    slider = p.get_by_role("slider", name="Layer of SFT")
    shown(page, lambda: (slider.focus(), slider.press("ArrowLeft")))
    p.wait_for_function("location.search.includes('layers=4,4')")
    p.wait_for_function("document.activeElement.matches('.layer-slider')")
    p.get_by_label("Move the layers together").uncheck()
    shown(page, lambda: p.get_by_role("button", name="Layer 1 of DPO").click())
    p.wait_for_function("location.search.includes('layers=4,1')")
    for label, text in (
        ("Colours (PCA)", "of the variance"),
        ("Regions", "regions of similar features"),
        ("CLS attention", "This tower has no CLS token"),
        ("Drift", "linear CKA"),
    ):
        shown(page, lambda label=label: p.get_by_label(label).check())
        assert text in page.text("#encoder-panel")
    link = p.locator("#encoder-link textarea, #encoder-link input").input_value()
    assert link == p.url
    assert "view=drift" in link
    p.get_by_role("tab", name="SFT vs DPO").click()
    p.wait_for_function("url => location.href === url", arg=compared)
    p.get_by_role("tab", name="Any two encoders").click()
    p.wait_for_function("url => location.href === url", arg=link)
    with p.expect_download() as saved:
        p.locator("#save-encoder-numbers").click()
    numbers = json.loads(Path(saved.value.path()).read_text())
    assert [e["layer"] for e in numbers["encoders"]] == ["4", "1"]
    with p.expect_download() as saved:
        p.locator("#save-encoder-figure").click()
    assert saved.value.suggested_filename == "pivot-encoders.png"
    with Image.open(saved.value.path()) as figure:
        assert (figure.format, figure.width > 2 * figure.height > 800) == ("PNG", True)


def test_matches_in_a_second_image_by_encoders_of_other_kinds(
    visit: Any, url_with_encoders: str, tmp_path: Path
) -> None:
    """A link opens three encoders, one of native resolution; an uploaded image is matched in itself."""
    page = visit(query="?mode=encoders&encoders=clip,pixtral", at=url_with_encoders)
    p = page.page
    p.wait_for_selector("#encoder-panel .patch-grid")
    assert p.locator("#encoder-panel h2").all_inner_texts() == ["Image", "clip", "pixtral"]
    names = p.locator("#encoder-names textarea")
    assert names.input_value() == "clip\npixtral"
    names.fill("clip\ndinov2\npixtral")
    shown(page, lambda: p.locator("#load-encoders").click())
    p.wait_for_function(
        "document.querySelector('#encoder-status').innerText.includes('Loaded: clip, dinov2, pixtral.')"
    )
    file = save_image(noise_image().resize((224, 224)), tmp_path / "mine.png")
    p.get_by_role("tab", name="Your own image").filter(visible=True).click()
    shown(page, lambda: p.locator("#first-upload input[type=file]").set_input_files(file))
    page.open("Second image, for matches")
    p.get_by_role("tab", name="Your own image").filter(visible=True).last.click()
    shown(page, lambda: p.locator("#second-upload input[type=file]").set_input_files(file))
    p.wait_for_selector("#encoder-panel .cell.match")
    assert p.get_by_label("Matches").is_checked()
    shown(page, lambda: p.locator("#encoder-panel .patch-grid").first.click(position={"x": 5, "y": 5}))
    assert p.locator("#encoder-panel .foot").all_inner_texts() == ["Best match: similarity 1.00."] * 3
    for style in p.eval_on_selector_all(
        ".marked", "all => all.map(m => m.querySelector('.match').getAttribute('style'))"
    ):
        assert style.startswith("left:0.000%;top:0.000%;"), "the best match is not the patch itself"
    shown(page, lambda: p.get_by_label("CLS attention").check())
    assert p.locator("#encoder-panel .frame.empty").count() == 1
    names.fill("clip\nno-such-owner")
    p.locator("#load-encoders").click()
    p.wait_for_function("document.querySelector('#encoder-status').innerText.includes('names no encoder')")
    assert "The current encoders stay." in page.text("#encoder-status")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_any_two_encoders_in_the_dark(visit: Any, size: dict[str, int]) -> None:
    page = visit(size, "dark", "?mode=encoders&view=matching&layers=2,6")
    p = page.page
    p.wait_for_selector("#encoder-panel .cell.match")
    chosen = p.eval_on_selector_all("#encoder-panel [aria-pressed=true]", "all => all.map(b => b.dataset.layer)")
    assert chosen == ["2", "6"]
    front = p.evaluate("getComputedStyle(document.querySelector('#encoder-panel .summary')).color")
    assert min(int(v) for v in re.findall(r"\d+", front)[:3]) > 180
    assert p.locator(".toast-body").count() == 0, "a call of the page failed"
    images = "#encoder-panel .patch-grid img.image, #encoder-panel .marked img.image"
    assert p.eval_on_selector_all(images, "all => all.filter(i => !i.alt).length") == 0


def test_visitors_do_not_disturb_each_other(visit: Any) -> None:
    one, other = visit(), visit()
    one.act(lambda: one.page.locator("#examples button").nth(1).click())
    other.act(lambda: other.page.locator("#examples button").nth(4).click())
    other.page.get_by_label("Patch colours").check()
    one.open("Settings")
    one.act(lambda: one.colour("magma"))
    assert "Where is the brown ring?" in one.text()
    on_scale(one.heats()[0], "magma")
    assert "Where is the yellow star?" in other.text()
    on_scale(other.heats()[0], "viridis")
    assert one.page.locator("#details-panel .swipe").count() == 1


BAD_FILES = {
    "not-an-image.png": "is not an image",
    "huge.png": "more than 64 million pixels",
    "truncated.jpg": "damaged or cut short",
}
GOOD_FILES = ("moving.gif", "print.jpg", "turned.jpg")


def write_files(folder: Path) -> None:
    image = noise_image()
    (folder / "not-an-image.png").write_bytes(b"#!/bin/sh\necho not an image\n" * 40)
    Image.new("1", (20_000, 10_000)).save(folder / "huge.png")
    image.save(folder / "whole.jpg")
    (folder / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:3000])
    image.save(folder / "moving.gif", save_all=True, append_images=[image.rotate(90), image.rotate(180)])
    image.convert("CMYK").save(folder / "print.jpg")
    exif = Image.Exif()
    exif[274] = 6  # the camera was held in portrait orientation
    image.save(folder / "turned.jpg", exif=exif)


def test_bad_and_unusual_images(visit: Any, tmp_path: Path) -> None:
    write_files(tmp_path)
    page = visit()
    p = page.page
    p.get_by_role("tab", name="Your own image").click()
    start = page.heats()
    for name, message in BAD_FILES.items():
        p.locator("#upload input[type=file]").set_input_files(tmp_path / name)
        p.wait_for_function("text => document.querySelector('#message').innerText.includes(text)", arg=message)
        assert str(tmp_path) not in p.content()
        assert "Traceback" not in p.content()
        assert [h.tobytes() for h in page.heats()] == [h.tobytes() for h in start]
        p.locator("#upload input[type=file]").wait_for(state="attached")  # the bad image has been removed
    for name in GOOD_FILES:
        page.act(lambda name=name: p.locator("#upload input[type=file]").set_input_files(tmp_path / name))
        assert p.locator("#message .message").count() == 0
        box = p.locator("#comparison .frame").first.bounding_box()
        ratio = 180 / 280 if name == "turned.jpg" else 280 / 180
        assert box["width"] / box["height"] == pytest.approx(ratio, rel=0.03)
        page.act(lambda: p.locator("#upload").get_by_label("Remove Image").click())


def test_long_and_hostile_questions(visit: Any) -> None:
    page = visit()
    p = page.page
    question = p.get_by_role("textbox", name=re.compile("^Question"))
    question.fill("why " * 2500)
    p.locator("#compare").click()
    p.wait_for_function("document.querySelector('#message').innerText.includes('10,000 characters')")
    hostile = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> ${1+1} {{7*7}}"
    page.act(lambda: (question.fill(hostile), p.locator("#compare").click()))
    assert hostile in page.text()
    assert p.locator("#comparison script, #comparison img[src=x]").count() == 0
    assert p.title() == TITLE


def test_the_last_of_two_quick_clicks_wins(visit: Any) -> None:
    page = visit()
    p = page.page
    p.evaluate(
        """() => {
          const buttons = document.querySelectorAll("#examples button");
          buttons[4].click();
          setTimeout(() => buttons[1].click(), 30);
        }"""
    )
    p.wait_for_function("document.querySelector('#comparison').innerText.includes('Where is the brown ring?')")
    page.linked("scene=17", "kind=position")
    p.get_by_label("Similar patches").check()
    p.wait_for_selector("#details-panel .patch-grid")
    p.locator("#details-panel .patch-grid").scroll_into_view_if_needed()
    box = p.locator("#details-panel .patch-grid").bounding_box()
    for row, column in ((1, 1), (6, 2)):
        p.mouse.click(box["x"] + box["width"] * (column + 0.5) / 8, box["y"] + box["height"] * (row + 0.5) / 8)
    p.wait_for_selector("#details-panel .patch-grid[data-row='6'][data-column='2']")


def test_what_is_typed_during_a_comparison_stays(visit: Any) -> None:
    page = visit()
    p = page.page
    question = p.get_by_role("textbox", name=re.compile("^Question"))
    page.act(lambda: (p.locator("#examples button").nth(1).click(), question.fill("Is there a moon?")))
    page.linked("scene=17")
    p.wait_for_function("[...document.querySelectorAll('textarea')].some(t => t.value.startsWith('It is at the'))")
    assert question.input_value() == "Is there a moon?"


def test_keyboard_alone(visit: Any) -> None:
    """The Tab key reaches the controls, and Enter chooses an example."""
    page = visit()
    p = page.page
    p.locator("#examples button").nth(2).focus()
    page.act(lambda: p.keyboard.press("Enter"))
    assert "cyan cross" in page.text()
    reached: set[str] = set()
    for _ in range(60):
        p.keyboard.press("Tab")
        reached.add(p.evaluate("document.activeElement.closest('[id]:not([id=\"\"])')?.id || ''"))
    assert {"compare", "another", "details", "save-figure", "save-numbers"} <= reached
    assert p.evaluate("document.activeElement !== null")


# Marks each visible control of a part of the page by a number; of a group of radio buttons, Tab reaches the chosen one.
MARK_CONTROLS = """(where) => {
  const all = "a[href], button, input, textarea, select, summary, [tabindex]";
  const wanted = [...document.querySelectorAll(where)].flatMap((part) => [...part.querySelectorAll(all)]).filter((e) =>
    e.checkVisibility({ visibilityProperty: true }) && !e.disabled && e.tabIndex >= 0 && e.type !== "file" &&
    !(e.type === "radio" && !e.checked));
  wanted.forEach((e, i) => { e.dataset.mark = i; });
  return wanted.map((e) => e.outerHTML.slice(0, 160));
}"""


def test_the_tab_key_reaches_every_control_of_any_two_encoders(visit: Any) -> None:
    page = visit(query="?mode=encoders")
    p = page.page
    page.open("Second image, for matches")
    p.evaluate("document.activeElement.blur()")
    controls = p.evaluate(MARK_CONTROLS, "#modes")
    assert len(controls) > 20
    reached = set()
    p.locator("#modes button[role=tab]").first.focus()
    for _ in range(len(controls) + 20):
        reached.add(p.evaluate("document.activeElement.dataset.mark ?? ''"))
        p.keyboard.press("Tab")
    assert [html for number, html in enumerate(controls) if str(number) not in reached] == []
    for name in ("load-encoders", "encoder-view", "together", "save-encoder-figure", "save-encoder-numbers"):
        marks = p.eval_on_selector_all(
            f"#{name}, #{name} *", "all => all.map((e) => e.dataset.mark).filter((mark) => mark !== undefined)"
        )
        assert set(marks) & reached, name


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_dark(visit: Any, size: dict[str, int]) -> None:
    page = visit(size, "dark")
    back = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(v) for v in re.findall(r"\d+", back)[:3]) < 60
    front = page.page.evaluate("getComputedStyle(document.querySelector('.summary')).color")
    assert min(int(v) for v in re.findall(r"\d+", front)[:3]) > 180


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_no_violation(visit: Any, size: dict[str, int], scheme: str) -> None:
    page = visit(size, scheme)
    for panel in ("Swipe", "Similar patches", "Patch colours", "Token attribution"):
        page.page.get_by_label(panel, exact=True).check()
        page.page.wait_for_function("() => !document.querySelector('.generating')")
        assert axe_violations(page.page) == [], panel


def axe_violations(page: Any) -> list[tuple[str, list[str]]]:
    """Rule and elements of each violation that axe finds on a page."""
    from axe_playwright_python.sync_playwright import Axe

    violations = Axe().run(page).response["violations"]
    # Gradio's own footer repeats the word Settings in the alternative text of its icon.
    own = [v for v in violations if v["id"] != "image-redundant-alt"]
    return [(v["id"], [node["html"] for node in v["nodes"]]) for v in own]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_no_violation_in_any_two_encoders(visit: Any, size: dict[str, int], scheme: str) -> None:
    page = visit(size, scheme, "?mode=encoders")
    for view in ("Matches", "Colours (PCA)", "Regions", "CLS attention", "Drift", "Similar patches"):
        shown(page, lambda view=view: page.page.locator("#encoder-view").get_by_label(view).check())
        page.page.wait_for_function("() => !document.querySelector('.generating')")
        assert axe_violations(page.page) == [], view


def test_a_photograph_of_the_gallery_is_shown_with_a_caution(visit: Any) -> None:
    page = visit()
    page.act(lambda: page.page.locator("#examples button").filter(has_text="What animal is it?").click())
    link = page.linked("photo=cat")
    assert page.page.locator("#examples button[aria-pressed=true]").count() == 1
    assert "synthetic scenes" in page.page.inner_text("#comparison .caution")
    again = visit(query=link[link.index("?") :])
    assert again.page.locator("#comparison .says").first.inner_text() == "What animal is it?"
