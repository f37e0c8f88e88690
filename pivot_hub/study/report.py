"""The report of a study: its bytes depend on the table and on the study's file alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from pivot_hub.files import write_whole
from pivot_hub.probes.significance import LEVEL, holm, seed_difference
from pivot_hub.study.design import Curve, FactorSpec, Frontier, Levels, Study
from pivot_hub.study.learning_rate import METRIC, best_learning_rate
from pivot_hub.study.table import DRAWS, StudyTable

COLOURS = ("#33608c", "#c2622d", "#5b8a3a", "#7d4f96", "#8c7a33", "#3d8a86", "#a23b56", "#666666")
SHOWN, NOT_SHOWN = "shown", "not shown"
Labels = Mapping[str, str]  # the label of each run, by its name


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


def write_report(study: Study, table: StudyTable, path: Path) -> None:
    """Write the report as Markdown and its figures into the folder of the study's name beside it.

    Args:
        study: Study whose file holds the prose of the report.
        table: Table of the study's runs.
        path: Markdown file that the report is written to.
    """
    folder = path.parent / study.path.stem
    rows = [factor_rows(study, table, factor) for factor in study.spec.factors]
    for i, factor in enumerate(study.spec.factors):
        if rows[i]:
            draw_forest(study, factor, rows[i], folder / f"{_slug(factor)}.png")
        if factor.curve and (points := curve_points(table, study, factor, factor.curve)):
            draw_curves(factor.curve, points, folder / f"{_slug(factor)}-curve.png")
        if factor.frontier and (lines := frontier_points(table, study, factor.frontier)):
            draw_frontier(
                factor.frontier,
                lines,
                {name: run.label for name, run in study.spec.runs.items()},
                folder / f"{_slug(factor)}-frontier.png",
            )
    write_whole(path, report_text(study, table, rows, study.path.stem))


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


def report_text(study: Study, table: StudyTable, rows: Sequence[Sequence[Row]], figures: str) -> str:
    """Write the Markdown text.

    Args:
        study: Study whose file holds the prose of the report.
        table: Table of the study's runs.
        rows: Comparisons of each factor.
        figures: Folder of the figures, relative to the text.
    """
    spec = study.spec
    labels = {name: run.label for name, run in spec.runs.items()}
    lines = [
        f"# {spec.title}",
        "",
        f"Made by `pivot study {study.name} --report` from `{study.path.stem}.parquet` and `{study.path.name}`; the "
        "latter was written before the runs.",
        "",
        f"**Question.** {spec.question}",
        "",
        "**Answer.** " + _answer(study, rows[0], labels),
        "",
        "## Method",
        "",
    ]
    for paragraph in spec.method:
        lines += [paragraph.strip(), ""]
    lines += [*_runs(study, table), *_learning_rates(study, table, labels)]
    for factor, factor_rows in zip(spec.factors, rows, strict=True):
        lines += _section(study, table, factor, factor_rows, labels, figures)
    lines += ["## What was not shown", ""]
    for factor, factor_rows in zip(spec.factors, rows, strict=True):
        not_shown = [row for row in factor_rows if row.verdict == NOT_SHOWN]
        widest = max((max(abs(row.low), abs(row.high)) for row in not_shown), default=0.0)
        reach = f"; the widest of their intervals ends {widest:.1f} points from zero" if not_shown else ""
        lines.append(f"- {factor.title}: {len(not_shown)} of {len(factor_rows)} differences{reach}.")
    lines += ["", "## Threats to validity", ""]
    lines += [f"- {threat.strip()}" for threat in spec.threats]
    if spec.remarks:
        lines += ["", "## Remarks, written after the runs", ""]
        lines += [f"- {remark.strip()}" for remark in spec.remarks]
    return "\n".join([*lines, ""])


def _section(
    study: Study, table: StudyTable, factor: FactorSpec, rows: Sequence[Row], labels: Labels, figures: str
) -> list[str]:
    """The section of a factor: its question, figures and tables, and the pairs that are missing."""
    lines = [f"## {factor.title}", "", factor.question, ""]
    if factor.note:
        lines += [factor.note.strip(), ""]
    if rows:
        figure = f"{figures}/{_slug(factor)}"
        lines += [_summary(rows, labels), "", f"![{factor.title}: differences]({figure}.png)", ""]
        if factor.curve and curve_points(table, study, factor, factor.curve):
            lines += [f"![{factor.title}: along {factor.curve.axis}]({figure}-curve.png)", ""]
        if factor.frontier and frontier_points(table, study, factor.frontier):
            lines += [f"![{factor.title}: gain against distance]({figure}-frontier.png)", ""]
        lines += _table(rows, labels)
    if factor.levels:
        lines += _levels(study, table, factor.levels, labels)
    compared = {(row.first, row.other) for row in rows}
    missing = [
        f"{labels[other]} against {labels[first]}" for first, other in factor.pairs if (first, other) not in compared
    ]
    if missing:
        lines += [f"Not run yet, or in fewer than two seeds: {'; '.join(missing)}.", ""]
    return lines


def _answer(study: Study, rows: Sequence[Row], labels: Labels) -> str:
    """The result of the primary factor, one sentence for each pair."""
    if not rows:
        return "Not known yet: the runs of the first factor are not finished."
    sentences = []
    for first, other in study.spec.factors[0].pairs:
        compared = [row for row in rows if (row.first, row.other) == (first, other)]
        if not compared:
            continue
        differing = [row for row in compared if row.verdict == SHOWN]
        above = [row.measure for row in differing if row.difference > 0]
        below = [row.measure for row in differing if row.difference <= 0]
        clauses = []
        if above:
            clauses.append(f"above it on {', '.join(above)}")
        if below:
            clauses.append(f"below it on {', '.join(below)}")
        if len(differing) < len(compared):
            clauses.append(f"not shown to differ on {len(compared) - len(differing)} of {len(compared)} measures")
        sentences.append(
            f"Compared with {labels[first]}, {labels[other]} is {'; '.join(clauses)} ({compared[0].seeds} seeds)."
        )
    return " ".join(sentences)


def _runs(study: Study, table: StudyTable) -> list[str]:
    """How many runs were started and finished, on which machine, how differences are tested, and what failed."""
    runs = {(row["run"], row["seed"], row["candidate"]): row for row in table.rows}
    states = [row["status"] for row in runs.values()]
    hours = sum(row["duration_s"] or 0 for row in runs.values()) / 3600
    versions, machine = table.metadata["versions"], table.metadata["machine"] or {}
    lines = [
        f"Started: {len(states)} of {len(study.cells())} runs; done {states.count('done')}, failed "
        f"{states.count('failed')}, not started because of those {states.count('not started')}. {hours:.1f} hours of "
        f"processes with {machine.get('threads', '?')} thread(s) each, {machine.get('cpu_cores', '?')} CPU cores, GPU "
        f"{machine.get('gpu') or 'none'}; torch {versions['torch']}, transformers {versions['transformers']}, TRL "
        f"{versions['trl']}.",
        "",
        "A difference is the mean over seeds of paired differences on the same test items. Its interval (95%) and p "
        f"are a t-test's, whose variance is that between seeds plus that of {DRAWS} resamples of the items. p is "
        "corrected by Holm's method over all differences of a section; `shown` means below 0.05.",
        "",
    ]
    if table.metadata["study_sha256"] != study.sha256:
        lines += [f"**The table was made with another version of `{study.path.name}`.**", ""]
    unfinished = [row for row in runs.values() if row["status"] != "done"]
    lines += [f"- {row['run']}, seed {row['seed']}: {row['reason']}" for row in unfinished]
    return [*lines, ""] if unfinished else lines


def _learning_rates(study: Study, table: StudyTable, labels: Labels) -> list[str]:
    """The validation scores of the candidates of each search, with the chosen one in bold."""
    ranked: dict[str, dict[float, float]] = {}
    answered: dict[str, dict[float, float]] = {}
    for row in table.rows:
        if row["candidate"] is not None and row["task"]:
            by_run = ranked if row["metric"] == METRIC else answered
            by_run.setdefault(row["run"], {})[row["candidate"]] = row["value"]
    searches = {run: spec.rates for run, spec in study.spec.runs.items() if spec.rates and run in ranked}
    if not searches:
        return []
    columns = sorted({learning_rate for candidates in searches.values() for learning_rate in candidates})
    lines = [
        "Learning rates, chosen by the share of validation pairs ranked right (in brackets: of validation questions "
        f"answered right), percent, seed {study.spec.search_seed}:",
        "",
        f"| method | {' | '.join(f'{learning_rate:g}' for learning_rate in columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    for run, candidates in searches.items():
        scores = {rate: ranked[run][rate] for rate in candidates if rate in ranked[run]}
        best = best_learning_rate(scores)
        cells = []
        for learning_rate in columns:
            if learning_rate not in scores:
                cells.append("-")
                continue
            cell = f"{scores[learning_rate]:.1f} ({answered[run][learning_rate]:.1f})"
            cells.append(f"**{cell}**" if learning_rate == best else cell)
        lines.append(f"| {labels[run]} | {' | '.join(cells)} |")
    return [*lines, ""]


def _summary(rows: Sequence[Row], labels: Labels) -> str:
    """The differences of a section that are shown, in one sentence."""
    differences = [
        f"{labels[row.other]} against {labels[row.first]} on {row.measure} ({row.difference:+.1f})"
        for row in rows
        if row.verdict == SHOWN
    ]
    if not differences:
        return f"None of {len(rows)} differences is shown."
    return f"Shown are {len(differences)} of {len(rows)} differences: {'; '.join(differences)}."


def _levels(study: Study, table: StudyTable, levels: Levels, labels: Labels) -> list[str]:
    """Means over seeds with 95% t-intervals; a single value for a run that all seeds share."""
    lines = [f"| mean over seeds [95%] | {' | '.join(levels.measures)} |", "|---|" + "---|" * len(levels.measures)]
    for run in levels.runs:
        cells = [_level(_scores(study, table, run, measure)) for measure in levels.measures]
        lines.append(f"| {labels[run]} | {' | '.join(cells)} |")
    return [*lines, ""]


def _level(scores: Sequence[float]) -> str:
    if not scores:
        return "-"
    mean, half = _mean(scores)
    return f"{mean:.1f}" if len(scores) < 2 else f"{mean:.1f} [{mean - half:.1f}, {mean + half:.1f}]"


def _mean(scores: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95% t-interval, which is 0 for fewer than two scores."""
    if len(scores) < 2:
        return sum(scores), 0.0
    half = float(scipy.stats.t.ppf(0.975, len(scores) - 1)) * float(np.std(scores, ddof=1)) / len(scores) ** 0.5
    return float(np.mean(scores)), half


