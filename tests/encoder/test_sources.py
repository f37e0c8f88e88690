"""The same images from every kind of source, by one process or several, have the same ids and features."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from pivot_hub.cli import app
from pivot_hub.data import image_blocks
from pivot_hub.data.image_blocks import SourceOptions
from pivot_hub.data.image_source import open_source
from pivot_hub.encoder import encoding_run
from pivot_hub.encoder.encode import encode_source
from pivot_hub.encoder.merge import merge_features
from pivot_hub.encoder.share import Share
from pivot_hub.errors import DataError
from tests.encoder.test_launched import launch

COUNT = 60
Features = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create small images of several sizes in two folders."""
    return write_images(tmp_path_factory.mktemp("sources") / "images", COUNT)


def write_images(images: Path, count: int) -> Path:
    (images / "b").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        image = Image.fromarray(rng.integers(0, 255, (8 + i % 5, 10, 3), np.uint8))
        image.save(images / ("b" if i % 2 else "") / f"{i:02}.png")
    return images


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))


def read(out: Path) -> Features:
    """Read features by id from a folder of parts, or from one file."""
    files = sorted(out.glob("*.parquet")) if out.is_dir() else [out]
    rows = [row for file in files for row in pq.read_table(file, columns=["id", "features"]).to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: np.array(row["features"], np.float32) for row in rows}


