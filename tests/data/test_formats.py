"""Data formats as they are published: archives read in place, images inside Parquet, mixtures."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pivot_hub.config.data_section import OnBadRow
from pivot_hub.config.recipe import load_recipe
from pivot_hub.data import source
from pivot_hub.data.image_store import FileStore, ParquetStore
from pivot_hub.data.index import RowIndex, index_rows
from pivot_hub.data.row import Row, read_records
from pivot_hub.data.sampler import BlockSampler
from pivot_hub.errors import DataError, RecipeError
from pivot_hub.training.sft import PivotSFTTrainer
from pivot_hub.training.stage import run_stage
from tests.data.test_source import Unchecked

CONVERSATION = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
PAIR = {"question": "What?", "chosen": "A dog.", "rejected": "A cat."}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def colour(i: int) -> tuple[int, int, int]:
    return (i * 37 % 256, i * 101 % 256, i * 59 % 256)


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour(i)).save(buffer, "PNG")
    return buffer.getvalue()


def index_of(folder: Path, spec: str, stage: str = "instruct", on_bad_row: OnBadRow = OnBadRow.STOP) -> RowIndex:
    """Write a recipe with one source of data, and index its rows."""
    text = f"stage: {stage}\nmodel: {{vision: v, language: l}}\nlearning_rate: {{projector: 1.0e-3}}\n"
    text = text if stage == "align" else text.replace("model: {vision: v, language: l}", "parent: 1-align.yaml")
    parent = "stage: align\nmodel: {vision: v, language: l}\nlearning_rate: {projector: 1.0e-3}\n"
    (folder / "1-align.yaml").write_text(f"{parent}data: [{{format: shapes, content: captions, rows: 1}}]\n")
    (folder / "recipe.yaml").write_text(f"{text}data: [{spec}]\non_bad_row: {on_bad_row}\n")
    return index_rows(load_recipe(folder / "recipe.yaml"), Unchecked())


def colours_of(index: RowIndex) -> list[tuple[int, int, int]]:
    """Return the colour of each row's image."""
    dataset = index.as_dataset("conversation", "<I>")
    return [dataset[i]["images"][0].getpixel((0, 0)) for i in range(len(dataset))]


def rows_json(folder: Path, names: list[str]) -> None:
    rows = [{"id": str(i), "image": name, "conversations": CONVERSATION} for i, name in enumerate(names)]
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))


@pytest.mark.parametrize("packing", ["zip-deflated", "zip-stored", "tar"])
def test_an_archive_is_read_in_place(tmp_path: Path, packing: str) -> None:
    """LLaVA-Pretrain: one JSON list, and images.zip beside it."""
    names = [f"{i:05d}/{i}.png" for i in range(5)]
    rows_json(tmp_path, names)
    file = tmp_path / f"images.{packing[:3]}"
    if packing == "tar":
        with tarfile.open(file, "w") as tar:
            for i, name in enumerate(names):
                info = tarfile.TarInfo(name)
                info.size = len(png(i))
                tar.addfile(info, io.BytesIO(png(i)))
    else:
        method = zipfile.ZIP_STORED if packing == "zip-stored" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(file, "w", method) as archive:
            for i, name in enumerate(names):
                archive.writestr(name, png(i))
    before = sorted(tmp_path.rglob("*"))
    index = index_of(tmp_path, f"{{format: llava, path: rows.json, images: {file.name}}}", "align")
    assert [row.archive for row in index.rows()] == ["."] * 5
    assert colours_of(index) == [colour(i) for i in range(5)]
    assert not [p for p in tmp_path.rglob("*.png") if p not in before]


def test_archives_replace_the_folders_they_hold(tmp_path: Path) -> None:
    """LLaVA-665K and MMPR: a tree of images in which folders are still packed, with or without their name inside."""
    names = ["coco/train2017/1.png", "gqa/images/2.png", "vg/VG_100K/3.png", "loose/4.png"]
    rows_json(tmp_path, names)
    images = tmp_path / "images"
    for i, name in enumerate(names):
        (images / name).parent.mkdir(parents=True)
        if i == 3:
            (images / name).write_bytes(png(3))
    for archive, inside, i in (("coco/train2017", "1.png", 0), ("gqa/images", "images/2.png", 1), ("vg", names[2], 2)):
        with zipfile.ZipFile(images / f"{archive}.zip", "w") as packed:
            packed.writestr(inside, png(i))
    index = index_of(tmp_path, "{format: llava, path: rows.json, images: images}")
    assert colours_of(index) == [colour(i) for i in range(4)]
    assert [row.archive for row in index.rows()] == ["coco/train2017.zip", "gqa/images.zip", "vg.zip", None]


