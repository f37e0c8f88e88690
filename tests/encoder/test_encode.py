"""Features of a folder: every image in order, corrupt ones listed, a killed run resumed with the same result."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pivot_hub.cli.app import bar
from pivot_hub.data.image import open_image
from pivot_hub.encoder import encode, encoding_run
from pivot_hub.encoder.encode import encode_source
from pivot_hub.encoder.repository import read_encoder
from pivot_hub.errors import CheckpointError, DataError, OutputError
from pivot_hub.outputs import lock_output
from tests.encoder.originals import make_vision

COUNT = 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create images of several modes and sizes in two folders, two of them corrupt."""
    images = tmp_path_factory.mktemp("images")
    (images / "b").mkdir()
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        image = Image.fromarray(rng.integers(0, 255, (20 + i, 30, 3), np.uint8))
        mode = ("RGB", "L", "P", "RGBA")[i % 4]
        image.convert(mode).save(images / ("b" if i % 2 else "") / f"{i:02}.png")
    (images / "04.png").write_bytes(b"no image")
    content = (images / "b" / "05.png").read_bytes()
    (images / "b" / "05.png").write_bytes(content[: len(content) // 2])
    (images / "notes.txt").write_text("x")
    return images


def expected_tokens(parts: Path, folder: Path, report: dict[str, object]) -> torch.Tensor:
    encoder, _ = read_encoder(parts / "vision")
    files = report["files"]
    assert isinstance(files, list)
    with torch.no_grad():
        return encoder.forward_features([open_image(folder / f, f) for f in files]).last_hidden_state


def test_parquet_has_a_row_for_every_image(parts: Path, folder: Path, tmp_path: Path) -> None:
    progress: list[tuple[int, int | None]] = []
    out = tmp_path / "f.parquet"
    report = encode_source(parts / "vision", folder, out, batch=4, progress=lambda d, t, r: progress.append((d, t)))
    table = pq.read_table(out)
    assert table["id"].to_pylist() == report["files"]
    assert report["files"] == sorted(report["files"])
    assert report["not_read"]["files"] == {"count": 1, "first": ["notes.txt"]}
    assert json.loads((tmp_path / "f.parquet.json").read_text()) == report
    assert len(table) == report["images"] == COUNT - 2
    assert [entry["file"] for entry in report["corrupt"]] == ["04.png", "b/05.png"]
    assert all("cannot be decoded" in entry["reason"] for entry in report["corrupt"])
    features = np.stack(table["features"].to_numpy())
    expected = expected_tokens(parts, folder, report).mean(1).numpy()
    np.testing.assert_allclose(features, expected, atol=1e-5)
    assert progress[-1] == (COUNT, COUNT)
    assert json.loads((tmp_path / "f.parquet.json").read_text())["shape"] == [32]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.parquet", "f.parquet.json"]


def test_npy_has_all_patch_tokens(parts: Path, folder: Path, tmp_path: Path) -> None:
    report = encode_source(parts / "vision", folder, tmp_path / "f.npy", tokens=True, batch=5, workers=0)
    features = np.load(tmp_path / "f.npy")
    assert features.shape == (COUNT - 2, 16, 32)
    np.testing.assert_allclose(features, expected_tokens(parts, folder, report).numpy(), atol=1e-5)
    half = encode_source(parts / "vision", folder, tmp_path / "h.npy", dtype="float16", workers=0)
    assert half["files"] == report["files"]
    assert np.load(tmp_path / "h.npy").dtype == np.float16


def test_a_stopped_run_resumes_and_gives_the_same_file(
    parts: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding_run, "PART_IMAGES", 6)
    whole, resumed = tmp_path / "whole.parquet", tmp_path / "resumed.parquet"
    encode_source(parts / "vision", folder, whole, batch=4, workers=0)

    def stop(done: int, total: int | None, rate: float) -> None:
        if done > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_source(parts / "vision", folder, resumed, batch=4, workers=0, progress=stop)
    assert not resumed.exists()
    with pytest.raises(DataError, match="holds parts of another run"):
        encode_source(parts / "vision", folder, resumed, batch=4, workers=0, tokens=True)
    report = encode_source(parts / "vision", folder, resumed, batch=4, workers=0)
    assert report["resumed_images"] == 8
    assert resumed.read_bytes() == whole.read_bytes()


def few_images(folder: Path, count: int = 6) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / f"{i}.bmp")  # files of one size
    return folder


def stopped(encoder: Path, images: Path, out: Path) -> None:
    """Encode images in parts of two, and stop after the second part."""

    def stop(done: int, total: int | None, rate: float) -> None:
        if done > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_source(encoder, images, out, batch=2, workers=0, progress=stop)


@pytest.mark.parametrize("suffix", [".parquet", ".npy"])
def test_only_added_and_replaced_images_are_encoded_again(parts: Path, tmp_path: Path, suffix: str) -> None:
    images, out, again = few_images(tmp_path / "images"), tmp_path / f"f{suffix}", tmp_path / f"again{suffix}"
    encode_source(parts / "vision", images, out, workers=0)
    before = (images / "3.bmp").stat()
    Image.new("RGB", (8, 8), (0, 200, 0)).save(images / "3.bmp")
    os.utime(images / "3.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (images / "3.bmp").stat().st_size == before.st_size
    Image.new("RGB", (8, 8), (0, 0, 9)).save(images / "00.bmp")
    (images / "5.bmp").unlink()
    report = encode_source(parts / "vision", images, out, workers=0)
    assert report["files"] == ["0.bmp", "00.bmp", "1.bmp", "2.bmp", "3.bmp", "4.bmp"]
    assert report["resumed_images"] == 4
    encode_source(parts / "vision", images, again, workers=0)
    read = np.load if suffix == ".npy" else lambda file: np.stack(pq.read_table(file)["features"].to_numpy())
    np.testing.assert_allclose(read(out), read(again), atol=1e-5)
    assert encode_source(parts / "vision", images, out, workers=0)["resumed_images"] == 6


def test_a_damaged_part_is_encoded_again_and_another_encoders_parts_are_never_used(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding_run, "PART_IMAGES", 2)
    images, out = few_images(tmp_path / "images"), tmp_path / "f.npy"
    stopped(parts / "vision", images, out)
    other = make_vision(tmp_path / "other", hidden_size=32, intermediate_size=32)
    with pytest.raises(DataError, match="holds parts of another run"):
        encode_source(other, images, out, workers=0)
    part, *_ = sorted((tmp_path / "f.npy.partial").glob("*.parquet"))
    content = bytearray(part.read_bytes())
    content[-2] ^= 64
    part.write_bytes(bytes(content))
    assert encode_source(parts / "vision", images, out, batch=2, workers=0)["resumed_images"] == 4
    encode_source(parts / "vision", images, tmp_path / "whole.npy", batch=2, workers=0)
    assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_files_of_others_and_of_running_processes_are_not_touched(parts: Path, tmp_path: Path) -> None:
    images, out = few_images(tmp_path / "images", 1), tmp_path / "f.npy"
    with lock_output(out), pytest.raises(OutputError, match=f"process {os.getpid()} on .* is working on this output"):
        encode_source(parts / "vision", images, out, workers=0)
    for name in ("f.npy", "f.npy.json", "f.npy.partial/notes.txt"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
        with pytest.raises(OutputError, match=name.replace(".", r"\.")):
            encode_source(parts / "vision", images, out, workers=0)
        assert file.read_text() == "mine"
        file.unlink()


def test_features_that_are_not_finite_are_named_and_not_written(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = few_images(tmp_path / "images", 2)
    model, processor = read_encoder(parts / "vision", dtype=torch.float16)
    with torch.no_grad():
        model.backbone.get_parameter("encoder.layers.1.mlp.fc2.bias").fill_(6e4)
        model.backbone.get_parameter("encoder.layers.0.mlp.fc2.bias").fill_(6e4)
    monkeypatch.setattr(encode, "read_encoder", lambda name, **options: (model, processor))
    with pytest.raises(DataError, match=r"features of 0\.bmp are not finite .* compute in float32 or bfloat16"):
        encode_source(parts / "vision", images, tmp_path / "f.npy", dtype="float16", workers=0)
    assert not (tmp_path / "f.npy").exists()


def test_workers_that_cannot_start_end_with_an_error_message(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("torch.multiprocessing.get_context", fail)
    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", fail)
    images = few_images(tmp_path / "images", 4)
    with pytest.raises(DataError, match=r"in 2 processes \(.*Too many open files\); give fewer --workers"):
        encode_source(parts / "vision", images, tmp_path / "f.npy", batch=1, workers=2)


@pytest.mark.slow
def test_a_command_without_file_descriptors_ends(parts: Path, tmp_path: Path) -> None:
    images = few_images(tmp_path / "images", 64)
    command = f"{sys.executable} -m pivot_hub encode {images} --encoder {parts / 'vision'} --batch 4 --workers 12"
    run = subprocess.run(
        ["bash", "-c", f"ulimit -n 48; {command} --out {tmp_path / 'f.npy'}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 2, run.stderr
    assert "give fewer --workers, or raise the limits of open files" in run.stderr


def test_bad_input_is_refused_with_an_error_message(parts: Path, folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for source, out, dtype, message in (
        (folder, "f.csv", "float32", "written as .parquet or .npy, or to a folder"),
        (folder, "f.npy", "int8", "give one of float32, float16, bfloat16"),
        (tmp_path / "absent", "f.npy", "float32", "is not a folder"),
        (empty, "f.npy", "float32", "holds no image file"),
    ):
        with pytest.raises(DataError, match=message):
            encode_source(parts / "vision", source, tmp_path / out, dtype=dtype)
    wrong: list[dict[str, Any]] = [{"batch": 0}, {"workers": -1}]
    for options in wrong:
        with pytest.raises(DataError, match=r"give [01] "):
            encode_source(parts / "vision", folder, tmp_path / "f.npy", **options)
    with pytest.raises(CheckpointError, match="no encoder can be loaded"):
        encode_source(parts / "language", folder, tmp_path / "f.npy")
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_a_run_that_resumes_slowly_is_shown_without_a_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    with bar("images") as advance:
        for done, speed in ((8, 0.0), (60, 4.0)):
            now_s += 11
            advance(done, 100, speed)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["8 of 100 images, 0.0/s", "60 of 100 images, 4.0/s, 10 s left"]
