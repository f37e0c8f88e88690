"""Every backbone's repository is loaded by other software, each in a separate environment."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel

from pivot_hub.encoder.export import export_encoder
from pivot_hub.encoder.repository import read_encoder
from tests.conformance.environment import ROOT, TORCHVISION, make_environment, make_node, run
from tests.conformance.table import PAGE, RESULTS, render, replace_table
from tests.encoder.originals import IMAGE_PX, ORIGINALS

DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
SUPPORTED = next(d for d in DEPENDENCIES if d.startswith("transformers"))
OLDEST = re.search(r">=([\d.]+)", SUPPORTED)
assert OLDEST is not None
# Plain transformers of both major versions, and the oldest and newest that this package itself supports.
TRANSFORMERS = {
    "transformers-4": ("transformers==4.57.6", "optimum-onnx[onnxruntime]==0.1.0"),
    "transformers-5-first": ("transformers==5.0.0",),
    "transformers-5-oldest": (f"transformers=={OLDEST[1]}.0",),
    "transformers-5-newest": (SUPPORTED,),
}
WITH_PACKAGE = ("transformers-5-oldest", "transformers-5-newest")
MAPS = "timm gives maps, LLaVA takes tokens"
NODE_PACKAGE = "@huggingface/transformers@4"
SCRIPT = Path(__file__).with_name("loading_paths.py")
SOFTWARE = (*TRANSFORMERS, "optimum", "optimum-intel", "transformers.js")  # see the fixture `record`


@pytest.mark.conformance
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_loading_path_gives_the_same_features(
    name: str, repositories: Path, timm_repository: Path, overlay: Path, record: dict[str, Any], tmp_path: Path
) -> None:
    python = make_environment(name, *TRANSFORMERS[name])
    package = ["--package"] if name in WITH_PACKAGE else []
    run(python, SCRIPT, repositories, tmp_path / "backbones.json", *package, path=str(ROOT) if package else "")
    path = f"{overlay}:{ROOT}" if package else str(overlay)
    run(python, SCRIPT, timm_repository, tmp_path / "timm.json", *package, path=path)
    report = json.loads((tmp_path / "backbones.json").read_text())
    timm = json.loads((tmp_path / "timm.json").read_text())
    print(name, report["versions"], timm["versions"])
    assert list(report["results"]) == sorted(ORIGINALS)
    timm["results"]["timm"]["llava"]["reason"] = MAPS
    report["results"] |= timm["results"]
    record[name] = report
    for kind, outcomes in report["results"].items():
        assert list(outcomes) == ["native", "remote", "llava", *(["package"] if package else [])]
        for loading_path, outcome in outcomes.items():
            if "reason" in outcome:
                continue
            assert "error" not in outcome, f"{kind}, {loading_path}: {outcome['error']}"
            assert outcome["difference"] < 1e-5, f"{kind}, {loading_path}"
        native_class = ORIGINALS[kind].native if kind in ORIGINALS else "TimmWrapperModel"
        assert outcomes["native"]["class"] == native_class
        assert outcomes["remote"]["class"] == "PivotVisionModel"


@pytest.mark.conformance
def test_weights_that_load_at_random_are_reported(originals: Path, repositories: Path, tmp_path: Path) -> None:
    """A SigLIP tower that transformers 5 itself saved loads in 4.57 with random weights and only a warning."""
    naive = tmp_path / "repositories" / "siglip"
    AutoModel.from_pretrained(originals / "siglip").save_pretrained(naive)
    for name in ("siglip.safetensors", "siglip/golden.safetensors"):
        (tmp_path / "repositories" / name).write_bytes((repositories / name).read_bytes())
    python = make_environment("transformers-4", *TRANSFORMERS["transformers-4"])
    run(python, SCRIPT, naive.parent, tmp_path / "report.json")
    outcome = json.loads((tmp_path / "report.json").read_text())["results"]["siglip"]["native"]
    assert "keys missing, unexpected" in outcome["error"]


@pytest.mark.conformance
def test_optimums_export_gives_the_same_features(repositories: Path, record: dict[str, Any], tmp_path: Path) -> None:
    """The ONNX file that optimum-onnx exports in its environment gives the native class's last hidden state."""
    import onnxruntime

    python = make_environment("transformers-4", *TRANSFORMERS["transformers-4"])
    results: dict[str, Any] = {}
    for kind in ORIGINALS:
        out = tmp_path / kind
        command = (python.with_name("optimum-cli"), "export", "onnx", "--task", "feature-extraction")
        done = run(*command, "--model", repositories / kind, out, check=False)
        if done.returncode != 0:
            assert "that is a custom or unsupported architecture" in done.stderr, done.stderr
            results[kind] = {"reason": "not in its table"}
            continue
        pixels = load_file(repositories / kind / "golden.safetensors")["pixel_values"]
        session = onnxruntime.InferenceSession(str(out / "model.onnx"))
        exported = session.run(["last_hidden_state"], {"pixel_values": pixels.numpy()})[0]
        with torch.no_grad():
            expected = AutoModel.from_pretrained(repositories / kind).eval()(pixels).last_hidden_state.numpy()
        results[kind] = {"difference": float(np.abs(exported - expected).max())}
        assert results[kind]["difference"] < 1e-4, kind
    assert {k for k, v in results.items() if "difference" in v} >= {"siglip", "siglip2", "clip", "dinov2", "vit", "mae"}
    listed = run(python, "-c", "import importlib.metadata as m; print(m.version('optimum-onnx'))")
    record["optimum"] = {"versions": {"optimum-onnx": listed.stdout.strip()}, "results": results}


