"""Time and memory of a recipe's steps at its real shapes with random weights, compared with the planner's figures."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedModel,
    PrinterCallback,
    ProcessorMixin,
    ProgressCallback,
    TrainerCallback,
)
from trl import SFTConfig

from pivot_hub.bench.models import random_mllm
from pivot_hub.bench.utilisation import utilisation
from pivot_hub.config.recipe import LoadedRecipe, MllmSpec
from pivot_hub.errors import ProbeError, RecipeError
from pivot_hub.mllm.inputs import placeholder_of
from pivot_hub.mllm.processor import load_processor
from pivot_hub.mllm.published_configs import part_config, whole_config
from pivot_hub.mllm.trainable import freeze_parts
from pivot_hub.planner.estimate import plan_stage
from pivot_hub.planner.image_inputs import HEIGHT_PX, WIDTH_PX
from pivot_hub.planner.report import Device, Plan
from pivot_hub.provenance import machine, versions
from pivot_hub.training.dpo import PivotDPOConfig, PivotDPOTrainer
from pivot_hub.training.sft import PivotSFTTrainer, collator_of
from pivot_hub.training.stage import round_weights, trainer_arguments

WARM_UP_STEPS = 3


def bench_train_step(loaded: LoadedRecipe, steps: int = 50, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Run optimizer steps of a recipe's own trainer on one process, and compare time and memory with the plan.

    The model has the recipe's shapes and random weights. Rows have random images and words, of the lengths that the
    planner assumes. A step is one batch of the recipe, without gradient accumulation. Weights and autocast are those of
    the recipe.

    Args:
        loaded: An instruct, sft or dpo recipe.
        steps: Steps that are timed, after three steps of warm-up.
        log: Callback that receives one line with the result.

    Returns:
        step_s (median); rows_per_s; planned_flops (with recomputation); on a known GPU mfu (without recomputation) and
        hfu (with it); on CUDA peak_bytes of the allocator; planned_bytes, and the ratio of the two.

    Raises:
        ProbeError: The recipe has no step to time, because it is of another stage.
    """
    recipe = loaded.recipe
    if recipe.model is None or recipe.stage == "align":
        raise ProbeError(f"{loaded.path}: give a recipe of instruct, sft or dpo.")
    cuda = torch.cuda.is_available()
    device: Device = "cuda" if cuda else "cpu"
    single = loaded.model_copy(update={"recipe": recipe.model_copy(update={"global_batch": None})})
    plan = plan_stage(single, "single", 1, device=device)
    clock = _run_steps(single, plan, steps)
    step = statistics.median(clock.seconds[WARM_UP_STEPS:])
    rows = plan.per_device_train_batch_size
    planned_bytes = max(moment.total for moment in plan.memory if "max_length" not in moment.name)
    flops = sum(sum(phases.values()) for phases in plan.flops_per_step.values())
    recomputed = sum(phases["recompute"] for phases in plan.flops_per_step.values())
    record = {
        "benchmark": "train-step",
        "recipe": loaded.name,
        "steps": steps,
        "batch": rows,
        "step_s": round(step, 4),
        "rows_per_s": round(rows / step, 2),
        "planned_flops": flops,
        "mfu": utilisation(flops - recomputed, step),
        "hfu": utilisation(flops, step),
        "peak_bytes": clock.peak_bytes if cuda else None,
        "planned_bytes": planned_bytes,
        "peak_to_planned": round(clock.peak_bytes / planned_bytes, 4) if cuda else None,
        "machine": machine(),
        "versions": versions(),
    }
    mfu = f", MFU {record['mfu']}" if record["mfu"] else ""
    memory = f", peak {clock.peak_bytes / 2**30:.1f} GiB of {planned_bytes / 2**30:.1f} planned" if cuda else ""
    log(f"{loaded.name}: {step:.3f} s a step of {rows} rows{mfu}{memory}")
    return record


