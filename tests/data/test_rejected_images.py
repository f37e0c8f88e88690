"""Rows with a rejected image: read from every kind of file, checked, and left out where no loss reads it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from pivot_hub.config.recipe import LoadedRecipe, load_recipe
from pivot_hub.errors import DataError, RecipeError
from pivot_hub.training.row_check import check_data, columns_of
from tests.conftest import make_language
from tests.encoder.originals import make_vision

PAIR = {"question": "What?", "chosen": "A star.", "rejected": "A ring."}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_vision(folder / "vision", "clip")
    make_language(folder / "language")
    return folder


def colours(folder: Path, *names: str) -> list[Image.Image]:
    """Write images of one colour, the position of their name."""
    made = [Image.new("RGB", (20, 30), (40 * i, 0, 0)) for i in range(len(names))]
    for image, name in zip(made, names, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
    return made


def recipe_of(parts: Path, folder: Path, data: str, loss: str = "image_sigmoid", extra: str = "") -> LoadedRecipe:
    model = f"{{vision: {parts / 'vision'}, language: {parts / 'language'}}}"
    (folder / "0.yaml").write_text(
        f"stage: align\nmodel: {model}\nlearning_rate: {{projector: 1.0e-3}}\n"
        "data: [{format: shapes, content: captions, rows: 1}]\n"
    )
    (folder / "1.yaml").write_text(
        f"stage: dpo\nparent: 0.yaml\nlearning_rate: {{vision: 1.0e-6}}\ndata: [{data}]\n"
        f"args: {{loss_type: {loss}}}\n{extra}"
    )
    return load_recipe(folder / "1.yaml")


def red(image: Image.Image) -> int:
    value = image.getpixel((0, 0))
    assert isinstance(value, tuple)
    return int(value[0])


def shown(loaded: LoadedRecipe, folder: Path) -> list[tuple[int, int]]:
    """The red of image and rejected image of each row, as training reads them."""
    rows = check_data(loaded, folder=folder / "kept", workers=1)
    dataset = rows.as_dataset(columns_of(loaded.recipe), "<image>")
    return [(red(row["images"][0]), red(row["rejected_images"][0])) for row in dataset]


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps({**PAIR, **row}) + "\n" for row in rows))
    return "{format: mmpr, path: rows.jsonl, images: images}"


def test_images_in_folders_and_archives(parts: Path, tmp_path: Path) -> None:
    colours(tmp_path / "images", "a.png", "b.png", "packed/c.png", "packed/d.png")
    with zipfile.ZipFile(tmp_path / "images/packed.zip", "w") as archive:
        for name in ("c.png", "d.png"):
            archive.write(tmp_path / "images/packed" / name, name)
            (tmp_path / "images/packed" / name).unlink()
    (tmp_path / "images/packed").rmdir()
    pairs = [("a.png", "b.png"), ("packed/c.png", "a.png"), ("b.png", "packed/d.png"), ("packed/d.png", "packed/c.png")]
    data = write(tmp_path, [{"image": i, "rejected_image": j} for i, j in pairs])
    loaded = recipe_of(parts, tmp_path, data)
    assert shown(loaded, tmp_path) == [(0, 40), (80, 0), (40, 120), (120, 80)]
    with zipfile.ZipFile(tmp_path / "images/packed.zip", "a") as archive:
        archive.writestr("more.txt", "the archive has changed, and its rows point elsewhere")
    assert shown(loaded, tmp_path) == [(0, 40), (80, 0), (40, 120), (120, 80)]


def test_images_inside_parquet(parts: Path, tmp_path: Path) -> None:
    images = colours(tmp_path / "images", "a.png", "b.png", "c.png")
    columns = {
        "images": [[images[0]], [images[1]]],
        "prompt": ["What?", "What?"],
        "chosen": ["A star.", "A ring."],
        "rejected": ["A ring.", "A star."],
        "rejected_images": [[images[2]], [images[0]]],
    }
    features = datasets.Features(
        {
            name: [datasets.Image()] if "images" in name else datasets.Value("string")  # TRL's columns
            for name in columns
        }
    )
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "rows.parquet")
    loaded = recipe_of(parts, tmp_path, "{format: preference, path: rows.parquet}")
    assert shown(loaded, tmp_path) == [(0, 80), (40, 0)]


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "no `rejected_image` or `rejected_images`"),
    ({"rejected_image": "a.png"}, "image and rejected image are the same"),
    (
        {"rejected_image": "again.png"},
        "image and rejected image are the same; give one that the answer does not describe",
    ),
    ({"rejected_image": "none.png"}, "none.png does not exist"),
    ({"rejected_image": "broken.png"}, "cannot be decoded"),
    ({"rejected_image": "../a.png"}, "leaves the images folder"),
    ({"rejected_image": ["a.png", "b.png"]}, "`rejected_image` names one image file"),
    ({"image": None, "rejected_image": "b.png"}, "it has no image, but the loss compares two images"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_rejected_image_is_named(row: dict[str, Any], reason: str, parts: Path, tmp_path: Path) -> None:
    colours(tmp_path / "images", "a.png", "b.png")
    Image.open(tmp_path / "images/a.png").save(tmp_path / "images/again.png", compress_level=1)
    (tmp_path / "images/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    data = write(tmp_path, [{"image": "a.png", "rejected_image": "b.png"}, {"image": "a.png", **row}])
    with pytest.raises(DataError, match=reason):
        check_data(recipe_of(parts, tmp_path, data), folder=tmp_path / "kept", workers=1)
    loaded = recipe_of(parts, tmp_path, data, extra="on_bad_row: skip\n")
    rows = check_data(loaded, folder=tmp_path / "kept", workers=1)
    assert (rows.report.rows, rows.report.skipped_rows) == (1, 1)


def test_a_text_loss_leaves_rejected_images_out(parts: Path, tmp_path: Path) -> None:
    """A row whose rejected image is missing is a good row of text."""
    colours(tmp_path / "images", "a.png")
    data = write(tmp_path, [{"image": "a.png", "rejected_image": "none.png"}])
    rows = check_data(recipe_of(parts, tmp_path, data, "sigmoid"), folder=tmp_path / "kept", workers=1)
    (row,) = rows.as_dataset("preference", "<image>")
    assert "rejected_images" not in row


def test_scenes_that_differ_in_one_thing(parts: Path, tmp_path: Path) -> None:
    data = "{format: shapes, content: pairs, counterfactual: true, rows: 20}"
    loaded = recipe_of(parts, tmp_path, data, "[sigmoid, image_symmetric]")
    rows = check_data(loaded, folder=tmp_path / "kept", workers=1)
    for row in rows.as_dataset(columns_of(loaded.recipe), "<image>"):
        first, second = (np.asarray(row[key][0], np.int32) for key in ("images", "rejected_images"))
        assert 0 < (first != second).any(-1).mean() < 0.4
    with pytest.raises(
        RecipeError, match="compares two images; set `counterfactual: true` in the source of format shapes"
    ):
        check_data(recipe_of(parts, tmp_path, "{format: shapes, content: pairs, rows: 20}"), folder=tmp_path / "kept")
    with pytest.raises(RecipeError, match="`counterfactual` is for content: pairs, without slip"):
        recipe_of(parts, tmp_path, "{format: shapes, content: pairs, slip: fact, counterfactual: true, rows: 20}")
