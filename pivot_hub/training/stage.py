"""Run a stage: from a checked recipe to a finished checkpoint folder, however often the run is killed and resumed.

A run works in `<output>.partial`, which holds its checkpoints, and the folder is renamed to `<output>` at the end: an
output folder that exists is finished.

A run may have several processes on one or more nodes, started by `accelerate launch`, `torchrun` or `srun`. Only the
main process creates, writes, renames and deletes in the output folder. All processes must see this folder, so several
nodes need a shared filesystem.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration, PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from pivot_hub.config.accelerate import accelerate_config
from pivot_hub.config.recipe import (
    LoadedRecipe,
    MllmSpec,
    ModelSpec,
    Recipe,
    is_recorded_recipe,
    load_recipe,
    write_recipe,
)
from pivot_hub.config.stages import stage_of
from pivot_hub.data.report import RowReport
from pivot_hub.errors import CheckpointError, OutputError, RecipeError, StoppedError, TrainingError
from pivot_hub.files import disk_is_full, write_json
from pivot_hub.mllm.families import FAMILIES
from pivot_hub.mllm.lora import merge_lora
from pivot_hub.outputs import check_replaceable, lock_output
from pivot_hub.provenance import (
    cached_commit,
    machine,
    peak_memory_mb,
    source_commit,
    versions,
    weights_sha256,
    write_manifest,
)
from pivot_hub.training.checkpoints import CheckpointFiles, last_checkpoint, step_of
from pivot_hub.training.metrics_log import MetricsLog, PlainProgress
from pivot_hub.training.part_trainer import PartTrainer, stopped_file
from pivot_hub.training.preemption import Preemption
from pivot_hub.training.samples_page import PAGE
from pivot_hub.training.start_check import StartCheck
from pivot_hub.training.timed_checkpoints import TimedCheckpoints

BITSANDBYTES = ("bnb", "paged", "adamw_8bit", "lion", "ademamix")  # parts of the names of its optimizers

T = TypeVar("T")


def run_stage(
    loaded: LoadedRecipe,
    runs: str | Path = "runs",
    output: str | Path | None = None,
    parent: str | Path | None = None,
    log: Callable[[str], None] = print,
) -> Path:
    """Train one stage and return its checkpoint folder.

    A finished run of the same recipe is returned as it is. An interrupted run resumes from its last checkpoint and
    ends with the weights that it would have had without the interruption: the same bits on a CPU, and the same up to
    rounding on CUDA, whose kernels add in no fixed order. `args.full_determinism` asks torch for a fixed order, which
    is slower.

    Args:
        loaded: The recipe.
        runs: Folder of all runs. A stage's folder below it has the recipe's name, as in `shapes/3-dpo`.
        output: The stage's folder, when it is not below `runs`.
        parent: The parent's checkpoint folder, when it is not below `runs`.
        log: Function that takes progress, one line at a time.

    Raises:
        RecipeError: The output folder holds a run of another recipe.
        OutputError: The output folder holds other files, or another process trains there. Nothing was touched.
        StoppedError: A signal asked the run to stop, and its last step is saved.
        CheckpointError: The parent has no checkpoint, or every checkpoint of the run is damaged.
        DataError: A row, an image or a data file cannot be used.
        TrainingError: Training cannot continue; the last good checkpoint is kept.
    """
    folder = _output_folder(Path(output) if output is not None else Path(runs) / loaded.name)
    work = folder.with_name(f"{folder.name}.partial")
    state = _processes(loaded.recipe)
    if state.num_processes > 1 and stage_of(loaded.recipe.stage).base_part:
        raise RecipeError(f"{loaded.path}: one process trains a base part: run `pivot train` without a launcher.")
    log = log if state.is_main_process else _ignore
    if _on_main(lambda: _is_finished(folder, work, loaded.recipe)):
        log(f"{loaded.name}: finished before, at {folder}")
        return folder
    parent_folder = _on_main(lambda: _parent_checkpoint(loaded, Path(runs), parent))
    with _locked(folder):
        if _on_main(lambda: _is_finished(folder, work, loaded.recipe)):  # another process may have finished it
            log(f"{loaded.name}: finished before, at {folder}")
            return folder
        try:
            return _train(loaded, folder, work, parent_folder, log)
        except Exception as error:
            resumable = any(work.glob("checkpoint-*"))
            kept = resumable or any(work.glob("damaged-*"))
            if state.is_main_process and not kept:
                shutil.rmtree(work, ignore_errors=True)
            if disk_is_full(error):
                again = f"it resumes from {work}" if resumable else "no checkpoint was written yet, so it starts again"
                raise TrainingError(
                    f"the disk is full: free some space and run the same command again; {again}."
                ) from error
            raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of an output for all processes of the run; the main process takes it."""
    with ExitStack() as stack:
        _on_main(lambda: stack.enter_context(lock_output(folder)))
        yield


