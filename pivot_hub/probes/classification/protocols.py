"""Classification on frozen features: attributes of the synthetic Shapes dataset, and classes of labelled images."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from pivot_hub.config.data_section import OnBadRow
from pivot_hub.data.synthetic import COLOUR_NAMES, SHAPES, Scene
from pivot_hub.errors import ProbeError
from pivot_hub.probes.classification.attention_pooling import (
    LEARNING_RATES,
    AttentionPool,
    fit_attention,
    predict_attention,
)
from pivot_hub.probes.classification.labelled_images import PARTS, ClassData, Part, count_copies, data_sha256
from pivot_hub.probes.classification.logistic import Logistic, Rows, fit_logistic, resident
from pivot_hub.probes.features import (
    BLOCK,
    CUDA_BLOCK,
    EncodingOptions,
    Features,
    Pooled,
    cache_share,
    cached_digests,
    cached_features,
    standardised,
)
from pivot_hub.probes.grid import Choice, choose, described
from pivot_hub.probes.result import ProbeResult, balanced_accuracy, measure

SHAPES_CS = (0.001, 0.01, 0.1, 1.0)  # for standardised features
CS = (0.01, 0.03, 0.1, 0.316, 1.0, 3.16)  # from the paper, for features of length 1
NEIGHBOURS = (1, 5, 10, 20, 50, 100)
PER_CLASS = 50  # images per class that "fast" is fitted on, and the most that settings are chosen on
BALANCED = "mean_class_accuracy"  # the balanced accuracy of scikit-learn
PROTOCOLS = ("prototypes", "fast", "full", "knn", "attention")


def shapes_labels(scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
    """Label each scene with its colours (N, 14), shapes (N, 6) and positions (N, 9) as bool, and its count (N,)."""
    return {
        "colour": np.array([[any(o.colour == c for o in s.objects) for c in COLOUR_NAMES] for s in scenes]),
        "shape": np.array([[any(o.shape == c for o in s.objects) for c in SHAPES] for s in scenes]),
        "position": np.array([[any(o.position == c for o in s.objects) for c in range(9)] for s in scenes]),
        "count": np.array([len(s.objects) for s in scenes]),
    }


def classify_shapes(
    features: Mapping[str, np.ndarray],
    scenes: Mapping[str, Sequence[Scene]],
    conditions: dict[str, Any],
    seed: int = 0,
) -> list[ProbeResult]:
    """Probe the colours, shapes, positions and number of objects of scenes from one pooled vector per image.

    Colour, shape and position are multi-label: each value is in the scene or not. The metric is balanced accuracy,
    averaged over values, whose chance level is 50. Count has one label per scene: the metric is accuracy, whose chance
    level is the share of the commonest count.

    Args:
        features: (N, D) pooled features of train, validation and test scenes. Any other name belongs to scenes of
            another dataset, on which the same fitted probes except count are tested. Their tasks are
            `shapes/<name>/<task>`.
        scenes: Scenes of the same parts.
        conditions: Fields of the results: encoder, encoder_sha256, feature_layer.
        seed: Seed of the bootstrap.
    """
    scale = standardised(features["train"])
    x = {part: scale(f) for part, f in features.items()}
    y = {part: shapes_labels(s) for part, s in scenes.items()}
    tested = [part for part in features if part not in ("train", "validation")]
    results = []
    for task in ("colour", "shape", "position"):
        started = time.monotonic()
        fits = {c: _fit_each(x["train"], y["train"][task], c) for c in SHAPES_CS}
        best = max(SHAPES_CS, key=lambda c: _balanced(y["validation"][task], _predict_each(fits[c], x["validation"])))
        chosen = described(best, best in (SHAPES_CS[0], SHAPES_CS[-1]))
        duration = time.monotonic() - started
        results += [
            measure(
                f"shapes/{task}" if part == "test" else f"shapes/{part}/{task}",
                "balanced_accuracy",
                _example_scores(y[part][task], _predict_each(fits[best], x[part])),
                protocol=f"mean-pooled, L2; a logistic regression for each value, C {chosen} by validation; chance 50",
                seed=seed,
                duration_s=duration,
                **conditions,
            )
            for part in tested
        ]
    started = time.monotonic()
    labels = {part: v["count"] for part, v in y.items()}
    counted = fit_logistic(x["train"], labels["train"], SHAPES_CS, tolerance=1e-6)
    fit = max(counted, key=lambda f: np.mean(f.predict(x["validation"]) == labels["validation"]))
    chosen = described(fit.c, fit.c in (SHAPES_CS[0], SHAPES_CS[-1]))
    commonest = max(np.mean(labels["test"] == label) for label in np.unique(labels["train"]))
    return [
        *results,
        measure(
            "shapes/count",
            "accuracy",
            (fit.predict(x["test"]) == labels["test"]).astype(np.float64),
            protocol=f"mean-pooled, L2; logistic regression, C {chosen} by validation; chance {100 * commonest:.1f}",
            seed=seed,
            duration_s=time.monotonic() - started,
            **conditions,
        ),
    ]


@dataclass(frozen=True)
class Classifier:
    """A fitted probe whose settings are all chosen; it predicts class numbers (N,) for new features."""

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
    on_bad_row: OnBadRow = OnBadRow.STOP,
    encoding: EncodingOptions = EncodingOptions(),
    warn: Callable[[str], None] = lambda line: None,
) -> tuple[list[ProbeResult], list[str]]:
    """Probe labelled images. The reported part is read after every probe is fitted and every setting is chosen.

    - prototypes: the class whose mean feature is nearest (the paper's "faster").
    - fast: logistic regression on 50 images of each class.
    - full: logistic regression on all of train (the paper's "slow").
    - knn: votes of the nearest train images, weighted by similarity (DINO's weights, temperature 0.07).
    - attention: attention pooling of all patch tokens, on the images of fast.

    Features are mean-pooled and L2-normalised. C, neighbours and learning rate are chosen on a held-out part of train:
    a fifth of each class, at most 50 images. Full is then fitted again on all of train. The grids of C and of learning
    rates are continued where their end is chosen; a protocol says if the end is chosen nevertheless.

    If the classes of the reported part differ in size, the mean accuracy of the classes (the balanced accuracy) is
    reported beside the accuracy. The protocol says how many reported images are copies of train's.

    Args:
        model: The encoder.
        image_processor: Image processor of the encoder.
        data: The labelled images.
        metadata: Fields of the results: encoder and encoder_sha256.
        protocols: Names from PROTOCOLS.
        seed: Seed of the samples and of the bootstrap.
        on_bad_row: Whether an image that cannot be decoded raises an error, or is skipped and reported.
        encoding: How images are encoded.
        warn: Function that receives a warning if reported images are copies of train's.

    Returns:
        The results of each protocol, and one error message for each image that was skipped.

    Raises:
        ProbeError: A protocol is unknown or does not fit the encoder, or the data cannot be probed.
        DataError: An image cannot be decoded and `on_bad_row` is STOP.
    """
    check_protocols(protocols, model, metadata["encoder"])
    skipped: list[str] = []

    def read(part: Part, tokens: bool) -> Features:
        features = cached_features(model, image_processor, data.part(part), metadata, on_bad_row, tokens, encoding)
        skipped.extend(features.skipped)
        return features

    classifiers = _fit_classifiers(read, protocols, len(data.classes), model.device, seed)
    # Every setting is chosen. Only now is the reported part read.
    digests = {part: cached_digests(data.part(part).images, encoding) for part in PARTS}
    conditions = {
        **metadata,
        "feature_layer": model.config.pivot["feature_layer"],
        "data_sha256": data_sha256(data, digests),
    }
    about = "; one image in five of each class is reported, drawn by the seed" if data.drawn else ""
    if copies := count_copies(digests):
        note = f"{copies} of the {len(digests['test'])} reported images are copies of images of train"
        warn(f"{data.name}: {note}, which raises the accuracy; remove them.")
        about += f"; {note}"
    results = []
    for protocol in protocols:
        test = read("test", protocol == "attention")
        started, classifier = time.monotonic(), classifiers[protocol]
        hits = (classifier.predict(test) == test.labels).astype(np.float64)
        sizes = np.bincount(test.labels)
        present = sizes[sizes > 0]
        metrics = [("accuracy", hits, f"chance {100 * present.max() / len(test):.1f}{about}")]
        if present.min() < present.max():
            # The mean over items with these weights is the mean over classes.
            weights = len(test) / (len(present) * sizes[test.labels])
            weighted = np.stack([hits * weights, weights], axis=1)
            metrics.append((BALANCED, weighted, f"mean over classes; chance {100 / len(present):.1f}{about}"))
        results += [
            measure(
                f"{data.name}/{protocol}",
                metric,
                scores,
                protocol=f"{classifier.protocol}; {described_chance}",
                split="val",
                seed=seed,
                duration_s=classifier.duration_s + time.monotonic() - started,
                **conditions,
            )
            for metric, scores, described_chance in metrics
        ]
    return results, list(dict.fromkeys(skipped))


def check_protocols(protocols: Sequence[str], model: Any, encoder: str) -> None:
    """Refuse protocols that are unknown or do not fit the encoder.

    Args:
        protocols: Names of protocols.
        model: The encoder.
        encoder: Its name.

    Raises:
        ProbeError: The message names the protocol.
    """
    if unknown := set(protocols) - set(PROTOCOLS):
        raise ProbeError(f"there is no protocol {min(unknown)!r}; give some of {', '.join(PROTOCOLS)}.")
    if "attention" in protocols and model.config.image_size is None:
        raise ProbeError(
            f"{encoder}: attention pooling needs the same number of patch tokens for each image, and this is a tower "
            "of native resolution; leave attention out of the protocols."
        )


def cache_shares(
    model: Any,
    image_processor: Any,
    data: ClassData,
    metadata: dict[str, Any],
    protocols: Sequence[str],
    encoding: EncodingOptions,
) -> None:
    """Compute this process's share of the features that `classify_images` then reads from the cache.

    Args:
        model: The encoder.
        image_processor: Image processor of the encoder.
        data: The labelled images.
        metadata: Fields of the results: encoder and encoder_sha256.
        protocols: Names from PROTOCOLS.
        encoding: How images are encoded.

    Raises:
        ProbeError: A protocol is unknown or does not fit the encoder, or a feature is not finite.
    """
    check_protocols(protocols, model, metadata["encoder"])
    for part in PARTS:
        for tokens in sorted({protocol == "attention" for protocol in protocols}):
            cache_share(model, image_processor, data.part(part).images, metadata, tokens, encoding)


def _fit_classifiers(
    read: Callable[[Part, bool], Features], protocols: Sequence[str], classes: int, device: torch.device, seed: int
) -> dict[str, Classifier]:
    """Fit the classifier of each protocol on train; features are read once as pooled vectors and once as tokens."""
    classifiers: dict[str, Classifier] = {}
    pooled_protocols = [p for p in protocols if p != "attention"]
    if pooled_protocols:
        train = read("train", False)
        pools = Pools.draw(train.labels, seed)
        for protocol in pooled_protocols:
            classifiers[protocol] = FITTERS[protocol](train, pools, classes, device)
    if "attention" in protocols:
        train = read("train", True)
        classifiers["attention"] = _attention(train, Pools.draw(train.labels, seed), classes, device, seed)
    return classifiers


@dataclass(frozen=True)
class Pools:
    """Rows of train: all, the held-out ones that settings are chosen on, the rest, and at most 50 per class of it."""

    all: np.ndarray
    held_out: np.ndarray
    rest: np.ndarray
    few: np.ndarray

    @classmethod
    def draw(cls, labels: np.ndarray, seed: int) -> Pools:
        rng = np.random.default_rng(seed)
        held_out_parts, few_parts = [], []
        for label in np.unique(labels):
            order = rng.permutation(np.flatnonzero(labels == label))
            if len(order) < 2:
                raise ProbeError(
                    f"a class has {len(order)} image to train on, and settings are chosen on others: add images."
                )
            cut = min(PER_CLASS, max(1, len(order) // 5))
            held_out_parts.append(order[:cut])
            few_parts.append(order[cut : cut + PER_CLASS])
        held_out = np.sort(np.concatenate(held_out_parts))
        return cls(
            np.arange(len(labels)),
            held_out,
            np.setdiff1d(np.arange(len(labels)), held_out),
            np.sort(np.concatenate(few_parts)),
        )


def _prototypes(train: Features, pools: Pools, classes: int, device: torch.device) -> Classifier:
    started = time.monotonic()
    x = Pooled(train.values, pools.all)
    sums = np.zeros((classes, x.shape[1]))
    for start in range(0, len(x), BLOCK):
        np.add.at(sums, train.labels[start : start + BLOCK], x[start : start + BLOCK])
    means = torch.from_numpy(sums / np.linalg.norm(sums, axis=1, keepdims=True)).float().to(device)
    protocol = f"mean-pooled, L2; nearest of {classes} class means, cosine"

    def predict(features: Features) -> np.ndarray:
        return _choose_each(_whole(features), lambda x: (x @ means.T).argmax(1), device)

    return Classifier(protocol, predict, time.monotonic() - started)


def _fast(train: Features, pools: Pools, classes: int, device: torch.device) -> Classifier:
    started = time.monotonic()
    best = _choose_c(train, pools, pools.few, classes, device)
    most = np.bincount(train.labels[pools.few]).max()
    protocol = f"mean-pooled, L2; logistic regression on {most} images a class, C {best} chosen on held-out train"
    return Classifier(protocol, lambda f: best.fit.predict(_whole(f)), time.monotonic() - started)


def _full(train: Features, pools: Pools, classes: int, device: torch.device) -> Classifier:
    started = time.monotonic()
    best = _choose_c(train, pools, pools.rest, classes, device)
    all_features = Pooled(train.values, pools.all)
    (final,) = fit_logistic(all_features, train.labels, [best.value], classes, start=best.fit, device=device)
    protocol = (
        f"mean-pooled, L2; logistic regression on all {len(pools.all)} images of train, C {best} chosen on "
        "held-out train"
    )
    return Classifier(protocol, lambda f: final.predict(_whole(f)), time.monotonic() - started)


def _choose_c(train: Features, pools: Pools, rows: np.ndarray, classes: int, device: torch.device) -> Choice[Logistic]:
    """Choose the C with the best accuracy on the held-out part; among equals, the one with the strongest penalty."""
    x, y = Pooled(train.values, rows), train.labels[rows]
    held_out = Pooled(train.values, pools.held_out)
    last: list[Logistic] = []  # the fits of the largest C so far, from which a larger one starts

    def fit(cs: Sequence[float]) -> Sequence[Logistic]:
        start = last[-1] if last and min(cs) > last[-1].c else None
        fits = fit_logistic(x, y, cs, classes, start=start, device=device)
        last.extend(f for f in fits if not last or f.c > last[-1].c)
        return fits

    return choose(CS, fit, lambda f: float(np.mean(f.predict(held_out) == train.labels[pools.held_out])))


def _knn(train: Features, pools: Pools, classes: int, device: torch.device) -> Classifier:
    started = time.monotonic()

    def bank_of(rows: np.ndarray) -> tuple[Rows, torch.Tensor]:
        """Return the features and labels that may vote, the features normalised once where memory holds them."""
        return resident(Pooled(train.values, rows), device), torch.from_numpy(train.labels[rows]).to(device)

    def votes(bank: tuple[Rows, torch.Tensor], neighbours: Sequence[int], x: torch.Tensor) -> torch.Tensor:
        """Find the class with the most votes, for each number of neighbours: (B, D) -> (len(neighbours), B)."""
        known, known_labels = bank
        most = min(max(neighbours), len(known))
        near, labels = torch.full((len(x), 0), 0.0), torch.zeros(len(x), 0, dtype=torch.long)
        near, labels = near.to(device), labels.to(device)
        rows = CUDA_BLOCK if device.type == "cuda" else BLOCK
        for start in range(0, len(known), rows):
            block = slice(start, start + rows)
            near = torch.cat([near, x @ torch.as_tensor(known[block], device=device).T], 1)
            labels = torch.cat([labels, known_labels[block].expand(len(x), -1)], 1)
            near, where = near.topk(min(most, near.shape[1]), dim=1)
            labels = labels.gather(1, where)
        weights = (near / 0.07).exp()
        winners = []
        for k in neighbours:
            summed = torch.zeros(len(x), classes, device=device)
            winners.append(summed.scatter_add_(1, labels[:, :k], weights[:, :k]).argmax(1))
        return torch.stack(winners)

    held_out = Pooled(train.values, pools.held_out)
    rest = bank_of(pools.rest)
    predicted = _choose_each(held_out, lambda x: votes(rest, NEIGHBOURS, x), device)
    accuracy = (predicted == train.labels[pools.held_out]).mean(1)
    best = NEIGHBOURS[int(accuracy.argmax())]
    number = described(best, best == NEIGHBOURS[-1] < len(pools.rest))
    protocol = f"mean-pooled, L2; votes of the {number} nearest of train, chosen on held-out train"

    def predict(features: Features) -> np.ndarray:
        everything = bank_of(pools.all)
        return _choose_each(_whole(features), lambda x: votes(everything, [best], x), device)[0]

    return Classifier(protocol, predict, time.monotonic() - started)


def _attention(train: Features, pools: Pools, classes: int, device: torch.device, seed: int) -> Classifier:
    started = time.monotonic()

    def accuracy(model: AttentionPool) -> float:
        return float(np.mean(predict_attention(model, train.values, pools.held_out) == train.labels[pools.held_out]))

    def fit(learning_rates: Sequence[float]) -> list[AttentionPool]:
        rows = pools.few
        return [fit_attention(train.values, train.labels, rows, classes, r, seed, device) for r in learning_rates]

    best = choose(LEARNING_RATES, fit, accuracy)
    most = np.bincount(train.labels[pools.few]).max()
    protocol = (
        f"attention pooling of patch tokens, {most} images a class, learning rate {best} chosen on held-out train"
    )

    def predict(features: Features) -> np.ndarray:
        return predict_attention(best.fit, features.values, np.arange(len(features)))

    return Classifier(protocol, predict, time.monotonic() - started)


FITTERS = {"prototypes": _prototypes, "fast": _fast, "full": _full, "knn": _knn}


def _whole(features: Features) -> Pooled:
    return Pooled(features.values, np.arange(len(features)))


def _choose_each(
    x: Pooled, choose: Callable[[torch.Tensor], torch.Tensor], device: torch.device, rows: int = 1024
) -> np.ndarray:
    """Apply a function that chooses classes, (B, D) -> (..., B), block by block: (..., N)."""
    parts = [choose(torch.from_numpy(x[s : s + rows]).to(device)).cpu() for s in range(0, len(x), rows)]
    return torch.cat(parts, dim=-1).numpy()


def _fit_each(x: np.ndarray, y: np.ndarray, c: float) -> list[LogisticRegression]:
    """Fit one balanced logistic regression for each column of (N, values) labels.

    The fits use one thread: for products this small, waiting for a second thread takes longer than the product itself
    (nine times longer on two busy cores).
    """
    with threadpool_limits(1, "blas"):
        return [LogisticRegression(C=c, class_weight="balanced", max_iter=1000).fit(x, column) for column in y.T]


def _predict_each(fits: Sequence[LogisticRegression], x: np.ndarray) -> np.ndarray:
    """Predict each value: (N, values) bool."""
    return np.stack([fit.predict(x) for fit in fits], axis=1)


def _example_scores(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Count true positives, positives, true negatives and negatives of each item: (N, 4, values)."""
    return np.stack([truth & predicted, truth, ~truth & ~predicted, ~truth], axis=1)


def _balanced(truth: np.ndarray, predicted: np.ndarray) -> float:
    return float(balanced_accuracy(_example_scores(truth, predicted).sum(0, keepdims=True))[0])
