"""Every backbone's repository, opened by other software in environments of its own."""

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
from tests.conformance.environment import ROOT, make_environment, make_node, run
from tests.conformance.table import FILE, README, put, render
from tests.encoder.originals import IMAGE_PX, ORIGINALS

DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
SUPPORTED = next(d for d in DEPENDENCIES if d.startswith("transformers"))
OLDEST = re.search(r">=([\d.]+)", SUPPORTED)
assert OLDEST is not None
# Plain transformers of both majors, and the oldest and newest that this package itself supports.
TRANSFORMERS = {
    "transformers-4": ("transformers==4.57.6", "optimum-onnx[onnxruntime]==0.1.0"),
    "transformers-5-first": ("transformers==5.0.0",),
    "transformers-5-oldest": (f"transformers=={OLDEST[1]}.0",),
    "transformers-5-newest": (SUPPORTED,),
}
WITH_PACKAGE = ("transformers-5-oldest", "transformers-5-newest")
MAPS = "timm gives maps, LLaVA takes tokens"
NODE_PACKAGE = "@huggingface/transformers@4"


@pytest.mark.conformance
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_door_opens_onto_the_same_features(
    name: str, repositories: Path, timm_repository: Path, overlay: Path, record: dict[str, Any], tmp_path: Path
) -> None:
    python = make_environment(name, *TRANSFORMERS[name])
    script = Path(__file__).with_name("loading_paths.py")
    package = ["--package"] if name in WITH_PACKAGE else []
    run(python, script, repositories, tmp_path / "doors.json", *package, path=str(ROOT) if package else "")
    path = f"{overlay}:{ROOT}" if package else str(overlay)
    run(python, script, timm_repository, tmp_path / "timm.json", *package, path=path)
    found = json.loads((tmp_path / "doors.json").read_text())
    timm = json.loads((tmp_path / "timm.json").read_text())
    print(name, found["versions"], timm["versions"])
    assert list(found["results"]) == sorted(ORIGINALS)
    timm["results"]["timm"]["llava"]["reason"] = MAPS
    found["results"] |= timm["results"]
    record[name] = found
    for kind, doors in found["results"].items():
        assert list(doors) == ["native", "remote", "llava", *(["package"] if package else [])]
        for door, metadata in doors.items():
            if "reason" in metadata:
                continue
            assert "error" not in metadata, f"{kind}, {door}: {metadata['error']}"
            assert metadata["difference"] < 1e-5, f"{kind}, {door}"
        wanted = ORIGINALS[kind].native if kind in ORIGINALS else "TimmWrapperModel"
        assert doors["native"]["class"] == wanted
        assert doors["remote"]["class"] == "PivotVisionModel"


@pytest.mark.conformance
def test_the_suite_sees_the_trap_it_is_there_for(originals: Path, repositories: Path, tmp_path: Path) -> None:
    """A SigLIP tower saved by transformers 5 itself loads in 4.57 with random weights: that must be reported."""
    naive = tmp_path / "repositories" / "siglip"
    AutoModel.from_pretrained(originals / "siglip").save_pretrained(naive)
    for name in ("siglip.safetensors", "siglip/golden.safetensors"):
        (tmp_path / "repositories" / name).write_bytes((repositories / name).read_bytes())
    python = make_environment("transformers-4", *TRANSFORMERS["transformers-4"])
    run(python, Path(__file__).with_name("loading_paths.py"), naive.parent, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())["results"]["siglip"]["native"]
    assert "keys missing, unexpected" in found["error"]


@pytest.mark.conformance
def test_optimum_exports_it(repositories: Path, record: dict[str, Any], tmp_path: Path) -> None:
    """optimum-onnx in its own environment; its ONNX gives the native class's last hidden state."""
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
        made = session.run(["last_hidden_state"], {"pixel_values": pixels.numpy()})[0]
        with torch.no_grad():
            wanted = AutoModel.from_pretrained(repositories / kind).eval()(pixels).last_hidden_state.numpy()
        results[kind] = {"difference": float(np.abs(made - wanted).max())}
        assert results[kind]["difference"] < 1e-4, kind
    assert {k for k, v in results.items() if "difference" in v} >= {"siglip", "siglip2", "clip", "dinov2", "vit", "mae"}
    listed = run(python, "-c", "import importlib.metadata as m; print(m.version('optimum-onnx'))")
    record["optimum"] = {"versions": {"optimum-onnx": listed.stdout.strip()}, "results": results}


@pytest.mark.conformance
def test_node_reads_the_export(originals: Path, record: dict[str, Any], tmp_path: Path) -> None:
    """The npm package @huggingface/transformers: our export's layout, its own image processor, the same features.

    The picture has the encoder's size; where a processor resizes all the same (DINOv2's, before its crop), Node's
    pixels are not PIL's, and the features are compared on Node's.
    """
    node = make_node("node", NODE_PACKAGE)
    if node is None:
        pytest.skip("node and npm are not installed")
    (node / "features.mjs").write_text(Path(__file__).with_name("features.mjs").read_text())
    picture = Image.effect_noise((IMAGE_PX, IMAGE_PX), 90).convert("RGB")
    picture.save(tmp_path / "picture.png")
    results: dict[str, Any] = {}
    for kind in ORIGINALS:
        export_encoder(originals / kind, tmp_path / kind, int8=kind == "siglip", log=lambda line: None)
        encoder, _ = read_encoder(originals / kind)
        own = encoder.image_processor(images=[picture], return_tensors="pt")["pixel_values"]
        for dtype in ("fp32", "q8") if kind == "siglip" else ("fp32",):
            command = ["node", "features.mjs", f"{tmp_path}/", kind, str(tmp_path / "picture.png"), dtype]
            out = tmp_path / f"{kind}-{dtype}.json"
            done = subprocess.run([*command, str(out)], cwd=node, check=False, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            made = json.loads(out.read_text())
            assert made["shape"] == [1, 16, 32]
            pixels = torch.tensor(made["pixel_values"]).view(1, 3, IMAGE_PX, IMAGE_PX)
            assert torch.allclose(pixels, own, atol=1e-5) != kind.startswith("dinov2"), kind
            with torch.no_grad():
                wanted = encoder(pixels)
            tokens = torch.tensor(made["last_hidden_state"]).view(1, 16, 32)
            off = (tokens - wanted.last_hidden_state).abs().max().item()
            if dtype == "fp32":
                results[kind] = {"difference": off}
                assert off < 1e-4, kind
                assert np.abs(np.array(made["pooler_output"]) - wanted.pooler_output[0].numpy()).max() < 1e-4
            else:
                assert 1e-4 < off < 0.2
    version = json.loads((node / "node_modules" / "@huggingface" / "transformers" / "package.json").read_text())[
        "version"
    ]
    record["transformers.js"] = {"versions": {"transformers.js": version}, "results": results}


def test_the_readmes_table_is_the_suites_own() -> None:
    readme = README.read_text()
    assert put(readme, render(json.loads(FILE.read_text()))) == readme
