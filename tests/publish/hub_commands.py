"""Run several `pivot` commands in one process; as a program, stdin is a JSON list of argument lists."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any

from pivot_hub import cli


def run(arguments: list[str]) -> dict[str, Any]:
    """Run a command in this process; return its exit code, and what it printed to stdout and stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, ["pivot", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            sys.argv = argv
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    sys.stdin, stdin = open("/dev/null"), sys.stdin  # noqa: SIM115, PTH123  (no terminal to confirm on)
    print(json.dumps([run(arguments) for arguments in json.load(stdin)]))