def _output_folder(folder: Path) -> Path:
    """Return the output folder under a name of its own, which `.` and `..` are not.

    Raises:
        OutputError: The folder is the root of a file system.
    """
    if folder.name in ("", ".."):
        folder = folder.resolve()
    if not folder.name:
        raise OutputError(f"{folder} cannot be an output, because the run works beside it; give another --output.")
    return folder


def _train(loaded: LoadedRecipe, folder: Path, work: Path, parent: Path | None, log: Callable[[str], None]) -> Path:
    recipe = loaded.recipe
    started, report = time.monotonic(), RowReport()
    checkpoint = _on_main(lambda: _prepare_work(loaded, work, log))
    streams = _on_main(lambda: _row_streams(recipe, work, checkpoint))
    metrics_log = MetricsLog(work / "metrics.jsonl")
    module = import_module(stage_of(recipe.stage).module)
    args = trainer_arguments(loaded, work)
    if args.device.type == "cuda" and (hint := unused_gpus_hint(loaded)):
        log(f"{loaded.name}: {hint}")
    trainer: Trainer = module.build_trainer(loaded, args, parent, report, [metrics_log])
    if recipe.weights is not None:
        round_weights(trainer, loaded)
    if isinstance(trainer, PartTrainer):
        trainer.streams = streams
    trainer.remove_callback(PrinterCallback)
    if not sys.stderr.isatty():
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(PlainProgress(loaded.name, log))
    if report.skipped:
        first = f"the first: {report.skipped[0]}"
        log(f"{loaded.name}: {report.skipped_rows} rows skipped, {first} (`pivot data check` checks them again)")
    if checkpoint is not None:
        log(f"{loaded.name}: resuming from step {step_of(checkpoint)}")
    _on_main(lambda: metrics_log.cut_to(step_of(checkpoint) if checkpoint else 0))
    checkpoint_files = CheckpointFiles(trainer, checkpoint)
    # It corrects the mean loss of a resumed run, so it comes before the callbacks that write it.
    trainer.callback_handler.callbacks.insert(0, checkpoint_files)
    if recipe.stage == "dpo":
        trainer.add_callback(StartCheck(trainer))  # policy and reference are both the parent
    if not {"save_steps", "save_strategy"} & recipe.args.keys():
        trainer.add_callback(TimedCheckpoints())
    with Preemption() as preemption:
        trainer.add_callback(preemption)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if preemption.requested and trainer.state.global_step < trainer.state.max_steps:
        raise StoppedError(
            f"stopped by {preemption.name} after step {trainer.state.global_step} of {trainer.state.max_steps}, which "
            "is saved: run the same command again to resume."
        )
    metadata = {
        "recipe": loaded.name,
        "recipe_sha256": recipe.sha256(),
        "steps": trainer.state.global_step,
        "duration_s": round(time.monotonic() - started, 1),
        "resumed": checkpoint is not None,
        "processes": PartialState().num_processes,
        "peak_memory_mb": peak_memory_mb(),
        "train_loss": checkpoint_files.train_loss,
        "warnings": module.run_warnings(trainer) if hasattr(module, "run_warnings") else [],
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


def _row_streams(recipe: Recipe, work: Path, checkpoint: Path | None) -> dict[str, int]:
    """Return the streams of rows that the run started with: one for each loader worker of all processes.

    A run that resumes with other workers or processes keeps them, because they are part of the order of its rows.
    """
    file = work / "streams.json"
    if not file.is_file():
        workers = max(recipe.args.get("dataloader_num_workers", 0), 1)
        batch = recipe.args.get("per_device_train_batch_size", 8)
        earlier_version = checkpoint is not None
        streams = {"streams": 1 if earlier_version else PartialState().num_processes * workers, "batch": batch}
        write_json(file, streams)
    streams = json.loads(file.read_text())
    return streams


def round_weights(trainer: Trainer, loaded: LoadedRecipe) -> None:
    """Round the weights to bfloat16, in which the optimizer then changes them. Buffers stay as they are.

    Raises:
        RecipeError: The processes shard the model.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise RecipeError(
            f"{loaded.path}: `weights` is for single and ddp, because FSDP and DeepSpeed keep float32 weights to "
            "update; leave it out."
        )
    for weight in cast(torch.nn.Module, trainer.model).parameters():
        weight.data = weight.data.to(torch.bfloat16)


def _processes(recipe: Recipe) -> PartialState:
    """Return the state of this process in the run. Without an accelerator the processes communicate over gloo."""
    cpu = recipe.args.get("use_cpu", not torch.accelerator.is_available())
    return PartialState(cpu=cpu, timeout=timedelta(seconds=recipe.args.get("ddp_timeout", 1800)))


def leave_processes() -> None:
    """Leave the process group before the interpreter ends.

    Gloo's threads need the interpreter's lock to release the tensors of the last message. A thread that still waits
    for the lock when the interpreter ends aborts the process, although its run was finished: see
    https://github.com/pytorch/pytorch/pull/179291. Sleeping releases the lock, so the threads get their turn.
    """
    state = PartialState()
    state.destroy_process_group()
    if state.num_processes > 1:
        time.sleep(0.1)


def _on_main(function: Callable[[], T]) -> T:
    """Call a function in the main process. Every process returns its result, or raises its exception."""
    state = PartialState()
    outcome: list[Any] = [None, None]  # the result and the exception
    if state.is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    result, exception = outcome
    if exception is not None:
        raise exception
    return result


def _ignore(line: str) -> None:
    """Log nothing: only the main process logs."""


def _is_finished(folder: Path, work: Path, recipe: Recipe) -> bool:
    """Return whether the run is finished, after refusing folders of other runs. An empty folder will be filled."""
    for each in (folder, work):
        if each.exists() and not each.is_dir():
            raise OutputError(f"{each} is a file, not a folder; choose another --output. Nothing was touched.")
        if each.exists() and any(each.iterdir()):
            _check_same_recipe(each, recipe)
    return folder.exists() and any(folder.iterdir())


def _prepare_work(loaded: LoadedRecipe, work: Path, log: Callable[[str], None]) -> Path | None:
    """Create the folder that a run works in, and return the checkpoint to resume from."""
    work.mkdir(parents=True, exist_ok=True)
    write_recipe(loaded, work / "recipe.yaml")
    stopped_file(work).unlink(missing_ok=True)
    return last_checkpoint(work, log)


def _save_gathered(trainer: Trainer, whole: Path) -> None:
    """Write the model as one checkpoint, however many processes its weights are sharded over."""
    if not trainer.is_fsdp_enabled:
        merge_lora(cast(LlavaForConditionalGeneration, trainer.model))
        trainer.save_model(str(whole))
        return
    weights = trainer.accelerator.get_state_dict(trainer.model)
    for tied in cast(Any, trainer.model).all_tied_weights_keys:  # gathered weights no longer share storage
        weights.pop(tied, None)
    trainer._save(str(whole), state_dict=weights)


def _finish(loaded: LoadedRecipe, parent: Path | None, folder: Path, work: Path, metadata: dict[str, Any]) -> None:
    """Complete the final checkpoint with its metadata and move it to its folder."""
    whole = work / "whole"
    _check_finite(whole)
    (whole / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.yaml has the same content
    for name in ("recipe.yaml", "metrics.jsonl", PAGE):
        if name != PAGE or (work / name).is_file():  # grpo and rloo write a page of samples
            shutil.copy2(work / name, whole / name)
    if (work / "completions").is_dir():  # tables of answers, where `args.log_completions` asks TRL for them
        shutil.copytree(work / "completions", whole / "completions")
    write_json(whole / "report.json", metadata)
    write_manifest(whole, _provenance(loaded, parent, whole, metadata))
    if (work / "runs").is_dir():  # TensorBoard's events are not in the manifest: their file names hold the host name
        shutil.copytree(work / "runs", whole / "tensorboard")
    check_replaceable(folder, None)  # files may have come into an empty folder since the start
    whole.replace(folder)
    shutil.rmtree(work)


def _check_finite(whole: Path) -> None:
    """Refuse trained weights that are not finite numbers.

    Raises:
        TrainingError: A weight is NaN or infinite; the message names the first tensor.
    """
    bad, count = [], 0
    for file in sorted(whole.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (the file is no mapping)
                tensor = tensors.get_tensor(name)
                count += 1
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    bad.append(name)
    if bad:
        work = whole.parent
        shutil.rmtree(whole)
        raise TrainingError(
            f"{len(bad)} of {count} trained tensors are not finite, {bad[0]} first, so the run is not finished. Lower "
            f"the learning rates or set `args.max_grad_norm`, and delete {work}, whose checkpoints belong to these "
            "learning rates."
        )


def trainer_arguments(loaded: LoadedRecipe, work: Path) -> TrainingArguments:
    """Build the stage's trainer config: the recipe's arguments over defaults that all stages share.

    Raises:
        RecipeError: The arguments do not fit together, or do not fit the number of processes.
    """
    recipe = loaded.recipe
    learning_rates = recipe.learning_rate.trained()
    if recipe.global_batch is not None:
        rows_at_once = recipe.args.get("per_device_train_batch_size", 8) * PartialState().num_processes
        if recipe.global_batch % rows_at_once:
            raise RecipeError(
                f"{loaded.path}: `global_batch` {recipe.global_batch} is not a multiple of {rows_at_once} rows, one "
                "batch of every process; change `args.per_device_train_batch_size` or the number of processes."
            )
        accumulation = {"gradient_accumulation_steps": recipe.global_batch // rows_at_once}
    else:
        accumulation = {}
    optim = str(recipe.args.get("optim", ""))
    if any(name in optim for name in BITSANDBYTES) and find_spec("bitsandbytes") is None:
        raise RecipeError(f"{loaded.path}: `args.optim` {optim} needs bitsandbytes: run `pip install bitsandbytes`.")
    loggers = [name for name in ("tensorboard", "trackio") if find_spec(name)]
    options: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 0.25,  # four checkpoints per run; `TimedCheckpoints` adds others in a long one
        "save_total_limit": 2,
        "logging_steps": 10,
        "logging_nan_inf_filter": False,
        "report_to": loggers or "none",
        "dataloader_pin_memory": PartialState().device.type == "cuda",  # batches are then copied while the GPU computes
        "ddp_find_unused_parameters": False,  # every parameter that trains has a gradient in every step
        "use_cpu": PartialState().device.type == "cpu",
        "bf16": torch.cuda.is_available() and not recipe.args.get("fp16"),  # TRL's default, but off on a CPU
        **recipe.args,
        **accumulation,
        "output_dir": str(work),
        "learning_rate": max(learning_rates.values()),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "remove_unused_columns": False,
    }
    try:
        arguments = stage_of(recipe.stage).config_class()(**options)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{loaded.path}: `args` do not fit together: {error}") from error
    if arguments.n_gpu > 1:
        # A single process would wrap the model in DataParallel: a step would take a batch for each GPU, and its
        # replicas would not run this package's forward passes.
        arguments._n_gpu = 1
    return arguments


def unused_gpus_hint(loaded: LoadedRecipe) -> str | None:
    """Return the command that uses all GPUs of this machine, where a single process leaves some unused."""
    gpus = torch.cuda.device_count()
    if gpus < 2 or PartialState().num_processes > 1 or stage_of(loaded.recipe.stage).base_part:
        return None
    config = accelerate_config("ddp").path
    return (
        f"{gpus} GPUs are here, one is used: run `accelerate launch --config_file {config} --num_processes {gpus} -m "
        f"pivot_hub train {loaded.path}` for all"
    )


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


def _check_parent(loaded: LoadedRecipe, model: ModelSpec | MllmSpec, folder: Path) -> None:
    """Refuse a parent that joins other parts, or comes from another MLLM, than the recipe names.

    No weight of it is read before. Names are compared as they are written in the recipes: a parent that was trained in
    another checkout has its parts at other absolute paths.

    Raises:
        CheckpointError: The parent has other parts, or is not an MLLM.
    """
    remedy = "give the checkpoint of this recipe's parent with --parent, or change `model` where it is named"
    config = json.loads((folder / "config.json").read_text())
    joined = isinstance(model, ModelSpec)
    families = (model.family or "llava",) if isinstance(model, ModelSpec) else tuple(FAMILIES)
    if config.get("model_type") not in families:
        kind = config.get("model_type", "nameless")
        wanted = "an MLLM" if len(families) > 1 or kind not in FAMILIES else f"{families[0]}, which the recipe joins"
        raise CheckpointError(f"{loaded.path}: the parent at {folder} is a {kind} model, not {wanted}; {remedy}.")
    provenance = folder / "provenance.json"
    recorded = json.loads(provenance.read_text()).get("model") if provenance.is_file() else None
    parent_model = dict(recorded or {})
    if joined and config["model_type"] == "llava":  # the projectors of other families read the last hidden state
        parent_model["feature_layer"] = config.get("vision_feature_layer")
    for key, expected in model.model_dump().items():
        known = recorded or (key == "feature_layer" and config["model_type"] == "llava")
        if known and parent_model.get(key) != expected:
            raise CheckpointError(
                f"{loaded.path}: the parent at {folder} has `model.{key}` {parent_model.get(key)}, not {expected}; "
                f"{remedy}."
            )


def _check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Refuse a folder that holds another recipe's run, so that two runs are never mixed.

    Raises:
        RecipeError: The folder holds another run, or no run.
    """
    file = folder / "recipe.yaml"
    if not file.is_file():
        raise RecipeError(f"{folder} exists but holds no run of a recipe; choose another --output.")
    if not is_recorded_recipe(file, recipe):
        raise RecipeError(
            f"{folder} holds a run of another version of this recipe; delete it or choose another --output."
        )


def _provenance(loaded: LoadedRecipe, parent: Path | None, whole: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    recipe, sources, data = loaded.recipe, metadata["data"]["sources"], []
    for spec, source in zip(recipe.data, sources or [{}] * len(recipe.data), strict=True):
        entry = spec.model_dump(mode="json", exclude_none=True)
        # A local folder is recorded by its name without its path; a repository on the Hub by its full name.
        for key in {"path", "images", "wrong_answers"} & entry.keys():
            path = Path(loaded.locate(entry[key]))
            entry[key] = path.resolve().name if path.exists() else entry[key]
        data.append({**entry, **source})
    parent_entry = None
    if parent is not None:
        parent_entry = {
            "name": loaded.parent.name if loaded.parent else parent.name,
            "weights_sha256": weights_sha256(parent),
        }
        if (parent / "provenance.json").is_file():
            parent_entry["provenance"] = json.loads((parent / "provenance.json").read_text())
    return {
        "stage": recipe.stage,
        "recipe": loaded.name,
        "recipe_sha256": recipe.sha256(),
        "model": recipe.model.model_dump(exclude_none=True) if recipe.model else None,
        "parts": part_hashes(loaded) if parent is None and recipe.model else None,
        "parent": parent_entry,
        "data": data,
        "cost": {
            # Only the last part of a resumed run was timed.
            "duration_s": None if metadata["resumed"] else metadata["duration_s"],
            "processes": metadata["processes"],
            "energy_kwh": None,  # not measured yet
        },
        "weights_sha256": weights_sha256(whole),
        "commit": source_commit(),
        "versions": versions(),
        "machine": machine(),
    }


def part_hashes(loaded: LoadedRecipe) -> dict[str, str]:
    """Return what identifies the parts that were joined, or the MLLM that training started from.

    It is the hash of a folder's weights, or the commit of a Hub repository.
    """
    spec = loaded.recipe.model
    assert spec is not None
    if isinstance(spec, MllmSpec):
        parts = [("mllm", spec.mllm, spec.revision)]
    else:
        parts = [("vision", spec.vision, spec.vision_revision), ("language", spec.language, spec.language_revision)]
    hashes = {}
    for part, name, revision in parts:
        folder = Path(loaded.locate(name))
        if folder.is_dir():
            hashes[part] = weights_sha256(folder)
        elif commit := cached_commit(name, revision):
            hashes[part] = commit
    return hashes


def run_lineage(recipe: str | Path, runs: str | Path, log: Callable[[str], None] = print) -> Path:
    """Run a recipe and, before it, those of its ancestors that are not finished.

    Args:
        recipe: Recipe file, or the name of a shipped recipe.
        runs: Folder of all runs.
        log: Function that takes progress, one line at a time.
    """
    for loaded in load_recipe(recipe).lineage():
        folder = run_stage(loaded, runs, log=log)
    return folder
