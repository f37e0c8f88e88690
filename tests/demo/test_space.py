"""The Space for programs: endpoints, MCP, access to files, ZeroGPU. test_browser.py tests the page itself."""

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
from pivot_hub.demo.model_bundle import BundleNames
from pivot_hub.demo.packed_bundle import shipped_bundle
from pivot_hub.demo.page_layout import TITLE
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
    assert set(endpoints) == {"/compare", "/patch_features", "/token_attribution", "/encoders"}
    for name, endpoint in endpoints.items():
        assert endpoint["description"], name
        for parameter in endpoint["parameters"]:
            assert parameter["parameter_has_default"], parameter
            assert parameter["python_type"]["type"] not in ("", "Any"), parameter
            assert parameter["label"], parameter
    assert "viridis" in str(endpoints["/compare"])


def test_compare_returns_the_numbers_of_the_package(client: Any) -> None:
    figure, numbers = client.predict(scene=11, kind="position", explain="dpo", layer=2, api_name="/compare")
    subject = scene_subject(ShapesDataset(image_px=64), 11, "position")
    comparison = compare(shipped_bundle(), subject, "dpo", 2)
    for model, result in zip(numbers["models"], comparison.results, strict=True):
        assert model["answer"] == result.answer
        for method, grid in result.maps.items():
            assert np.allclose(model["maps"][method], grid, rtol=1e-3, atol=1e-6)
    assert numbers["question"] == "Where is the green triangle?"
    with Image.open(figure) as drawn:
        assert drawn.width > 1000


def test_patch_features_and_token_attribution(client: Any, tmp_path: Path) -> None:
    from gradio_client import handle_file

    Image.effect_noise((80, 60), 80).convert("RGB").save(tmp_path / "mine.png")
    file = handle_file(tmp_path / "mine.png")
    patches = client.predict(image=file, row=2, column=6, api_name="/patch_features")
    grid = np.array(patches["models"][0]["similarity"])
    assert grid.shape == (8, 8)
    assert grid[2, 6] == pytest.approx(1, abs=1e-3)
    assert np.array(patches["models"][1]["rgb"]).shape == (8, 8, 3)
    attribution = client.predict(scene=27, kind="colour", method="gradient", api_name="/token_attribution")
    assert "".join(t["text"] for t in attribution["models"][0]["tokens"]).startswith("It is teal.")
    assert np.array(attribution["models"][1]["tokens"][0]["map"]).shape == (8, 8)
    figure, numbers = client.predict(image=file, question="What is it?", api_name="/compare")
    assert numbers["models"][0]["explained"] == numbers["models"][0]["answer"]
    with Image.open(figure) as drawn:
        assert drawn.width > 1000


def test_encoders_are_compared(client: Any, tmp_path: Path) -> None:
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    Image.effect_noise((80, 60), 80).convert("RGB").save(tmp_path / "mine.png")
    file = handle_file(tmp_path / "mine.png")
    options = {"view": "matching", "layers": "2,-1", "row": 2, "column": 6, "api_name": "/encoders"}
    figure, numbers = client.predict(image=file, other_image=file, **options)
    assert [e["layer"] for e in numbers["encoders"]] == ["2", "6"]
    assert numbers["encoders"][1]["matches"][0] == {"row": 2, "column": 6, "similarity": pytest.approx(1, abs=1e-3)}
    with Image.open(figure) as drawn:
        assert drawn.width > 1000
    with pytest.raises(AppError, match="layer is 40: it must be between -7 and 6"):
        client.predict(layers="40,1", api_name="/encoders")


def test_bad_input_gets_a_message_and_the_app_keeps_running(client: Any, tmp_path: Path) -> None:
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    (tmp_path / "text.png").write_text("not an image")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image": handle_file(tmp_path / "text.png")}, "is not an image"),
        ({"question": "why " * 2500}, "10,000 characters"),
        ({"kind": "taste"}, "kind is 'taste'"),
        ({"scene": -1}, "must be between 0"),
        ({"layer": 10**12}, "must be between 0"),
        ({"layer": 99}, "layer is 99: it must be between 0 and 5"),
        ({"scene": "x"}, "scene is 'x': it must be a whole number"),
        ({"scene": 2.7}, "scene is '2.7': it must be a whole number"),
        ({"scene": None}, "scene is empty: give a whole number"),
        ({"image": "/etc/passwd"}, "has to be uploaded to this app first"),
        ({"first": "../../etc", "second": "/root"}, "names no MLLM"),
        ({"image": handle_file(tmp_path / "text.png"), "question": ""}, "is not an image"),
    ]
    for parameters, message in cases:
        with pytest.raises(AppError) as raised:
            client.predict(**parameters, api_name="/compare")
        assert message in str(raised.value)
        assert "Traceback" not in str(raised.value)
        assert str(tmp_path) not in str(raised.value)
    client.predict(api_name="/compare")


