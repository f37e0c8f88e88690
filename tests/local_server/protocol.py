"""The Hub's HTTP protocol over a store: what huggingface_hub 1.3x and 2.x ask for to publish and to load.

Written after the client's own requests (huggingface_hub/hf_api.py, _commit_api.py, lfs.py, file_download.py). There is
no Xet: large files travel by git-LFS, to which the client falls back where hf_xet is missing or HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import hmac
import json
import re
import secrets
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, quote, unquote

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.local_server.metadata import metadata_problems
from tests.local_server.store import MAIN, Commit, Entry, HubError, Repo, Store, is_large, large_entry, now

TYPES = {"models": "model", "datasets": "dataset", "spaces": "space"}
NAME = re.compile(r"[\w.-]{1,96}")
BLOCK = 1 << 20
Handler = Callable[["Call"], Awaitable[Response]]


@dataclass(frozen=True)
class Account:
    """Who a token belongs to: a user, the organisations it may write to, and whether it may write at all."""

    name: str
    organisations: tuple[str, ...] = ()
    role: str = "write"

    def may_write(self, namespace: str) -> bool:
        return self.role == "write" and namespace in (self.name, *self.organisations)


class Hub:
    """A hub's state and accounts.

    Args:
        store: its repositories.
        accounts: by token.
        part_bytes: large files above this size are uploaded in parts of it.
    """

    def __init__(self, store: Store, accounts: dict[str, Account], part_bytes: int = 5_000_000_000) -> None:
        self.store, self.accounts, self.part_bytes = store, accounts, part_bytes
        self.key = secrets.token_bytes(16)  # signs the links that stand for a content network's

    def sign(self, oid: str) -> str:
        return hmac.new(self.key, oid.encode(), hashlib.sha256).hexdigest()[:32]


@dataclass(frozen=True)
class Call:
    """A request with the hub it is made to."""

    hub: Hub
    request: Request

    def part(self, name: str) -> str:
        """A part of the path, unquoted: revisions and file names may hold slashes."""
        return unquote(self.request.path_params[name])

    def account(self) -> Account | None:
        """Who asks; None without a token.

        Raises:
            HubError: the token is not known.
        """
        given = self.request.headers.get("authorization")
        if given is None:
            return None
        found = self.hub.accounts.get(given.removeprefix("Bearer "))
        if found is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return found

    def writer(self, namespace: str) -> Account:
        account = self.account()
        if account is None:
            raise HubError(401, "Unauthorized: a token is needed")
        if not account.may_write(namespace):
            raise HubError(403, f"You don't have the rights to write to {namespace} with this token")
        return account

    def repo(self, write: bool = False) -> Repo:
        """The repository of the path, if the asker may see it, or write to it."""
        type_ = TYPES[self.request.path_params.get("type", "models")]
        namespace, name = self.part("namespace"), self.part("name")
        found = self.hub.store.repos.get((type_, f"{namespace}/{name}"))
        account = self.account()
        known = account is not None and namespace in (account.name, *account.organisations)
        seen = found is not None and (known or not found.private)
        if found is None or not seen:
            raise HubError(404 if account else 401, "Repository not found", "RepoNotFound")
        if write:
            self.writer(namespace)
        return found

    async def json(self) -> dict[str, Any]:
        try:
            return cast(dict[str, Any], await self.request.json())
        except ValueError as error:
            raise HubError(400, f"not JSON: {error}") from error

    def url(self, path: str) -> str:
        return f"{self.request.url.scheme}://{self.request.url.netloc}{path}"


def build_app(hub: Hub) -> ASGIApp:
    """The hub as an ASGI application."""
    repo = "/api/{type}/{namespace}/{name}"
    large = "/lfs/{type}/{namespace}/{name}/{oid}"
    git = ("/{namespace}/{name}", "/{type}/{namespace}/{name}")
    routes = [
        ("GET", "/api/whoami-v2", _whoami),
        ("POST", "/api/validate-yaml", _validate_yaml),
        ("POST", "/api/repos/create", _create_repo),
        ("DELETE", "/api/repos/delete", _delete_repo),
        ("GET", "/api/collections", _collections),
        ("POST", "/api/collections", _create_collection),
        ("GET", "/api/collections/{namespace}/{slug}", _collection),
        ("POST", "/api/collections/{namespace}/{slug}/items", _add_item),
        ("GET", repo, _info),
        ("GET", repo + "/revision/{revision}", _info),
        ("GET", repo + "/tree/{revision}", _tree),
        ("GET", repo + "/tree/{revision}/{path:path}", _tree),
        ("POST", repo + "/paths-info/{revision}", _paths_info),
        ("GET", repo + "/refs", _refs),
        ("GET", repo + "/commits/{revision}", _commits),
        ("POST", repo + "/preupload/{revision}", _preupload),
        ("POST", repo + "/commit/{revision}", _commit),
        ("POST", repo + "/tag/{revision}", _tag),
        ("DELETE", repo + "/tag/{revision}", _delete_tag),
        ("POST", repo + "/branch/{revision}", _branch),
        ("GET", repo + "/discussions", _discussions),
        ("GET", repo + "/discussions/{number}", _discussion),
        ("POST", repo + "/discussions/{number}/merge", _merge),
        *(("POST", prefix + ".git/info/lfs/objects/batch", _lfs_batch) for prefix in git),
        ("PUT", large, _lfs_put),
        ("PUT", large + "/{number}", _lfs_put_part),
        ("POST", large + "/complete", _lfs_complete),
        ("POST", large + "/verify", _lfs_verify),
        ("GET", "/cdn/{type}/{namespace}/{name}/{oid}", _cdn),
        *(("GET", prefix + "/resolve/{revision}/{path:path}", _resolve) for prefix in git),
    ]
    made = [Route(path, partial(_answer, hub, handler), methods=[method]) for method, path, handler in routes]
    return _RawPath(Starlette(routes=made))


class _RawPath:
    """Routes on the path as it was sent, so that a quoted slash stays within its part."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": scope["raw_path"].decode("ascii")}
        await self.app(scope, receive, send)


