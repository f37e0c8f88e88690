"""Annotation files: published formats, and the kinds of rows that real files hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pivot_hub.config.data_section import OnBadRow, ShapesData
from pivot_hub.config.recipe import LoadedRecipe, load_recipe
from pivot_hub.data.boxes_and_masks import read_annotated_images
from pivot_hub.data.image import open_image
from pivot_hub.data.index import index_rows
from pivot_hub.data.llava import parse_conversation
from pivot_hub.data.report import CheckResult
from pivot_hub.data.row import ImageSize, Row
from pivot_hub.data.source import ShapesSource, example, sources_of
from pivot_hub.data.synthetic import DESCRIBE, KINDS, draw_counterfactual
from pivot_hub.errors import DataError, RecipeError


class Unchecked:
    """A check that finds nothing wrong."""

    reads_rejected_images = True

    def to_dict(self) -> dict[str, Any]:
        return {}

    def __call__(self, rows: Sequence[Row], *sizes: Sequence[ImageSize | None]) -> list[CheckResult]:
        return [CheckResult()] * len(rows)


MODES = ("RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16")


def _images(folder: Path) -> Path:
    folder.mkdir()
    for mode in MODES:
        image = Image.effect_noise((24, 20), 60)
        image = image.convert("RGB").convert(mode) if mode != "I;16" else image.convert("I;16")
        image.save(folder / f"{mode.replace(';', '')}.{'jpg' if mode == 'CMYK' else 'png'}")
    (folder / "corrupt.jpg").write_bytes(b"\xff\xd8\xff\xe0not an image")
    return folder


GOOD = [
    {
        "image": f"{m.replace(';', '')}.{'jpg' if m == 'CMYK' else 'png'}",
        "question": "<image>\nWhat?",
        "chosen": "A",
        "rejected": "B",
    }
    for m in MODES
]
BAD: list[tuple[Any, str]] = [
    ({"image": "missing.png", "question": "?", "chosen": "A", "rejected": "B"}, "does not exist"),
    ({"image": "corrupt.jpg", "question": "?", "chosen": "A", "rejected": "B"}, "cannot be decoded"),
    ({"image": "RGB.png", "question": "?", "chosen": " ", "rejected": "B"}, "the answer is empty"),
    ({"image": "RGB.png", "question": "?", "chosen": "A", "rejected": ""}, "rejected answer is missing or empty"),
    ({"image": "RGB.png", "question": "?", "chosen": "A", "rejected": "A "}, "chosen and rejected are the same"),
    ({"image": "RGB.png", "question": "?", "chosen": "A"}, "`rejected` is missing or not text"),
    ({"image": ["RGB.png", "L.png"], "question": "?", "chosen": "A", "rejected": "B"}, "one image"),
    ({"image": "../../etc/passwd", "question": "?", "chosen": "A", "rejected": "B"}, "leaves the images folder"),
    ("[1, 2]", "a row is an object"),
    ('{"image": ', "not JSON"),
]


def _recipe(own_recipes: Path, rows: list[Any], on_bad_row: OnBadRow = OnBadRow.STOP) -> Path:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
    (own_recipes / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    path = own_recipes / "3-dpo.yaml"
    text = path.read_text()
    data = next(line for line in text.splitlines() if line.startswith("data:"))
    new = "data: [{format: mmpr, path: pairs.jsonl, images: images}]"
    path.write_text(text.replace(data, f"{new}\non_bad_row: {on_bad_row}"))
    return path


@pytest.mark.parametrize(("row", "message_part"), BAD, ids=[s for _, s in BAD])
def test_a_bad_row_stops_the_run_naming_file_and_row(
    own_recipes: Path, trained: Path, tmp_path: Path, row: Any, message_part: str
) -> None:
    from pivot_hub.training.stage import run_stage

    _images(own_recipes / "images")
    loaded = load_recipe(_recipe(own_recipes, [GOOD[0], row]))
    with pytest.raises(DataError) as caught:
        run_stage(loaded, trained.parent, tmp_path / "out", log=lambda line: None)
    message = str(caught.value)
    assert message.startswith("pairs.jsonl:2")
    assert message_part in message
    assert "on_bad_row: skip" in message
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_bad_rows_are_skipped_and_counted_where_the_recipe_says_so(
    own_recipes: Path, trained: Path, tmp_path: Path
) -> None:
    from pivot_hub.training.stage import run_stage

    _images(own_recipes / "images")
    loaded = load_recipe(_recipe(own_recipes, [*GOOD, *(r for r, _ in BAD)], OnBadRow.SKIP))
    lines: list[str] = []
    folder = run_stage(loaded, trained.parent, tmp_path / "out", log=lines.append)
    data = json.loads((folder / "report.json").read_text())["data"]
    assert data["rows"] == len(MODES)
    assert data["skipped_rows"] == len(BAD)
    assert set(data["image_modes"]) >= {"L", "P", "RGBA", "RGB", "CMYK"}
    assert any(f"{len(BAD)} rows skipped" in line for line in lines)


def test_no_usable_row_is_an_error(own_recipes: Path) -> None:
    _images(own_recipes / "images")
    loaded = load_recipe(_recipe(own_recipes, [BAD[0][0]], OnBadRow.SKIP))
    with pytest.raises(DataError, match=r"no usable row is left: pairs.jsonl:1: image missing.png does not exist"):
        index_rows(loaded, Unchecked())


def test_a_misspelt_policy_for_bad_rows_is_refused(tmp_path: Path) -> None:
    assert OnBadRow.parse("skip") is OnBadRow.parse(OnBadRow.SKIP) is OnBadRow.SKIP
    with pytest.raises(DataError, match="on_bad_row is 'ignore'; give stop or skip"):
        OnBadRow.parse("ignore")
    with pytest.raises(DataError, match="on_bad_row is 'Skip'; give stop or skip"):
        read_annotated_images(tmp_path, on_bad_row="Skip")


def test_missing_files_are_named(own_recipes: Path) -> None:
    loaded = load_recipe(_recipe(own_recipes, GOOD))
    with pytest.raises(DataError, match=r"data images images does not exist; give it relative to the recipe"):
        index_rows(loaded, Unchecked())
    loaded = load_recipe(loaded.path, ["data.0.path=nobody/dataset", "data.0.images=null"])
    with pytest.raises(DataError, match=r"nobody/dataset does not exist, and no such dataset could be fetched"):
        index_rows(loaded, Unchecked())


def test_a_sample_is_seeded_and_keeps_file_order(own_recipes: Path) -> None:
    _images(own_recipes / "images")
    path = _recipe(own_recipes, GOOD)
    samples = []
    for seed in (0, 0, 1):
        loaded = load_recipe(path, ["data.0.sample=3", f"data.0.seed={seed}"])
        samples.append([row.id for row in index_rows(loaded, Unchecked()).rows()])
    assert samples[0] == samples[1] != samples[2]
    assert samples[0] == sorted(samples[0], key=lambda name: int(name.split(":")[1]))


def test_transparency_shows_white_and_grey_becomes_colour(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (4, 4), 77).save(tmp_path / "grey.png")
    assert open_image(tmp_path / "clear.png", "row").getpixel((0, 0)) == (255, 255, 255)
    assert open_image(tmp_path / "grey.png", "row").getpixel((0, 0)) == (77, 77, 77)


def test_a_conversation_is_one_row_with_all_its_answers() -> None:
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A dog."},
        {"from": "human", "value": "What colour?"},
        {"from": "gpt", "value": "Brown."},
        {"from": "human", "value": "And?"},
    ]
    row = parse_conversation("a:1", {"id": "1", "image": "a.jpg", "conversations": turns})
    earlier = (("user", "<image>\nWhat is it?"), ("assistant", "A dog."))
    assert row == Row("a:1", "a.jpg", "What colour?", "Brown.", earlier=earlier)
    columns = example([], row, "conversation", "<I>")
    assert [part["type"] for turn in columns["messages"] for part in turn["content"]] == ["image", *["text"] * 4]


@pytest.mark.parametrize(
    ("row", "message_part"),
    [
        ({"image": "a.jpg"}, "`conversations` is missing"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "a turn needs `from`"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "a human turn and then a gpt turn"),
    ],
)
def test_conversations_that_do_not_fit_are_named(row: dict[str, Any], message_part: str) -> None:
    error = parse_conversation("a.jsonl:1", row)
    assert isinstance(error, DataError)
    assert message_part in str(error)


def test_the_image_comes_before_its_question() -> None:
    """As in LLaVA's code: a tag elsewhere is moved to the front, and only then is the question stripped."""

    def content_of(prompt: str, image: str | None = "a.jpg") -> list[dict[str, str]]:
        message: dict[str, Any] = example([], Row("1", image, prompt, "A"), "preference", "<I>")["prompt"][0]
        content: list[dict[str, str]] = message["content"]
        return content

    assert content_of("What? <image>") == [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert content_of("What?") == [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert content_of("<image>\n What? \n") == [{"type": "image"}, {"type": "text", "text": " What? \n"}]
    assert content_of("Hello", None) == [{"type": "text", "text": "Hello"}]


def test_dataset_renders_images_only_when_read(recipes: Path) -> None:
    rows = index_rows(load_recipe(recipes / "3-dpo.yaml"), Unchecked())
    dataset = rows.as_dataset("preference", "<I>")
    first, again = dataset[0], dataset[0]
    assert set(first) == {"images", "prompt", "chosen", "rejected", "row"}
    assert first["images"][0].tobytes() == again["images"][0].tobytes()
    assert first["images"][0].size == (32, 32)
    assert rows.ids([first["row"]]) == ["train/0"]


def _meta(folder: Path, sizes: dict[str, int], **changes: Any) -> Path:
    """Write a folder as MMPR-v1.2 is published: images and annotations by source, a meta file with a trailing comma."""
    entries = []
    for name, count in sizes.items():
        images, annotation = folder / "MMPR" / "images" / name, folder / "MMPR" / "annotations" / f"{name}.jsonl"
        images.mkdir(parents=True)
        annotation.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(images / "a.png")
        row = {"image": "a.png", "question": "What?", "rejected": "no"}
        annotation.write_text("".join(json.dumps({**row, "chosen": f"{name} {i}"}) + "\n" for i in range(count)))
        metadata = {"root": f"MMPR/images/{name}", "annotation": f"MMPR/annotations/{name}.jsonl", "length": count}
        entries.append(f'"{name}": {json.dumps({**metadata, "data_augment": False, "repeat_time": 1, **changes})}')
    meta = folder / "MMPR" / "meta.json"
    meta.write_text("{\n" + ",\n".join(entries) + ",\n}")
    return meta


def test_a_meta_file_names_many_sources(own_recipes: Path) -> None:
    _meta(own_recipes, {"m3cot": 60, "docvqa": 30, "small": 10})
    path = own_recipes / "3-dpo.yaml"
    text = path.read_text()
    data = next(line for line in text.splitlines() if line.startswith("data:"))
    spec = "data: [{format: mmpr, path: MMPR/meta.json, images: ., sample: 25, seed: 3}]"
    path.write_text(text.replace(data, spec))
    index = index_rows(load_recipe(path), Unchecked())
    taken = list(index.rows())
    listing = index.report.sources[0]
    groups = listing["groups"]
    assert sum(groups.values()) == listing["rows"] == index.report.rows == len(taken) == 25
    assert groups == {"m3cot": 15, "docvqa": 8, "small": 2} or groups == {"m3cot": 15, "docvqa": 7, "small": 3}
    assert taken[0].image == "MMPR/images/m3cot/a.png"
    assert taken[0].id.startswith("m3cot/m3cot.jsonl:")
    again = index_rows(load_recipe(path), Unchecked(), fresh=True)
    assert list(again.rows()) == taken
    assert again.report.sources == index.report.sources
    other = index_rows(load_recipe(path, ["data.0.seed=4"]), Unchecked())
    assert other.report.sources[0]["ids_sha256"] != listing["ids_sha256"]


def _meta_recipe(folder: Path, meta: Path, more: str = "") -> LoadedRecipe:
    """Write a recipe whose data is a meta file, and load it."""
    text = "stage: dpo\nparent: 2-instruct.yaml\nlearning_rate: {language: 1.0e-3}\n"
    (folder / "meta.yaml").write_text(f"{text}data: [{{format: mmpr, path: {meta}, images: {folder}{more}}}]\n")
    return load_recipe(folder / "meta.yaml")


def test_a_meta_files_rows_repeat_and_are_counted(own_recipes: Path) -> None:
    meta = _meta(own_recipes, {"one": 2}, repeat_time=3)
    index = index_rows(_meta_recipe(own_recipes, meta), Unchecked())
    assert [row.id for row in index.rows()] == [f"one/one.jsonl:{i}" for i in (1, 1, 1, 2, 2, 2)]
    meta.write_text(meta.read_text().replace('"length": 2', '"length": 529'))
    with pytest.raises(DataError, match="2 rows where the meta file says 529: download it again"):
        index_rows(_meta_recipe(own_recipes, meta), Unchecked())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotation": "MMPR/annotations/none.jsonl"}, "none.jsonl does not exist; `images` is the folder"),
        ({"annotation": 3}, "a source has `root` and `annotation`"),
        ({"root": "../elsewhere"}, "is outside the data folder"),
        ({"repeat_time": 0.5}, "repeat_time is 0.5; give a whole number"),
    ],
)
def test_a_wrong_meta_file_is_refused(changes: dict[str, Any], message: str, own_recipes: Path) -> None:
    meta = _meta(own_recipes, {"one": 2}, **changes)
    with pytest.raises(DataError, match=message):
        index_rows(_meta_recipe(own_recipes, meta), Unchecked())


