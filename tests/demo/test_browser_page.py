"""The page without a server in Debian's Chromium: its numbers against Python's, its controls, and its errors.

ONNX Runtime Web comes from the npm registry; where that cannot be reached, the tests are skipped. A request to
any other host fails the test that caused it.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
import transformers
from huggingface_hub import SpaceCard
from PIL import Image

from pivot_hub.data.image import to_rgb
from pivot_hub.data.synthetic import ShapesDataset
from pivot_hub.explain.heatmaps import colour
from pivot_hub.explain.patch_features import principal_colours, similarity
from tests.demo.static_page import AXE, PAGE, RUNTIME, NoPackage, fetch_package, make_page, serve, write_encoder
from tests.demo.test_browser import CHROMIUM, DESKTOP, PHONE

absent = (CHROMIUM is None or find_spec("playwright") is None) and os.environ.get("PIVOT_BROWSER") != "required"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(absent, reason="no Chromium or no Playwright: apt-get install chromium, pip install playwright"),
]
HUB = "https://huggingface.co/"
SOFTWARE_GPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]
HALF = {"do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 48, "width": 48}}
CROPPED = {
    "do_resize": True,
    "size": {"shortest_edge": 48},
    "do_center_crop": True,
    "crop_size": {"height": 40, "width": 40},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
}
# Class in Python, and what its preprocessor_config.json says.
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "siglip": ("SiglipImageProcessorPil", {**HALF, "resample": 3}),
    "vit": ("ViTImageProcessorPil", {**HALF, "resample": 2}),
    "lanczos": ("ViTImageProcessorPil", {**HALF, "resample": 1}),
    "nearest": ("ViTImageProcessorPil", {**HALF, "resample": 0}),
    "box": ("ViTImageProcessorPil", {**HALF, "resample": 4}),
    "hamming": ("ViTImageProcessorPil", {**HALF, "resample": 5}),
    "dinov2": ("BitImageProcessorPil", CROPPED),
    "clip": ("CLIPImageProcessorPil", {**CROPPED, "size": 31, "crop_size": 31}),
    "padded": ("CLIPImageProcessorPil", {**CROPPED, "do_resize": False, "crop_size": {"height": 70, "width": 70}}),
    "larger crop": ("BitImageProcessorPil", {**CROPPED, "size": {"shortest_edge": 24}}),
}


@pytest.fixture(scope="module")
def page_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("static")
    try:
        runtime = fetch_package(RUNTIME, folder / "npm")
    except NoPackage as error:
        pytest.skip(str(error))
    return make_page(folder / "page", runtime)


@pytest.fixture(scope="module")
def url(page_folder: Path) -> Iterator[str]:
    with serve(page_folder) as address:
        yield address


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[[list[str]], Any]]:
    """Start Chromium with options."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = []

        def launch(options: list[str]) -> Any:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *options])
            started.append(browser)
            return browser

        yield launch
        for browser in started:
            browser.close()


@pytest.fixture(scope="module")
def browser(start: Callable[[list[str]], Any]) -> Any:
    return start(["--disable-gpu"])


