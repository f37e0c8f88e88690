"""Commands that train: the quickstart, a stage, a study, a search for rates; and a look at the data before."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from pivot_hub.cli.app import JsonPath, Runs, app, bar, data, is_first, log, numbers, out, write
from pivot_hub.errors import RecipeError


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder of the run; run again to go on or to reuse.")] = Path(
        "quickstart"
    ),
    seed: Annotated[int, typer.Option(help="Of the MLLM's training, both branches alike.")] = 0,
    push_local: Annotated[
        bool, typer.Option("--push-local", help="Then publish both to a hub on this machine, and load them by name.")
    ] = False,
) -> None:
    """Train an SFT and a DPO encoder from one parent on the built-in world, and compare them.

    Example: `pivot quickstart --output quickstart`
    """
    from pivot_hub.quickstart import push_quickstart, run_quickstart

    if push_local:
        from tests.local_server.serve import need_server

        need_server()
    report = run_quickstart(output, seed=seed, log=log)
    out.print(report.table())
    log(f"report: {output / 'report.md'}; encoders: {output / 'hub' / 'pivot'}")
    if push_local:
        push_quickstart(output, log=log)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a shipped one by name, as shapes/3-dpo.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value, as in args.beta=0.2.")] = None,
    runs: Runs = Path("runs"),
    output: Annotated[Path | None, typer.Option(help="The stage's folder, when not below RUNS.")] = None,
    parent: Annotated[Path | None, typer.Option(help="The parent's checkpoint, when not below RUNS.")] = None,
    parents: Annotated[bool, typer.Option("--parents", help="First train the parents that are not finished.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will cost, and load no weight.")] = False,
    machine: Annotated[str, typer.Option(help="For --dry-run, a file of recipes/accelerate.")] = "ddp",
    processes: Annotated[int, typer.Option(help="For --dry-run, GPUs.")] = 8,
    mfu: Annotated[
        float | None, typer.Option(help="For --dry-run, the share of a GPU's peak that is reached; 0.35 by default.")
    ] = None,
    lengths: Annotated[
        Path | None, typer.Option(help="For --dry-run, what `pivot data check --json` wrote, instead of `expect`.")
    ] = None,
    hf_job: Annotated[bool, typer.Option("--hf-job", help="Print the command of a Hugging Face Job instead.")] = False,
    submit: Annotated[bool, typer.Option("--submit", help="With --hf-job, run that command.")] = False,
    flavor: Annotated[str, typer.Option(help="For --hf-job, hardware, as `hf jobs hardware` lists it.")] = "a100x8",
    bucket: Annotated[str | None, typer.Option(help="For --hf-job, owner/name of the bucket that keeps runs.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Train one stage; a stopped run goes on where it was, a finished one is reused.

    Example: `pivot train shapes/1-align args.max_steps=20 --runs runs`; what a large one costs:
    `pivot train siglip2-so400m/3-dpo --dry-run --machine fsdp2 --processes 8`
    """
    from pivot_hub.config.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if dry_run:
        from pivot_hub.planner.estimate import plan_stage
        from pivot_hub.planner.gpus import MFU

        measured = json.loads(lengths.read_text()) if lengths else None
        with out.status("a step is rehearsed without weights, in about half a minute"):  # on a terminal only
            plan = plan_stage(loaded, machine, processes, MFU if mfu is None else mfu, measured)
        out.print(plan.table(), markup=False)
        write(json_path, plan.to_dict())
        return
    if hf_job:
        from pivot_hub.training.jobs import hf_job_command

        if bucket is None:
            raise RecipeError("--hf-job: give --bucket owner/name, in which runs and checkpoints outlive the job.")
        command = hf_job_command(loaded, overrides or [], flavor=flavor, bucket=bucket)
        log(shlex.join(command))
        write(json_path, {"command": command})
        if submit:
            raise typer.Exit(subprocess.run(command, check=False).returncode)
        return
    from pivot_hub.training.stage import leave_processes, run_stage

    for earlier in loaded.lineage()[:-1] if parents else []:
        run_stage(earlier, runs, log=log)
    folder = run_stage(loaded, runs, output, parent, log=log)
    if is_first():
        log(f"checkpoint: {folder}")
        write(json_path, json.loads((folder / "report.json").read_text()) | {"checkpoint": str(folder)})
    leave_processes()