def test_broken_archives_are_named(tmp_path: Path) -> None:
    rows_json(tmp_path, ["a.png"])
    (tmp_path / "images.zip").write_bytes(b"PK not a zip")
    with pytest.raises(DataError, match="not a whole archive"):
        index_of(tmp_path, "{format: llava, path: rows.json, images: images.zip}")
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b.png", png(0))
    with pytest.raises(DataError, match=r"rows.json:1: image a.png does not exist"):
        index_of(tmp_path, "{format: llava, path: rows.json, images: images.zip}")
    rows_json(tmp_path, ["b.png"])
    store = FileStore(tmp_path / "images.zip")
    located = store.locate(Row("r", "b.png", "", ""))
    assert located.span is not None
    data = bytearray((tmp_path / "images.zip").read_bytes())
    data[located.span[0] + 5 : located.span[0] + 15] = b"\xff" * 10
    (tmp_path / "images.zip").write_bytes(data)
    with pytest.raises(DataError, match=r"fetch it again|cannot be decoded"):
        store.open(located)
    (tmp_path / "images.rar").write_bytes(b"x")
    with pytest.raises(DataError, match=r"neither a folder nor a .zip or .tar"):
        index_of(tmp_path, "{format: llava, path: rows.json, images: images.rar}")


def parquet(file: Path, count: int, first: int = 0, group: int = 4, **more: list[Any]) -> None:
    """Write rows with their images inside, as the datasets library writes them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(first + i), "path": f"{i}.png"} for i in range(count)]
    columns: dict[str, Any] = {"id": [str(i) for i in range(count)], "image": pa.array(images, IMAGE), **more}
    pq.write_table(pa.table(columns), file, row_group_size=group)


def test_subsets_of_a_parquet_dataset_are_mixed_by_weight(tmp_path: Path) -> None:
    """LLaVA-OneVision-Data: a folder of Parquet files for each subset."""
    for name, count, first in (("chart(cauldron)", 10, 0), ("vqa", 6, 100), ("left_out", 3, 200)):
        conversations = [CONVERSATION] * count
        parquet(tmp_path / "data" / name / "train-00000-of-00001.parquet", count, first, conversations=conversations)
    spec = "{format: llava, path: data, subsets: {chart(cauldron): 0.5, vqa: 2}, seed: 1}"
    index = index_of(tmp_path, spec)
    assert index.report.sources[0]["groups"] == {"chart(cauldron)": 5, "vqa": 12}
    colours = colours_of(index)
    assert sorted(colours[-12:]) == sorted([colour(100 + i) for i in range(6)] * 2)
    assert len(set(colours[:5]) & {colour(i) for i in range(10)}) == 5
    rows = list(index.rows())
    assert rows[-1].block == "vqa/train-00000-of-00001.parquet#1"  # its row group
    assert rows[-1].id == "vqa/train-00000-of-00001.parquet:6"
    blocks = index.blocks()
    assert blocks is not None
    assert len(set(blocks.tolist())) == len({row.block for row in rows})
    with pytest.raises(DataError, match=r"nothing: there is no \.json, \.jsonl, \.parquet file in it"):
        index_of(tmp_path, "{format: llava, path: data, subsets: {nothing: 1}}")


def test_a_window_of_rows_reads_each_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory for kept rows is bounded by their number, however large the row groups are."""
    parquet(tmp_path / "rows.parquet", 96, conversations=[CONVERSATION] * 96)
    index = index_of(tmp_path, "{format: llava, path: rows.parquet}")
    store = ParquetStore(tmp_path, kept=32)
    reads: list[tuple[str, int]] = []
    inner = pq.ParquetFile.read_row_group

    def read_row_group(self: Any, group: int, **options: Any) -> Any:
        reads.append(("rows.parquet", group))
        return inner(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)
    rows = list(index.rows())
    blocks = index.blocks()
    assert blocks is not None
    for i in BlockSampler(blocks, seed=0, window=16):
        assert store.open(rows[i]).getpixel((0, 0)) == colour(i)
        assert sum(map(len, store._kept.values())) < 32 + 4
    assert len(reads) == len(set(reads)) == 24


