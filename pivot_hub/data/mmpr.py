"""MMPR's format: JSONL rows of `image, question, chosen, rejected` (OpenGVLab/MMPR-v1.2)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pivot_hub.data.row import Row, image_name, read_records
from pivot_hub.errors import DataError


def read_rows(file: Path) -> Iterator[Row | DataError]:
    """Yield one preference row for each line; a line without its keys is yielded as the error that says so."""
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
