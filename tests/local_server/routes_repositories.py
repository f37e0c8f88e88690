"""Routes of accounts, repositories, and their branches and tags."""

from __future__ import annotations

import hashlib
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from starlette.responses import JSONResponse, Response

from .card_rules import metadata_problems
from .hub import REPO, Call, Hub, Routes, repo_page
from .routes_files import blob_metadata
from .store import Commit, HubError, Repo


async def _whoami(call: Call) -> Response:
    account = call.account()
    if account is None:
        raise HubError(401, "Unauthorized")
    organisations = [{"type": "org", "name": o, "roleInOrg": "write"} for o in account.organisations]
    token = {"type": "access_token", "accessToken": {"displayName": "local", "role": account.role}}
    metadata = {"type": "user", "id": account.name, "name": account.name, "fullname": account.name}
    return JSONResponse({**metadata, "orgs": organisations, "auth": token})


async def _validate_yaml(call: Call) -> Response:
    body = await call.json()
    errors, warnings = metadata_problems(body["content"], body["repoType"])
    answer = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
    return JSONResponse(answer, 400 if errors else 200)


async def _create_repo(call: Call) -> Response:
    body = await call.json()
    account = call.account()
    namespace = body.get("organization") or (account.name if account else "")
    writer = call.writer(namespace)
    private = body.get("visibility") == "private" or bool(body.get("private"))  # 2.x, and 1.x before it
    repo = call.hub.store.create(
        body.get("type") or "model", f"{namespace}/{body['name']}", private, body.get("sdk"), writer.name
    )
    return JSONResponse({"url": call.url(repo_page(repo)), "name": repo.name, "id": repo.name})


async def _delete_repo(call: Call) -> Response:
    body = await call.json()
    namespace = body.get("organization") or ""
    call.writer(namespace)
    repo = call.hub.store.repos.get((body.get("type") or "model", f"{namespace}/{body['name']}"))
    if repo is None:
        raise HubError(404, "Repository not found", "RepoNotFound")
    call.hub.store.delete(repo)
    return JSONResponse({})


async def _info(call: Call) -> Response:
    repo = call.repo()
    commit = repo.commit_at(call.part("revision") if "revision" in call.request.path_params else "main")
    with_blobs = "blobs" in call.request.query_params
    card = _card_data(call.hub, repo, commit)
    siblings = [{"rfilename": p} | (blob_metadata(e) if with_blobs else {}) for p, e in commit.tree.items()]
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


def _card_data(hub: Hub, repo: Repo, commit: Commit) -> dict[str, Any]:
    """Read the YAML header of a repository's README.md."""
    entry = commit.tree.get("README.md")
    match = REGEX_YAML_BLOCK.search(hub.store.path(repo, entry).read_text()) if entry else None
    return (yaml.safe_load(match.group(2)) or {}) if match else {}


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


ROUTES: Routes = [
    ("GET", "/api/whoami-v2", _whoami),
    ("POST", "/api/validate-yaml", _validate_yaml),
    ("POST", "/api/repos/create", _create_repo),
    ("DELETE", "/api/repos/delete", _delete_repo),
    ("GET", REPO, _info),
    ("GET", REPO + "/revision/{revision}", _info),
    ("GET", REPO + "/refs", _refs),
    ("POST", REPO + "/tag/{revision}", _tag),
    ("DELETE", REPO + "/tag/{revision}", _delete_tag),
    ("POST", REPO + "/branch/{revision}", _branch),
]
