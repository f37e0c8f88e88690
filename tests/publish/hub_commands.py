"""Runs several `pivot` commands in one process, as the command line does; a JSON list of argument lists on stdin."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any

from pivot_hub import cli


def run(arguments: list[str]) -> dict[str, Any]:
    said, wrong, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["pivot", *arguments]
    cli.out.file = said
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
        try:
            cli.main()
        except SystemExit as error:
            code = int(error.code or 0)
    return {"code": code, "out": said.getvalue(), "err": wrong.getvalue()}


if __name__ == "__main__":
    sys.stdin, given = open("/dev/null"), sys.stdin  # noqa: SIM115, PTH123  (nobody is there to ask)
    print(json.dumps([run(arguments) for arguments in json.load(given)]))
