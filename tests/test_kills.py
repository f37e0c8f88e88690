"""30 kills at random moments of each command that writes: nothing is lost, and nothing hidden stays behind.

Each kill is followed by the same command. A target is at all times absent, or one whole output; the command that is
not killed ends with the result of one that never was, and only its outputs are there.
"""

from __future__ import annotations

import io
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from pivot_hub.mllm.extract import extract_encoder
from pivot_hub.provenance import file_sha256
from tests.publish.hub_server import hub_server, state
from tests.publish.publishable import PROSE, make_publishable

ROOT = Path(__file__).parents[1]
KILLS = 30
pytestmark = pytest.mark.nightly


class Commands:
    """Runs one command again and again, and kills it.

    Args:
        process: Process of `tests.forked_commands`.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.moments = random.Random(0)

    def run(self, *arguments: str | Path, kill_after_s: float | None = None) -> int:
        """Run a command to its end, or kill it after a time, and return its exit status."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(a) for a in arguments]).encode() + b"\n")
        pid = int(self.process.stdout.readline())
        ended = [] if kill_after_s is None else select.select([self.process.stdout], [], [], kill_after_s)[0]
        if kill_after_s is not None and not ended:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signal.SIGKILL)
        return int(self.process.stdout.readline())

    def kill(self, check: Callable[[], None], *arguments: str | Path, longest_s: float) -> int:
        """Kill a command 30 times at random moments, and check what is there after each; return how many were cut."""
        cut = 0
        for _ in range(KILLS):
            cut += self.run(*arguments, kill_after_s=longest_s * self.moments.random()) == -signal.SIGKILL
            check()
        assert self.run(*arguments) == 0
        check()
        return cut


