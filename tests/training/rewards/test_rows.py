"""Rows that rewards can score: from scenes, conversations and labelled images, through the check to TRL's columns."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pivot_hub.cli import main
from pivot_hub.config import stages
from pivot_hub.config.recipe import load_recipe
from pivot_hub.config.stages import Stage
from pivot_hub.data.index import RowIndex
from pivot_hub.data.llava import parse_questions
from pivot_hub.data.synthetic import COLOUR_NAMES, SHAPES, ShapesDataset
from pivot_hub.errors import DataError, RecipeError, TrainingError
from pivot_hub.training.rewards import box_iou, colour, count, exact_match, shape
from pivot_hub.training.row_check import check_data
from tests.encoder.originals import IMAGE_PX

HERE = "tests.training.rewards.test_rows"
REWARDS = "[{name: exact_match}, {name: count}, {name: box_iou, args: {coordinates: pixels}}]"
SHAPES_DATA = f"format: shapes, content: questions, world: {{image_px: {IMAGE_PX}}}"


@pytest.fixture(autouse=True)
def _stage() -> Iterator[None]:
    """A stage with rewards, which has no module: no test runs it."""
    name = "reinforce"
    formats = ("shapes", "vqa", "boxes")
    stage = Stage(
        name, "", "transformers:TrainingArguments", formats, "questions", needs_parent=True, takes_rewards=True
    )
    stages.register_stages([stage])
    yield
    del stages._STAGES[name]


def recipe(folder: Path, data: str, rewards: str = REWARDS, more: str = "") -> Path:
    """Write a recipe beside those of the tiny MLLM."""
    file = folder / "4-reinforce.yaml"
    file.write_text(
        "stage: reinforce\nparent: 2-instruct.yaml\nlearning_rate: {language: 1.0e-5}\n"
        f"data: [{{{data}}}]\nrewards: {rewards}\n{more}"
    )
    return file


def check(folder: Path, data: str, rewards: str = REWARDS, more: str = "") -> RowIndex:
    return check_data(load_recipe(recipe(folder, data, rewards, more)), workers=1)


def columns(index: RowIndex) -> dict[str, list[Any]]:
    """Return all rows in the columns that TRL reads, with a position in the index as `row`."""
    dataset = index.as_dataset("verifiable", "<I>")
    return dataset[: len(dataset)]


def always(completions: list[str], **kwargs: Any) -> list[float]:
    raise AssertionError("a check asks no function of the user")


def test_scenes_give_questions_whose_answers_are_rewarded(own_recipes: Path) -> None:
    kinds = "[colour, shape, position, count, presence, describe, box]"
    index = check(own_recipes, f"{SHAPES_DATA}, rows: 21, kinds: {kinds}")
    rows = columns(index)
    assert rows["kind"] == ["colour", "shape", "position", "count", "presence", "describe", "box"] * 3
    assert rows["row"] == list(range(21))
    assert rows["id"] == [f"train/{i}" for i in range(21)]
    assert index.report.rewards == {"exact_match": 18, "count": 6, "box_iou": 3}
    assert "rows that each reward can score: exact_match 18, count 6, box_iou 3" in index.report.text()
    given = {key: value for key, value in rows.items() if key != "prompt"}
    answers = [[{"role": "assistant", "content": text}] for text in rows["solution"]]
    rewards: list[tuple[Callable[..., list[float | None]], str]] = [
        (colour, "colour describe"),
        (shape, "shape describe"),
        (count, "count describe"),
    ]
    for reward, of_kinds in rewards:
        expected = [1.0 if kind in of_kinds.split() else None for kind in rows["kind"]]
        assert reward(answers, prompts=rows["prompt"], **given) == expected
    assert exact_match(answers, prompts=rows["prompt"], **given) == [None if k == "box" else 1 for k in rows["kind"]]
    assert box_iou(answers, coordinates="pixels", **given) == [1 if k == "box" else None for k in rows["kind"]]
    dataset = ShapesDataset(image_px=IMAGE_PX)
    for i in (6, 13, 20):
        (box,) = rows["boxes"][i]
        question = rows["prompt"][i][-1]["content"][-1]["text"]
        label = question.removeprefix("Give the box of the ").removesuffix(".")
        scene = dataset.scene("train", i)
        target = [o.name for o in scene.objects].index(label)
        ys, xs = np.nonzero(scene.render().masks[target])
        assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert label.split()[0] in COLOUR_NAMES
        assert label.split()[1] in SHAPES
        assert rows["image_size"][i] == [IMAGE_PX, IMAGE_PX]
        assert rows["images"][i][0].size == (IMAGE_PX, IMAGE_PX)
    assert rows["boxes"][0] is None
    assert [m["role"] for m in rows["prompt"][0]] == ["user"]
    assert rows["prompt"][0][0]["content"][0] == {"type": "image"}


def test_without_kinds_the_answer_to_every_question_is_a_sentence(own_recipes: Path) -> None:
    index = check(own_recipes, f"{SHAPES_DATA}, rows: 10", "[{name: exact_match}]")
    assert columns(index)["kind"] == ["colour", "shape", "position", "count", "presence"] * 2
    assert index.report.rewards == {"exact_match": 10}


def talk(*turns: str, image: str = "a.png") -> dict[str, Any]:
    roles = ("human", "gpt")
    return {
        "image": image,
        "conversations": [{"from": roles[i % 2], "value": text} for i, text in enumerate(turns)],
    }


def test_each_short_answer_of_a_conversation_is_a_row_that_follows_the_turns_before_it() -> None:
    record = talk("<image>\nWhat?", "a dog", "Why?", "because it has four legs and barks", "How many?", "2")
    rows = parse_questions("a:1", record, 5)
    assert isinstance(rows, list)
    assert [(r.id, r.prompt, r.chosen, len(r.earlier)) for r in rows] == [
        ("a:1/1", "<image>\nWhat?", "a dog", 0),
        ("a:1/3", "How many?", "2", 4),
    ]
    assert rows[1].earlier[0] == ("user", "<image>\nWhat?")
    assert isinstance(parse_questions("a:1", record, 1), list)
    no_answer = parse_questions("a:1", talk("What?", "a dog"), 1)
    assert isinstance(no_answer, DataError)
    assert str(no_answer) == "a:1: no answer has at most 1 words; raise `answer_words`"


def test_questions_with_short_answers_are_counted_by_reward(own_recipes: Path) -> None:
    Image.new("RGB", (IMAGE_PX, IMAGE_PX)).save(own_recipes / "a.png")
    rows = [
        talk("<image>\nHow many dogs?", "2", "Which?\nA. both\nB. none", "A"),
        talk("<image>\nDescribe it.", "There are two dogs on a sofa."),
    ]
    (own_recipes / "rows.json").write_text(json.dumps(rows))
    data = "format: vqa, path: rows.json, images: ."
    with pytest.raises(DataError, match=r"rows.json:2: no answer has at most 5 words.*on_bad_row: skip"):
        check(own_recipes, data)
    index = check(own_recipes, data, more="on_bad_row: skip\n")
    assert (index.report.rows, index.report.skipped_rows) == (2, 1)
    assert index.report.rewards == {"exact_match": 2, "count": 1, "box_iou": 0}
    given = columns(index)
    assert [m["role"] for m in given["prompt"][1]] == ["user", "assistant", "user"]
    prompts = given.pop("prompt")
    assert exact_match(["3", "The answer is A."], prompts=prompts, **given) == [0, 1]
    assert check(own_recipes, f"{data}, answer_words: 7").report.rows == 3


def test_a_row_that_no_reward_can_score_is_a_bad_row(
    own_recipes: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = f"{SHAPES_DATA}, rows: 4, kinds: [count, colour]"
    with pytest.raises(DataError, match=r"train/1: none of the rewards can score it: count; .*on_bad_row: skip"):
        check(own_recipes, data, "[{name: count}]")
    command = ["pivot", "data", "check", str(own_recipes / "4-reinforce.yaml"), "--json", str(tmp_path / "r.json")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 1
    printed = capsys.readouterr().out
    assert "rows that each reward can score: count 2" in printed
    assert "skipped, no reward: 2" in printed
    assert json.loads((tmp_path / "r.json").read_text())["rewards"] == {"count": 2}
    index = check(own_recipes, data, f"[{{name: count}}, {{name: '{HERE}:always'}}]")
    assert index.report.rewards == {"count": 2, f"{HERE}:always": 4}


def test_data_check_says_that_rewards_of_form_teach_no_sight(
    own_recipes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for names, warned in (
        ("[{name: format}, {name: count, weight: 0}]", True),
        ("[{name: format}, {name: count}]", False),
    ):
        check(own_recipes, f"{SHAPES_DATA}, rows: 4, kinds: [count]", names)
        monkeypatch.setattr(sys, "argv", ["pivot", "data", "check", str(own_recipes / "4-reinforce.yaml")])
        with pytest.raises(SystemExit) as exit_info:
            main()
        assert exit_info.value.code == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert ("no reward (format) looks at what the row says is right" in printed) == warned


def test_labels_that_occur_once_are_asked_for(own_recipes: Path) -> None:
    folder = own_recipes / "pictures"
    for part in ("images", "labels"):
        (folder / part / "train").mkdir(parents=True)
    lines = {
        "a": "0 0.25 0.5 0.5 1.0\n1 0.5 0.5 0.25 0.25\n",
        "b": "0 0.25 0.5 0.5 1.0\n0 0.75 0.5 0.5 1.0\n",  # two of a label, so it is asked for neither
        "c": "1 0 0 1 0 0 1\n",
    }
    for name, text in lines.items():
        Image.new("RGB", (40, 20)).save(folder / "images" / "train" / f"{name}.png")
        (folder / "labels" / "train" / f"{name}.txt").write_text(text)
    (folder / "data.yaml").write_text("names: [apple, cup]\n")
    data = "format: boxes, path: pictures/labels, images: pictures"
    index = check(own_recipes, data)
    rows = columns(index)
    assert rows["id"] == ["train/a.png: apple", "train/a.png: cup", "train/c.png: cup"]
    assert rows["boxes"] == [[[0, 0, 20, 20]], [[15, 7.5, 25, 12.5]], [[0, 0, 40, 20]]]
    assert rows["solution"] == ["[0.0, 0.0, 20.0, 20.0]", "[15.0, 7.5, 25.0, 12.5]", "[0.0, 0.0, 40.0, 20.0]"]
    assert rows["image_size"] == [[40, 20]] * 3
    assert rows["prompt"][0][-1]["content"][-1]["text"] == "Give the box of the apple."
    assert index.report.rewards == {"exact_match": 0, "count": 0, "box_iou": 3}
    assert index.report.sources[0]["files_sha256"]
    (folder / "labels" / "train" / "a.txt").write_text("0 0.25 0.5 0.5 1.0\n")  # the index follows the labels
    assert columns(check(own_recipes, data))["id"] == ["train/a.png: apple", "train/c.png: cup"]


def test_coco_gives_the_box_of_all_parts_of_an_object_and_no_label_with_a_crowd(own_recipes: Path) -> None:
    folder = own_recipes / "coco"
    folder.mkdir()
    Image.new("RGB", (40, 30)).save(folder / "a.png")
    square = [[5, 10, 14, 10, 14, 19, 5, 19], [15, 10, 24, 10, 24, 21, 15, 21]]
    encoded = {"size": [30, 40], "counts": [10, 5, 1185]}  # the first column's rows 10 to 14
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 1, "segmentation": square},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4]},
        {"id": 3, "image_id": 7, "category_id": 2, "iscrowd": 1, "segmentation": encoded},
        {"id": 4, "image_id": 7, "category_id": 3, "segmentation": encoded},
    ]
    stored = {
        "images": [{"id": 7, "file_name": "a.png", "width": 40, "height": 30}],
        "categories": [{"id": i, "name": name} for i, name in enumerate(("cat", "dog", "pole"), 1)],
        "annotations": annotations,
    }
    (own_recipes / "instances.json").write_text(json.dumps(stored))
    index = check(own_recipes, "format: boxes, path: instances.json, images: coco")
    assert columns(index)["boxes"] == [[[5, 10, 24, 21]], [[0, 10, 1, 15]]]
    assert [row.id for row in index.rows()] == ["a.png: cat", "a.png: pole"]


BAD_RECIPES: list[tuple[str, str, str]] = [
    (f"{SHAPES_DATA}, rows: 4", "null", "stage reinforce learns from rewards: list them as `rewards`"),
    (f"{SHAPES_DATA}, rows: 4", "[]", "rewards"),
    (f"{SHAPES_DATA}, rows: 4", "[{name: count, wieght: 2}]", "did you mean `weight`"),
    ("format: shapes, content: pairs, rows: 4", REWARDS, "stage reinforce reads content: questions"),
    (f"{SHAPES_DATA}, rows: 4, kinds: [color]", REWARDS, "kinds"),
    ("format: boxes, path: p", REWARDS, "format boxes needs `images`"),
    ("format: boxes, path: p, images: i, subsets: {a: 1}", REWARDS, "format boxes has no subsets"),
    ("format: boxes, path: p, images: i, answer_words: 3", REWARDS, "`answer_words` is for format: vqa"),
]


@pytest.mark.parametrize(("data", "rewards", "message"), BAD_RECIPES)
def test_a_recipe_that_rewards_cannot_work_with_is_refused(
    own_recipes: Path, data: str, rewards: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe(own_recipes, data, rewards))


def test_other_stages_take_no_rewards_and_keep_their_hashes(recipes: Path) -> None:
    for stage in ("2-instruct", "3-dpo"):
        with pytest.raises(RecipeError, match="learns from its rows alone; remove `rewards`"):
            load_recipe(recipes / f"{stage}.yaml", ["rewards=[{name: count}]"])
    with pytest.raises(RecipeError, match="`kinds` is for content: questions"):
        load_recipe(recipes / "2-instruct.yaml", ["data.0.kinds=[colour]"])
    plain = load_recipe(recipes / "2-instruct.yaml").recipe
    assert "rewards" not in plain.resolved()
    assert plain.model_copy(update={"rewards": None}).sha256() == plain.sha256()


def test_an_unknown_reward_is_refused_before_rows_are_read(own_recipes: Path) -> None:
    with pytest.raises(TrainingError, match=r"no reward 'cuont' .did you mean `count`"):
        check(own_recipes, "format: vqa, path: rows.json", "[{name: cuont}]")
    assert not (own_recipes / "rows.json").exists()