@app.command()
def study(
    study: Annotated[str, typer.Argument(help="A study's file, or the name of a shipped one, as shapes/study.")],
    output: Annotated[Path | None, typer.Option(help="Folder of runs, table and report; `study` by default.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time: the GPUs in turn, or a share of the cores.")] = 1,
    report: Annotated[
        bool,
        typer.Option(
            "--report", help="Train nothing: write the report anew from the table in OUTPUT, or beside the file."
        ),
    ] = False,
) -> None:
    """Train and measure a grid of recipes over seeds and factors, and report it from one table; resumes.

    Example: `pivot study shapes/study --jobs 2`, then `pivot study shapes/study --report --output study`
    """
    from pivot_hub.study.design import load_study
    from pivot_hub.study.report import write_report
    from pivot_hub.study.runner import run_study
    from pivot_hub.study.table import collect_table, read_table, write_table

    made = load_study(study)
    if report:
        folder = output or made.path.parent
        table = read_table(folder / f"{made.path.stem}.parquet")
    else:
        folder = output or Path("study")
        try:
            run_study(made.path, folder, jobs, log=log)
        finally:
            table = collect_table(made, folder)
            write_table(table, folder / f"{made.path.stem}.parquet")
    text = folder / f"{made.path.stem.upper()}.md"
    write_report(made, table, text)
    log(f"report: {text}")


@app.command()
def search(
    recipe: Annotated[str, typer.Argument(help="A recipe with a parent that is finished below RUNS.")],
    rates: Annotated[str, typer.Option(help="Candidates, comma-separated.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value, for every candidate.")] = None,
    runs: Runs = Path("runs"),
    output: Annotated[Path, typer.Option(help="The record, JSON.")] = Path("search.json"),
) -> None:
    """Choose a stage's learning rate on validation pairs, recording every candidate.

    Example: `pivot search shapes/3-dpo --rates 3e-5,1e-4,3e-4 --output search-dpo.json`
    """
    candidates = numbers("--rates", rates, float)
    from pivot_hub.study.learning_rate import search_learning_rate

    record = search_learning_rate(recipe, candidates, runs, output, overrides=overrides or [], log=log)
    log(f"chosen: {record['chosen']:g}; record: {output}")


@data.command("check")
def data_check(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a shipped one by name, as shapes/3-dpo.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value, as for train.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that decode and count; one a core by default.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Read every row of a recipe, decode every image, count every token; nothing is trained and no weight loaded.

    Example: `pivot data check siglip2-so400m/3-dpo --json check.json`
    """
    from pivot_hub.config.data_section import FileData
    from pivot_hub.config.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from pivot_hub.training.row_check import check_data

    # All of the bad rows are wanted, whatever training would do at the first.
    every = loaded.model_copy(update={"recipe": loaded.recipe.model_copy(update={"on_bad_row": "skip"})})
    with bar("rows") as advance:
        report = check_data(every, advance=advance, fresh=True, workers=workers).report
    out.print(report.text(), markup=False)
    on_bad_row = loaded.recipe.on_bad_row
    write(json_path, {"recipe": loaded.name, "on_bad_row": on_bad_row, **report.to_dict()})
    for number, (spec, source) in enumerate(zip(loaded.recipe.data, report.sources, strict=True)):
        if isinstance(spec, FileData) and spec.expect is not None:
            wanted = min(spec.sample or spec.expect.rows, spec.expect.rows)
            if source["rows"] != wanted:
                log(f"source {number}: {source['rows']} rows, where the recipe expects {wanted}")
    if report.skipped_rows and on_bad_row == "stop":
        log("training would stop at the first of these rows: mend them, or set `on_bad_row: skip` in the recipe")
        raise typer.Exit(1)
