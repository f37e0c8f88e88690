"""CONTRIBUTING's map is true: what it names exists, and ten typical changes find their files and their test."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.fault_table import names_of_tests

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
CHANGES = dict(
    re.findall(r"^\*\*(an? [^*]+)\*\*\n((?:\d\. .*\n(?:   .*\n)*)+)", PAGE.split("## How to add")[1], re.MULTILINE)
)
TYPICAL = [
    "a backbone",
    "a family of MLLMs",
    "a loss",
    "a reward",
    "a recipe key",
    "a probe",
    "a VQA benchmark",
    "a card field",
    "a Space control",
    "a command",
]
PATH = re.compile(r"`((?:[\w.<>*-]+/)+[\w.<>*-]*|[\w-]+\.(?:md|cff|toml))(?:::(\w+))?`")


def _steps(text: str) -> list[str]:
    return [" ".join(step.split()) for step in re.split(r"^\d\. ", text, flags=re.MULTILINE) if step.strip()]


def _matches(name: str) -> list[Path]:
    """Return what a path means: from the root, the package, the tests, or beside another file of the package."""
    pattern = re.sub(r"<\w+>", "*", name)
    return [found for top in ("", "pivot_hub", "tests") for found in (ROOT / top).glob(pattern)]


def test_ten_typical_changes_have_their_lists() -> None:
    assert [change for change in TYPICAL if change not in CHANGES] == []


def test_every_path_exists() -> None:
    # Made at home, or by a command that the page names.
    made = {"dist/", "quickstart/runs/", "../shared/data"}
    named = {(name, test) for name, test in PATH.findall(PAGE) if name not in made and not name.startswith("../")}
    assert len(named) > 60
    assert [name for name, _ in sorted(named) if not _matches(name)] == []
    wrong = [
        (name, test)
        for name, test in sorted(named)
        if test and test not in {t for f in _matches(name) for t in names_of_tests(f)}
    ]
    assert wrong == []


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_ends_with_the_check_that_exists(change: str) -> None:
    last = _steps(CHANGES[change])[-1]
    assert last.startswith("Done when")
    targets = re.findall(r"`make (\w+)`", last)
    assert targets or re.search(r"`tests/[\w/]+/?test_\w+\.py`", last)
    makefile = (ROOT / "Makefile").read_text()
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


@pytest.mark.parametrize("change", CHANGES)
def test_the_names_of_a_step_are_in_its_file(change: str) -> None:
    """A step such as "`pivot_hub/data/source.py`: its entry in `PARSERS`" names what the file holds."""
    for step in _steps(CHANGES[change]):
        folder = ROOT
        # A step may name several files, each followed by what it holds. A bare name is beside the file before it, or in
        # the folder before it.
        for part in re.split(r"(?=`[\w/]+(?:\.py|/)`)", step):
            file = re.match(r"`([\w/]+(?:\.py|/))`", part)
            if file is None:
                continue
            path = _matches(file[1])[0] if "/" in file[1] else folder / file[1]
            folder = path if path.is_dir() else path.parent
            if path.is_dir():
                continue
            names = re.findall(r"`([A-Z]\w+(?:\.\w+)?|[a-z]+_[a-z_]+)`", part)
            missing = [name for name in names if name.split(".")[-1] not in path.read_text()]
            assert missing == [], f"{change}: {file[1]}"


def test_modules_that_are_run_exist() -> None:
    modules = set(re.findall(r"python -m ([\w.]+)", PAGE))
    assert len(modules) > 4
    assert [name for name in sorted(modules) if importlib.util.find_spec(name) is None] == []
