"""Exports: ONNX gives the same features for every backbone, int8 costs little, and failed exports are not kept."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pivot_hub.cli import app
from pivot_hub.config.recipe import RECIPES
from pivot_hub.encoder import export
from pivot_hub.encoder.export import OnnxEncoder, export_encoder, load_quanto
from pivot_hub.encoder.repository import read_encoder
from pivot_hub.errors import ExportError, OutputError
from pivot_hub.probes.run import Sizes, probe_shapes
from tests.encoder.originals import IMAGE_PX, ORIGINALS, make_vision


def quiet(line: str) -> None: ...


# The graphs of three backbones differ most; the others are exported in the long tests.
@pytest.mark.parametrize(
    "kind",
    [
        k if k in ("siglip2", "dinov2-registers", "aimv2") else pytest.param(k, marks=pytest.mark.slow)
        for k in ORIGINALS
    ],
)
@torch.no_grad()
def test_onnx_gives_the_features_of_torch_for_any_batch(kind: str, tmp_path: Path) -> None:
    source = make_vision(tmp_path / "original", kind)
    report = export_encoder(source, tmp_path / "out", log=quiet)
    assert max(report["files"]["onnx/model.onnx"]["relative_error"].values()) < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "onnx" / "model.onnx"))
    assert [o.name for o in session.get_outputs()] == ["last_hidden_state", "pooler_output"]
    encoder, processor = read_encoder(source)
    for batch in (1, 4):
        images = [Image.effect_noise((50, 40 + i), 90).convert("RGB") for i in range(batch)]
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        tokens, pooled = session.run(None, {"pixel_values": pixels.numpy()})
        expected = encoder(pixels)
        np.testing.assert_allclose(tokens, expected.last_hidden_state.numpy(), atol=1e-4)
        np.testing.assert_allclose(pooled, expected.pooler_output.numpy(), atol=1e-4)


def test_int8_and_fp16_are_compared_with_float32(tmp_path: Path) -> None:
    base = RECIPES / "shapes" / "base" / "vision"
    probe = partial(probe_shapes, sizes=Sizes(train=200, validation=60, test=100))
    image = Image.effect_noise((99, 70), 50)
    report = export_encoder(base, tmp_path / "out", fp16=True, int8=True, images=[image], probe=probe, log=quiet)
    assert json.loads(json.dumps(report)) == json.loads((tmp_path / "out" / "export.json").read_text())
    assert report["pictures"] == 6
    files = report["files"]
    assert list(files) == [
        "onnx/model.onnx",
        "onnx/model_fp16.onnx",
        "onnx/model_quantized.onnx",
        "quanto/model.safetensors",
    ]
    errors = [max(f["relative_error"].values()) for f in files.values()]
    assert errors[0] < 1e-5 < errors[1] < 5e-3  # features as exact as float32 would not be float16
    assert min(errors[2:]) > 1e-3
    assert max(errors[2:]) < 5e-2
    weights = (base / "model.safetensors").stat().st_size
    assert files["quanto/model.safetensors"]["bytes"] < weights / 3
    halves = {i.data_type for i in onnx.load(tmp_path / "out" / "onnx" / "model_fp16.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in halves
    quantised = {n.op_type for n in onnx.load(tmp_path / "out" / "onnx" / "model_quantized.onnx").graph.node}
    assert "MatMulInteger" in quantised
    results = report["probe"]
    assert list(results) == ["torch", "onnx/model_quantized.onnx", "quanto/model.safetensors"]
    for form in list(results)[1:]:
        assert [r["task"] for r in results[form]] == [r["task"] for r in results["torch"]]
        assert [r["value"] for r in results[form]] != [r["value"] for r in results["torch"]]
        for own, exact in zip(results[form], results["torch"], strict=True):
            assert abs(own["value"] - exact["value"]) < 10, own["task"]


@torch.no_grad()
def test_exports_load_as_the_encoder(tmp_path: Path) -> None:
    source = make_vision(tmp_path / "original", "dinov2-registers")
    export_encoder(source, tmp_path / "out", int8=True, log=quiet)
    encoder, _ = read_encoder(source)
    pixels = torch.randn(2, 3, IMAGE_PX, IMAGE_PX)
    expected = encoder(pixels).last_hidden_state
    for exported, tolerance in ((OnnxEncoder(tmp_path / "out"), 1e-5), (load_quanto(tmp_path / "out"), 0.05)):
        assert exported.config.pivot == encoder.config.pivot
        assert (exported(pixels).last_hidden_state - expected).norm() / expected.norm() < tolerance
    images = [Image.effect_noise((50, 40), 90)]
    assert load_quanto(tmp_path / "out").forward_features(images).last_hidden_state.shape == (1, 16, 32)


def test_large_weights_are_stored_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protobuf files are limited to 2 GB; transformers.js reads further weights from NAME_data."""
    monkeypatch.setattr(export, "PROTOBUF_LIMIT", 1000)
    source = make_vision(tmp_path / "original", hidden_size=64)
    report = export_encoder(source, tmp_path / "out", log=quiet)
    assert (tmp_path / "out" / "onnx" / "model.onnx_data").stat().st_size > 100_000
    assert report["files"]["onnx/model.onnx"]["bytes"] > 100_000


def test_exporting_again_replaces_an_export_and_nothing_else(tmp_path: Path) -> None:
    source = make_vision(tmp_path / "original")
    for int8 in (True, False):
        export_encoder(source, tmp_path / "out", int8=int8, log=quiet)
    assert not (tmp_path / "out" / "quanto").exists()
    (tmp_path / "out" / "onnx" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds onnx/notes\.txt, which is not part of an export"):
        export_encoder(source, tmp_path / "out", log=quiet)
    with pytest.raises(OutputError, match="which is not part of an export"):
        export_encoder(source, source, log=quiet)


def test_an_export_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_vision(tmp_path / "original")
    write_onnx = export._write_onnx

    def write_wrong_weights(model: Any, path: Path) -> None:
        next(model.parameters()).data += 1e-2
        write_onnx(model, path)
        next(model.parameters()).data -= 1e-2

    monkeypatch.setattr(export, "_write_onnx", write_wrong_weights)
    with pytest.raises(ExportError, match="features differ from torch's by"):
        export_encoder(source, tmp_path / "out", log=quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["original"]


def test_a_missing_package_is_named_with_its_remedy() -> None:
    with pytest.raises(ExportError, match=r"no_such_module is not installed; run `pip install 'pivot-hub\[export\]'"):
        export._require_packages("json", "no_such_module")


def test_the_command_checks_on_the_users_images(tmp_path: Path) -> None:
    source = make_vision(tmp_path / "my-encoder")
    (tmp_path / "images").mkdir()
    Image.effect_noise((60, 50), 90).save(tmp_path / "images" / "a.png")
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["export", str(source), str(out), "--images", str(tmp_path / "images")])
    assert result.exit_code == 0, result.output
    report = json.loads((out / "export.json").read_text())
    assert report["pictures"] == 6
    assert report["encoder"] == "my-encoder"
    assert str(tmp_path) not in (out / "export.json").read_text()
    assert "relative error" in result.output