def shapes(**keys: Any) -> list[Row]:
    source = ShapesSource(ShapesData(format="shapes", **keys))
    return [row for row in source.rows() if isinstance(row, Row)]


def test_forms_are_those_that_the_source_names() -> None:
    both = shapes(content="pairs", rows=10)
    for form, is_description in (("describe", True), ("question", False)):
        rows = shapes(content="pairs", rows=10, forms=[form])
        assert {row.prompt == DESCRIBE for row in rows} == {is_description}
    assert len([row for row in both if row.prompt == DESCRIBE]) == 5


@pytest.mark.parametrize("content", ["captions", "instruct", "pairs", "questions"])
def test_wrong_images_are_those_of_other_rows(content: str) -> None:
    right, wrong = (shapes(content=content, rows=4, start=7, wrong_images=w) for w in (None, True))
    assert [row.image for row in right] == ["train/7", "train/8", "train/9", "train/10"]
    assert [row.image for row in wrong] == ["train/8", "train/9", "train/10", "train/7"]
    assert [replace(row, image=None) for row in right] == [replace(row, image=None) for row in wrong]


def test_a_counterfactual_row_shows_the_scene_that_its_chosen_answer_is_right_for() -> None:
    source = ShapesSource(ShapesData(format="shapes", content="pairs", rows=10, counterfactual=True))
    for i, row in enumerate(source.rows()):
        assert isinstance(row, Row)
        one = draw_counterfactual(source.dataset, "train", i, KINDS[i % 5], "question" if i // 5 % 2 else "describe")
        assert source.open_image(row).tobytes() == one.scene.render().image.tobytes()
        assert source.open_image(replace(row, image=row.rejected_image)).tobytes() == one.other.render().image.tobytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("content: pairs, counterfactual: true, wrong_images: true, rows: 4", "`wrong_images` needs two rows or more"),
        ("content: pairs, wrong_images: true, rows: 1", "`wrong_images` needs two rows or more"),
        (
            "content: pairs, counterfactual: true, wrong_answers: a.json, rows: 4",
            "`wrong_answers` is for content: pairs",
        ),
        ("content: pairs, forms: [describe], wrong_answers: a.json, rows: 4", "without slip, counterfactual and forms"),
    ],
)
def test_sources_whose_settings_exclude_each_other_are_refused(data: str, message: str, recipes: Path) -> None:
    file = recipes / "3-dpo.yaml"
    with pytest.raises(RecipeError, match=message):
        load_recipe(file, [f"data=[{{format: shapes, {data}}}]"])


