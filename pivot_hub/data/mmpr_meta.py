"""Meta files: one JSON object that names many annotation files, as InternVL's data and MMPR-v1.2 are published."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from pivot_hub.data.row import bad_character, open_text
from pivot_hub.errors import DataError, shown, shown_text


@dataclass(frozen=True)
class MetaSource:
    """One entry of a meta file.

    Args:
        name: Name of the source.
        root: Folder of its images, from the folder that all paths start from.
        annotation: Annotation file, from the same folder.
        repeat_time: Number of times that its rows are seen in an epoch.
        length: Number of rows that it should have, where the meta file states it.
    """

    name: str
    root: str
    annotation: str
    repeat_time: int = 1
    length: int | None = None


def read_meta(file: Path) -> list[MetaSource] | None:
    """Read the sources of a meta file.

    Args:
        file: JSON file: a meta file, or rows.

    Returns:
        The sources, or None for a file of rows.

    Raises:
        DataError: The file is not JSON, or a source has bad paths or a bad `repeat_time`; the message names it.
    """
    if file.suffix != ".json":
        return None
    with open_text(file) as start:
        if start.read(4096).lstrip()[:1] != "{":  # a list of rows may be gigabytes: it is not read here
            return None
    with open_text(file) as whole:
        text = whole.read()
    if (character := bad_character(text)) is not None:
        raise DataError(f"{file}: holds {character!r}, because it is not UTF-8; convert the file to UTF-8.")
    try:
        entries = json.loads(text, object_pairs_hook=partial(_unique_keys, file))
    except (ValueError, RecursionError):
        try:  # the meta file of MMPR-v1.2 is published with a comma after its last entry
            entries = json.loads(re.sub(r",(\s*[}\]])", r"\1", text), object_pairs_hook=partial(_unique_keys, file))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}: not JSON ({shown_text(str(error))}); download it again.") from error
    return [_source(file, name, entry) for name, entry in entries.items()]


def _unique_keys(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, of which no key may occur twice: of two sources of one name, the first would be lost."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        name = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise DataError(f"{file}: {shown(name)} is given twice; rename or remove one.")
    return entries


def _source(file: Path, name: str, entry: Any) -> MetaSource:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("root", "annotation")):
        raise DataError(f"{file}: {name}: a source has `root` and `annotation`; is this a meta file?")
    if bad_character(name, entry["root"], entry["annotation"]) is not None:
        raise DataError(f"{file}: {shown(name)}: holds half of a surrogate pair, which is no character; fix it.")
    for path in (entry["root"], entry["annotation"]):
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise DataError(f"{file}: {name}: {shown(path)} is outside the data folder; give paths relative to it.")
    times = entry.get("repeat_time", 1)
    if not isinstance(times, int) or times < 1:
        raise DataError(f"{file}: {name}: repeat_time is {shown(times)}; give a whole number, or use `sample`.")
    return MetaSource(name, entry["root"], entry["annotation"], times, entry.get("length"))
