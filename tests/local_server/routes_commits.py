"""Routes of commits."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from starlette.responses import JSONResponse, Response

from .card_rules import metadata_problems
from .hub import REPO, Call, Routes, repo_page
from .store import Commit, Entry, HubError, Repo, Store, checked_path, large_entry, now

Operations = list[tuple[str, dict[str, Any]]]  # kind and arguments of each


async def _commits(call: Call) -> Response:
    repo = call.repo()
    commit: Commit | None = repo.commit_at(call.part("revision"))
    listed = []
    while commit is not None:
        metadata = {"id": commit.oid, "title": commit.title, "message": commit.description, "date": commit.date}
        listed.append({**metadata, "authors": [{"user": commit.author}]})
        commit = repo.commits[commit.parent] if commit.parent else None
    return JSONResponse(listed)


async def _commit(call: Call) -> Response:
    """Make one commit, or one pull request, of a header line and one line for each file."""
    repo = call.committable_repo()
    account = call.account()
    assert account is not None
    header, operations = _parse_commit(await call.request.body())
    base = repo.commit_at(call.part("revision"))
    proposed = "create_pr" in call.request.query_params
    expected = header.get("parentCommit")
    if expected is not None and not base.oid.startswith(expected):
        if not proposed:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        base = repo.commit_at(expected)
    store, tree = call.hub.store, dict(base.tree)
    for key, value in operations:
        _apply(store, repo, tree, key, value)
    _check_readme(repo, operations)
    about = (header.get("summary") or "Upload", header.get("description") or "", account.name)
    if not proposed:
        ref = next(r for r in (f"refs/heads/{call.part('revision')}", call.part("revision")) if r in repo.refs)
        return JSONResponse(_commit_metadata(call, repo, store.commit(repo, ref, base.oid, *about, tree)))
    with store.lock:
        number = len(repo.pulls) + 1
        repo.refs[f"refs/pr/{number}"] = base.oid
        pull = {"num": number, "title": about[0], "author": account.name, "status": "open"}
        repo.pulls.append({**pull, "base": base.oid, "createdAt": now()})
        commit = store.commit(repo, f"refs/pr/{number}", base.oid, *about, tree)
    metadata = {"pullRequestUrl": call.url(f"{repo_page(repo)}/discussions/{number}")}
    return JSONResponse(_commit_metadata(call, repo, commit) | metadata)


def _parse_commit(body: bytes) -> tuple[dict[str, Any], Operations]:
    """Split the body of a commit in its header and its operations."""
    try:
        lines = [json.loads(line) for line in body.splitlines() if line]
        header = next(line["value"] for line in lines if line["key"] == "header")
        return header, [(line["key"], line["value"]) for line in lines if line["key"] != "header"]
    except (ValueError, KeyError, StopIteration, TypeError) as error:
        raise HubError(400, f"not a commit: {error}") from error


def _apply(store: Store, repo: Repo, files: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
    """Apply an operation of a commit to its tree."""
    path = checked_path(value["path"]) if key in ("file", "lfsFile") else value["path"]
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


def _check_readme(repo: Repo, operations: Operations) -> None:
    """Refuse a README.md whose metadata the Hub would refuse."""
    readme = next((value for key, value in operations if key == "file" and value["path"] == "README.md"), None)
    if readme is None:
        return
    errors, _ = metadata_problems(base64.b64decode(readme["content"]).decode(), repo.type)
    if errors:
        raise HubError(400, f"Invalid metadata in README.md: {errors[0]}")


def _commit_metadata(call: Call, repo: Repo, commit: Commit) -> dict[str, Any]:
    return {
        "success": True,
        "commitOid": commit.oid,
        "commitUrl": call.url(f"{repo_page(repo)}/commit/{commit.oid}"),
        "hookOutput": "",
    }


ROUTES: Routes = [
    ("GET", REPO + "/commits/{revision}", _commits),
    ("POST", REPO + "/commit/{revision}", _commit),
]
