"""The paper's 16 VQA benchmarks as lmms-eval 0.7.3 runs them, and the per-example scores of each.

Each benchmark gives one number in percent and counts once in an average, whatever it consists of:

- MME: the perception score is the sum over 10 categories of accuracy (over questions) and accuracy+ (over images whose
  two questions are both right). Its maximum is 2000, and it is reported in percent of 2000.
- OCRBench: the number of right answers to its 1000 questions, in percent.
- MMBench: each question is asked once for each rotation of its options, and is right if all of these answers are right.
- MMVP: the share of image pairs whose two questions are both right.
- SEED-Bench: its image part only, because the other parts are videos.
- ScienceQA: its questions with an image only.
- CV-Bench: the mean of 2D, which is itself the mean of ADE20K and COCO, and 3D, which is Omni3D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Sample = dict[str, Any]  # a line of the samples that lmms-eval logs
GROUPS = ("General", "Knowledge", "OCR and chart", "Vision-centric")
MME_PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
)
# MMBench repeats each question with its options rotated; the indices of repetitions differ by multiples of this.
CIRCLE = 1_000_000


@dataclass(frozen=True)
class Scored:
    """Scores of a task's samples.

    Args:
        example_scores: (n,) one value from 0 to 1 for each item, or (n, parts, 2) value and count of each item in the
            part that it belongs to.
        expected: Number that lmms-eval must have computed from these samples.
    """

    example_scores: np.ndarray
    expected: float


@dataclass(frozen=True)
class Benchmark:
    """One of the 16 benchmarks.

    Args:
        group: Group of the benchmark, from GROUPS.
        task: Task of lmms-eval, or a task in `tasks/` if lmms-eval's own task needs a language model as judge.
        split: Split that is measured.
        key: Name of the metric in lmms-eval.
        metric: Name of the metric in the result.
        read: Function that computes the scores from the samples.
    """

    group: str
    task: str
    split: str
    key: str
    metric: str
    read: Callable[[Sequence[Sample], str], Scored]


def read_numbers(samples: Sequence[Sample], key: str) -> Scored:
    """Read samples that have one number for each question."""
    return _mean(float(s[key]) for s in samples)


def _mean(values: Iterable[float]) -> Scored:
    example_scores = np.array(list(values))
    return Scored(example_scores, float(example_scores.mean()) if len(example_scores) else float("nan"))


def _of_1000(samples: Sequence[Sample], key: str) -> Scored:
    example_scores = np.array([float(s[key]["score"]) for s in samples])
    return Scored(example_scores, example_scores.sum() / 1000)


def _seed_image(samples: Sequence[Sample], key: str) -> Scored:
    items = [s[key] for s in samples if key in s]
    return _mean(float(i["pred"].lower().strip() == i["answer"].lower().strip()) for i in items)


def _mme(samples: Sequence[Sample], key: str) -> Scored:
    images: dict[tuple[str, str], list[float]] = {}
    for item in (s[key] for s in samples if key in s):
        images.setdefault((item["category"], str(item["question_id"])), []).append(item["score"])
    # Accuracy and accuracy+ of an image each give half of the points of its category.
    values = [(sum(scores) / len(scores) + (sum(scores) == 2)) / 2 for scores in images.values()]
    example_scores = _in_parts(
        values, [[MME_PERCEPTION.index(category)] for category, _ in images], len(MME_PERCEPTION)
    )
    value, count = example_scores.sum(0).T
    return Scored(example_scores, float(200 * (value[count > 0] / count[count > 0]).sum()))


def _cv_bench(samples: Sequence[Sample], key: str) -> Scored:
    # Omni3D counts as two parts of four, because 3D is half of the mean.
    parts = {"ADE20K": [0], "COCO": [1], "Omni3D": [2, 3]}
    values = [float(s[key]["is_correct"]) for s in samples]
    return Scored(_in_parts(values, [parts[s[key]["source"]] for s in samples], 4), float(np.mean(values)))


def _in_parts(values: Sequence[float], parts: Sequence[Sequence[int]], count: int) -> np.ndarray:
    """Build per-example scores (n, count, 2) from values and the parts they belong to."""
    example_scores = np.zeros((len(values), count, 2))
    for row, value, belongs in zip(example_scores, values, parts, strict=True):
        row[list(belongs)] = value, 1
    return example_scores


def _mmbench(samples: Sequence[Sample], key: str) -> Scored:
    return _mean(float(all(circle)) for circle in repetitions([s[key] for s in samples]))


def repetitions(items: Iterable[Sample]) -> list[list[bool]]:
    """Return for each question of MMBench whether each of its repetitions is answered correctly."""
    by_question: dict[int, list[bool]] = {}
    for item in items:
        by_question.setdefault(item["index"] % CIRCLE, []).append(item["right"])
    return list(by_question.values())


def _mmvp(samples: Sequence[Sample], key: str) -> Scored:
    pairs: dict[int, list[bool]] = {}
    for item in (s[key] for s in samples):
        pairs.setdefault(item["pair_index"], []).append(item["is_correct"])
    return _mean(float(all(pair)) for pair in pairs.values() if len(pair) == 2)


def _mmmu(samples: Sequence[Sample], key: str) -> Scored:
    return _mean(float(_mmmu_right(s[key])) for s in samples)


def _mmmu_right(item: Sample) -> bool:
    """Judge an answer that lmms-eval parsed as MMMU's own eval_utils.py does (eval_multi_choice, eval_open)."""
    parsed = item["parsed_pred"][0]
    right = item["answer"] if isinstance(item["answer"], list) else [item["answer"]]
    if item["question_type"] == "multiple-choice":
        return parsed in right
    accepted = [form for answer in right for form in _mmmu_forms(answer)]
    texts = [form for form in accepted if isinstance(form, str)]
    return any(any(t in p for t in texts) if isinstance(p, str) else p in accepted for p in parsed)


