"""Run `pivot` commands in forked processes, so that a command can be killed often without importing everything again.

Each line of standard input is a JSON list of arguments. The first command is run in this process, which imports what
it needs; for that, and for each further one, the process prints the id of the process that runs the command and, when
that has ended, its exit status.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from pivot_hub import cli


def run(arguments: list[str]) -> int:
    sys.argv = ["pivot", *arguments]
    try:
        cli.main()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


def serve() -> None:
    torch.set_num_threads(1)
    silent = os.open(os.devnull, os.O_RDWR)
    with os.fdopen(os.dup(1), "w") as answers:
        for stream in (1, 2):
            os.dup2(silent, stream)
        for number, line in enumerate(sys.stdin):
            child = os.getpid() if number == 0 else os.fork()
            if child == 0:
                code = 1
                try:
                    code = run(json.loads(line))
                finally:
                    os._exit(code)
            print(child, file=answers, flush=True)
            ended = run(json.loads(line)) if number == 0 else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            print(ended, file=answers, flush=True)


if __name__ == "__main__":
    serve()
