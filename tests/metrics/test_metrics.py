"""Metrics: equal to torchmetrics and scikit-learn, intervals with the stated coverage, self-contained folders."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, jaccard_score, recall_score
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex, MulticlassRecall

from pivot_hub.metrics import METRICS, load_metric
from pivot_hub.metrics.mean_iou.mean_iou import count_pixels, mean_iou, mean_recall, pixel_accuracy
from pivot_hub.metrics.paired_bootstrap.paired_bootstrap import bootstrap, mean, paired_difference, resample

FOLDER = Path(__file__).parents[2] / "pivot_hub" / "metrics"


def _scored(scores: np.ndarray) -> np.ndarray:
    return np.stack([scores, np.ones(len(scores))], axis=1)


def _ids(seed: int, classes: int, high: int, ignored: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Draw random ids below `high`, more than half of them predicted correctly, a fifth ignored."""
    rng = np.random.default_rng(seed)
    true = rng.integers(high, size=(5, 13, 17))
    predicted = np.where(rng.random(true.shape) < 0.6, true, rng.integers(high, size=true.shape))
    if ignored is not None:
        true[rng.random(true.shape) < 0.2] = ignored
    return predicted, true


# Every class occurs; ignored ids are no class; an ignored id is a class; classes 5 to 7 never occur.
CASES = [(6, 6, None), (6, 6, 255), (6, 6, 2), (8, 5, None), (8, 5, 255)]


@pytest.mark.parametrize(("classes", "high", "ignored"), CASES)
def test_segmentation_scores_are_those_of_torchmetrics(classes: int, high: int, ignored: int | None) -> None:
    predicted, true = _ids(0, classes, high, ignored)
    sums = np.sum([count_pixels(p, t, classes, ignored) for p, t in zip(predicted, true, strict=True)], axis=0)[None]
    tensors = torch.from_numpy(predicted), torch.from_numpy(true)

    def theirs(kind: Any, average: Literal["macro", "micro"]) -> float:
        return float(kind(num_classes=classes, average=average, ignore_index=ignored)(*tensors))

    assert mean_iou(sums)[0] == pytest.approx(theirs(MulticlassJaccardIndex, "macro"), abs=1e-6)
    assert pixel_accuracy(sums)[0] == pytest.approx(theirs(MulticlassAccuracy, "micro"), abs=1e-6)
    if ignored != 2:  # torchmetrics scores an ignored class 0 where it is predicted, ours leaves it out
        assert mean_recall(sums)[0] == pytest.approx(theirs(MulticlassRecall, "macro"), abs=1e-6)
        assert mean_recall(sums)[0] == pytest.approx(theirs(MulticlassAccuracy, "macro"), abs=1e-6)


@pytest.mark.parametrize(("classes", "high", "ignored"), CASES)
def test_segmentation_scores_are_those_of_scikit_learn(classes: int, high: int, ignored: int | None) -> None:
    predicted, true = _ids(1, classes, high, ignored)
    sums = count_pixels(predicted, true, classes, ignored)[None]
    kept = true != ignored if ignored is not None else np.ones(true.shape, bool)
    p, t = predicted[kept], true[kept]
    labels = [c for c in range(high) if c != ignored]
    assert mean_iou(sums)[0] == pytest.approx(jaccard_score(t, p, labels=labels, average="macro"))
    assert mean_recall(sums)[0] == pytest.approx(recall_score(t, p, labels=labels, average="macro"))
    assert pixel_accuracy(sums)[0] == pytest.approx((p == t).mean())


def test_a_class_that_is_predicted_and_never_true() -> None:
    """Its IoU is 0 in all libraries; it has no recall, as in balanced_accuracy_score, but 0 in torchmetrics."""
    predicted, true = np.array([[0, 1, 2, 2]]), np.array([[0, 1, 1, 0]])
    sums = count_pixels(predicted, true, 3)[None]
    assert mean_iou(sums)[0] == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert mean_recall(sums)[0] == pytest.approx(balanced_accuracy_score(true[0], predicted[0]))
    theirs = MulticlassRecall(num_classes=3)(torch.from_numpy(predicted), torch.from_numpy(true))
    assert float(theirs) == pytest.approx(mean_recall(sums)[0] * 2 / 3)


def test_the_number_of_classes_changes_no_mean() -> None:
    predicted, true = _ids(2, 8, 5, 255)
    metric, images = load_metric("mean_iou"), {"predictions": predicted, "references": true, "ignore_index": 255}
    given, derived = metric.compute(**images, num_classes=8), metric.compute(**images)
    assert (len(given.pop("per_class_iou")), len(derived.pop("per_class_iou"))) == (8, 5)
    del given["per_class_recall"], derived["per_class_recall"]
    assert given == pytest.approx(derived)


def test_bad_ids_are_named() -> None:
    ids = np.array([0, 1, 7])
    with pytest.raises(ValueError, match="reference is class 7 of 3: raise num_classes or give ignore_index"):
        count_pixels(np.zeros(3, int), ids, 3)
    with pytest.raises(ValueError, match="prediction is class -1 of 3"):
        count_pixels(np.array([0, -1, 0]), np.zeros(3, int), 3)
    with pytest.raises(ValueError, match="the same pixels"):
        count_pixels(ids, ids[:2], 3)
    with pytest.raises(ValueError, match="no pixel is left"):
        load_metric("mean_iou").compute(predictions=[[[0]]], references=[[[255]]], ignore_index=255)
    with pytest.raises(ValueError, match="bring the map to the mask's size"):
        load_metric("energy_inside").compute(predictions=[[[0.5]]], references=[[[1, 0]]])
    with pytest.raises(ValueError, match="negative somewhere"):
        load_metric("energy_inside").compute(predictions=[[[-0.5]]], references=[[[1]]])
    with pytest.raises(ValueError, match="at least two"):
        load_metric("paired_bootstrap").compute(predictions=[1.0], references=[0.0])
    with pytest.raises(ValueError, match="it is one of mean_iou, pointing_accuracy"):
        load_metric("accuracy")


