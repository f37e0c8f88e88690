"""A hub to test against: the local Hub server with injected faults and a log of all requests.

The server itself is `tests.local_server`. This module adds the faults, and the environment of a client that can reach
no other hub.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.local_server.app import build_app
from tests.local_server.hub import Account, Hub
from tests.local_server.serve import serve
from tests.local_server.store import MAIN, Entry, Repo, Store

ROOT = Path(__file__).parents[2]
EVERY_TIME = 10**6


@dataclass
class Fault:
    """A fault that befalls a number of matching requests.

    Args:
        method: HTTP method of the request, or any.
        path: Regular expression that is searched in the path of the request.
        times: Number of requests that the fault befalls; later ones are answered.
        skip: Number of matching requests that are answered before.
        status: HTTP status that replaces the answer.
        headers: Headers of that answer.
        cut_request: Number of bytes of the request's body after which the connection breaks.
        cut_answer: Number of bytes of the answer's body after which the connection breaks; the request was carried out.
        slow_s: Delay before the request is handled, in seconds.
        disk_full: Whether the hub's disk is full while the request is handled.
        before: Change that somebody else makes to the repository just before the request.
    """

    method: str
    path: str
    times: int = EVERY_TIME
    skip: int = 0
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_request: int | None = None
    cut_answer: int | None = None
    slow_s: float = 0.0
    disk_full: bool = False
    before: Callable[[HubServer], None] | None = None

    def fits(self, method: str, path: str) -> bool:
        """Whether the fault befalls a request; a matching request that is skipped is counted."""
        if self.times <= 0 or self.method not in (method, "any") or re.search(self.path, path) is None:
            return False
        self.skip -= 1
        return self.skip < 0


DISK_IS_FULL = ContextVar("DISK_IS_FULL", default=False)  # of the request that is being handled, and no other


class FullDisk(Store):
    """A store whose disk can be made full."""

    def keep(self, path: Path, chunks: Any) -> None:
        if DISK_IS_FULL.get():
            raise OSError(errno.ENOSPC, "No space left on device")
        super().keep(path, chunks)


@dataclass
class HubServer:
    """A served hub: its store, its faults, and (method, path, status) of every request."""

    address: str
    store: FullDisk
    tokens: dict[str, str]
    faults: list[Fault] = field(default_factory=list)
    log: list[tuple[str, str, int | str]] = field(default_factory=list)

    def repo(self, name: str, type_: str = "model") -> Repo | None:
        return self.store.repos.get((type_, name))

    def count(self, method: str, path: str) -> int:
        return sum(m == method and re.search(path, p) is not None for m, p, _ in self.log)

    def text(self, name: str, path: str, revision: str = "main") -> str:
        repo = self.store.repos["model", name]
        return self.store.path(repo, repo.commit_at(revision).tree[path]).read_text()

    def write(self, name: str, path: str, text: str) -> None:
        """Commit one text file, as somebody does in the browser."""
        repo = self.store.repos["model", name]
        head = repo.commit_at("main")
        entry = Entry(len(text.encode()), self.store.put_blob(text.encode()))
        self.store.commit(repo, MAIN, head.oid, f"Update {path}", "", "someone", {**head.tree, path: entry})

    def environment(self, home: Path, user: str = "ada") -> dict[str, str]:
        """Environment of a client process that is logged in as a user, with an empty cache."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        own = {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}
        return kept | own | quiet | ({"HF_TOKEN": self.tokens[user]} if user else {})


class _Failing:
    """Inject the faults of a server, and log every request."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.server: HubServer | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server = self.server
        if scope["type"] != "http" or server is None:
            await self.app(scope, receive, send)
            return
        method, path = scope["method"], scope["raw_path"].decode()
        number = len(server.log)
        server.log.append((method, path, "no answer"))
        fault = next((f for f in server.faults if f.fits(method, path)), None)
        if fault is None:
            fault = Fault(method, path)
        fault.times -= 1
        connection = send.__self__.transport  # type: ignore[attr-defined]  # uvicorn's connection of this request
        if fault.before is not None:
            fault.before(server)
        await asyncio.sleep(fault.slow_s)
        if fault.status is not None:
            server.log[number] = (method, path, fault.status)
            answer = JSONResponse({"error": f"injected fault {fault.status}"}, fault.status, fault.headers)
            await answer(scope, receive, send)
            return
        read = sent = 0

        async def reading() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if fault.cut_request is not None and read >= fault.cut_request:
                connection.abort()
                return {"type": "http.disconnect"}
            return message

        async def sending(message: Message) -> None:
            nonlocal sent
            if message["type"] == "http.response.start":
                server.log[number] = (method, path, message["status"])
            if fault.cut_answer is not None and message["type"] == "http.response.body":
                left = fault.cut_answer - sent
                sent += len(message.get("body", b""))
                if sent >= fault.cut_answer:
                    await send({"type": "http.response.body", "body": message["body"][:left], "more_body": True})
                    await asyncio.sleep(0.05)  # the bytes sent before arrive
                    connection.abort()
                    return
            if not connection.is_closing():
                await send(message)

        DISK_IS_FULL.set(fault.disk_full)
        try:
            await self.app(scope, reading, sending)
        except Exception:
            if not connection.is_closing():
                raise


@contextmanager
def hub_server(folder: Path, part_bytes: int = 5_000_000_000) -> Iterator[HubServer]:
    """Serve a hub with the users ada, who may write for herself and `pivot`, and bob, who may only read."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = {user: f"hf_{secrets.token_hex(17)}" for user in ("ada", "bob")}
    accounts = {tokens["ada"]: Account("ada", ("pivot",)), tokens["bob"]: Account("bob", (), "read")}
    store = FullDisk(folder)
    failing = _Failing(build_app(Hub(store, accounts, part_bytes)))
    with serve(failing) as address:
        failing.server = HubServer(address, store, tokens)
        yield failing.server


def state(server: HubServer, name: str) -> dict[str, Any]:
    """State of a repository, in a form that can be compared."""
    repo = server.repo(name)
    if repo is None:
        return {"exists": False}
    tree = {path: entry.etag for path, entry in repo.commit_at("main").tree.items()}
    pulls = [pull["num"] for pull in repo.pulls]
    return {"exists": True, "refs": dict(repo.refs), "tree": json.dumps(tree, sort_keys=True), "pulls": pulls}
