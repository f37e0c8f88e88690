"""Write files atomically: they are written beside their place, then renamed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
# How torch and safetensors report a full disk: their errors have no errno.
FULL_DISK_TEXTS = (
    "No space left on device",
    "Disk quota exceeded",
    "file write failed",
    "PytorchStreamWriter failed writing",
)


def shipped_folder(name: str) -> Path:
    """Return a folder of data, such as `recipes`: inside the package in a wheel, beside it in a checkout."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file in one step: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Write values as JSON in one step, indented, with a final newline."""
    write_whole(path, json.dumps(values, indent=2) + "\n")


def disk_is_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that it was raised from, says that the disk is full."""
    while error is not None:
        text = str(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # torch checks the length of what it wrote: "unexpected pos 6827200 vs 6827088".
        if any(part in text for part in FULL_DISK_TEXTS) or ("unexpected pos" in text and " vs " in text):
            return True
        error = error.__cause__ or error.__context__
    return False
