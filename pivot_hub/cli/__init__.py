"""The `pivot` command: parse, dispatch, print.

Exit codes: 0 done; 1 failed; 2 bad usage or bad input; 3 a signal stopped training and the last step is saved, so the
same command resumes; 130 a second Ctrl-C, or the first outside of training.
"""

import sys

from pivot_hub.cli import registry, train, plan, data, study, publish, measure, bench, explain  # isort: skip  (the order of the help)
from pivot_hub.cli.app import app, is_first, out
from pivot_hub.errors import PivotError, TrainingError
from pivot_hub.files import disk_is_full

__all__ = ["app", "bench", "data", "explain", "main", "measure", "out", "plan", "publish", "registry", "study", "train"]

CTRL_C = 130


def main() -> None:
    """Run the command. An error is one message on stderr; --debug shows the traceback."""
    try:
        app()
    except PivotError as error:
        if "--debug" in sys.argv:
            raise
        # All processes of a run meet the same error, but a loss that is not finite may be known to one of them only.
        if is_first() or isinstance(error, TrainingError):
            print(f"pivot: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as leaving:
        if leaving.code == CTRL_C:  # typer's code for KeyboardInterrupt, of which it says nothing
            print("pivot: stopped; run the same command again to resume.", file=sys.stderr)
        raise
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        if disk_is_full(error):
            print("pivot: the disk is full: free some space and run the same command again.", file=sys.stderr)
            sys.exit(1)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"pivot: {type(error).__name__}: {lines[0]} (run `pivot --debug ...` for the traceback)", file=sys.stderr)
        sys.exit(1)
