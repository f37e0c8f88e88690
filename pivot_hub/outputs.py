"""Output folders: one process at a time, only outputs of the same kind replaced, whole or not at all.

The lock of an output is `filelock.SoftFileLock`: a file beside the output with the owner's process id, host and start.
A process that was killed leaves it. The next process on the same host proves the owner dead and takes the lock over,
together with the files that the owner had not finished.
"""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import psutil
from filelock import SoftFileLock, Timeout

from pivot_hub.errors import OutputError

# An owner writes its name into its lock file at once: an empty one this old is of a process killed in between.
UNNAMED_S = 2.0
LOCK, NEW, OLD = ".pivot-lock", ".pivot-new", ".pivot-old"
# Files that file managers, Python, git and the Hub's client leave in folders of others.
BYSTANDERS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini", "__pycache__", ".git", ".gitattributes", ".gitignore"})


def is_bystander(name: str) -> bool:
    """Return whether a file of a folder, by its relative name, was left there by a file manager, git or the like."""
    parts = PurePosixPath(name).parts
    return not BYSTANDERS.isdisjoint(parts) or parts[:2] == (".cache", "huggingface")


@dataclass(frozen=True)
class OutputKind:
    """A kind of output folder.

    Args:
        name: Name of the kind in messages, with its article.
        manifest: JSON file of the folder whose `files`, a mapping or a list, names every other file of the output.
        command: Command that writes such outputs.
        also: Patterns of further files, which the manifest does not name.
        mark: A file that every output of this kind holds, and no output of another kind.
    """

    name: str
    manifest: str
    command: str
    also: tuple[str, ...] = ()
    mark: str | None = None

    def foreign_file(self, folder: Path) -> str | None:
        """Return the first file of a folder that no output of this kind holds, or None if there is none.

        The history of a git clone is such a file: nothing else may hold it.
        """
        try:
            manifest = json.loads((folder / self.manifest).read_text())
            files = {*manifest["files"], self.manifest}
        except (OSError, ValueError, KeyError, TypeError):
            files = set()
        if self.mark is not None and self.mark not in files:
            files = set()
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_dir() and not path.is_symlink():
                continue
            if is_bystander(name) and ".git" not in PurePosixPath(name).parts:
                continue
            if not files or not (name in files or any(fnmatch(name, pattern) for pattern in self.also)):
                return name
        return None


# A stage's output and a packed bundle have a manifest of the same name.
ENCODER = OutputKind("an encoder repository", "provenance.json", "pivot extract", mark="modeling_pivot.py")
# export.json names the models; their configs and the weights beside them follow from those.
EXPORT = OutputKind(
    "an export",
    "export.json",
    "pivot export",
    also=("config.json", "preprocessor_config.json", "onnx/*.onnx_data", "quanto/quantization_map.json"),
)


