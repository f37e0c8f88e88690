"""Files on this machine and behind URLs of fsspec (`hf://`, `s3://`, `gs://`), and patterns that name many of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import fsspec

from pivot_hub.data.image import MACHINE_ERRORS
from pivot_hub.errors import DataError, shown_text

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_WILD = re.compile(r"[*?\[{]")


@dataclass(frozen=True)
class StoredFile:
    """A file by its path or URL.

    Args:
        url: Path on this machine, or URL.
        name: Name of the file below the folder, or the fixed part of the pattern, that it was found by.
    """

    url: str
    name: str

    @property
    def local(self) -> Path | None:
        return None if is_url(self.url) else Path(self.url)

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.url).suffix.lower()

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open the file to read it from any place.

        Raises:
            DataError: The file cannot be opened.
        """
        with _reachable(self.url):
            file: IO[bytes] = Path(self.url).open("rb") if self.local else fsspec.open(self.url).open()  # noqa: SIM115
        with file:
            yield file

    def stamp(self) -> str:
        """Return a key that changes when the file is replaced: its size, with the time or the tag of its content.

        Raises:
            DataError: The file is gone.
        """
        with _reachable(self.url):
            if self.local:
                status = self.local.stat()
                return f"{status.st_size} {status.st_mtime_ns}"
            filesystem, path = fsspec.url_to_fs(self.url)
            filesystem.invalidate_cache()
            info = filesystem.info(path)
        tags = ("ETag", "etag", "blob_id", "sha256", "md5Hash", "checksum", "mtime", "LastModified", "created")
        found = [str(info[tag]) for tag in tags if info.get(tag) is not None]
        return f"{info.get('size')} {hashlib.sha256(repr(found).encode()).hexdigest()}"


def is_url(text: str) -> bool:
    """Return whether a text is a URL rather than a path of this machine."""
    return "://" in text


def is_pattern(text: str) -> bool:
    """Return whether a text names many files: by `*`, `?`, `[0-9]`, `{000..099}` or `{train,val}`."""
    return _WILD.search(text) is not None


def expand_braces(pattern: str) -> list[str]:
    """Replace `{000..099}` by its numbers, of the first one's width, and `{a,b}` by its words, in each combination."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    values = words.split(",") if words is not None else [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
    start, end = pattern[: match.start()], pattern[match.end() :]
    return [text for value in values for text in expand_braces(start + value + end)]


def without_braces(pattern: str) -> str:
    """Return a pattern that stays the same when the range of its braces grows: each becomes `*`."""
    return _BRACES.sub("*", pattern)


def find_files(pattern: str) -> list[StoredFile]:
    """Find the files that a pattern names, sorted by their paths.

    Args:
        pattern: Path or URL with `*`, `**`, `?`, `[0-9]` or braces.

    Raises:
        DataError: A file that braces name does not exist, the place cannot be reached, or there is no such file.
    """
    fixed = without_braces(pattern)
    start = fixed[: match.start()] if (match := _WILD.search(fixed)) else fixed
    root = start.rpartition("/")[0] + "/" if "/" in start else ""
    if is_url(root):
        filesystem, path = fsspec.url_to_fs(root)
        root = filesystem.unstrip_protocol(path).rstrip("/") + "/"
    urls: list[str] = []
    for name in expand_braces(pattern):
        found = _glob(name)
        if not found:
            raise DataError(f"{shown_text(name)} does not exist; check the pattern {shown_text(pattern)}.")
        urls += found
    return [StoredFile(url, url.removeprefix(root)) for url in sorted(set(urls))]


def list_urls(folder: str) -> list[StoredFile]:
    """List all files below a URL, sorted by name.

    Raises:
        DataError: The place cannot be reached.
    """
    with _reachable(folder):
        filesystem, root = fsspec.url_to_fs(folder)
        paths = sorted(filesystem.find(root))
    return [
        StoredFile(filesystem.unstrip_protocol(path), path.removeprefix(root.rstrip("/")).lstrip("/")) for path in paths
    ]


def exists(url: str) -> bool:
    """Return whether a path or URL is there.

    Raises:
        DataError: The place cannot be reached.
    """
    with _reachable(url):
        if not is_url(url):
            return Path(url).exists()
        filesystem, path = fsspec.url_to_fs(url)
        return bool(filesystem.exists(path))


def is_remote_folder(url: str) -> bool:
    """Return whether a URL is a folder.

    Raises:
        DataError: The place cannot be reached.
    """
    with _reachable(url):
        filesystem, path = fsspec.url_to_fs(url)
        return bool(filesystem.isdir(path))


def _glob(pattern: str) -> Sequence[str]:
    with _reachable(pattern):
        filesystem, path = fsspec.url_to_fs(pattern)
        paths: list[str] = [p for p in filesystem.glob(path) if filesystem.isfile(p)]
    if is_url(pattern):
        return [filesystem.unstrip_protocol(p) for p in paths]
    # fsspec returns absolute paths; names stay as they were given.
    start = path.removesuffix(pattern)
    return [p.removeprefix(start) for p in paths]


@contextmanager
def _reachable(url: str) -> Iterator[None]:
    """Turn what a file system raises into a DataError that names the URL."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"{shown_text(url)} cannot be opened ({error}); install that package.") from error
    except FileNotFoundError:
        raise DataError(f"{shown_text(url)} does not exist; check the path.") from None
    except Exception as error:  # each file system has errors of its own
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            raise
        reason = shown_text((str(error).strip().splitlines() or [type(error).__name__])[0], 160)
        raise DataError(f"{shown_text(url)} cannot be read ({reason}); check the path and the login.") from error


def join_url(folder: str, name: str) -> str:
    """Return the path or URL of a file below a folder.

    Raises:
        DataError: The name leads out of the folder.
    """
    path = PurePosixPath(name)
    if is_url(name) or path.is_absolute() or ".." in path.parts:
        raise DataError(f"{shown_text(name)} is a file outside the data set; put the images below its folder.")
    return f"{folder.rstrip('/')}/{name}" if folder else name