def _mmmu_forms(answer: str) -> list[str | float]:
    text = answer.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


BENCHMARKS: dict[str, Benchmark] = {
    "mme": Benchmark("General", "mme", "test", "mme_perception_score", "perception_score", _mme),
    "mmbench_en": Benchmark("General", "pivot_mmbench_en", "dev", "circular_accuracy", "circular_accuracy", _mmbench),
    "mmbench_cn": Benchmark("General", "pivot_mmbench_cn", "dev", "circular_accuracy", "circular_accuracy", _mmbench),
    "seed_bench": Benchmark("General", "seedbench", "test", "seed_image", "accuracy", _seed_image),
    "gqa": Benchmark("General", "gqa", "testdev", "exact_match", "exact_match", read_numbers),
    "scienceqa": Benchmark("Knowledge", "scienceqa_img", "test", "exact_match", "exact_match", read_numbers),
    "mmmu": Benchmark("Knowledge", "mmmu_val", "validation", "mmmu_acc", "accuracy", _mmmu),
    "mathvista": Benchmark("Knowledge", "pivot_mathvista", "testmini", "accuracy", "accuracy", read_numbers),
    "ai2d": Benchmark("Knowledge", "ai2d", "test", "exact_match", "exact_match", read_numbers),
    "chartqa": Benchmark("OCR and chart", "chartqa", "test", "relaxed_overall", "relaxed_accuracy", read_numbers),
    "ocrbench": Benchmark("OCR and chart", "ocrbench", "test", "ocrbench_accuracy", "accuracy", _of_1000),
    "textvqa": Benchmark("OCR and chart", "textvqa_val", "validation", "exact_match", "vqa_accuracy", read_numbers),
    "docvqa": Benchmark("OCR and chart", "docvqa_val", "validation", "anls", "anls", read_numbers),
    "mmvp": Benchmark("Vision-centric", "mmvp", "train", "mmvp_pair_accuracy", "pair_accuracy", _mmvp),
    "realworldqa": Benchmark("Vision-centric", "realworldqa", "test", "exact_match", "exact_match", read_numbers),
    "cv_bench": Benchmark("Vision-centric", "cv_bench", "test", "cv_bench_acc", "mean_2d_3d", _cv_bench),
}
