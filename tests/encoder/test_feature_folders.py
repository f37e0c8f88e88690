"""Folders of features: types that they are stored in, several layers, manifests, and tools that read them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pivot_hub.cli import app
from pivot_hub.data import image_blocks
from pivot_hub.data.image import open_image
from pivot_hub.data.image_source import open_source
from pivot_hub.encoder.encode import encode_source
from pivot_hub.encoder.feature_file import repeated_ids
from pivot_hub.encoder.feature_parts import block_key
from pivot_hub.encoder.feature_table import FeatureTable, NotFiniteError, decode
from pivot_hub.encoder.merge import merge_features
from pivot_hub.encoder.repository import read_encoder
from pivot_hub.encoder.share import Share, find_share
from pivot_hub.errors import CheckpointError, DataError, OutputError
from pivot_hub.outputs import lock_output
from pivot_hub.provenance import file_sha256
from tests.encoder.originals import make_vision

COUNT = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        Image.fromarray(rng.integers(0, 255, (9, 9 + i, 3), np.uint8)).save(images / f"{i:02}.png")
    return images


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_blocks, "BLOCK", 2)


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for file in out.glob("*.parquet") for row in pq.read_table(file).to_pylist()}


def outputs(encoder: Path, folder: Path, layer: int | None = None) -> torch.Tensor:
    model, _ = read_encoder(encoder, feature_layer=layer)
    with torch.no_grad():
        images = [open_image(file, file.name) for file in sorted(folder.glob("*.png"))]
        return model.forward_features(images).last_hidden_state


@pytest.mark.parametrize(("store", "most"), [("float32", 0.0), ("float16", 1e-3), ("bfloat16", 8e-3), ("int8", 3e-2)])
@pytest.mark.parametrize("tokens", [False, True])
def test_stored_types_have_the_error_that_the_manifest_gives(
    store: str, most: float, tokens: bool, parts: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    manifest = encode_source(parts / "vision", folder, out, tokens, batch=4, workers=0, store=store)
    expected = outputs(parts / "vision", folder)
    expected = (expected if tokens else expected.mean(1)).flatten(1)
    errors = []
    for (_, row), features in zip(sorted(rows_of(out).items()), expected.numpy(), strict=True):
        stored = np.array(row["features"], {"bfloat16": np.uint16, "int8": np.int8}.get(store, np.float32))
        read = decode(stored, store, row.get("scale", 1.0))
        errors.append(np.linalg.norm(features - read) / np.linalg.norm(features))
        if store != "float32":
            assert abs(row["error"] - errors[-1]) < 1e-4
    if store == "float32":
        assert "error" not in manifest
        assert max(errors) < 1e-5
    else:
        assert 0 < max(errors) < most
        np.testing.assert_allclose(manifest["error"]["largest"], max(errors), atol=1e-4)
        np.testing.assert_allclose(manifest["error"]["mean"], np.mean(errors), atol=1e-4)
    assert manifest["shapes"] == {"features": [16, 32] if tokens else [32]}


def test_values_that_the_stored_type_lacks_are_refused() -> None:
    table = FeatureTable({"": [3]}, "float16", "float32")
    with pytest.raises(NotFiniteError, match=r"features of a\.png are not finite"):
        table.row("a.png", [np.array([1, 2, 7e4], np.float32)])
    for store in ("float32", "bfloat16", "int8"):
        with pytest.raises(NotFiniteError):
            FeatureTable({"": [3]}, store, "float32").row("a.png", [np.array([1, np.nan, 2], np.float32)])
    zeros = FeatureTable({"": [3]}, "int8", "float32").row("a.png", [np.zeros(3, np.float32)])
    assert (zeros.values[0].tolist(), zeros.scales, zeros.errors) == ([0, 0, 0], [0.0], [0.0])


def test_several_layers_are_columns_of_one_pass(parts: Path, folder: Path, tmp_path: Path) -> None:
    depth = read_encoder(parts / "vision")[0].config.num_hidden_layers
    manifest = encode_source(parts / "vision", folder, tmp_path / "out", workers=0, feature_layer=[-1, 1, -2])
    names = [f"features_{depth}", "features_1", f"features_{depth - 1}"]
    assert list(manifest["shapes"]) == names
    rows = sorted(rows_of(tmp_path / "out").items())
    for name, layer in zip(names, (-1, 1, -2), strict=True):
        expected = outputs(parts / "vision", folder, layer).mean(1)
        np.testing.assert_allclose([row[name] for _, row in rows], expected.numpy(), atol=1e-5)
    for layers, message in (([-1, depth], "two are the same"), ([-1, 99], "the encoder has")):
        with pytest.raises((DataError, CheckpointError), match=message):
            encode_source(parts / "vision", folder, tmp_path / "other", workers=0, feature_layer=layers)
    with pytest.raises(DataError, match=r"several layers are several arrays, which \.npy does not hold"):
        encode_source(parts / "vision", folder, tmp_path / "f.npy", workers=0, feature_layer=[-1, 1])
    with pytest.raises(DataError, match=r"stored as int8 need .*which \.npy does not hold"):
        encode_source(parts / "vision", folder, tmp_path / "f.npy", workers=0, store="int8")


def test_the_manifest_describes_every_part(parts: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (folder / "notes.txt").write_text("x")
    report = encode_source(parts / "vision", folder, out, workers=0)
    (folder / "notes.txt").unlink()
    manifest = json.loads((out / "manifest.json").read_text())
    assert report.items() >= manifest.items()
    assert manifest["job"]["encoder"] == "vision"
    assert manifest["job"]["source"] == folder.name
    assert manifest["not_read"]["files"]["first"] == ["notes.txt"]
    found = [part for block in manifest["blocks"] for part in block["parts"]]
    assert sorted(f.name for f in out.iterdir()) == sorted([*(part["file"] for part in found), "manifest.json"])
    assert len(found) > 1
    for part in found:
        file = out / part["file"]
        assert (file_sha256(file), file.stat().st_size) == (part["sha256"], part["bytes"])
        assert pq.read_metadata(file).num_rows == part["rows"]
        assert pq.read_metadata(file).num_row_groups == part["row_groups"]
    assert manifest["schema"] == {"id": "string", "sha256": "string", "features": manifest["schema"]["features"]}
    row = rows_of(out)["03.png"]
    assert row["sha256"] == file_sha256(folder / "03.png")
    assert str(tmp_path) not in (out / "manifest.json").read_text(), "no path of this machine"


def test_a_folder_of_another_job_is_refused_and_not_touched(parts: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encode_source(parts / "vision", folder, out, workers=0)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    other = make_vision(tmp_path / "other", hidden_size=32, intermediate_size=32)
    for options, message in (
        ({"encoder": other}, "differs in encoder, encoder_sha256"),
        ({"tokens": True}, "differs in shapes"),
        ({"store": "int8"}, "differs in store"),
        ({"feature_layer": -1}, "differs in feature_layer"),
        ({"source": tmp_path / "others"}, "differs in source"),
    ):
        shutil.copytree(folder, tmp_path / "others", dirs_exist_ok=True)
        settings: dict[str, Any] = {"encoder": parts / "vision", "source": folder, "workers": 0, **options}
        with pytest.raises(DataError, match=rf"out holds parts of another run, which {message}.*; delete it"):
            encode_source(output=out, **settings)
        assert {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()} == before


def test_a_folder_with_other_files_is_refused(parts: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, content in (("notes.txt", "mine"), ("manifest.json", "{}"), ("train.parquet", "x")):
        out.mkdir()
        (out / name).write_text(content)
        with pytest.raises(OutputError, match=f"{name} is no part of features"):
            encode_source(parts / "vision", folder, out, workers=0)
        assert (out / name).read_text() == content
        shutil.rmtree(out)


def test_a_damaged_part_of_a_folder_is_encoded_again(parts: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = encode_source(parts / "vision", folder, out, batch=2, workers=0)
    part = max((p for b in report["blocks"] for p in b["parts"]), key=lambda p: p["rows"])
    whole = (out / part["file"]).read_bytes()
    content = bytearray(whole)
    content[len(content) // 2] ^= 1
    (out / part["file"]).write_bytes(bytes(content))
    again = encode_source(parts / "vision", folder, out, batch=2, workers=0)
    assert again["resumed_images"] == COUNT - part["rows"]
    assert (out / part["file"]).read_bytes() == whole
    assert again["blocks"] == report["blocks"]


def test_a_block_that_another_process_works_on_is_left_to_it(parts: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    name = next(iter(open_source(str(folder)).blocks())).name
    with lock_output(out / "work" / block_key(name)):
        report = encode_source(parts / "vision", folder, out, workers=0)
        assert len(report["busy_blocks"]) == report["missing_blocks"] == 1
        assert "is working on this output" in report["busy_blocks"][0]
        assert not report["complete"]
    report = encode_source(parts / "vision", folder, out, workers=0)
    assert (report["complete"], report["images"]) == (True, COUNT)


def test_merging_refuses_other_jobs_unfinished_folders_and_damage(parts: Path, folder: Path, tmp_path: Path) -> None:
    shares = [tmp_path / "1", tmp_path / "2"]
    for i, out in enumerate(shares, 1):
        encode_source(parts / "vision", folder, out, workers=0, share=Share(i, 2))
    encode_source(parts / "vision", folder, tmp_path / "half", workers=0, store="float16")
    with pytest.raises(DataError, match=r"half is of another run than .*: store"):
        merge_features([*shares, tmp_path / "half"], tmp_path / "out")
    with pytest.raises(DataError, match=r"nothing holds no manifest\.json"):
        merge_features([*shares, tmp_path / "nothing"], tmp_path / "out")
    manifest = merge_features(shares[:1], tmp_path / "one")
    assert manifest["missing_blocks"] > 0
    assert merge_features(shares, tmp_path / "one")["complete"], "a share that comes late is added"
    part = next(shares[1].glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-3])
    with pytest.raises(DataError, match=f"{part.name} is damaged; run the command"):
        merge_features(shares, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_divides_joins_and_names_mistakes(
    parts: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str | Path) -> str:
        return CliRunner().invoke(app, ["encode", *map(str, arguments)]).output

    options: list[str | Path] = ["--encoder", parts / "vision", "--workers", "0", "--store", "int8"]
    for i in (1, 2):
        assert "blocks are not encoded yet" in run(folder, *options, "--shard", f"{i}/2", "--out", tmp_path / str(i))
    half = CliRunner().invoke(app, ["encode", "--merge", str(tmp_path / "1"), "--out", str(tmp_path / "half")])
    assert half.exit_code == 1
    assert "blocks are not encoded yet" in half.output
    output = run("--merge", tmp_path / "1", tmp_path / "2", "--out", tmp_path / "f.parquet")
    assert f"{COUNT} images of shape (32), 0 left out" in output
    assert "relative L2 error of storing" in output
    assert pq.read_table(tmp_path / "f.parquet").num_rows == COUNT
    for text, message in (("0/2", "give i/n"), ("3/2", "give i/n"), ("1", "give i/n")):
        with pytest.raises(DataError, match=message):
            find_share(text)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DataError, match="cannot be used under a launcher"):
        find_share("1/2")
    with pytest.raises(DataError, match="several processes write to a folder"):
        encode_source(parts / "vision", folder, tmp_path / "g.parquet", share=find_share(None))
    with pytest.raises(DataError, match="stdin reaches one process only"):
        encode_source(parts / "vision", "-", tmp_path / "g", share=find_share(None))


def test_repeated_ids_are_found_in_rounds(
    parts: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_source(parts / "vision", folder, tmp_path / "out", workers=0)
    files = sorted((tmp_path / "out").glob("*.parquet"))
    monkeypatch.setattr("pivot_hub.encoder.feature_file.IDS_AT_ONCE", 5)
    assert repeated_ids(files, COUNT) == []
    assert repeated_ids([*files, files[0]], COUNT) == sorted(pq.read_table(files[0])["id"].to_pylist())


def test_memory_does_not_grow_with_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    monkeypatch.setattr(image_blocks, "BLOCK", 256)
    file = tmp_path / "paths.txt"
    peaks = []
    for count in (10_000, 60_000):
        file.write_text("".join(f"photos/{i:09}.jpg\n" for i in range(count)))
        source = open_source(str(file))
        tracemalloc.start()
        assert sum(1 for block in source.blocks() for _ in block.images()) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0], peaks


@pytest.mark.nightly
def test_memory_does_not_grow_to_a_million_rows(parts: Path, tmp_path: Path) -> None:
    peaks_mb = []
    for count in (50_000, 1_000_000):
        listing = tmp_path / f"{count}.txt"
        with listing.open("w") as file:
            file.writelines(f"photos/{i:09}.jpg\n" for i in range(count))
        command: list[str | Path] = [sys.executable, "-m", "tests.encoder.many_rows"]
        command += [parts / "vision", listing, tmp_path / str(count)]
        printed = subprocess.run(
            command, cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True
        ).stdout
        images, peak_mb = map(int, printed.splitlines()[-1].split())
        assert images == count
        peaks_mb.append(peak_mb)
    assert peaks_mb[1] < peaks_mb[0] + 100, peaks_mb


def read_as_documented(tool: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run the lines of the documentation that read a folder of features with a tool."""
    blocks = (Path(__file__).parents[2] / "docs" / "tutorials" / "million-images.md").read_text().split("```python\n")
    (lines,) = [text for block in blocks if (text := block.partition("```")[0]).startswith(f"import {tool}")]
    exec(lines.replace("duckdb.sql", "found = duckdb.sql"), names)
    return names


@pytest.mark.parametrize("tool", ["datasets", "duckdb", "faiss"])
def test_tools_read_a_folder_of_features_by_the_lines_of_the_documentation(
    tool: str, parts: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(tool, reason=f"{tool} is not installed")
    monkeypatch.chdir(tmp_path)
    encode_source(parts / "vision", folder, "features", workers=0)
    own = rows_of(tmp_path / "features")
    names = read_as_documented(tool, {})
    if tool == "datasets":
        np.testing.assert_array_equal(names["features"], [own[name]["features"] for name in names["rows"]["id"]])
    elif tool == "duckdb":
        (name, similarity), *_ = names["found"].fetchall()
        assert name == "03.png"
        np.testing.assert_allclose(similarity, 1, atol=1e-5)
    else:
        features = np.stack(names["rows"]["features"].to_numpy())
        _, nearest = names["index"].search(features, 1)
        assert nearest[:, 0].tolist() == (features @ features.T).argmax(1).tolist()