async def _answer(hub: Hub, handler: Handler, request: Request) -> Response:
    try:
        if request.path_params.get("type", "models") not in TYPES:
            raise HubError(404, "Not found")
        return await handler(Call(hub, request))
    except HubError as error:
        headers = {"X-Error-Message": error.message, **error.headers}
        if error.code:
            headers["X-Error-Code"] = error.code
        return JSONResponse({"error": error.message, **error.extra}, error.status, headers)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return JSONResponse({"error": "Insufficient storage: the hub's disk is full"}, 507)


async def _whoami(call: Call) -> Response:
    account = call.account()
    if account is None:
        raise HubError(401, "Unauthorized")
    organisations = [{"type": "org", "name": o, "roleInOrg": "write"} for o in account.organisations]
    token = {"type": "access_token", "accessToken": {"displayName": "local", "role": account.role}}
    metadata = {"type": "user", "id": account.name, "name": account.name, "fullname": account.name}
    return JSONResponse({**metadata, "orgs": organisations, "auth": token})


async def _validate_yaml(call: Call) -> Response:
    given = await call.json()
    errors, warnings = metadata_problems(given["content"], given["repoType"])
    said = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
    return JSONResponse(said, 400 if errors else 200)


async def _create_repo(call: Call) -> Response:
    given = await call.json()
    account = call.account()
    namespace = given.get("organization") or (account.name if account else "")
    writer = call.writer(namespace)
    if not NAME.fullmatch(given["name"]):
        raise HubError(400, f"{given['name']!r} is no repository name")
    private = given.get("visibility") == "private" or bool(given.get("private"))  # 2.x, and 1.x before it
    repo = call.hub.store.create(
        given.get("type") or "model", f"{namespace}/{given['name']}", private, given.get("sdk"), writer.name
    )
    return JSONResponse({"url": call.url(_page(repo)), "name": repo.name, "id": repo.name})


async def _delete_repo(call: Call) -> Response:
    given = await call.json()
    namespace = given.get("organization") or ""
    call.writer(namespace)
    repo = call.hub.store.repos.get((given.get("type") or "model", f"{namespace}/{given['name']}"))
    if repo is None:
        raise HubError(404, "Repository not found", "RepoNotFound")
    call.hub.store.delete(repo)
    return JSONResponse({})


