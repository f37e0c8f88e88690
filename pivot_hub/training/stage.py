"""Run a stage: from a checked recipe to a finished checkpoint folder, through any number of kills.

A run works in `<output>.partial`, where its checkpoints lie, and is renamed to `<output>` when whole: an
output folder that exists is finished.

A run may have several processes, on one machine or many, started by `accelerate launch`, `torchrun` or `srun`. The
main one makes, writes, renames and deletes what lies in the output folder, which all of them must see: on several
machines it lies on a shared filesystem.
"""

from __future__ import annotations

import errno
import json
import shutil
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import LlavaForConditionalGeneration, PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from pivot_hub.config.recipe import LoadedRecipe, ModelSpec, Recipe, load_recipe, write_recipe
from pivot_hub.config.stages import stage_of
from pivot_hub.data.report import RowReport
from pivot_hub.errors import CheckpointError, RecipeError, TrainingError
from pivot_hub.files import write_json
from pivot_hub.mllm.lora import merge_lora
from pivot_hub.provenance import (
    cached_commit,
    machine,
    peak_memory_mb,
    source_commit,
    versions,
    weights_sha256,
    write_manifest,
)
from pivot_hub.training.metrics_log import MetricsLog, PlainProgress
from pivot_hub.training.part_trainer import SHARDS, stopped_file
from pivot_hub.training.preemption import Preemption

BITSANDBYTES = ("bnb", "paged", "adamw_8bit", "lion", "ademamix")  # in names of optimizers that it brings

T = TypeVar("T")


