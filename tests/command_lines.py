"""Parse the command lines that pages show, without running them."""

from __future__ import annotations

import re
import shlex
from functools import cache
from typing import Any

from typer.main import get_command

from pivot_hub.cli import app

LAUNCHED = re.compile(r"^(?:accelerate launch|torchrun)\b.*? -m pivot_hub ")


@cache
def root_command() -> Any:
    """The `pivot` command, with all commands below it."""
    return get_command(app)


def parse(arguments: list[str]) -> None:
    """Parse the arguments of a `pivot` command.

    Raises:
        ValueError: There is no such command.
        Exception: Typer's own error, for an unknown option or a value that it does not take.
    """
    command = root_command()
    context = command.make_context("pivot", list(arguments), resilient_parsing=True)
    while hasattr(command, "resolve_command"):
        name, command, arguments = command.resolve_command(context, arguments)
        if command is None:
            raise ValueError(f"there is no command {name or arguments}")
        if not hasattr(command, "resolve_command"):
            command.make_context(name, list(arguments))


def pivot_arguments(block: str) -> list[list[str]]:
    """Return the arguments of each `pivot` command of a block of shell lines, also behind a launcher or a pipe."""
    variables: dict[str, str] = {}
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        assigned = re.fullmatch(r'(\w+)="(.*)"', line.strip())
        if assigned:
            variables[assigned[1]] = assigned[2]
            continue
        for name, value in variables.items():
            line = line.replace(f"${name} ", f"{value} ")
        for part in re.split(r" (?:\||&&) ", line):
            launched = LAUNCHED.sub("pivot ", part.strip())
            words = shlex.split(launched, comments=True)
            if words[:1] == ["pivot"]:
                found.append(words[1:])
    return found
