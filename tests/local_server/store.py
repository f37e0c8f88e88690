"""The state of a hub: repositories with commits, refs and pull requests, files by hash, and collections."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pivot_hub.files import write_json

MAIN = "refs/heads/main"
# Suffixes of files that the Hub stores outside git, whatever their size.
LFS_SUFFIXES = (".safetensors", ".onnx", ".onnx_data", ".bin", ".pt", ".npy", ".parquet", ".zip")
# Names become parts of paths in the store's folder, or on the machine of a client.
TYPES = {"models": "model", "datasets": "dataset", "spaces": "space"}
NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")
LFS_BYTES = 10 * 1024 * 1024
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class HubError(Exception):
    """An error that the Hub answers with.

    Args:
        status: Status of the HTTP answer.
        message: Error message, in the Hub's words.
        code: Value of X-Error-Code, by which the client chooses its exception.
        extra: Further keys of the answer's JSON.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        extra: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.extra, self.headers = dict(extra or {}), dict(headers or {})


@dataclass(frozen=True)
class Entry:
    """A file of a commit: its size, its blob in git, and for large files the SHA-256 that the blob points to."""

    size: int
    blob: str
    sha256: str | None = None

    @property
    def etag(self) -> str:
        return self.sha256 or self.blob


@dataclass(frozen=True)
class Commit:
    """A commit with its whole tree, path by path."""

    oid: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    tree: dict[str, Entry]


@dataclass
class Repo:
    """A repository: commits, the commit of each ref, and pull requests (number, title, author, status, base)."""

    type: str
    name: str
    private: bool
    created: str
    sdk: str | None = None
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pulls: list[dict[str, Any]] = field(default_factory=list)

    def commit_at(self, revision: str) -> Commit:
        """Find the commit of a branch, tag, full ref or hash.

        Raises:
            HubError: There is no such revision.
        """
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        matching = [c for oid, c in self.commits.items() if len(revision) >= 7 and oid.startswith(revision)]
        if len(matching) == 1:
            return matching[0]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def entry_at(self, revision: str, path: str) -> tuple[Commit, Entry]:
        commit = self.commit_at(revision)
        if path not in commit.tree:
            message = f"{path} does not exist on {revision!r}"
            raise HubError(404, message, "EntryNotFound", headers={"X-Repo-Commit": commit.oid})
        return commit, commit.tree[path]