def assert_same(found: Features, expected: Features) -> None:
    assert found.keys() == expected.keys()
    for name, features in expected.items():
        np.testing.assert_allclose(found[name], features, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def expected(folder: Path, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Features:
    out = tmp_path_factory.mktemp("expected") / "f.parquet"
    report = encode_source(parts / "vision", folder, out, batch=16, workers=0)
    assert report["images"] == COUNT
    return read(out)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_blocks, "BLOCK", 8)


def write_tar(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names(folder)}


def write_shards(folder: Path, place: Path, count: int = 4) -> list[Path]:
    """Write shards in the layout of webdataset: a key, and the suffix after the first dot."""
    images = list(contents(folder).items())
    place.mkdir(parents=True, exist_ok=True)
    shards = []
    for i in range(count):
        members = {}
        for name, content in images[i::count]:
            members[name] = content
            members[f"{name.removesuffix('.png')}.json"] = b"{}"
        shards.append(write_tar(place / f"shards-{i:03}.tar", members))
    return shards


def write_parquet(folder: Path, file: Path, column: str, rows_per_group: int = 7) -> Path:
    images = contents(folder)
    values: Any = {
        "bytes": list(images.values()),
        "struct": [{"bytes": content, "path": name} for name, content in images.items()],
        "path": list(images),
    }[column]
    table = pa.table({"id": list(images), "image": values})
    pq.write_table(table, file, row_group_size=rows_per_group)
    return file


KINDS = ("zip", "tar", "bytes", "struct", "path", "list", "stdin", "saved", "hub", "memory", "memory-tar")


def make_source(kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    place = tmp_path / "source"
    place.mkdir()
    if kind == "zip":
        with zipfile.ZipFile(place / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in contents(folder).items():
                archive.writestr(name, content)
        return str(place / "a.zip")
    if kind == "tar":
        return str(write_tar(place / "a.tar", contents(folder)))
    if kind in ("bytes", "struct"):
        return str(write_parquet(folder, place / "a.parquet", kind))
    if kind == "path":
        return str(write_parquet(folder, folder / "a.parquet", kind))
    if kind in ("list", "stdin"):
        monkeypatch.chdir(folder)
        text = "\n".join(names(folder)) + "\n"
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        (place / "list.txt").write_text(text)
        return "-" if kind == "stdin" else str(place / "list.txt")
    if kind in ("saved", "hub"):
        rows = [{"id": name, "image": {"bytes": c, "path": None}} for name, c in contents(folder).items()]
        features = datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()})
        table = datasets.Dataset.from_list(rows, features=features)
        if kind == "saved":
            table.save_to_disk(str(place / "saved"))
            return str(place / "saved")
        for i in range(3):
            table.shard(3, i).to_parquet(place / f"train-{i}.parquet")
        streamed = datasets.load_dataset("parquet", data_files=f"{place}/*.parquet", streaming=True)
        monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: streamed)
        return "someone/photos"
    memory = fsspec.filesystem("memory")
    memory.rm("/", recursive=True) if memory.find("/") else None
    if kind == "memory":
        for name, content in contents(folder).items():
            memory.pipe(f"/photos/{name}", content)
        return "memory://photos"
    memory.pipe("/a.tar", write_tar(place / "a.tar", contents(folder)).read_bytes())
    return "memory://a.tar"


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_ids_and_features(
    kind: str, folder: Path, expected: Features, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(kind, folder, tmp_path, monkeypatch)
    try:
        report = encode_source(parts / "vision", source, tmp_path / "out", batch=16, workers=0)
    finally:
        (folder / "a.parquet").unlink(missing_ok=True)
    assert (report["images"], report["complete"], report["problems"]) == (COUNT, True, [])
    assert_same(read(tmp_path / "out"), expected)


@pytest.mark.nightly
def test_every_path_gives_the_same_2000_images(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_blocks, "BLOCK", 128)
    images = write_images(tmp_path / "images", 2000)
    encoder: Any = parts / "vision"
    encode_source(encoder, images, tmp_path / "f.parquet")
    expected = read(tmp_path / "f.parquet")
    assert len(expected) == 2000
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        source = make_source(kind, images, tmp_path / kind, monkeypatch)
        encode_source(encoder, source, tmp_path / kind / "out")
        assert_same(read(tmp_path / kind / "out"), expected)
        (images / "a.parquet").unlink(missing_ok=True)
    merge_features(split(images, encoder, tmp_path, 4), tmp_path / "merged")
    assert_same(read(tmp_path / "merged"), expected)
    encode_source(encoder, images, tmp_path / "ray", ray="local")
    assert_same(read(tmp_path / "ray"), expected)
    launch(tmp_path / "counts", "encode", images, "--encoder", encoder, "--out", tmp_path / "torchrun")
    assert_same(read(tmp_path / "torchrun"), expected)
    shards = write_shards(images, tmp_path / "shards", 20)
    encode_source(encoder, str(shards[0].parent / "shards-{000..019}.tar"), tmp_path / "keys")
    assert_same(read(tmp_path / "keys"), {name.removesuffix(".png"): f for name, f in expected.items()})


@pytest.mark.parametrize("place", ["glob", "braces", "folder", "memory"])
def test_shards_give_the_keys_of_webdataset(
    place: str, folder: Path, expected: Features, parts: Path, tmp_path: Path
) -> None:
    shards = write_shards(folder, tmp_path / "shards")
    (tmp_path / "shards" / "notes.txt").write_text("x")
    source = {
        "glob": str(tmp_path / "shards" / "*.tar"),
        "braces": str(tmp_path / "shards" / "shards-{000..003}.tar"),
        "folder": str(tmp_path / "shards"),
        "memory": "memory://wds/shards-00?.tar",
    }[place]
    for shard in shards:
        fsspec.filesystem("memory").pipe(f"/wds/{shard.name}", shard.read_bytes())
    report = encode_source(parts / "vision", source, tmp_path / "out", batch=16, workers=0)
    assert report["images"] == COUNT
    assert [block["block"] for block in report["blocks"]] == [shard.name for shard in shards]
    assert_same(read(tmp_path / "out"), {name.removesuffix(".png"): f for name, f in expected.items()})


def test_worker_processes_read_shards_of_this_machine_and_of_urls(folder: Path, parts: Path, tmp_path: Path) -> None:
    shards = write_shards(folder, tmp_path / "shards")
    for shard in shards:
        fsspec.filesystem("memory").pipe(f"/two/{shard.name}", shard.read_bytes())
    for name, source in (("a", str(tmp_path / "shards" / "*.tar")), ("b", "memory://two/*.tar")):
        encode_source(parts / "vision", source, tmp_path / name, batch=4, workers=2)
    files = {file.name: file.read_bytes() for file in (tmp_path / "a").glob("*.parquet")}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "b").glob("*.parquet")}


