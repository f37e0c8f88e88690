"""The suite runs only where it is asked for: it makes environments of several hundred megabytes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.environment import ROOT, TORCHVISION, make_overlay, run
from tests.conformance.repositories import write_one
from tests.conformance.table import RESULTS, write_results
from tests.encoder.originals import ORIGINALS, make_vision


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "conformance" not in str(config.option.markexpr):
        for item in items:
            if item.get_closest_marker("conformance"):
                item.add_marker(pytest.mark.skip(reason="makes environments with other software: make conformance"))


@pytest.fixture(scope="session")
def overlay() -> Path:
    """timm and torchvision, for a PYTHONPATH of their own: where torchvision is there, transformers uses it."""
    return make_overlay("timm", "timm", TORCHVISION)


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    for kind in ORIGINALS:
        make_vision(folder / kind, kind)
    return folder


@pytest.fixture(scope="session")
def repositories(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every backbone but timm, written by us."""
    folder = tmp_path_factory.mktemp("repositories")
    for kind in ORIGINALS:
        write_one(originals / kind, folder / kind)
    return folder


@pytest.fixture(scope="session")
def timm_repository(overlay: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the repository of a timm model, alone."""
    work = tmp_path_factory.mktemp("timm")
    run(Path(sys.executable), "-m", "tests.conformance.write_timm", work / "timm", path=f"{overlay}:{ROOT}")
    folder = tmp_path_factory.mktemp("timm-repositories")
    for made in ("timm", "timm.safetensors"):
        (work / made).rename(folder / made)
    return folder


@pytest.fixture(scope="session")
def record() -> Iterator[dict[str, Any]]:
    """What the suite found; kept for the README's table when all of it was run."""
    found: dict[str, Any] = {}
    yield found
    print(f"\nconformance: {json.dumps({name: metadata['versions'] for name, metadata in found.items()})}")
    if len(found) == RESULTS:
        write_results(found)
