"""Steps of a recipe at its real shapes with random weights: time and memory, beside what the planner says."""

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
from transformers import LlavaForConditionalGeneration, PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig

from pivot_hub.bench.dpo_step import PEAK_FLOPS, word_processor
from pivot_hub.config.recipe import LoadedRecipe
from pivot_hub.encoder.configuration_pivot import backbone_of, prefix_tokens
from pivot_hub.errors import ProbeError
from pivot_hub.mllm.chat_templates import QWEN
from pivot_hub.mllm.published_configs import meta_mllm, part_config
from pivot_hub.mllm.trainable import freeze_parts
from pivot_hub.planner.estimate import plan_stage
from pivot_hub.planner.report import Device, Plan
from pivot_hub.provenance import machine, versions
from pivot_hub.training.conversation import ConversationCollator
from pivot_hub.training.dpo import PivotDPOConfig, PivotDPOTrainer
from pivot_hub.training.sft import PivotSFTTrainer
from pivot_hub.training.stage import trainer_arguments

WARM = 3  # steps before those that are timed


def bench_train_step(loaded: LoadedRecipe, steps: int = 50, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Run optimizer steps of a recipe's own trainer on one process, and hold time and memory against the plan.

    The model has the recipe's shapes and random weights, rows have random images and words, of the lengths that the
    planner counts with. A step is one batch of the recipe, without gradient accumulation.

    Args:
        loaded: an instruct, sft or dpo recipe.
        steps: timed, after three.
        say: called with what was found.

    Returns:
        step_s (median), rows_per_s, mfu of the planner's FLOPs (on a known GPU), peak_bytes of the allocator (on CUDA)
        and what the planner says of it, with their ratio.
    """
    recipe = loaded.recipe
    if recipe.model is None or recipe.stage == "align":
        raise ProbeError(f"{loaded.path}: give a recipe of instruct, sft or dpo.")
    cuda = torch.cuda.is_available()
    device: Device = "cuda" if cuda else "cpu"
    single = loaded.model_copy(update={"recipe": recipe.model_copy(update={"global_batch": None})})
    plan = plan_stage(single, "single", 1, device=device)
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_steps": steps + WARM, "save_strategy": "no", "report_to": "none", "dataloader_num_workers": 0}
        args = {**recipe.args, **options}
        if recipe.stage == "dpo":
            args["reference_cache"] = folder
        run = single.model_copy(update={"recipe": single.recipe.model_copy(update={"args": args})})
        trainer = _trainer(run, plan, Path(folder))
        clock = _Clock()
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(clock)
        trainer.train()
    step = statistics.median(clock.seconds[WARM:])
    rows = plan.per_device_train_batch_size
    planned = max(moment.total for moment in plan.memory if "max_length" not in moment.name)
    flops = sum(sum(phases.values()) for phases in plan.flops_per_step.values())
    peak = next((p for name, p in PEAK_FLOPS.items() if cuda and name in torch.cuda.get_device_name()), None)
    made = {
        "benchmark": "train-step",
        "recipe": loaded.name,
        "steps": steps,
        "batch": rows,
        "step_s": round(step, 4),
        "rows_per_s": round(rows / step, 2),
        "planned_flops": flops,
        "mfu": round(flops / step / peak, 4) if peak else None,
        "peak_bytes": clock.peak if cuda else None,
        "planned_bytes": planned,
        "peak_to_planned": round(clock.peak / planned, 4) if cuda else None,
        "machine": machine(),
        "versions": versions(),
    }
    mfu = f", MFU {made['mfu']}" if peak else ""
    memory = f", peak {clock.peak / 2**30:.1f} GiB of {planned / 2**30:.1f} planned" if cuda else ""
    log(f"{loaded.name}: {step:.3f} s a step of {rows} rows{mfu}{memory}")
    return made


class _Clock(TrainerCallback):
    """Seconds of each step, and the most memory that the steps took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began, self.peak = 0.0, 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            if len(self.seconds) == WARM:
                torch.cuda.reset_peak_memory_stats()
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
        self.seconds.append(time.perf_counter() - self.began)


def _trainer(loaded: LoadedRecipe, plan: Plan, folder: Path) -> Any:
    recipe = loaded.recipe
    assert recipe.model is not None
    vision = part_config(loaded.locate(recipe.model.vision), recipe.model.vision_revision)
    language: Any = part_config(loaded.locate(recipe.model.language), recipe.model.language_revision)
    side = backbone_of(vision).image_px(vision)
    processor = word_processor(language.vocab_size, side, cast(Any, vision).patch_size, prefix_tokens(vision))
    config = meta_mllm(vision, language, recipe.model.feature_layer).config
    config.image_token_id = processor.image_token_id
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlavaForConditionalGeneration(config)
    rates = recipe.learning_rate.trained()
    freeze_parts(model, rates)
    args = trainer_arguments(loaded, folder)
    rows = _rows(plan, args.max_steps * plan.per_device_train_batch_size, language.vocab_size, recipe.stage == "dpo")
    more: dict[str, Any] = {"train_dataset": rows, "processing_class": processor}
    if recipe.stage == "dpo":
        return PivotDPOTrainer(model=model, args=cast(PivotDPOConfig, args), rates=rates, **more)
    collator = ConversationCollator(processor)
    trainer = PivotSFTTrainer(model=model, args=cast(SFTConfig, args), data_collator=collator, **more)
    trainer.rates = rates
    return trainer


def _rows(plan: Plan, count: int, vocabulary: int, pairs: bool) -> Dataset:
    def example(row: int) -> dict[str, Any]:
        rng = np.random.default_rng(row)

        def words(length: float) -> str:
            return " ".join(f"w{i}" for i in rng.integers(vocabulary - 8, size=max(1, round(length))))

        image = Image.fromarray(rng.integers(0, 255, (480, 640, 3), np.uint8))
        prompt = f"{QWEN.image_token} {words(plan.prompt_tokens)}"
        answers = {"chosen": words(plan.answer_tokens), "rejected": words(plan.answer_tokens)}
        told = answers if pairs else {"completion": answers["chosen"]}
        return {"images": [image], "prompt": prompt, **told, "row": row}

    first = example(0)
    dataset = Dataset.from_dict({"row": list(range(count))})

    def render(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        made = [example(r) for r in batch["row"]]
        return {key: [e[key] for e in made] for key in first}

    return dataset.with_transform(render)
