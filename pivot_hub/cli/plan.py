"""Commands that say what a stage needs before it runs: its cost, its job on rented GPUs, and its data."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pivot_hub.cli.app import JsonPath, Overrides, RecipeName, app, bar, data, log, out, write
from pivot_hub.config.data_section import FileData, OnBadRow
from pivot_hub.errors import RecipeError

if TYPE_CHECKING:
    from pivot_hub.config.recipe import LoadedRecipe
    from pivot_hub.data.report import RowReport

LENGTHS_REMEDY = "give the file that `pivot data check --json` wrote"
LENGTHS_HELP = "The file that `pivot data check --json` wrote, in place of the recipe's `expect`."
PACKAGE_HELP = (
    "Requirement that installs pivot-hub in the job, as `pivot-hub @ git+https://github.com/me/pivot-hub@v1`; "
    "checked before a job is submitted."
)
MFU_HELP = "Share of the GPU's peak that all FLOPs run at, recomputed ones too; 0.35 by default."


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    accelerate_config: Annotated[str, typer.Option(help="Name of a file in recipes/accelerate.")] = "ddp",
    processes: Annotated[int, typer.Option(min=1, help="Number of processes, one for each GPU.")] = 8,
    mfu: Annotated[float | None, typer.Option(help=MFU_HELP)] = None,
    lengths: Annotated[Path | None, typer.Option(help=LENGTHS_HELP)] = None,
    json_path: JsonPath = None,
) -> None:
    """Estimate what a stage will cost: parameters, FLOPs, memory a GPU, hours, disk. No weight is loaded.

    Example: `pivot plan siglip2-so400m/3-dpo --accelerate-config fsdp2 --processes 8`
    """
    from pivot_hub.config.recipe import load_recipe

    print_plan(load_recipe(recipe, overrides or []), accelerate_config, processes, mfu, lengths, json_path)


@app.command()
def jobs(
    recipe: RecipeName,
    overrides: Overrides = None,
    bucket: Annotated[str | None, typer.Option(help="owner/name of the bucket that keeps runs.")] = None,
    package: Annotated[str | None, typer.Option(help=PACKAGE_HELP)] = None,
    flavor: Annotated[str, typer.Option(help="Hardware, as `hf jobs hardware` lists it.")] = "a100x8",
    accelerate_config: Annotated[
        str | None,
        typer.Option(help="Name of a file in recipes/accelerate; by default ddp where the flavor has several GPUs."),
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Run the command instead of printing it only.")] = False,
    json_path: JsonPath = None,
) -> None:
    """Print the command that trains a stage on rented GPUs, as a Hugging Face Job; `--submit` runs it.

    Example: `pivot jobs siglip2-so400m/3-dpo --bucket me/runs --package pivot-hub==1.0`
    """
    from pivot_hub.config.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    print_job(loaded, overrides, bucket, package, flavor, accelerate_config, submit, json_path)


def print_plan(
    loaded: LoadedRecipe,
    accelerate_config: str,
    processes: int,
    mfu: float | None,
    lengths: Path | None,
    json_path: Path | None,
) -> None:
    """Print a stage's plan, and write it as JSON if a file is named."""
    from pivot_hub.planner.estimate import plan_stage
    from pivot_hub.planner.gpus import HFU

    measured = _read_lengths(lengths) if lengths else None
    with out.status("profiling a step on fake tensors, which takes about half a minute"):  # on a terminal only
        plan = plan_stage(loaded, accelerate_config, processes, HFU if mfu is None else mfu, measured)
    out.print(plan.table(), markup=False)
    write(json_path, plan.to_dict())


def _read_lengths(file: Path) -> dict[str, Any]:
    try:
        measured = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise RecipeError(f"--lengths {file} cannot be read ({error}); {LENGTHS_REMEDY}.") from error
    if not isinstance(measured, dict):
        raise RecipeError(f"--lengths {file} holds no mapping; {LENGTHS_REMEDY}.")
    return measured


def print_job(
    loaded: LoadedRecipe,
    overrides: list[str] | None,
    bucket: str | None,
    package: str | None,
    flavor: str,
    accelerate_config: str | None,
    submit: bool,
    json_path: Path | None,
) -> None:
    """Print the command of a stage's Hugging Face Job, and run it if `submit` is set.

    Raises:
        RecipeError: No bucket or no package is given, or the package cannot be installed.
        typer.Exit: The submitted command has ended; the code is its own.
    """
    from pivot_hub.training.jobs import check_package, hf_job_command

    if bucket is None:
        raise RecipeError("give --bucket owner/name, which keeps runs and checkpoints after the job ends.")
    if package is None:
        raise RecipeError(
            "give --package, a requirement that installs pivot-hub in the job, as "
            "`pivot-hub @ git+https://github.com/me/pivot-hub@v1`."
        )
    command = hf_job_command(
        loaded, overrides or [], flavor=flavor, bucket=bucket, package=package, accelerate_config=accelerate_config
    )
    if submit:
        check_package(package)
    log(shlex.join(command))
    write(json_path, {"command": command})
    if submit:
        raise typer.Exit(subprocess.run(command, check=False).returncode)


@data.command("check")
def data_check(
    recipe: RecipeName,
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of processes that decode images; one for each core by default.")
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Read every row of a recipe, decode every image, count every token. Nothing is trained and no weight loaded.

    Example: `pivot data check siglip2-so400m/3-dpo --json check.json`
    """
    from pivot_hub.config.recipe import load_recipe
    from pivot_hub.training.row_check import check_data

    loaded = load_recipe(recipe, overrides or [])
    # The check lists all bad rows, also where training would stop at the first.
    skipping = loaded.recipe.model_copy(update={"on_bad_row": OnBadRow.SKIP})
    with bar("rows") as advance:
        index = check_data(loaded.model_copy(update={"recipe": skipping}), advance=advance, fresh=True, workers=workers)
    report, policy = index.report, loaded.recipe.on_bad_row
    out.print(report.text(), markup=False)
    write(json_path, {"recipe": loaded.name, "on_bad_row": policy, **report.to_dict()})
    for message in _unexpected_sizes(loaded, report):
        log(message)
    if report.skipped_rows and policy is OnBadRow.STOP:
        log("training would stop at the first of these rows: fix them, or set `on_bad_row: skip` in the recipe")
        raise typer.Exit(1)


def _unexpected_sizes(loaded: LoadedRecipe, report: RowReport) -> list[str]:
    """Return a message for each source that has another number of rows than its recipe expects."""
    messages = []
    for number, (spec, source) in enumerate(zip(loaded.recipe.data, report.sources, strict=True)):
        if isinstance(spec, FileData) and spec.expect is not None:
            expected = min(spec.sample or spec.expect.rows, spec.expect.rows)
            if source["rows"] != expected:
                messages.append(f"source {number}: {source['rows']} rows, where the recipe expects {expected}")
    return messages
