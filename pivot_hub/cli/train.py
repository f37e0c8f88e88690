"""Commands that train: the quickstart, and one stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pivot_hub.cli.app import JsonPath, Overrides, RecipeName, Runs, app, is_first, log, out, warn, write


@app.command()
def quickstart(
    output: Annotated[
        Path, typer.Option(help="Folder of the run. The same command resumes it, and reuses what is finished.")
    ] = Path("quickstart"),
    seed: Annotated[int, typer.Option(help="Seed of the MLLM's training, the same for SFT and DPO.")] = 0,
    push_local: Annotated[
        bool,
        typer.Option("--push-local", help="Then publish both to a Hub server on this machine, and load them by name."),
    ] = False,
) -> None:
    """Train an SFT and a DPO encoder from one parent on the synthetic Shapes dataset, and compare them.

    Example: `pivot quickstart --output quickstart`
    """
    from pivot_hub.quickstart import push_quickstart, run_quickstart

    if push_local:
        from pivot_hub.publish.push_local import load_local_server

        load_local_server()
    report = run_quickstart(output, seed=seed, log=log)
    out.print(report.table())
    log(f"report: {output / 'report.md'}; encoders: {output / 'hub' / 'pivot'}")
    if push_local:
        push_quickstart(output, log=log)


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    output: Annotated[Path | None, typer.Option(help="Folder of the stage, when it is not below RUNS.")] = None,
    parent: Annotated[Path | None, typer.Option(help="Checkpoint of the parent, when it is not below RUNS.")] = None,
    parents: Annotated[bool, typer.Option("--parents", help="First train the parents that are not finished.")] = False,
    json_path: JsonPath = None,
    # Deprecated: `pivot plan` and `pivot jobs` are commands now.
    dry_run: Annotated[bool, typer.Option("--dry-run", hidden=True)] = False,
    machine: Annotated[str | None, typer.Option(hidden=True)] = None,
    processes: Annotated[int, typer.Option(min=1, hidden=True)] = 8,
    mfu: Annotated[float | None, typer.Option(hidden=True)] = None,
    lengths: Annotated[Path | None, typer.Option(hidden=True)] = None,
    hf_job: Annotated[bool, typer.Option("--hf-job", hidden=True)] = False,
    submit: Annotated[bool, typer.Option("--submit", hidden=True)] = False,
    flavor: Annotated[str, typer.Option(hidden=True)] = "a100x8",
    bucket: Annotated[str | None, typer.Option(hidden=True)] = None,
    package: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Train one stage. A run that was stopped resumes, and a finished one is reused.

    SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C stop a run after the current step, which is saved; the exit code is then 3, and
    the same command resumes. A second Ctrl-C stops at once.

    Example: `pivot train shapes/1-align args.max_steps=20 --runs runs`
    """
    from pivot_hub.config.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if dry_run:
        from pivot_hub.cli.plan import print_plan

        warn("`pivot train --dry-run` is deprecated: use `pivot plan`, with --accelerate-config for --machine.")
        print_plan(loaded, machine or "ddp", processes, mfu, lengths, json_path)
        return
    if hf_job:
        from pivot_hub.cli.plan import print_job

        warn("`pivot train --hf-job` is deprecated: use `pivot jobs`.")
        print_job(loaded, overrides, bucket, package, flavor, machine, submit, json_path)
        return
    from pivot_hub.training.stage import leave_processes, run_stage

    for earlier in loaded.lineage()[:-1] if parents else []:
        run_stage(earlier, runs, log=log)
    folder = run_stage(loaded, runs, output, parent, log=log)
    if is_first():
        log(f"checkpoint: {folder}")
        write(json_path, json.loads((folder / "report.json").read_text()) | {"checkpoint": str(folder)})
    leave_processes()