def split(source: Path, encoder: Path, out: Path, count: int) -> list[Path]:
    """Encode a source in shares, each to a folder of its own."""
    folders = [out / f"{i}-of-{count}" for i in range(1, count + 1)]
    for i, target in enumerate(folders, 1):
        report = encode_source(encoder, source, target, batch=16, workers=0, share=Share(i, count))
        assert report["missing_blocks"] > 0
        assert not report["complete"]
    return folders


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_the_merged_rows_are_the_same_whatever_the_number_of_processes(
    kind: str, folder: Path, expected: Features, parts: Path, tmp_path: Path
) -> None:
    source = folder
    if kind == "shards":
        write_shards(folder, tmp_path / "shards", 5)
        source = tmp_path / "shards"
        expected = {name.removesuffix(".png"): features for name, features in expected.items()}
    encode_source(parts / "vision", source, tmp_path / "whole", batch=16, workers=0)
    for count in (2, 3):
        folders = split(source, parts / "vision", tmp_path, count)
        assert all(read(one) for one in folders), "each process has a share"
        merged = tmp_path / f"merged-{count}"
        manifest = merge_features(folders, merged)
        assert manifest["complete"]
        assert_same(read(merged), expected)
        whole = json.loads((tmp_path / "whole" / "manifest.json").read_text())
        assert manifest["blocks"] == whole["blocks"], "the parts are the same files"
    report = merge_features(folders, tmp_path / "f.parquet")
    assert report["images"] == COUNT
    assert_same(read(tmp_path / "f.parquet"), expected)
    report = merge_features([merged], tmp_path / "f.npy")
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), np.stack([expected[n] for n in report["files"]]), atol=1e-5)


def test_shares_of_one_folder_need_no_merge(folder: Path, expected: Features, parts: Path, tmp_path: Path) -> None:
    for i in (1, 2, 3):
        report = encode_source(parts / "vision", folder, tmp_path / "out", batch=16, workers=0, share=Share(i, 3))
        assert report["complete"] == (i == 3)
    assert_same(read(tmp_path / "out"), expected)


