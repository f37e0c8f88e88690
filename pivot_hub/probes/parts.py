"""Names that data sets give their parts: train, validation and test, in any case."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Literal

from pivot_hub.errors import ProbeError

Part = Literal["train", "val", "test"]
_FORM = r"(?:{})(?:[ _.-]?(?:set|split|part|data|images?|imgs?))?(?:[ _.-]?20\d\d)?"  # "Test", "test_set", "val2017"
_NAMES: Mapping[Part, re.Pattern[str]] = {
    "train": re.compile(_FORM.format("train|training|trn")),
    "val": re.compile(_FORM.format("val|valid|validation|dev|eval|evaluation")),
    "test": re.compile(_FORM.format("test|testing|tst")),
}
_WORDS: Mapping[Part, set[str]] = {
    "train": {"train", "training", "trn"},
    "val": {"val", "valid", "validation"},
    "test": {"test", "testing", "tst"},
}


def part_of(name: str) -> Part | None:
    """Return the part that a folder or a split is named for, or None: `Training`, `test_set`, `val2017`, `eval`."""
    plain = name.strip().lower()
    return next((part for part, pattern in _NAMES.items() if pattern.fullmatch(plain)), None)


def find_parts(owner: str, names: Iterable[str]) -> dict[Part, str]:
    """Find the parts among the first folders, or the splits, of a data set.

    A part that was taken for a class, or dropped because its name is unknown, would give a wrong number without a word.
    So other names may stand beside parts only if there is a part to train on and one to report.

    Args:
        owner: The data set, as the error message names it.
        names: Names of its folders or splits.

    Returns:
        The name of each part; empty where the names are no parts.

    Raises:
        ProbeError: A part is there twice, there is no train part, or none to report beside names that are no parts.
    """
    ordered = sorted(set(names))
    parts: dict[Part, str] = {}
    for name in ordered:
        part = part_of(name)
        if part is None:
            continue
        if part in parts:
            raise ProbeError(f"{owner}: {parts[part]!r} and {name!r} are both the {part} part; keep one of them.")
        parts[part] = name
    others = [name for name in ordered if part_of(name) is None]
    if parts and others and not ("train" in parts and len(parts) > 1):
        first = next(iter(parts.values()))
        raise ProbeError(
            f"{owner}: {first!r} is a part of the data, and {others[0]!r} beside it is none; move one of them away, or "
            "name the parts train, val and test."
        )
    if parts and "train" not in parts:
        raise ProbeError(f"{owner}: there is no train part, only {', '.join(parts.values())}; give data with one.")
    if not parts and len(ordered) in (2, 3) and len({p for name in ordered for p in _part_words(name)}) == len(ordered):
        raise ProbeError(
            f"{owner}: {' and '.join(map(repr, ordered))} look like parts of the data, not like classes; name them "
            "train, val and test."
        )
    return parts


def is_hidden(name: str) -> bool:
    """Return whether a path belongs to a system rather than to the data: `.DS_Store`, `__MACOSX/train/._1.jpg`."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _part_words(name: str) -> list[Part]:
    """Return the part that a word of a name stands for, as in `seg_train`, in a list that is empty otherwise."""
    words = set(re.split(r"[\W\d_]+", name.lower()))
    return [part for part, known in _WORDS.items() if words & known][:1]
