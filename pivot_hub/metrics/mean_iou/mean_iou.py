"""Mean IoU, mean recall and pixel accuracy of segmentations, from correct, predicted and true pixels of each class."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np


def count_pixels(predicted: np.ndarray, true: np.ndarray, classes: int, ignore_index: int | None = None) -> np.ndarray:
    """Count correct, predicted and true pixels of each class in one image.

    Args:
        predicted: Predicted class ids, of any shape.
        true: True class ids, of the same shape.
        classes: Number of classes; ids are below it.
        ignore_index: True id of pixels that are not counted. If it is a class, that class has no score.

    Returns:
        (3, classes) int64 per-example scores; the scores of several images add up.

    Raises:
        ValueError: The shapes differ, or an id is no class.
    """
    if predicted.shape != true.shape:
        raise ValueError(f"predictions are {predicted.shape} and references {true.shape}: give ids of the same pixels.")
    kept = np.ones(true.shape, bool) if ignore_index is None else true != ignore_index
    p, t = predicted[kept], true[kept]
    for name, ids in (("prediction", p), ("reference", t)):
        if ids.size and (ids.min() < 0 or ids.max() >= classes):
            worst = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(f"a {name} is class {worst} of {classes}: raise num_classes or give ignore_index.")
    counts = np.stack([np.bincount(ids, minlength=classes) for ids in (t[p == t], p, t)])
    if ignore_index is not None and 0 <= ignore_index < classes:
        counts[:, ignore_index] = 0
    return counts


def class_iou(sums: np.ndarray) -> np.ndarray:
    """(draws, 3, classes) correct, predicted and true pixels -> (draws, classes); NaN if a class never occurs."""
    return _over(sums[:, 0], sums[:, 1] + sums[:, 2] - sums[:, 0])


def class_recall(sums: np.ndarray) -> np.ndarray:
    """(draws, 3, classes) correct, predicted and true pixels -> (draws, classes); NaN if a class is never true."""
    return _over(sums[:, 0], sums[:, 2])


def mean_iou(sums: np.ndarray) -> np.ndarray:
    """(draws, 3, classes) correct, predicted and true pixels -> (draws,).

    Classes that are neither predicted nor true are left out, as in the macro averages of torchmetrics' JaccardIndex
    and scikit-learn's jaccard_score.
    """
    return np.nanmean(class_iou(sums), axis=1)


def mean_recall(sums: np.ndarray) -> np.ndarray:
    """(draws, 3, classes) correct, predicted and true pixels -> (draws,).

    Classes that are never true have no recall and are left out, as in scikit-learn's balanced_accuracy_score. The
    macro averages of torchmetrics' MulticlassRecall and MulticlassAccuracy and of scikit-learn's recall_score count
    such a class as 0 if it is predicted anywhere. They agree with this function if every class is true somewhere.
    """
    return np.nanmean(class_recall(sums), axis=1)


def pixel_accuracy(sums: np.ndarray) -> np.ndarray:
    """(draws, 3, classes) correct, predicted and true pixels -> (draws,)."""
    return sums[:, 0].sum(1) / sums[:, 2].sum(1)


def _over(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return part / whole


class MeanIou(evaluate.Metric):
    """Mean IoU, mean recall, pixel accuracy and values of each class, over all pixels of all images."""

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description="Segmentation: mean IoU, mean recall, pixel accuracy, and IoU and recall of each class, over "
            "the pixels of all images together. Classes that never occur are left out of the means.",
            citation="",
            inputs_description="predictions and references: class ids, (H, W) of each image. num_classes: number "
            "of classes; by default the largest id is the last class. ignore_index: true id of pixels not counted.",
            features=datasets.Features({"predictions": ids, "references": ids}),
            reference_urls=["https://arxiv.org/abs/1608.05442"],
        )

    def _compute(
        self, predictions: Any, references: Any, num_classes: int | None = None, ignore_index: int | None = None
    ) -> dict[str, Any]:
        predicted, true = ([np.asarray(ids) for ids in images] for images in (predictions, references))
        if num_classes is None:  # classes that never occur are left out of the means
            present = np.unique([i for ids in (*predicted, *true) for i in np.unique(ids) if i != ignore_index])
            num_classes = 1 + int(present.max(initial=0))
        pairs = zip(predicted, true, strict=True)
        example_scores = [count_pixels(p, t, num_classes, ignore_index) for p, t in pairs]
        sums = np.sum(example_scores, axis=0)[None]
        if not sums[:, 2].any():
            raise ValueError("no pixel is left to score: every reference is ignore_index, or there is none.")
        return {
            "mean_iou": float(mean_iou(sums)[0]),
            "mean_recall": float(mean_recall(sums)[0]),
            "pixel_accuracy": float(pixel_accuracy(sums)[0]),
            "per_class_iou": class_iou(sums)[0].tolist(),
            "per_class_recall": class_recall(sums)[0].tolist(),
        }