class _Clock(TrainerCallback):
    """Measures the seconds of each step, and CUDA's peak memory over the timed steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began, self.peak_bytes = 0.0, 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            if len(self.seconds) == WARM_UP_STEPS:
                torch.cuda.reset_peak_memory_stats()
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.peak_bytes = torch.cuda.max_memory_allocated()
        self.seconds.append(time.perf_counter() - self.began)


def _run_steps(single: LoadedRecipe, plan: Plan, steps: int) -> _Clock:
    """Train for the warm-up and the timed steps; nothing is saved or reported."""
    recipe = single.recipe
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            **recipe.args,
            "max_steps": steps + WARM_UP_STEPS,
            "save_strategy": "no",
            "report_to": "none",
            "dataloader_num_workers": 0,
        }
        if recipe.stage == "dpo":
            arguments["reference_cache"] = folder
        run = single.model_copy(update={"recipe": recipe.model_copy(update={"args": arguments})})
        trainer = _build_trainer(run, plan, Path(folder))
        clock = _Clock()
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(clock)
        trainer.train()
    return clock


def _build_trainer(loaded: LoadedRecipe, plan: Plan, folder: Path) -> Any:
    """Build the stage's trainer on a model with random weights and on random rows."""
    recipe = loaded.recipe
    model, processor, words = _random_model(loaded)
    learning_rates = recipe.learning_rate.trained()
    freeze_parts(model, learning_rates)
    args = trainer_arguments(loaded, folder)
    count = args.max_steps * plan.per_device_train_batch_size
    dataset = _random_rows(plan, count, placeholder_of(processor), words, recipe.stage == "dpo")
    shared: dict[str, Any] = {"model": model, "train_dataset": dataset, "processing_class": processor}
    if recipe.stage == "dpo":
        return PivotDPOTrainer(args=cast(PivotDPOConfig, args), rates=learning_rates, **shared)
    config = cast(SFTConfig, args)
    collator = collator_of(model, processor, config.max_length)
    trainer = PivotSFTTrainer(args=config, data_collator=collator, **shared)
    trainer.rates = learning_rates
    if recipe.weights is not None:
        round_weights(trainer, loaded)
    return trainer


def _random_model(loaded: LoadedRecipe) -> tuple[PreTrainedModel, ProcessorMixin, np.ndarray]:
    """Make the recipe's MLLM with random weights.

    Returns:
        The MLLM; its own processor, or for joined parts one of words; and words that are one token each.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(loaded.recipe.model, MllmSpec):
        name, revision = loaded.locate(loaded.recipe.model.mllm), loaded.recipe.model.revision
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(whole_config(name, revision), dtype=torch.float32)
        return model, load_processor(name, revision), np.array(["a"])
    spec = loaded.parts("the benchmark")
    if spec.family is not None:
        raise RecipeError(
            f"{loaded.path}: the benchmark joins parts to a LLaVA model only; train the align stage, and give its "
            "folder as `model.mllm`."
        )
    vision = part_config(loaded.locate(spec.vision), spec.vision_revision)
    language: Any = part_config(loaded.locate(spec.language), spec.language_revision)
    words = np.array([f"w{i}" for i in range(language.vocab_size - 8)])
    return *random_mllm(vision, language, spec.feature_layer, device), words


def _random_rows(plan: Plan, count: int, placeholder: str, words: np.ndarray, pairs: bool) -> Dataset:
    """Rows that are drawn when they are read, from their index.

    Args:
        plan: Plan that gives the lengths of prompts and answers in tokens.
        count: Number of rows.
        placeholder: Text that stands for an image.
        words: Words of one token.
        pairs: Whether rows are preference pairs; else they are conversations.
    """

    def draw(row: int) -> dict[str, Any]:
        rng = np.random.default_rng(row)

        def text(length: float) -> str:
            return " ".join(rng.choice(words, max(1, round(length))))

        image = Image.fromarray(rng.integers(0, 255, (HEIGHT_PX, WIDTH_PX, 3), np.uint8))
        prompt = f"{placeholder} {text(plan.prompt_tokens)}"
        chosen, rejected = text(plan.answer_tokens), text(plan.answer_tokens)
        answers = {"chosen": chosen, "rejected": rejected} if pairs else {"completion": chosen}
        return {"images": [image], "prompt": prompt, **answers, "row": row}

    columns = list(draw(0))

    def render(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        examples = [draw(row) for row in batch["row"]]
        return {column: [example[column] for example in examples] for column in columns}

    return Dataset.from_dict({"row": list(range(count))}).with_transform(render)
