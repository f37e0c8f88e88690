"""The Space for programs: endpoints, MCP, who may read what, ZeroGPU; the page itself is in test_space_browser.py."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pivot_hub.data.synthetic import ShapesDataset
from pivot_hub.demo.comparison import compare, scene_subject
from pivot_hub.demo.launch import load_module, names_of_runs
from pivot_hub.demo.model_bundle import BundleNames, shipped_bundle
from pivot_hub.demo.view_state import ViewState
from pivot_hub.errors import CheckpointError


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    module = load_module()
    app = module.build_app()
    _, address, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **module.LAUNCH)
    yield address.rstrip("/")
    app.close()


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    from gradio_client import Client

    return Client(url, verbose=False)


def test_endpoints_are_typed_and_documented(client: Any) -> None:
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert set(endpoints) == {"/look", "/patches", "/words"}
    for name, endpoint in endpoints.items():
        assert endpoint["description"], name
        for parameter in endpoint["parameters"]:
            assert parameter["parameter_has_default"], parameter
            assert parameter["python_type"]["type"] not in ("", "Any"), parameter
            assert parameter["label"], parameter
    assert "viridis" in str(endpoints["/look"])


def test_look_gives_the_numbers_of_the_package(client: Any) -> None:
    figure, numbers = client.predict(scene=11, ask="position", explain="dpo", layer=2, api_name="/look")
    pair = shipped_bundle()
    made = compare(pair, scene_subject(ShapesDataset(image_px=64), 11, "position"), "dpo", 2)
    for model, view in zip(numbers["models"], (made.first, made.second), strict=True):
        assert model["answer"] == view.answer
        for method, grid in view.maps.items():
            assert np.allclose(model["maps"][method], grid, rtol=1e-3, atol=1e-6)
    assert numbers["question"] == "Where is the green triangle?"
    with Image.open(figure) as drawn:
        assert drawn.width > 1000


def test_patches_and_words(client: Any, tmp_path: Path) -> None:
    from gradio_client import handle_file

    Image.effect_noise((80, 60), 80).convert("RGB").save(tmp_path / "mine.png")
    file = handle_file(tmp_path / "mine.png")
    made = client.predict(picture=file, row=2, column=6, api_name="/patches")
    grid = np.array(made["models"][0]["similarity"])
    assert grid.shape == (8, 8)
    assert grid[2, 6] == pytest.approx(1, abs=1e-3)
    assert np.array(made["models"][1]["rgb"]).shape == (8, 8, 3)
    said = client.predict(scene=27, method="gradient", api_name="/words")
    assert "".join(t["text"] for t in said["models"][0]["tokens"]).startswith("It is teal.")
    assert np.array(said["models"][1]["tokens"][0]["map"]).shape == (8, 8)
    figure, numbers = client.predict(picture=file, question="What is it?", api_name="/look")
    assert numbers["models"][0]["explained"] == numbers["models"][0]["answer"]
    with Image.open(figure) as drawn:
        assert drawn.width > 1000


def test_what_is_wrong_is_told_and_the_app_lives_on(client: Any, tmp_path: Path) -> None:
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    (tmp_path / "text.png").write_text("no picture")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"picture": handle_file(tmp_path / "text.png")}, "is not an image"),
        ({"question": "why " * 2500}, "10,000 characters"),
        ({"ask": "taste"}, "ask is 'taste'"),
        ({"scene": -1}, "lies between 0"),
        ({"layer": 10**12}, "lies between 0"),
        ({"first": "../../etc", "second": "/root"}, "names no MLLM"),
        ({"picture": handle_file(tmp_path / "text.png"), "question": ""}, "is not an image"),
    ]
    for given, said in cases:
        with pytest.raises(AppError) as told:
            client.predict(**given, api_name="/look")
        assert said in str(told.value)
        assert "Traceback" not in str(told.value)
        assert str(tmp_path) not in str(told.value)
    client.predict(api_name="/look")


def post(url: str, body: Any) -> tuple[int, str]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def call_patches(url: str, picture: Any) -> str:
    """What the server says when it is asked without any client."""
    status, said = post(f"{url}/gradio_api/call/patches", {"data": [picture, 1, 2, 3, "", "", ""]})
    if status != 200:
        return said
    with urllib.request.urlopen(f"{url}/gradio_api/call/patches/{json.loads(said)['event_id']}", timeout=30) as answer:
        return str(answer.read().decode())


def upload(url: str, name: str) -> str:
    """Upload a PNG under a name of the visitor's; where the server says that it put it."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    head = f'--pivot\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
    body = f"{head}Content-Type: image/png\r\n\r\n".encode() + file.getvalue() + b"\r\n--pivot--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=pivot"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{url}/gradio_api/upload", body, headers), timeout=30
    ) as answer:
        return str(json.loads(answer.read())[0])


