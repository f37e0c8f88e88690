"""The notebooks: their code compiles, their outputs are clean and small, and they run from top to bottom."""

from __future__ import annotations

import ast
import importlib
import json
import re
import resource
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PICTURES = {"extract_and_diff": 3, "sft_against_dpo": 2, "use_an_encoder": 1}
LARGEST_BYTES = 300_000
LONGEST_S = 300  # of computing: other programs on the machine do not count
# A path of a machine: a home, a temporary or a system folder. Addresses and relative paths are none.
MACHINE_PATH = re.compile(r"(?<![\w./:])/(?:home|root|tmp|work|Users|usr|opt|var|mnt|data|private)/|[A-Z]:\\\\")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def _code(notebook: Any) -> str:
    """Join the cells of Python; cells of another language start with its name."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return "\n".join(cell for cell in cells if not cell.startswith("%%"))


def _pictures(notebook: Any) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_all_are_tested() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(PICTURES)


@each_notebook
def test_the_code_compiles_and_what_it_imports_exists(path: Path) -> None:
    tree = ast.parse(_code(_read(path)))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert imports
    for node in imports:
        assert node.module is not None
        module = importlib.import_module(node.module)
        assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@each_notebook
def test_the_outputs_are_whole_small_and_of_no_machine(path: Path) -> None:
    notebook = _read(path)
    assert path.stat().st_size < LARGEST_BYTES
    assert _pictures(notebook) == PICTURES[path.stem]
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))  # from top to bottom, in one run
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output for output in outputs if output.get("name") == "stderr" or output.output_type == "error"] == []
    texts = [{k: v for k, v in output.get("data", {}).items() if k != "image/png"} for output in outputs]
    text = json.dumps([texts, [output.get("text") for output in outputs], notebook.metadata])
    assert MACHINE_PATH.findall(text) == []


def test_a_path_of_a_machine_is_recognised() -> None:
    assert MACHINE_PATH.search("saved to /home/ada/x.png")
    assert MACHINE_PATH.search('"/tmp/x"')
    assert not MACHINE_PATH.search("see https://arxiv.org/abs/2510.16333, recipes/tmp/x and ../data/x")


@each_notebook
def test_links_lead_to_files(path: Path) -> None:
    text = "\n".join(cell.source for cell in _read(path).cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if not (path.parent / link).is_file()] == []


@pytest.mark.slow
@each_notebook
def test_it_runs_from_top_to_bottom_and_shows_its_pictures(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.run_notebook import run_notebook

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    notebook = run_notebook(path, tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert 1 < used_s < LONGEST_S
    assert _pictures(notebook) == PICTURES[path.stem]