@pytest.fixture(scope="module")
def modules(browser: Any, url: str) -> Iterator[Any]:
    """A page that can import the modules."""
    page = browser.new_page()
    page.goto(url + "settings.json")
    yield page
    page.close()


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Code of axe-core, which checks a page for people with disabilities."""
    try:
        return (fetch_package(AXE, tmp_path_factory.mktemp("axe")) / "axe.min.js").read_text()
    except NoPackage as error:
        pytest.skip(str(error))


class Visit:
    """A page in a browser context of its own, which records errors and every request."""

    def __init__(self, browser: Any, url: str, query: str = "", size: Any = None, scheme: str = "light") -> None:
        size = size or DESKTOP
        self.context = browser.new_context(
            viewport=size, screen=size, is_mobile=size is PHONE, has_touch=size is PHONE, color_scheme=scheme
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.errors: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.context.on("request", lambda r: self.requests.append((r.method, r.url)))
        self.address = url
        self.hosts: tuple[str, ...] = (url, HUB, "data:", "blob:")
        self.query = query

    def open(self) -> Visit:
        self.page.goto(self.address + self.query)
        self.wait()
        return self

    def hub(self, repositories: dict[str, Path], statuses: dict[str, tuple[int, str]] | None = None) -> Visit:
        """Answer for the Hub: files of folders by name, and other repositories with a status and an error code."""

        def answer(route: Any) -> None:
            name, _, file = route.request.url.removeprefix(HUB).partition("/resolve/main/")
            headers = {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": "X-Error-Code"}
            if name in (statuses or {}):
                status, code = (statuses or {})[name]
                route.fulfill(status=status, headers={**headers, "X-Error-Code": code})
            elif (path := repositories[name] / file).is_file():
                route.fulfill(body=path.read_bytes(), headers=headers)
            else:
                route.fulfill(status=404, headers={**headers, "X-Error-Code": "EntryNotFound"})

        self.context.route(f"{HUB}**", answer)
        return self

    def wait(self) -> None:
        self.page.wait_for_selector("#panels[aria-busy=false]")

    def act(self, action: Callable[[], Any]) -> None:
        """Run an action after which the page computes, and wait until it has."""
        self.page.evaluate("document.getElementById('says').textContent = ''")
        action()
        self.page.wait_for_function(
            "document.getElementById('panels').getAttribute('aria-busy') === 'false' &&"
            " (document.getElementById('says').textContent || !document.getElementById('error').hidden)"
        )

    def text(self, name: str) -> str:
        return str(self.page.inner_text(f"#{name}"))

    def choose(self, left: str, right: str) -> None:
        """Name two models in the form."""
        if not self.page.is_visible("#models"):
            self.page.click("#more summary")
        self.page.fill("#name-left", left)
        self.page.fill("#name-right", right)
        self.act(lambda: self.page.click("#models button"))

    def colours(self, side: str, grid: int) -> np.ndarray:
        """Colours (grid, grid, 3) of the patches of a panel, near their centres."""
        uri = self.page.evaluate(f"document.getElementById('{side}').toDataURL()")
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
            pixels = np.asarray(image.convert("RGB"))
        height, width = pixels.shape[:2]
        rows, columns = ((np.arange(grid) + 0.5) / grid * side_px for side_px in (height, width))
        return pixels[rows.astype(int)[:, None], columns.astype(int)[None]]

    def opaque(self) -> None:
        """Let the colours hide the picture."""
        self.page.eval_on_selector("#strength", "e => { e.value = 100; e.dispatchEvent(new Event('input')); }")


@pytest.fixture
def visit(browser: Any, url: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Make pages; at the end take a screenshot of each, and check its width, its requests and its errors."""
    visits: list[Visit] = []

    def make(
        query: str = "", size: Any = None, scheme: str = "light", at: str = url, others: tuple[str, ...] = ()
    ) -> Visit:
        visits.append(Visit(browser, at, query, size, scheme))
        visits[-1].hosts += others
        return visits[-1]

    yield make
    folder = Path(os.environ.get("PIVOT_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", request.node.name).strip("-")
    for number, opened in enumerate(visits):
        opened.page.screenshot(path=folder / f"page-{name}-{number}.png", full_page=True)
        too_wide = opened.page.evaluate("document.documentElement.scrollWidth > innerWidth")
        opened.context.close()
        assert not too_wide, "the page is wider than the screen"
        assert [m for m, _ in opened.requests if m != "GET"] == [], "the page sent something"
        other = [u for _, u in opened.requests if not u.startswith(opened.hosts)]
        assert other == []
        # Chromium itself reports the answers 401, 403 and 404 that a test causes.
        assert [e for e in opened.errors if "Failed to load resource" not in e] == []


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Image with fine and coarse structure, on which a wrong kernel shows."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height), 3)
    fine = rng.integers(-60, 61, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + fine).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format_: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def turned(image: Image.Image) -> bytes:
    """A PNG whose EXIF says that it lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, exif=exif)


def transparent(image: Image.Image) -> Image.Image:
    clear = image.copy()
    clear.putalpha(image.convert("L"))
    return clear


def floats(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.float32)


PICTURES = {
    "wide": encoded(noise(301, 97)),
    "tall": encoded(noise(64, 203, 1)),
    "small": encoded(noise(20, 31, 2)),
    "as large as the input": encoded(noise(48, 48, 3)),
    "large": encoded(noise(1600, 900, 4)),
    "turned": turned(noise(90, 61, 5)),
    "grey": encoded(noise(77, 50, 6).convert("L")),
    "palette": encoded(noise(77, 50, 7).quantize(16)),
    "jpeg": encoded(noise(320, 240, 8), "JPEG", quality=90),
    "webp": encoded(noise(320, 240, 9), "WEBP"),
    "transparent": encoded(transparent(noise(100, 80, 10))),
}
# Functions of the page's modules for `evaluate`: bytes as base64, to and from.
TO_BASE64 = """
const toBase64 = (array) => {
  let text = "";
  const bytes = new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
};
const toBlob = async (text) => (await fetch("data:application/octet-stream;base64," + text)).blob();
"""
PREPARE = (
    "async ([file, configs]) => {"
    + TO_BASE64
    + """
  const { prepare, readSteps } = await import("/preprocess.js");
  const bitmap = await createImageBitmap(await toBlob(file), { colorSpaceConversion: "none" });
  return configs.map((config) => toBase64(prepare(bitmap, readSteps(config))));
}"""
)


def prepared(page: Any, file: bytes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What the page and Python give each encoder for a picture: (3, px, px) each."""
    configs = [config for _, config in PROCESSORS.values()]
    answers = page.evaluate(PREPARE, [base64.b64encode(file).decode(), configs])
    with Image.open(io.BytesIO(file)) as image:
        rgb = to_rgb(image)
    both = {}
    for (name, (class_name, config)), answer in zip(PROCESSORS.items(), answers, strict=True):
        processor = getattr(transformers, class_name)(**config)
        expected = processor(images=[rgb], return_tensors="np")["pixel_values"][0]
        both[name] = (floats(answer).reshape(expected.shape), expected)
    return both


