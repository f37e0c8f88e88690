"""Classification on frozen features: the built-in world's attributes, and classes of labelled images."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from pivot_hub.data.synthetic import COLOUR_NAMES, SHAPES, Scene
from pivot_hub.encoder.encode import Progress
from pivot_hub.errors import ProbeError
from pivot_hub.probes.classification.attention_pooling import RATES, AttentionPool, fit_attention, predict_attention
from pivot_hub.probes.classification.labelled_images import ClassData, Part, data_sha256
from pivot_hub.probes.classification.logistic import Logistic, fit_logistic
from pivot_hub.probes.features import BLOCK, Features, Pooled, cached_features, standardised
from pivot_hub.probes.result import ProbeResult, balanced_accuracy, measure

WORLD_CS = (0.001, 0.01, 0.1, 1.0)  # of standardised features
CS = (0.01, 0.03, 0.1, 0.316, 1.0, 3.16)  # the paper's, of features of length 1
NEIGHBOURS = (1, 5, 10, 20, 50, 100)
PER_CLASS = 50  # images that "fast" fits, and at most that settings are chosen on
PROTOCOLS = ("prototypes", "fast", "full", "knn", "attention")


def shapes_labels(scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
    """What is in each scene: colours (N, 14), shapes (N, 6) and positions (N, 9) present, as bool; count (N,)."""
    return {
        "colour": np.array([[any(t.colour == c for t in s.objects) for c in COLOUR_NAMES] for s in scenes]),
        "shape": np.array([[any(t.shape == c for t in s.objects) for c in SHAPES] for s in scenes]),
        "position": np.array([[any(t.position == c for t in s.objects) for c in range(9)] for s in scenes]),
        "count": np.array([len(s.objects) for s in scenes]),
    }


def classify_shapes(
    features: Mapping[str, np.ndarray],
    scenes: Mapping[str, Sequence[Scene]],
    conditions: dict[str, Any],
    seed: int = 0,
) -> list[ProbeResult]:
    """Probe a world's colours, shapes, positions and count from one pooled vector an image.

    Colour, shape and position are multi-label: for each value, is it in the scene? Balanced accuracy, averaged
    over values, has its chance at 50. Count is one label: accuracy, chance at the commonest count's share.

    Args:
        features: (N, D) pooled features of train, validation and test scenes. Any other name is of scenes of another
            world, on which the same fitted probes are tested, count apart: their tasks are `shapes/<name>/<task>`.
        scenes: the same parts' scenes.
        conditions: encoder, encoder_sha256, feature_layer of the results.
    """
    scale = standardised(features["train"])
    x = {part: scale(f) for part, f in features.items()}
    y = {part: shapes_labels(s) for part, s in scenes.items()}
    tested = [part for part in features if part not in ("train", "validation")]
    results = []
    for task in ("colour", "shape", "position"):
        started = time.monotonic()
        fits = {c: _fit_each(x["train"], y["train"][task], c) for c in WORLD_CS}
        best = max(WORLD_CS, key=lambda c: _balanced(y["validation"][task], _predict_each(fits[c], x["validation"])))
        duration = time.monotonic() - started
        results += [
            measure(
                f"shapes/{task}" if part == "test" else f"shapes/{part}/{task}",
                "balanced_accuracy",
                _example_scores(y[part][task], _predict_each(fits[best], x[part])),
                protocol=f"mean-pooled, L2; a logistic regression for each value, C {best:g} by validation; chance 50",
                seed=seed,
                duration_s=duration,
                **conditions,
            )
            for part in tested
        ]
    started = time.monotonic()
    labels = {part: v["count"] for part, v in y.items()}
    counted = fit_logistic(x["train"], labels["train"], WORLD_CS, tolerance=1e-6)
    fit = max(counted, key=lambda f: np.mean(f.predict(x["validation"]) == labels["validation"]))
    commonest = max(np.mean(labels["test"] == label) for label in np.unique(labels["train"]))
    return [
        *results,
        measure(
            "shapes/count",
            "accuracy",
            (fit.predict(x["test"]) == labels["test"]).astype(np.float64),
            protocol=f"mean-pooled, L2; logistic regression, C {fit.c:g} by validation; chance {100 * commonest:.1f}",
            seed=seed,
            duration_s=time.monotonic() - started,
            **conditions,
        ),
    ]


@dataclass(frozen=True)
class Classifier:
    """A probe whose settings are all chosen: predicts class numbers (N,) of features it has not seen."""

    protocol: str
    predict: Callable[[Features], np.ndarray]
    duration_s: float


def classify_images(
    model: Any,
    image_processor: Any,
    data: ClassData,
    metadata: dict[str, Any],
    protocols: Sequence[str] = PROTOCOLS,
    seed: int = 0,
    dtype: str = "float32",
    on_bad_row: str = "stop",
    cache: Path | None = None,
    workers: int | None = None,
    progress: Progress = lambda done, total, rate: None,
) -> tuple[list[ProbeResult], list[str]]:
    """Probe on labelled images. The reported part is read when every probe is fitted and every setting chosen.

    - prototypes: the class whose mean feature is nearest (the paper's "faster").
    - fast: logistic regression on 50 images of each class.
    - full: logistic regression on all of train (the paper's "slow").
    - knn: votes of the nearest images of train, by similarity (DINO's weights, temperature 0.07).
    - attention: attention pooling of all patch tokens, on the images of fast.

    Features are mean-pooled and L2-normalised. C, neighbours and learning rate are chosen on a held-out part of train:
    a fifth of each class, at most 50 images; full is then fitted again on all of train.

    Args:
        model: the encoder.
        image_processor: its own.
        data: the images.
        facts: encoder and encoder_sha256 of the results.
        protocols: of PROTOCOLS.
        seed: of samples and bootstrap.
        dtype: the encoder computes in.
        on_bad_row: stop at an image that cannot be decoded, or skip it.
        cache, workers, progress: of features, see `cached_features`.

    Returns:
        A result for each protocol, and a sentence for each image that was skipped.

    Raises:
        ProbeError: a protocol is unknown, or the data cannot be probed.
        DataError: an image cannot be decoded and `on_bad_row` says stop.
    """
    if unknown := set(protocols) - set(PROTOCOLS):
        raise ProbeError(f"there is no protocol {min(unknown)!r}; give some of {', '.join(PROTOCOLS)}.")

    def read(part: Part, tokens: bool) -> Features:
        return cached_features(
            model,
            image_processor,
            data.part(part),
            metadata,
            on_bad_row,
            tokens=tokens,
            dtype=dtype,
            cache=cache,
            workers=workers,
            progress=progress,
        )

    device, classes = model.device, len(data.classes)
    pooled_protocols = [p for p in protocols if p != "attention"]
    fitted: dict[str, Classifier] = {}
    skipped: list[str] = []
    if pooled_protocols:
        train = read("train", False)
        skipped += train.skipped
        pools = Pools.draw(train.labels, seed)
        for protocol in pooled_protocols:
            fitted[protocol] = FITTERS[protocol](train, pools, classes, device)
    if "attention" in protocols:
        train = read("train", True)
        skipped += train.skipped
        fitted["attention"] = _attention(train, Pools.draw(train.labels, seed), classes, device, seed)
    # Everything is chosen: only now is the reported part read.
    results, conditions = [], {**metadata, "feature_layer": model.config.pivot["feature_layer"]}
    sha256 = data_sha256(data)
    for protocol in protocols:
        test = read("test", protocol == "attention")
        skipped += test.skipped
        started, classifier = time.monotonic(), fitted[protocol]
        hits = (classifier.predict(test) == test.labels).astype(np.float64)
        commonest = np.bincount(test.labels).max() / len(test)
        results.append(
            measure(
                f"{data.name}/{protocol}",
                "accuracy",
                hits,
                protocol=f"{classifier.protocol}; chance {100 * commonest:.1f}",
                split="val",
                seed=seed,
                duration_s=classifier.duration_s + time.monotonic() - started,
                data_sha256=sha256,
                **conditions,
            )
        )
    return results, list(dict.fromkeys(skipped))


@dataclass(frozen=True)
class Pools:
    """Rows of train: all, those that settings are chosen on, the rest, and at most 50 a class of the rest."""

    all: np.ndarray
    held_out: np.ndarray
    rest: np.ndarray
    few: np.ndarray

    @classmethod
    def draw(cls, labels: np.ndarray, seed: int) -> Pools:
        rng = np.random.default_rng(seed)
        held, few = [], []
        for label in np.unique(labels):
            order = rng.permutation(np.flatnonzero(labels == label))
            if len(order) < 2:
                raise ProbeError(
                    f"a class has {len(order)} image to train on, and settings are chosen on others: add some."
                )
            cut = min(PER_CLASS, max(1, len(order) // 5))
            held.append(order[:cut])
            few.append(order[cut : cut + PER_CLASS])
        held_out = np.sort(np.concatenate(held))
        return cls(
            np.arange(len(labels)),
            held_out,
            np.setdiff1d(np.arange(len(labels)), held_out),
            np.sort(np.concatenate(few)),
        )


def _prototypes(train: Features, pools: Pools, classes: int, device: torch.device) -> Classifier:
    started = time.monotonic()
    x = Pooled(train.values, pools.all)
    sums = np.zeros((classes, x.shape[1]))
    for start in range(0, len(x), BLOCK):
        np.add.at(sums, train.labels[start : start + BLOCK], x[start : start + BLOCK])
    means = torch.from_numpy(sums / np.linalg.norm(sums, axis=1, keepdims=True)).float().to(device)
    how = f"mean-pooled, L2; nearest of {classes} class means, cosine"
    return Classifier(
        how, lambda f: _choose_each(_whole(f), lambda x: (x @ means.T).argmax(1), device), time.monotonic() - started
    )


def _fast(train: Features, pools: Pools, classes: int, device: torch.device) -> Classifier:
    started = time.monotonic()
    fits = fit_logistic(Pooled(train.values, pools.few), train.labels[pools.few], CS, classes, device=device)
    best = _best(fits, train, pools)
    most = np.bincount(train.labels[pools.few]).max()
    how = f"mean-pooled, L2; logistic regression on {most} images a class, C {best.c:g} chosen on held-out train"
    return Classifier(how, lambda f: best.predict(_whole(f)), time.monotonic() - started)


def _full(train: Features, pools: Pools, classes: int, device: torch.device) -> Classifier:
    started = time.monotonic()
    fits = fit_logistic(Pooled(train.values, pools.rest), train.labels[pools.rest], CS, classes, device=device)
    best = _best(fits, train, pools)
    all_of_it = Pooled(train.values, pools.all)
    (final,) = fit_logistic(all_of_it, train.labels, [best.c], classes, start=best, device=device)
    how = (
        f"mean-pooled, L2; logistic regression on all {len(pools.all)} images of train, C {best.c:g} chosen on "
        "held-out train"
    )
    return Classifier(how, lambda f: final.predict(_whole(f)), time.monotonic() - started)


def _best(fits: Sequence[Logistic], train: Features, pools: Pools) -> Logistic:
    """The fit that is right most often on the held-out part; of equals the one with the strongest penalty."""
    held = Pooled(train.values, pools.held_out)
    return max(fits, key=lambda fit: (np.mean(fit.predict(held) == train.labels[pools.held_out]), -fit.c))


def _knn(train: Features, pools: Pools, classes: int, device: torch.device) -> Classifier:
    started = time.monotonic()

    def votes(bank: np.ndarray, neighbours: Sequence[int], x: torch.Tensor) -> torch.Tensor:
        """(B, D) -> (len(neighbours), B): the class with most votes, for each number of neighbours."""
        most = min(max(neighbours), len(bank))
        near, labels = torch.full((len(x), 0), 0.0), torch.zeros(len(x), 0, dtype=torch.long)
        near, labels = near.to(device), labels.to(device)
        known = Pooled(train.values, bank)
        for start in range(0, len(bank), BLOCK):
            some = slice(start, start + BLOCK)
            near = torch.cat([near, x @ torch.from_numpy(known[some]).to(device).T], 1)
            own = torch.from_numpy(train.labels[bank[some]]).to(device)
            labels = torch.cat([labels, own.expand(len(x), -1)], 1)
            near, where = near.topk(min(most, near.shape[1]), dim=1)
            labels = labels.gather(1, where)
        weights = (near / 0.07).exp()
        made = []
        for k in neighbours:
            counted = torch.zeros(len(x), classes, device=device)
            made.append(counted.scatter_add_(1, labels[:, :k], weights[:, :k]).argmax(1))
        return torch.stack(made)

    held = _choose_each(Pooled(train.values, pools.held_out), lambda x: votes(pools.rest, NEIGHBOURS, x), device)
    right = (held == train.labels[pools.held_out]).mean(1)
    best = NEIGHBOURS[int(right.argmax())]
    how = f"mean-pooled, L2; votes of the {best} nearest of train, chosen on held-out train"

    def predict(features: Features) -> np.ndarray:
        return _choose_each(_whole(features), lambda x: votes(pools.all, [best], x), device)[0]

    return Classifier(how, predict, time.monotonic() - started)


def _attention(train: Features, pools: Pools, classes: int, device: torch.device, seed: int) -> Classifier:
    started = time.monotonic()

    def right(model: AttentionPool) -> float:
        return float(np.mean(predict_attention(model, train.values, pools.held_out) == train.labels[pools.held_out]))

    models = {r: fit_attention(train.values, train.labels, pools.few, classes, r, seed, device) for r in RATES}
    best = max(RATES, key=lambda r: (right(models[r]), -r))
    most = np.bincount(train.labels[pools.few]).max()
    how = f"attention pooling of patch tokens, {most} images a class, rate {best:g} chosen on held-out train"

    def predict(features: Features) -> np.ndarray:
        return predict_attention(models[best], features.values, np.arange(len(features)))

    return Classifier(how, predict, time.monotonic() - started)


FITTERS = {"prototypes": _prototypes, "fast": _fast, "full": _full, "knn": _knn}


def _whole(features: Features) -> Pooled:
    return Pooled(features.values, np.arange(len(features)))


def _choose_each(
    x: Pooled, choose: Callable[[torch.Tensor], torch.Tensor], device: torch.device, rows: int = 1024
) -> np.ndarray:
    """Apply a choice of classes (B, D) -> (..., B) block by block: (..., N)."""
    parts = [choose(torch.from_numpy(x[s : s + rows]).to(device)).cpu() for s in range(0, len(x), rows)]
    return torch.cat(parts, dim=-1).numpy()


def _fit_each(x: np.ndarray, y: np.ndarray, c: float) -> list[LogisticRegression]:
    """One balanced logistic regression for each column of (N, values) labels.

    On one thread: products this small wait longer for a second one than they take, nine times longer on two busy cores.
    """
    with threadpool_limits(1, "blas"):
        return [LogisticRegression(C=c, class_weight="balanced", max_iter=1000).fit(x, column) for column in y.T]


def _predict_each(fits: Sequence[LogisticRegression], x: np.ndarray) -> np.ndarray:
    """(N, values) bool."""
    return np.stack([fit.predict(x) for fit in fits], axis=1)


def _example_scores(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """(N, 4, values): true positives, positives, true negatives, negatives of each item."""
    return np.stack([truth & predicted, truth, ~truth & ~predicted, ~truth], axis=1)


def _balanced(truth: np.ndarray, predicted: np.ndarray) -> float:
    return float(balanced_accuracy(_example_scores(truth, predicted).sum(0, keepdims=True))[0])