@pytest.mark.conformance
def test_optimum_intels_export_gives_the_same_features(
    repositories: Path, record: dict[str, Any], tmp_path: Path
) -> None:
    # PyPI's torchvision, which optimum-intel names and does not need here, does not load beside a CPU build of torch.
    python = make_environment("openvino", "optimum-intel==2.2.0", TORCHVISION, without="torchvision")
    run(python, Path(__file__).with_name("openvino_export.py"), repositories, tmp_path / "exported")
    reasons = json.loads((tmp_path / "exported" / "reasons.json").read_text())
    results: dict[str, Any] = {}
    for kind in sorted(p.name for p in repositories.iterdir() if p.is_dir()):
        if kind in reasons:
            assert "unsupported architecture" in reasons[kind], reasons[kind]
            results[kind] = {"reason": "not in its table"}
            continue
        pixels = load_file(repositories / kind / "golden.safetensors")["pixel_values"]
        with torch.no_grad():
            expected = AutoModel.from_pretrained(repositories / kind).eval()(pixels).last_hidden_state.numpy()
        difference = float(np.abs(np.load(tmp_path / "exported" / f"{kind}.npy") - expected).max())
        results[kind] = {"difference": difference}
        assert difference < 1e-3, kind
    assert {k for k, v in results.items() if "difference" in v} >= {"clip"}
    record["optimum-intel"] = {"versions": {"optimum-intel": "2.2.0"}, "results": results}


@pytest.mark.conformance
def test_node_reads_the_export(originals: Path, record: dict[str, Any], tmp_path: Path) -> None:
    """The npm package @huggingface/transformers loads our export, and with its own image processor gives our features.

    The image has the encoder's size. DINOv2's processor resizes it all the same, before its crop, and Node resizes
    differently from PIL; therefore the features are compared for Node's pixels.
    """
    node = make_node("node", NODE_PACKAGE)
    if node is None:
        pytest.skip("node and npm are not installed")
    (node / "features.mjs").write_text(Path(__file__).with_name("features.mjs").read_text())
    image = Image.effect_noise((IMAGE_PX, IMAGE_PX), 90).convert("RGB")
    image.save(tmp_path / "image.png")
    results: dict[str, Any] = {}
    for kind in ORIGINALS:
        export_encoder(originals / kind, tmp_path / kind, int8=kind == "siglip", log=lambda line: None)
        encoder, _ = read_encoder(originals / kind)
        own_pixels = encoder.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        for dtype in ("fp32", "q8") if kind == "siglip" else ("fp32",):
            command = ["node", "features.mjs", f"{tmp_path}/", kind, str(tmp_path / "image.png"), dtype]
            out = tmp_path / f"{kind}-{dtype}.json"
            done = subprocess.run([*command, str(out)], cwd=node, check=False, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            features = json.loads(out.read_text())
            assert features["shape"] == [1, 16, 32]
            pixels = torch.tensor(features["pixel_values"]).view(1, 3, IMAGE_PX, IMAGE_PX)
            assert torch.allclose(pixels, own_pixels, atol=1e-5) != kind.startswith("dinov2"), kind
            with torch.no_grad():
                expected = encoder(pixels)
            tokens = torch.tensor(features["last_hidden_state"]).view(1, 16, 32)
            difference = (tokens - expected.last_hidden_state).abs().max().item()
            if dtype == "fp32":
                results[kind] = {"difference": difference}
                assert difference < 1e-4, kind
                assert np.abs(np.array(features["pooler_output"]) - expected.pooler_output[0].numpy()).max() < 1e-4
            else:
                assert 1e-4 < difference < 0.2
    manifest = node / "node_modules" / "@huggingface" / "transformers" / "package.json"
    version = json.loads(manifest.read_text())["version"]
    record["transformers.js"] = {"versions": {"transformers.js": version}, "results": results}


def test_the_pages_table_is_that_of_the_results() -> None:
    page = PAGE.read_text()
    assert replace_table(page, render(json.loads(RESULTS.read_text()))) == page
