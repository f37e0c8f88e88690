"""Routes that read files: listings, small files, and large files by signed links."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

from starlette.responses import FileResponse, JSONResponse, Response

from .hub import PAGES, REPO, Call, Routes
from .store import TYPES, Entry, HubError


async def _tree(call: Call) -> Response:
    commit = call.repo().commit_at(call.part("revision"))
    below = call.part("path").rstrip("/") + "/" if "path" in call.request.path_params else ""
    recursive = call.request.query_params.get("recursive", "").lower() in ("1", "true")
    listed: dict[str, dict[str, Any]] = {}
    for path, entry in commit.tree.items():
        if not path.startswith(below):
            continue
        parts = path.removeprefix(below).split("/")
        for depth in range(1, len(parts)):
            folder = below + "/".join(parts[:depth])
            if depth == 1 or recursive:
                oid = hashlib.sha1(f"{commit.oid}{folder}".encode()).hexdigest()
                listed[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
        if len(parts) == 1 or recursive:
            listed[path] = _tree_metadata(path, entry)
    if below and not listed:
        raise HubError(404, f"{below} does not exist", "EntryNotFound", headers={"X-Repo-Commit": commit.oid})
    return JSONResponse(list(listed.values()))


async def _paths_info(call: Call) -> Response:
    commit = call.repo().commit_at(call.part("revision"))
    wanted = parse_qs((await call.request.body()).decode())["paths"]  # the client sends a form here
    return JSONResponse([_tree_metadata(p, commit.tree[p]) for p in wanted if p in commit.tree])


async def _resolve(call: Call) -> Response:
    """Answer with a small file at once, and with a signed link to another host for a large one."""
    repo = call.repo()
    commit, entry = repo.entry_at(call.part("revision"), call.part("path"))
    name = quote(call.part("path").rsplit("/", 1)[-1])
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{entry.etag}"'}
    headers["Content-Disposition"] = f'inline; filename="{name}"'
    if entry.sha256 is None:
        return _file(call.hub.store.path(repo, entry), headers)
    # Loopback has two names. The client takes the other one for the Hub's content network, and sends it no token.
    host = "localhost" if call.request.url.hostname == "127.0.0.1" else "127.0.0.1"
    path = f"/cdn/{repo.type}s/{repo.name}/{entry.sha256}?signature={call.hub.sign(entry.sha256)}"
    linked = {"X-Linked-ETag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    location = {"Location": f"http://{host}:{call.request.url.port}{path}"}
    return Response(status_code=302, headers=headers | linked | location)


async def _cdn(call: Call) -> Response:
    path = signed_path(call)
    if not path.is_file():
        raise HubError(404, "no such object")
    return _file(path, {"ETag": f'"{path.name}"'})


def _file(path: Path, headers: dict[str, str]) -> Response:
    """Answer with a file, or with the range of it that the request names."""
    return FileResponse(path, headers=headers, media_type="application/octet-stream")


def signed_path(call: Call) -> Path:
    """Return the path of a link's large file in the store, if this hub signed the link.

    Raises:
        HubError: The signature is wrong, or the repository does not exist.
    """
    oid = call.part("oid")
    if not hmac.compare_digest(call.request.query_params.get("signature", ""), call.hub.sign(oid)):
        raise HubError(403, "the link is not signed by this hub")
    repo = call.hub.store.repos.get((TYPES[call.part("type")], f"{call.part('namespace')}/{call.part('name')}"))
    if repo is None:
        raise HubError(404, "Repository not found", "RepoNotFound")
    return call.hub.store.large_path(repo, oid)


def blob_metadata(entry: Entry) -> dict[str, Any]:
    """Describe a file as in a repository's info."""
    metadata: dict[str, Any] = {"size": entry.size, "blobId": entry.blob}
    if entry.sha256:
        metadata["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": 134}
    return metadata


def _tree_metadata(path: str, entry: Entry) -> dict[str, Any]:
    metadata: dict[str, Any] = {"type": "file", "oid": entry.blob, "size": entry.size, "path": path}
    if entry.sha256:
        metadata["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 134}
    return metadata


ROUTES: Routes = [
    ("GET", REPO + "/tree/{revision}", _tree),
    ("GET", REPO + "/tree/{revision}/{path:path}", _tree),
    ("POST", REPO + "/paths-info/{revision}", _paths_info),
    ("GET", "/cdn/{type}/{namespace}/{name}/{oid}", _cdn),
    *(("GET", page + "/resolve/{revision}/{path:path}", _resolve) for page in PAGES),
]
