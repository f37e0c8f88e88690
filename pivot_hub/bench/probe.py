"""The package's logistic regression compared with scikit-learn's: the same features and values of C, in one run."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from pivot_hub.errors import ProbeError
from pivot_hub.probes.classification.logistic import CELLS, fit_logistic
from pivot_hub.provenance import machine, versions

KINDS = ("random", "correlated")
TEST_ROWS = 5000  # rows that are not fitted, on which accuracy is measured
LabelledFeatures = tuple[np.ndarray, np.ndarray]  # features (rows, width) float32 and labels (rows,)


def bench_probe(
    images: int = 50_000,
    width: int = 1152,
    classes: int = 1000,
    cs: Sequence[float] = (0.01, 0.03, 0.1, 0.316, 1, 3.16),
    tolerance: float = 1e-6,
    max_iter: int = 100,
    kinds: Sequence[str] = KINDS,
    device: str | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Fit every C with both implementations, and compare time, loss and accuracy.

    `random` features are class means with independent noise. `correlated` features are the same along random directions
    whose standard deviation falls as 1/rank, far from the origin, as an encoder's features are. The variance of both is
    1 on average.

    Args:
        images: Rows that are fitted.
        width: Width of a feature.
        classes: Number of classes.
        cs: Inverse penalties; the default is the paper's list. The package fits them as one chain. scikit-learn fits
            each one from zero, because it offers no other way.
        tolerance: scikit-learn's `tol`: it stops where no element of the gradient is larger. The default of
            scikit-learn, 1e-4, suits few classes; with a thousand classes it stops before the optimum.
        max_iter: scikit-learn's `max_iter`; 100 is its default.
        kinds: Kinds of features, out of `KINDS`.
        device: Device of the package's implementation; a GPU by default if there is one. scikit-learn computes on the
            CPU.
        log: Callback that receives one line for each fit.

    Returns:
        For each kind the seconds of both and their ratio; for each C the steps, the loss (mean cross-entropy plus
        penalty over `C * images`, in float64) and the accuracy on further rows, of both.

    Raises:
        ProbeError: A kind is unknown.
    """
    if unknown := set(kinds) - set(KINDS):
        raise ProbeError(f"there are no {min(unknown)!r} features; give some of {', '.join(KINDS)}.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    comparisons = {}
    for kind in kinds:
        x, y = make_features(kind, images + TEST_ROWS, width, classes)
        train, test = (x[:images], y[:images]), (x[images:], y[images:])
        pivot_s, pivot = _fit_pivot(train, test, cs, classes, device)
        log(f"{kind}: pivot {pivot_s:.1f} s for {len(cs)} Cs, {sum(fit['steps'] for fit in pivot.values())} steps")
        sklearn_s, sklearn = _fit_sklearn(train, test, cs, tolerance, max_iter)
        by_c = {c: _compare_fits(pivot[c], sklearn[c]) for c in pivot}
        for c, fits in by_c.items():
            log(
                f"{kind}: scikit-learn {sklearn[c]['seconds']:.1f} s, {sklearn[c]['steps']} steps at C {c}, its loss "
                f"{fits['loss_above_ours']:+.1e} from pivot's, accuracy {sklearn[c]['accuracy']:.2f} and "
                f"{pivot[c]['accuracy']:.2f}"
            )
        comparisons[kind] = {
            "pivot_s": round(pivot_s, 2),
            "sklearn_s": round(sklearn_s, 2),
            "times_faster": round(sklearn_s / pivot_s, 2),
            "cs": by_c,
        }
        log(f"{kind}: {sklearn_s / pivot_s:.1f} times faster")
    return {
        "benchmark": "probe",
        "images": images,
        "width": width,
        "classes": classes,
        "device": device,
        "sklearn": {"tol": tolerance, "max_iter": max_iter},
        "features": comparisons,
        "machine": machine(),
        "versions": versions(),
    }


def _fit_pivot(
    train: LabelledFeatures, test: LabelledFeatures, cs: Sequence[float], classes: int, device: str
) -> tuple[float, dict[str, dict[str, Any]]]:
    """Fit all Cs with this package: seconds in total, and steps, loss and accuracy of each C."""
    began = time.perf_counter()
    fits = fit_logistic(*train, cs, classes, device=device)
    seconds = time.perf_counter() - began
    records = {}
    for fit in fits:
        loss = objective(*train, fit.weight, fit.bias, fit.c)
        accuracy = 100 * float((fit.predict(test[0]) == test[1]).mean())
        records[f"{fit.c:g}"] = {"steps": fit.steps, "loss": loss, "accuracy": accuracy}
    return seconds, records


def _fit_sklearn(
    train: LabelledFeatures, test: LabelledFeatures, cs: Sequence[float], tolerance: float, max_iter: int
) -> tuple[float, dict[str, dict[str, Any]]]:
    """Fit each C with scikit-learn: seconds in total, and steps, loss, accuracy and seconds of each C."""
    total, records = 0.0, {}
    for c in cs:
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the loss tells whether the fit converged
            fitted = LogisticRegression(C=c, tol=tolerance, max_iter=max_iter).fit(*train)
        seconds = time.perf_counter() - began
        total += seconds
        weight, bias = (torch.from_numpy(np.asarray(w, np.float32)) for w in (fitted.coef_, fitted.intercept_))
        records[f"{c:g}"] = {
            "steps": int(fitted.n_iter_[0]),
            "loss": objective(*train, weight, bias, c),
            "accuracy": 100 * float((fitted.predict(test[0]) == test[1]).mean()),
            "seconds": round(seconds, 2),
        }
    return total, records


def _compare_fits(pivot: dict[str, Any], sklearn: dict[str, Any]) -> dict[str, Any]:
    return {"pivot": pivot, "scikit-learn": sklearn, "loss_above_ours": sklearn["loss"] - pivot["loss"]}


def make_features(kind: str, rows: int, width: int, classes: int, seed: int = 0) -> LabelledFeatures:
    """Draw features of a kind with their labels: class means and noise, as `bench_probe` describes.

    Args:
        kind: An entry of `KINDS`.
        rows: Number of features.
        width: Width of a feature.
        classes: Number of classes.
        seed: Seed of features and labels.

    Returns:
        Features (rows, width) float32 and labels (rows,).
    """
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=rows)
    means = rng.standard_normal((classes, width), np.float32)
    x = rng.standard_normal((rows, width), np.float32)
    x *= 0.25 * width**0.5
    x += means[y]
    if kind == "correlated":
        x *= np.arange(1, width + 1, dtype=np.float32) ** -1
        x = x @ np.linalg.qr(rng.standard_normal((width, width)))[0].astype(np.float32)
    x /= np.sqrt(x.var(axis=0).mean())
    if kind == "correlated":
        x += 3 * rng.standard_normal(width, np.float32)
    return x, y


def objective(x: np.ndarray, y: np.ndarray, weight: torch.Tensor, bias: torch.Tensor, c: float) -> float:
    """Compute in float64 what both implementations minimise: mean cross-entropy plus `||weight||^2 / (2 C N)`.

    Args:
        x: Features (N, width).
        y: Labels (N,).
        weight: Weights (classes, width).
        bias: Biases (classes,).
        c: Inverse penalty.
    """
    total, rows = 0.0, max(1, CELLS // len(bias))
    for start in range(0, len(x), rows):
        chunk = slice(start, start + rows)
        logits = torch.from_numpy(x[chunk]).double() @ weight.double().T + bias.double()
        total += torch.nn.functional.cross_entropy(logits, torch.from_numpy(y[chunk]), reduction="sum").item()
    return (total + weight.double().square().sum().item() / (2 * c)) / len(x)