def run_stage(
    loaded: LoadedRecipe,
    runs: str | Path = "runs",
    output: str | Path | None = None,
    parent: str | Path | None = None,
    log: Callable[[str], None] = print,
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
    work = folder.with_name(f"{folder.name}.partial")
    state = _processes(loaded.recipe)
    if state.num_processes > 1 and stage_of(loaded.recipe.stage).base_part:
        raise RecipeError(f"{loaded.path}: a base part is made by one process: run `pivot train` without a launcher.")
    main = state.is_main_process
    log = log if main else _say_nothing
    if _on_main(lambda: _is_finished(folder, work, loaded.recipe.sha256())):
        log(f"{loaded.name}: finished before, at {folder}")
        return folder
    parent_folder = _on_main(lambda: _parent_checkpoint(loaded, Path(runs), parent))
    try:
        return _train(loaded, folder, work, parent_folder, log)
    except Exception as error:
        if main and not _last_checkpoint(work):  # nothing worth resuming: leave nothing behind
            shutil.rmtree(work, ignore_errors=True)
        if _disk_is_full(error):
            raise TrainingError(
                f"the disk is full: free some space and run the same command again; it resumes from {work}."
            ) from error
        raise


def _train(loaded: LoadedRecipe, folder: Path, work: Path, parent: Path | None, log: Callable[[str], None]) -> Path:
    recipe = loaded.recipe
    started, report = time.monotonic(), RowReport()
    resume = _on_main(lambda: _make_work(loaded, work))
    metrics_log = MetricsLog(work / "metrics.jsonl")
    module = import_module(stage_of(recipe.stage).module)
    args = trainer_arguments(loaded, work)
    trainer: Trainer = module.build_trainer(loaded, args, parent, report, [metrics_log])
    trainer.remove_callback(PrinterCallback)
    if not sys.stderr.isatty():
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(PlainProgress(loaded.name, log))
    if report.skipped:
        first = f"the first: {report.skipped[0]}"
        log(f"{loaded.name}: {report.skipped_rows} rows skipped, {first} (`pivot data check` looks again)")
    if resume is not None:
        log(f"{loaded.name}: resuming from step {_step_of(resume)}")
    _on_main(lambda: metrics_log.cut_to(_step_of(resume) if resume else 0))
    with Preemption() as preemption:
        trainer.add_callback(preemption)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if preemption.asked and trainer.state.global_step < trainer.state.max_steps:
        raise TrainingError(
            f"stopped by SIGTERM after step {trainer.state.global_step} of {trainer.state.max_steps}, which is saved: "
            "run the same command again to go on."
        )
    metadata = {
        "recipe": loaded.name,
        "recipe_sha256": recipe.sha256(),
        "steps": trainer.state.global_step,
        "duration_s": round(time.monotonic() - started, 1),
        "resumed": resume is not None,
        "processes": PartialState().num_processes,
        "peak_memory_mb": peak_memory_mb(),
        "train_loss": next((h["train_loss"] for h in reversed(trainer.state.log_history) if "train_loss" in h), None),
        "data": report.to_dict(),
    }
    whole = work / "whole"
    _on_main(lambda: shutil.rmtree(whole, ignore_errors=True))
    if hasattr(module, "save"):
        _on_main(lambda: module.save(trainer, whole))
    else:
        _save_gathered(trainer, whole)
    _on_main(lambda: _finish(loaded, parent, folder, work, metadata))
    return folder


def _processes(recipe: Recipe) -> PartialState:
    """This process among those of the run; where there is no accelerator they speak over gloo."""
    cpu = recipe.args.get("use_cpu", not torch.accelerator.is_available())
    return PartialState(cpu=cpu, timeout=timedelta(seconds=recipe.args.get("ddp_timeout", 1800)))


def leave_processes() -> None:
    """End this process's part in the run, before the interpreter ends.

    Gloo's threads let go of the last message's tensors under the interpreter's lock, for which they wait while this
    thread is busy. One that still waits when the interpreter ends aborts the process, whose run was finished: see
    https://github.com/pytorch/pytorch/pull/179291. Whoever sleeps gives the lock away.
    """
    state = PartialState()
    state.destroy_process_group()
    if state.num_processes > 1:
        time.sleep(0.1)


def _on_main(act: Callable[[], T]) -> T:
    """Let the main process act; what it returns or raises, every process returns or raises."""
    state = PartialState()
    made: list[Any] = [None, None]
    if state.is_main_process:
        try:
            made[0] = act()
        except Exception as error:
            made[1] = error
    if state.num_processes > 1:
        broadcast_object_list(made)
    if made[1] is not None:
        raise made[1]
    return made[0]


def _say_nothing(line: str) -> None:
    """Be a process that is not the main one."""


def _is_finished(folder: Path, work: Path, sha: str) -> bool:
    for each in (folder, work):
        if each.exists():
            _same_recipe(each, sha)
    return folder.exists()


def _make_work(loaded: LoadedRecipe, work: Path) -> Path | None:
    """Make the folder a run works in; return the checkpoint to go on from."""
    work.mkdir(parents=True, exist_ok=True)
    write_recipe(loaded, work / "recipe.yaml")
    stopped_file(work).unlink(missing_ok=True)
    return _last_checkpoint(work)


def _save_gathered(trainer: Trainer, whole: Path) -> None:
    """Write the whole model as one checkpoint, from however many processes hold it."""
    if not trainer.is_fsdp_enabled:
        merge_lora(cast(LlavaForConditionalGeneration, trainer.model))
        trainer.save_model(str(whole))
        return
    weights = trainer.accelerator.get_state_dict(trainer.model)
    for tied in cast(Any, trainer.model).all_tied_weights_keys:  # once gathered they no longer share their storage
        weights.pop(tied, None)
    trainer._save(str(whole), state_dict=weights)


def _finish(loaded: LoadedRecipe, parent: Path | None, folder: Path, work: Path, metadata: dict[str, Any]) -> None:
    """Complete the whole checkpoint with its facts and put it in its place."""
    whole = work / "whole"
    (whole / "training_args.bin").unlink(missing_ok=True)  # a pickle, and recipe.yaml says it all
    for name in ("recipe.yaml", "metrics.jsonl"):
        shutil.copy2(work / name, whole / name)
    write_json(whole / "report.json", metadata)
    write_manifest(whole, _provenance(loaded, parent, whole, metadata))
    if (work / "runs").is_dir():  # TensorBoard's events, unsealed: their names hold the host's
        shutil.copytree(work / "runs", whole / "tensorboard")
    whole.replace(folder)
    shutil.rmtree(work)


def trainer_arguments(loaded: LoadedRecipe, work: Path) -> TrainingArguments:
    """The stage's trainer config: the recipe's arguments over the defaults that every stage shares."""
    recipe = loaded.recipe
    rates = recipe.learning_rate.trained()
    if recipe.global_batch is not None:
        together = recipe.args.get("per_device_train_batch_size", 8) * PartialState().num_processes
        if recipe.global_batch % together:
            raise RecipeError(
                f"{loaded.path}: `global_batch` {recipe.global_batch} is not a multiple of {together} rows, a batch of "
                "every process; change `args.per_device_train_batch_size` or the number of processes."
            )
        shared = {"gradient_accumulation_steps": recipe.global_batch // together}
    else:
        shared = {}
    optim = str(recipe.args.get("optim", ""))
    if any(name in optim for name in BITSANDBYTES) and find_spec("bitsandbytes") is None:
        raise RecipeError(
            f"{loaded.path}: `args.optim` {optim} needs bitsandbytes; `pip install bitsandbytes` brings it."
        )
    loggers = [name for name in ("tensorboard", "trackio") if find_spec(name)]
    options: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 0.25,  # four checkpoints a run
        "save_total_limit": 2,
        "logging_steps": 10,
        "logging_nan_inf_filter": False,
        "report_to": loggers or "none",
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,  # every parameter that trains has a gradient in every step
        "use_cpu": PartialState().device.type == "cpu",
        "bf16": torch.cuda.is_available() and not recipe.args.get("fp16"),  # TRL's default, which stops on a CPU
        **recipe.args,
        **shared,
        "output_dir": str(work),
        "learning_rate": max(rates.values()),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "remove_unused_columns": False,
    }
    try:
        return stage_of(recipe.stage).config_class()(**options)
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
    if loaded.recipe.model is not None:
        _check_parent(loaded, loaded.recipe.model, folder)
    return folder


def _check_parent(loaded: LoadedRecipe, model: ModelSpec, folder: Path) -> None:
    """Refuse a parent that joins other parts than the recipe names, before any of its weights is read.

    Names are compared as they are written: a parent that was trained in another checkout has its parts elsewhere.
    """
    remedy = "give the checkpoint of this recipe's parent with --parent, or change `model` where it is named"
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != "llava":
        kind = config.get("model_type", "nameless")
        raise CheckpointError(f"{loaded.path}: the parent at {folder} is a {kind} model, not an MLLM; {remedy}.")
    provenance = folder / "provenance.json"
    recorded = json.loads(provenance.read_text()).get("model") if provenance.is_file() else None
    had = {**(recorded or {}), "feature_layer": config.get("vision_feature_layer")}
    for key, wanted in model.model_dump().items():
        if (recorded or key == "feature_layer") and had.get(key) != wanted:
            raise CheckpointError(
                f"{loaded.path}: the parent at {folder} has `model.{key}` {had.get(key)}, not {wanted}; {remedy}."
            )


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
    """The newest checkpoint that was written to its end.

    trainer_state.json is the last file of each, and .metadata the last of a folder of shards.
    """
    whole = []
    for folder in work.glob("checkpoint-*"):
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        if all((shards / ".metadata").is_file() for name in SHARDS if (shards := folder / name).is_dir()):
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


def _provenance(loaded: LoadedRecipe, parent: Path | None, whole: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    recipe, sources, data = loaded.recipe, metadata["data"]["sources"], []
    for spec, source in zip(recipe.data, sources or [{}] * len(recipe.data), strict=True):
        named = spec.model_dump(mode="json", exclude_none=True)
        # Of a folder on this machine the name is enough; a name on the Hub stays whole.
        for key in {"path", "images"} & named.keys():
            place = Path(loaded.locate(named[key]))
            named[key] = place.resolve().name if place.exists() else named[key]
        data.append({**named, **source})
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
        "cost": {
            # Of a run that was stopped in between, only its last part was timed.
            "duration_s": None if metadata["resumed"] else metadata["duration_s"],
            "processes": metadata["processes"],
            "energy_kwh": None,  # nothing here measures it yet
        },
        "weights_sha256": weights_sha256(whole),
        "commit": source_commit(),
        "versions": versions(),
        "machine": machine(),
    }


def _part_hashes(loaded: LoadedRecipe) -> dict[str, str]:
    """What tells the parts that were joined: of folders their weights' hash, of Hub repositories the commit."""
    spec = loaded.recipe.model
    assert spec is not None
    made = {}
    for part, name, revision in (
        ("vision", spec.vision, spec.vision_revision),
        ("language", spec.language, spec.language_revision),
    ):
        folder = Path(loaded.locate(name))
        if folder.is_dir():
            made[part] = weights_sha256(folder)
        elif commit := cached_commit(name, revision):
            made[part] = commit
    return made


def run_lineage(recipe: str | Path, runs: str | Path, log: Callable[[str], None] = print) -> Path:
    """Run a recipe after whichever of its ancestors are not finished yet."""
    for loaded in load_recipe(recipe).lineage():
        folder = run_stage(loaded, runs, log=log)
    return folder
