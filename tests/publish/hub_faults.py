"""The faults that a push or a pull can meet, injected into the local Hub server; CONTRIBUTING.md holds the table.

`python -m tests.publish.hub_faults` tries them all and writes the table. The unmodified client runs in a process of its
own.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from pivot_hub.files import write_whole
from pivot_hub.provenance import file_sha256
from tests.publish.hub_server import ROOT, Fault, HubServer, hub_server, state
from tests.publish.publishable import PROSE, make_publishable

PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- faults: python -m tests.publish.hub_faults -->", "<!-- end of faults -->"
QUICK = {"tries": 5, "wait_s": 0.02, "timeout_s": 60.0}
INVALID = {"X-Error-Message": "Invalid credentials in Authorization header"}


@dataclass(frozen=True)
class Scenario:
    """A fault with its expected outcome.

    Args:
        name: Name of the fault in the table.
        fault: Arguments of `Fault`; `{repo}` in its path is replaced by the repository.
        tries: Number of requests to the path that fails.
        ends: Outcome of the command: commit, pull request, refused, killed or pulled.
        remote: State of the repository afterwards.
        again: Outcome of the same command once the fault is over.
        action: Name of the command and of its circumstances: push (to a repository with an older version), new, edited,
            race, kill; pull or full.
        retry_policy: Arguments of the client's `RetryPolicy`.
    """

    name: str
    fault: dict[str, Any]
    tries: int
    ends: str = "refused"
    remote: str = "as before"
    again: str = "commit"
    action: str = "push"
    retry_policy: dict[str, Any] = field(default_factory=lambda: QUICK)

    @property
    def alone(self) -> bool:
        """Whether it cannot run beside others, because of the client's time-out or a path that names no repository."""
        return self.retry_policy != QUICK or "{repo}" not in self.fault["path"]


def at_commit(**fault: Any) -> dict[str, Any]:
    return {"method": "POST", "path": "/api/models/{repo}/commit/", **fault}


def at_read(**fault: Any) -> dict[str, Any]:
    return {"method": "GET", "path": "/api/models/{repo}$", **fault}


def at_upload(**fault: Any) -> dict[str, Any]:
    return {"method": "PUT", "path": "/lfs/models/{repo}/", **fault}


def at_download(**fault: Any) -> dict[str, Any]:
    return {"method": "GET", "path": "/cdn/models/{repo}/", **fault}


CREATION = {"method": "POST", "path": "/api/repos/create", "status": 403}
HASTY = {**QUICK, "timeout_s": 1.5}
NEW = "the new version"
DONE: dict[str, Any] = {"ends": "commit", "remote": NEW, "again": "unchanged"}
PULL: dict[str, Any] = {"action": "pull", "again": "pulled"}
SCENARIOS = [
    Scenario("401: the login is not valid", at_read(status=401, headers=INVALID), 1),
    Scenario("403: the token may not write", at_commit(status=403), 1),
    Scenario("409: a conflict", at_commit(status=409), 1),
    Scenario(
        "412: somebody commits in between", at_commit(), 1, remote="their commit", again="pull request", action="race"
    ),
    Scenario("429, twice", at_commit(status=429, times=2, headers={"Retry-After": "0"}), 3, **DONE),
    Scenario("429, every time", at_commit(status=429), 5),
    Scenario("500 at the first read, every time", at_read(status=500), 5),
    Scenario("500 at an upload, once", at_upload(status=500, times=1), 2, **DONE),
    Scenario("500 at the commit, twice", at_commit(status=500, times=2), 3, **DONE),
    Scenario("500 at the commit, every time", at_commit(status=500), 5),
    Scenario(
        "500 at the tag, every time",
        {"method": "POST", "path": "/api/models/{repo}/tag/", "status": 500},
        5,
        remote="the new version, not yet tagged",
        again="unchanged",
    ),
    Scenario("connection cut at byte 20,000 of an upload", at_upload(cut_request=20_000, times=1), 2, **DONE),
    Scenario("connection cut at byte 500 of the commit, every time", at_commit(cut_request=500), 5),
    Scenario("the commit lands, its answer is lost", at_commit(cut_answer=0, times=1), 1, **DONE),
    Scenario("the hub's disk is full", at_upload(disk_full=True), 1),
    Scenario("new repository, 403 at its creation", CREATION, 1, action="new"),
    Scenario("new repository, 500 at the commit, every time", at_commit(status=500), 5, action="new"),
    Scenario(
        "the card there was edited by hand",
        at_commit(times=0),
        1,
        ends="pull request",
        again="pull request",
        action="edited",
    ),
    Scenario("killed while it uploads", at_upload(slow_s=60.0, times=1), 1, ends="killed", action="kill"),
    Scenario(
        "no answer within the time-out, once",
        at_commit(slow_s=3.0, times=1),
        2,
        **DONE,
        retry_policy=HASTY,
    ),
    Scenario("no answer, every time", at_read(slow_s=3.0), 3, retry_policy={**HASTY, "tries": 3}),
    Scenario(
        "pull: 500, twice",
        at_read(status=500, times=2),
        3,
        "pulled",
        **PULL,
    ),
    Scenario("pull: connection cut at byte 20,000", at_download(cut_answer=20_000, times=1), 2, "pulled", **PULL),
    Scenario("pull: no answer, every time", at_read(slow_s=3.0), 3, **PULL, retry_policy={**HASTY, "tries": 3}),
    Scenario("pull: 403", at_download(status=403), 1, **PULL),
    Scenario("pull: this machine's disk is full", at_download(times=0), 1, action="full", again="pulled"),
]


