"""Questions of a file: a row for the right option against each wrong one, or a short answer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from string import ascii_uppercase
from typing import Any

import numpy as np

from pivot_hub.config.data_section import OnBadRow
from pivot_hub.data.choices import chosen_letter, lettered, option_lines, plain
from pivot_hub.data.pairs.balance import UNBALANCED, balance
from pivot_hub.data.pairs.pair_row import Question, Unit, photograph
from pivot_hub.data.pairs.photos import PhotoFolder
from pivot_hub.data.preference import REJECTED_IMAGE_KEYS
from pivot_hub.data.row import IMAGE_TAG, bad_character, image_name, read_records
from pivot_hub.errors import DataError, shown

OPTION, SHORT = "option", "short"  # kinds of questions with options, and of those with a short answer
# Options that speak of others, as "both A and B" or "all of the above": their order stays as it is.
NAMES_OTHERS = re.compile(r"\b[A-Z] (?:and|or) [A-Z]\b|\b[Oo]ptions? [A-Z]\b|\b(?:above|below|former|latter)\b")


def read_questions(
    file: Path, photos: PhotoFolder, on_bad_row: OnBadRow, with_short_answers: bool, rng: np.random.Generator
) -> tuple[list[Question], list[str]]:
    """Read questions with options, and where they are asked for, questions with a short answer.

    A record has `image`, `question` and `answer`: the letter or the words of the right option, or its number from 0.
    The options are lines of the question, as "(A) yes", which stay as they are, or a list `options` or `choices`, which
    is shuffled unless an option names others, as "both A and B". Without options, the answer is a short one.

    Args:
        file: JSON list, JSONL or Parquet file.
        photos: Folder of the images.
        on_bad_row: Whether a bad record raises an error or is skipped.
        with_short_answers: Whether a question may have no options; otherwise its record is bad.
        rng: Random numbers.

    Returns:
        The questions, and the reasons for the records that were skipped.

    Raises:
        DataError: The file cannot be read, or a record is bad.
    """
    if not file.is_file():
        raise DataError(f"{file} does not exist; give a file of questions with options.")
    questions: list[Question] = []
    skipped: list[str] = []
    for name, record in read_records(file):
        try:
            questions.append(_read(name, record, photos, with_short_answers, rng))
        except DataError as error:
            if on_bad_row is OnBadRow.STOP:
                raise
            skipped.append(str(error))
    return questions, skipped


def option_units(questions: Sequence[Question], left_out: Counter[str], rng: np.random.Generator) -> list[Unit]:
    """Return a unit for each question with options, and leave rows out until frequent answers balance.

    Args:
        questions: The questions.
        left_out: Counts rows that are left out.
        rng: Random numbers.
    """
    units = [question.rows() for question in questions]
    kept = balance(units, lambda row: [(option_words(row.chosen), option_words(row.rejected))], rng)
    left_out[f"{OPTION}: {UNBALANCED}"] += sum(map(len, units)) - sum(map(len, kept))
    return kept


def _read(
    name: str,
    record: dict[str, Any] | DataError,
    photos: PhotoFolder,
    with_short_answers: bool,
    rng: np.random.Generator,
) -> Question:
    if isinstance(record, DataError):
        raise record
    if key := next((key for key in REJECTED_IMAGE_KEYS if record.get(key) not in (None, [])), None):
        raise DataError(
            f"{name}: has `{key}`, and a question has one image; leave it out, or give rows of `{key}`, chosen and "
            "rejected to a recipe as they are, by `format: mmpr`."
        )
    question, given, answer = record.get("question"), record.get("options", record.get("choices")), record.get("answer")
    image = image_name(record, name)
    if isinstance(image, DataError):
        raise image
    if image is None or not isinstance(question, str):
        raise DataError(f"{name}: `{'question' if image else 'image'}` is missing; a question needs image and text.")
    image = PurePosixPath(image).as_posix()  # one name for a.jpg and ./a.jpg
    question = question.replace(IMAGE_TAG, "").strip()
    if isinstance(answer, bool) or not isinstance(answer, str | int):
        raise DataError(f"{name}: `answer` is {shown(answer)}; give the letter, the words or the number of an option.")
    if given is None:
        options = _options_of_text(name, question)
        right = chosen_letter(str(answer), options)
    else:
        options = _options_of_list(name, given)
        right = _right_of_list(name, answer, options)
    if (character := bad_character(question, str(answer), *options.values())) is not None:
        raise DataError(f"{name}: holds {character!r}, which is no character; convert the file to UTF-8, or fix it.")
    if not options and given is None and with_short_answers:
        if not plain(str(answer)):
            raise DataError(f"{name}: `answer` is empty; give the right answer.")
        return Question(SHORT, photos.split_of(image), photograph(image), question, str(answer).strip(), ())
    if len(options) < 2:
        raise DataError(f"{name}: has {len(options)} options; give a list, or lines as `(A) yes` in the question.")
    if right is None:
        raise DataError(f"{name}: the answer {shown(answer)} is none of the options {', '.join(options)}.")
    if len({plain(text) for text in options.values()}) < len(options):
        raise DataError(f"{name}: two options are the same words, so a wrong one would be right; remove one.")
    if given is not None:
        order = list(options)
        if not any(NAMES_OTHERS.search(text) for text in options.values()):
            order = [order[i] for i in rng.permutation(len(order))]
        right_at = order.index(right)
        options = lettered([options[letter] for letter in order])
        right = list(options)[right_at]
        question = "\n".join([question, *(f"({letter}) {text}" for letter, text in options.items())])
    split = photos.split_of(image)
    chosen = f"({right}) {options[right]}"
    wrong = tuple(f"({letter}) {text}" for letter, text in options.items() if letter != right)
    return Question(OPTION, split, photograph(image), question, chosen, wrong)


def _options_of_text(name: str, question: str) -> dict[str, str]:
    """Return the options that lines of a question name, by letter."""
    lines = option_lines(question)
    options = dict(lines)
    if len(options) < len(lines):
        raise DataError(f"{name}: two options have the same letter; give each its own.")
    return options


def _options_of_list(name: str, given: Any) -> dict[str, str]:
    """Return the options of a list, by letter."""
    if not isinstance(given, list) or not all(isinstance(option, str) and option.strip() for option in given):
        raise DataError(f"{name}: `options` is {shown(given)}; give a list of texts.")
    if len(given) > len(ascii_uppercase):
        raise DataError(f"{name}: has {len(given)} options; give at most {len(ascii_uppercase)}, one for each letter.")
    return lettered(given)


def _right_of_list(name: str, answer: str | int, options: dict[str, str]) -> str | None:
    """Return the letter of the right option; None if the answer is none of them."""
    by_words = chosen_letter(str(answer), options)
    if not isinstance(answer, int) or not 0 <= answer < len(options):
        return by_words
    by_number = list(options)[answer]
    if by_words not in (None, by_number):
        raise DataError(
            f"{name}: the answer {answer} may be the number of {shown(options[by_number])} or the option "
            f"{shown(options[by_words])}; give the letter, or the words as a text."
        )
    return by_number


def option_words(answer: str) -> str:
    """Return the words of an answer without its letter."""
    return plain(answer.partition(") ")[2])
