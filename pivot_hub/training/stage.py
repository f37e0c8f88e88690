"""Run a stage: from a checked recipe to a finished checkpoint folder, through any number of kills.

A run works in `<output>.partial`, where its checkpoints lie, and is renamed to `<output>` when whole: an
output folder that exists is finished.
"""

from __future__ import annotations

import errno
import json
import shutil
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from pivot_hub.data.source import RowReport
from pivot_hub.errors import CheckpointError, RecipeError, TrainingError
from pivot_hub.files import write_json
from pivot_hub.provenance import file_sha256, machine, peak_memory_mb, seal, source_commit, versions, weights_sha256
from pivot_hub.recipe import LoadedRecipe, load_recipe, write_recipe
from pivot_hub.training import trainer_config
from pivot_hub.training.metrics import MetricsLog, PlainProgress
from pivot_hub.training.preemption import Preemption

MODULES = {"vision": "vision", "language": "language", "dpo": "dpo"}  # every other stage is SFT


def run_stage(
    loaded: LoadedRecipe,
    runs: str | Path = "runs",
    output: str | Path | None = None,
    parent: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Train one stage and return its checkpoint folder.

    A finished run of the same recipe is returned as it is; an interrupted one goes on from its last
    checkpoint and ends with the weights it would have had.

    Args:
        loaded: the recipe.
        runs: folder of all runs; a stage's place below it is the recipe's name, as in `shapes/3-dpo`.
        output: the stage's folder, when not below `runs`.
        parent: the parent's checkpoint folder, when not below `runs`.
        say: gets progress, one line at a time.

    Raises:
        RecipeError: another recipe's run lies at the output.
        CheckpointError: the parent has no checkpoint.
        DataError, TrainingError: see their classes; the last good checkpoint stays.
    """
    folder = Path(output) if output is not None else Path(runs) / loaded.name
    sha = loaded.recipe.sha256()
    if folder.exists():
        _same_recipe(folder, sha)
        say(f"{loaded.name}: finished before, at {folder}")
        return folder
    parent_folder = _parent_checkpoint(loaded, Path(runs), parent)
    work = folder.with_name(f"{folder.name}.partial")
    if work.exists():
        _same_recipe(work, sha)
    try:
        return _train(loaded, folder, work, parent_folder, say)
    except Exception as error:
        if not _last_checkpoint(work):  # nothing worth resuming: leave nothing behind
            shutil.rmtree(work, ignore_errors=True)
        if _disk_is_full(error):
            raise TrainingError(
                f"the disk is full: free some space and run the same command again; it resumes from {work}."
            ) from error
        raise


def _train(loaded: LoadedRecipe, folder: Path, work: Path, parent: Path | None, say: Callable[[str], None]) -> Path:
    recipe = loaded.recipe
    started, report = time.monotonic(), RowReport()
    work.mkdir(parents=True, exist_ok=True)
    write_recipe(loaded, work / "recipe.yaml")
    log = MetricsLog(work / "metrics.jsonl")
    module = import_module(f"pivot_hub.training.{MODULES.get(recipe.stage, 'sft')}")
    args = trainer_arguments(loaded, work)
    trainer: Trainer = module.build_trainer(loaded, args, parent, report, [log])
    trainer.remove_callback(PrinterCallback)
    if not sys.stderr.isatty():
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(PlainProgress(loaded.name, say))
    if report.skipped:
        say(f"{loaded.name}: {len(report.skipped)} rows skipped, the first: {report.skipped[0]}")
    resume = _last_checkpoint(work)
    if resume is not None:
        say(f"{loaded.name}: resuming from step {_step_of(resume)}")
    log.cut_to(_step_of(resume) if resume else 0)
    with Preemption() as preemption:
        trainer.add_callback(preemption)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if preemption.asked and trainer.state.global_step < trainer.state.max_steps:
        raise TrainingError(
            f"stopped by SIGTERM after step {trainer.state.global_step} of {trainer.state.max_steps}, which is saved: "
            "run the same command again to go on."
        )
    duration = time.monotonic() - started

    whole = work / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    module_save = getattr(module, "save", None)
    if module_save is not None:
        module_save(trainer, whole)
    else:
        trainer.save_model(str(whole))
        (whole / "training_args.bin").unlink(missing_ok=True)  # a pickle, and recipe.yaml says it all
    for name in ("recipe.yaml", "metrics.jsonl"):
        shutil.copy2(work / name, whole / name)
    facts = {
        "recipe": loaded.name,
        "recipe_sha256": recipe.sha256(),
        "steps": trainer.state.global_step,
        "duration_s": round(duration, 1),
        "resumed": resume is not None,
        "peak_memory_mb": peak_memory_mb(),
        "train_loss": next((h["train_loss"] for h in reversed(trainer.state.log_history) if "train_loss" in h), None),
        "data": report.facts(),
    }
    write_json(whole / "report.json", facts)
    seal(whole, _provenance(loaded, parent, whole))
    if (work / "runs").is_dir():  # TensorBoard's events, unsealed: their names hold the host's
        shutil.copytree(work / "runs", whole / "tensorboard")
    whole.replace(folder)
    shutil.rmtree(work)
    return folder


def trainer_arguments(loaded: LoadedRecipe, work: Path) -> TrainingArguments:
    """The stage's trainer config: the recipe's arguments over the defaults that every stage shares."""
    recipe = loaded.recipe
    rates = recipe.learning_rate.trained()
    loggers = [name for name in ("tensorboard", "trackio") if find_spec(name)]
    options: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 0.25,  # four checkpoints a run
        "save_total_limit": 2,
        "logging_steps": 10,
        "logging_nan_inf_filter": False,
        "report_to": loggers or "none",
        "dataloader_pin_memory": False,
        "bf16": torch.cuda.is_available(),  # TRL's default, which stops on a CPU
        **recipe.args,
        "output_dir": str(work),
        "learning_rate": max(rates.values()),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "remove_unused_columns": False,
    }
    try:
        return trainer_config(recipe.stage)(**options)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{loaded.path}: `args` do not fit together: {error}") from error


def _parent_checkpoint(loaded: LoadedRecipe, runs: Path, given: str | Path | None) -> Path | None:
    if given is None and loaded.parent is None:
        return None
    if given is not None:
        folder = Path(given)
        remedy = "give the folder of a finished stage with --parent"
    else:
        assert loaded.parent is not None
        folder = runs / loaded.parent.name
        remedy = f"run `pivot train {loaded.parent.name}` first, or give its folder with --parent"
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{loaded.path}: the parent has no checkpoint at {folder}; {remedy}.")
    return folder


def _same_recipe(folder: Path, sha: str) -> None:
    """Refuse a folder that holds another recipe's run: mixing the two would be silent."""
    file = folder / "recipe.yaml"
    if not file.is_file():
        raise RecipeError(f"{folder} exists and is no run of a recipe; choose another --output.")
    if sha not in file.read_text():
        raise RecipeError(
            f"{folder} holds a run of another version of this recipe; delete it or choose another --output."
        )


def _last_checkpoint(work: Path) -> Path | None:
    """The newest checkpoint that was written to its end: trainer_state.json is the last file of each."""
    whole = []
    for folder in work.glob("checkpoint-*"):
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        whole.append(folder)
    return max(whole, key=_step_of, default=None)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # safetensors and torch report the same in their own exceptions, by text only.
        if full or "No space left on device" in str(error) or "file write failed" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _provenance(loaded: LoadedRecipe, parent: Path | None, whole: Path) -> dict[str, Any]:
    recipe = loaded.recipe
    data = []
    for spec in recipe.data:
        facts = spec.model_dump(mode="json", exclude_none=True)
        if "path" in facts:
            facts["sha256"] = file_sha256(Path(loaded.locate(facts["path"])))
            facts |= {key: Path(facts[key]).name for key in ("path", "images")}
        data.append(facts)
    before = None
    if parent is not None:
        before = {
            "name": loaded.parent.name if loaded.parent else parent.name,
            "weights_sha256": weights_sha256(parent),
        }
        if (parent / "provenance.json").is_file():
            before["provenance"] = json.loads((parent / "provenance.json").read_text())
    return {
        "stage": recipe.stage,
        "recipe": loaded.name,
        "recipe_sha256": recipe.sha256(),
        "model": recipe.model.model_dump(exclude_none=True) if recipe.model else None,
        "parts": _part_hashes(loaded) if parent is None and recipe.model else None,
        "parent": before,
        "data": data,
        "weights_sha256": weights_sha256(whole),
        "commit": source_commit(),
        "versions": versions(),
        "machine": machine(),
    }


def _part_hashes(loaded: LoadedRecipe) -> dict[str, str]:
    """Weights of the parts that were joined, where they are folders; Hub parts are named by revision."""
    assert loaded.recipe.model is not None
    folders = {part: Path(loaded.locate(getattr(loaded.recipe.model, part))) for part in ("vision", "language")}
    return {part: weights_sha256(folder) for part, folder in folders.items() if folder.is_dir()}


def run_lineage(recipe: str | Path, runs: str | Path, say: Callable[[str], None] = print) -> Path:
    """Run a recipe after whichever of its ancestors are not finished yet."""
    for loaded in load_recipe(recipe).lineage():
        folder = run_stage(loaded, runs, say=say)
    return folder
