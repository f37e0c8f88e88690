"""Routes that receive files: large ones by git-LFS, in one piece or in parts."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse, Response

from .hub import PAGES, REPO, Call, Routes
from .routes_files import signed_path
from .store import HubError, is_large

BLOCK = 1 << 20
LARGE = "/lfs/{type}/{namespace}/{name}/{oid}"


async def _preupload(call: Call) -> Response:
    repo = call.committable_repo()
    known = repo.commit_at(call.part("revision")).tree
    files = []
    for file in (await call.json())["files"]:
        path = file["path"]
        mode = "lfs" if is_large(path, file["size"], base64.b64decode(file["sample"])) else "regular"
        metadata = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        files.append(metadata | ({"oid": known[path].etag} if path in known else {}))
    return JSONResponse({"files": files})


async def _lfs_batch(call: Call) -> Response:
    repo = call.committable_repo()
    objects = []
    for wanted in (await call.json())["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if not call.hub.store.large_path(repo, oid).is_file():
            link = call.url(f"/lfs/{repo.type}s/{repo.name}/{oid}")
            signature = f"signature={call.hub.sign(oid)}"
            upload: dict[str, Any] = {"href": f"{link}?{signature}"}
            if size > call.hub.part_bytes:
                parts = -(-size // call.hub.part_bytes)
                header = {f"{n:05}": f"{link}/{n}?{signature}" for n in range(1, parts + 1)}
                header["chunk_size"] = str(call.hub.part_bytes)
                upload = {"href": f"{link}/complete?{signature}", "header": header}
            answer["actions"] = {"upload": upload, "verify": {"href": f"{link}/verify"}}
        objects.append(answer)
    transfer = "multipart" if any(o["size"] > call.hub.part_bytes for o in objects) else "basic"
    return JSONResponse({"transfer": transfer, "objects": objects}, media_type="application/vnd.git-lfs+json")


async def _lfs_put(call: Call) -> Response:
    path = signed_path(call)
    with await _received(call) as file:
        call.hub.store.put_large(path, _blocks(file))
    return Response(headers={"ETag": f'"{path.name}"'})


async def _lfs_put_part(call: Call) -> Response:
    path, number = signed_path(call), int(call.part("number"))
    with await _received(call) as file:
        call.hub.store.keep(_part_path(path, number), _blocks(file))
    return Response(headers={"ETag": f'"{path.name[:16]}-{number}"'})


async def _lfs_complete(call: Call) -> Response:
    path = signed_path(call)
    parts = [_part_path(path, int(p["partNumber"])) for p in (await call.json())["parts"]]

    def blocks() -> Iterator[bytes]:
        for part in parts:
            with part.open("rb") as file:
                yield from _blocks(file)

    call.hub.store.put_large(path, blocks())
    for part in parts:
        part.unlink()
    return JSONResponse({})


async def _lfs_verify(call: Call) -> Response:
    body = await call.json()
    path = call.hub.store.large_path(call.repo(write=True), call.part("oid"))
    if not path.is_file() or path.stat().st_size != body["size"]:
        raise HubError(404, "the object was not uploaded completely")
    return JSONResponse({})


async def _received(call: Call) -> Any:
    """Write the body to a temporary file, which is deleted when it is closed or when the connection breaks."""
    file = tempfile.TemporaryFile(dir=call.hub.store.folder)  # noqa: SIM115  (the caller closes it)
    try:
        async for block in call.request.stream():
            file.write(block)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _blocks(file: Any) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def _part_path(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.part{number:05}")


ROUTES: Routes = [
    ("POST", REPO + "/preupload/{revision}", _preupload),
    *(("POST", page + ".git/info/lfs/objects/batch", _lfs_batch) for page in PAGES),
    ("PUT", LARGE, _lfs_put),
    ("PUT", LARGE + "/{number}", _lfs_put_part),
    ("POST", LARGE + "/complete", _lfs_complete),
    ("POST", LARGE + "/verify", _lfs_verify),
]
