"""Our logistic regression reaches scikit-learn's optimum, at every C, on features of any shape, in blocks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from pivot_hub.bench.probe import KINDS, bench_probe, make_features, objective
from pivot_hub.errors import ProbeError
from pivot_hub.probes.classification import logistic
from pivot_hub.probes.classification.logistic import fit_logistic

CS = (0.01, 0.1, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_accuracy_are_scikit_learns_at_its_optimum(kind: str) -> None:
    x, y = make_features(kind, 1200, 24, 12)
    for fit in fit_logistic(x[:800], y[:800], CS):
        exact = LogisticRegression(C=fit.c, tol=1e-8, max_iter=20_000).fit(x[:800].astype(np.float64), y[:800])
        weight, bias = torch.from_numpy(exact.coef_), torch.from_numpy(exact.intercept_)
        theirs = objective(x[:800], y[:800], weight, bias, fit.c)
        assert objective(x[:800], y[:800], fit.weight, fit.bias, fit.c) == pytest.approx(theirs, abs=1e-4)
        assert fit.loss == pytest.approx(theirs, abs=1e-4)
        right = np.mean(fit.predict(x[800:]) == y[800:]), exact.score(x[800:], y[800:])
        assert right[0] == pytest.approx(right[1], abs=0.006)  # two of 400 near a boundary


def test_blocks_and_files_change_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x, y = make_features("correlated", 900, 16, 5)
    (whole,) = fit_logistic(x, y, [0.1], tolerance=1e-7)
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setattr(logistic, "CELLS", 1)  # blocks of 256 rows
    (parts,) = fit_logistic(np.load(tmp_path / "x.npy", mmap_mode="c"), y, [0.1], tolerance=1e-7)
    assert parts.loss == pytest.approx(whole.loss, abs=1e-6)
    assert torch.allclose(parts.weight, whole.weight, atol=2e-3)


def test_features_are_held_where_half_of_the_free_memory_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = make_features("random", 700, 16, 5)
    monkeypatch.setattr(logistic, "CELLS", 1)  # read in blocks of 256 rows
    held = logistic.resident(x, torch.device("cpu"))
    assert isinstance(held, torch.Tensor)
    assert torch.equal(held, torch.from_numpy(x))
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if "PAGES" in name else 2 * x.nbytes - 2)
    assert logistic.resident(x, torch.device("cpu")) is x


def test_a_chain_of_cs_ends_where_each_alone_does() -> None:
    x, y = make_features("correlated", 1500, 32, 20)
    cs = (0.01, 0.03, 0.1, 0.316, 1.0, 3.16)
    chain = fit_logistic(x, y, [3.16, *cs[:-1]])  # in any order
    assert [fit.c for fit in chain] == [3.16, *cs[:-1]]
    alone = [fit_logistic(x, y, [fit.c])[0] for fit in chain]
    for one, other in zip(chain, alone, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-4)


def test_a_fit_goes_on_from_another_ones_end() -> None:
    x, y = make_features("random", 1500, 32, 20)
    (first,) = fit_logistic(x, y, [1.0])
    (again,) = fit_logistic(x, y, [1.0], start=first)
    assert again.steps <= 1
    assert again.loss == pytest.approx(first.loss, abs=1e-5)


def test_classes_that_train_lacks_are_never_predicted() -> None:
    x, y = make_features("random", 300, 8, 3)
    (fit,) = fit_logistic(x, np.where(y == 1, 2, y), [1.0], classes=4)
    assert fit.weight.shape == (4, 8)
    assert set(np.unique(fit.predict(x))) <= {0, 2}


def test_bad_features_and_labels_are_named() -> None:
    x, y = make_features("random", 300, 8, 3)
    with pytest.raises(ProbeError, match="at least two"):
        fit_logistic(x, np.zeros(300, int), [1.0])
    with pytest.raises(ProbeError, match="300 rows of features for 299 labels"):
        fit_logistic(x, y[1:], [1.0])
    x[7, 3] = np.nan
    with pytest.raises(ProbeError, match="not finite"):
        fit_logistic(x, y, [1.0])


def test_a_fit_that_does_not_converge_says_so() -> None:
    x, y = make_features("correlated", 300, 8, 3)
    with pytest.raises(ProbeError, match="did not converge in 2 steps at C"):
        fit_logistic(x, y, [1.0], max_steps=2)


def test_the_benchmark_compares_both_on_the_same_features() -> None:
    lines: list[str] = []
    report = bench_probe(600, 12, 6, cs=(0.1, 1.0), kinds=("correlated",), log=lines.append)
    measured = report["features"]["correlated"]
    rounding = 0.005  # of the seconds, which are short here
    slowest, fastest = measured["sklearn_s"] + rounding, measured["sklearn_s"] - rounding
    assert fastest / (measured["pivot_s"] + rounding) - 0.01 <= measured["times_faster"]
    assert measured["times_faster"] <= slowest / max(measured["pivot_s"] - rounding, 1e-9) + 0.01
    assert set(measured["cs"]) == {"0.1", "1"}
    for both in measured["cs"].values():
        assert both["loss_above_ours"] > -1e-4
        assert both["pivot"]["steps"] > 0
    assert len(lines) == 4
    with pytest.raises(ProbeError, match="no 'tidy' features"):
        bench_probe(kinds=("tidy",))


def test_speeds_on_the_page_match_the_records() -> None:
    root = Path(__file__).parents[3]
    page = (root / "pivot_hub" / "probes" / "README.md").read_text()
    for kind in KINDS:
        record = json.loads((root / "recipes" / "bench" / f"probe-{kind}.json").read_text())
        assert (record["images"], record["width"], record["classes"]) == (50_000, 1152, 1000)
        times = record["features"][kind]
        cells = f"{len(times['cs'])} | {times['pivot_s']:.0f} s | {times['sklearn_s']:.0f} s | {times['times_faster']}"
        assert f"| {kind} | {cells} | " in page
        assert times["times_faster"] >= 5
        for both in times["cs"].values():
            assert both["loss_above_ours"] > -1e-4
    random = json.loads((root / "recipes" / "bench" / "probe-random.json").read_text())["features"]["random"]
    for both in random["cs"].values():
        assert abs(both["loss_above_ours"]) < 1e-4
        assert abs(both["pivot"]["accuracy"] - both["scikit-learn"]["accuracy"]) <= 0.1


def test_a_tolerance_below_float32_precision_still_terminates() -> None:
    x, y = make_features("correlated", 200, 96, 5)
    (fit,) = fit_logistic(x, y, [1.0], tolerance=1e-12)
    exact = LogisticRegression(C=1.0, tol=1e-8, max_iter=20_000).fit(x.astype(np.float64), y)
    theirs = objective(x, y, torch.from_numpy(exact.coef_), torch.from_numpy(exact.intercept_), 1.0)
    assert fit.loss == pytest.approx(theirs, abs=1e-5)