@contextmanager
def lock_output(target: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of an output while the block runs, after clearing what killed processes left beside it.

    Args:
        target: Output folder or file; it need not exist.
        wait: Whether to wait for another process that holds the lock, as for a cache; otherwise its owner is named.

    Raises:
        OutputError: Another process holds the lock.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(target.parent)
    file = _beside(target, LOCK)
    lock = SoftFileLock(file, timeout=-1 if wait else 0, poll_interval=0.2)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(
            f"{target}: {_owner(file) or 'another process'} is working on this output; wait for it to end, or give "
            f"another output. If it died on another machine, delete {file}."
        ) from None
    try:
        _recover(target)
        yield
    finally:
        lock.release()


@contextmanager
def whole_folder(target: Path, kind: OutputKind | None = None, wait: bool = False) -> Iterator[Path]:
    """Give an empty folder to fill, which takes the target's place when the block ends, and is deleted if it fails.

    Args:
        target: Output folder.
        kind: Kind of the output: a folder at the target that holds only files of such an output is replaced. None
            replaces nothing.
        wait: As in `lock_output`.

    Raises:
        OutputError: The target is a file or holds files of its own, or another process is working on it. Nothing was
            touched.
    """
    with lock_output(target, wait):
        check_replaceable(target, kind)
        beside, old = _beside(target, NEW), _beside(target, OLD)
        beside.mkdir()
        try:
            yield beside
            check_replaceable(target, kind)  # the block may have taken hours
            if target.exists():
                target.replace(old)
            beside.replace(target)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """Give a folder for the time of the block, after deleting those that killed processes left.

    Args:
        name: What the folder is for; it is part of its name in the system's folder for temporary files.
    """
    target = Path(tempfile.gettempdir()) / f"{name}-{secrets.token_hex(8)}"
    with lock_output(target):
        folder = _beside(target, NEW)
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def check_replaceable(target: Path, kind: OutputKind | None) -> None:
    """Refuse a target that holds anything but an output of the kind; an empty folder will be filled.

    Raises:
        OutputError: The target is a file, a link, or a folder with a file of its own, which the message names.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise OutputError(f"{target} is not a folder; give another output. Nothing was touched.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if kind is None:
        raise OutputError(f"{target} exists and is not empty; give another output. Nothing was touched.")
    if foreign := kind.foreign_file(target):
        raise OutputError(
            f"{target} holds {foreign}, which is not part of {kind.name} that `{kind.command}` wrote, so the folder is "
            "not replaced; give another output. Nothing was touched."
        )


def clear_leftovers(folder: Path) -> None:
    """Delete the unfinished outputs of processes that were killed, and put back an output that was being replaced."""
    for file in folder.glob(f".*{LOCK}"):
        target = folder / file.name.removeprefix(".").removesuffix(LOCK)
        _clear_unnamed(file)
        lock = SoftFileLock(file, timeout=0)
        with suppress(Timeout, OSError), lock:  # a living owner keeps its files
            _recover(target)
    for file in folder.glob(f".*{LOCK}.break.*"):
        _clear_takeover(file)


def _clear_takeover(file: Path) -> None:
    """Delete the file of a process that was killed while it took a lock over, unless a living owner's lock is in it.

    The file is filelock's: its name ends with the process id and a random number, its lines are process and host.
    """
    with suppress(OSError, ValueError):
        process = int(file.name.rpartition(".break.")[2].partition(".")[0])
        here = socket.gethostname()
        owner, host = (file.read_text().splitlines() or [str(process), here])[:2]
        if host == here and not (psutil.pid_exists(process) or psutil.pid_exists(int(owner))):
            file.unlink()


def _recover(target: Path) -> None:
    """Finish or undo the replacement that a killed process began. The lock is held."""
    beside, old = _beside(target, NEW), _beside(target, OLD)
    if old.exists() and not target.exists():  # killed between the two renames
        old.replace(target)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(beside, ignore_errors=True)


def _beside(target: Path, suffix: str) -> Path:
    if not target.name:
        raise OutputError(f"{target} is the current folder, which cannot be replaced; give a folder below it.")
    return target.with_name(f".{target.name}{suffix}")


def _clear_unnamed(lock: Path) -> None:
    """Delete a lock file that stays empty; filelock would wait for its owner for ever.

    One of another user, as may lie in the system's folder for temporary files, is left alone.
    """
    with suppress(OSError):
        seen = lock.stat()
        if seen.st_size == 0:
            time.sleep(UNNAMED_S)
            now = lock.stat()
            if (now.st_size, now.st_ino, now.st_ctime_ns) == (0, seen.st_ino, seen.st_ctime_ns):
                lock.unlink()


def _owner(lock: Path) -> str | None:
    """Describe the owner of a lock: process, host and time; None where the file names none."""
    with suppress(OSError, ValueError, IndexError):
        process, host = lock.read_text().splitlines()[:2]
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(lock.stat().st_mtime))
        return f"process {process} on {host} (since {since})"
    return None