def post(url: str, body: Any) -> tuple[int, str]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def call_patch_features(url: str, image: Any) -> str:
    """Call an endpoint by plain HTTP, without a client that might correct the request; return the response."""
    endpoint = f"{url}/gradio_api/call/patch_features"
    status, text = post(endpoint, {"data": [image, 1, 2, 3, "", "", ""]})
    if status != 200:
        return text
    with urllib.request.urlopen(f"{endpoint}/{json.loads(text)['event_id']}", timeout=30) as response:
        return str(response.read().decode())


def upload(url: str, name: str) -> str:
    """Upload a PNG under any file name; return the path at which the server says it stored the file."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    header = f'--pivot\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
    body = f"{header}Content-Type: image/png\r\n\r\n".encode() + file.getvalue() + b"\r\n--pivot--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=pivot"}
    request = urllib.request.Request(f"{url}/gradio_api/upload", body, headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        return str(json.loads(response.read())[0])


def test_nothing_outside_the_upload_folder_is_read(url: str, tmp_path: Path) -> None:
    """Paths of the server's own files are refused in place of an upload, and in place of a page."""
    meta = {"meta": {"_type": "gradio.FileData"}}
    assert "similarity" in call_patch_features(url, {"path": upload(url, "mine.png"), **meta}), "a real upload is read"
    Image.new("RGB", (8, 8), "red").save(tmp_path / "secret.png")
    for path in (str(tmp_path / "secret.png"), "/etc/passwd", "../../../etc/passwd", str(Path(__file__).resolve())):
        for image in ({"path": path, **meta}, {"path": path}, {"path": path, "url": f"file://{path}", **meta}, path):
            response = call_patch_features(url, image)
            assert "event: error" in response
            assert "null" not in response
            assert "upload" in response
            assert "similarity" not in response
            assert "Traceback" not in response
            assert "site-packages" not in response
        for page in (f"/gradio_api/file={path}", f"/file={path}", f"/static/{path}", f"/gradio_api/file%3D{path}"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(url + page, timeout=30)
            assert refused.value.code in (400, 403, 404, 405)
            assert "root:" not in refused.value.read().decode()


def test_names_of_uploads_are_no_paths(url: str, tmp_path: Path) -> None:
    stored = upload(url, f"../../../../../../../..{tmp_path}/escaped.png")
    assert ".." not in stored
    assert not (tmp_path / "escaped.png").exists()


def test_mcp_offers_the_same_endpoints(url: str) -> None:
    pytest.importorskip("mcp", reason="mcp is not installed: pip install 'pivot-hub[space]'")
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def call_tools() -> tuple[Any, Any]:
        async with (
            streamablehttp_client(f"{url}/gradio_api/mcp/") as (reader, writer, _),
            ClientSession(reader, writer) as session,
        ):
            await session.initialize()
            return await session.list_tools(), await session.call_tool(
                "token_attribution", {"scene": 27, "kind": "colour"}
            )

    tools, attribution = asyncio.run(call_tools())
    by_name = {t.name: t for t in tools.tools}
    assert {"compare", "patch_features", "token_attribution", "encoders"} <= set(by_name)
    assert "SFT" in by_name["compare"].description
    assert "viridis, cividis or magma" in json.dumps(by_name["compare"].inputSchema)
    assert not attribution.isError
    assert "teal" in str(attribution.content)


def test_zero_gpu_wraps_the_functions_that_run_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decorator of the package `spaces` is used; a folder of this name, as in a checkout, is ignored."""
    calls: list[str] = []

    def gpu(function: Any) -> Any:
        def wrapped(*arguments: Any) -> Any:
            calls.append(function.__name__)
            return function(*arguments)

        return wrapped

    fake = types.ModuleType("spaces")
    fake.GPU = gpu  # type: ignore[attr-defined]
    fake.__spec__ = ModuleSpec("spaces", None, origin="spaces/__init__.py")
    monkeypatch.setitem(sys.modules, "spaces", fake)
    module = load_module()
    assert module.on_gpu is gpu
    service = module.DemoService(module.BundleCache(), module.Panels(module.HERE), module.on_gpu)
    view = service.compare(ViewState(details="tokens"))
    service.details_panel(view)
    service.patch_numbers(view)
    assert calls == ["compare_by_name", "tokens_by_name", "patches_by_name"]
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
        _, numbers = client.predict(scene=3, kind="colour", explain="dpo", api_name="/compare")
        _, swapped = client.predict(scene=3, kind="colour", first="3-dpo", second="3-sft", api_name="/compare")
    finally:
        app.close()
    assert [m["name"] for m in numbers["models"]] == ["3-sft", "3-dpo"]
    assert [m["name"] for m in swapped["models"]] == ["3-dpo", "3-sft"]


def test_the_command_serves_the_app() -> None:
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
                        assert TITLE in page.read().decode()
                        break
                except OSError:
                    assert process.poll() is None
                    time.sleep(0.5)
            else:
                pytest.fail("the app did not answer")
        finally:
            process.terminate()
