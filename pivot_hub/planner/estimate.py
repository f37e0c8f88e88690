"""Estimate what a stage will cost before any weight is loaded: parameters, tokens, FLOPs, memory, hours, disk.

FLOPs and activations come from one batch that runs on fake tensors (`planner.fake_step`). The rest is arithmetic on the
recipe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from pivot_hub.config.accelerate import accelerate_config as find_accelerate_config
from pivot_hub.config.data_section import ShapesData
from pivot_hub.config.recipe import LoadedRecipe
from pivot_hub.config.stages import argument_defaults, stage_of
from pivot_hub.errors import RecipeError
from pivot_hub.mllm.lora import add_lora
from pivot_hub.mllm.published_configs import meta_mllm, part_config
from pivot_hub.mllm.trainable import freeze_parts, parts_of
from pivot_hub.planner.fake_step import Batch, StepProfile, profile_step
from pivot_hub.planner.gpus import GPUS, HFU, RESERVE, Gpu
from pivot_hub.planner.memory import OPTIMIZERS, MemoryModel
from pivot_hub.planner.report import PHASES, Device, GpuEstimate, MemoryPeak, Plan, Precision
from pivot_hub.planner.settings import RunSettings, candidates
from pivot_hub.training.dpo import SPEED_OPTIONS
from pivot_hub.training.tree_layout import Layout, Tree

# Mean tokens of prompt and answer of a row of the synthetic Shapes dataset, chat format included.
SHAPES_TOKENS = (40.0, 25.0)
FEW_PAIRS = 4
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": None}


def plan_stage(
    loaded: LoadedRecipe,
    accelerate_config: str = "ddp",
    processes: int = 8,
    hfu: float = HFU,
    lengths: Mapping[str, float] | None = None,
    device: Device = "cuda",
) -> Plan:
    """Compute what a stage will cost.

    Rows are taken to have the mean length, one image each, and no padding. Attention counts as the full square of
    queries and keys. Weights are float32, as the stages train them, with autocast in half precision.

    Args:
        loaded: A recipe of align, instruct, sft or dpo.
        accelerate_config: Name of the Accelerate config, a file of recipes/accelerate.
        processes: Number of processes, one per GPU.
        hfu: Hardware FLOPs utilisation: the share of the GPU's peak at which all FLOPs run, recomputed ones included.
        lengths: The rows, prompt_tokens and answer_tokens of an epoch, as `pivot data check` reports them. Without
            them each source's `expect` is read.
        device: Device that the trainer runs on. A CPU trains in float32 and scores every position.

    Raises:
        RecipeError: The stage is not one of these, a source does not say what it holds, or settings do not fit
            together.
        CheckpointError: A part's config is missing.
    """
    return _Planner(loaded, hfu, lengths, device).plan(accelerate_config, processes)


class _Planner:
    """Computes the cost of one recipe under any settings; each batch is profiled once."""

    def __init__(self, loaded: LoadedRecipe, hfu: float, lengths: Mapping[str, float] | None, device: Device) -> None:
        self.loaded, self.recipe, self.hfu, self.device = loaded, loaded.recipe, hfu, device
        if stage_of(self.recipe.stage).base_part:
            raise RecipeError(
                f"{loaded.path}: stage {self.recipe.stage} makes a base part, whose cost is in the recipe's first "
                "lines; plan align, instruct, sft or dpo."
            )
        if not 0 < hfu <= 1:
            raise RecipeError(f"mfu is {hfu}: give the share of the peak, above 0 and at most 1.")
        assert self.recipe.model is not None
        spec = self.recipe.model
        self.configs = (
            part_config(loaded.locate(spec.vision), spec.vision_revision),
            part_config(loaded.locate(spec.language), spec.language_revision),
        )
        self.feature_layer = spec.feature_layer
        meta = self.meta_model()
        self.image_tokens = int(meta.config.image_seq_length)
        self.parameters = _count_parameters(meta)
        self.precision: Precision = "bf16" if self.arg("bf16", device == "cuda" and not self.arg("fp16")) else "float32"
        if self.arg("fp16"):
            self.precision = "fp16"
        is_dpo, caches = self.recipe.stage == "dpo", self._option("cache_reference")
        trained = sum(counts["trained"] for counts in self.parameters.values())
        largest_block, outside_blocks = _block_sizes(meta)
        self.memory = MemoryModel(
            total=trained + sum(counts["frozen"] for counts in self.parameters.values()),
            trained=trained,
            largest_block=largest_block,
            outside_blocks=outside_blocks,
            compute_bytes=4 if self.precision == "float32" else 2,
            live_reference=is_dpo and not caches,
            cached_reference=caches,
        )
        self.assumptions = ["rows of mean length without padding, an image each; no tokens added to the vocabulary"]
        self.rows, self.prompt, self.answer = self._lengths(lengths)
        self.profiled = lru_cache(None)(self._profile)

    def meta_model(self) -> LlavaForConditionalGeneration:
        """Build the stage's model on the meta device, with the weights that do not train frozen."""
        model = meta_mllm(*self.configs, self.feature_layer)
        freeze_parts(model, self.recipe.learning_rate.trained())
        if self.recipe.lora is not None:
            add_lora(model, self.recipe.lora, self.recipe.seed)
        return model

    def arg(self, name: str, default: Any = None) -> Any:
        """Return a trainer argument of the recipe, or else its default."""
        if name in self.recipe.args:
            return self.recipe.args[name]
        return argument_defaults(stage_of(self.recipe.stage)).get(name) if default is None else default

    def plan(self, accelerate_config: str, processes: int) -> Plan:
        settings = self._settings(accelerate_config, processes)
        rows_seen = self.arg("num_train_epochs") * self.rows
        steps = self._steps(settings)
        if self.arg("max_steps") > 0:
            steps, rows_seen = self.arg("max_steps"), self.arg("max_steps") * settings.rows_per_step
        profile = self.profiled(settings.batch, settings.checkpointing, settings.accumulation > 1)
        flops_per_row = {
            part: {phase: phases.get(phase, 0) / settings.batch for phase in PHASES}  # type: ignore[call-overload]
            for part, phases in profile.flops.items()
        }
        flops = {phase: sum(phases[phase] for phases in flops_per_row.values()) * rows_seen for phase in PHASES}
        if self._option("cache_reference"):
            flops["reference"] = sum(phases["forward"] for phases in flops_per_row.values()) * self.rows
        peaks = self._peaks(settings)
        longest_peaks = [self._training_peak(settings, longest=True)] if self.arg("max_length") else []
        tokens_per_row = self._tokens_per_row()
        run_flops = sum(flops.values())
        return Plan(
            recipe=self.loaded.name,
            stage=self.recipe.stage,
            machine=settings.accelerate_config.name,
            processes=settings.processes,
            device=self.device,
            precision=self.precision,
            mfu=self.hfu,
            gradient_checkpointing=settings.checkpointing,
            optim=settings.optim,
            per_device_train_batch_size=settings.batch,
            gradient_accumulation_steps=settings.accumulation,
            parameters=self.parameters,
            image_tokens=self.image_tokens,
            prompt_tokens=round(self.prompt, 2),
            answer_tokens=round(self.answer, 2),
            rows=self.rows,
            rows_per_step=settings.rows_per_step,
            steps=steps,
            epochs=rows_seen / self.rows,
            tokens_per_step=round(tokens_per_row * settings.rows_per_step),
            tokens=round(tokens_per_row * rows_seen),
            flops_per_step={
                part: {phase: count * settings.rows_per_step for phase, count in phases.items()}
                for part, phases in flops_per_row.items()
            },
            flops=flops,
            memory=(*peaks, *longest_peaks),
            disk=self.memory.disk(
                settings.optim, self.arg("save_only_model"), self.recipe.args.get("save_total_limit", 2)
            ),
            gpus=tuple(self._gpu_estimate(gpu, settings, peaks, longest_peaks, run_flops) for gpu in GPUS),
            assumptions=tuple(self.assumptions),
        )

    def _lengths(self, lengths: Mapping[str, float] | None) -> tuple[int, float, float]:
        """Return the rows of an epoch and their mean tokens of prompt and answer, cut at max_length."""
        if lengths is not None:
            rows, prompt, answer = int(lengths["rows"]), lengths["prompt_tokens"], lengths["answer_tokens"]
        else:
            sources = [self._source_lengths(i) for i in range(len(self.recipe.data))]
            rows = sum(source_rows for source_rows, _, _ in sources)
            prompt, answer = (sum(source[0] * source[k] for source in sources) / rows for k in (1, 2))
        max_length = self.arg("max_length")
        if max_length is not None:
            before_answer = self.image_tokens + prompt
            if before_answer >= max_length:
                raise RecipeError(
                    f"{self.loaded.path}: image and prompt take {before_answer:.0f} tokens and leave no room for an "
                    f"answer in max_length {max_length}; raise `args.max_length`."
                )
            answer = min(answer, max_length - before_answer)
        return rows, prompt, answer

    def _source_lengths(self, i: int) -> tuple[int, float, float]:
        """Return the rows of a source and their mean tokens of prompt and answer."""
        spec = self.recipe.data[i]
        if isinstance(spec, ShapesData):
            prompt, answer = SHAPES_TOKENS
            self.assumptions.append(f"{prompt:g} prompt and {answer:g} answer tokens a row of shapes")
            return spec.rows, prompt, answer
        if spec.expect is None:
            raise RecipeError(
                f"{self.loaded.path}: data.{i} does not say what it holds: add `expect` with rows, prompt_tokens and "
                "answer_tokens, or run `pivot data check` first and plan with its report."
            )
        return (
            min(spec.expect.rows, spec.sample or spec.expect.rows),
            spec.expect.prompt_tokens,
            spec.expect.answer_tokens,
        )

    def _settings(self, accelerate_config: str, processes: int) -> RunSettings:
        path, batch, optim = self.loaded.path, self.arg("per_device_train_batch_size"), str(self.arg("optim"))
        config = find_accelerate_config(accelerate_config)
        if processes < 1 or (config.one_process and processes > 1):
            raise RecipeError(
                f"the Accelerate config {config.name} does not run {processes} processes; change one of the two."
            )
        if optim not in OPTIMIZERS:
            raise RecipeError(
                f"{path}: the planner does not know the memory of `args.optim` {optim}; it knows "
                f"{', '.join(OPTIMIZERS)}."
            )
        rows_at_once = batch * processes
        rows_per_step = self.recipe.global_batch or rows_at_once * self.arg("gradient_accumulation_steps")
        if rows_per_step % rows_at_once:
            raise RecipeError(
                f"{path}: `global_batch` {rows_per_step} is not a multiple of {rows_at_once} rows, one batch of every "
                "process; change `args.per_device_train_batch_size` or the number of processes."
            )
        checkpointing = bool(self.arg("gradient_checkpointing"))
        return RunSettings(config, processes, batch, checkpointing, optim, rows_per_step)

    def _steps(self, settings: RunSettings) -> int:
        """Count optimizer steps as transformers' trainer does: batches of each process, then steps of an epoch."""
        whole = math.floor if self.arg("dataloader_drop_last") else math.ceil
        batches = math.ceil(whole(self.rows / settings.batch) / settings.processes)
        return math.ceil(self.arg("num_train_epochs") * max(math.ceil(batches / settings.accumulation), 1))

    def _option(self, name: str) -> bool:
        """Whether an option of PivotDPOConfig is on; all are off in other stages."""
        return self.recipe.stage == "dpo" and bool(self.arg(name))

    def _tokens_per_row(self) -> float:
        """Return the tokens that the language model runs for a row."""
        before_answer = self.image_tokens + self.prompt
        if self.recipe.stage != "dpo":
            return before_answer + self.answer
        return (1 if self._option("share_prefix") else 2) * before_answer + 2 * self.answer

    def _batch(self, rows: int, longest: bool) -> Batch:
        """Return the batch that a process runs at a time, laid out as the stage's trainer does."""
        before_answer = self.image_tokens + round(self.prompt)
        answer = max(round(self.answer), 1)
        if longest:
            answer = max(self.arg("max_length") - before_answer, answer)
        width = before_answer + answer
        scored = width - 1 if self.device == "cpu" else answer
        if self.recipe.stage != "dpo":
            return Batch(rows, width, rows, rows, rows * scored)
        if not any(self._option(name) for name in SPEED_OPTIONS):
            return Batch(2 * rows, width, 2 * rows, 2 * rows, 2 * rows * scored)
        return self._tree_batch(rows, before_answer, answer)

    def _tree_batch(self, rows: int, before_answer: int, answer: int) -> Batch:
        """Return a batch of preference pairs as `PairCollator` lays it out."""
        shared = self._option("share_prefix")
        tree_width = before_answer + (2 * answer if shared else answer)
        if shared:
            trees = [Tree(i * tree_width, before_answer, (answer, answer)) for i in range(rows)]
        else:
            trees = [Tree(i * tree_width, tree_width) for i in range(2 * rows)]
        if self._option("pack"):
            if self.arg("pack_tokens"):  # one chunk of several, each with a forward and a backward pass
                pairs = max(self.arg("pack_tokens") * rows // (tree_width * len(trees)), 1)
                trees = trees[: min(pairs, rows) * len(trees) // rows]
            layout: Layout = (tuple(trees),)
        else:
            layout = tuple((replace(tree, start=0),) for tree in trees)
        pairs = len(trees) if shared else len(trees) // 2
        return Batch(
            rows=len(layout),
            width=tree_width * len(layout[0]),
            images=pairs if self._option("encode_once") else len(trees),
            image_occurrences=len(trees),
            scored=2 * pairs * answer,
            answers=2 * pairs,
            layout=layout,
        )

    def _profile(
        self, rows: int, checkpointing: bool, accumulating: bool, longest: bool = False, training: bool = True
    ) -> StepProfile:
        if self._option("pack") and not self.arg("pack_tokens") and rows > 2 * FEW_PAIRS:
            # Attention runs pair by pair, so profiling many pairs would take minutes; each pair costs the same.
            few, more = (
                self.profiled(n, checkpointing, accumulating, longest, training) for n in (FEW_PAIRS, 2 * FEW_PAIRS)
            )
            return _extrapolated(few, more, rows / FEW_PAIRS - 1)
        batch = self._batch(rows, longest)
        pairs = batch.answers // 2 or rows  # fewer than `rows` if pack_tokens divides them into chunks
        profile = profile_step(
            self.meta_model(),
            batch,
            AUTOCAST[self.precision],
            checkpointing,
            accumulating or pairs < rows,
            reference=training and self.memory.live_reference,
            training=training,
        )
        chunks = rows / pairs
        flops = {part: {k: round(v * chunks) for k, v in phases.items()} for part, phases in profile.flops.items()}
        return replace(profile, flops=flops)

    def _training_peak(self, settings: RunSettings, longest: bool = False) -> MemoryPeak:
        lengths = (True,) if longest else ()
        profile = self.profiled(settings.batch, settings.checkpointing, settings.accumulation > 1, *lengths)
        name = "training, rows of max_length" if longest else "training, rows of mean length"
        return self.memory.training(settings, profile, name)

    def _peaks(self, settings: RunSettings) -> list[MemoryPeak]:
        """Return the memory peaks that every run with these settings reaches."""
        peaks = [self._training_peak(settings)]
        if self.memory.cached_reference:
            profile = self.profiled(settings.batch, False, False, training=False)
            peaks.append(self.memory.filling_cache(settings, profile))
        return peaks

    def _gpu_estimate(
        self,
        gpu: Gpu,
        settings: RunSettings,
        peaks: list[MemoryPeak],
        longest_peaks: list[MemoryPeak],
        flops: float,
    ) -> GpuEstimate:
        available = gpu.memory_bytes - RESERVE
        fits = all(peak.total <= available for peak in peaks)
        peak_flops = gpu.float32_flops if self.precision == "float32" else gpu.half_flops
        hours = flops / (peak_flops * self.hfu) / 3600
        return GpuEstimate(
            gpu=gpu.name,
            gpu_hours=hours,
            wall_hours=hours / settings.processes,
            fits=fits,
            fits_longest=fits and all(peak.total <= available for peak in longest_peaks),
            advice={} if fits else self._advice(settings, available),
        )

    def _advice(self, current: RunSettings, available: int) -> dict[str, Any] | None:
        """Return the first changes of the settings that make the stage fit into the available bytes."""
        for settings in candidates(current):
            # A profile takes seconds, so none is made for settings that do not fit even without activations.
            if sum(self.memory.static(settings).values()) > available:
                continue
            if all(peak.total <= available for peak in self._peaks(settings)):
                changes = current.changes(settings)
                if self.recipe.global_batch is None and settings.accumulation != current.accumulation:
                    changes["args.gradient_accumulation_steps"] = settings.accumulation
                return changes
        return None


def _extrapolated(few: StepProfile, more: StepProfile, distance: float) -> StepProfile:
    """Extrapolate linearly from two profiles.

    Args:
        few: Profile of few pairs.
        more: Profile of more pairs.
        distance: Distance of the result from the first profile, in multiples of the distance of the two.
    """

    def at(a: int, b: int) -> int:
        return round(a + (b - a) * distance)

    memory = {
        name: at(getattr(few, name), getattr(more, name))
        for name in ("activations", "copies", "gradients", "activations_alone")
    }
    flops = {part: {k: at(v, more.flops[part][k]) for k, v in phases.items()} for part, phases in few.flops.items()}
    return StepProfile(flops, **memory)


def _count_parameters(model: LlavaForConditionalGeneration) -> dict[str, dict[str, int]]:
    """Count the trained and the frozen parameters of each part."""
    counts = {}
    for part, modules in parts_of(model).items():
        # Each parameter counts once, however many modules share it.
        parameters = {id(p): p for module in modules for p in module.parameters()}.values()
        counts[part] = {
            "trained": sum(p.numel() for p in parameters if p.requires_grad),
            "frozen": sum(p.numel() for p in parameters if not p.requires_grad),
        }
    return counts


def _block_sizes(model: LlavaForConditionalGeneration) -> tuple[int, int]:
    """Return the parameters of the largest block, and of everything outside of all blocks."""
    network = cast(nn.Module, model)
    blocks = [block for module in network.modules() if isinstance(module, nn.ModuleList) for block in module]
    counts = [sum(p.numel() for p in block.parameters()) for block in blocks]
    return max(counts), sum(p.numel() for p in network.parameters()) - sum(counts)
