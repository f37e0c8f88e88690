"""The local Hub server, used by the unmodified client in a process of its own; its state persists."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote

import huggingface_hub
import pytest

from tests.local_server.store import HubError, Store
from tests.publish.hub_server import ROOT, hub_server


def test_the_client_can_send_all_its_requests(tmp_path: Path) -> None:
    """The requests of `tests/publish/hub_calls.py`; `make conformance` sends them with older clients too."""
    with hub_server(tmp_path / "hub", part_bytes=1_000_000) as server:
        variables = server.environment(tmp_path / "home") | {"READER": server.tokens["bob"]}
        command = [sys.executable, str(ROOT / "tests" / "publish" / "hub_calls.py")]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == huggingface_hub.__version__
    assert server.count("PUT", r"/models/.*/[0-9a-f]{64}/\d$") == 3, "a large file goes in parts"
    reopened = Store(tmp_path / "hub")
    assert [repo.name for repo in reopened.repos.values()] == ["pivot/app"]
    assert reopened.repos["space", "pivot/app"] == server.repo("pivot/app", "space")
    assert reopened.collections == server.store.collections


def test_ranges_and_signed_links(tmp_path: Path) -> None:
    with hub_server(tmp_path / "hub") as server:
        server.store.create("model", "pivot/x", False, None, "ada")
        server.write("pivot/x", "a.txt", "0123456789")

        def get(path: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
            request = urllib.request.Request(server.address + path, headers=headers)
            try:
                with urllib.request.urlopen(request) as answer:
                    return answer.status, answer.read(), dict(answer.headers)
            except urllib.error.HTTPError as error:
                return error.code, b"", dict(error.headers)

        code, body, headers = get("/pivot/x/resolve/main/a.txt")
        assert (code, body) == (200, b"0123456789")
        repo = server.repo("pivot/x")
        assert repo is not None
        assert headers["x-repo-commit"] == repo.refs["refs/heads/main"]
        assert headers["etag"] == f'"{repo.commit_at("main").tree["a.txt"].blob}"'
        assert get("/pivot/x/resolve/main/a.txt", Range="bytes=2-4")[:2] == (206, b"234")
        assert get("/pivot/x/resolve/main/a.txt", Range="bytes=7-")[:2] == (206, b"789")
        assert get("/pivot/x/resolve/main/a.txt", Range="bytes=20-")[0] == 416
        assert get("/pivot/x/resolve/main/b.txt")[2]["x-error-code"] == "EntryNotFound"
        assert get(f"/cdn/models/pivot/x/{'0' * 64}?signature=none")[0] == 403
        assert get("/api/models/pivot/none")[0] == 401


def test_no_name_of_a_client_leads_out_of_the_store(tmp_path: Path) -> None:
    """Types, names, hashes and paths with `..` are refused, and no file outside of the store is read or written."""
    folder = tmp_path / "outer" / "hub"
    outside = tmp_path / "outer" / ("a" * 10)
    with hub_server(folder) as server:
        server.store.create("model", "pivot/x", False, None, "ada")
        outside.write_text("private")
        before = sorted(tmp_path.rglob("*"))

        def send(method: str, path: str, body: Any = None) -> int:
            token = {"Authorization": f"Bearer {server.tokens['ada']}"}
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            request = urllib.request.Request(server.address + path, content, token, method=method)
            try:
                with urllib.request.urlopen(request) as answer:
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                return error.code

        def commit(operation: str, **value: Any) -> int:
            lines = [{"key": "header", "value": {"summary": "x"}}, {"key": operation, "value": value}]
            return send("POST", "/api/models/pivot/x/commit/main", "\n".join(map(json.dumps, lines)).encode())

        climb = f"../../../../../{outside.name}"
        creations = [
            {"name": "y", "organization": "pivot", "type": "../../.."},
            {"name": "..", "organization": "pivot"},
            {"name": "../../y", "organization": "pivot"},
            {"name": "a..b", "organization": "pivot"},
        ]
        assert [send("POST", "/api/repos/create", body) for body in creations] == [400] * 4
        large = {"objects": [{"oid": climb, "size": 1}]}
        assert send("POST", "/pivot/x.git/info/lfs/objects/batch", large) == 400
        assert send("POST", f"/lfs/models/pivot/x/{quote(climb, safe='')}/verify", {"size": 7}) == 400
        assert commit("lfsFile", path="a.bin", oid=climb) == 400
        paths = ["../a", "/a", "a/../../b", "a/./b", ".git/config", "a\\..\\b", ""]
        assert [commit("file", path=path, content="eA==") for path in paths] == [400] * len(paths)
        assert commit("file", path="a..b/c.txt", content="eA==") == 200
        repo = server.repo("pivot/x")
        assert repo is not None
        with pytest.raises(HubError, match="not a SHA-256"):
            server.store.large_path(repo, climb)
        new = {path for path in {*tmp_path.rglob("*")} - {*before} if folder not in path.parents}
    assert new == set()
    assert outside.read_text() == "private"
