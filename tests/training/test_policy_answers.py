"""The answers of an MLLM mean what the rewards say, and make the same rows whatever else is asked."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pivot_hub.cli import app
from pivot_hub.data.pairs.on_policy import PolicyQuestion, Reading
from pivot_hub.data.pairs.words import noun_forms, short_answers, side_question
from pivot_hub.data.synthetic import KINDS, ShapesDataset
from pivot_hub.demo.packed_bundle import shipped_bundle
from pivot_hub.errors import DataError
from pivot_hub.provenance import weights_sha256
from pivot_hub.training.policy_answers import MllmPolicy, meaning_of
from tests.data.test_pairs import all_rows, write_questions

LEFT, RIGHT = (short_answers("position", answer) for answer in side_question("dog", "cat")[1:])
OPTIONS = "Which?\n(A) red\n(B) dark green\n(C) blue"


def question(right: tuple[str, ...], *wrong: tuple[str, ...], reading: Reading = "forms", text: str = "Q?") -> Any:
    return PolicyQuestion(text, Path("0.png"), 0, right, wrong, reading)


PRESENCE = question(("Yes",), ("No",))
POSITION = question(LEFT, RIGHT)
BOX = question(noun_forms("dog"), noun_forms("traffic light"), noun_forms("apple"))
OPTION = question(("(B) dark green",), ("(A) red",), ("(C) blue",), text=OPTIONS)
COUNT = question(("3",), reading="number")
WORDS = question(("dark red",), reading="words")


@pytest.mark.parametrize(
    ("asked", "answer", "meaning"),
    [
        (PRESENCE, "yes.", "Yes"),
        (PRESENCE, "No, there is none.", "No"),
        (PRESENCE, "I do not know", None),
        (POSITION, "left", "Left"),
        (POSITION, "To the right.", "Right"),
        (POSITION, "The dog is to the left of the cat.", "Left"),
        (POSITION, "The cat is to the right of the dog.", None),  # which is true, in other words
        (BOX, "A dog.", "Dog"),
        (BOX, "the traffic light", "Traffic light"),
        (BOX, "an apple", "Apple"),
        (BOX, "An animal", None),
        (BOX, "A dog and an apple", None),
        (OPTION, "B", "(B) dark green"),
        (OPTION, "The answer is (B).", "(B) dark green"),
        (OPTION, "red", "(A) red"),
        (OPTION, "D", None),
        (OPTION, "(A) or (C)", None),
        (COUNT, "three", "3"),
        (COUNT, "There are 4 dogs.", "4"),
        (COUNT, "3 or 4", None),
        (COUNT, "many", None),
        (WORDS, "Dark  red.", "dark red"),
        (WORDS, "It is dark red", None),
        (WORDS, "red", None),
        (WORDS, "Blue.", "blue"),
        (WORDS, "...", None),
    ],
)
def test_answers_mean_only_what_is_certain(asked: PolicyQuestion, answer: str, meaning: str | None) -> None:
    assert meaning_of(asked, answer) == meaning


@pytest.fixture(scope="module")
def mllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLLM that was trained on the synthetic Shapes dataset, and answers some questions right."""
    folder = tmp_path_factory.mktemp("mllm") / "shapes-dpo"
    shipped = shipped_bundle().second
    shipped.model.save_pretrained(folder)
    shipped.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    dataset, records = ShapesDataset(), []
    for i in range(8):
        scene, rng = dataset.scene("test", i), dataset.scene_rng("test", i, 1)
        scene.render().image.save(folder / f"{i}.png")
        asked = [scene.question(kind, rng) for kind in KINDS]
        records += [{"image": f"{i}.png", "question": one.text, "answer": one.answer} for one in asked]
    write_questions(folder / "questions.jsonl", records)
    return folder


def test_rows_are_the_same_whatever_else_is_asked(mllm: Path, scenes: Path, tmp_path: Path) -> None:
    def rows(name: str, *options: str, questions: Path = scenes / "questions.jsonl") -> list[dict[str, Any]]:
        command = ["data", "pairs", str(scenes), "--questions", str(questions), "--policy", str(mllm), "--samples", "4"]
        command += ["--validation", "0", "--allow-priors", "--output", str(tmp_path / name), *options]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        return all_rows(tmp_path / name)

    every = rows("every")
    truth = {(r["image"], r["question"]): r["answer"] for r in map(json.loads, (scenes / "questions.jsonl").open())}
    assert len(every) > 3
    for row in every:
        right = truth[row["image"].removeprefix("photos/"), row["question"].removeprefix("<image>\n")]
        assert row["chosen"] == right or row["chosen"].startswith(right.partition(",")[0] + ",")
        assert row["rejected"] != right
    report = json.loads((tmp_path / "every" / "report.json").read_text())["policy"]
    assert (report["name"], report["commit"], report["samples"]) == ("shapes-dpo", None, 4)
    assert report["weights_sha256"] == weights_sha256(mllm)
    assert sum(report["answers"]["short"].values()) == 4 * report["questions"]["short"] == 4 * len(truth)
    assert str(mllm) not in (tmp_path / "every" / "report.json").read_text()

    text = (scenes / "questions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "fewer.jsonl").write_text("".join(reversed(text[::3])))
    fewer = rows("fewer", "--batch", "3", questions=tmp_path / "fewer.jsonl")
    kept = Counter((row["image"], row["question"], row["chosen"], row["rejected"]) for row in fewer)
    assert len(fewer) > 1
    policy = {(row["image"], row["question"]): (row["chosen"], row["rejected"]) for row in every}
    shared = [key for key in kept if key[:2] in policy]  # what balances is decided among all
    assert shared
    assert all(policy[image, asked] == (chosen, rejected) for image, asked, chosen, rejected in shared)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples": 1}, "--samples is 1; give 2 or more"),
        ({"temperature": 0.0}, "--temperature is 0; give a number above 0"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"batch": 0}, "--batch is 0"),
        ({"dtype": "int8"}, "--dtype is 'int8'; give one of float32, float16, bfloat16"),
    ],
)
def test_settings_out_of_range_are_refused_before_a_model_is_loaded(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        MllmPolicy("nothing", **values)


def test_what_is_no_mllm_is_refused_and_nothing_written(scenes: Path, tmp_path: Path) -> None:
    command = ["data", "pairs", str(scenes), "--questions", str(scenes / "questions.jsonl"), "--policy", str(scenes)]
    done = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "pairs")])
    assert done.exit_code != 0
    assert not (tmp_path / "pairs").exists()
