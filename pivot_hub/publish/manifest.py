"""The files that a manifest lists, which are the only ones that are published or pulled."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from pivot_hub.errors import PublishError


def manifest_files(folder: Path) -> list[str]:
    """List the files of a repository, its manifest included, and refuse those that lie elsewhere.

    Args:
        folder: Folder of the repository, which may be a snapshot in the Hub's cache: there, each file is a link to the
            cache's own copy.

    Raises:
        PublishError: The manifest cannot be read, or a name or a link leads out of the repository.
    """
    try:
        names = [*json.loads((folder / "provenance.json").read_text())["files"], "provenance.json"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PublishError(f"{folder}: provenance.json is missing or unreadable; pull the repository again.") from error
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parents[1]
    for name in names:
        check_name(name, str(folder))
        if not _lies_in(root, folder / name):
            raise PublishError(
                f"{folder}: {name} is a link out of the repository; put the file itself in its place, or delete it."
            )
    return names


def _lies_in(root: Path, file: Path) -> bool:
    """Whether a file, or what it links to, lies in a folder."""
    try:
        return file.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # a link that leads to itself
        return False


def check_name(name: str, repository: str) -> None:
    """Refuse a file whose name leads out of its repository.

    Raises:
        PublishError: The name is absolute, or holds `..` or a backslash.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
        raise PublishError(f"{repository} lists {name!r}, which leads out of the repository; nothing of it was used.")
