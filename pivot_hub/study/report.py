"""A study's report: a function of its table and its file, to the byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy.stats

from pivot_hub.files import write_whole
from pivot_hub.probes.significance import LEVEL, holm, seed_difference
from pivot_hub.study.design import Curve, FactorSpec, Levels, Study
from pivot_hub.study.table import DRAWS, StudyTable

COLOURS = ("#33608c", "#c2622d", "#5b8a3a", "#7d4f96", "#8c7a33", "#3d8a86", "#a23b56", "#666666")
CRITERION = "ranked_right"  # of a candidate's rate
SHOWN, NOT_SHOWN = "shown", "not shown"


@dataclass(frozen=True)
class Row:
    """One measure of two runs, over seeds; values and differences in percent and points."""

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
        study: its file; the prose of the report is there.
        table: of its runs.
        path: of the Markdown file.
    """
    folder = path.parent / study.path.stem
    rows = [factor_rows(study, table, factor) for factor in study.spec.factors]
    for i, factor in enumerate(study.spec.factors):
        if rows[i]:
            draw_forest(study, factor, rows[i], folder / f"{_slug(factor)}.png")
        if factor.curve and (points := curve_points(table, study, factor, factor.curve)):
            draw_curves(factor.curve, points, folder / f"{_slug(factor)}-curve.png")
    write_whole(path, report_text(study, table, rows, study.path.stem))


def factor_rows(study: Study, table: StudyTable, factor: FactorSpec) -> list[Row]:
    """Differences of a factor's pairs on its measures, p corrected over all; pairs that were not run are left out."""
    rows = []
    for (first, other), measure in ((pair, m) for m in factor.measures for pair in factor.pairs):
        task, metric = _task(study, measure)
        a, b = (_by_seed(study, table.values(run, task, metric)) for run in (first, other))
        shared = [seed for seed in study.spec.seeds if seed in a and seed in b]
        if len(shared) < 2:
            continue
        scores = [np.array([side[seed][0] for seed in shared]) for side in (a, b)]
        drawn = [np.array([side[seed][1] for seed in shared]) for side in (a, b)]
        made = seed_difference(*scores, *drawn)
        low, high = made.ci95
        means = (float(scores[0].mean()), float(scores[1].mean()))
        rows.append(Row(measure, first, other, *means, made.value, low, high, made.p_value, len(shared)))
    corrected = holm([row.p for row in rows])
    return [replace(row, p_holm=p) for row, p in zip(rows, corrected, strict=True)]


def report_text(study: Study, table: StudyTable, rows: Sequence[Sequence[Row]], figures: str) -> str:
    """The Markdown text; `figures` is the folder of the figures, from the text's."""
    spec, label = study.spec, {name: run.label for name, run in study.spec.runs.items()}
    lines = [
        f"# {spec.title}",
        "",
        f"Made by `pivot study {study.name} --report` from `{study.path.stem}.parquet` and `{study.path.name}`; the "
        "latter was written before the runs.",
        "",
        f"**Question.** {spec.question}",
        "",
        "**Answer.** " + _answer(study, rows[0], label),
        "",
        "## Method",
        "",
    ]
    for paragraph in spec.method:
        lines += [paragraph.strip(), ""]
    lines += [*_runs(study, table), *_rates(study, table, label)]
    for factor, some in zip(spec.factors, rows, strict=True):
        lines += [f"## {factor.title}", "", factor.question, ""]
        if factor.note:
            lines += [factor.note.strip(), ""]
        if some:
            lines += [_sentence(some, label), "", f"![{factor.title}: differences]({figures}/{_slug(factor)}.png)", ""]
            if factor.curve and curve_points(table, study, factor, factor.curve):
                lines += [f"![{factor.title}: along {factor.curve.axis}]({figures}/{_slug(factor)}-curve.png)", ""]
            lines += _table(some, label)
        if factor.levels:
            lines += _levels(study, table, factor.levels, label)
        missing = [
            f"{label[b]} against {label[a]}"
            for a, b in factor.pairs
            if (a, b) not in {(r.first, r.other) for r in some}
        ]
        if missing:
            lines += [f"Not run yet, or in fewer than two seeds: {'; '.join(missing)}.", ""]
    lines += ["## What was not shown", ""]
    for factor, some in zip(spec.factors, rows, strict=True):
        silent = [r for r in some if r.verdict == NOT_SHOWN]
        widest = max((max(abs(r.low), abs(r.high)) for r in silent), default=0.0)
        reach = f"; the widest of their intervals ends {widest:.1f} points from zero" if silent else ""
        lines.append(f"- {factor.title}: {len(silent)} of {len(some)} differences{reach}.")
    lines += ["", "## Threats to validity", ""]
    lines += [f"- {threat.strip()}" for threat in spec.threats]
    if spec.remarks:
        lines += ["", "## Remarks, written after the runs", ""]
        lines += [f"- {remark.strip()}" for remark in spec.remarks]
    return "\n".join([*lines, ""])