@pytest.mark.parametrize(
    "text", [None, "[", '{"1": "It is red."}', '{"answers": {"one": "It is red."}}', '{"answers": []}']
)
def test_a_file_that_holds_no_wrong_answers_is_an_error_message(
    text: str | None, recipes: Path, tmp_path: Path
) -> None:
    file = tmp_path / "answers.json"
    if text is not None:
        file.write_text(text)
    data = f"data=[{{format: shapes, content: pairs, rows: 4, wrong_answers: {file}}}]"
    loaded = load_recipe(recipes / "3-dpo.yaml", [data])
    with pytest.raises(DataError, match=r'answers\.json: no file of wrong answers .*"SCENE": "ANSWER"'):
        sources_of(loaded)


def test_rows_follow_the_content_of_the_file_of_wrong_answers(recipes: Path, tmp_path: Path) -> None:
    """A file that is written again at the same path is read again."""
    file = tmp_path / "answers.json"
    loaded = load_recipe(
        recipes / "3-dpo.yaml", [f"data=[{{format: shapes, content: pairs, rows: 4, wrong_answers: {file}}}]"]
    )
    for answers in ({"1": "It is a moon."}, {"1": "It is a tree.", "3": "Ten."}):
        file.write_text(json.dumps({"answers": answers}))
        assert [row.rejected for row in index_rows(loaded, Unchecked()).rows()] == list(answers.values())
    file.write_text(json.dumps({"answers": {"4": "Ten."}}))
    with pytest.raises(DataError, match="scene 4 is none of the source, whose rows are 4 from 0"):
        sources_of(loaded)


def test_forms_of_captions_are_refused(recipes: Path) -> None:
    with pytest.raises(RecipeError, match="`forms` is for content: instruct or pairs"):
        load_recipe(recipes / "1-align.yaml", ["data.0.forms=[describe]"])
