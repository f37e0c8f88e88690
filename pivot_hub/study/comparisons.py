"""The numbers of a report: runs compared over seeds, and the points of its curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.stats

from pivot_hub.probes.significance import LEVEL, holm, seed_difference
from pivot_hub.study.design import Curve, FactorSpec, Frontier, Study
from pivot_hub.study.table import StudyTable

SHOWN, NOT_SHOWN = "shown", "not shown"
# For each measure and line: position on the axis, mean over seeds, half of the 95% interval.
Points = dict[str, dict[str, list[tuple[float, float, float]]]]


@dataclass(frozen=True)
class Row:
    """The comparison of two runs on one measure, over seeds.

    Args:
        measure: Name of the measure.
        first: Name of the run that the other one is compared with.
        other: Name of the run that is compared.
        first_value: Mean of the first run over seeds, in percent.
        other_value: Mean of the other run over seeds, in percent.
        difference: Other minus first, in percentage points.
        low, high: Ends of the 95% interval of the difference, in percentage points.
        p: p-value of the difference.
        seeds: Number of seeds that both runs have.
        p_holm: p-value after Holm's correction over the section.
    """

    measure: str
    first: str
    other: str
    first_value: float
    other_value: float
    difference: float
    low: float
    high: float
    p: float
    seeds: int
    p_holm: float = 1.0

    @property
    def verdict(self) -> str:
        return SHOWN if self.p_holm < LEVEL else NOT_SHOWN


def factor_rows(study: Study, table: StudyTable, factor: FactorSpec) -> list[Row]:
    """Compare a factor's pairs of runs on its measures, with p-values corrected over all of them.

    Pairs that fewer than two seeds share are left out.
    """
    rows = []
    for (first, other), measure in ((pair, m) for m in factor.measures for pair in factor.pairs):
        a, b = (values_by_seed(study, table, run, measure) for run in (first, other))
        shared = [seed for seed in study.spec.seeds if seed in a and seed in b]
        if len(shared) < 2:
            continue
        scores = [np.array([side[seed][0] for seed in shared]) for side in (a, b)]
        drawn = [np.array([side[seed][1] for seed in shared]) for side in (a, b)]
        comparison = seed_difference(*scores, *drawn)
        means = (float(scores[0].mean()), float(scores[1].mean()))
        low, high = comparison.ci95
        rows.append(Row(measure, first, other, *means, comparison.value, low, high, comparison.p_value, len(shared)))
    corrected = holm([row.p for row in rows])
    return [replace(row, p_holm=p) for row, p in zip(rows, corrected, strict=True)]


def values_by_seed(study: Study, table: StudyTable, run: str, measure: str) -> dict[int, tuple[float, np.ndarray]]:
    """Values of a measure by seed, each with its values on resamples; what all seeds share applies to every seed.

    A composite is the mean of its measures, also on each resample of the test items, which they share.
    """
    parts = []
    for name in study.spec.composites.get(measure, [measure]):
        task, _, metric = study.spec.measures[name].rpartition(" ")
        values = table.values(run, task, metric)
        shared = values.get(None)
        parts.append({s: v for s in study.spec.seeds if (v := values.get(s, shared)) is not None})
    return {
        seed: (float(np.mean([part[seed][0] for part in parts])), np.mean([part[seed][1] for part in parts], axis=0))
        for seed in study.spec.seeds
        if all(seed in part for part in parts)
    }


def run_scores(study: Study, table: StudyTable, run: str, measure: str) -> list[float]:
    """The values of a measure by seed; a single one for a run that all seeds share."""
    scores = [value for value, _ in values_by_seed(study, table, run, measure).values()]
    return scores[:1] if study.shared_by_seeds(run) else scores


def mean_and_half(scores: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95% t-interval, which is 0 for fewer than two scores."""
    if len(scores) < 2:
        return sum(scores), 0.0
    half = float(scipy.stats.t.ppf(0.975, len(scores) - 1)) * float(np.std(scores, ddof=1)) / len(scores) ** 0.5
    return float(np.mean(scores)), half


def curve_points(table: StudyTable, study: Study, factor: FactorSpec, curve: Curve) -> Points:
    """Compute the means over seeds, with 95% t-intervals, of each measure along each line of a curve."""
    points: Points = {}
    for measure in factor.measures:
        for line, runs in curve.lines.items():
            for position, run in sorted(runs.items()):
                scores = run_scores(study, table, run, measure)
                if len(scores) < 2 and not (scores and study.shared_by_seeds(run)):
                    continue
                points.setdefault(measure, {}).setdefault(line, []).append((position, *mean_and_half(scores)))
    return points


@dataclass(frozen=True)
class FrontierPoint:
    """One run of a frontier.

    Args:
        run: Name of the run.
        x: Mean of the distance over seeds.
        y: Mean of the gain over seeds.
        half: Half of the gain's 95% t-interval.
    """

    run: str
    x: float
    y: float
    half: float


def frontier_points(table: StudyTable, study: Study, frontier: Frontier) -> dict[str, list[FrontierPoint]]:
    """Compute the points of each line of a frontier, of runs that at least two seeds share with the baseline."""
    baseline = values_by_seed(study, table, frontier.baseline, frontier.y)
    lines: dict[str, list[FrontierPoint]] = {}
    for line, runs in frontier.lines.items():
        for run in runs:
            moved, seen = (values_by_seed(study, table, run, measure) for measure in (frontier.x, frontier.y))
            seeds = [seed for seed in seen if seed in moved and seed in baseline]
            if len(seeds) < 2:
                continue
            x = float(np.mean([moved[seed][0] for seed in seeds]))
            gains = [seen[seed][0] - baseline[seed][0] for seed in seeds]
            lines.setdefault(line, []).append(FrontierPoint(run, x, *mean_and_half(gains)))
    return lines