def test_interval_of_a_difference_covers_the_truth_about_as_often_as_stated() -> None:
    rng, covered, simulations = np.random.default_rng(0), 0, 300
    for seed in range(simulations):
        hard = rng.normal(size=120)  # shared by both: some items are hard for everyone
        first, second = (hard + rng.normal(gap, 0.7, size=120) for gap in (0.2, 0.0))
        difference = paired_difference(_scored(first), _scored(second), mean, seed, draws=400)
        assert difference.ci95[0] <= difference.value <= difference.ci95[1]
        covered += difference.ci95[0] <= 0.2 <= difference.ci95[1]
    assert 0.91 <= covered / simulations <= 0.98


def test_p_values_of_no_difference_are_about_uniform() -> None:
    rng, simulations = np.random.default_rng(1), 300
    values = []
    for seed in range(simulations):
        hard = rng.normal(size=120)
        first, second = (hard + rng.normal(0, 0.7, size=120) for _ in range(2))
        values.append(paired_difference(_scored(first), _scored(second), mean, seed, draws=400).p_value)
    for share in (0.05, 0.25, 0.5, 0.75):
        spread = 3 * np.sqrt(share * (1 - share) / simulations)
        assert np.mean(np.array(values) <= share) == pytest.approx(share, abs=spread + 0.01)
    assert min(values) >= 1 / 401


def test_pairing_narrows_the_interval_of_correlated_scores() -> None:
    rng = np.random.default_rng(2)
    hard = rng.normal(size=200)
    first, second = (_scored(hard + rng.normal(gap, 0.3, size=200)) for gap in (0.1, 0.0))
    paired = paired_difference(first, second, mean, 0, draws=2000)
    apart = mean(resample(first, 0, 2000)) - mean(resample(second, 1, 2000))
    low, high = np.percentile(apart, [2.5, 97.5])
    assert paired.ci95[1] - paired.ci95[0] < 0.5 * (high - low)
    assert paired.p_value < 0.01
    assert low < 0 < high


def test_equal_scores_differ_by_nothing_and_seeds_repeat() -> None:
    scores = _scored(np.random.default_rng(3).random(50))
    none = paired_difference(scores, scores, mean, 0, draws=200)
    assert (none.value, none.ci95, none.p_value) == (0.0, (0.0, 0.0), 1.0)
    other = _scored(np.random.default_rng(4).random(50))
    assert paired_difference(scores, other, mean, 7) == paired_difference(scores, other, mean, 7)
    there, back = paired_difference(scores, other, mean, 7), paired_difference(other, scores, mean, 7)
    assert there.value == pytest.approx(-back.value)
    assert there.p_value == back.p_value


def test_a_difference_of_mean_iou_takes_its_per_example_scores() -> None:
    predicted, true = _ids(5, 4, 4)
    good = np.stack([count_pixels(t, t, 4) for t in true])
    fair = np.stack([count_pixels(p, t, 4) for p, t in zip(predicted, true, strict=True)])
    difference = paired_difference(good, fair, mean_iou, 0, draws=200)
    assert difference.value == pytest.approx(1 - mean_iou(fair.sum(0)[None])[0])
    assert difference.ci95[0] > 0


def test_resamples_in_blocks_are_those_of_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    example_scores = np.random.default_rng(0).random((2_600_000, 1))  # 3 draws per block
    drawn = resample(example_scores, 5, 4)
    rng = np.random.default_rng(5)
    counts = rng.multinomial(len(example_scores), np.full(len(example_scores), 1 / len(example_scores)), size=4)
    assert np.allclose(drawn, counts @ example_scores)
    value, (low, high) = bootstrap(_scored(example_scores[:500, 0]), mean, 0)
    assert low < value < high


def _example(name: str) -> tuple[str, str]:
    """Return the code of a README's example, and the result in its comment."""
    code = re.search(r"```python\n(.*?)```", (FOLDER / name / "README.md").read_text(), re.DOTALL)
    assert code is not None
    lines = code[1].splitlines()
    expected = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    return "\n".join(lines).replace("metric.compute", "result = metric.compute"), expected


@pytest.mark.parametrize("name", METRICS)
def test_readme_examples_give_the_results_in_their_comments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parents[1])
    code, expected = _example(name)
    names: dict[str, Any] = {}
    exec(code, names)
    assert isinstance(names["metric"], evaluate.Metric)
    assert str(names["result"]) == expected


def test_metrics_are_self_contained(tmp_path: Path) -> None:
    """Copies of the folders load without pivot_hub, and each is a Space whose app launches evaluate's widget."""
    for name in METRICS:
        folder = tmp_path / name
        shutil.copytree(FOLDER / name, folder)
        imported = set()
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                imported |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).split(".")[0])
        assert imported - set(sys.stdlib_module_names) == {"datasets", "evaluate", "numpy"}
        header = (folder / "README.md").read_text().split("---")[1]
        assert "sdk: gradio" in header
        assert "app_file: app.py" in header
    widget = (
        "import sys, runpy, evaluate.utils; sys.modules['pivot_hub'] = None\n"
        "evaluate.utils.launch_gradio_widget = lambda metric: print(metric.name)\n"
        "for name in sys.argv[1:]: runpy.run_path(f'{name}/app.py')\n"
    )
    command = [sys.executable, "-c", widget, *METRICS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(METRICS)
