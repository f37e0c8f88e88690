"""Fixtures of the conformance suite. It runs only with its marker, as it installs several hundred megabytes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pivot_hub.files import write_json
from tests.conformance.environment import ROOT, TORCHVISION, make_overlay, run
from tests.conformance.repositories import write_one
from tests.encoder.originals import ORIGINALS, make_vision


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "conformance" not in str(config.option.markexpr):
        for item in items:
            if item.get_closest_marker("conformance"):
                reason = "creates environments with other software: make conformance"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def overlay() -> Path:
    """Folder for PYTHONPATH with timm and torchvision.

    It is separate from the environments because transformers uses torchvision wherever it is installed.
    """
    return make_overlay("timm", "timm", TORCHVISION)


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a small encoder of every backbone but timm, each in the form of its original."""
    folder = tmp_path_factory.mktemp("originals")
    for kind in ORIGINALS:
        make_vision(folder / kind, kind)
    return folder


@pytest.fixture(scope="session")
def repositories(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the repository of every backbone but timm, as this package writes it."""
    folder = tmp_path_factory.mktemp("repositories")
    for kind in ORIGINALS:
        write_one(originals / kind, folder / kind)
    return folder


@pytest.fixture(scope="session")
def timm_repository(overlay: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that holds only the repository of a timm model and the file beside it."""
    work = tmp_path_factory.mktemp("timm")
    run(Path(sys.executable), "-m", "tests.conformance.write_timm", work / "timm", path=f"{overlay}:{ROOT}")
    folder = tmp_path_factory.mktemp("timm-repositories")
    for name in ("timm", "timm.safetensors"):
        (work / name).rename(folder / name)
    return folder


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """The results of a test file by software. They are written to its RESULTS if all of its SOFTWARE was tried."""
    results: dict[str, Any] = {}
    yield results
    conditions = {name: metadata["versions"] for name, metadata in results.items()}
    print(f"\nconformance: {json.dumps(conditions)}", file=sys.stderr)  # the output of a worker process is not shown
    if set(results) == set(request.module.SOFTWARE):
        write_json(request.module.RESULTS, dict(sorted(results.items())))