def _table(rows: Sequence[Row], labels: Labels) -> list[str]:
    lines = [
        "| measure | first | value | other | value | difference [95%] | p (Holm) | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.measure} | {labels[row.first]} | {row.first_value:.1f} | {labels[row.other]} | "
            f"{row.other_value:.1f} | {row.difference:+.2f} [{row.low:+.2f}, {row.high:+.2f}] | {row.p_holm:.3f} | "
            f"{row.verdict} |"
        )
    return [*lines, ""]


# For each measure and line: position on the axis, mean over seeds, half of the 95% interval.
Points = dict[str, dict[str, list[tuple[float, float, float]]]]


def curve_points(table: StudyTable, study: Study, factor: FactorSpec, curve: Curve) -> Points:
    """Compute the means over seeds, with 95% t-intervals, of each measure along each line of a curve."""
    points: Points = {}
    for measure in factor.measures:
        for line, runs in curve.lines.items():
            for position, run in sorted(runs.items()):
                scores = _scores(study, table, run, measure)
                if len(scores) < 2:
                    continue
                points.setdefault(measure, {}).setdefault(line, []).append((position, *_mean(scores)))
    return points


def draw_curves(curve: Curve, points: Points, path: Path) -> None:
    """Draw a panel for each measure, with a line for each method and bars of 95% over seeds."""
    from matplotlib.figure import Figure  # pyplot would need a display and global state

    columns = min(3, len(points))
    rows = math.ceil(len(points) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows))
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, (measure, lines) in zip(panels, points.items(), strict=False):
        for colour, (line, line_points) in zip(COLOURS, lines.items(), strict=False):
            x, y, half = np.array(line_points).T
            ax.errorbar(x, y, half, color=colour, label=line, marker="o", markersize=3, linewidth=1.2, capsize=2)
        ax.set_xscale("log")
        ax.set_xticks(x, [f"{v:g}" for v in x])
        ax.minorticks_off()
        ax.set_title(measure, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.set_xlabel(curve.axis, fontsize=7)
    for ax in panels[len(points) :]:
        ax.set_visible(False)
    figure.axes[0].legend(fontsize=7, frameon=False)
    _save(figure, path)


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
            lines.setdefault(line, []).append(FrontierPoint(run, x, *_mean(gains)))
    return lines


def draw_frontier(frontier: Frontier, lines: Mapping[str, Sequence[FrontierPoint]], labels: Labels, path: Path) -> None:
    """Draw the gain of every run against how far it moved, a line for each method and bands of 95% over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.6))
    ax = figure.subplots()
    ax.axhline(0, color="#888888", linewidth=0.8)
    for (line, points), colour in zip(lines.items(), itertools.cycle(COLOURS), strict=False):
        x, y, half = np.array([(point.x, point.y, point.half) for point in points]).T
        ax.fill_between(x, y - half, y + half, color=colour, alpha=0.12, linewidth=0)
        ax.errorbar(x, y, half, color=colour, label=line, marker="o", markersize=4, linewidth=1.3, capsize=2)
    ax.set_xscale("log")
    ax.set_xlabel(f"{frontier.x}, percent", fontsize=8)
    ax.set_ylabel(f"{frontier.y}: points above {labels[frontier.baseline]}", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def draw_forest(study: Study, factor: FactorSpec, rows: Sequence[Row], path: Path) -> None:
    """Draw the differences of a factor with their intervals; the markers of those that are shown are filled.

    One pair of runs has one panel, with a line for each measure. Several pairs have a panel for each measure, with a
    line for each pair.
    """
    from matplotlib.figure import Figure

    compared = {(row.first, row.other) for row in rows}
    pairs = [pair for pair in factor.pairs if pair in compared]
    labels = {name: run.label for name, run in study.spec.runs.items()}
    firsts = {first for first, _ in pairs}
    same_first = len(firsts) == 1
    names = [labels[other] if same_first else f"{labels[other]} - {labels[first]}" for first, other in pairs]
    if len(pairs) == 1:
        panels = {"": list(enumerate(rows))}
        lines = [row.measure for row in rows]
        figure_width = 6.5
    else:
        panels = {row.measure: [] for row in rows}
        for row in rows:
            panels[row.measure].append((pairs.index((row.first, row.other)), row))
        lines = names
        figure_width = 1.6 + 2.3 * min(4, len(panels))
    columns = min(4, len(panels))
    panel_rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(figure_width, panel_rows * (0.75 + 0.22 * len(lines)) + 0.3))
    grid = list(figure.subplots(panel_rows, columns, squeeze=False, sharey=True).flat)
    for ax, (title, panel) in zip(grid, panels.items(), strict=False):
        _draw_panel(ax, title, panel, lines)
    for ax in grid[len(panels) :]:
        ax.set_visible(False)
    against = f" against {labels[next(iter(firsts))]}," if same_first else ","
    if len(pairs) == 1:
        against = f" {names[0]}{against}"
    figure.text(0.01, 0.005, f"points{against} 95%; filled: shown after Holm's correction", fontsize=7)
    _save(figure, path)


def _draw_panel(ax: Any, title: str, panel: Sequence[tuple[int, Row]], lines: Sequence[str]) -> None:
    """Draw one panel of a forest plot.

    Args:
        ax: Axes of the panel.
        title: Title of the panel.
        panel: Line number and comparison of each difference.
        lines: Names of all lines, from top to bottom.
    """
    for y, row in sorted(panel, key=lambda entry: entry[0]):
        fill = COLOURS[0] if row.verdict == SHOWN else "white"
        ax.plot((row.low, row.high), (y, y), color=COLOURS[0], linewidth=1.5)
        ax.plot(row.difference, y, "o", color=COLOURS[0], markersize=5, markerfacecolor=fill)
    ax.axvline(0, color="#888888", linewidth=0.8)
    ax.set_title(title, fontsize=8)
    ax.tick_params(labelsize=7)
    ax.set_yticks(range(len(lines)), lines)
    ax.set_ylim(len(lines) - 0.5, -0.5)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=110, metadata={"Software": None})  # matplotlib's version would change the bytes


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


def _scores(study: Study, table: StudyTable, run: str, measure: str) -> list[float]:
    """The values of a measure by seed; a single one for a run that all seeds share."""
    scores = [value for value, _ in values_by_seed(study, table, run, measure).values()]
    return scores[:1] if study.shared_by_seeds(run) else scores


def _slug(factor: FactorSpec) -> str:
    """Name of the factor's figures, made from its title."""
    return "-".join("".join(c if c.isalnum() else " " for c in factor.title.lower()).split())
