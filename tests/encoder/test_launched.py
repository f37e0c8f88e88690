"""Two processes of torchrun divide the images of `pivot encode` and `pivot probe`, with the result of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pivot_hub.cli.app import app
from pivot_hub.encoder.encode import encode_source
from tests.encoder import launched_command
from tests.probes.classification.test_protocols import class_folder

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def launch(folder: Path, *arguments: str | Path) -> list[int]:
    """Run a command in two processes, and return the images that each encoded."""
    folder.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "tests.encoder.launched_command", str(folder), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [int((folder / f"{rank}.txt").read_text()) for rank in range(2)]


def features(out: Path) -> dict[str, Any]:
    tables = [pq.read_table(file, columns=["id", "features"]) for file in out.glob("*.parquet")]
    return {row["id"]: row["features"] for table in tables for row in table.to_pylist()}


def test_processes_divide_a_probe_of_labelled_images(parts: Path, tmp_path: Path) -> None:
    data = class_folder(tmp_path / "data")
    command = ["probe", str(parts / "vision"), "--data", str(data), "--protocols", "fast,full,knn", "--workers", "0"]
    both = launch(tmp_path / "counts", *command, "--cache", tmp_path / "both", "--json", tmp_path / "both.json")
    one = [*command, "--cache", str(tmp_path / "one"), "--json", str(tmp_path / "one.json")]
    assert CliRunner().invoke(app, one).exit_code == 0
    assert sum(both) == sum(file.is_file() for file in data.rglob("*"))
    assert min(both) >= launched_command.BLOCK
    results = [json.loads((tmp_path / name).read_text()) for name in ("both.json", "one.json")]
    for result in (r for results_of in results for r in results_of):
        del result["duration_s"]
    assert results[0] == results[1]


def test_processes_divide_a_source(parts: Path, tmp_path: Path) -> None:
    data = class_folder(tmp_path / "data")
    out = tmp_path / "both"
    both = launch(tmp_path / "counts", "encode", data, "--encoder", parts / "vision", "--out", out, "--workers", "0")
    encode_source(parts / "vision", data, tmp_path / "one", workers=0)
    assert sum(both) == len(features(out))
    assert min(both) >= launched_command.BLOCK
    assert features(out).keys() == features(tmp_path / "one").keys()
    for name, row in features(tmp_path / "one").items():
        assert features(out)[name] == pytest.approx(row, abs=1e-5)