def _answer(study: Study, rows: Sequence[Row], label: dict[str, str]) -> str:
    """What the primary factor says, pair by pair."""
    if not rows:
        return "Not known yet: the runs of the first factor are not finished."
    said = []
    for pair in study.spec.factors[0].pairs:
        some = [r for r in rows if (r.first, r.other) == pair]
        if not some:
            continue
        first, other = (label[name] for name in pair)
        up, down = (
            [r.measure for r in some if r.verdict == SHOWN and (r.difference > 0) == over] for over in (True, False)
        )
        parts = [f"above it on {', '.join(up)}"] * bool(up) + [f"below it on {', '.join(down)}"] * bool(down)
        silent = len(some) - len(up) - len(down)
        parts += [f"not shown to differ on {silent} of {len(some)} measures"] * bool(silent)
        said.append(f"Held against {first}, {other} is {'; '.join(parts)} ({some[0].seeds} seeds).")
    return " ".join(said)


def _runs(study: Study, table: StudyTable) -> list[str]:
    started = {(r["run"], r["seed"], r["candidate"]): r for r in table.rows}
    states = [r["status"] for r in started.values()]
    hours = sum(r["duration_s"] or 0 for r in started.values()) / 3600
    metadata, where = table.metadata, table.metadata["machine"] or {}
    lines = [
        f"Started: {len(states)} of {len(study.cells())} runs; done {states.count('done')}, failed "
        f"{states.count('failed')}, not started because of those {states.count('not started')}. {hours:.1f} hours of "
        f"processes with {where.get('threads', '?')} thread(s) each, {where.get('cpu_cores', '?')} CPU cores, GPU "
        f"{where.get('gpu') or 'none'}; torch {metadata['versions']['torch']}, transformers "
        f"{metadata['versions']['transformers']}, TRL {metadata['versions']['trl']}.",
        "",
        "A difference is the mean over seeds of paired differences on the same test items. Its interval (95%) and p "
        f"are a t-test's, whose variance is that between seeds plus that of {DRAWS} resamples of the items. p is "
        "corrected by Holm's method over all differences of a section; `shown` means below 0.05.",
        "",
    ]
    if table.metadata["study_sha256"] != study.sha256:
        lines += [f"**The table was made with another version of `{study.path.name}`.**", ""]
    broken = [f"{r['run']}, seed {r['seed']}: {r['reason']}" for r in started.values() if r["status"] != "done"]
    return lines + [f"- {line}" for line in broken] + [""] * bool(broken)