class Store:
    """A hub's state in a folder. Every change renames one file, so a killed hub loses nothing that it confirmed.

    Args:
        folder: Folder of the state.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.RLock()
        self.repos: dict[tuple[str, str], Repo] = {}
        for file in sorted((folder / "repos").glob("*/*/*.json")):
            repo = _read_repo(json.loads(file.read_text()))
            self.repos[repo.type, repo.name] = repo
        known = folder / "collections.json"
        self.collections: list[dict[str, Any]] = json.loads(known.read_text()) if known.is_file() else []

    def create(self, type_: str, name: str, private: bool, sdk: str | None, author: str) -> Repo:
        """Create a repository with the file that the Hub adds to every repository.

        Raises:
            HubError: It exists, or its type or a part of its name is not one of the Hub's.
        """
        if type_ not in TYPES.values():
            raise HubError(400, f"{type_!r} is not a type of repository")
        if name.count("/") != 1 or not all(NAME.fullmatch(part) for part in name.split("/")):
            raise HubError(400, f"{name!r} is not a valid repository name")
        with self.lock:
            if (type_, name) in self.repos:
                raise HubError(409, f"You already created this {type_} repo: {name}", extra={"url": name})
            repo = Repo(type_, name, private, now(), sdk)
            blob = self.put_blob(GITATTRIBUTES)
            first = Entry(len(GITATTRIBUTES), blob)
            self._add(repo, MAIN, None, "initial commit", "", author, {".gitattributes": first})
            self.repos[type_, name] = repo
            return repo

    def commit(
        self,
        repo: Repo,
        ref: str,
        parent: str | None,
        title: str,
        description: str,
        author: str,
        tree: dict[str, Entry],
    ) -> Commit:
        """Add a commit with the given tree and move a ref to it, in one step.

        Raises:
            HubError: The ref is no longer at `parent`.
        """
        with self.lock:
            if repo.refs.get(ref) != parent:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            return self._add(repo, ref, parent, title, description, author, tree)

    def _add(
        self,
        repo: Repo,
        ref: str,
        parent: str | None,
        title: str,
        description: str,
        author: str,
        tree: dict[str, Entry],
    ) -> Commit:
        date = now()
        files = {path: asdict(entry) for path, entry in sorted(tree.items())}
        unique = json.dumps([parent, title, author, time.time_ns(), files])
        oid = hashlib.sha1(unique.encode()).hexdigest()
        commit = Commit(oid, parent, title, description, author, date, dict(sorted(tree.items())))
        repo.commits[oid] = commit
        repo.refs[ref] = oid
        self.save(repo)
        return commit

    def save(self, repo: Repo) -> None:
        write_json(self.folder / "repos" / repo.type / f"{repo.name}.json", asdict(repo))

    def delete(self, repo: Repo) -> None:
        with self.lock:
            del self.repos[repo.type, repo.name]
            (self.folder / "repos" / repo.type / f"{repo.name}.json").unlink()

    def save_collections(self) -> None:
        write_json(self.folder / "collections.json", self.collections)

    def put_blob(self, content: bytes) -> str:
        """Store a small file under its git hash."""
        oid = git_sha1(content)
        self.keep(self.folder / "blobs" / oid, [content])
        return oid

    def put_large(self, path: Path, chunks: Iterable[bytes]) -> None:
        """Store a large file under its SHA-256, which the content is checked against.

        Raises:
            HubError: The content has another hash.
        """
        digest = hashlib.sha256()

        def hashed() -> Iterable[bytes]:
            for chunk in chunks:
                digest.update(chunk)
                yield chunk
            if digest.hexdigest() != path.name:
                raise HubError(400, f"the content is not that of {path.name}")

        self.keep(path, hashed())

    def keep(self, path: Path, chunks: Iterable[bytes]) -> None:
        """Write a file in one step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{threading.get_ident()}")
        try:
            with beside.open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    def large_path(self, repo: Repo, sha256: str) -> Path:
        """Return the path of a large file; each repository has its own copy.

        Raises:
            HubError: The hash is not a SHA-256, so that it may be the path of another file.
        """
        if not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
            raise HubError(400, f"{sha256!r} is not a SHA-256")
        return self.folder / "lfs" / repo.type / repo.name / sha256

    def path(self, repo: Repo, entry: Entry) -> Path:
        return self.large_path(repo, entry.sha256) if entry.sha256 else self.folder / "blobs" / entry.blob


def large_entry(sha256: str, size: int) -> Entry:
    """Make the entry of a large file; its git blob is a pointer of three lines."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return Entry(size, git_sha1(pointer.encode()), sha256)


def git_sha1(content: bytes) -> str:
    """Compute the hash that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub stores a file outside git: by its name, by its size, or because it is binary."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_BYTES or b"\0" in sample)


def checked_path(path: str) -> str:
    """Return the path of a file in a repository.

    Raises:
        HubError: A client that downloads the repository would write outside of its folder.
    """
    parts = PurePosixPath(path).parts
    if not parts or str(PurePosixPath(path)) != path or path.startswith("/") or {"..", ".git"} & {*parts}:
        raise HubError(400, f"{path!r} is not a valid path of a file")
    if "\\" in path or "\0" in path:
        raise HubError(400, f"{path!r} is not a valid path of a file")
    return path


def now() -> str:
    """Format the current time as the Hub does."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


def _read_repo(metadata: dict[str, Any]) -> Repo:
    commits = {
        oid: Commit(**{**c, "tree": {path: Entry(**e) for path, e in c["tree"].items()}})
        for oid, c in metadata["commits"].items()
    }
    return Repo(**{**metadata, "commits": commits})