def test_text_alone_has_no_image(tmp_path: Path) -> None:
    images = pa.array([None, {"bytes": png(1), "path": None}], IMAGE)
    text = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    table = pa.table({"id": ["0", "1"], "image": images, "conversations": [text, CONVERSATION]})
    pq.write_table(table, tmp_path / "rows.parquet")
    index = index_of(tmp_path, "{format: llava, path: rows.parquet}")
    assert [row.image for row in index.rows()] == [None, "rows.parquet#1"]
    dataset = index.as_dataset("conversation", "<I>")
    assert [len(dataset[i]["images"]) for i in range(2)] == [0, 1]


def test_rlaif_v_is_parquet_with_preference_pairs(tmp_path: Path) -> None:
    columns: dict[str, Any] = {key: [text] * 3 for key, text in PAIR.items()}
    parquet(tmp_path / "RLAIF-V-Dataset_000.parquet", 3, **columns, ds_name=["x"] * 3)
    index = index_of(tmp_path, "{format: rlaif_v, path: RLAIF-V-Dataset_000.parquet}", "dpo")
    assert [(r.prompt, r.chosen, r.rejected) for r in index.rows()] == [("What?", "A dog.", "A cat.")] * 3


def test_vlfeedback_prompts_lose_vicunas_chat_format(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(0))
    prompt = "A chat between a curious user and an artificial intelligence assistant. USER: <image>\nWhy?\n ASSISTANT:"
    row = {"img_path": "images/a.png", "prompt": prompt, "chosen": "So.", "rejected": "No."}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    index = index_of(tmp_path, "{format: vlfeedback, path: rows.json, images: .}", "dpo")
    assert [(r.prompt, r.image) for r in index.rows()] == [("<image>\nWhy?", "images/a.png")]


