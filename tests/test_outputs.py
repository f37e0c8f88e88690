"""Output folders: others' files are never touched, one process works at a time, a killed one leaves nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from pivot_hub.errors import OutputError
from pivot_hub.outputs import ENCODER, check_replaceable, lock_output, scratch_folder, whole_folder

WRITER = """
import json, pathlib, sys, time
from pivot_hub.outputs import ENCODER, whole_folder
target = pathlib.Path(sys.argv[1])
while True:
    with whole_folder(target, ENCODER) as folder:
        for name in ("a", "b", "modeling_pivot.py"):
            (folder / name).write_bytes(b"x" * 20000)
        (folder / "provenance.json").write_text(json.dumps({"files": {"a": "", "b": "", "modeling_pivot.py": ""}}))
"""
HOLDER = """
import pathlib, sys, time
from pivot_hub.outputs import lock_output
with lock_output(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
SCRATCH = """
import time
from pivot_hub.outputs import scratch_folder
with scratch_folder("pivot-test") as folder:
    (folder / "weights").write_bytes(b"x" * 20000)
    print("made", flush=True)
    time.sleep(60)
"""
FILES = ("model.safetensors", "modeling_pivot.py")


def encoder(folder: Path, *more: str) -> Path:
    folder.mkdir()
    for name in (*FILES, *more):
        (folder / name).write_text("old")
    (folder / "provenance.json").write_text(json.dumps({"files": dict.fromkeys(FILES, "hash")}))
    return folder


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_an_output_of_the_same_kind_is_replaced(tmp_path: Path) -> None:
    target = encoder(tmp_path / "encoder", ".DS_Store")
    with whole_folder(target, ENCODER) as folder:
        (folder / "new").write_text("new")
    assert names(target) == ["new"]
    assert names(tmp_path) == ["encoder"]


FOREIGN = ["thesis", "repository with notes", "forged manifest", "file", "link", "export", "stage"]


@pytest.mark.parametrize("kind", FOREIGN)
def test_anything_else_is_refused_by_name_and_not_touched(tmp_path: Path, kind: str) -> None:
    target, foreign = tmp_path / "d", "thesis.tex"
    if kind == "thesis":
        target.mkdir()
        (target / "thesis.tex").write_text("ten years")
    elif kind == "repository with notes":
        encoder(target)
        (target / "sub").mkdir()
        (target / "sub" / "notes.txt").write_text("mine")
        foreign = "sub/notes.txt"
    elif kind == "forged manifest":
        target.mkdir()
        (target / "provenance.json").write_text("[")
        foreign = "provenance.json"
    elif kind == "file":
        target.write_text("mine")
        foreign = "is not a folder"
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to(tmp_path / "elsewhere")
        foreign = "is not a folder"
    elif kind == "stage":  # a manifest of the same name, in which all of its files are named
        target.mkdir()
        (target / "model.safetensors").write_text("three days of training")
        (target / "provenance.json").write_text(json.dumps({"stage": "dpo", "files": {"model.safetensors": "hash"}}))
        foreign = "model.safetensors"
    else:
        target.mkdir()
        (target / "export.json").write_text(json.dumps({"files": {}}))
        foreign = "export.json"
    before = sorted((str(p), p.read_bytes() if p.is_file() else b"") for p in tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=foreign.replace(".", r"\.")), whole_folder(target, ENCODER):
        pytest.fail("the block ran")
    assert sorted((str(p), p.read_bytes() if p.is_file() else b"") for p in tmp_path.rglob("*")) == before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with whole_folder(tmp_path / "d") as folder:
        (folder / "a").write_text("a")
    assert names(tmp_path / "d") == ["a"]
    with pytest.raises(OutputError, match="exists and is not empty"):
        check_replaceable(tmp_path / "d", None)


def test_a_block_that_fails_leaves_everything_as_it_was(tmp_path: Path) -> None:
    target = encoder(tmp_path / "encoder")
    with pytest.raises(ZeroDivisionError), whole_folder(target, ENCODER) as folder:
        (folder / "half").write_text(str(1 / 0))
    assert names(target) == ["model.safetensors", "modeling_pivot.py", "provenance.json"]
    assert names(tmp_path) == ["encoder"]


def test_a_second_process_is_told_who_works_there(tmp_path: Path) -> None:
    target = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(target)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(OutputError, match=rf"process {holder.pid} on .* \(since 20"), lock_output(target):
        pytest.fail("the lock was given twice")
    holder.kill()
    holder.wait()
    with lock_output(target):  # a killed owner's lock is taken over
        assert names(tmp_path) == [".run.pivot-lock"]
    assert names(tmp_path) == []


def test_a_process_killed_before_it_wrote_its_name_is_followed_without_an_error(tmp_path: Path) -> None:
    (tmp_path / ".run.pivot-lock").touch()
    with lock_output(tmp_path / "run"):
        assert names(tmp_path) == [".run.pivot-lock"]
    assert names(tmp_path) == []


def test_a_process_killed_while_it_took_a_lock_over_leaves_nothing(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    living = tmp_path / f".run.pivot-lock.break.{dead.pid}.c"
    living.write_text(f"{os.getpid()}\n{host}\n")
    elsewhere = tmp_path / f".run.pivot-lock.break.{dead.pid}.d"
    elsewhere.write_text(f"{dead.pid}\nanother\n")
    (tmp_path / f".run.pivot-lock.break.{dead.pid}.a").touch()
    (tmp_path / f".run.pivot-lock.break.{dead.pid}.b").write_text(f"{dead.pid}\n{host}\n")
    with lock_output(tmp_path / "other"):
        pass
    assert names(tmp_path) == [living.name, elsewhere.name]


def test_a_cache_waits_for_the_other_process(tmp_path: Path) -> None:
    target = tmp_path / "cache"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(target)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()

    def kill() -> None:  # a process that nobody waits for counts as alive
        holder.kill()
        holder.wait()

    threading.Timer(1, kill).start()
    started = time.monotonic()
    with lock_output(target, wait=True):
        assert time.monotonic() - started > 0.5


def test_kills_lose_nothing_and_leave_nothing(tmp_path: Path) -> None:
    """30 kills at random moments: the target is always one whole output, and the next process clears the rest."""
    target = tmp_path / "encoder"
    moments = random.Random(0)
    for number in range(30):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(target)])
        deadline = time.monotonic() + 20
        while number == 0 and not target.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.15 + 0.1 * moments.random())
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        with lock_output(tmp_path / "another"):  # another output beside it: its process clears what is left
            assert [n for n in names(tmp_path) if n.endswith(("-new", "-old"))] == []
        assert names(target) == ["a", "b", "modeling_pivot.py", "provenance.json"]
        assert all((target / n).stat().st_size == 20000 for n in ("a", "b", "modeling_pivot.py"))
    with lock_output(target):
        pass
    assert names(tmp_path) == ["encoder"]


def test_scratch_folders_of_killed_processes_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    variables = {**os.environ, "TMPDIR": str(tmp_path)}
    holders = [subprocess.Popen([sys.executable, "-c", SCRATCH], stdout=-1, text=True, env=variables) for _ in range(2)]
    for holder in holders:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "made\n"
    holders[0].kill()
    holders[0].wait()
    with scratch_folder("pivot-test") as folder:
        assert names(folder) == []
        assert folder.stat().st_mode & 0o077 == 0
        assert len([n for n in names(tmp_path) if n.endswith("-new")]) == 2  # its own, and that of the living process
    holders[1].kill()
    holders[1].wait()
    with scratch_folder("pivot-test"):
        pass
    assert names(tmp_path) == []
