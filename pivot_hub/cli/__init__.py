"""The `pivot` command: parse, dispatch, print. Exit codes: 0 done, 1 failed, 2 bad usage or bad input."""

import sys

from pivot_hub.cli import train, publish, measure, bench, explain  # isort: skip  (the order of the help)
from pivot_hub.cli.app import app, is_first, out
from pivot_hub.errors import PivotError, TrainingError

__all__ = ["app", "bench", "explain", "main", "measure", "out", "publish", "train"]


def main() -> None:
    """Run the command; what goes wrong is one sentence on stderr, a traceback only with --debug."""
    try:
        app()
    except PivotError as error:
        if "--debug" in sys.argv:
            raise
        if is_first() or isinstance(error, TrainingError):  # others fail alike, of a loss one alone may know
            print(f"pivot: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("pivot: stopped; run the same command again to go on.", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        print(
            f"pivot: {type(error).__name__}: {reason[0]} (run `pivot --debug ...` for the traceback)", file=sys.stderr
        )
        sys.exit(1)
