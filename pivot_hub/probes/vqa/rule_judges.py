"""Rules that judge MMBench and MathVista without a language model, for the task files in `tasks/`.

lmms-eval 0.7.3 sends answers that it cannot read to an API. Without the API it draws MMBench's letters at random and
counts MathVista's answers as wrong, and the result does not show it. The rules here give the same result on every
machine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from pivot_hub.data.choices import chosen_letter, lettered
from pivot_hub.probes.vqa.benchmarks import repetitions

_NUMBER = re.compile(r"(?:(?<!\d)-)?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.\d+|\d+)")


def score_mmbench(row: dict[str, Any], answers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Judge one repetition by lmms-eval's own rules for letters and option texts."""
    import pandas as pd
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator, mmbench_process_results

    item = mmbench_process_results(row, answers)["gpt_eval_score"]
    right = mmbench_evaluator.eval_sub_data(pd.DataFrame([item]), {item["index"]: item["answer"]}, static_only=True)
    return {"circular_accuracy": {"index": int(item["index"]), "right": bool(right)}}


def circular_accuracy(items: Sequence[dict[str, Any]]) -> float:
    """Compute the share of questions that are answered correctly in every repetition."""
    right = [all(circle) for circle in repetitions(items)]
    return sum(right) / len(right)


def show_mathvista(row: dict[str, Any]) -> list[Image.Image]:
    """Return the image of a row."""
    return [row["decoded_image"].convert("RGB")]


def ask_mathvista(row: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """Write the question as lmms-eval's mathvista_testmini_format does."""
    unit = f" (Unit: {row['unit']})" if row.get("unit") else ""
    options = [f"{letter}. {text}" for letter, text in lettered(row["choices"] or []).items()]
    return "\n".join([f"{row['question']}{unit}", *options, _hint(row)])


def _hint(row: dict[str, Any]) -> str:
    if row["question_type"] == "multi_choice":
        return "Answer with the option's letter from the given choices directly."
    if row["answer_type"] == "integer":
        return "Answer the question using a single integer number."
    if row["answer_type"] == "list":
        return "Answer the question using a Python list."
    places = {1: "one decimal place", 2: "two decimal places"}[int(row["precision"])]
    return f"Answer the question using a single floating-point number with {places}."


def score_mathvista(row: dict[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Judge whether the answer is the right option, number or list; the last of several numbers counts."""
    return {"accuracy": float(_is_right(row, answers[0].strip()))}


def _is_right(row: dict[str, Any], answer: str) -> bool:
    right = str(row["answer"]).strip()
    if row["question_type"] == "multi_choice":
        options = lettered(row["choices"])
        letter = chosen_letter(answer, options)
        return letter is not None and options[letter].strip() == right
    if row["answer_type"] == "list":
        return re.sub(r"\s", "", answer) == re.sub(r"\s", "", right)
    numbers = [float(n.replace(",", "")) for n in _NUMBER.findall(answer)]
    if not numbers:
        return False
    if row["answer_type"] == "integer":
        return numbers[-1] == float(right)
    places = int(row["precision"])
    return round(numbers[-1], places) == round(float(right), places)
