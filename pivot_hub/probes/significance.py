"""Comparisons of encoders on the same test items, by paired bootstrap with corrected p-values."""

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

LEVEL = 0.05  # significance level for corrected p-values
NONE_SHOWN = "no difference shown"


@dataclass(frozen=True)
class Comparison:
    """Comparison of two encoders on one probe.

    Args:
        task: Task of the results, see `ProbeResult`.
        metric: Metric of the results.
        n: Number of test items that both encoders were measured on.
        first: Name of the first encoder.
        other: Name of the other encoder.
        first_value: Value of the first encoder, in percent.
        other_value: Value of the other encoder, in percent.
        difference: `other_value` minus `first_value`, in points.
        ci95: Paired bootstrap interval of the difference.
        p: Two-sided p-value from the same bootstrap.
        p_holm: p-value corrected over all comparisons of one call (Holm, 1979).
        verdict: Which encoder is better, or that no difference is shown, at 5% by `p_holm`.
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
    """Comparisons of each encoder with the first, on every probe that they have in common.

    Args:
        encoders: Names of the encoders.
        rows: The comparisons.
        draws: Number of bootstrap draws.
        seed: Seed of the bootstrap.
        seeds: Number of training seeds of each encoder, None if each was trained once.
    """

    encoders: list[str]
    rows: list[Comparison]
    draws: int
    seed: int
    seeds: int | None = None

    def table(self) -> Table:
        table = Table(box=SIMPLE, title=f"Compared with {self.encoders[0]}, percent", title_justify="left")
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
        """Describe in two sentences how the numbers were computed."""
        if self.seeds is not None:
            return (
                f"Differences are means over {self.seeds} training seeds on the same test items, with 95% intervals "
                f"and two-sided p-values of a t-test. Its variance is the variance between seeds plus the variance of "
                f"{self.draws} paired bootstrap draws of the items, seed {self.seed}. p is corrected by Holm's method "
                f"over the {len(self.rows)} comparisons; a difference is called below 0.05."
            )
        return (
            f"Differences are measured on the same test items, with 95% intervals and two-sided p-values of "
            f"{self.draws} paired bootstrap draws, seed {self.seed}; they do not cover other seeds of the training or "
            f"of a probe's fit. p is corrected by Holm's method over the {len(self.rows)} comparisons; a difference is "
            "called below 0.05."
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
    """Compare encoders with the first one on every task and metric that they share.

    Args:
        results: Results of each encoder by its name, with per-example scores.
        draws: Number of bootstrap draws.
        seed: Seed of the bootstrap.

    Raises:
        ProbeError: There are fewer than two encoders, they share no task, their data or seeds differ, or a result has
            no per-example scores.
    """
    if len(results) < 2:
        raise ProbeError("a comparison needs two encoders or more; give another one.")
    names = list(results)
    by_key = {name: {(r.task, r.metric): r for r in listed} for name, listed in results.items()}
    pairs = []
    for other in names[1:]:
        for key, first in by_key[names[0]].items():
            if key in by_key[other]:
                _check_pair(names[0], first, other, by_key[other][key])
                pairs.append((other, first, by_key[other][key]))
    if not pairs:
        raise ProbeError(f"{' and '.join(names)} share no task; run the same probes on each.")
    differences = [
        paired_difference(_example_scores(b), _example_scores(a), statistic_of(a.metric), seed, draws)
        for _, a, b in pairs
    ]
    values = [(a.value, b.value) for _, a, b in pairs]
    return Comparisons(names, _comparison_rows(names[0], pairs, values, differences), draws, seed)


def compare_seeds(
    results: Mapping[str, Mapping[str, Sequence[ProbeResult]]], draws: int = 2000, seed: int = 0
) -> Comparisons:
    """Compare encoders with the first one, seed by seed, where each was trained once per seed.

    Args:
        results: Results by the encoder's name and by the name of the training seed.
        draws: Number of bootstrap draws.
        seed: Seed of the bootstrap.

    Raises:
        ProbeError: Two encoders share fewer than two seeds, or `compare_results` would refuse the results.
    """
    if len(results) < 2:
        raise ProbeError("a comparison needs two encoders or more; give another one.")
    names = list(results)
    pairs, values, differences, fewest = [], [], [], None
    for other in names[1:]:
        shared = [s for s in results[names[0]] if s in results[other]]
        if len(shared) < 2:
            raise ProbeError(f"{names[0]} and {other} share {len(shared)} seed(s): a comparison needs two or more.")
        fewest = min(len(shared), fewest or len(shared))
        firsts, others = (
            [{(r.task, r.metric): r for r in results[name][s]} for s in shared] for name in (names[0], other)
        )
        for key in firsts[0]:
            if not all(key in trained for trained in (*firsts, *others)):
                continue
            for a, b in zip(firsts, others, strict=True):
                _check_pair(names[0], a[key], other, b[key])
            statistic = statistic_of(key[1])
            drawn = [
                [100 * statistic(resample(_example_scores(trained[key]), seed, draws)) for trained in side]
                for side in (firsts, others)
            ]
            scores = np.array([[trained[key].value for trained in side] for side in (firsts, others)])
            difference = seed_difference(scores[0], scores[1], np.array(drawn[0]), np.array(drawn[1]))
            low, high = difference.ci95
            differences.append(Difference(difference.value / 100, (low / 100, high / 100), difference.p_value))
            pairs.append((other, firsts[0][key], others[0][key]))
            values.append((float(scores[0].mean()), float(scores[1].mean())))
    if not pairs:
        raise ProbeError(f"{' and '.join(names)} share no task; run the same probes on each.")
    return Comparisons(names, _comparison_rows(names[0], pairs, values, differences), draws, seed, fewest)


def read_seeds(folders: Sequence[str]) -> dict[str, dict[str, list[ProbeResult]]] | None:
    """Read results of encoders that were trained once per seed, from a study's folders of `seed-<n>.json`.

    A folder with `once.json` instead, of a run that all seeds share, has these results for each of the others' seeds.

    Returns:
        Results by the folder's name and by the file's name; None if no folder holds files of seeds.

    Raises:
        ProbeError: Only some of the folders hold such files, or two folders have the same name.
    """
    seed_files = {folder: {file.stem: file for file in sorted(Path(folder).glob("seed-*.json"))} for folder in folders}
    if not any(seed_files.values()):
        return None
    all_seeds = sorted(set().union(*seed_files.values()))
    for folder in folders:
        if not seed_files[folder] and (shared := Path(folder) / "once.json").is_file():
            seed_files[folder] = dict.fromkeys(all_seeds, shared)
    if lacking := [folder for folder, files in seed_files.items() if not files]:
        raise ProbeError(f"{lacking[0]} holds no seed-<n>.json, as the others do; compare folders of one kind.")
    names = [Path(folder).name for folder in folders]
    if len(set(names)) < len(names):
        raise ProbeError("two folders have the same name; rename one, so that a table can tell them apart.")
    return {
        name: {seed: read_results(file) for seed, file in seed_files[folder].items()}
        for name, folder in zip(names, folders, strict=True)
    }


def seed_difference(
    first: np.ndarray, other: np.ndarray, first_draws: np.ndarray | None, other_draws: np.ndarray | None
) -> Difference:
    """Estimate how far one encoder's score lies above another's, over training seeds and test items.

    The variance of the difference is the variance of its mean over seeds plus the variance due to the test items,
    which all seeds share. The interaction of seeds and items contributes to both terms, so the interval is rather too
    wide than too narrow. The degrees of freedom follow Satterthwaite.

    Args:
        first: (S,) score of the first encoder for each seed.
        other: (S,) score of the other encoder for the same seeds.
        first_draws: (S, draws) scores of the first encoder on resampled items, with the same resamples for all seeds
            and for both encoders. None for a score that does not depend on test items.
        other_draws: (S, draws) scores of the other encoder on the same resamples, or None.

    Returns:
        `other` minus `first`, in the unit of the scores.
    """
    per_seed = other - first
    seeds, value = len(per_seed), float(np.mean(per_seed))
    between = float(np.var(per_seed, ddof=1)) / seeds
    items, draws = 0.0, 2
    if first_draws is not None and other_draws is not None:
        drawn = (other_draws - first_draws).mean(0)
        drawn = drawn[np.isfinite(drawn)]
        items, draws = float(np.var(drawn, ddof=1)), len(drawn)
    variance = between + items
    if variance < 1e-18:  # nothing varies: the scores are equal, or belong to a part that was not trained
        return Difference(value, (value, value), 1.0 if abs(value) < 1e-9 else 0.0)
    freedom = variance**2 / (between**2 / (seeds - 1) + items**2 / (draws - 1))
    half = float(scipy.stats.t.ppf(0.975, freedom)) * variance**0.5
    p = 2 * float(scipy.stats.t.sf(abs(value) / variance**0.5, freedom))
    return Difference(value, (value - half, value + half), p)


def _comparison_rows(
    first: str,
    pairs: Sequence[tuple[str, ProbeResult, ProbeResult]],
    values: Sequence[tuple[float, float]],
    differences: Sequence[Difference],
) -> list[Comparison]:
    """Build the rows of a comparison, with p-values corrected over all of them."""
    corrected = holm([d.p_value for d in differences])
    rows = []
    for (other, a, _), (first_value, other_value), difference, p_holm in zip(
        pairs, values, differences, corrected, strict=True
    ):
        better = other if difference.value > 0 else first
        rows.append(
            Comparison(
                task=a.task,
                metric=a.metric,
                n=a.n,
                first=first,
                other=other,
                first_value=first_value,
                other_value=other_value,
                difference=100 * difference.value,
                ci95=(100 * difference.ci95[0], 100 * difference.ci95[1]),
                p=difference.p_value,
                p_holm=p_holm,
                verdict=f"{better} better" if p_holm < LEVEL else NONE_SHOWN,
            )
        )
    return rows


def holm(p: Sequence[float]) -> list[float]:
    """Correct p-values by Holm's step-down method.

    The probability that any corrected p-value of true null hypotheses is below a level is at most that level.
    """
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate([(len(p) - i) * p[j] for i, j in enumerate(order)])
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(stepped, 1)
    return [float(value) for value in corrected]


def draw_comparisons(comparisons: Comparisons, path: Path) -> None:
    """Draw each difference with its interval, one panel per encoder; significant differences have filled markers."""
    from matplotlib.figure import Figure  # not pyplot: no display and no global state are needed

    others = comparisons.encoders[1:]
    rows = {other: [r for r in comparisons.rows if r.other == other] for other in others}
    height = 1.3 + 0.24 * max(map(len, rows.values()))
    figure = Figure(figsize=(3.6 + 3.6 * len(others), height))
    for ax, other in zip(figure.subplots(1, len(others), squeeze=False, sharey=True)[0], others, strict=True):
        for y, r in enumerate(rows[other]):
            called = r.verdict != NONE_SHOWN
            ax.plot(r.ci95, (y, y), color="#33608c", linewidth=1.6)
            ax.plot(r.difference, y, "o", color="#33608c", markerfacecolor="#33608c" if called else "white")
        ax.axvline(0, color="#888888", linewidth=0.8)
        ax.set_title(f"{other} minus {comparisons.encoders[0]}", fontsize=9)
        ax.set_xlabel("points", fontsize=8)
        ax.tick_params(labelsize=7.5)
        ax.set_yticks(range(len(rows[other])), [f"{r.task}: {r.metric}" for r in rows[other]])
        ax.set_ylim(len(rows[other]) - 0.5, -0.5)
    figure.text(0.01, 0.01, "filled: a difference at 5% after Holm's correction", fontsize=7)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def _check_pair(first: str, a: ProbeResult, other: str, b: ProbeResult) -> None:
    for condition in ("n", "split", "seed", "data_sha256"):
        if getattr(a, condition) != getattr(b, condition):
            raise ProbeError(
                f"{a.task}: {first} and {other} differ in {condition}, so their test items cannot be paired; probe "
                "both on the same data with the same seed."
            )


def _example_scores(result: ProbeResult) -> np.ndarray:
    if result.example_scores is None:
        raise ProbeError(
            f"{result.task} of {result.encoder} has no per-example scores (.npz) beside its JSON; write it again with "
            "`--json`."
        )
    return result.example_scores
