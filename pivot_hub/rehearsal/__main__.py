"""The process that rehearses: `python -m pivot_hub.rehearsal LIBRARY REPORT RECIPE ... [OVERRIDE ...]`.

It is a process of its own, because the library has to be loaded before torch is imported.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from pivot_hub.errors import PivotError
from pivot_hub.rehearsal.library import load


def main(library: str, report: str, recipes: list[str], overrides: list[str]) -> None:
    """Rehearse the paths of recipes, and write the reports to a file. A path that several take is rehearsed once."""
    load(library)
    from pivot_hub.config.recipe import load_recipe

    all_loaded = [load_recipe(recipe, overrides) for recipe in recipes]
    from pivot_hub.files import write_json
    from pivot_hub.rehearsal.paths import narrow_copy, paths_of
    from pivot_hub.rehearsal.report import PathReport
    from pivot_hub.rehearsal.run import one_thread, rehearse

    one_thread()
    reports: dict[str, PathReport] = {}
    for loaded in all_loaded:
        with tempfile.TemporaryDirectory() as folder:
            narrow = narrow_copy(loaded, Path(folder))
            for name, build in paths_of(loaded).items():
                if name not in reports:
                    reports[name] = rehearse(name, lambda build=build, narrow=narrow: build(narrow))  # type: ignore[misc]
    write_json(Path(report), [each.to_dict() for each in reports.values()])


def run(arguments: list[str]) -> None:
    """Rehearse what the arguments of the process name; an error of the package ends it with its message."""
    library, report, *names = arguments
    try:
        main(library, report, [n for n in names if "=" not in n], [n for n in names if "=" in n])
    except PivotError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    run(sys.argv[1:])
