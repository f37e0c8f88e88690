"""Routes of pull requests."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from .hub import REPO, Call, Routes
from .store import MAIN, HubError, Repo


async def _discussions(call: Call) -> Response:
    repo, query = call.repo(), call.request.query_params
    matching = [p for p in repo.pulls if query.get("status") in (None, "all", p["status"])]
    matching = [p for p in matching if query.get("author") in (None, p["author"])]
    if query.get("type") == "discussion":
        matching = []
    page = matching[int(query.get("p", 0)) * 50 :][:50]
    listed = [_pull_metadata(repo, p) for p in page]
    return JSONResponse({"discussions": listed, "count": len(matching), "start": int(query.get("p", 0)) * 50})


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


def _pull(repo: Repo, number: str) -> dict[str, Any]:
    for pull in repo.pulls:
        if str(pull["num"]) == number:
            return pull
    raise HubError(404, f"no pull request {number}")


def _pull_metadata(repo: Repo, pull: dict[str, Any]) -> dict[str, Any]:
    metadata = {key: pull[key] for key in ("num", "title", "status", "createdAt")}
    about = {"author": {"name": pull["author"]}, "repo": {"name": repo.name, "type": repo.type}}
    return {**metadata, **about, "isPullRequest": True}


ROUTES: Routes = [
    ("GET", REPO + "/discussions", _discussions),
    ("GET", REPO + "/discussions/{number}", _discussion),
    ("POST", REPO + "/discussions/{number}/merge", _merge),
]
