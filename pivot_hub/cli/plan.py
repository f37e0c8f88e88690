"""Commands that say what a stage needs before it runs: its cost, and its job on rented GPUs."""

from __future__ import annotations

import json
import shlex
import subprocess
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pivot_hub.cli.app import JsonPath, Overrides, PackageSource, RecipeName, app, log, out, write
from pivot_hub.errors import RecipeError

if TYPE_CHECKING:
    from pivot_hub.config.recipe import LoadedRecipe

LENGTHS_REMEDY = "give the file that `pivot data check --json` wrote"
LENGTHS_HELP = "The file that `pivot data check --json` wrote, in place of the recipe's `expect`."
HFU_HELP = "Share of the GPU's peak that all FLOPs run at, recomputed ones too; 0.35 by default."


REHEARSE_HELP = (
    "Instead of the costs, run the stage's step and what follows it on fake tensors of this device, without a GPU: "
    "kernels, attention calls, synchronisations, copies. Exits with 1 if a path has a problem."
)


class RehearsedDevice(StrEnum):
    """Devices that can be rehearsed."""

    CUDA = "cuda"


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    accelerate_config: Annotated[str, typer.Option(help="Name of a file in recipes/accelerate.")] = "ddp",
    processes: Annotated[int, typer.Option(min=1, help="Number of processes, one for each GPU.")] = 8,
    hfu: Annotated[float | None, typer.Option("--hfu", "--mfu", help=HFU_HELP)] = None,
    lengths: Annotated[Path | None, typer.Option(help=LENGTHS_HELP)] = None,
    rehearse: Annotated[RehearsedDevice | None, typer.Option(help=REHEARSE_HELP)] = None,
    json_path: JsonPath = None,
) -> None:
    """Estimate what a stage will cost: parameters, FLOPs, memory a GPU, hours, disk. No weight is loaded.

    Example: `pivot plan siglip2-so400m/3-dpo --accelerate-config fsdp2 --processes 8`
    """
    from pivot_hub.config.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if rehearse is not None:
        print_rehearsal(recipe, overrides or [], json_path)
        return
    print_plan(loaded, accelerate_config, processes, hfu, lengths, json_path)


@app.command("plan-encode")
def plan_encode(
    encoder: Annotated[str, typer.Argument(help="Folder, Hub name or short name (`pivot list`) of an encoder.")],
    images: Annotated[float, typer.Option(help="Number of images, as in 1e8.")],
    tokens: Annotated[bool, typer.Option("--tokens", help="All patch tokens are written, not their mean.")] = False,
    dtype: Annotated[str, typer.Option(help="Type to compute in: float32, float16 or bfloat16.")] = "bfloat16",
    store: Annotated[str, typer.Option(help="Type to store: float32, float16, bfloat16 or int8.")] = "float16",
    processes: Annotated[int, typer.Option(min=1, help="Number of processes, one for each GPU.")] = 1,
    hfu: Annotated[float | None, typer.Option(help=HFU_HELP)] = None,
    decode_ms: Annotated[
        float | None, typer.Option(help="Milliseconds of a core to decode and prepare an image; 18 by default.")
    ] = None,
    usd_per_hour: Annotated[float | None, typer.Option(help="Price of one GPU for an hour.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Estimate what `pivot encode` takes: images a second, hours and cost on GPUs, cores, bytes. No weight is loaded.

    Example: `pivot plan-encode google/siglip2-so400m-patch16-384 --images 1e8 --processes 8 --usd-per-hour 2.5`
    """
    from pivot_hub.planner.encoding import DECODE_MS, plan_encoding
    from pivot_hub.planner.gpus import HFU

    plan = plan_encoding(
        encoder,
        images,
        tokens=tokens,
        dtype=dtype,
        store=store,
        processes=processes,
        hfu=HFU if hfu is None else hfu,
        decode_ms=DECODE_MS if decode_ms is None else decode_ms,
        usd_per_hour=usd_per_hour,
    )
    out.print(plan.table(), markup=False)
    write(json_path, plan.to_dict())


@app.command()
def jobs(
    recipe: RecipeName,
    overrides: Overrides = None,
    bucket: Annotated[str | None, typer.Option(help="owner/name of the bucket that keeps runs.")] = None,
    package: PackageSource = None,
    flavor: Annotated[str, typer.Option(help="Hardware, as `hf jobs hardware` lists it.")] = "a100x8",
    accelerate_config: Annotated[
        str | None,
        typer.Option(help="Name of a file in recipes/accelerate; by default ddp where the flavor has several GPUs."),
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Run the command instead of printing it only.")] = False,
    json_path: JsonPath = None,
) -> None:
    """Print the command that trains a stage on rented GPUs, as a Hugging Face Job; `--submit` runs it.

    The job installs this package from the checkout's remote, at its commit. `--package` names another source.

    Example: `pivot jobs siglip2-so400m/3-dpo --bucket me/runs`
    """
    from pivot_hub.config.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    print_job(loaded, overrides, bucket, package, flavor, accelerate_config, submit, json_path)


def print_plan(
    loaded: LoadedRecipe,
    accelerate_config: str,
    processes: int,
    hfu: float | None,
    lengths: Path | None,
    json_path: Path | None,
) -> None:
    """Print a stage's plan, and write it as JSON if a file is named."""
    from pivot_hub.planner.estimate import plan_stage
    from pivot_hub.planner.gpus import HFU

    measured = _read_lengths(lengths) if lengths else None
    with out.status("profiling a step on fake tensors: half a minute, or two of Qwen-VL"):  # on a terminal only
        plan = plan_stage(loaded, accelerate_config, processes, HFU if hfu is None else hfu, measured)
    out.print(plan.table(), markup=False)
    write(json_path, plan.to_dict())


def print_rehearsal(recipe: str, overrides: list[str], json_path: Path | None) -> None:
    """Print what a stage's paths ask of a CUDA device, and write it as JSON if a file is named.

    Raises:
        RehearsalError: This machine cannot rehearse.
        typer.Exit: A path has a problem.
    """
    from pivot_hub.provenance import versions
    from pivot_hub.rehearsal.process import rehearse_recipes
    from pivot_hub.rehearsal.report import table

    with out.status("running each path twice, which takes minutes"):  # on a terminal only
        reports = rehearse_recipes([recipe], overrides)
    out.print(table(reports), markup=False)
    paths = [report.to_dict() for report in reports]
    write(json_path, {"recipe": recipe, "overrides": overrides, "paths": paths, "versions": versions()})
    if any(report.problems for report in reports):
        raise typer.Exit(1)


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
        RecipeError: No bucket is given.
        SourceError: The package cannot be installed by a job.
        typer.Exit: The submitted command has ended; the code is its own.
    """
    from pivot_hub.package_source import check_installable, package_requirement
    from pivot_hub.training.jobs import hf_job_command

    if bucket is None:
        raise RecipeError("give --bucket owner/name, which keeps runs and checkpoints after the job ends.")
    package = package_requirement(package)
    command = hf_job_command(
        loaded, overrides or [], flavor=flavor, bucket=bucket, package=package, accelerate_config=accelerate_config
    )
    if submit:
        check_installable(package)
    log(shlex.join(command))
    write(json_path, {"command": command})
    if submit:
        raise typer.Exit(subprocess.run(command, check=False).returncode)
