"""MMPR's format: JSONL rows of `image, question, chosen, rejected`, and the meta file that names many (MMPR-v1.2)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from pivot_hub.data.row import Row, image_name, read_records
from pivot_hub.errors import DataError


def read_rows(file: Path, base: Path) -> Iterator[Row | DataError]:
    """Yield one preference row for each line; a line without its keys is yielded as the error that says so.

    Args:
        file: JSONL of rows; or a meta file, a JSON object of sources, each with `root` (of its images), `annotation`,
            `repeat_time` and `length`, as OpenGVLab/MMPR-v1.2 publishes it.
        base: folder that a meta file's paths start from. Its rows name their source as `group`.

    Raises:
        DataError: a meta file cannot be read, or a file it names is not there.
    """
    sources = _meta(file)
    if sources is None:
        yield from _rows_of(file)
        return
    for name, source in sources.items():
        annotation = base / source["annotation"]
        if not annotation.is_file():
            raise DataError(
                f"{file}: {name}: {annotation} does not exist; `images` is the folder its paths start from."
            )
        found: list[Row | DataError] = []
        for item in _rows_of(annotation):
            if isinstance(item, DataError):
                found.append(DataError(f"{name}/{item}"))
                continue
            image = None if item.image is None else str(PurePosixPath(source["root"], item.image))
            found.append(replace(item, id=f"{name}/{item.id}", image=image, group=name))
        wanted = source.get("length", len(found))
        if wanted != len(found):
            yield DataError(f"{name}: {len(found)} rows where the meta file says {wanted}: download it again")
        for _ in range(source.get("repeat_time", 1)):
            yield from found


def _rows_of(file: Path) -> Iterator[Row | DataError]:
    for name, raw in read_records(file):
        if isinstance(raw, DataError):
            yield raw
            continue
        missing = [k for k in ("question", "chosen", "rejected") if not isinstance(raw.get(k), str)]
        if missing:
            yield DataError(f"{name}: `{missing[0]}` is missing or not text")
            continue
        image = image_name(raw, name)
        if isinstance(image, DataError):
            yield image
            continue
        yield Row(name, image, raw["question"], raw["chosen"], raw["rejected"])


def _meta(file: Path) -> dict[str, dict[str, Any]] | None:
    """The sources of a meta file, or None for a file of rows."""
    if file.suffix != ".json":
        return None
    text = file.read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        try:  # MMPR-v1.2's is published with a comma after its last entry
            found = json.loads(re.sub(r",(\s*[}\]])", r"\1", text))
        except json.JSONDecodeError as error:
            raise DataError(f"{file}: not JSON ({error}); download it again.") from error
    if not isinstance(found, dict):
        return None
    for name, source in found.items():
        if not isinstance(source, dict) or not all(isinstance(source.get(k), str) for k in ("root", "annotation")):
            raise DataError(f"{file}: {name}: a source has `root` and `annotation`; is this MMPR's meta file?")
        for path in (source["root"], source["annotation"]):
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise DataError(f"{file}: {name}: {path!r} leaves the folder of the data.")
        times = source.get("repeat_time", 1)
        if not isinstance(times, int) or times < 1:
            raise DataError(f"{file}: {name}: repeat_time is {times!r}; give a whole number, and a sample by `sample`.")
    return found