def test_a_hub_dataset_of_preference_pairs(tmp_path: Path) -> None:
    """TRL's columns, texts or messages, images as a list."""

    def message(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    messages = (message("user", "Q"), message("assistant", "A"), message("assistant", "B"))
    forms: dict[str, tuple[Any, Any, Any]] = {"text": ("Q", "A", "B"), "messages": messages}
    for name, (prompt, chosen, rejected) in forms.items():
        images = pa.array([[{"bytes": png(3), "path": None}], [{"bytes": png(4), "path": None}] * 2], pa.list_(IMAGE))
        columns = {"images": images, "prompt": [prompt] * 2, "chosen": [chosen] * 2, "rejected": [rejected] * 2}
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        index = index_of(tmp_path, f"{{format: preference, path: {name}.parquet}}", "dpo", OnBadRow.SKIP)
        assert [(r.prompt, r.chosen, r.rejected) for r in index.rows()] == [("Q", "A", "B")]
        assert colours_of(index) == [colour(3)]
        assert "`images` names one image file" in index.report.skipped[0]


def test_images_that_rows_name_need_a_folder(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({**PAIR, "image": "a.png"}))
    with pytest.raises(DataError, match=r"names image a.png; give its folder by `images` in the recipe"):
        index_of(tmp_path, "{format: mmpr, path: rows.jsonl}", "dpo")


def test_a_stage_refuses_rows_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="stage instruct reads shapes or llava, not mmpr"):
        index_of(tmp_path, "{format: mmpr, path: rows.jsonl}")


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_a_json_list_is_read_without_holding_it(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from pivot_hub.data import row

    rows: list[Any] = [{"a": 'x]\\"}' * i, "b": [1, {"c": None}]} for i in range(20)]
    text = json.dumps(rows, indent=2)
    monkeypatch.setattr(row._list_items, "__defaults__", (chunk,))
    for name, content in (("a", text), ("b", json.dumps(rows)), ("c", f"\n {text} \n")):
        (tmp_path / f"{name}.json").write_text(content)
        assert [r for _, r in read_records(tmp_path / f"{name}.json")] == rows
    (tmp_path / "empty.json").write_text("[]")
    assert list(read_records(tmp_path / "empty.json")) == []
    for bad in (text[:-1], text[:40], text + "x", '{"a": 1}', "", "[1 2"):
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(DataError, match=r"give a \.json list or a \.jsonl file"):
            assert not [r for _, r in read_records(tmp_path / "bad.json") if isinstance(r, str)]


def test_a_stopped_run_on_parquet_resumes_at_the_exact_row(
    own_recipes: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stops in the second epoch, whose order differs; no row is seen twice or missed."""
    conversations = [CONVERSATION] * 12
    parquet(own_recipes / "data" / "one" / "train.parquet", 12, 0, conversations=conversations)
    parquet(own_recipes / "data" / "two" / "train.parquet", 12, 50, conversations=conversations)
    path = own_recipes / "2-instruct.yaml"
    text = path.read_text()
    line = next(part for part in text.splitlines() if part.startswith("data:"))
    path.write_text(text.replace(line, "data: [{format: llava, path: data, subsets: {one: 1, two: 2}}]"))
    batches: list[list[int]] = []
    inner, stop = PivotSFTTrainer.compute_loss, [0]

    def compute_loss(self: PivotSFTTrainer, model: Any, inputs: dict[str, Any], *args: Any, **more: Any) -> Any:
        if self.state.global_step == stop[0] > 0:
            raise KeyboardInterrupt
        batches.append(list(inputs["row"]))
        return inner(self, model, inputs, *args, **more)

    monkeypatch.setattr(PivotSFTTrainer, "compute_loss", compute_loss)
    loaded = load_recipe(path, ["args.num_train_epochs=2", "args.save_steps=5", "args.per_device_train_batch_size=4"])
    whole = run_stage(loaded, trained.parent, tmp_path / "whole", log=lambda line: None)
    straight = list(batches)
    batches.clear()
    assert len(straight) == 18
    stop[0] = 13
    with pytest.raises(KeyboardInterrupt):
        run_stage(loaded, trained.parent, tmp_path / "cut", log=lambda line: None)
    stop[0] = 0
    cut = run_stage(loaded, trained.parent, tmp_path / "cut", log=lambda line: None)
    assert batches == straight[:13] + straight[10:]
    for epoch in (straight[:9], straight[9:]):
        assert sorted(row for batch in epoch for row in batch) == sorted([*range(12), *range(12, 24), *range(12, 24)])
    assert straight[:9] != straight[9:]
    hashes = [json.loads((f / "provenance.json").read_text())["weights_sha256"] for f in (whole, cut)]
    assert hashes[0] == hashes[1]


def test_missing_data_is_fetched_from_the_hub_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The named subsets of a dataset are fetched, or single files of a dataset."""
    hub = tmp_path / "hub" / "snapshots" / "abc123"
    parquet(hub / "vqa" / "train.parquet", 2, conversations=[CONVERSATION] * 2)
    rows_json(hub, ["a.png"])
    with zipfile.ZipFile(hub / "images.zip", "w") as archive:
        archive.writestr("a.png", png(7))
    requests: list[Any] = []

    def snapshot(repo: str, *, repo_type: str, revision: str | None, allow_patterns: list[str] | None) -> str:
        requests.append((repo, repo_type, revision, allow_patterns))
        return str(hub)

    def file(repo: str, name: str, *, repo_type: str, revision: str | None) -> str:
        requests.append((repo, repo_type, revision, name))
        return str(hub / name)

    monkeypatch.setattr(source, "snapshot_download", snapshot)
    monkeypatch.setattr(source, "hf_hub_download", file)
    index = index_of(tmp_path, "{format: llava, path: lab/Mix, revision: abc123, subsets: {vqa: 1}}")
    assert colours_of(index) == [colour(0), colour(1)]
    assert index.report.sources[0]["hub_commit"] == "abc123"
    spec = "{format: llava, path: lab/Pre/rows.json, images: lab/Pre/images.zip, revision: abc}"
    assert colours_of(index_of(tmp_path, spec)) == [colour(7)]
    assert requests == [
        ("lab/Mix", "dataset", "abc123", ["vqa/*"]),
        ("lab/Pre", "dataset", "abc", "rows.json"),
        ("lab/Pre", "dataset", "abc", "images.zip"),
    ]