class Client(AbstractContextManager["Client"]):
    """The client's process, one for all scenarios."""

    def __init__(self, environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "tests.publish.hub_client"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment, text=True, cwd=ROOT, **pipes)  # type: ignore[call-overload]
        self.answers: dict[int, dict[str, Any]] = {}
        self.changed = threading.Condition()
        self.requests = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            answer = json.loads(line)
            with self.changed:
                self.answers[answer["id"]] = answer
                self.changed.notify_all()

    def send(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        with self.changed:
            self.requests += 1
            number = self.requests
            self.process.stdin.write(json.dumps({"id": number, **request}) + "\n")
            self.process.stdin.flush()
            while number not in self.answers:
                self.changed.wait(1.0)
                assert self.process.poll() is None, "the client's process ended"
            return self.answers[number]

    def __exit__(self, *raised: object) -> None:
        self.process.stdin.close()
        self.process.wait()


def try_faults(folder: Path) -> list[dict[str, Any]]:
    """Try every scenario; a row of the table for each."""
    old, new = (make_publishable(folder / f"encoder-{seed}", seed) for seed in (1, 2))
    with hub_server(folder / "hub") as server, Client(server.environment(folder / "home")) as client:

        def try_one(numbered: tuple[int, Scenario]) -> dict[str, Any]:
            number, scenario = numbered
            return _Trial(server, client, scenario, f"pivot/t{number:02}", old, new, folder).run()

        numbered = list(enumerate(SCENARIOS))
        together = [n for n in numbered if not n[1].alone]
        with ThreadPoolExecutor(8) as pool:
            rows = dict(zip((n for n, _ in together), pool.map(try_one, together), strict=True))
        rows |= {n[0]: try_one(n) for n in numbered if n[1].alone}
    return [rows[number] for number, _ in numbered]


@dataclass
class _Trial:
    server: HubServer
    client: Client
    scenario: Scenario
    repo: str
    old: Path
    new: Path
    folder: Path

    def run(self) -> dict[str, Any]:
        scenario, server = self.scenario, self.server
        pulls = scenario.action in ("pull", "full")
        if scenario.action != "new":
            first = self.push(self.new if pulls else self.old, "0.1.1" if pulls else "0.1.0", QUICK)
            assert first["kind"] == "commit", first
        if scenario.action == "edited":
            server.write(self.repo, "README.md", server.text(self.repo, "README.md") + "\nEdited by hand.\n")
        path = scenario.fault["path"].format(repo=self.repo)
        before, mark, local = state(server, self.repo), len(server.log), _fingerprint(self.new)
        fault = Fault(**{**scenario.fault, "path": path})
        if scenario.action == "race":
            fault = Fault(fault.method, path, times=1, before=lambda s: s.write(self.repo, "notes.txt", "mine"))
        server.faults.append(fault)
        ended = self.act(scenario.retry_policy)
        fault.times = 0
        requests = Counter(p for m, p, _ in server.log[mark:] if m == fault.method and re.search(fault.path, p))
        row = {
            "fault": scenario.name,
            "tries": max(requests.values(), default=0),
            "ends": ended["kind"],
            "message": ended["message"],
            "remote": self.remote(before),
            "local": self.local(local, pulls),
        }
        again = self.act(QUICK, with_fault=False)
        row["again"] = again["kind"]
        row["sound"] = self.sound(again["kind"], pulls)
        uploads = Counter(p for m, p, _ in server.log if m == "PUT" and f"/{self.repo}/" in p)
        row["uploaded_again"] = sum(count > 1 for count in uploads.values())
        return row

    def act(self, retry_policy: dict[str, Any], with_fault: bool = True) -> dict[str, Any]:
        action = self.scenario.action
        if action == "pull" or (action == "full" and not with_fault):
            return self.client.send(action="pull", repo=self.repo, output=str(self.output), retry_policy=retry_policy)
        if action == "full":
            return self.command("pull", self.repo, str(self.output), limit=30_000)
        if action == "kill" and with_fault:
            prose = self.folder / "killed.yaml"
            prose.write_text(yaml.safe_dump({**PROSE, "version": "0.1.1"}))
            return self.command("push", str(self.new), self.repo, "--yes", "--prose", str(prose), kill=True)
        return self.push(self.new, "0.1.1", retry_policy)

    def push(self, encoder: Path, version: str, retry_policy: dict[str, Any]) -> dict[str, Any]:
        return self.client.send(
            action="push", encoder=str(encoder), repo=self.repo, version=version, retry_policy=retry_policy
        )

    def command(self, *arguments: str, kill: bool = False, limit: int | None = None) -> dict[str, Any]:
        """Run the command line in a process of its own, killed once it uploads, or with a limited file size."""
        home = self.folder / f"home-{self.scenario.action}"
        environment = self.server.environment(home) | {"TMPDIR": str(self.folder)}

        def limit_file_size() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        command = [sys.executable, "-m", "pivot_hub", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, env=environment, text=True, preexec_fn=limit_file_size, **pipes)  # type: ignore[call-overload]
        if kill:
            mark = len(self.server.log)
            while not any(m == "PUT" and self.repo in p for m, p, _ in self.server.log[mark:]):
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.05)
            time.sleep(1.0)  # the other uploads finish
            process.send_signal(signal.SIGKILL)
        _, message = process.communicate()
        return {"kind": "killed" if process.returncode == -signal.SIGKILL else "refused", "message": message.strip()}

    @property
    def output(self) -> Path:
        return self.folder / "pulled" / self.repo.replace("/", "-")

    def remote(self, before: dict[str, Any]) -> str:
        after = state(self.server, self.repo)
        if after == before:
            return "as before"
        if not before["exists"] or not after["exists"]:
            return "another repository"
        tags = {ref for ref in after["refs"] if ref.startswith("refs/tags/")}
        if after["refs"].get("refs/heads/main") == before["refs"]["refs/heads/main"]:
            return "as before" if after["pulls"] == [1] else "another pull request"
        head = self.server.repo(self.repo).commit_at("main")  # type: ignore[union-attr]
        if head.parent != before["refs"]["refs/heads/main"]:
            return "several commits"
        if head.author == "someone":
            return "their commit"
        return NEW if "refs/tags/v0.1.1" in tags else f"{NEW}, not yet tagged"

    def local(self, before: dict[str, str], pulls: bool) -> str:
        if pulls:
            return "the whole folder" if self.output.is_dir() else "no folder"
        return "as before" if _fingerprint(self.new) == before else "changed"

    def sound(self, kind: str, pulls: bool) -> bool:
        """Whether all files are there in the end, published or pulled, with the checksums of their manifest."""
        if pulls:
            checksums = json.loads((self.output / "provenance.json").read_text())["files"]
            return all(file_sha256(self.output / name) == digest for name, digest in checksums.items())
        revision = "refs/pr/1" if kind == "pull request" else "v0.1.1"
        repo = self.server.repo(self.repo)
        assert repo is not None
        tree = repo.commit_at(revision).tree
        checksums = json.loads(self.server.text(self.repo, "provenance.json", revision))["files"]
        hashes = {p: file_sha256(self.server.store.path(repo, e)) for p, e in tree.items()}
        return checksums == {p: h for p, h in hashes.items() if p not in (".gitattributes", "provenance.json")}


