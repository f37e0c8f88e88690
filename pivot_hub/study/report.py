"""The report of a study: its bytes depend on the table and on the study's file alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pivot_hub.files import write_whole
from pivot_hub.study.comparisons import (
    NOT_SHOWN,
    SHOWN,
    Row,
    curve_points,
    factor_rows,
    frontier_points,
    mean_and_half,
    run_scores,
)
from pivot_hub.study.design import FactorSpec, Levels, Study
from pivot_hub.study.figures import draw_curves, draw_forest, draw_frontier
from pivot_hub.study.learning_rate import METRIC, best_learning_rate
from pivot_hub.study.table import DRAWS, StudyTable

Labels = Mapping[str, str]  # the label of each run, by its name


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
            baseline = study.spec.runs[factor.frontier.baseline].label
            draw_frontier(factor.frontier, lines, baseline, folder / f"{_slug(factor)}-frontier.png")
    write_whole(path, report_text(study, table, rows, study.path.stem))


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
    head = [
        f"# {spec.title}",
        "",
        f"Made by `pivot study {study.name} --report` from `{study.path.stem}.parquet` and `{study.path.name}`; the "
        "latter was written before the runs.",
        "",
        f"**Question.** {spec.question}",
        "",
        "**Answer.** " + _answer(study, rows[0], labels),
        "",
    ]
    if table.metadata["study_sha256"] != study.sha256:
        head += [f"**The table was made with another version of `{study.path.name}`.**", ""]
    method = ["## Method", ""]
    for paragraph in spec.method:
        method += [paragraph.strip(), ""]
    method += [*_runs(study, table), *_learning_rates(study, table, labels)]
    sections, details = [], []
    for factor, compared in zip(spec.factors, rows, strict=True):
        section = _section(study, table, factor, compared, labels, figures)
        sections += section.comparison
        details += section.details
    not_shown = ["## What was not shown", ""]
    for factor, compared in zip(spec.factors, rows, strict=True):
        undecided = [row for row in compared if row.verdict == NOT_SHOWN]
        widest = max((max(abs(row.low), abs(row.high)) for row in undecided), default=0.0)
        reach = f"; the widest of their intervals ends {widest:.1f} points from zero" if undecided else ""
        not_shown.append(f"- {factor.title}: {len(undecided)} of {len(compared)} differences{reach}.")
    tail = ["", "## Threats to validity", ""]
    tail += [f"- {threat.strip()}" for threat in spec.threats]
    if spec.remarks:
        tail += ["", "## Remarks, written after the runs", ""]
        tail += [f"- {remark.strip()}" for remark in spec.remarks]
    if spec.brief:
        return "\n".join([*head, *sections, *method, *details, *not_shown, *tail, ""])
    return "\n".join([*head, *method, *sections, *not_shown, *tail, ""])


@dataclass(frozen=True)
class _Section:
    """The lines of a factor: its comparison, and what a brief report has behind all comparisons."""

    comparison: list[str]
    details: list[str]


def _section(
    study: Study, table: StudyTable, factor: FactorSpec, rows: Sequence[Row], labels: Labels, figures: str
) -> _Section:
    """The section of a factor: its question, figures and tables, and the pairs that are missing."""
    brief = study.spec.brief
    figure = f"{figures}/{_slug(factor)}"
    lines = [f"## {factor.title}", "", factor.question, ""]
    if factor.note:
        lines += [factor.note.strip(), ""]
    figure_lines = []
    if rows:
        figure_lines += [f"![{factor.title}: differences]({figure}.png)", ""]
        if factor.curve and curve_points(table, study, factor, factor.curve):
            figure_lines += [f"![{factor.title}: along {factor.curve.axis}]({figure}-curve.png)", ""]
        frontier = factor.frontier and frontier_points(table, study, factor.frontier)
        frontier_line = [f"![{factor.title}: gain against distance]({figure}-frontier.png)", ""] if frontier else []
        lines += [
            _summary(rows, labels),
            "",
            *(frontier_line if brief else [*figure_lines, *frontier_line]),
            *_table(rows, labels),
        ]
    if factor.change_of_mind:
        lines += [f"**What would change our mind.** {factor.change_of_mind.strip()}", ""]
    levels = _levels(study, table, factor.levels, labels) if factor.levels else []
    compared = {(row.first, row.other) for row in rows}
    missing = [
        f"{labels[other]} against {labels[first]}" for first, other in factor.pairs if (first, other) not in compared
    ]
    missing_lines = [f"Not run yet, or in fewer than two seeds: {'; '.join(missing)}.", ""] if missing else []
    if not brief:
        return _Section([*lines, *levels, *missing_lines], [])
    detail_lines = [*figure_lines, *levels]
    return _Section(
        [*lines, *missing_lines], [f"## Details: {factor.title}", "", *detail_lines] if detail_lines else []
    )


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
        if not differing and len(compared) == 1:
            clauses.append(f"not shown to differ on {compared[0].measure}")
        elif len(differing) < len(compared):
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
    conditions = list(dict.fromkeys(_condition(each) for each in (table.metadata, *table.metadata.get("earlier", []))))
    lines = [
        f"Started: {len(states)} of {len(study.cells())} runs; done {states.count('done')}, failed "
        f"{states.count('failed')}, not started because of those {states.count('not started')}. {hours:.1f} hours of "
        f"processes with {'; others with '.join(conditions)}.",
        "",
        "A difference is the mean over seeds of paired differences on the same test items. Its interval (95%) and p "
        f"are a t-test's, whose variance is that between seeds plus that of {DRAWS} resamples of the items. p is "
        "corrected by Holm's method over all differences of a section; `shown` means below 0.05.",
        "",
    ]
    unfinished = [row for row in runs.values() if row["status"] != "done"]
    lines += [f"- {row['run']}, seed {row['seed']}: {row['reason']}" for row in unfinished]
    return [*lines, ""] if unfinished else lines


def _condition(metadata: Mapping[str, Any]) -> str:
    """Machine and versions of a table's own runs."""
    versions, machine = metadata["versions"], metadata["machine"] or {}
    return (
        f"{machine.get('threads', '?')} thread(s) each, {machine.get('cpu_cores', '?')} CPU cores, GPU "
        f"{machine.get('gpu') or 'none'}; torch {versions['torch']}, transformers {versions['transformers']}, TRL "
        f"{versions['trl']}"
    )


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
        cells = [_level(run_scores(study, table, run, measure)) for measure in levels.measures]
        lines.append(f"| {labels[run]} | {' | '.join(cells)} |")
    return [*lines, ""]


def _level(scores: Sequence[float]) -> str:
    if not scores:
        return "-"
    mean, half = mean_and_half(scores)
    return f"{mean:.1f}" if len(scores) < 2 else f"{mean:.1f} [{mean - half:.1f}, {mean + half:.1f}]"


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


def _slug(factor: FactorSpec) -> str:
    """Name of the factor's figures, made from its title."""
    return "-".join("".join(c if c.isalnum() else " " for c in factor.title.lower()).split())