def test_pictures_are_prepared_as_in_python_to_the_last_bit(modules: Any) -> None:
    """Both round to 8 bits after each direction of the resize, so anything else would be another algorithm."""
    for kind, file in PICTURES.items():
        for name, (ours, expected) in prepared(modules, file).items():
            assert ours.dtype == expected.dtype == np.float32
            assert np.array_equal(ours, expected), f"{kind}, {name}: {abs(ours - expected).max()}"


ENCODE = (
    "async ([file, folder, runtime]) => {"
    + TO_BASE64
    + """
  const { inputSide, prepare, readSteps } = await import("/preprocess.js");
  const bitmap = await createImageBitmap(await toBlob(file), { colorSpaceConversion: "none" });
  const steps = readSteps(await (await fetch(folder + "preprocessor_config.json")).json());
  const bytes = await (await fetch(folder + "onnx/model.onnx")).arrayBuffer();
  const worker = new Worker("/worker.js", { type: "module" });
  const ask = (task, values) =>
    new Promise((resolve, reject) => {
      worker.onmessage = ({ data }) => (data.error ? reject(new Error(data.error.message)) : resolve(data.result));
      worker.postMessage({ id: 0, task, values });
    });
  const px = inputSide(steps);
  const { device } = await ask("load", { side: "left", address: new URL(runtime, document.baseURI).href, px, bytes });
  const { grid, width, features } = await ask("encode", { side: "left", pixels: prepare(bitmap, steps), px });
  worker.terminate();
  return { device, grid, width, features: toBase64(features) };
}"""
)


def python_features(folder: Path, file: bytes, processor: str = "SiglipImageProcessorPil") -> np.ndarray:
    """Patch features (H, W, D) of an exported encoder by ONNX Runtime in Python."""
    import onnxruntime

    config = json.loads((folder / "preprocessor_config.json").read_text())
    config.pop("image_processor_type", None)
    with Image.open(io.BytesIO(file)) as image:
        pixels = getattr(transformers, processor)(**config)(images=[to_rgb(image)], return_tensors="np")["pixel_values"]
    session = onnxruntime.InferenceSession(str(folder / "onnx" / "model.onnx"))
    (tokens,) = session.run(["last_hidden_state"], {"pixel_values": pixels})
    grid = int(tokens.shape[1] ** 0.5)
    return np.asarray(tokens[0, tokens.shape[1] - grid * grid :].reshape(grid, grid, -1))


