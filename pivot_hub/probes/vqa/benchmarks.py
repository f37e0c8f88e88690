"""The paper's 16 VQA benchmarks as lmms-eval 0.7.3 runs them, and what each of their questions adds to the score.

A benchmark is one number in percent, and counts once in an average, whatever it is made of:

- MME's perception score is the sum over 10 categories of accuracy (of questions) and accuracy+ (of images with both
  questions right), 2000 at most; in percent of these 2000.
- OCRBench's score is the number of its 1000 questions that are right; in percent of them.
- MMBench asks a question once for each turn of its options; it is right where all of them are.
- MMVP's is the share of image pairs with both questions right.
- SEED-Bench's is its image part: the others are videos.
- ScienceQA's is that of its questions with an image.
- CV-Bench's is the mean of 2D, itself that of ADE20K and COCO, and 3D, Omni3D.
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
# MMBench repeats a question with its options turned; the repetitions' numbers are this far apart.
CIRCLE = 1_000_000


@dataclass(frozen=True)
class Scored:
    """What a task's samples say.

    Args:
        tallies: (n,) one value in 0 to 1 an item, or (n, parts, 2) values and counts of an item in the part it is of.
        figure: what lmms-eval must have made of them.
    """

    example_scores: np.ndarray
    figure: float


@dataclass(frozen=True)
class Benchmark:
    """One of the 16.

    Args:
        group: of GROUPS.
        task: lmms-eval's, or ours in `tasks/` where lmms-eval's needs a language model as judge.
        split: that it is measured on.
        key: lmms-eval's metric.
        metric: what the result calls it.
        read: how the items' scores come from the samples.
    """

    group: str
    task: str
    split: str
    key: str
    metric: str
    read: Callable[[Sequence[Sample], str], Scored]


def read_numbers(samples: Sequence[Sample], key: str) -> Scored:
    """One number a question."""
    return _mean(float(s[key]) for s in samples)


def _field(name: str) -> Callable[[Sequence[Sample], str], Scored]:
    return lambda samples, key: _mean(float(s[key][name]) for s in samples)


def _mean(values: Iterable[float]) -> Scored:
    example_scores = np.array(list(values))
    return Scored(example_scores, float(example_scores.mean()) if len(example_scores) else float("nan"))


def _of_1000(samples: Sequence[Sample], key: str) -> Scored:
    example_scores = np.array([float(s[key]["score"]) for s in samples])
    return Scored(example_scores, example_scores.sum() / 1000)


def _seed_image(samples: Sequence[Sample], key: str) -> Scored:
    seen = [s[key] for s in samples if key in s]
    return _mean(float(s["pred"].lower().strip() == s["answer"].lower().strip()) for s in seen)


def _mme(samples: Sequence[Sample], key: str) -> Scored:
    images: dict[tuple[str, str], list[float]] = {}
    for item in (s[key] for s in samples if key in s):
        images.setdefault((item["category"], str(item["question_id"])), []).append(item["score"])
    # Accuracy and accuracy+ of an image, each half of its category's points.
    values = [(sum(scores) / len(scores) + (sum(scores) == 2)) / 2 for scores in images.values()]
    example_scores = _in_parts(
        values, [[MME_PERCEPTION.index(category)] for category, _ in images], len(MME_PERCEPTION)
    )
    value, count = example_scores.sum(0).T
    return Scored(example_scores, float(200 * (value[count > 0] / count[count > 0]).sum()))


def _cv_bench(samples: Sequence[Sample], key: str) -> Scored:
    # Omni3D is two parts of four: half of the mean is 3D's.
    parts = {"ADE20K": [0], "COCO": [1], "Omni3D": [2, 3]}
    values = [float(s[key]["is_correct"]) for s in samples]
    return Scored(_in_parts(values, [parts[s[key]["source"]] for s in samples], 4), float(np.mean(values)))


def _in_parts(values: Sequence[float], parts: Sequence[Sequence[int]], count: int) -> np.ndarray:
    """Tallies (n, count, 2) of values in the parts they belong to."""
    example_scores = np.zeros((len(values), count, 2))
    for row, value, belongs in zip(example_scores, values, parts, strict=True):
        row[list(belongs)] = value, 1
    return example_scores


def _mmbench(samples: Sequence[Sample], key: str) -> Scored:
    return _mean(float(all(circle)) for circle in repetitions([s[key] for s in samples]))


def repetitions(items: Iterable[Sample]) -> list[list[bool]]:
    """For each question of MMBench, whether each of its repetitions is right."""
    found: dict[int, list[bool]] = {}
    for item in items:
        found.setdefault(item["index"] % CIRCLE, []).append(item["right"])
    return list(found.values())


def _mmvp(samples: Sequence[Sample], key: str) -> Scored:
    pairs: dict[int, list[bool]] = {}
    for item in (s[key] for s in samples):
        pairs.setdefault(item["pair_index"], []).append(item["is_correct"])
    return _mean(float(all(pair)) for pair in pairs.values() if len(pair) == 2)


def _mmmu(samples: Sequence[Sample], key: str) -> Scored:
    return _mean(float(_mmmu_right(s[key])) for s in samples)


def _mmmu_right(item: Sample) -> bool:
    """As MMMU's own eval_utils.py (eval_multi_choice, eval_open) on the answers that lmms-eval parsed."""
    said = item["parsed_pred"][0]
    right = item["answer"] if isinstance(item["answer"], list) else [item["answer"]]
    if item["question_type"] == "multiple-choice":
        return said in right
    wanted = [form for answer in right for form in _mmmu_forms(answer)]
    texts = [form for form in wanted if isinstance(form, str)]
    return any(any(t in s for t in texts) if isinstance(s, str) else s in wanted for s in said)


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