async def _info(call: Call) -> Response:
    repo = call.repo()
    commit = repo.commit_at(call.part("revision") if "revision" in call.request.path_params else "main")
    with_blobs = "blobs" in call.request.query_params
    card = _card_data(call.hub, repo, commit)
    siblings = [{"rfilename": p} | (_blob_metadata(e) if with_blobs else {}) for p, e in commit.tree.items()]
    metadata = {
        "_id": hashlib.sha1(repo.name.encode()).hexdigest()[:24],
        "id": repo.name,
        "modelId": repo.name,
        "author": repo.name.split("/")[0],
        "sha": commit.oid,
        "lastModified": commit.date,
        "createdAt": repo.created,
        "private": repo.private,
        "disabled": False,
        "gated": False,
        "downloads": 0,
        "likes": 0,
        "tags": card.get("tags") or [],
        "siblings": siblings,
    }
    if card:
        metadata |= {
            "cardData": card,
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
        }
    return JSONResponse(metadata | ({"sdk": repo.sdk} if repo.sdk else {}))


async def _tree(call: Call) -> Response:
    commit = call.repo().commit_at(call.part("revision"))
    below = call.part("path").rstrip("/") + "/" if "path" in call.request.path_params else ""
    recursive = call.request.query_params.get("recursive", "").lower() in ("1", "true")
    found: dict[str, dict[str, Any]] = {}
    for path, entry in commit.tree.items():
        if not path.startswith(below):
            continue
        parts = path.removeprefix(below).split("/")
        for depth in range(1, len(parts)):
            folder = below + "/".join(parts[:depth])
            if depth == 1 or recursive:
                oid = hashlib.sha1(f"{commit.oid}{folder}".encode()).hexdigest()
                found[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
        if len(parts) == 1 or recursive:
            found[path] = _tree_metadata(path, entry)
    if below and not found:
        raise HubError(404, f"{below} does not exist", "EntryNotFound", headers={"X-Repo-Commit": commit.oid})
    return JSONResponse(list(found.values()))


async def _paths_info(call: Call) -> Response:
    commit = call.repo().commit_at(call.part("revision"))
    wanted = parse_qs((await call.request.body()).decode())["paths"]  # the client sends a form here
    return JSONResponse([_tree_metadata(p, commit.tree[p]) for p in wanted if p in commit.tree])


async def _refs(call: Call) -> Response:
    repo = call.repo()
    groups = {"branches": "refs/heads/", "tags": "refs/tags/", "converts": "refs/convert/", "pullRequests": "refs/pr/"}
    listed = {
        group: [
            {"name": ref.removeprefix(start), "ref": ref, "targetCommit": oid}
            for ref, oid in repo.refs.items()
            if ref.startswith(start)
        ]
        for group, start in groups.items()
    }
    return JSONResponse(listed)


async def _commits(call: Call) -> Response:
    repo = call.repo()
    commit: Commit | None = repo.commit_at(call.part("revision"))
    listed = []
    while commit is not None:
        metadata = {"id": commit.oid, "title": commit.title, "message": commit.description, "date": commit.date}
        listed.append({**metadata, "authors": [{"user": commit.author}]})
        commit = repo.commits[commit.parent] if commit.parent else None
    return JSONResponse(listed)


async def _preupload(call: Call) -> Response:
    repo = _written(call)
    known = repo.commit_at(call.part("revision")).tree
    files = []
    for file in (await call.json())["files"]:
        path = file["path"]
        mode = "lfs" if is_large(path, file["size"], base64.b64decode(file["sample"])) else "regular"
        metadata = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        files.append(metadata | ({"oid": known[path].etag} if path in known else {}))
    return JSONResponse({"files": files})


async def _commit(call: Call) -> Response:
    """One commit of a header line and a line a file, all or nothing."""
    repo, proposed = _written(call), "create_pr" in call.request.query_params
    account = call.account()
    assert account is not None
    store = call.hub.store
    try:
        lines = [json.loads(line) for line in (await call.request.body()).splitlines() if line]
        header = next(line["value"] for line in lines if line["key"] == "header")
        operations = [(line["key"], line["value"]) for line in lines if line["key"] != "header"]
    except (ValueError, KeyError, StopIteration, TypeError) as error:
        raise HubError(400, f"not a commit: {error}") from error
    base = repo.commit_at(call.part("revision"))
    expected = header.get("parentCommit")
    if expected is not None and not base.oid.startswith(expected):
        if not proposed:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        base = repo.commit_at(expected)
    made = dict(base.tree)
    for key, value in operations:
        _apply(store, repo, made, key, value)
    if readme := next((v for k, v in operations if k == "file" and v["path"] == "README.md"), None):
        errors, _ = metadata_problems(base64.b64decode(readme["content"]).decode(), repo.type)
        if errors:
            raise HubError(400, f"Invalid metadata in README.md: {errors[0]}")
    about = (header.get("summary") or "Upload", header.get("description") or "", account.name)
    if not proposed:
        ref = next(r for r in (f"refs/heads/{call.part('revision')}", call.part("revision")) if r in repo.refs)
        done = store.commit(repo, ref, base.oid, *about, made)
        return JSONResponse(_commit_metadata(call, repo, done))
    with store.lock:
        number = len(repo.pulls) + 1
        repo.refs[f"refs/pr/{number}"] = base.oid
        pull = {"num": number, "title": about[0], "author": account.name, "status": "open"}
        repo.pulls.append({**pull, "base": base.oid, "createdAt": now()})
        done = store.commit(repo, f"refs/pr/{number}", base.oid, *about, made)
    metadata = {"pullRequestUrl": call.url(f"{_page(repo)}/discussions/{number}")}
    return JSONResponse(_commit_metadata(call, repo, done) | metadata)


def _apply(store: Store, repo: Repo, files: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if key == "file":
        try:
            content = base64.b64decode(value["content"], validate=True)
        except binascii.Error as error:
            raise HubError(400, f"{path}: not base64") from error
        files[path] = Entry(len(content), store.put_blob(content))
    elif key == "lfsFile":
        place = store.large_path(repo, value["oid"])
        if not place.is_file():
            raise HubError(400, f"{path}: its content was not uploaded")
        files[path] = large_entry(value["oid"], place.stat().st_size)
    elif key == "deletedFile":
        if path not in files:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        del files[path]
    elif key == "deletedFolder":
        for inside in [p for p in files if p.startswith(path.rstrip("/") + "/")]:
            del files[inside]
    else:
        raise HubError(400, f"unknown operation {key}")


async def _tag(call: Call) -> Response:
    repo = call.repo(write=True)
    return _new_ref(call, repo, f"refs/tags/{(await call.json())['tag']}", call.part("revision"))


async def _delete_tag(call: Call) -> Response:
    repo = call.repo(write=True)
    if repo.refs.pop(f"refs/tags/{call.part('revision')}", None) is None:
        raise HubError(404, "no such tag", "RevisionNotFound")
    call.hub.store.save(repo)
    return JSONResponse({})


async def _branch(call: Call) -> Response:
    repo = call.repo(write=True)
    start = (await call.json()).get("startingPoint", "main")
    return _new_ref(call, repo, f"refs/heads/{call.part('revision')}", start)


def _new_ref(call: Call, repo: Repo, ref: str, revision: str) -> Response:
    with call.hub.store.lock:
        if ref in repo.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        repo.refs[ref] = repo.commit_at(revision).oid
        call.hub.store.save(repo)
    return JSONResponse({})


async def _discussions(call: Call) -> Response:
    repo, asked = call.repo(), call.request.query_params
    found = [p for p in repo.pulls if asked.get("status") in (None, "all", p["status"])]
    found = [p for p in found if asked.get("author") in (None, p["author"])]
    if asked.get("type") == "discussion":
        found = []
    page = found[int(asked.get("p", 0)) * 50 :][:50]
    listed = [_pull_metadata(repo, p) for p in page]
    return JSONResponse({"discussions": listed, "count": len(found), "start": int(asked.get("p", 0)) * 50})


async def _discussion(call: Call) -> Response:
    repo = call.repo()
    pull = _pull(repo, call.part("number"))
    conflicts = repo.refs[MAIN] != pull["base"] and pull["status"] == "open"
    events = [
        {
            "id": commit.oid[:24],
            "type": "commit",
            "createdAt": commit.date,
            "author": {"name": commit.author},
            "data": {"subject": commit.title, "oid": commit.oid},
        }
        for commit in [repo.commit_at(f"refs/pr/{pull['num']}")]
    ]
    metadata = {"events": events, "changes": {"base": MAIN}, "filesWithConflicts": True if conflicts else []}
    return JSONResponse(_pull_metadata(repo, pull) | metadata | {"diff": ""})


async def _merge(call: Call) -> Response:
    repo = call.repo(write=True)
    pull = _pull(repo, call.part("number"))
    if repo.refs[MAIN] != pull["base"]:
        raise HubError(409, "This pull request has conflicts with main")
    repo.refs[MAIN] = repo.refs[f"refs/pr/{pull['num']}"]
    pull["status"] = "merged"
    call.hub.store.save(repo)
    return JSONResponse({})


async def _collections(call: Call) -> Response:
    owner = call.request.query_params.get("owner")
    found = [c for c in call.hub.store.collections if owner in (None, c["owner"]["name"])]
    return JSONResponse(found)


async def _create_collection(call: Call) -> Response:
    given = await call.json()
    call.writer(given["namespace"])
    title = re.sub(r"\W+", "-", given["title"].lower()).strip("-")
    for known in call.hub.store.collections:
        if known["owner"]["name"] == given["namespace"] and known["title"] == given["title"]:
            raise HubError(409, "This collection already exists", extra={"slug": known["slug"]})
    unique = hashlib.sha1(f"{given['namespace']}/{title}".encode()).hexdigest()[:24]
    made = {
        "slug": f"{given['namespace']}/{title}-{unique}",
        "title": given["title"],
        "description": given.get("description"),
        "owner": {"name": given["namespace"]},
        "items": [],
        "lastUpdated": now(),
        "position": 0,
        "private": bool(given.get("private")),
        "theme": "orange",
        "upvotes": 0,
    }
    call.hub.store.collections.append(made)
    call.hub.store.save_collections()
    return JSONResponse(made)


async def _collection(call: Call) -> Response:
    return JSONResponse(_known_collection(call))


async def _add_item(call: Call) -> Response:
    made, given = _known_collection(call), await call.json()
    call.writer(call.part("namespace"))
    item = given["item"]
    if (item["type"], item["id"]) not in call.hub.store.repos:
        raise HubError(404, f"{item['id']} does not exist", "RepoNotFound")
    if any((i["type"], i["id"]) == (item["type"], item["id"]) for i in made["items"]):
        raise HubError(409, "This item is already in the collection")
    note = {"note": {"html": given["note"], "text": given["note"]}} if "note" in given else {}
    made["items"].append({"_id": secrets.token_hex(12), **item, "position": len(made["items"]), **note})
    call.hub.store.save_collections()
    return JSONResponse(made)


async def _lfs_batch(call: Call) -> Response:
    repo = _written(call)
    objects = []
    for asked in (await call.json())["objects"]:
        oid, size = asked["oid"], asked["size"]
        made: dict[str, Any] = {"oid": oid, "size": size}
        if not call.hub.store.large_path(repo, oid).is_file():
            link, signed = call.url(f"/lfs/{repo.type}s/{repo.name}/{oid}"), f"signature={call.hub.sign(oid)}"
            upload: dict[str, Any] = {"href": f"{link}?{signed}"}
            if size > call.hub.part_bytes:
                parts = -(-size // call.hub.part_bytes)
                header = {f"{n:05}": f"{link}/{n}?{signed}" for n in range(1, parts + 1)}
                header["chunk_size"] = str(call.hub.part_bytes)
                upload = {"href": f"{link}/complete?{signed}", "header": header}
            made["actions"] = {"upload": upload, "verify": {"href": f"{link}/verify"}}
        objects.append(made)
    transfer = "multipart" if any(o["size"] > call.hub.part_bytes for o in objects) else "basic"
    return JSONResponse({"transfer": transfer, "objects": objects}, media_type="application/vnd.git-lfs+json")


async def _lfs_put(call: Call) -> Response:
    path = _signed(call)
    with await _received(call) as file:
        call.hub.store.put_large(path, _blocks(file))
    return Response(headers={"ETag": f'"{path.name}"'})


async def _lfs_put_part(call: Call) -> Response:
    path, number = _signed(call), int(call.part("number"))
    with await _received(call) as file:
        call.hub.store.keep(_part_path(path, number), _blocks(file))
    return Response(headers={"ETag": f'"{path.name[:16]}-{number}"'})


async def _lfs_complete(call: Call) -> Response:
    path = _signed(call)
    parts = [_part_path(path, p["partNumber"]) for p in (await call.json())["parts"]]

    def blocks() -> Iterator[bytes]:
        for part in parts:
            with part.open("rb") as file:
                yield from _blocks(file)

    call.hub.store.put_large(path, blocks())
    for part in parts:
        part.unlink()
    return JSONResponse({})


async def _lfs_verify(call: Call) -> Response:
    given = await call.json()
    path = call.hub.store.large_path(call.repo(write=True), call.part("oid"))
    if not path.is_file() or path.stat().st_size != given["size"]:
        raise HubError(404, "the object was not uploaded whole")
    return JSONResponse({})


async def _resolve(call: Call) -> Response:
    """A file at a revision: small ones at once, large ones by a signed link to another host."""
    repo = call.repo()
    commit, entry = repo.entry_at(call.part("revision"), call.part("path"))
    name = quote(call.part("path").rsplit("/", 1)[-1])
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{entry.etag}"'}
    headers["Content-Disposition"] = f'inline; filename="{name}"'
    if entry.sha256 is None:
        return _file(call.hub.store.path(repo, entry), headers)
    # Loopback has two names: the client treats the other one as the Hub's content network, and sends it no token.
    host = "localhost" if call.request.url.hostname == "127.0.0.1" else "127.0.0.1"
    path = f"/cdn/{repo.type}s/{repo.name}/{entry.sha256}?signature={call.hub.sign(entry.sha256)}"
    linked = {"X-Linked-ETag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    location = {"Location": f"http://{host}:{call.request.url.port}{path}"}
    return Response(status_code=302, headers=headers | linked | location)


async def _cdn(call: Call) -> Response:
    path = _signed(call)
    if not path.is_file():
        raise HubError(404, "no such object")
    return _file(path, {"ETag": f'"{path.name}"'})


def _file(path: Path, headers: dict[str, str]) -> Response:
    """A file or the range of it that is asked for."""
    return FileResponse(path, headers=headers, media_type="application/octet-stream")


async def _received(call: Call) -> Any:
    """The body in a file that goes when it is closed; one that breaks off leaves nothing."""
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


def _signed(call: Call) -> Path:
    """Where the large file of a link lies, if this hub signed the link."""
    oid = call.part("oid")
    if not hmac.compare_digest(call.request.query_params.get("signature", ""), call.hub.sign(oid)):
        raise HubError(403, "the link is not signed by this hub")
    repo = call.hub.store.repos.get((TYPES[call.part("type")], f"{call.part('namespace')}/{call.part('name')}"))
    if repo is None:
        raise HubError(404, "Repository not found", "RepoNotFound")
    return call.hub.store.large_path(repo, oid)


def _part_path(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.part{number:05}")


def _written(call: Call) -> Repo:
    """The repository, if the asker may commit to it; anyone with a writing token may propose to one it can see."""
    repo = call.repo()
    account = call.account()
    if account is None:
        raise HubError(401, "Unauthorized: a token is needed")
    proposed = "create_pr" in call.request.query_params
    if account.role != "write" or (not proposed and not account.may_write(repo.name.split("/")[0])):
        raise HubError(403, f"You don't have the rights to write to {repo.name} with this token")
    return repo


def _known_collection(call: Call) -> dict[str, Any]:
    slug = f"{call.part('namespace')}/{call.part('slug')}"
    for made in call.hub.store.collections:
        if made["slug"] == slug:
            return made
    raise HubError(404, f"no collection {slug}")


def _pull(repo: Repo, number: str) -> dict[str, Any]:
    for pull in repo.pulls:
        if str(pull["num"]) == number:
            return pull
    raise HubError(404, f"no pull request {number}")


def _pull_metadata(repo: Repo, pull: dict[str, Any]) -> dict[str, Any]:
    metadata = {key: pull[key] for key in ("num", "title", "status", "createdAt")}
    about = {"author": {"name": pull["author"]}, "repo": {"name": repo.name, "type": repo.type}}
    return {**metadata, **about, "isPullRequest": True}


def _page(repo: Repo) -> str:
    return f"/{repo.name}" if repo.type == "model" else f"/{repo.type}s/{repo.name}"


def _commit_metadata(call: Call, repo: Repo, made: Commit) -> dict[str, Any]:
    return {
        "success": True,
        "commitOid": made.oid,
        "commitUrl": call.url(f"{_page(repo)}/commit/{made.oid}"),
        "hookOutput": "",
    }


def _blob_metadata(entry: Entry) -> dict[str, Any]:
    metadata: dict[str, Any] = {"size": entry.size, "blobId": entry.blob}
    if entry.sha256:
        metadata["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": 134}
    return metadata


def _tree_metadata(path: str, entry: Entry) -> dict[str, Any]:
    metadata: dict[str, Any] = {"type": "file", "oid": entry.blob, "size": entry.size, "path": path}
    if entry.sha256:
        metadata["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 134}
    return metadata


def _card_data(hub: Hub, repo: Repo, commit: Commit) -> dict[str, Any]:
    entry = commit.tree.get("README.md")
    match = REGEX_YAML_BLOCK.search(hub.store.path(repo, entry).read_text()) if entry else None
    return (yaml.safe_load(match.group(2)) or {}) if match else {}