@pytest.mark.parametrize(
    ("options", "device", "tolerance"),
    [
        pytest.param(["--disable-gpu"], "wasm", 1e-5, id="wasm"),
        # SwiftShader, a graphics card in software
        pytest.param(SOFTWARE_GPU, "webgpu", 1e-5, id="webgpu", marks=pytest.mark.slow),
    ],
)
def test_features_agree_with_onnx_runtime_in_python(
    start: Any, url: str, options: list[str], device: str, tolerance: float
) -> None:
    page = start(options).new_page()
    page.goto(url + "settings.json")
    scene = encoded(ShapesDataset(image_px=256).scene("test", 5).render().image)
    for name in ("shapes-sft", "shapes-dpo"):
        answer = page.evaluate(ENCODE, [base64.b64encode(scene).decode(), f"models/{name}/", "runtime/"])
        assert answer["device"] == device
        expected = python_features(PAGE / "models" / name, scene)
        features = floats(answer["features"]).reshape(expected.shape)
        assert np.linalg.norm(features - expected) < tolerance * np.linalg.norm(expected)


COLOURS = (
    "async (encoders) => {"
    + TO_BASE64
    + """
  const { principalColours, similarity } = await import("/features.js");
  const read = async ({ features, width }) => ({
    width,
    features: new Float32Array(await (await toBlob(features)).arrayBuffer()),
  });
  const all = await Promise.all(encoders.map(read));
  const { colours, share, joint } = principalColours(all);
  return { colours: colours.map((c) => [...c]), share, joint, alike: toBase64(similarity(all[0], 7)) };
}"""
)


def test_colours_and_similarities_are_those_of_python(modules: Any) -> None:
    rng = np.random.default_rng(0)

    def tokens(grid: int, width: int) -> np.ndarray:
        """Features with a spectrum that falls, as those of encoders do."""
        mixed = rng.normal(size=(grid * grid, width)) * 0.8 ** np.arange(width)
        return (mixed @ rng.normal(size=(width, width))).reshape(grid, grid, width).astype(np.float32)

    for encoders in ([tokens(8, 24), tokens(6, 24)], [tokens(8, 24), tokens(8, 40)], [tokens(5, 96)]):
        message = [{"features": base64.b64encode(e.tobytes()).decode(), "width": e.shape[-1]} for e in encoders]
        answer = modules.evaluate(COLOURS, message)
        colours, share, joint = principal_colours(encoders)
        assert answer["joint"] == joint
        assert answer["share"] == pytest.approx(share, rel=1e-5)
        for ours, expected in zip(answer["colours"], colours, strict=True):
            assert abs(np.array(ours).reshape(expected.shape) - expected.astype(int)).max() <= 1
        row, column = divmod(7, encoders[0].shape[1])
        assert floats(answer["alike"]) == pytest.approx(similarity(encoders[0], row, column).ravel(), abs=1e-5)


def on_page(maps: list[np.ndarray]) -> list[np.ndarray]:
    """Similarity maps as colours on their common scale, (H, W, 3) each."""
    low = min(float(m.min()) for m in maps)
    return [np.asarray(colour(m, "viridis", low, 1)).astype(int) for m in maps]


def check_maps(opened: Visit, features: list[np.ndarray], row: int, column: int) -> None:
    """Compare the colours of both panels with Python's, except under the frame of the chosen patch."""
    expected = on_page([similarity(f, row, column) for f in features])
    for side, image in zip(("left", "right"), expected, strict=True):
        assert abs(opened.colours(side, len(image)) - image).max() < 6, side  # viridis in 17 steps


