"""A Ray cluster gives the parts of one process, and loses nothing when its workers, its actors or the driver die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pivot_hub.data import image_blocks
from pivot_hub.encoder.encode import encode_source
from pivot_hub.errors import DataError
from tests.encoder.native_towers import write_tower

ray = pytest.importorskip("ray", reason="needs the extra ray")
COUNT, BATCH = 80, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create small images of several shapes, and a file that is none."""
    images = tmp_path_factory.mktemp("ray") / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        Image.fromarray(rng.integers(0, 255, (20 + i % 5, 30, 3), np.uint8)).save(images / f"{i:02}.png")
    (images / "cut.png").write_bytes((images / "00.png").read_bytes()[:50])
    return images


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_blocks, "BLOCK", 16)


def parts_of(out: Path) -> list[Any]:
    """Return what is on disk of each block; the names of parts hold the hashes of their contents."""
    manifest = json.loads((out / "manifest.json").read_text())
    return [[block["block"], block["parts"], block["corrupt"]] for block in manifest["blocks"]]


def features(out: Path) -> dict[str, Any]:
    tables = [pq.read_table(file, columns=["id", "features"]) for file in sorted(out.glob("*.parquet"))]
    return {row["id"]: row["features"] for table in tables for row in table.to_pylist()}


@pytest.fixture(scope="module")
def local(folder: Path, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What one process writes."""
    out = tmp_path_factory.mktemp("local") / "f"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_blocks, "BLOCK", 16)
        encode_source(parts / "vision", folder, out, batch=BATCH, workers=0)
    return parts_of(out)


def workers_of_ray(name: str) -> list[psutil.Process]:
    """Return the processes of Ray's workers whose current work has a name."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ended meanwhile, or is a zombie
            if f"ray::{name}" in " ".join(child.cmdline()):
                found.append(child)
    return found


@pytest.mark.slow
def test_a_cluster_writes_the_parts_of_one_process_though_an_actor_and_a_worker_die(
    folder: Path, parts: Path, local: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)  # a relative path is one of this process
    killed: set[str] = set()

    def kill(done: int, total: int | None, speed: float) -> None:
        # A worker that decodes is idle between two lists of images.
        for name, kind in (("_Encoder", "actor"), ("IDLE", "worker"), ("_decode", "worker")):
            for process in workers_of_ray(name) if done >= 2 * BATCH and kind not in killed else ():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
                    killed.add(kind)

    report = encode_source(parts / "vision", folder.name, tmp_path / "f", batch=BATCH, progress=kill, ray="local")
    assert killed == {"actor", "worker"}
    assert report["images"] == COUNT
    assert parts_of(tmp_path / "f") == local
    assert not ray.is_initialized()


@pytest.mark.slow
def test_images_of_their_own_shapes_are_batched_by_their_size(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = write_tower("pixtral", tmp_path / "tower")
    monkeypatch.setattr("pivot_hub.encoder.batches.NUMBERS", 5 * 112 * 112)
    encode_source(tower, folder, tmp_path / "one", batch=BATCH, workers=0, tokens=True)
    encode_source(tower, folder, tmp_path / "many", batch=BATCH, tokens=True, ray="local")
    assert parts_of(tmp_path / "one") == parts_of(tmp_path / "many")


@pytest.mark.slow
def test_the_command_of_a_killed_driver_resumes_and_leaves_no_process(
    folder: Path, parts: Path, tmp_path: Path
) -> None:
    for i in range(30):  # a block each
        (tmp_path / "many" / f"{i:02}").mkdir(parents=True)
        for file in sorted(folder.glob("?[0-4].png")):
            os.link(file, tmp_path / "many" / f"{i:02}" / file.name)
    out = tmp_path / "f"
    command = ["encode", str(tmp_path / "many"), "--encoder", str(parts / "vision"), "--out", str(out), "--batch", "8"]
    program = (
        "from pivot_hub.data import image_blocks; image_blocks.BLOCK = 16; from pivot_hub.cli import app; import sys; "
        "app(sys.argv[1:])"
    )
    started = [sys.executable, "-c", program, *command, "--ray", "local"]
    with subprocess.Popen(started, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        driver = psutil.Process(process.pid)
        until = time.monotonic() + 200
        while not list((out / "work").glob("*.json")) or len(list(out.glob("*.parquet"))) < 3:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        # Ray's own agents end some time after the others.
        children = [child for child in driver.children(recursive=True) if "Agent" not in child.name()]
        process.send_signal(signal.SIGKILL)
    assert children
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    kept = sum(pq.read_metadata(file).num_rows for file in out.glob("*.parquet"))
    report = encode_source(parts / "vision", tmp_path / "many", out, batch=8, ray="local")
    assert report["images"] > report["resumed_images"] >= kept > 0
    encode_source(parts / "vision", tmp_path / "many", tmp_path / "one", batch=8, workers=0)
    assert features(out) == features(tmp_path / "one")


@pytest.fixture
def busy_cluster() -> Iterator[str]:
    """A cluster of one CPU."""
    start = ["--head", "--num-cpus", "1", "--port", "0", "--include-dashboard", "false", "--disable-usage-stats"]
    ray_command = [sys.executable, "-m", "ray.scripts.scripts"]
    subprocess.run([*ray_command, "start", *start], check=True, stdout=subprocess.DEVNULL)
    yield "auto"
    subprocess.run([*ray_command, "stop", "--force"], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_cluster_with_too_few_cpus_is_an_error_and_not_a_wait(
    busy_cluster: str, folder: Path, parts: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"1 of the Ray cluster's 1 CPUs are free, and encoding needs 2 .*--num-cpus 2"):
        encode_source(parts / "vision", folder, tmp_path / "f", ray=busy_cluster)
    assert not list(tmp_path.glob("f/*.parquet"))


@pytest.mark.slow
def test_an_address_without_a_cluster_is_named(folder: Path, parts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no Ray cluster answers at 'auto' .*ray start --head"):
        encode_source(parts / "vision", folder, tmp_path / "f", ray="auto")


def test_without_the_extra_the_message_names_it(
    folder: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match=r"pip install 'pivot_hub\[ray\]'"):
        encode_source(parts / "vision", folder, tmp_path / "f", ray="local")