def test_nothing_outside_the_upload_folder_is_read(url: str, tmp_path: Path) -> None:
    """A path of the server's own in place of an upload, and in place of a page."""
    meta = {"meta": {"_type": "gradio.FileData"}}
    assert "similarity" in call_patches(url, {"path": upload(url, "mine.png"), **meta}), "a real upload is read"
    Image.new("RGB", (8, 8), "red").save(tmp_path / "secret.png")
    for path in (str(tmp_path / "secret.png"), "/etc/passwd", "../../../etc/passwd", str(Path(__file__).resolve())):
        for picture in ({"path": path, **meta}, {"path": path}, {"path": path, "url": f"file://{path}", **meta}, path):
            said = call_patches(url, picture)
            assert "event: error" in said
            assert "similarity" not in said
            assert "Traceback" not in said
            assert "site-packages" not in said
        for page in (f"/gradio_api/file={path}", f"/file={path}", f"/static/{path}", f"/gradio_api/file%3D{path}"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(url + page, timeout=30)
            assert refused.value.code in (400, 403, 404, 405)
            assert "root:" not in refused.value.read().decode()


def test_names_of_uploads_are_no_paths(url: str, tmp_path: Path) -> None:
    stored = upload(url, f"../../../../../../../..{tmp_path}/escaped.png")
    assert ".." not in stored
    assert not (tmp_path / "escaped.png").exists()


def test_mcp_offers_the_same(url: str) -> None:
    pytest.importorskip("mcp", reason="mcp is not installed: pip install 'pivot-hub[space]'")
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def ask() -> tuple[Any, Any]:
        async with (
            streamablehttp_client(f"{url}/gradio_api/mcp/") as (reader, writer, _),
            ClientSession(reader, writer) as session,
        ):
            await session.initialize()
            return await session.list_tools(), await session.call_tool("words", {"scene": 27})

    tools, words = asyncio.run(ask())
    by_name = {t.name: t for t in tools.tools}
    assert {"look", "patches", "words"} <= set(by_name)
    assert "SFT" in by_name["look"].description
    assert "viridis, cividis or magma" in json.dumps(by_name["look"].inputSchema)
    assert not words.isError
    assert "teal" in str(words.content)


def test_zero_gpu_lends_its_gpu_to_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its decorator wraps the functions that run models; a folder named `spaces`, as a checkout has, is not it."""
    lent: list[str] = []

    def gpu(run: Any) -> Any:
        def wrapped(*given: Any) -> Any:
            lent.append(run.__name__)
            return run(*given)

        return wrapped

    fake = types.ModuleType("spaces")
    fake.GPU = gpu  # type: ignore[attr-defined]
    fake.__spec__ = ModuleSpec("spaces", None, origin="spaces/__init__.py")
    monkeypatch.setitem(sys.modules, "spaces", fake)
    module = load_module()
    assert module.on_gpu is gpu
    viewer = module.Viewer(module.BundleCache(), module.Panels(module.HERE), module.on_gpu)
    seen = viewer.see(ViewState(closer="words"))
    viewer.closer(seen)
    viewer.patch_numbers(seen)
    assert lent == ["compare_named", "tokens_named", "patches_named"]
    monkeypatch.delitem(sys.modules, "spaces")
    assert load_module().on_gpu is not gpu


def test_missing_stages_are_named(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no finished 2-instruct: run `pivot quickstart` first"):
        names_of_runs(tmp_path)
    assert names_of_runs(trained) == BundleNames(*(str(trained / s) for s in ("3-sft", "3-dpo", "2-instruct")))


def test_app_over_trained_stages(trained: Path) -> None:
    from gradio_client import Client

    module = load_module()
    app = module.build_app(names_of_runs(trained), trained)
    _, address, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **module.LAUNCH)
    try:
        client = Client(address, verbose=False)
        _, numbers = client.predict(scene=3, ask="colour", explain="dpo", api_name="/look")
        _, swapped = client.predict(scene=3, ask="colour", first="3-dpo", second="3-sft", api_name="/look")
    finally:
        app.close()
    assert [m["name"] for m in numbers["models"]] == ["3-sft", "3-dpo"]
    assert [m["name"] for m in swapped["models"]] == ["3-dpo", "3-sft"]


def test_the_command_serves_it() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pivot_hub", "space", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == f"http://127.0.0.1:{port}"
            for _ in range(240):
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5) as page:
                        assert "What did DPO change?" in page.read().decode()
                        break
                except OSError:
                    assert process.poll() is None
                    time.sleep(0.5)
            else:
                pytest.fail("the app did not answer")
        finally:
            process.terminate()
