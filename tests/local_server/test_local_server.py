"""The local Hub server, used by the unmodified client in a process of its own; its state persists."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub

from tests.local_server.store import Store
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
