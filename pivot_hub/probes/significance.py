"""Comparisons of encoders: the same test items, paired bootstrap, p-values corrected over all that is compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from rich.box import SIMPLE
from rich.table import Table

from pivot_hub.errors import ProbeError
from pivot_hub.metrics.paired_bootstrap.paired_bootstrap import Difference, paired_difference, resample
from pivot_hub.probes.result import ProbeResult, read_results, statistic_of

LEVEL = 0.05  # of the corrected p-values
NONE_SHOWN = "no difference shown"


@dataclass(frozen=True)
class Comparison:
    """One probe of two encoders.

    Args:
        task, metric, n: see ProbeResult; n items are the pairs.
        first, other: names of the encoders.
        first_value, other_value: in percent.
        difference: other minus first, in points.
        ci95: paired bootstrap interval of the difference.
        p: two-sided, from the same bootstrap.
        p_holm: corrected over all comparisons that were made together (Holm, 1979).
        verdict: which is better, or that no difference is shown, at 5% by `p_holm`.
    """

    task: str
    metric: str
    n: int
    first: str
    other: str
    first_value: float
    other_value: float
    difference: float
    ci95: tuple[float, float]
    p: float
    p_holm: float
    verdict: str


@dataclass(frozen=True)
class Comparisons:
    """Every probe that encoders have in common, each against the first."""

    encoders: list[str]
    rows: list[Comparison]
    draws: int
    seed: int
    seeds: int | None = None  # trainings of each encoder, where there are several

    def table(self) -> Table:
        table = Table(box=SIMPLE, title=f"Against {self.encoders[0]}, percent", title_justify="left")
        for column in self._header():
            table.add_column(column, no_wrap=True)
        for cells in self._cells():
            table.add_row(*cells)
        return table

    def markdown(self) -> str:
        header = self._header()
        lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
        lines += [f"| {' | '.join(cells)} |" for cells in self._cells()]
        return "\n".join([*lines, "", self.method(), ""])

    def method(self) -> str:
        """How the numbers came about, in two sentences."""
        if self.seeds is not None:
            return (
                f"Differences are means over {self.seeds} training seeds, each of the same test items, with 95% "
                f"intervals and two-sided p-values of a t-test whose variance is that between seeds and that of "
                f"{self.draws} paired bootstrap draws of the items, seed {self.seed}. p is corrected by Holm's method "
                f"over the {len(self.rows)} comparisons; a difference is called below 0.05."
            )
        return (
            f"Differences are of the same test items, with 95% intervals and two-sided p-values of {self.draws} paired "
            f"bootstrap draws, seed {self.seed}; they say nothing of other seeds, of training or of a probe's own fit. "
            f"p is corrected by Holm's method over the {len(self.rows)} comparisons; a difference is called below 0.05."
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "method": self.method()}

    def _header(self) -> list[str]:
        return ["probe", "metric", self.encoders[0], "encoder", "value", "difference [95%]", "p (Holm)", "verdict"]

    def _cells(self) -> list[list[str]]:
        return [
            [
                *(r.task, r.metric, f"{r.first_value:.1f}", r.other, f"{r.other_value:.1f}"),
                f"{r.difference:+.1f} [{r.ci95[0]:+.1f}, {r.ci95[1]:+.1f}]",
                f"{r.p_holm:.3f}",
                r.verdict,
            ]
            for r in self.rows
        ]


def compare_results(results: Mapping[str, Sequence[ProbeResult]], draws: int = 10_000, seed: int = 0) -> Comparisons:
    """Compare encoders with the first on every task and metric that they share.

    Args:
        results: of each encoder, by name, with tallies.
        draws: of the bootstrap.
        seed: of it.

    Raises:
        ProbeError: fewer than two encoders, nothing shared, other data or seeds, or results without tallies.
    """
    if len(results) < 2:
        raise ProbeError("a comparison needs two encoders or more; give another one.")
    names = list(results)
    found = {name: {(r.task, r.metric): r for r in some} for name, some in results.items()}
    pairs = []
    for other in names[1:]:
        for key, first in found[names[0]].items():
            if key in found[other]:
                _check_pair(names[0], first, other, found[other][key])
                pairs.append((other, first, found[other][key]))
    if not pairs:
        raise ProbeError(f"{' and '.join(names)} share no task; run the same probes on each.")
    measured = [
        paired_difference(_example_scores(b), _example_scores(a), statistic_of(a.metric), seed, draws)
        for _, a, b in pairs
    ]
    values = [(a.value, b.value) for _, a, b in pairs]
    return Comparisons(names, _compared(names[0], pairs, values, measured), draws, seed)


def compare_seeds(
    results: Mapping[str, Mapping[str, Sequence[ProbeResult]]], draws: int = 2000, seed: int = 0
) -> Comparisons:
    """Compare encoders that were trained once for each seed with the first, seed by seed.

    Args:
        results: of each encoder by name, and of each training by its seed's name.
        draws: of the bootstrap.
        seed: of it.

    Raises:
        ProbeError: as `compare_results`, or two encoders share fewer than two seeds.
    """
    if len(results) < 2:
        raise ProbeError("a comparison needs two encoders or more; give another one.")
    names = list(results)
    pairs, values, measured, fewest = [], [], [], None
    for other in names[1:]:
        shared = [s for s in results[names[0]] if s in results[other]]
        if len(shared) < 2:
            raise ProbeError(f"{names[0]} and {other} share {len(shared)} seed(s): a comparison needs two or more.")
        fewest = min(len(shared), fewest or len(shared))
        firsts, others = (
            [{(r.task, r.metric): r for r in results[name][s]} for s in shared] for name in (names[0], other)
        )
        for key in firsts[0]:
            if not all(key in some for some in (*firsts, *others)):
                continue
            for a, b in zip(firsts, others, strict=True):
                _check_pair(names[0], a[key], other, b[key])
            statistic = statistic_of(key[1])
            drawn = [
                [100 * statistic(resample(_example_scores(some[key]), seed, draws)) for some in side]
                for side in (firsts, others)
            ]
            scores = np.array([[some[key].value for some in side] for side in (firsts, others)])
            made = seed_difference(scores[0], scores[1], np.array(drawn[0]), np.array(drawn[1]))
            low, high = made.ci95
            measured.append(Difference(made.value / 100, (low / 100, high / 100), made.p_value))
            pairs.append((other, firsts[0][key], others[0][key]))
            values.append((float(scores[0].mean()), float(scores[1].mean())))
    if not pairs:
        raise ProbeError(f"{' and '.join(names)} share no task; run the same probes on each.")
    return Comparisons(names, _compared(names[0], pairs, values, measured), draws, seed, fewest)


def read_seeds(folders: Sequence[str]) -> dict[str, dict[str, list[ProbeResult]]] | None:
    """Results of encoders that were trained once for each seed, from a study's folders of `seed-<n>.json`.

    Returns:
        By the folder's name and the file's; None where none of the folders is one.

    Raises:
        ProbeError: some are such folders and some are not, or two have one name.
    """
    found = {folder: sorted(Path(folder).glob("seed-*.json")) for folder in folders}
    if not any(found.values()):
        return None
    if lacking := [folder for folder, files in found.items() if not files]:
        raise ProbeError(f"{lacking[0]} holds no seed-<n>.json, as the others do; compare folders of one kind.")
    names = [Path(folder).name for folder in folders]
    if len(set(names)) < len(names):
        raise ProbeError("two folders have one name; rename one, so that a table can tell them.")
    return {
        name: {file.stem: read_results(file) for file in found[folder]}
        for name, folder in zip(names, folders, strict=True)
    }


def seed_difference(
    first: np.ndarray, other: np.ndarray, first_draws: np.ndarray | None, other_draws: np.ndarray | None
) -> Difference:
    """How far one encoder's score lies above another's, over training seeds and test items.

    Its variance is that of the mean over seeds, plus that of the test items, which all seeds share: what seeds and
    items vary together is in both, so the interval errs on the wide side. Degrees of freedom are Satterthwaite's.

    Args:
        first: (S,) scores of each seed.
        other: (S,) of the same seeds.
        first_draws: (S, draws) of resampled items, the same resamples for all; None for what is not of items.
        other_draws: likewise.

    Returns:
        `other` minus `first`, in the scores' unit.
    """
    each = other - first
    seeds, value = len(each), float(np.mean(each))
    between = float(np.var(each, ddof=1)) / seeds
    items, draws = 0.0, 2
    if first_draws is not None and other_draws is not None:
        drawn = (other_draws - first_draws).mean(0)
        drawn = drawn[np.isfinite(drawn)]
        items, draws = float(np.var(drawn, ddof=1)), len(drawn)
    variance = between + items
    if variance < 1e-18:  # nothing varies: of equal scores, or of one part that neither trained
        return Difference(value, (value, value), 1.0 if abs(value) < 1e-9 else 0.0)
    freedom = variance**2 / (between**2 / (seeds - 1) + items**2 / (draws - 1))
    half = float(scipy.stats.t.ppf(0.975, freedom)) * variance**0.5
    p = 2 * float(scipy.stats.t.sf(abs(value) / variance**0.5, freedom))
    return Difference(value, (value - half, value + half), p)


def _compared(
    first: str,
    pairs: Sequence[tuple[str, ProbeResult, ProbeResult]],
    values: Sequence[tuple[float, float]],
    measured: Sequence[Difference],
) -> list[Comparison]:
    """Rows of a table, with p corrected over all of them."""
    corrected = holm([made.p_value for made in measured])
    rows = []
    for (other, a, _), (before, after), made, p_holm in zip(pairs, values, measured, corrected, strict=True):
        better = other if made.value > 0 else first
        rows.append(
            Comparison(
                task=a.task,
                metric=a.metric,
                n=a.n,
                first=first,
                other=other,
                first_value=before,
                other_value=after,
                difference=100 * made.value,
                ci95=(100 * made.ci95[0], 100 * made.ci95[1]),
                p=made.p_value,
                p_holm=p_holm,
                verdict=f"{better} better" if p_holm < LEVEL else NONE_SHOWN,
            )
        )
    return rows


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values that are below a level together keep the family's error below it."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate([(len(p) - i) * p[j] for i, j in enumerate(order)])
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(stepped, 1)
    return [float(value) for value in corrected]


def draw_comparisons(made: Comparisons, path: Path) -> None:
    """Draw each difference with its interval, a panel an encoder; those that are called are filled."""
    from matplotlib.figure import Figure  # not pyplot: no display and no global state are needed

    others = made.encoders[1:]
    rows = {other: [r for r in made.rows if r.other == other] for other in others}
    height = 1.3 + 0.24 * max(map(len, rows.values()))
    figure = Figure(figsize=(3.6 + 3.6 * len(others), height))
    for ax, other in zip(figure.subplots(1, len(others), squeeze=False, sharey=True)[0], others, strict=True):
        for y, r in enumerate(rows[other]):
            called = r.verdict != NONE_SHOWN
            ax.plot(r.ci95, (y, y), color="#33608c", linewidth=1.6)
            ax.plot(r.difference, y, "o", color="#33608c", markerfacecolor="#33608c" if called else "white")
        ax.axvline(0, color="#888888", linewidth=0.8)
        ax.set_title(f"{other} minus {made.encoders[0]}", fontsize=9)
        ax.set_xlabel("points", fontsize=8)
        ax.tick_params(labelsize=7.5)
        ax.set_yticks(range(len(rows[other])), [f"{r.task}: {r.metric}" for r in rows[other]])
        ax.set_ylim(len(rows[other]) - 0.5, -0.5)
    figure.text(0.01, 0.01, "filled: a difference at 5% after Holm's correction", fontsize=7)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def _check_pair(first: str, a: ProbeResult, other: str, b: ProbeResult) -> None:
    for what in ("n", "split", "seed", "data_sha256"):
        if getattr(a, what) != getattr(b, what):
            raise ProbeError(
                f"{a.task}: {first} and {other} differ in {what}, so their test items are no pairs; probe both on the "
                "same data with the same seed."
            )


def _example_scores(result: ProbeResult) -> np.ndarray:
    if result.example_scores is None:
        raise ProbeError(
            f"{result.task} of {result.encoder} has no tallies (.npz) beside its JSON; write it anew with `--json`."
        )
    return result.example_scores
