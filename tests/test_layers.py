"""The order of the packages: one contract, which CONTRIBUTING repeats, and which refuses a reverse import."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
LINTER = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]


def _lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [*LINTER, "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_every_package_has_its_layer() -> None:
    named = {name for layer in LAYERS for name in layer.split(" | ")}
    modules = {p.stem for p in (ROOT / "pivot_hub").glob("*.py") if not p.stem.startswith("__")}
    packages = {p.parent.name for p in (ROOT / "pivot_hub").glob("*/__init__.py")}
    assert named == {f"pivot_hub.{name}" for name in modules | packages}


def test_contributing_repeats_the_contract() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    order = re.search(r"<!-- layers -->\n`(.*)`\n<!-- end of layers -->", text, re.DOTALL)
    assert order is not None
    layers = [layer.replace("pivot_hub.", "") for layer in reversed(LAYERS)]
    assert " ".join(order[1].split()) == " < ".join(layers)


def test_a_reverse_import_breaks_the_contract(tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("*.json", "*.md", "*.yaml", "__pycache__")
    shutil.copytree(ROOT / "pivot_hub", tmp_path / "pivot_hub", ignore=ignore)
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    kept = _lint(tmp_path)
    assert kept.returncode == 0, kept.stdout + kept.stderr
    with (tmp_path / "pivot_hub" / "config" / "recipe.py").open("a") as file:
        file.write("\n\ndef later():\n    from pivot_hub.training import dpo\n")
    broken = _lint(tmp_path)
    assert broken.returncode == 1
    assert "pivot_hub.config.recipe -> pivot_hub.training.dpo" in broken.stdout
