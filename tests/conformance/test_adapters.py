"""The adapters in their libraries, each in an environment of its own."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from pivot_hub.encoder.adapters.timm_folder import ARCHITECTURES
from tests.conformance.environment import ROOT, TORCHVISION, make_environment, run
from tests.conformance.test_loading_paths import SUPPORTED
from tests.encoder.originals import ORIGINALS

pytestmark = pytest.mark.conformance
NOT_IN_TIMM = "dinov3"


def _run(python: Path, library: str, encoders: Path, path: str, tmp_path: Path) -> dict[str, Any]:
    run(python, "-m", "tests.conformance.adapters", library, encoders, tmp_path / "out.json", path=path)
    report = json.loads((tmp_path / "out.json").read_text())
    print(library, report)
    return dict(report["results"])


def _copied(originals: Path, kinds: set[str], tmp_path: Path) -> Path:
    for kind in kinds:
        shutil.copytree(originals / kind, tmp_path / "encoders" / kind)
    return tmp_path / "encoders"


def test_timm_computes_the_same_features_and_pixels(originals: Path, overlay: Path, tmp_path: Path) -> None:
    kinds = set(ORIGINALS) - {NOT_IN_TIMM}
    encoders = _copied(originals, kinds, tmp_path)
    results = _run(Path(sys.executable), "timm", encoders, f"{overlay}:{ROOT}", tmp_path)
    assert set(results) == kinds
    assert len(ARCHITECTURES) == 6
    for kind, outcomes in results.items():
        # ViT's norms have another epsilon in timm, which weighs most where activations are small, as here.
        allowed = 1e-3 if kind in ("vit", "mae") else 1e-5
        for outcome in outcomes.values():
            assert outcome["own epsilon"] < 1e-5, kind
            assert outcome["difference"] < allowed, kind
            assert outcome["pooled"] < allowed, kind
            assert outcome["pixels"] == 0, kind


def test_mteb_runs_its_image_tasks_on_an_encoder(originals: Path, tmp_path: Path) -> None:
    python = make_environment("mteb", "mteb==2.26.24", SUPPORTED, "psutil")
    encoders = _copied(originals, {"siglip", "clip"}, tmp_path)
    for outcome in _run(python, "mteb", encoders, str(ROOT), tmp_path).values():
        assert outcome["difference"] < 1e-6
        assert len(outcome["scores"]) == 2
        assert all(0 <= score <= 1 for score in outcome["scores"].values())


def test_visbench_runs_its_probes_on_an_encoder(originals: Path, tmp_path: Path) -> None:
    # Its torchvision holds CUDA kernels only, so the script gives the operators' names before the import.
    python = make_environment("visbench", "visbench==0.27.0", SUPPORTED, TORCHVISION, "psutil")
    encoders = _copied(originals, {"siglip", "clip"}, tmp_path)
    for outcome in _run(python, "visbench", encoders, str(ROOT), tmp_path).values():
        assert max(outcome[name] for name in ("difference", "pooled", "first layer")) < 1e-5
        assert outcome["pixels"] == 0
        assert 0 <= outcome["scores"]["recall@1"] <= 1
