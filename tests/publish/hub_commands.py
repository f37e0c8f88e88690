"""Run several `pivot` commands in one process, as the command line does; stdin is a JSON list of argument lists."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any

from pivot_hub import cli


def run(arguments: list[str]) -> dict[str, Any]:
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["pivot", *arguments]
    cli.out.file = out
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as error:
            code = int(error.code or 0)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    sys.stdin, stdin = open("/dev/null"), sys.stdin  # noqa: SIM115, PTH123  (no terminal to confirm on)
    print(json.dumps([run(arguments) for arguments in json.load(stdin)]))