def test_the_visitors_own_picture_by_mouse_and_keyboard(visit: Any, tmp_path: Path) -> None:
    """Both maps are Python's, on one scale; the link names the models, and nothing of the picture."""
    opened = visit().open()
    page = opened.page
    scene = encoded(ShapesDataset(image_px=256).scene("test", 9).render().image.resize((320, 200)))
    (tmp_path / "mine.png").write_bytes(scene)
    opened.act(lambda: page.set_input_files("#file", tmp_path / "mine.png"))
    opened.opaque()
    features = [python_features(PAGE / "models" / name, scene) for name in ("shapes-sft", "shapes-dpo")]
    check_maps(opened, features, 4, 4)
    assert opened.text("hint").startswith("The models of this page know simple drawings only.")
    assert parse_qs(urlparse(page.url).query) == {"left": ["shapes-sft"], "right": ["shapes-dpo"]}
    box = page.locator("#right").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 2.5 / 8, box["y"] + box["height"] * 6.5 / 8)
    check_maps(opened, features, 6, 2)
    assert opened.text("says").startswith("Row 7, column 3 of 8. The models ")
    gaps = abs(similarity(features[0], 6, 2) - similarity(features[1], 6, 2))
    assert f"by {gaps.mean():.2f} on average, by {gaps.max():.2f} at most" in opened.text("says")
    low = min(similarity(f, 6, 2).min() for f in features)
    assert opened.text("low") == f"different ({low:.2f})".replace("-", "−")  # noqa: RUF001 (as typeset)
    page.focus("#left")
    for key in ("ArrowUp", "ArrowUp", "ArrowRight", "ArrowDown", *["ArrowLeft"] * 9):
        page.keyboard.press(key)
    check_maps(opened, features, 5, 0)
    assert opened.text("says").startswith("Row 6, column 1 of 8.")
    opened.act(lambda: page.check("[name=show][value=colours]", force=True))
    assert opened.text("says").startswith("Both models share their colours")
    colours, share, _ = principal_colours(features)
    for side, expected in zip(("left", "right"), colours, strict=True):
        assert abs(opened.colours(side, 8) - expected.astype(int)).max() <= 2
    page.click("text=What do I see?")
    assert f"hold {round(100 * share)}% of what differs" in opened.text("basis")
    assert "processor" in opened.text("device")
    assert not page.is_visible("#scale")


@pytest.mark.slow
def test_a_picture_is_pasted_and_dropped(visit: Any) -> None:
    opened = visit().open()
    give = """([event, text]) => {
      const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
      const data = new DataTransfer();
      data.items.add(new File([bytes], "mine.png", { type: "image/png" }));
      const options = { bubbles: true, cancelable: true };
      document.body.dispatchEvent(
        event === "paste"
          ? new ClipboardEvent("paste", { ...options, clipboardData: data })
          : new DragEvent("drop", { ...options, dataTransfer: data }),
      );
    }"""
    for event, image in (("paste", noise(100, 50)), ("drop", noise(50, 100))):
        opened.act(lambda event=event, image=image: opened.page.evaluate(give, [event, as_text(image)]))
        shape = opened.page.evaluate("[left.width, left.height]")
        assert shape[0] / shape[1] == image.width / image.height


def as_text(image: Image.Image) -> str:
    return base64.b64encode(encoded(image)).decode()