def refuse_from_each_request(folder: Path, new: bool) -> list[dict[str, Any]]:
    """Push while the hub refuses everything from the n-th request on, for each n, until a push gets through.

    Returns:
        For each n: the outcome of the push and of the push after it, and the state of the repository before, between
        and after them.
    """
    old, encoder = (make_publishable(folder / f"encoder-{seed}", seed) for seed in (1, 2))
    rows: list[dict[str, Any]] = []
    with hub_server(folder / "hub") as server, Client(server.environment(folder / "home")) as client:
        while not rows or rows[-1]["ends"] != "commit":
            repo = f"pivot/n{len(rows):02}"
            request = {"action": "push", "repo": repo, "retry_policy": {**QUICK, "tries": 1}}
            if not new:
                assert client.send(**request, encoder=str(old), version="0.1.0")["kind"] == "commit"
            before = state(server, repo)
            fault = Fault("any", "", skip=len(rows), status=403)
            server.faults.append(fault)
            ended = client.send(**request, encoder=str(encoder), version="0.1.1")
            fault.times = 0
            after = state(server, repo)
            again = client.send(**request, encoder=str(encoder), version="0.1.1")
            whole = state(server, repo)
            rows.append(
                {"ends": ended["kind"], "before": before, "after": after, "again": again["kind"], "whole": whole}
            )
    return rows


def _fingerprint(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): file_sha256(f) for f in folder.rglob("*") if f.is_file()}


def render(rows: list[dict[str, Any]]) -> str:
    """Format the table in Markdown."""
    head = ("fault", "tries", "outcome", "remote afterwards", "local afterwards", "the same command again")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    keys = ("fault", "tries", "ends", "remote", "local", "again")
    lines += ["| " + " | ".join(str(row[key]) for key in keys) + " |" for row in rows]
    return "\n".join(lines)


def insert_table(page: str, table: str) -> str:
    """Replace the table between the markers of the page."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        rows = try_faults(Path(folder))
    print(json.dumps(rows, indent=2))
    write_whole(PAGE, insert_table(PAGE.read_text(), render(rows)))
