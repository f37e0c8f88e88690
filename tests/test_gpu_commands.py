"""The commands of GPU.md: each still takes its arguments, and its code runs at a small size on a CPU."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pivot_hub.cli import app
from tests.command_lines import parse

ROOT = Path(__file__).parents[1]
ITEM = re.compile(r"^\d+\. `(?P<command>[^`]+)`.*?On a CPU: `(?P<check>[^`]+)`", re.MULTILINE | re.DOTALL)
WAITING = [(m["command"], m["check"]) for m in ITEM.finditer((ROOT / "GPU.md").read_text())]
CHECKS = [check for _, check in WAITING]


def _arguments(command: str) -> list[str]:
    """Return the arguments of a `pivot` command, up to the next command of the line."""
    program, *arguments = shlex.split(command.partition("&&")[0].replace("<device>", "device"))
    assert program == "pivot"
    return arguments


def test_every_command_has_minutes_and_a_check() -> None:
    items = re.split(r"^\d+\. ", (ROOT / "GPU.md").read_text().partition("## ")[0], flags=re.MULTILINE)[1:]
    assert len(WAITING) == len(items) == 9
    assert all(re.search(r"\d+ minutes", item) for item in items)


@pytest.mark.parametrize("command", [command for command, _ in WAITING])
def test_a_waiting_command_takes_its_arguments(command: str) -> None:
    parse(_arguments(command))


@pytest.mark.parametrize("check", [check for check in CHECKS if check.startswith("tests/")])
def test_a_test_that_checks_a_command_exists(check: str) -> None:
    file, _, name = check.partition("::")
    assert f"def {name}(" in (ROOT / file).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("check", [check for check in CHECKS if check.startswith("pivot ")])
def test_a_command_runs_at_a_small_size_on_a_cpu(check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    record = tmp_path / "record.json"
    ended = CliRunner().invoke(app, [*_arguments(check), "--json", str(record)])
    assert ended.exit_code == 0, ended.output
    assert json.loads(record.read_text())["benchmark"] in check
