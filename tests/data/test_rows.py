"""Rows that real files hold: each that cannot be used is named and counted, and none loses its image."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pivot_hub.config.data_section import OnBadRow
from pivot_hub.data.mmpr_meta import read_meta
from pivot_hub.data.row import image_name, read_records
from pivot_hub.errors import DataError
from tests.data.test_formats import CONVERSATION, IMAGE, PAIR, colour, index_of, png

PHOTO = base64.b64encode(png(0) * 400).decode()
ROW = {**PAIR, "image": "a.png"}
MMPR = "{format: mmpr, path: rows.jsonl, images: .}"


def pairs(folder: Path, *rows: Any) -> None:
    """Write rows, and the image a.png that they may name; a row of bytes is written as it is."""
    (folder / "a.png").write_bytes(png(0))
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")


BAD_ROWS: list[tuple[Any, str]] = [
    ({**ROW, "image": f"data:image/png;base64,{PHOTO}"}, "holds an image"),
    ({**ROW, "image": PHOTO}, "holds an image"),
    ({**ROW, "image": {"bytes": PHOTO}}, "names one image file, not {"),
    ({**ROW, "image": [PHOTO, PHOTO]}, "names one image file, not ["),
    ({**ROW, "image": "a/" * 2000 + "\0"}, "leaves the images folder"),
    ({**ROW, "image": "C:\\a.png"}, "leaves the images folder"),
    ({**ROW, "chosen": "half \ud83d"}, "which is no character"),
    (json.dumps(ROW, ensure_ascii=False).replace("What?", "Où?").encode("latin-1"), "is not UTF-8"),
    (b'{"question": ' + b"[" * 100_000, "not JSON"),
    (b'{"question": ' + b"9" * 5_000 + b"}", "not JSON"),
    (json.dumps(PHOTO).encode(), "a row is an object"),
    ({"question": "<image>\nWhat?", "chosen": "A", "rejected": "B"}, "its text shows an image by <image>"),
    ({**PAIR, "images": ["a.png"]}, "has an image as `images`, but format mmpr reads `image`; rename it"),
    ({**PAIR, "img_path": "a.png"}, "has an image as `img_path`"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=[m for _, m in BAD_ROWS])
def test_a_bad_row_is_named_shortened_and_skipped_where_the_recipe_says_so(
    tmp_path: Path, row: Any, message: str
) -> None:
    """W4, W5, N10."""
    pairs(tmp_path, ROW, row, ROW)
    with pytest.raises(DataError, match=r"rows.jsonl:2: .*on_bad_row: skip") as caught:
        index_of(tmp_path, MMPR, "dpo")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600
    str(caught.value).encode()
    report = index_of(tmp_path, MMPR, "dpo", OnBadRow.SKIP).report
    assert (report.rows, report.skipped_rows) == (2, 1)
    assert len(json.dumps(report.to_dict())) < 2000


def test_a_byte_order_mark_loses_no_row_and_utf16_is_one_error(tmp_path: Path) -> None:
    pairs(tmp_path, ROW, ROW)
    text = (tmp_path / "rows.jsonl").read_text()
    listed = json.dumps([ROW, ROW])
    for name, content in (("rows.jsonl", text), ("rows.json", listed)):
        file = tmp_path / name
        file.write_text(content, encoding="utf-8-sig")
        assert [record for _, record in read_records(file)] == [ROW, ROW]
        for encoding in ("utf-16", "utf-16-be", "utf-32"):
            file.write_text(content, encoding=encoding)
            with pytest.raises(DataError, match=rf"{name}: is UTF-.*, not UTF-8; convert it, for example by `iconv"):
                list(read_records(file))
    for end in ("[" * 100_000, "9" * 5_000 + "]"):
        (tmp_path / "rows.json").write_text(listed[:-1] + "," + end)
        with pytest.raises(DataError, match=r"rows.json: row 3 is not JSON that can be read"):
            list(read_records(tmp_path / "rows.json"))


def test_a_source_with_images_of_which_no_row_names_one_is_refused(tmp_path: Path) -> None:
    """N10: also where bad rows are skipped."""
    pairs(tmp_path, {**PAIR, "figure": "a.png"}, PAIR)
    with pytest.raises(DataError, match=r"no row names an image.*reads `image`.*have chosen, figure, question, rej"):
        index_of(tmp_path, MMPR, "dpo", OnBadRow.SKIP)
    index_of(tmp_path, MMPR.replace(", images: .", ""), "dpo")
    pairs(tmp_path, PAIR, ROW)  # text alone beside images
    assert [row.image for row in index_of(tmp_path, MMPR, "dpo").rows()] == [None, "a.png"]


def test_images_of_a_parquet_file_are_read_from_the_column_of_the_row(tmp_path: Path) -> None:
    """N10: an image in a column that is not read is a bad row, and of two columns the named one is read."""
    texts = {key: [text] * 2 for key, text in PAIR.items()}
    first, second = ([{"bytes": png(i + k), "path": None} for i in range(2)] for k in (0, 50))
    pq.write_table(pa.table({**texts, "images": pa.array(first, IMAGE)}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet:1: has an image as `images`, but format rlaif_v reads `image`"):
        index_of(tmp_path, "{format: rlaif_v, path: a.parquet}", "dpo")
    columns = {**texts, "thumbnail": pa.array(first, IMAGE), "image": pa.array(second, IMAGE)}
    pq.write_table(pa.table(columns), tmp_path / "b.parquet")
    index = index_of(tmp_path, "{format: rlaif_v, path: b.parquet}", "dpo")
    dataset = index.as_dataset("preference", "<I>")
    assert [dataset[i]["images"][0].getpixel((0, 0)) for i in range(2)] == [colour(50), colour(51)]


def test_text_in_a_parquet_file_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    answers = pa.array([b"yes", "où".encode("latin-1"), b"no"], pa.binary()).view(pa.string())
    table = {"question": ["What?"] * 3, "chosen": answers, "rejected": ["never"] * 3}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    index = index_of(tmp_path, "{format: rlaif_v, path: a.parquet}", "dpo", OnBadRow.SKIP)
    assert [row.chosen for row in index.rows()] == ["yes", "no"]
    assert index.report.skipped[0].startswith("a.parquet:2: not UTF-8 (")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4:40] = b"\xff" * 36
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a.parquet: not a whole Parquet file"):
        index_of(tmp_path, "{format: rlaif_v, path: a.parquet}", "dpo")


def test_an_empty_list_of_images_does_not_hide_an_image() -> None:
    assert image_name({"images": [], "image": "a.png"}, "row", "images", "image") == "a.png"


def test_messages_shorten_the_content_of_messages(tmp_path: Path) -> None:
    """W5: a turn whose content or role is an image."""
    for turn in ({"from": "human", "value": {"image": PHOTO}}, {"from": PHOTO, "value": "x"}, {"from": [PHOTO]}):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"conversations": [turn]}))
        with pytest.raises(DataError, match=r"rows.jsonl:1: a turn needs `from`") as caught:
            index_of(tmp_path, "{format: llava, path: rows.jsonl}")
        assert len(str(caught.value)) < 400


def test_one_source_without_a_usable_row_is_named(tmp_path: Path) -> None:
    """Beside a source that has rows, where bad rows are skipped."""
    pairs(tmp_path, {**PAIR, "image": "gone.png"})
    (tmp_path / "good.jsonl").write_text(json.dumps(ROW))
    (tmp_path / "empty.jsonl").write_text("")
    good = "{format: mmpr, path: good.jsonl, images: .}"
    with pytest.raises(DataError, match=r"data 1 \(rows.jsonl\): no usable row is left: rows.jsonl:1: .*gone.png"):
        index_of(tmp_path, f"{good}, {MMPR}", "dpo", OnBadRow.SKIP)
    with pytest.raises(DataError, match=r"data 0 \(empty.jsonl\): no usable row is left: it has no row"):
        index_of(tmp_path, "{format: mmpr, path: empty.jsonl}, " + good, "dpo", OnBadRow.SKIP)


def test_subsets_that_leave_no_row_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data" / "one").mkdir(parents=True)
    (tmp_path / "data" / "one" / "rows.jsonl").write_text(json.dumps(PAIR))
    with pytest.raises(DataError, match=r"data 0 \(data\): `subsets` and `sample` leave no row"):
        index_of(tmp_path, "{format: mmpr, path: data, subsets: {one: 0.1}}", "dpo")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": {"root": "x", "annotation": "y"}, "a": {"root": "z", "annotation": "y"}}', "'a' is given twice"),
        ('{"a": ' + "[" * 100_000, "not JSON"),
        ('{"caf\\udce9": {"root": "x", "annotation": "y"}}', "half of a surrogate pair"),
    ],
    ids=["twice", "deep", "surrogate"],
)
def test_meta_files_lose_no_source(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_meta(tmp_path / "meta.json")


def test_names_of_annotation_files_are_utf8(tmp_path: Path) -> None:
    """W8."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "caf\udce9.jsonl").write_text(json.dumps({"conversations": CONVERSATION}))
    with pytest.raises(DataError, match=r"the file name caf.*jsonl is not UTF-8"):
        index_of(tmp_path, "{format: llava, path: data}")


def test_a_corrupt_tiff_among_photos_is_one_bad_row(tmp_path: Path) -> None:
    """L12."""
    pairs(tmp_path, ROW, {**ROW, "image": "wrong.tif"})
    Image.new("RGB", (8, 8)).save(tmp_path / "wrong.tif")
    content = bytearray((tmp_path / "wrong.tif").read_bytes())
    content[72] = 2
    (tmp_path / "wrong.tif").write_bytes(content)
    index = index_of(tmp_path, MMPR, "dpo", OnBadRow.SKIP)
    assert index.report.rows == 1
    assert "rows.jsonl:2: image" in index.report.skipped[0]
    assert "wrong.tif cannot be decoded" in index.report.skipped[0]