def test_a_link_restores_models_picture_spot_and_view(visit: Any) -> None:
    query = "?left=shapes-dpo&right=shapes-sft&show=colours&picture=2&spot=0.062,0.938"
    opened = visit(query).open()
    assert opened.page.url.endswith(query)
    assert [opened.text("title-left"), opened.text("title-right")] == ["DPO", "SFT"]
    assert opened.page.is_checked("[name=show][value=colours]")
    assert opened.page.get_attribute("#pictures button:nth-child(2)", "aria-pressed") == "true"
    opened.act(lambda: opened.page.check("[name=show][value=alike]", force=True))
    assert opened.text("says").startswith("Row 8, column 1 of 8.")
    assert opened.text("lead-alike").startswith("Tap a spot.")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Encoders of the Hub, sound and unsound, by name."""
    folder = tmp_path_factory.mktemp("published")
    centre = {**CROPPED, "size": {"shortest_edge": 54}, "crop_size": {"height": 48, "width": 48}}
    encoders = {
        "me/clip": write_encoder(folder / "clip", centre, prefix=1),
        "me/registers": write_encoder(folder / "registers", centre, width=40, prefix=5),
        "me/fine": write_encoder(folder / "fine", HALF, patch=4, prefix=0),
        "me/external": write_encoder(folder / "external", HALF, prefix=0, external=True),
        "me/text": write_encoder(folder / "text", HALF, names=("input_ids", "last_hidden_state")),
        "me/classes": write_encoder(folder / "classes", HALF, names=("pixel_values", "logits")),
        "me/tokens": write_encoder(folder / "tokens", HALF, prefix=11),
        "me/tiles": write_encoder(folder / "tiles", {**HALF, "size": {"longest_edge": 48}}),
        "me/plain": write_encoder(folder / "plain", HALF),
        "me/broken": write_encoder(folder / "broken", HALF),
    }
    (folder / "plain" / "onnx" / "model.onnx").unlink()
    (folder / "broken" / "onnx" / "model.onnx").write_bytes(b"<html>not a model</html>")
    return encoders


@pytest.mark.slow
def test_a_visitor_with_a_photo_is_offered_models_for_photos(
    visit: Any, published: dict[str, Path], tmp_path: Path
) -> None:
    names = ["onnx-community/dinov2-small", "onnx-community/dinov3-vits16-pretrain-lvd1689m-ONNX"]
    opened = visit(size=PHONE).hub({names[0]: published["me/clip"], names[1]: published["me/external"]}).open()
    assert not opened.page.is_visible("#hint")
    (tmp_path / "mine.jpg").write_bytes(encoded(noise(300, 400), "JPEG"))
    opened.act(lambda: opened.page.set_input_files("#file", tmp_path / "mine.jpg"))
    opened.act(lambda: opened.page.click("#for-photos"))
    assert [opened.text("title-left"), opened.text("title-right")] == names
    assert not opened.page.is_visible("#error")
    assert not opened.page.is_visible("#hint")


def test_encoders_of_the_hub_are_named_in_the_link(visit: Any, published: dict[str, Path], tmp_path: Path) -> None:
    """CLS and registers are dropped, and each encoder of another width has colours of its own."""
    opened = visit("?left=me/clip&right=me/registers").hub(published).open()
    page = opened.page
    assert opened.text("title-left") == "me/clip"
    picture = encoded(noise(200, 100, 9))
    (tmp_path / "mine.png").write_bytes(picture)
    opened.act(lambda: page.set_input_files("#file", tmp_path / "mine.png"))
    assert not page.is_visible("#hint")
    assert re.search(r"\?left=me/clip&right=me/registers$", page.url)
    opened.opaque()
    features = [python_features(published[n], picture, "BitImageProcessorPil") for n in ("me/clip", "me/registers")]
    row, column = 3, 3
    expected = on_page([similarity(f, row, column) for f in features])
    for side, image in zip(("left", "right"), expected, strict=True):
        # The crop is 48 of 108 pixels wide, and 48 of 54 high.
        uri = page.evaluate(f"document.getElementById('{side}').toDataURL()")
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as shown:
            pixels = np.asarray(shown.convert("RGB")).astype(int)
        height, width = pixels.shape[:2]
        rows = ((3 + 8 * (np.arange(6) + 0.5)) / 54 * height).astype(int)
        columns = ((30 + 8 * (np.arange(6) + 0.5)) / 108 * width).astype(int)
        assert abs(pixels[rows[:, None], columns[None]] - image).max() < 6, side
        assert pixels[height // 2, width // 10].mean() < 0.5 * np.asarray(noise(200, 100, 9)).mean(), "not dimmed"
    opened.act(lambda: page.check("[name=show][value=colours]", force=True))
    assert opened.text("says") == "Each model has its own colours: compare shapes, not colours."
    opened.choose("me/clip", "me/fine")
    opened.act(lambda: page.check("[name=show][value=alike]", force=True))
    assert "different squares: 6 × 6 and 12 × 12" in opened.text("says")  # noqa: RUF001 (as typeset)
    opened.choose("me/external", "me/fine")
    assert not page.is_visible("#error"), opened.text("error")
    assert any(u.endswith("me/external/resolve/main/onnx/model.onnx_data") for _, u in opened.requests)


def test_an_unusable_model_or_picture_is_one_sentence(visit: Any, published: dict[str, Path], tmp_path: Path) -> None:
    statuses = {
        "me/none": (401, "RepoNotFound"),
        "me/gated": (403, "GatedRepo"),
        "me/busy": (503, ""),
    }
    opened = visit().hub(published, statuses).open()
    expected = {
        "me/plain": "me/plain has no onnx/model.onnx; its owner can add it with “pivot push --also onnx”.",
        "me/none": "There is no public model me/none on huggingface.co.",
        "me/gated": "me/gated is open only to people who accepted its terms, so this page cannot read it.",
        "me/busy": "huggingface.co answers 503 for me/busy: try again later.",
        "me/text": "me/text needs more than a picture (input_ids), so this page cannot run it.",
        "me/classes": "me/classes returns logits and no last_hidden_state, so it has no patches to compare.",
        "me/tokens": "me/tokens does not return a square of patches (47), so this page cannot draw it.",
        "me/tiles": 'me/tiles prepares pictures in a way this page does not know: size is {"longest_edge":48}.',
        "shapes": "“shapes” is not a model's name: write owner/name, as on the Hub.",
        "../../x": "“../../x” is not a model's name: write owner/name, as on the Hub.",
    }
    for name, message in expected.items():
        opened.choose(name, "shapes-dpo")
        assert opened.text("error") == message
        assert opened.text("says") == ""
    opened.choose("me/broken", "shapes-dpo")
    assert opened.text("error").startswith("This browser cannot run me/broken: ")
    assert opened.text("error").endswith(".")
    opened.choose("shapes-sft", "shapes-dpo")
    assert not opened.page.is_visible("#error")
    assert opened.text("says").startswith("Row ")
    (tmp_path / "text.png").write_text("This is no picture.")
    opened.page.set_input_files("#file", tmp_path / "text.png")
    opened.page.wait_for_selector("#error:not([hidden])")
    assert opened.text("error") == "This browser cannot open that file as a picture: try a JPEG or a PNG."
    opened.wait()
    assert opened.text("says").startswith("Row "), "what was shown before is gone"


@pytest.mark.slow
def test_a_host_that_does_not_answer_is_one_sentence(visit: Any, page_folder: Path, url: str) -> None:
    opened = visit("?left=me/clip")
    opened.context.route(f"{HUB}**", lambda route: route.abort())
    opened.open()
    assert opened.text("error") == "huggingface.co does not answer: check your connection and try again."
    offline = visit()
    offline.context.route(f"{url}runtime/**", lambda route: route.abort())
    offline.open()
    assert "The part that runs models could not be loaded" in offline.text("error")


@pytest.mark.slow
def test_threads_and_a_runtime_of_another_host(visit: Any, page_folder: Path, tmp_path: Path) -> None:
    """As on the Hub: its headers allow threads, and ONNX Runtime Web comes from a host of its own."""
    headers = SpaceCard.load(PAGE / "README.md").data["custom_headers"]
    shutil.copytree(PAGE, tmp_path / "page")
    settings = json.loads((PAGE / "settings.json").read_text())
    with (
        serve(page_folder, {"Access-Control-Allow-Origin": "*"}) as other,
        serve(tmp_path / "page", headers) as home,
    ):
        other = other.replace("127.0.0.1", "localhost")
        (tmp_path / "page" / "settings.json").write_text(json.dumps(settings | {"runtime": f"{other}runtime/"}))
        opened = visit(at=home, others=(other,)).open()
        assert opened.page.evaluate("crossOriginIsolated")
        assert opened.text("says").startswith("Row 3, column 4 of 8. The models differ")
        assert any(u.startswith(other) for _, u in opened.requests)


@pytest.mark.parametrize(
    ("size", "scheme"),
    [pytest.param(DESKTOP, "light", id="desktop"), pytest.param(PHONE, "dark", id="phone", marks=pytest.mark.slow)],
)
def test_the_page_is_accessible(visit: Any, axe: str, size: dict[str, int], scheme: str) -> None:
    opened = visit("", size, scheme).open()
    page = opened.page
    shown = page.evaluate("[...document.querySelectorAll('h1, #left')].map(e => e.getBoundingClientRect().bottom)")
    assert max(shown) < size["height"], "the first panel is not in sight"
    page.evaluate("document.querySelectorAll('details').forEach(d => (d.open = true))")
    page.evaluate("document.getElementById('hint').hidden = document.getElementById('error').hidden = false")
    page.evaluate("document.getElementById('error').textContent = 'An error.'")
    page.evaluate(axe)
    report = page.evaluate("axe.run()")
    assert [(v["id"], [n["html"] for n in v["nodes"]]) for v in report["violations"]] == []
    page.evaluate("document.activeElement?.blur()")
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name || ''"))
    assert {"show", "file", "left", "right", "name-left", "name-right", "strength"} <= set(reached)