def _rates(study: Study, table: StudyTable, label: dict[str, str]) -> list[str]:
    """The candidates of each search and what they scored; the chosen one in bold."""
    tried = [r for r in table.rows if r["candidate"] is not None and r["task"]]
    scored = {(r["run"], r["candidate"]): r["value"] for r in tried if r["metric"] == CRITERION}
    answered = {(r["run"], r["candidate"]): r["value"] for r in tried if r["metric"] != CRITERION}
    searched = {
        run: spec.rates for run, spec in study.spec.runs.items() if spec.rates and any(k[0] == run for k in scored)
    }
    if not searched:
        return []
    rates = sorted({rate for some in searched.values() for rate in some})
    lines = [
        "Learning rates, chosen by the share of validation pairs ranked right (in brackets: of validation questions "
        f"answered right), percent, seed {study.spec.search_seed}:",
        "",
        f"| method | {' | '.join(f'{rate:g}' for rate in rates)} |",
        "|---|" + "---|" * len(rates),
    ]
    for run, some in searched.items():
        values = {rate: scored.get((run, rate)) for rate in some}
        known = {rate: value for rate, value in values.items() if value is not None}
        best = max(known, key=lambda rate: known[rate]) if known else None
        cells = []
        for rate in rates:
            value = values.get(rate)
            shown = "-" if value is None else f"{value:.1f} ({answered[run, rate]:.1f})"
            cells.append(f"**{shown}**" if rate == best else shown)
        lines.append(f"| {label[run]} | {' | '.join(cells)} |")
    return [*lines, ""]


def _sentence(rows: Sequence[Row], label: dict[str, str]) -> str:
    shown = [r for r in rows if r.verdict == SHOWN]
    if not shown:
        return f"None of {len(rows)} differences is shown."
    said = [f"{label[r.other]} against {label[r.first]} on {r.measure} ({r.difference:+.1f})" for r in shown]
    return f"Shown are {len(shown)} of {len(rows)} differences: {'; '.join(said)}."


def _levels(study: Study, table: StudyTable, levels: Levels, label: dict[str, str]) -> list[str]:
    """Means over seeds with 95% t-intervals; a single value where a run was made once."""
    lines = [f"| mean over seeds [95%] | {' | '.join(levels.measures)} |", "|---|" + "---|" * len(levels.measures)]
    for run in levels.runs:
        cells = []
        for measure in levels.measures:
            scores = [value for value, _ in table.values(run, *_task(study, measure)).values()]
            mean, half = _mean(scores)
            cells.append(
                "-"
                if not scores
                else f"{mean:.1f}"
                if len(scores) < 2
                else f"{mean:.1f} [{mean - half:.1f}, {mean + half:.1f}]"
            )
        lines.append(f"| {label[run]} | {' | '.join(cells)} |")
    return [*lines, ""]


