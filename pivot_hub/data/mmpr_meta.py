"""Meta files: one JSON object that names many annotation files, as InternVL's data and MMPR-v1.2 are published."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pivot_hub.errors import DataError


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
    with file.open(encoding="utf-8") as start:
        if start.read(4096).lstrip()[:1] != "{":  # a list of rows may be gigabytes: it is not read here
            return None
    text = file.read_text(encoding="utf-8")
    try:
        entries = json.loads(text)
    except json.JSONDecodeError:
        try:  # the meta file of MMPR-v1.2 is published with a comma after its last entry
            entries = json.loads(re.sub(r",(\s*[}\]])", r"\1", text))
        except json.JSONDecodeError as error:
            raise DataError(f"{file}: not JSON ({error}); download it again.") from error
    return [_source(file, name, entry) for name, entry in entries.items()]


def _source(file: Path, name: str, entry: Any) -> MetaSource:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("root", "annotation")):
        raise DataError(f"{file}: {name}: a source has `root` and `annotation`; is this a meta file?")
    for path in (entry["root"], entry["annotation"]):
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise DataError(f"{file}: {name}: {path!r} is outside the data folder; give paths relative to it.")
    times = entry.get("repeat_time", 1)
    if not isinstance(times, int) or times < 1:
        raise DataError(f"{file}: {name}: repeat_time is {times!r}; give a whole number, or use `sample`.")
    return MetaSource(name, entry["root"], entry["annotation"], times, entry.get("length"))
