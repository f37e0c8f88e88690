"""Our logistic regression against scikit-learn's: the same features, the same Cs, in one run."""

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
TEST = 5000  # further rows, for accuracy


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
    """Fit every C by both, and compare time, loss and accuracy.

    `random` features are class means and independent noise; `correlated` ones are the same along random directions
    whose spread falls as 1/rank, far from the origin, as an encoder's are. Both have a variance of 1 on average.

    Args:
        images: rows that are fitted.
        width: of a feature.
        classes: as many as there are means.
        cs: inverse penalties, the paper's; ours are one chain, scikit-learn's a fit each from zero, as it offers.
        tolerance: of scikit-learn: it stops where no element of the gradient is larger. Its default, 1e-4, is for few
            classes: with a thousand it stops in front of the optimum.
        max_iter: of scikit-learn, 100 by its default.
        kinds: of KINDS.
        device: of ours; a GPU where there is one. scikit-learn computes on the CPU.
        say: called with a line a fit.

    Returns:
        For each kind the seconds of both and their ratio; for each C the steps, the loss (mean cross-entropy plus
        penalty over `C * images`, in float64) and the accuracy on further rows, of both.

    Raises:
        ProbeError: a kind is unknown.
    """
    if unknown := set(kinds) - set(KINDS):
        raise ProbeError(f"there are no {min(unknown)!r} features; give some of {', '.join(KINDS)}.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    measured = {}
    for kind in kinds:
        x, y = make_features(kind, images + TEST, width, classes)
        train, test = (x[:images], y[:images]), (x[images:], y[images:])

        began = time.perf_counter()
        fits = fit_logistic(*train, cs, classes, device=device)
        ours_s = time.perf_counter() - began
        each: dict[str, Any] = {}
        for fit in fits:
            loss = objective(*train, fit.weight, fit.bias, fit.c)
            accuracy = 100 * float((fit.predict(test[0]) == test[1]).mean())
            each[f"{fit.c:g}"] = {"pivot": {"steps": fit.steps, "loss": loss, "accuracy": accuracy}}
        log(f"{kind}: ours {ours_s:.1f} s for {len(cs)} Cs, {sum(f.steps for f in fits)} steps")

        sklearn_s = 0.0
        for c in cs:
            began = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # whether it converged is in its loss
                fitted = LogisticRegression(C=c, tol=tolerance, max_iter=max_iter).fit(*train)
            seconds = time.perf_counter() - began
            sklearn_s += seconds
            weight, bias = (torch.from_numpy(np.asarray(w, np.float32)) for w in (fitted.coef_, fitted.intercept_))
            theirs = {
                "steps": int(fitted.n_iter_[0]),
                "loss": objective(*train, weight, bias, c),
                "accuracy": 100 * float((fitted.predict(test[0]) == test[1]).mean()),
                "seconds": round(seconds, 2),
            }
            own = each[f"{c:g}"]
            own |= {"scikit-learn": theirs, "loss_above_ours": theirs["loss"] - own["pivot"]["loss"]}
            log(
                f"{kind}: scikit-learn {seconds:.1f} s, {theirs['steps']} steps at C {c:g}, its loss "
                f"{own['loss_above_ours']:+.1e} from ours, accuracy {theirs['accuracy']:.2f} and "
                f"{own['pivot']['accuracy']:.2f}"
            )
        measured[kind] = {
            "pivot_s": round(ours_s, 2),
            "sklearn_s": round(sklearn_s, 2),
            "times_faster": round(sklearn_s / ours_s, 2),
            "cs": each,
        }
        log(f"{kind}: {sklearn_s / ours_s:.1f} times faster")
    return {
        "benchmark": "probe",
        "images": images,
        "width": width,
        "classes": classes,
        "device": device,
        "sklearn": {"tol": tolerance, "max_iter": max_iter},
        "features": measured,
        "machine": machine(),
        "versions": versions(),
    }


def make_features(kind: str, rows: int, width: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features (rows, width) float32 with labels (rows,): class means and noise, see `bench_probe`."""
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
    """What both minimise, in float64: mean cross-entropy plus `||weight||^2 / (2 C N)`."""
    total, rows = 0.0, max(1, CELLS // len(bias))
    for start in range(0, len(x), rows):
        some = slice(start, start + rows)
        logits = torch.from_numpy(x[some]).double() @ weight.double().T + bias.double()
        total += torch.nn.functional.cross_entropy(logits, torch.from_numpy(y[some]), reduction="sum").item()
    return (total + weight.double().square().sum().item() / (2 * c)) / len(x)