def _mean(scores: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95% t-interval; of fewer than two scores the half is 0."""
    if len(scores) < 2:
        return sum(scores), 0.0
    half = float(scipy.stats.t.ppf(0.975, len(scores) - 1)) * float(np.std(scores, ddof=1)) / len(scores) ** 0.5
    return float(np.mean(scores)), half


def _table(rows: Sequence[Row], label: dict[str, str]) -> list[str]:
    lines = [
        "| measure | first | value | other | value | difference [95%] | p (Holm) | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.measure} | {label[r.first]} | {r.first_value:.1f} | {label[r.other]} | {r.other_value:.1f} | "
            f"{r.difference:+.2f} [{r.low:+.2f}, {r.high:+.2f}] | {r.p_holm:.3f} | {r.verdict} |"
        )
    return [*lines, ""]


Points = dict[str, dict[str, list[tuple[float, float, float]]]]  # measure, line: (place, mean, half of the interval)


def curve_points(table: StudyTable, study: Study, factor: FactorSpec, curve: Curve) -> Points:
    """Means over seeds with 95% t-intervals, of each line of a curve and each measure."""
    made: Points = {}
    for measure in factor.measures:
        task, metric = _task(study, measure)
        for line, runs in curve.lines.items():
            for place, run in sorted(runs.items()):
                values = _by_seed(study, table.values(run, task, metric))
                scores = [values[seed][0] for seed in study.spec.seeds if seed in values]
                if len(scores) < 2:
                    continue
                made.setdefault(measure, {}).setdefault(line, []).append((place, *_mean(scores)))
    return made


def draw_curves(curve: Curve, points: Points, path: Path) -> None:
    """A panel for each measure, a line for each method, bars of 95% over seeds."""
    from matplotlib.figure import Figure  # not pyplot: no display and no global state are needed

    columns = min(3, len(points))
    down = -(-len(points) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * down))
    axes = figure.subplots(down, columns, squeeze=False).flat
    for ax, (measure, lines) in zip(axes, points.items(), strict=False):
        for colour, (line, places) in zip(COLOURS, lines.items(), strict=False):
            x, y, half = np.array(places).T
            ax.errorbar(x, y, half, color=colour, label=line, marker="o", markersize=3, linewidth=1.2, capsize=2)
        ax.set_xscale("log")
        ax.set_xticks(x, [f"{v:g}" for v in x])
        ax.minorticks_off()
        ax.set_title(measure, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.set_xlabel(curve.axis, fontsize=7)
    for ax in axes:
        ax.set_visible(False)
    figure.axes[0].legend(fontsize=7, frameon=False)
    _save(figure, path)


def draw_forest(study: Study, factor: FactorSpec, rows: Sequence[Row], path: Path) -> None:
    """Differences with their intervals, filled where shown: one panel for one pair, else one for each measure."""
    from matplotlib.figure import Figure

    pairs = [pair for pair in factor.pairs if any((r.first, r.other) == pair for r in rows)]
    label = {name: run.label for name, run in study.spec.runs.items()}
    firsts = {first for first, _ in pairs}
    names = [label[b] if len(firsts) == 1 else f"{label[b]} - {label[a]}" for a, b in pairs]
    measures = list(dict.fromkeys(r.measure for r in rows))
    if len(pairs) == 1:
        panels, lines = [""], [(r.measure, [("", r)]) for r in rows]
    else:
        panels = measures
        lines = [
            (name, [(r.measure, r) for r in rows if (r.first, r.other) == pair])
            for name, pair in zip(names, pairs, strict=True)
        ]
    columns = min(4, len(panels))
    down = -(-len(panels) // columns)
    width = 6.5 if len(pairs) == 1 else 1.6 + 2.3 * columns
    figure = Figure(figsize=(width, down * (0.75 + 0.22 * len(lines)) + 0.3))
    grid = figure.subplots(down, columns, squeeze=False, sharey=True)
    for ax, panel in zip(grid.flat, panels, strict=False):
        for y, (_, some) in enumerate(lines):
            for r in (r for of, r in some if of == panel):
                full = COLOURS[0] if r.verdict == SHOWN else "white"
                ax.plot((r.low, r.high), (y, y), color=COLOURS[0], linewidth=1.5)
                ax.plot(r.difference, y, "o", color=COLOURS[0], markersize=5, markerfacecolor=full)
        ax.axvline(0, color="#888888", linewidth=0.8)
        ax.set_title(panel, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.set_yticks(range(len(lines)), [name for name, _ in lines])
        ax.set_ylim(len(lines) - 0.5, -0.5)
    for ax in list(grid.flat)[len(panels) :]:
        ax.set_visible(False)
    who = f"{names[0]} against " if len(pairs) == 1 else "against "
    against = f" {who}{label[next(iter(firsts))]}," if len(firsts) == 1 else ","
    figure.text(0.01, 0.005, f"points{against} 95%; filled: shown after Holm's correction", fontsize=7)
    _save(figure, path)


def _save(figure: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout(rect=(0, 0.03, 1, 1))  # type: ignore[attr-defined]
    figure.savefig(path, dpi=110, metadata={"Software": None})  # type: ignore[attr-defined]


def _by_seed(study: Study, values: dict[int | None, tuple[float, np.ndarray]]) -> dict[int, tuple[float, np.ndarray]]:
    """What is made once holds for every seed."""
    if None in values:
        return dict.fromkeys(study.spec.seeds, values[None])
    return {seed: value for seed, value in values.items() if seed is not None}


def _task(study: Study, measure: str) -> tuple[str, str]:
    task, _, metric = study.spec.measures[measure].rpartition(" ")
    return task, metric


def _slug(factor: FactorSpec) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in factor.title.lower()).split())
