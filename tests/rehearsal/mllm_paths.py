"""The process that rehearses whole MLLMs: the paths of each recipe, under names that begin with the recipe's folder.

Its arguments are those of `pivot_hub.rehearsal`, but the override is `only=NAMES`: the paths, separated by semicolons.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from pivot_hub.rehearsal.library import load

if __name__ == "__main__":
    load(sys.argv[1])  # before torch is imported

from pivot_hub.config.recipe import load_recipe
from pivot_hub.files import write_json
from pivot_hub.rehearsal.paths import narrow_copy, paths_of
from pivot_hub.rehearsal.run import one_thread, rehearse

if __name__ == "__main__":
    one_thread()
    reports = []
    *recipes, only = sys.argv[3:]
    names = only.removeprefix("only=").split(";")
    for recipe in recipes:
        loaded = load_recipe(recipe)
        with tempfile.TemporaryDirectory() as folder:
            narrow = narrow_copy(loaded, Path(folder))
            for name, build in paths_of(loaded).items():
                if name in names:
                    path = f"{loaded.path.parent.name} {name}"
                    reports.append(rehearse(path, lambda build=build, narrow=narrow: build(narrow)).to_dict())  # type: ignore[misc]
    write_json(Path(sys.argv[2]), reports)
