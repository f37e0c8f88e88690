"""Rewards on answers made by hand: right ones, near ones, malformed ones, and rows that a reward does not apply to."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pivot_hub.data.synthetic import KINDS, ShapesDataset
from pivot_hub.training.rewards import (
    box_iou,
    colour,
    count,
    exact_match,
    format,
    length,
    pointing,
    position,
    shape,
)

Reward = Callable[..., list[float | None]]
OPTIONS = "Which animal is it?\n(A) a cat\n(B) a dog"
BOX = [[10, 20, 30, 60]]  # of 20 x 40 px
MASK = np.zeros((8, 10), bool)
MASK[2:4, 5:7] = True

# Reward, settings and columns of the row, answer, expected value.
CASES: list[tuple[Reward, dict[str, Any], str, Any]] = [
    (exact_match, {"solution": "Red"}, "red.", 1),
    (exact_match, {"solution": "a red  circle"}, " A red circle ", 1),
    (exact_match, {"solution": "red"}, "It is red.", 0),
    (exact_match, {"solution": "red"}, "<think>blue?</think> <answer>Red</answer>", 1),
    (exact_match, {"solution": "red"}, "<answer>blue</answer> no: <answer>red</answer>", 1),
    (exact_match, {"solution": "red"}, "red <answer>blue</answer>", 0),
    (exact_match, {"solution": "B", "prompts": OPTIONS}, "The answer is B.", 1),
    (exact_match, {"solution": "a dog", "prompts": OPTIONS}, "(B)", 1),
    (exact_match, {"solution": "B", "prompts": OPTIONS}, "(A) or (B)", 0),
    (exact_match, {"solution": "B"}, "The answer is B.", 0),  # there are no options
    (exact_match, {"solution": "Yes, there is a red star."}, "yes", 1),
    (exact_match, {"solution": "No, there is no red star."}, "Yes, there is a red star.", 0),
    (exact_match, {"solution": "no"}, "no idea", 0),
    (exact_match, {"solution": "No parking"}, "no", 0),
    (exact_match, {"solution": "[1, 2, 3, 4]", "kind": "box"}, "[1, 2, 3, 4]", None),
    (exact_match, {"solution": " . "}, "", None),
    (exact_match, {}, "red", None),
    (count, {"solution": "3"}, "There are three circles.", 1),
    (count, {"solution": "three"}, "4", pytest.approx(2 / 3)),
    (count, {"solution": "3"}, "1", pytest.approx(1 / 3)),
    (count, {"solution": "3"}, "6", 0),
    (count, {"solution": "3", "within": 1}, "4", 0),
    (count, {"solution": "3", "within": 10}, "4", 0.9),
    (count, {"solution": "2"}, "2 or 3", 0),
    (count, {"solution": "2"}, "2-3", 0),
    (count, {"solution": "2"}, "-2", 0),
    (count, {"solution": "2"}, "2, I say two", 1),
    (count, {"solution": "There are no stars.", "kind": "count"}, "none", 1),
    (count, {"solution": "There are no stars.", "kind": "count"}, "No, there is one.", pytest.approx(2 / 3)),
    (count, {"solution": "There is one shape: a large red star at the top.", "kind": "describe"}, "1 star", 1),
    (count, {"solution": "No, there is no red star.", "kind": "presence"}, "no", None),
    (count, {"solution": "no"}, "no", None),
    (count, {"solution": "12 Main Street"}, "12", None),
    (count, {}, "3", None),
    (colour, {"solution": "It is red.", "kind": "colour"}, "The circle is red.", 1),
    (colour, {"solution": "It is red.", "kind": "colour"}, "RED: the red circle", 1),
    (colour, {"solution": "It is red.", "kind": "colour"}, "red or blue", 0),
    (colour, {"solution": "It is red.", "kind": "colour"}, "reddish", 0),
    (colour, {"solution": "It is red.", "kind": "shape"}, "red", None),
    (colour, {"solution": "red"}, "red", 1),
    (colour, {"solution": "It is a circle."}, "red", None),
    (colour, {"solution": "a red star and a red ring", "kind": "describe"}, "a red ring", 0),
    (colour, {"solution": "a red star and a navy ring", "kind": "describe"}, "a navy ring and a red star", 1),
    (shape, {"solution": "It is a cross.", "kind": "shape"}, "two crosses", 1),
    (shape, {"solution": "It is a cross.", "kind": "shape"}, "across", 0),
    (shape, {"solution": "It is red.", "kind": "shape"}, "red", None),
    (position, {"solution": "It is at the top left.", "kind": "position"}, "Top-left", 1),
    (position, {"solution": "It is at the top left.", "kind": "position"}, "at the top", 0),
    (position, {"solution": "It is at the top.", "kind": "position"}, "at the top left", 0),
    (position, {"solution": "It is in the centre.", "kind": "position"}, "in the center", 1),
    (position, {"solution": "It is at the top.", "kind": "colour"}, "top", None),
    (box_iou, {"boxes": BOX, "coordinates": "pixels"}, "[10, 20, 30, 60]", 1),
    (box_iou, {"boxes": BOX, "coordinates": "pixels"}, '{"bbox_2d": [10.0, 20, 30, 40], "label": "cat"}', 0.5),
    (box_iou, {"boxes": BOX, "coordinates": "pixels"}, "[20,20,40,60]", pytest.approx(1 / 3)),
    (box_iou, {"boxes": BOX, "coordinates": "pixels"}, "[30, 60, 50, 80]", 0),
    (box_iou, {"boxes": BOX, "coordinates": "pixels"}, "[30, 20, 10, 60]", 0),
    (box_iou, {"boxes": BOX, "coordinates": "pixels"}, "[1, 1, 2, 2] or [10, 20, 30, 60]", 0),
    (box_iou, {"boxes": [[0, 0, 1, 1], *BOX], "coordinates": "pixels"}, "[10, 20, 30, 60]", 1),
    (box_iou, {"boxes": BOX, "coordinates": "0..1000", "image_size": [100, 200]}, "[100, 100, 300, 300]", 1),
    (box_iou, {"boxes": BOX, "coordinates": "0..1", "image_size": [100, 200]}, "[0.1, 0.1, 0.3, 0.3]", 1),
    (box_iou, {"boxes": BOX, "coordinates": "0..1", "image_size": [100, 200]}, "[10, 20, 30, 60]", 0),
    (box_iou, {"boxes": BOX, "coordinates": "0..1"}, "[0.1, 0.1, 0.3, 0.3]", None),
    (box_iou, {"boxes": [], "coordinates": "pixels"}, "[1, 2, 3, 4]", None),
    (box_iou, {"coordinates": "pixels"}, "[1, 2, 3, 4]", None),
    (pointing, {"boxes": BOX, "coordinates": "pixels"}, '{"point_2d": [10, 60]}', 1),
    (pointing, {"boxes": BOX, "coordinates": "pixels"}, "at (20.5, 30)", 1),
    (pointing, {"boxes": BOX, "coordinates": "pixels"}, "(30.5, 30)", 0),
    (pointing, {"boxes": BOX, "coordinates": "pixels"}, "[10, 20, 30, 60]", 0),  # a box is no point
    (pointing, {"boxes": BOX, "coordinates": "0..1000", "image_size": [100, 200]}, "(200, 200)", 1),
    (pointing, {"masks": MASK, "coordinates": "pixels"}, "[6, 3]", 1),
    (pointing, {"masks": MASK, "coordinates": "pixels"}, "[3, 6]", 0),
    (pointing, {"masks": MASK, "boxes": [[0, 0, 9, 9]], "coordinates": "pixels"}, "[1, 1]", 0),
    (pointing, {"masks": MASK, "coordinates": "pixels"}, "[-1, 3]", 0),
    (pointing, {"masks": MASK, "coordinates": "pixels"}, "[600, 3]", 0),
    (pointing, {"coordinates": "pixels"}, "[6, 3]", None),
    (format, {}, "<answer>red</answer>", 1),
    (format, {}, "<think>a\nb</think>\n<answer>red\n</answer>\n", 1),
    (format, {}, "<answer>red</answer> or <answer>blue</answer>", 0),
    (format, {}, "It is <answer>red</answer>", 0),
    (format, {"pattern": r"\d+"}, "12", 1),
    (format, {"pattern": r"\d+"}, "12 px", 0),
    (length, {"completion_ids": [7] * 10, "longest": 10, "zero_at": 20}, "", 1),
    (length, {"completion_ids": [7] * 15, "longest": 10, "zero_at": 20}, "", 0.5),
    (length, {"completion_ids": [7] * 20, "longest": 10, "zero_at": 20}, "", 0),
    (length, {"completion_ids": [7] * 99, "longest": 10, "zero_at": 20}, "", 0),
    (length, {"longest": 10, "zero_at": 20}, "", None),
]
SETTINGS = ("within", "coordinates", "pattern", "longest", "zero_at")


def score(reward: Reward, values: dict[str, Any], completion: Any) -> float | None:
    """Call a reward on one row as TRL does: with columns that it does not read, and two copies of the row."""
    columns = {key: value if key in SETTINGS else [value, value] for key, value in values.items()}
    first, second = reward(completions=[completion, completion], trainer_state=None, row=[1, 2], **columns)
    assert first == second
    return first


@pytest.mark.parametrize(("reward", "values", "answer", "expected"), CASES)
def test_an_answer_gets_its_reward_as_text_and_as_messages(
    reward: Reward, values: dict[str, Any], answer: str, expected: float | None
) -> None:
    assert score(reward, values, answer) == expected
    assert score(reward, values, [{"role": "assistant", "content": answer}]) == expected
    turns = [{"role": "user", "content": "red [1, 2, 3, 4]"}, {"role": "assistant", "content": [{"text": answer}]}]
    assert score(reward, values, turns) == expected


MALFORMED: list[Any] = [
    "",
    " \n",
    "no",
    "[[[",
    "[1, 2, 3]",
    "[1, 2, 3, 4, 5]",
    "[nan, nan, nan, nan] (inf, inf)",
    "[1e999, 1, 2, 3]",
    f"[{'9' * 5000}, 1, 2, 3]",
    f"[{'9' * 20}, -{'9' * 20}]",
    "9" * 5000,
    "²",
    "\ud800",
    "<answer>",
    "<answer></answer>",
    "</answer><answer>",
    [],
    [{"role": "user", "content": "red 3 [10, 20, 30, 60] (20, 30)"}],
    [{"role": "assistant"}],
    [{"role": "assistant", "content": None}],
    [{"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": None}]}],
]
ROWS: list[tuple[Reward, dict[str, Any]]] = [
    (exact_match, {"solution": "red"}),
    (exact_match, {"solution": "B", "prompts": OPTIONS}),
    (exact_match, {"solution": "Yes, there is a red star."}),
    (count, {"solution": "7", "within": 3}),
    (colour, {"solution": "red"}),
    (shape, {"solution": "star"}),
    (position, {"solution": "top"}),
    (box_iou, {"boxes": BOX, "coordinates": "pixels"}),
    (box_iou, {"boxes": BOX, "coordinates": "0..1000", "image_size": [100, 200]}),
    (pointing, {"boxes": BOX, "coordinates": "pixels"}),
    (pointing, {"masks": MASK, "coordinates": "0..1", "image_size": [10, 8]}),
    (format, {}),
]


@pytest.mark.parametrize(("reward", "values"), ROWS)
def test_a_malformed_answer_gets_nothing(reward: Reward, values: dict[str, Any]) -> None:
    assert {score(reward, values, answer) for answer in MALFORMED} == {0.0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: count(["1"], within=0), "`within` is 0"),
        (
            lambda: box_iou(["1"], coordinates="percent"),
            "`coordinates` is 'percent'; give one of pixels, 0..1",
        ),
        (lambda: pointing(["1"], coordinates=["pixel"]), "`coordinates` is 'pixel'"),
        (lambda: length(["1"], longest=5, zero_at=5), "0 <= longest < zero_at"),
        (lambda: format(["1"], pattern="("), "missing"),
    ],
)
def test_a_wrong_setting_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, re.error), match=message):
        call()


def test_each_row_has_its_own_scale() -> None:
    answers = ["[10, 20, 30, 60]", "[100, 100, 300, 300]"]
    columns: dict[str, Any] = {"boxes": [BOX, BOX], "image_size": [[100, 200]] * 2}
    assert box_iou(answers, coordinates=["pixels", "0..1000"], **columns) == [1, 1]


def test_only_the_right_answer_to_a_question_about_a_scene_is_rewarded_in_full() -> None:
    dataset = ShapesDataset()
    rewards: dict[str, Reward] = {
        "colour": colour,
        "shape": shape,
        "position": position,
        "count": count,
        "presence": exact_match,
    }
    for i in range(60):
        kind = KINDS[i % len(KINDS)]
        question = dataset.scene("train", i).question(kind, dataset.scene_rng("train", i, 1))
        columns: dict[str, Any] = {"solution": [question.answer] * 2, "kind": [kind] * 2}
        right, wrong = rewards[kind]([question.answer, question.wrong], **columns)
        assert right == 1
        assert wrong is not None
        assert wrong < 1
        others = [reward for name, reward in rewards.items() if name not in (kind, "presence")]
        assert all(reward([question.answer] * 2, **columns) == [None, None] for reward in others)
