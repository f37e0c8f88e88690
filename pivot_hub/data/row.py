"""A row: what every annotation format becomes, and the reading of annotation files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pivot_hub.errors import DataError

IMAGE_TAG = "<image>"


@dataclass(frozen=True)
class Row:
    """One training row.

    Args:
        id: names the row in its file, as in `train.jsonl:12`.
        image: path of the image, `split/index` of a scene, or None for text alone.
        prompt: what the user says; an image goes where IMAGE_TAG stands, in front if it stands nowhere.
        chosen: the answer.
        rejected: the worse answer of a preference pair.
        earlier: turns before the prompt, as (role, text).
        group: the source within the file, where it has several; a sample keeps their shares.
    """

    id: str
    image: str | None
    prompt: str
    chosen: str
    rejected: str | None = None
    earlier: tuple[tuple[str, str], ...] = ()
    group: str | None = None


def read_records(file: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """Yield the objects of a JSON list or a JSONL file, each named `file:row`, rows counted from 1."""
    with file.open(encoding="utf-8") as lines:
        if file.suffix == ".jsonl":
            numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
            for i, line in numbered:
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    yield f"{file.name}:{i}", DataError(f"{file.name}:{i}: not JSON ({error})")
                    continue
                yield f"{file.name}:{i}", _as_object(record, f"{file.name}:{i}")
            return
        try:
            records = json.load(lines)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}: not JSON ({error}); give a .json list or a .jsonl file.") from error
    if not isinstance(records, list):
        raise DataError(f"{file}: a list of rows is expected; give a .json list or a .jsonl file.")
    for i, record in enumerate(records, 1):
        yield f"{file.name}:{i}", _as_object(record, f"{file.name}:{i}")


def _as_object(record: Any, name: str) -> dict[str, Any] | DataError:
    return record if isinstance(record, dict) else DataError(f"{name}: a row is an object, not {record!r}")


def image_name(record: dict[str, Any], name: str) -> str | DataError | None:
    """The image of a record: a path below the images folder, or None for text alone."""
    image = record.get("image")
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if image is None or image == []:
        return None
    if not isinstance(image, str):
        return DataError(f"{name}: `image` names one image file, not {image!r}")
    if Path(image).is_absolute() or ".." in Path(image).parts:
        return DataError(f"{name}: image {image!r} leaves the images folder")
    return image
