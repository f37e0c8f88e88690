"""On-policy rows: a right and a wrong answer of the policy itself, balanced, or left out with the reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pivot_hub.data.pairs import PairOptions, write_pairs
from pivot_hub.data.pairs.on_policy import PolicyAnswer, PolicyQuestion
from pivot_hub.data.pairs.words import short_answers, side_question, size_question
from pivot_hub.errors import DataError
from pivot_hub.training.row_check import check_data
from tests.data.test_pairs import all_rows, asked, coco, draw_photos, write_questions
from tests.data.test_rejected_images import parts, recipe_of

__all__ = ["parts"]

RIGHT, WRONG, UNCLEAR = "right", "wrong", "unclear"


class Scripted:
    """A policy whose answers a function decides: right, wrong or unclear ones."""

    def __init__(self, decide: Callable[[PolicyQuestion], Sequence[str]]) -> None:
        self.decide = decide
        self.asked: list[PolicyQuestion] = []

    def metadata(self) -> dict[str, Any]:
        return {"name": "scripted", "weights_sha256": "0" * 64}

    def answers(self, questions: Sequence[PolicyQuestion]) -> Iterator[list[PolicyAnswer]]:
        for question in questions:
            self.asked.append(question)
            yield [self._answer(question, what) for what in self.decide(question)]

    @staticmethod
    def _answer(question: PolicyQuestion, what: str) -> PolicyAnswer:
        if what == UNCLEAR:
            return PolicyAnswer("I cannot tell.", None)
        text = question.right[0] if what == RIGHT else question.wrong[0][0]
        return PolicyAnswer(f"{text}!", text)


@pytest.fixture
def options(tmp_path: Path) -> PairOptions:
    boxes = coco(tmp_path / "instances.json", draw_photos(tmp_path / "photos", 60))
    return PairOptions(boxes=boxes, validation=0.25)


def test_a_row_has_a_right_and_a_wrong_answer_of_the_policy(options: PairOptions, tmp_path: Path) -> None:
    policy = Scripted(lambda question: [UNCLEAR, WRONG, RIGHT, WRONG])
    written = write_pairs(tmp_path / "photos", tmp_path / "written", options)
    report = write_pairs(tmp_path / "photos", tmp_path / "pairs", options, policy=policy)
    rows, questions = all_rows(tmp_path / "pairs"), {(one.file.name, one.text) for one in policy.asked}
    assert {row["kind"] for row in rows} == {"presence", "count", "position", "box"}
    assert len(rows) > 0.9 * sum(sum(counts.values()) for counts in written.rows.values())  # balanced from the start
    known = {(row["image"], asked(row)): row for row in all_rows(tmp_path / "written")}
    for row in rows:
        text = asked(row).removesuffix("\nAnswer the question using a single word or phrase.")
        assert text != asked(row)
        truth = known[row["image"], text]
        forms = [short_answers(row["kind"], truth[key]) for key in ("chosen", "rejected")]
        assert (row["chosen"], row["rejected"]) == (f"{forms[0][0]}!", f"{forms[1][0]}!")
        assert (row["chosen_origin"], row["rejected_origin"]) == ("policy", "policy")
        assert (Path(row["image"]).name, asked(row)) in questions
    assert report.policy is not None
    counts = report.policy.to_dict()["answers"]["presence"]
    asked_about = report.policy.questions["presence"]
    assert counts == {"right": asked_about, "wrong": 2 * asked_about, "unclear": asked_about}
    stored = json.loads((tmp_path / "pairs" / "report.json").read_text())
    assert stored["policy"]["weights_sha256"] == "0" * 64
    assert {one["group"] for one in stored["blind"]} == {f"{kind}, on-policy" for kind in counts_of(rows)}


def counts_of(rows: Sequence[dict[str, Any]]) -> Counter[str]:
    return Counter(str(row["kind"]) for row in rows)


def test_questions_without_a_right_or_a_wrong_answer_are_counted(options: PairOptions, tmp_path: Path) -> None:
    def decide(question: PolicyQuestion) -> Sequence[str]:
        by_image = [[RIGHT, RIGHT], [WRONG, WRONG], [UNCLEAR, UNCLEAR], [WRONG, RIGHT], [RIGHT, WRONG]]
        return by_image[int(question.file.stem) % 5]

    policy = Scripted(decide)
    options = replace(options, kinds=("presence",), allow_priors=True)
    report = write_pairs(tmp_path / "photos", tmp_path / "pairs", options, policy=policy)
    by_image = Counter(int(question.file.stem) % 5 for question in policy.asked)
    reasons = ("wrong", "right", "right or wrong")
    left_out = [report.left_out[f"presence, on-policy: questions without a {missing} answer"] for missing in reasons]
    assert left_out == [by_image[i] for i in range(3)]
    both = by_image[3] + by_image[4]
    unbalanced = report.left_out["presence, on-policy: rows whose answer is right more often than wrong"]
    assert len(all_rows(tmp_path / "pairs")) == both - unbalanced > 0
    truth = write_pairs(
        tmp_path / "photos", tmp_path / "truth", replace(options, written_truth=True), policy=Scripted(decide)
    )
    origins = Counter(row["chosen_origin"] for row in all_rows(tmp_path / "truth"))
    assert origins["written"] > 0
    for row in all_rows(tmp_path / "truth"):
        assert row["chosen"].endswith("!") == (row["chosen_origin"] == "policy")
        assert row["rejected_origin"] == "policy"
    assert truth.left_out["presence, on-policy: questions without a right answer"] == 0


def test_a_policy_that_errs_one_way_gives_few_rows_and_never_a_prior(options: PairOptions, tmp_path: Path) -> None:
    """A policy that says yes too often is wrong where the answer is no, and text alone would tell that."""

    def decide(question: PolicyQuestion) -> Sequence[str]:
        return [RIGHT, WRONG] if question.right[0] == "No" or question.seed % 8 == 0 else [RIGHT, RIGHT]

    options = replace(options, kinds=("presence",), validation=0)
    report = write_pairs(tmp_path / "photos", tmp_path / "pairs", options, policy=Scripted(decide))
    chosen = Counter(row["chosen"] for row in all_rows(tmp_path / "pairs"))
    assert report.left_out["presence, on-policy: rows whose answer is right more often than wrong"] > 10
    rows = chosen.total()
    before = rows + report.left_out["presence, on-policy: rows whose answer is right more often than wrong"]
    assert chosen["No!"] - chosen["Yes!"] <= np.sqrt(before) + 1
    assert not report.blind[0].exceeds(5)


def test_answers_whose_form_tells_which_is_right_are_refused(options: PairOptions, tmp_path: Path) -> None:
    class Wordy(Scripted):
        @staticmethod
        def _answer(question: PolicyQuestion, what: str) -> PolicyAnswer:
            answer = Scripted._answer(question, what)
            return replace(answer, text=f"certainly {answer.text}" if what == RIGHT else answer.text)

    with pytest.raises(DataError, match=r"presence, on-policy: a probe that reads no image tells .*--allow-priors"):
        write_pairs(
            tmp_path / "photos",
            tmp_path / "pairs",
            replace(options, kinds=("presence",)),
            policy=Wordy(lambda question: [RIGHT, WRONG]),
        )
    assert not (tmp_path / "pairs").exists()


def test_seeds_of_questions_do_not_depend_on_the_others(options: PairOptions, tmp_path: Path) -> None:
    def seeds(options: PairOptions) -> dict[tuple[str, str], int]:
        policy = Scripted(lambda question: [RIGHT, WRONG])
        write_pairs(tmp_path / "photos", tmp_path / "pairs", options, policy=policy)
        return {(question.file.name, question.text): question.seed for question in policy.asked}

    every = seeds(replace(options, allow_priors=True))
    some = seeds(replace(options, kinds=("box", "count"), limit=10, allow_priors=True))
    assert len(some) == 20
    assert some.items() < every.items()
    assert len(set(every.values())) == len(every)
    assert seeds(replace(options, allow_priors=True, seed=1)).keys() & every.keys()
    assert not set(seeds(replace(options, allow_priors=True, seed=1)).values()) & set(every.values())


def test_questions_of_a_file_have_options_or_a_short_answer(tmp_path: Path) -> None:
    draw_photos(tmp_path / "photos", 1)
    records: list[dict[str, Any]] = [
        {"image": "0.png", "question": "Which?\n(A) red\n(B) green\n(C) blue", "answer": "b"},
        {"image": "0.png", "question": "What colour?", "answer": "dark red"},
        {"image": "0.png", "question": "How many?", "answer": 3},
        {"image": "0.png", "question": "Are there any?", "answer": "Yes, there are two."},
    ]
    file = write_questions(tmp_path / "vqa.jsonl", records)
    policy = Scripted(lambda question: [RIGHT])
    options = PairOptions(questions=file, validation=0)
    with pytest.raises(DataError, match="option, on-policy: questions without a wrong answer: 1"):
        write_pairs(tmp_path / "photos", tmp_path / "pairs", options, policy=policy)
    read = {one.text.split()[0].strip("?"): (one.reading, one.right, one.wrong) for one in policy.asked}
    assert read == {
        "Which": ("forms", ("(B) green",), (("(A) red",), ("(C) blue",))),
        "What": ("words", ("dark red",), ()),
        "How": ("number", ("3",), ()),
        "Are": ("forms", ("Yes",), (("No",),)),
    }
    with pytest.raises(DataError, match=r"vqa\.jsonl:2: has 0 options"):  # without a policy
        write_pairs(tmp_path / "photos", tmp_path / "pairs", options)
    empty = write_questions(tmp_path / "empty.jsonl", [{"image": "0.png", "question": "What?", "answer": " "}])
    with pytest.raises(DataError, match=r"empty\.jsonl:1: `answer` is empty"):
        write_pairs(tmp_path / "photos", tmp_path / "pairs", PairOptions(questions=empty), policy=policy)


def test_a_written_truth_needs_a_policy(options: PairOptions, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--written-truth is for the rows of an MLLM's own answers; give --policy"):
        write_pairs(tmp_path / "photos", tmp_path / "pairs", replace(options, written_truth=True))


def test_short_forms_of_written_answers() -> None:
    _, left, right = side_question("traffic_light", "dog")
    assert short_answers("position", left)[:2] == ("Left", "To the left")
    assert short_answers("position", right)[0] == "Right"
    assert short_answers("size", size_question("scissors", "dog")[1])[0] == "Scissors"
    assert short_answers("size", size_question("scissors", "fire_hydrant")[2])[:2] == ("Fire hydrant", "A fire hydrant")


def test_rows_pass_the_check_of_a_dpo_recipe(options: PairOptions, parts: Path, tmp_path: Path) -> None:
    policy = Scripted(lambda question: [RIGHT, WRONG])
    report = write_pairs(tmp_path / "photos", tmp_path / "pairs", options, policy=policy)
    recipe = recipe_of(parts, tmp_path, "{format: mmpr, path: pairs/train.jsonl, images: pairs}", "sigmoid")
    checked = check_data(recipe, folder=tmp_path / "index", workers=1).report
    assert checked.rows == sum(counts["train"] for counts in report.rows.values()) > 0
    assert checked.skipped_rows == 0