@contextmanager
def forked(environment: dict[str, str] | None = None) -> Iterator[Commands]:
    command = [sys.executable, "-m", "tests.forked_commands"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", **(environment or {})}
    with subprocess.Popen(command, stdin=-1, stdout=-1, bufsize=0, env=variables) as process:
        yield Commands(process)
        assert process.stdin is not None
        process.stdin.close()


def timed(commands: Commands, *command: str | Path, output: Path) -> float:
    """Write an output twice, of which the second is timed: the first also imports what the command needs."""
    assert commands.run(*command, output.with_name(f"first-{output.name}")) == 0
    started = time.monotonic()
    assert commands.run(*command, output) == 0
    return time.monotonic() - started


def contents(folder: Path) -> dict[str, str]:
    """Hash of each file of a folder by name; empty without the folder."""
    return {p.relative_to(folder).as_posix(): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_extract(trained: Path, tmp_path: Path) -> None:
    with forked() as commands:
        longest_s = timed(commands, "extract", trained / "3-dpo", output=tmp_path / "whole")
        whole, target = contents(tmp_path / "whole"), tmp_path / "out" / "encoder"

        def check() -> None:
            assert contents(target) in ({}, whole)

        assert commands.kill(check, "extract", trained / "3-dpo", target, longest_s=longest_s) > KILLS / 3
    assert contents(target) == whole
    assert names(target.parent) == ["encoder"]


def test_export(parts: Path, tmp_path: Path) -> None:
    with forked() as commands:
        longest_s = timed(commands, "export", parts / "vision", output=tmp_path / "whole")
        whole, target = names(tmp_path / "whole"), tmp_path / "out" / "export"

        def check() -> None:
            assert not target.exists() or names(target) == whole
            if target.exists():
                assert (target / "export.json").stat().st_size > 0

        assert commands.kill(check, "export", parts / "vision", target, longest_s=longest_s) > KILLS / 3
    files = json.loads((target / "export.json").read_text())["files"]
    assert {n: (target / n).stat().st_size for n in files} == {n: f["bytes"] for n, f in files.items()}
    assert names(target.parent) == ["export"]


def test_encode_to_a_folder(parts: Path, tmp_path: Path) -> None:
    images = tmp_path / "shards"
    images.mkdir()
    for i in range(10):
        with zipfile.ZipFile(images / f"{i}.zip", "w") as archive:
            for j in range(30):
                content = io.BytesIO()
                Image.new("RGB", (40, 40), (i, j, 0)).save(content, "PNG")
                archive.writestr(f"{i}-{j:02}.png", content.getvalue())
    target = tmp_path / "out" / "features"
    command = ["encode", str(images / "*.zip"), "--encoder", str(parts / "vision"), "--batch", "1", "--workers", "0"]
    with forked() as commands:
        longest_s = timed(commands, *command, "--out", output=tmp_path / "whole")
        whole = contents(tmp_path / "whole")
        finished = 0

        def check() -> None:
            nonlocal finished
            manifest = target / "manifest.json"
            if manifest.exists() and json.loads(manifest.read_text())["complete"]:
                assert {name: content for name, content in contents(target).items() if "work" not in name} == whole
                finished += 1
                shutil.rmtree(target)  # the next kill is of a new run

        cut = commands.kill(check, *command, "--out", target, longest_s=longest_s)
    assert cut > KILLS / 3
    assert finished > 0
    assert names(target.parent) == []


def test_encode(parts: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(300):
        Image.new("RGB", (40, 40), (i % 255, 0, 0)).save(images / f"{i:03}.png")
    target = tmp_path / "out" / "f.npy"
    command: list[str | Path] = [
        "encode",
        images,
        "--encoder",
        parts / "vision",
        "--batch",
        "1",
        "--workers",
        "0",
        "--out",
    ]
    with forked() as commands:
        longest_s = timed(commands, *command, output=tmp_path / "whole.npy")
        whole = (tmp_path / "whole.npy").read_bytes()
        finished = 0

        def check() -> None:
            nonlocal finished
            if target.exists():
                assert target.read_bytes() == whole
                if names(target.parent) == ["f.npy", "f.npy.json"]:
                    finished += 1
                    for file in target.parent.iterdir():  # the next kill is of a new run
                        file.unlink()

        cut = commands.kill(check, *command, target, longest_s=longest_s)
    assert cut > KILLS / 3
    assert finished > 0
    assert names(target.parent) == []


def test_train(recipes: Path, trained: Path, tmp_path: Path) -> None:
    recipe: list[str | Path] = [
        "train",
        recipes / "3-dpo.yaml",
        "args.save_steps=1",
        "args.per_device_train_batch_size=2",
    ]
    recipe += ["data.0.rows=16", "--runs", trained.parent, "--output"]
    target = tmp_path / "out" / "run"
    with forked() as commands:
        longest_s = timed(commands, *recipe, output=tmp_path / "whole")
        whole = load_file(tmp_path / "whole" / "model.safetensors")
        finished = 0

        def check() -> None:
            nonlocal finished
            if target.exists():
                weights = load_file(target / "model.safetensors")
                assert all(weights[key].equal(tensor) for key, tensor in whole.items())
                assert (target / "provenance.json").is_file()
                if names(target.parent) == ["run"]:
                    finished += 1
                    for file in sorted(target.rglob("*"), reverse=True):  # the next kill is of a new run
                        file.rmdir() if file.is_dir() else file.unlink()
                    target.rmdir()

        cut = commands.kill(check, *recipe, target, longest_s=longest_s)
    assert cut > KILLS / 3
    assert finished > 0
    assert names(target.parent) == []


def test_push(tmp_path: Path) -> None:
    encoder = make_publishable(tmp_path / "encoder")
    prose = tmp_path / "prose.yaml"
    prose.write_text(yaml.safe_dump(PROSE))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    before = contents(encoder)
    with hub_server(tmp_path / "hub") as server:
        variables = {**server.environment(tmp_path / "home"), "TMPDIR": str(scratch)}
        options: list[str | Path] = ["--prose", prose, "--yes"]
        with forked({**variables, "HF_HUB_OFFLINE": "0"}) as commands:
            longest_s = timed(commands, "push", *options, encoder, output=Path("pivot/whole"))
            whole = server.repo("pivot/whole")
            assert whole is not None
            files = set(whole.commit_at("main").tree)

            def check() -> None:
                repo = server.repo("pivot/killed")
                published = set(repo.commit_at("main").tree) if repo else set()
                assert published <= {".gitattributes"} or published == files
                assert contents(encoder) == before

            cut = commands.kill(check, "push", encoder, "pivot/killed", *options, longest_s=longest_s)
        assert cut > KILLS / 3
        assert set(json.loads(state(server, "pivot/killed")["tree"])) == files
    assert names(scratch) == []


def test_a_killed_extract_leaves_the_encoder_that_was_there(trained: Path, tmp_path: Path) -> None:
    """The replacement of an output is one of two whole ones at every moment."""
    target = tmp_path / "out" / "encoder"
    extract_encoder(trained / "3-sft", target)
    with forked() as commands:
        longest_s = timed(commands, "extract", trained / "3-dpo", output=tmp_path / "whole")
        either = (contents(target), contents(tmp_path / "whole"))
        for _ in range(KILLS):
            commands.run(
                "extract", trained / "3-dpo", target, kill_after_s=longest_s * (0.8 + 0.2 * commands.moments.random())
            )
            left = contents(target) or contents(target.with_name(".encoder.pivot-old"))
            assert left in either
        assert commands.run("extract", trained / "3-dpo", target) == 0
    assert names(target.parent) == ["encoder"]
