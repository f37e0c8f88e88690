"""Hugging Face Jobs: the command that trains a stage on rented GPUs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pivot_hub import __version__
from pivot_hub.config.recipe import RECIPES, LoadedRecipe
from pivot_hub.errors import RecipeError

IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"  # that of `hf jobs uv run`; torch's wheels bring CUDA
MACHINES = RECIPES / "accelerate"


def hf_job_command(
    loaded: LoadedRecipe,
    overrides: Sequence[str] = (),
    *,
    flavor: str,
    bucket: str,
    timeout: str = "24h",
    machine: Literal["single", "ddp", "fsdp2", "zero2", "zero3"] | None = None,
    package: str = f"pivot-hub=={__version__}",
    secrets: Sequence[str] = ("HF_TOKEN",),
) -> list[str]:
    """The `hf jobs run` command of a stage; run again with the same bucket, it goes on where the last one was.

    Args:
        loaded: the recipe; its folder is mounted, with what lies in it.
        overrides: of the recipe, as `pivot train` takes them.
        flavor: of the hardware, as `hf jobs hardware` lists them; `a100x4` has four GPUs.
        bucket: `owner/name` of the bucket that runs, checkpoints and downloads are kept in; parents lie there too.
        timeout: after which the job is ended.
        machine: file of recipes/accelerate; ddp where the flavor has several GPUs.
        package: requirement that installs this package, with extras or from a repository.
        secrets: names of environment variables whose values `hf` sends; never the values.

    Raises:
        RecipeError: a data file or part lies where a job does not see it, or a secret is a value.
    """
    folder = loaded.path.parent
    _check_reach(loaded, folder)
    if values := [name for name in secrets if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name)]:
        hidden = f"{values[0][:2]}..."
        raise RecipeError(f"a secret is named by its environment variable, as HF_TOKEN; {hidden} is no such name.")
    found = re.search(r"x(\d+)$", flavor)
    gpus = int(found[1]) if found else 1
    kind = machine or ("ddp" if gpus > 1 else "single")
    requirements = ["--with", package] + (["--with", "deepspeed"] if kind.startswith("zero") else [])
    launch = ["accelerate", "launch", "--config_file", f"/machines/{kind}.yaml", "--num_processes", str(gpus)]
    train = ["-m", "pivot_hub", "train", f"/recipes/{loaded.name}.yaml", *overrides, "--runs", "/runs"]
    return [
        *("hf", "jobs", "run", "--flavor", flavor, "--timeout", timeout, "--name", loaded.name.replace("/", "-")),
        *(part for name in secrets for part in ("--secrets", name)),
        *("--env", "HF_HOME=/runs/.hf"),  # downloads and reference log-probabilities outlive the job
        *("--volume", f"hf://buckets/{bucket}:/runs"),
        *("--volume", f"{folder}:/recipes/{folder.name}"),
        *("--volume", f"{MACHINES}:/machines"),
        *(IMAGE, "uv", "run", "--no-project", *requirements, *launch, *train),
    ]


def _check_reach(loaded: LoadedRecipe, folder: Path) -> None:
    """Refuse local files beside which the recipe does not lie: a job has the recipe's folder and the Hub."""
    recipe = loaded.recipe
    named = [recipe.model.vision, recipe.model.language] if recipe.model else []
    for source in recipe.data:
        named += [value for key in ("path", "images") if isinstance(value := getattr(source, key, None), str)]
    for reference in named:
        place = Path(loaded.locate(reference))
        if place.exists() and not place.is_relative_to(folder):
            raise RecipeError(
                f"{loaded.path}: {reference} lies outside of the recipe's folder, which is all that a job has of this "
                "machine: move it there, or name it on the Hub."
            )