def test_processes_of_a_launcher_take_over_what_another_left(
    folder: Path, expected: Features, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["encode", str(folder), "--encoder", str(parts / "vision")]
    command += ["--out", str(tmp_path / "out"), "--workers", "0", "--batch", "16"]
    report = encode_source(
        parts / "vision", folder, tmp_path / "out", batch=16, workers=0, share=Share(1, 2, helps=True)
    )
    assert report["complete"], "the first process helps the second, which has not begun"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert f"{COUNT} images of shape (32)" in done.output
    assert_same(read(tmp_path / "out"), expected)


def test_a_stopped_shard_resumes_at_its_last_part(
    folder: Path, expected: Features, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding_run, "PART_IMAGES", 8)
    source = str(write_tar(tmp_path / "a.tar", contents(folder)).with_name("a*.tar"))

    def stop(done: int, total: int | None, speed: float) -> None:
        if done > 20:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            encode_source(parts / "vision", source, tmp_path / "out", batch=4, workers=0, progress=stop)
    report = encode_source(parts / "vision", source, tmp_path / "out", batch=4, workers=0)
    assert report["resumed_images"] == 24
    assert_same(read(tmp_path / "out"), {name.removesuffix(".png"): f for name, f in expected.items()})


def growing(folder: Path, encoder: Path, out: Path) -> Iterator[tuple[dict[str, Any], set[str]]]:
    while True:
        report = encode_source(encoder, folder, out, batch=16, workers=0)
        yield report, {file.name for file in out.glob("*.parquet")}


def test_a_growing_source_adds_parts_for_what_is_new(
    folder: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_blocks, "BLOCK", 3)
    images = tmp_path / "images"
    images.mkdir()
    for i, name in enumerate(names(folder)[:40]):
        (images / f"{i:02}.png").write_bytes((folder / name).read_bytes())
    runs = growing(images, parts / "vision", tmp_path / "out")
    _, before = next(runs)
    Image.new("RGB", (9, 9), (1, 2, 3)).save(images / "20b.png")
    report, after = next(runs)
    assert (report["images"], report["resumed_images"]) == (41, 40)
    assert len(before) > 2
    assert len(before - after) == 1, "one block holds the new name"
    report, again = next(runs)
    assert again == after
    assert report["resumed_images"] == 41
    (images / "20b.png").unlink()
    report, _ = next(runs)
    assert report["images"] == 40

    shards = write_shards(folder, tmp_path / "shards")
    late = tmp_path / "late.tar"
    shards[3].replace(late)
    first = encode_source(parts / "vision", tmp_path / "shards/shards-{000..002}.tar", tmp_path / "f", workers=0)
    late.replace(shards[3])
    shards[0].unlink()  # whoever has little room deletes what is encoded
    report = encode_source(parts / "vision", tmp_path / "shards/shards-00[0-3].tar", tmp_path / "f2", workers=0)
    assert report["images"] == 45
    report = encode_source(parts / "vision", tmp_path / "shards/shards-{001..003}.tar", tmp_path / "f", workers=0)
    assert (report["images"], report["resumed_images"]) == (COUNT, 30)
    assert {p["file"] for b in first["blocks"] for p in b["parts"]} <= {f.name for f in (tmp_path / "f").iterdir()}


def test_a_shard_cut_short_gives_what_precedes_the_cut_and_is_listed(folder: Path, parts: Path, tmp_path: Path) -> None:
    shards = write_shards(folder, tmp_path / "shards")
    whole = {shard: shard.read_bytes() for shard in shards}
    shards[1].write_bytes(whole[shards[1]][: len(whole[shards[1]]) // 2])
    with tarfile.open(shards[2]) as archive:
        last = archive.getmembers()[-1]
    shards[2].write_bytes(whole[shards[2]][: last.offset])  # between two members
    shards[3].write_bytes(b"")
    out, pattern = tmp_path / "out", str(tmp_path / "shards" / "*.tar")
    report = encode_source(parts / "vision", pattern, out, batch=4, workers=0)
    assert 30 < report["images"] < 45
    assert not report["complete"]
    assert [problem.partition(".tar")[0][-3:] for problem in report["problems"]] == ["001", "002", "003"]
    assert "cut short" in report["problems"][1]
    command = [
        "encode",
        pattern,
        "--encoder",
        str(parts / "vision"),
        "--out",
        str(out),
        "--batch",
        "4",
        "--workers",
        "0",
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert "not whole: " in done.output
    encoded = report["images"]
    for shard, content in whole.items():
        shard.write_bytes(content)
    report = encode_source(parts / "vision", pattern, out, batch=4, workers=0)
    assert (report["images"], report["complete"], report["problems"]) == (COUNT, True, [])
    assert CliRunner().invoke(app, command).exit_code == 0
    assert report["resumed_images"] >= encoded - 1, "the image that the cut went through may be corrupt"


def test_features_of_a_shard_stay_when_it_is_cut_short_or_deleted_later(
    folder: Path, parts: Path, tmp_path: Path
) -> None:
    shards = write_shards(folder, tmp_path / "shards", 2)
    out, pattern = tmp_path / "out", str(tmp_path / "shards" / "*.tar")
    encode_source(parts / "vision", pattern, out, batch=4, workers=0)
    before = read(out)
    shards[0].write_bytes(shards[0].read_bytes()[:5000])
    for _ in range(2):
        report = encode_source(parts / "vision", pattern, out, batch=4, workers=0)
        assert "not a whole archive" in report["problems"][0]
        assert (report["images"], report["complete"]) == (COUNT, False)
    shards[0].unlink()
    assert encode_source(parts / "vision", pattern, out, batch=4, workers=0)["images"] == COUNT
    assert_same(read(out), before)


def test_ids_that_are_in_two_shards_are_kept_and_listed(folder: Path, parts: Path, tmp_path: Path) -> None:
    shards = write_shards(folder, tmp_path / "shards", 2)
    other = (folder / names(folder)[0]).read_bytes()
    write_tar(tmp_path / "shards" / "shards-002.tar", {"00.png": other, "new.png": other, "new.webp": other})
    report = encode_source(parts / "vision", str(shards[0].with_name("*.tar")), tmp_path / "out", workers=0)
    assert report["images"] == COUNT + 3
    assert report["repeated_ids"] == {"count": 1, "first": ["00"]}
    ids = [i for file in (tmp_path / "out").glob("*.parquet") for i in pq.read_table(file)["id"].to_pylist()]
    assert ids.count("00") == 2
    assert "new.webp" in ids, "the second image of a key has its whole name"


def test_a_source_that_changes_under_a_running_job_is_listed_and_read_again(
    folder: Path, parts: Path, tmp_path: Path
) -> None:
    shards = write_shards(folder, tmp_path / "shards", 2)
    newer = contents(folder)["00.png"]

    def change(done: int, total: int | None, speed: float) -> None:
        if done == 4:
            write_tar(shards[0], {"later.png": newer, "padding.json": bytes(99)})

    pattern = str(shards[0].with_name("*.tar"))
    report = encode_source(parts / "vision", pattern, tmp_path / "out", batch=4, workers=0, progress=change)
    assert not report["complete"]
    assert any("shards-000.tar: changed while it was read" in problem for problem in report["problems"])
    report = encode_source(parts / "vision", pattern, tmp_path / "out", batch=4, workers=0)
    assert (report["images"], report["complete"]) == (COUNT // 2 + 1, True)

    images = tmp_path / "images"
    images.mkdir()
    for name in names(folder)[:20]:
        (images / Path(name).name).write_bytes((folder / name).read_bytes())

    def remove(done: int, total: int | None, speed: float) -> None:
        for file in sorted(images.glob("*.png"))[-1:] if done == 4 else []:
            file.unlink()

    report = encode_source(parts / "vision", images, tmp_path / "f", batch=4, workers=0, progress=remove)
    corrupt = [entry for block in report["blocks"] for entry in block["corrupt"]]
    assert len(corrupt) == 1
    assert "does not exist" in corrupt[0]["reason"]
    assert report["images"] == 19
    report = encode_source(parts / "vision", images, tmp_path / "f", batch=4, workers=0)
    assert (report["images"], report["corrupt_images"], report["resumed_images"]) == (19, 0, 19)


def test_a_shard_that_is_gone_while_the_job_runs_is_listed(
    folder: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(folder, tmp_path / "shards", 3)
    pattern, content = str(shards[0].with_name("*.tar")), shards[2].read_bytes()

    def remove(done: int, total: int | None, speed: float) -> None:
        shards[2].unlink(missing_ok=True)

    report = encode_source(parts / "vision", pattern, tmp_path / "out", batch=4, workers=0, progress=remove)
    assert report["images"] == 40
    assert "shards-002.tar does not exist" in report["problems"][0]
    shards[2].write_bytes(content)
    assert encode_source(parts / "vision", pattern, tmp_path / "out", workers=0)["complete"]


def test_tables_name_their_columns(folder: Path, tmp_path: Path) -> None:
    images = contents(folder)
    table = pa.table({"photo": list(images.values()), "number": list(range(COUNT)), "image": ["../x.png"] * COUNT})
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"), SourceOptions("photo", "number"))
    found = [image for block in source.blocks() for image in block.images()]
    assert [image.id for image in found] == [str(i) for i in range(COUNT)]
    assert [image.read() for image in found] == list(images.values())
    source = open_source(str(tmp_path / "a.parquet"), SourceOptions("image"))
    found = [image for block in source.blocks() for image in block.images()]
    assert found[3].id == "a.parquet#3"
    with pytest.raises(DataError, match="outside the data set"):
        found[3].read()
    source = open_source(str(tmp_path / "a.parquet"), SourceOptions("absent"))
    with pytest.raises(DataError, match=r"no column 'absent' among photo, number, image"):
        next(next(iter(source.blocks())).images())


def test_sources_that_do_not_exist_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "empty.tar").write_bytes(write_tar(tmp_path / "e.tar", {"notes.txt": b"x"}).read_bytes())
    for source, message in (
        (str(tmp_path / "absent"), "is not a folder or another source"),
        (str(tmp_path / "a.csv"), "is not a folder or another source"),
        (str(tmp_path / "*.tar.gz"), "does not exist; check the pattern"),
        (str(tmp_path / "{e,f}.tar"), "f.tar does not exist; check the pattern"),
        (str(tmp_path / "*.csv"), "is no .tar, .zip or .parquet"),
        (str(tmp_path / "empty.tar"), "holds no image"),
        ("memory://nothing", "is not a folder or another source"),
        ("nosuch://a/*.tar", "cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(source)
