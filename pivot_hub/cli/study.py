"""Commands that train and measure many runs: a study, and a search for a learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pivot_hub.cli.app import Overrides, Runs, app, log, numbers


@app.command()
def study(
    study: Annotated[str, typer.Argument(help="A study's file, or the name of a shipped one, as shapes/study.")],
    output: Annotated[Path | None, typer.Option(help="Folder of runs, table and report; `study` by default.")] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Runs at a time; they share the cores, or take the GPUs in turn.")
    ] = 1,
    seeds: Annotated[
        str | None,
        typer.Option(help="Run these of the study's seeds only, comma-separated; the table keeps the others' rows."),
    ] = None,
    report: Annotated[
        bool,
        typer.Option(
            "--report", help="Train nothing: write the report again from the table in OUTPUT, or beside the file."
        ),
    ] = False,
) -> None:
    """Train and measure a grid of recipes over seeds and factors, and report it from one table; resumes.

    Example: `pivot study shapes/study --jobs 2`, then `pivot study shapes/study --report --output study`
    """
    from pivot_hub.errors import RecipeError
    from pivot_hub.study.design import load_study
    from pivot_hub.study.report import write_report
    from pivot_hub.study.runner import run_study
    from pivot_hub.study.table import collect_table, earlier_table, read_table, write_table

    design = load_study(study)
    chosen = None if seeds is None else numbers("--seeds", seeds, int)
    design.cells(chosen)  # an unknown seed is an error before anything is written
    if report and chosen is not None:
        raise RecipeError("--seeds chooses what is run, and --report runs nothing; leave one of them out.")
    if report:
        folder = output or design.path.parent
        table = read_table(folder / f"{design.path.stem}.parquet")
    else:
        folder = output or Path("study")
        file = folder / f"{design.path.stem}.parquet"
        earlier = earlier_table(design, folder, file)
        try:
            run_study(design.path, folder, jobs, log, chosen)
        finally:
            table = collect_table(design, folder, earlier)
            write_table(table, file)
    text = folder / f"{design.path.stem.upper()}.md"
    write_report(design, table, text)
    log(f"report: {text}")


@app.command()
def search(
    recipe: Annotated[str, typer.Argument(help="A recipe whose parent is finished below RUNS.")],
    rates: Annotated[str, typer.Option(help="Candidate learning rates, comma-separated.")],
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    output: Annotated[Path, typer.Option(help="JSON file of the record.")] = Path("search.json"),
) -> None:
    """Choose a stage's learning rate on validation, and record every candidate.

    Example: `pivot search shapes/3-dpo --rates 3e-5,1e-4,3e-4 --output search-dpo.json`
    """
    candidates = numbers("--rates", rates, float)
    from pivot_hub.study.learning_rate import search_learning_rate

    record = search_learning_rate(recipe, candidates, runs, output, overrides=overrides or [], log=log)
    log(f"chosen: {record['chosen']:g}; record: {output}")
