"""On-policy rows: a right and a wrong answer that an MLLM itself gave to a question whose answer is known.

This module knows which answers are right, and which are certainly wrong; the MLLM is given to it, with the rewards that
read its answers.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from pivot_hub.data.choices import plain
from pivot_hub.data.pairs.balance import UNBALANCED, balance
from pivot_hub.data.pairs.from_options import OPTION, SHORT, option_words
from pivot_hub.data.pairs.pair_row import (
    PHOTOS,
    POLICY,
    WRITTEN,
    OnPolicy,
    PairRow,
    Question,
    Unit,
    on_policy_group,
)
from pivot_hub.data.pairs.photos import LabelledPhoto, PhotoFolder
from pivot_hub.data.pairs.words import noun, noun_forms, short_answers
from pivot_hub.data.synthetic import NUMBERS

# LLaVA-1.5's request for short answers, which a program can read; it is part of the row's question.
BRIEFLY = "\nAnswer the question using a single word or phrase."
SLACK = 1.0  # deviations by which an answer may be right more often than wrong, as chance alone leaves them
Reading = Literal["forms", "number", "words"]


@dataclass(frozen=True)
class PolicyQuestion:
    """A question for an MLLM, and what its answers can mean.

    Args:
        text: Question without an image tag.
        file: Image file.
        seed: Seed of the answers, which no other question changes.
        right: Forms of the right answer; the first is what it means.
        wrong: Forms of each answer that is known to be wrong.
        reading: How an answer is read: `forms`, as one of those; `number`, as the right number or another one; `words`,
            as the right words or others.
    """

    text: str
    file: Path
    seed: int
    right: tuple[str, ...]
    wrong: tuple[tuple[str, ...], ...]
    reading: Reading


@dataclass(frozen=True)
class PolicyAnswer:
    """An answer of an MLLM.

    Args:
        text: Its text.
        means: What it means: the first form of the right answer, or something that is wrong; None where that is not
            certain.
    """

    text: str
    means: str | None


class Policy(Protocol):
    """An MLLM that answers questions."""

    def metadata(self) -> dict[str, Any]:
        """Return what identifies the MLLM and its answers."""
        ...

    def answers(self, questions: Sequence[PolicyQuestion]) -> Iterator[Sequence[PolicyAnswer]]:
        """Yield the answers to each question."""
        ...


@dataclass
class PolicyReport:
    """What an MLLM answered.

    Attributes:
        metadata: What identifies the MLLM and its answers.
        questions: Number of questions of each kind.
        right: Number of right answers of each kind.
        wrong: Number of answers of each kind that are certainly wrong.
        unclear: Number of answers of each kind that are neither.
    """

    metadata: dict[str, Any]
    questions: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    unclear: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """Format a line for each kind."""
        return [
            f"policy, {kind}: {count} questions; answers {self.right[kind]} right, {self.wrong[kind]} wrong, "
            f"{self.unclear[kind]} unclear"
            for kind, count in sorted(self.questions.items())
        ]

    def to_dict(self) -> dict[str, Any]:
        answers = {
            kind: {key: getattr(self, key)[kind] for key in ("right", "wrong", "unclear")} for kind in self.questions
        }
        return {**self.metadata, "questions": dict(self.questions), "answers": answers}


def questions_of(units: Sequence[Unit]) -> list[Question]:
    """Return the questions that written rows ask, each once."""
    rows: dict[tuple[str, str], list[PairRow]] = defaultdict(list)
    for unit in units:
        for row in unit:
            rows[row.image.file, row.question].append(row)
    return [
        Question(
            one[0].kind, one[0].split, one[0].image, one[0].question, one[0].chosen, tuple(r.rejected for r in one)
        )
        for one in rows.values()
    ]


def ask(
    questions: Sequence[Question], labelled: Sequence[LabelledPhoto], photos: PhotoFolder, seed: int
) -> list[PolicyQuestion]:
    """Return what an MLLM is asked.

    Questions that labels answer also ask for a single word or phrase. For a box, the name of a class that no label of
    the photograph names is known to be wrong too.

    Args:
        questions: The questions.
        labelled: The labelled photographs.
        photos: Folder of the images.
        seed: Seed of the run.
    """
    by_name = {photo.name: photo for photo in labelled}
    classes = sorted({name for photo in labelled for name in photo.labelled})
    return [_ask(question, by_name, classes, photos, seed) for question in questions]


def on_policy_units(
    questions: Sequence[Question],
    asked: Sequence[PolicyQuestion],
    answers: Iterator[Sequence[PolicyAnswer]],
    written_truth: bool,
    report: PolicyReport,
    left_out: Counter[str],
    rng: np.random.Generator,
) -> list[Unit]:
    """Make a row of the first right and the first wrong answer to each question, and balance what they mean.

    Args:
        questions: The questions.
        asked: What was asked for each.
        answers: The answers to each.
        written_truth: Whether the written right answer is chosen where no answer is right, in its shortest form.
        report: Counts the answers.
        left_out: Counts questions and rows that are left out.
        rng: Random numbers.
    """
    units: list[Unit] = []
    for question, one, given in zip(questions, asked, answers, strict=True):
        kind = question.kind
        right = [answer.text for answer in given if answer.means == one.right[0]]
        wrong = [(answer.text, answer.means) for answer in given if answer.means not in (None, one.right[0])]
        report.questions[kind] += 1
        report.right[kind] += len(right)
        report.wrong[kind] += len(wrong)
        report.unclear[kind] += len(given) - len(right) - len(wrong)
        if not wrong or not (right or written_truth):
            missing = "right or wrong" if not wrong and not right else "wrong" if right else "right"
            left_out[f"{on_policy_group(kind)}: questions without a {missing} answer"] += 1
            continue
        rejected, means = wrong[0]
        origin = OnPolicy(one.right[0], str(means), POLICY if right else WRITTEN)
        chosen = right[0] if right else one.right[0]
        units.append((PairRow(kind, question.split, question.image, one.text, chosen, rejected, on_policy=origin),))
    kept = balance(units, _meanings, rng, SLACK)
    for kind, count in (Counter(u[0].kind for u in units) - Counter(u[0].kind for u in kept)).items():
        left_out[f"{on_policy_group(kind)}: {UNBALANCED}"] += count
    return kept


def _ask(
    question: Question, by_name: Mapping[str, LabelledPhoto], classes: Sequence[str], photos: PhotoFolder, seed: int
) -> PolicyQuestion:
    name = question.image.file.removeprefix(f"{PHOTOS}/")
    text = question.text
    right: tuple[str, ...] = (question.right,)
    reading: Reading = "forms"
    wrong: list[tuple[str, ...]] = [(answer,) for answer in question.wrong]
    if question.kind == SHORT:
        words = plain(question.right)
        verdict = words.partition(",")[0]
        if verdict in ("yes", "no"):  # which `rewards.exact_match` decides by
            right, wrong = (verdict.capitalize(),), [("No" if verdict == "yes" else "Yes",)]
        else:
            reading = "number" if words.isdecimal() or words in NUMBERS[1:] else "words"
    elif question.kind != OPTION:
        text += BRIEFLY
        right = short_answers(question.kind, question.right)
        wrong = [short_answers(question.kind, answer) for answer in question.wrong]
        reading = "number" if question.kind == "count" else "forms"
        if question.kind == "box":
            wrong += [noun_forms(noun(absent)) for absent in classes if absent not in by_name[name].labelled]
    drawn = hashlib.blake2b(photos.digest_of(name) + text.encode(), digest_size=16, key=str(seed).encode()).digest()
    return PolicyQuestion(text, photos.folder / name, int.from_bytes(drawn, "big"), right, tuple(wrong), reading)


def _meanings(row: PairRow) -> list[tuple[str, str]]:
    """Name what a row's answers mean, among all rows of its kind, and among those of its question."""
    assert row.on_policy is not None
    chosen, rejected = row.on_policy.chosen_means, row.on_policy.rejected_means
    if row.kind == OPTION:  # whose letters differ from question to question
        chosen, rejected = option_words(chosen), option_words(rejected)
    return [(f"{key} {chosen}", f"{key} {rejected}") for key in (row.kind, f"{row.kind} {row.question}")]
