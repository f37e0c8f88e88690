"""The shipped base parts: small, complete, trained by their recipes, and in the middle of every scale."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pivot_hub
from pivot_hub.config.recipe import RECIPES, load_recipe
from pivot_hub.encoder.repository import KNOWN_CODE, REMOTE_CODE, verify_repository
from pivot_hub.probes.run import Sizes, probe_encoder, probe_language
from pivot_hub.provenance import file_sha256, weights_sha256
from pivot_hub.study.learning_rate import METRIC
from pivot_hub.study.table import read_table

BASE = RECIPES / "shapes" / "base"
FOLDERS = ["shapes", "shapes-few"]  # recipes that ship with their base parts
CHANCE = {"colour": 50.0, "shape": 50.0, "position": 50.0}


@pytest.mark.parametrize("folder", FOLDERS)
def test_parts_are_small_and_without_pickles(folder: str) -> None:
    files = [f for f in (RECIPES / folder / "base").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 8_000_000
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pth", ".pkl")]


@pytest.mark.parametrize("part", ["vision", "language"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_parts_are_complete_and_from_their_recipe(folder: str, part: str) -> None:
    base = RECIPES / folder / "base" / part
    provenance = json.loads((base / "provenance.json").read_text())
    assert weights_sha256(base) == provenance["weights_sha256"]
    for name, sha256 in provenance["files"].items():
        assert file_sha256(base / name) == sha256, name
    if part == "vision":
        assert verify_repository(base) == []
    assert load_recipe(f"{folder}/0-{part}").recipe.has_sha256(provenance["recipe_sha256"])


def test_the_encoder_carries_the_code_of_this_version() -> None:
    for name in REMOTE_CODE:
        ours = Path(pivot_hub.__file__).parent / "encoder" / name
        assert (BASE / "vision" / name).read_bytes() == ours.read_bytes()
        assert file_sha256(ours) in KNOWN_CODE[name], (
            "later versions must know this one: add its hash to known_code.json"
        )


def from_chance(task: str, value: float, protocol: str) -> float:
    """Return a score on the scale from chance (0) to perfect (1)."""
    chance = CHANCE.get(task) or float(protocol.rsplit("chance ", 1)[1])
    return (value - chance) / (100 - chance)


@pytest.mark.slow
def test_base_encoder_is_in_the_middle_of_every_scale() -> None:
    """Between 40% and 85% of the way from chance to perfect: at a floor or a ceiling SFT and DPO look alike."""
    results, _ = probe_encoder(str(BASE / "vision"), sizes=Sizes(train=1200, validation=300, test=500))
    for result in results[:4]:
        share = from_chance(result.task.removeprefix("shapes/"), result.value, result.protocol)
        assert 0.40 < share < 0.85, f"{result.task}: {share:.2f}"


def test_recorded_results_are_of_the_shipped_weights() -> None:
    vision = json.loads((BASE / "vision-results.json").read_text())["results"]
    language = json.loads((BASE / "language-results.json").read_text())["results"]
    for part, results in (("vision", vision), ("language", language)):
        sha = json.loads((BASE / part / "provenance.json").read_text())["weights_sha256"]
        assert {r["encoder_sha256"] for r in results} == {sha}
    for result in vision[:4]:
        assert 0.40 < from_chance(result["task"].removeprefix("shapes/"), result["value"], result["protocol"]) < 0.85


def test_language_model_reads_scans() -> None:
    results = probe_language(str(BASE / "language"), Sizes(questions=150))
    recorded = json.loads((BASE / "language-results.json").read_text())["results"][0]
    assert results[0].task == "shapes/vqa/all"
    assert results[0].value == pytest.approx(recorded["value"], abs=12)
    assert results[0].value > 35  # a language model that does not read the scan reaches 16%


def test_learning_rates_of_the_recipes_are_the_studys_choice() -> None:
    table = read_table(RECIPES / "shapes" / "study.parquet")
    candidates = {
        branch: {
            r["candidate"]: r["value"]
            for r in table.rows
            if (r["run"], r["metric"]) == (branch, METRIC) and r["candidate"] is not None
        }
        for branch in ("sft", "dpo")
    }
    assert len(candidates["sft"]) == len(candidates["dpo"]) == 4
    for branch, values in candidates.items():
        learning_rates = set(load_recipe(f"shapes/3-{branch}").recipe.learning_rate.trained().values())
        assert learning_rates == {max(values, key=lambda candidate: values[candidate])}


@pytest.mark.skipif(sys.platform == "win32", reason="paths of the wheel are checked on POSIX")
def test_a_wheel_holds_recipes_and_parts(tmp_path: Path) -> None:
    """`pip install` and `pivot quickstart` work without a checkout: the wheel has everything they need."""
    pytest.importorskip("hatchling", reason="hatchling builds the wheel")
    code = "import os, sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    for name in ("recipes/shapes/3-dpo.yaml", "recipes/shapes/base/vision/model.safetensors", "py.typed"):
        assert f"pivot_hub/{name}" in names
