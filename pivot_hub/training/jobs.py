"""Hugging Face Jobs: the command that trains a stage on rented GPUs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pivot_hub.config.accelerate import ACCELERATE_CONFIGS
from pivot_hub.config.accelerate import accelerate_config as find_accelerate_config
from pivot_hub.config.recipe import LoadedRecipe
from pivot_hub.errors import RecipeError
from pivot_hub.package_source import package_requirement

IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"  # the image of `hf jobs uv run`; torch's wheels contain CUDA


def hf_job_command(
    loaded: LoadedRecipe,
    overrides: Sequence[str] = (),
    *,
    flavor: str,
    bucket: str,
    package: str | None = None,
    timeout: str = "24h",
    accelerate_config: str | None = None,
    secrets: Sequence[str] = ("HF_TOKEN",),
) -> list[str]:
    """Return the `hf jobs run` command of a stage. Run again with the same bucket, it resumes the stopped run.

    Args:
        loaded: The recipe. Its folder is mounted with everything in it.
        overrides: Overrides of the recipe, as `pivot train` takes them.
        flavor: Hardware, as `hf jobs hardware` lists it; `a100x4` has four GPUs.
        bucket: `owner/name` of the bucket for runs, checkpoints and downloads, in which parents are looked up too.
        package: What the job installs: a git URL, the URL of a wheel, or a requirement. By default the commit of this
            checkout at its remote, as `package_requirement` finds it.
        timeout: Time after which the job is ended.
        accelerate_config: Name of the Accelerate config in recipes/accelerate. By default ddp if the flavor has
            several GPUs, else single.
        secrets: Names of environment variables whose values `hf` sends; never the values.

    Raises:
        RecipeError: A data file or a part is where a job cannot see it, a secret is a value and not a name, or there is
            no such Accelerate config.
        SourceError: The package is not where a job can install it from.
    """
    folder = loaded.path.parent
    _check_reach(loaded, folder)
    not_names = [name for name in secrets if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name)]
    if not_names:
        hidden = f"{not_names[0][:2]}..."
        raise RecipeError(f"a secret is named by its environment variable, as HF_TOKEN; {hidden} is no such name.")
    count = re.search(r"x(\d+)$", flavor)
    gpus = int(count[1]) if count else 1
    config = find_accelerate_config(accelerate_config or ("ddp" if gpus > 1 else "single"))
    requirements = ["--with", package_requirement(package)] + (["--with", "deepspeed"] if config.deepspeed else [])
    launch = ["accelerate", "launch", "--config_file", f"/accelerate/{config.path.name}", "--num_processes", str(gpus)]
    train = ["-m", "pivot_hub", "train", f"/recipes/{loaded.name}.yaml", *overrides, "--runs", "/runs"]
    return [
        *("hf", "jobs", "run", "--flavor", flavor, "--timeout", timeout, "--name", loaded.name.replace("/", "-")),
        *(part for name in secrets for part in ("--secrets", name)),
        *("--env", "HF_HOME=/runs/.hf"),  # keeps downloads and reference log-probabilities
        *("--volume", f"hf://buckets/{bucket}:/runs"),
        *("--volume", f"{folder}:/recipes/{folder.name}"),
        *("--volume", f"{ACCELERATE_CONFIGS}:/accelerate"),
        *(IMAGE, "uv", "run", "--no-project", *requirements, *launch, *train),
    ]


def _check_reach(loaded: LoadedRecipe, folder: Path) -> None:
    """Refuse local files outside of the recipe's folder: a job only has this folder and the Hub.

    Raises:
        RecipeError: A file is outside of the folder.
    """
    recipe = loaded.recipe
    keys = ("vision", "language", "mllm")
    references = [name for key in keys if (name := getattr(recipe.model, key, None)) is not None]
    for source in recipe.data:
        for key in ("path", "images"):
            value = getattr(source, key, None)
            if isinstance(value, str):
                references.append(value)
    for reference in references:
        path = Path(loaded.locate(reference))
        if path.exists() and not path.is_relative_to(folder):
            raise RecipeError(
                f"{loaded.path}: {reference} lies outside of the recipe's folder, which is all that a job has of this "
                "machine: move it there, or name it on the Hub."
            )
