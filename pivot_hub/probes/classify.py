"""Linear classification on mean-pooled patch tokens, the regularisation chosen apart from the reported split."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from pivot_hub.data.image import image_files, open_image
from pivot_hub.data.shapes import COLOUR_NAMES, SHAPES, Scene, Split
from pivot_hub.errors import DataError, ProbeError
from pivot_hub.probes.features import FeatureModel, patch_features, pooled, standardised
from pivot_hub.probes.result import ProbeResult, balanced_accuracy, measure

CS = (0.001, 0.01, 0.1, 1.0)


def shapes_labels(scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
    """What is in each scene: colours (N, 14), shapes (N, 6) and positions (N, 9) present, as bool; count (N,)."""
    return {
        "colour": np.array([[any(t.colour == c for t in s.things) for c in COLOUR_NAMES] for s in scenes]),
        "shape": np.array([[any(t.shape == c for t in s.things) for c in SHAPES] for s in scenes]),
        "position": np.array([[any(t.position == c for t in s.things) for c in range(9)] for s in scenes]),
        "count": np.array([len(s.things) for s in scenes]),
    }


def classify_shapes(
    features: Mapping[Split, np.ndarray],
    scenes: Mapping[Split, Sequence[Scene]],
    conditions: dict[str, Any],
    seed: int = 0,
) -> list[ProbeResult]:
    """Probe a world's colours, shapes, positions and count from one pooled vector an image.

    Colour, shape and position are multi-label: for each value, is it in the scene? Balanced accuracy, averaged
    over values, has its chance at 50. Count is one label: accuracy, chance at the commonest count's share.

    Args:
        features: (N, D) pooled features of train, validation and test scenes.
        scenes: the same splits' scenes.
        conditions: encoder, encoder_sha256, feature_layer of the results.
    """
    scale = standardised(features["train"])
    x = {split: scale(f) for split, f in features.items()}
    y = {split: shapes_labels(s) for split, s in scenes.items()}
    results = []
    for task in ("colour", "shape", "position"):
        started = time.monotonic()
        best = max(CS, key=lambda c: _balanced(y["validation"][task], _fit_each(x, y, task, c, "validation")))
        predicted = _fit_each(x, y, task, best, "test")
        tallies = _tallies(y["test"][task], predicted)
        results.append(
            measure(
                f"shapes/{task}",
                "balanced_accuracy",
                tallies,
                protocol=f"mean-pooled, L2; a logistic regression for each value, C {best:g} by validation; chance 50",
                seed=seed,
                duration_s=time.monotonic() - started,
                **conditions,
            )
        )
    labels = {split: v["count"] for split, v in y.items()}
    results.append(_single_label("shapes/count", x, labels, conditions, seed))
    return results


def classify_folder(
    model: FeatureModel,
    image_processor: Any,
    folder: Path,
    conditions: dict[str, Any],
    seed: int = 0,
    on_bad_row: str = "stop",
) -> tuple[list[ProbeResult], list[str]]:
    """Probe on a folder of class folders: `train/CLASS/*` and `val/CLASS/*`, or `CLASS/*` split by seed.

    Returns:
        The result, and a sentence for each image that was skipped.

    Raises:
        ProbeError: fewer than two classes, or classes that differ between train and val.
        DataError: an image cannot be decoded and `on_bad_row` says stop.
    """
    files = _class_files(folder, seed)
    skipped: list[str] = []
    x: dict[Split, np.ndarray] = {}
    y: dict[Split, np.ndarray] = {}
    for split, items in files.items():
        images, labels = [], []
        for file, label in items:
            try:
                images.append(open_image(file, f"{split}/{label}"))
                labels.append(label)
            except DataError as error:
                if on_bad_row == "stop":
                    raise
                skipped.append(str(error))
        x[split] = pooled(patch_features(model, image_processor, images))
        y[split] = np.array(labels)
    scale = standardised(x["train"])
    x = {split: scale(f) for split, f in x.items()}
    return [_single_label(f"folder/{folder.name}", x, y, conditions, seed)], skipped


def _single_label(
    task: str, x: Mapping[Split, np.ndarray], y: Mapping[Split, np.ndarray], conditions: dict[str, Any], seed: int
) -> ProbeResult:
    started = time.monotonic()

    def correct(c: float, split: Split) -> np.ndarray:
        fitted = LogisticRegression(C=c, max_iter=1000).fit(x["train"], y["train"])
        return fitted.predict(x[split]) == y[split]

    best = max(CS, key=lambda c: correct(c, "validation").mean())
    hits = correct(best, "test").astype(np.float64)
    commonest = max(np.mean(y["test"] == label) for label in np.unique(y["train"]))
    return measure(
        task,
        "accuracy",
        hits,
        protocol=f"mean-pooled, L2; logistic regression, C {best:g} by validation; chance {100 * commonest:.1f}",
        seed=seed,
        duration_s=time.monotonic() - started,
        **conditions,
    )


def _fit_each(
    x: Mapping[Split, np.ndarray], y: Mapping[Split, dict[str, np.ndarray]], task: str, c: float, split: Split
) -> np.ndarray:
    """Predictions (N, values) of one balanced logistic regression a value."""
    columns = []
    for j in range(y["train"][task].shape[1]):
        fitted = LogisticRegression(C=c, class_weight="balanced", max_iter=1000)
        columns.append(fitted.fit(x["train"], y["train"][task][:, j]).predict(x[split]))
    return np.stack(columns, axis=1)


def _tallies(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """(N, 4, values): true positives, positives, true negatives, negatives of each item."""
    return np.stack([truth & predicted, truth, ~truth & ~predicted, ~truth], axis=1)


def _balanced(truth: np.ndarray, predicted: np.ndarray) -> float:
    return float(balanced_accuracy(_tallies(truth, predicted).sum(0, keepdims=True))[0])


def _class_files(folder: Path, seed: int) -> dict[Split, list[tuple[Path, str]]]:
    """Images with their class for train, validation and test."""
    named = {split: folder / split for split in ("train", "val") if (folder / split).is_dir()}
    listed = {split: _by_class(path) for split, path in (named or {"train": folder}).items()}
    train = listed.get("train", {})
    if len(train) < 2:
        raise ProbeError(f"{folder}: {len(train)} class folders with images; a probe needs at least two.")
    if "val" in listed and (odd := set(listed["val"]) ^ set(train)):
        raise ProbeError(f"{folder}: class {sorted(odd)[0]!r} is not in both train and val; remove or add it.")
    if small := [label for label, files in train.items() if len(files) < 3]:
        raise ProbeError(f"{folder}: class {small[0]!r} has fewer than 3 images; add some or remove the class.")
    rng = np.random.default_rng(seed)
    parts: dict[Split, list[tuple[Path, str]]] = {"train": [], "validation": [], "test": []}
    for label, files in train.items():
        order = [files[i] for i in rng.permutation(len(files))]
        fifth = max(1, len(order) // 5)
        cuts: dict[Split, list[Path]] = {"validation": order[:fifth], "train": order[fifth:]}
        if "val" not in listed:
            cuts = {"test": order[:fifth], "validation": order[fifth : 2 * fifth], "train": order[2 * fifth :]}
        for split, chosen in cuts.items():
            parts[split] += [(f, label) for f in sorted(chosen)]
    for label, files in listed.get("val", {}).items():
        parts["test"] += [(f, label) for f in files]
    return parts


def _by_class(folder: Path) -> dict[str, list[Path]]:
    classes = {}
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        files = image_files(path)
        if files:
            classes[path.name] = files
    return classes
