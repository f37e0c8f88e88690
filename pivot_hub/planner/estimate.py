"""Estimate what a stage will cost before any weight is loaded: parameters, tokens, FLOPs, memory, hours, disk.

FLOPs and activations come from one batch that runs on fake tensors (`planner.fake_step`). The rest is arithmetic on the
recipe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pivot_hub.config.accelerate import accelerate_config as find_accelerate_config
from pivot_hub.config.data_section import ShapesData
from pivot_hub.config.recipe import LoadedRecipe, MllmSpec
from pivot_hub.config.stages import argument_defaults, stage_of
from pivot_hub.errors import RecipeError
from pivot_hub.mllm.families import family_of
from pivot_hub.mllm.lora import add_lora
from pivot_hub.mllm.published_configs import joined_config, meta_model, part_config, whole_config
from pivot_hub.mllm.trainable import freeze_parts, parts_of
from pivot_hub.planner.fake_step import Batch, StepProfile, profile_step
from pivot_hub.planner.generation import Decoding, Schedule, weight_traffic
from pivot_hub.planner.gpus import GPUS, HFU, RESERVE, Gpu
from pivot_hub.planner.image_inputs import planned_image, tokens_of_scene
from pivot_hub.planner.memory import OPTIMIZERS, MemoryModel
from pivot_hub.planner.report import GENERATING, MACHINE, PHASES, Device, GpuEstimate, MemoryPeak, Plan, Precision
from pivot_hub.planner.settings import RunSettings, candidates
from pivot_hub.training.losses import compares_images
from pivot_hub.training.tree_layout import Tree

# Mean tokens of prompt and answer of a row of the synthetic Shapes dataset, chat format included.
SHAPES_TOKENS = (40.0, 25.0)
WITH_FACTS_TOKENS = 95.0  # of an answer of form `with_facts`
FEW_ROWS = 4
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
    queries and keys. Weights are float32, with autocast in half precision, unless the recipe's `weights` says
    bfloat16. DeepSpeed and FSDP run the forward pass on weights in half precision, and keep float32 ones to update.

    Answers of grpo and rloo are taken to have the length that a source expects, at most `max_completion_length`, and to
    be decoded at the bandwidth of the GPU's memory.

    Args:
        loaded: A recipe of align, instruct, sft, dpo, grpo or rloo.
        accelerate_config: Name of the Accelerate config, a file of recipes/accelerate.
        processes: Number of processes, one per GPU.
        hfu: Hardware FLOPs utilisation: the share of the GPU's peak at which all FLOPs run, recomputed ones included.
        lengths: The rows, prompt_tokens, answer_tokens and image_tokens of an epoch, as `pivot data check` reports
            them. Without them each source's `expect` is read.
        device: Device that the trainer runs on. A CPU trains in float32 and scores every position.

    Raises:
        RecipeError: The stage is not one of these, a source does not say what it holds, or settings do not fit
            together.
        CheckpointError: A config is missing, or the planner does not know what the MLLM makes of an image.
    """
    return _Planner(loaded, hfu, lengths, device).plan(accelerate_config, processes)


class _Planner:
    """Computes the cost of one recipe under any settings; each batch is profiled once."""

    def __init__(self, loaded: LoadedRecipe, hfu: float, lengths: Mapping[str, float] | None, device: Device) -> None:
        self.loaded, self.recipe, self.hfu, self.device = loaded, loaded.recipe, hfu, device
        if stage_of(self.recipe.stage).base_part:
            raise RecipeError(
                f"{loaded.path}: stage {self.recipe.stage} makes a base part, whose cost is in the recipe's first "
                "lines; plan another stage."
            )
        self.generates = stage_of(self.recipe.stage).takes_rewards
        if self.generates and (self.arg("use_vllm") or self.arg("use_transformers_continuous_batching")):
            raise RecipeError(
                f"{loaded.path}: the planner counts answers that transformers generates batch by batch; plan without "
                "`args.use_vllm` and `args.use_transformers_continuous_batching`."
            )
        if not 0 < hfu <= 1:
            raise RecipeError(f"hfu is {hfu}: give the share of the peak, above 0 and at most 1.")
        self.config = _mllm_config(loaded)
        meta = self.meta_model()
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
            compute_bytes=2 if self.recipe.weights or self.precision != "float32" else 4,
            weight_bytes=2 if self.recipe.weights else 4,
            live_reference=(is_dpo and not caches) or (self.generates and self.arg("beta") != 0),
            cached_reference=caches,
        )
        self.assumptions = ["rows of mean length without padding, an image each; no tokens added to the vocabulary"]
        self.image = planned_image(meta, self._given_image_tokens(lengths))
        self.image_tokens = self.image.tokens
        if self.config.model_type != "llava":
            self.assumptions.append(self.image.assumption)
        self.images_per_row = (
            2 if self.recipe.stage == "dpo" and compares_images(self.recipe.args.get("loss_type", ())) else 1
        )
        if self.images_per_row > 1:
            self.assumptions.append("a rejected image of the same size, behind which both answers run too")
        self.trees = family_of(self.config).shares_prompts
        self.decoding = Decoding.of(meta) if self.generates else None
        if not self.trees and self._option("share_prefix"):
            self.assumptions.append("image and prompt run once for each answer, which this MLLM cannot share")
        self.rows, self.prompt, self.answer = self._lengths(lengths)
        if self.generates:
            self.answer = min(self.answer, self.arg("max_completion_length"))
            self.assumptions += [
                f"answers of {self.answer:g} tokens, which transformers generates and which end together",
                "decoding at the memory's bandwidth, weights and cache read once a token: launches can take longer",
            ]
        self.profiled = lru_cache(None)(self._profile)
        self.profiled_prefill = lru_cache(None)(self._profile_prefill)

    def meta_model(self) -> PreTrainedModel:
        """Build the stage's model on the meta device, with the weights that do not train frozen."""
        model = meta_model(self.config)
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
        schedule = self._schedule(settings) if self.generates else None
        rows_of_epoch = self.rows
        if schedule is not None:  # each answer counts, as often as it is trained on
            rows_of_epoch = schedule.batches_of_an_epoch(self.rows, settings.at_once) * settings.at_once
        rows_seen = self.arg("num_train_epochs") * rows_of_epoch
        steps = self._steps(settings)
        if self.arg("max_steps") > 0:
            steps, rows_seen = self.arg("max_steps"), self.arg("max_steps") * settings.rows_per_step
        half_weights = self._half_weights(settings)
        profile = self.profiled(
            settings.batch, settings.checkpointing, settings.accumulation > 1, False, half_weights=half_weights
        )
        flops_per_row = {
            part: {phase: phases.get(phase, 0) / settings.batch for phase in PHASES}  # type: ignore[call-overload]
            for part, phases in profile.flops.items()
        }
        phases_of_run: tuple[str, ...] = PHASES
        if schedule is not None:
            phases_of_run += GENERATING
            self._add_answers(flops_per_row, settings, schedule)
        flops = {
            phase: sum(phases.get(phase, 0) for phases in flops_per_row.values()) * rows_seen for phase in phases_of_run
        }
        if self._option("cache_reference"):
            flops["reference"] = sum(phases["forward"] for phases in flops_per_row.values()) * self.rows
        peaks = self._peaks(settings)
        longest_peaks = []
        if self.generates or self.arg("max_length"):
            longest_peaks.append(self._training_peak(settings, longest=True))
        if self.generates:
            longest_peaks.append(self._generating_peak(settings, longest=True))
        tokens_per_row = self._tokens_per_row()
        run_flops = sum(count for phase, count in flops.items() if phase != "decoding")
        decoding = 0.0 if schedule is None else rows_seen / (settings.at_once * schedule.batches * schedule.uses)
        return Plan(
            recipe=self.loaded.name,
            stage=self.recipe.stage,
            machine=settings.accelerate_config.name,
            processes=settings.processes,
            device=self.device,
            precision=self.precision,
            hfu=self.hfu,
            mfu=self.hfu * (1 - flops["recompute"] / run_flops),
            gradient_checkpointing=settings.checkpointing,
            optim=settings.optim,
            per_device_train_batch_size=settings.batch,
            gradient_accumulation_steps=settings.accumulation,
            parameters=self.parameters,
            image_tokens=self.image_tokens,
            prompt_tokens=round(self.prompt, 2),
            answer_tokens=round(self.answer, 2),
            answers=1 if schedule is None else schedule.answers,
            rows=self.rows,
            rows_per_step=settings.rows_per_step,
            steps=steps,
            epochs=rows_seen / rows_of_epoch,
            tokens_per_step=round(tokens_per_row * settings.rows_per_step),
            tokens=round(tokens_per_row * rows_seen),
            flops_per_step={
                part: {phase: count * settings.rows_per_step for phase, count in phases.items()}
                for part, phases in flops_per_row.items()
            },
            flops=flops,
            memory=(*peaks, *longest_peaks),
            disk=self.memory.disk(settings, self.arg("save_only_model"), self.recipe.args.get("save_total_limit", 2)),
            loading_bytes=self.memory.loading(min(settings.processes, MACHINE)),
            gpus=tuple(self._gpu_estimate(gpu, settings, peaks, longest_peaks, run_flops, decoding) for gpu in GPUS),
            assumptions=tuple(self.assumptions),
            warnings=self._warnings(),
        )

    def _warnings(self) -> tuple[str, ...]:
        """Return the effects of the settings that are not among the numbers."""
        if not self.recipe.weights:
            return ()
        return ("a bfloat16 weight does not move at updates below 1/512 of its size: most are lost at rates near 1e-6",)

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

    def _given_image_tokens(self, lengths: Mapping[str, float] | None) -> int | None:
        """Return the mean tokens of an image, as measured or as the sources expect them; None if one says nothing."""
        if lengths is not None and lengths.get("image_tokens"):
            return round(lengths["image_tokens"])
        counts: list[tuple[int, int]] = []
        for source in self.recipe.data:
            if isinstance(source, ShapesData):
                tokens, rows = tokens_of_scene(self.config, source.world.image_px), source.rows
            else:
                expect = source.expect
                tokens, rows = (None, 0) if expect is None else (expect.image_tokens, expect.rows)
            if tokens:
                counts.append((rows, tokens))
        if len(counts) < len(self.recipe.data):
            return None
        return round(sum(rows * tokens for rows, tokens in counts) / sum(rows for rows, _ in counts))

    def _source_lengths(self, i: int) -> tuple[int, float, float]:
        """Return the rows of a source and their mean tokens of prompt and answer."""
        spec = self.recipe.data[i]
        if isinstance(spec, ShapesData):
            prompt, answer = SHAPES_TOKENS
            if spec.forms and spec.content in ("instruct", "pairs"):
                tokens = [WITH_FACTS_TOKENS if form == "with_facts" else answer for form in spec.forms]
                answer = sum(tokens) / len(tokens)
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
        if self.recipe.weights and config.shards:
            raise RecipeError(
                f"{path}: `weights` is for single and ddp; {config.name} keeps float32 weights to update. Leave it out."
            )
        checkpointing = bool(self.arg("gradient_checkpointing"))
        return RunSettings(config, processes, batch, checkpointing, optim, rows_per_step)

    def _steps(self, settings: RunSettings) -> int:
        """Count optimizer steps as transformers' trainer does: batches of each process, then steps of an epoch."""
        whole = math.floor if self.arg("dataloader_drop_last") else math.ceil
        batches = math.ceil(whole(self.rows / settings.batch) / settings.processes)
        if self.generates:
            batches = self._schedule(settings).batches_of_an_epoch(self.rows, settings.at_once)
        return math.ceil(self.arg("num_train_epochs") * max(math.ceil(batches / settings.accumulation), 1))

    def _option(self, name: str) -> bool:
        """Whether an option of our configs is on; they are off in stages whose config lacks them."""
        return bool(self.arg(name))

    def _schedule(self, settings: RunSettings) -> Schedule:
        """Return how often answers are generated.

        Raises:
            RecipeError: The answers of a generation are no whole groups, or do not fill one.
        """
        schedule = Schedule.of(self.recipe.stage, self.arg, settings.at_once, settings.accumulation)
        if (problem := self._problem_of(schedule, settings)) is not None:
            raise RecipeError(f"{self.loaded.path}: {problem}.")
        return schedule

    def _problem_of(self, schedule: Schedule, settings: RunSettings) -> str | None:
        """Return why answers cannot be generated on a schedule, or None if they can."""
        generated = settings.at_once * schedule.batches
        if schedule.batches < 1 or generated % schedule.answers:
            return (
                f"{generated} answers that all processes generate at once are not a multiple of `args.num_generations` "
                f"{schedule.answers}; change it, `args.per_device_train_batch_size` or the number of processes"
            )
        if generated > self.rows * schedule.answers:
            return (
                f"{self.rows} rows do not fill a generation of {generated // schedule.answers} prompts; give more "
                "rows, or lower `args.per_device_train_batch_size` or `global_batch`"
            )
        return None

    def _add_answers(self, flops: dict[str, dict[str, float]], settings: RunSettings, schedule: Schedule) -> None:
        """Add the FLOPs of generating an answer and of its log-probabilities, a row's share, by part."""
        assert self.decoding is not None
        shares = self._shares_prefill()
        prefill = self._prefill(settings)
        for part, phases in flops.items():
            prompt = prefill.flops[part].get("forward", 0) / self._prompts_at_once(settings)
            phases["prefill"] = prompt / (schedule.answers if shares else 1) / schedule.uses
            for phase, computed in (("old policy", schedule.old_policy), ("reference", schedule.reference)):
                phases[phase] = phases["forward"] / schedule.uses if computed else 0
        before = self.image_tokens + round(self.prompt)
        flops["language"]["decoding"] = self.decoding.flops_of_answer(before, self._tokens_of_answer()) / schedule.uses

    def _tokens_of_answer(self) -> int:
        return max(round(self.answer), 1)

    def _shares_prefill(self) -> bool:
        """Whether generation runs image and prompt once for all answers, see `GroupTrainer`."""
        return self._shares_prefix() and not (self.arg("cache_implementation") or self.arg("generation_kwargs"))

    def _prompts_at_once(self, settings: RunSettings) -> int:
        """Return the prompts that a process generates answers to at once, each as often as it runs."""
        schedule = self._schedule(settings)
        answers = settings.batch * schedule.batches
        return max(answers // schedule.answers, 1) if self._shares_prefill() else answers

    def _prefill(self, settings: RunSettings) -> StepProfile:
        """Profile the forward pass of the prompts that answers are generated to."""
        return self.profiled_prefill(self._prompts_at_once(settings), self._half_weights(settings))

    def _profile_prefill(self, prompts: int, half_weights: bool) -> StepProfile:
        batch = Batch(prompts, self.image_tokens + round(self.prompt), prompts, scored=prompts)
        half = AUTOCAST[self.precision] or torch.bfloat16
        return profile_step(
            self.meta_model(),
            batch,
            self.image,
            AUTOCAST[self.precision] if not half_weights or self.recipe.weights else None,
            training=False,
            weights=half if half_weights else torch.float32,
        )

    def _generating_peak(self, settings: RunSettings, longest: bool = False) -> MemoryPeak:
        """Return the peak of generating answers of the mean length, or of the longest."""
        assert self.decoding is not None
        answer = self.arg("max_completion_length") if longest else self.answer
        answers = settings.batch * self._schedule(settings).batches
        cache = self.decoding.cache(answers, self.image_tokens + self.prompt + answer, self.memory.compute_bytes)
        return self.memory.generating(settings, self._prefill(settings), cache, longest)

    def _shares_prefix(self) -> bool:
        """Whether image and prompt of a row run once for all of its answers."""
        return self.trees and self._option("share_prefix")

    def _tokens_per_row(self) -> float:
        """Return the tokens that the language model runs for a row."""
        before_answer = self.image_tokens + self.prompt
        if self.generates:  # of an answer
            return before_answer / (self.arg("num_generations") if self._shares_prefix() else 1) + self.answer
        if self.recipe.stage != "dpo":
            return before_answer + self.answer
        return self.images_per_row * ((1 if self._shares_prefix() else 2) * before_answer + 2 * self.answer)

    def _batch(self, rows: int, longest: bool) -> Batch:
        """Return the batch that a process runs at a time, laid out as the stage's trainer does."""
        before_answer = self.image_tokens + round(self.prompt)
        answer = self._tokens_of_answer()
        if self.generates:
            return self._batch_of_groups(rows, before_answer, self.arg("max_completion_length") if longest else answer)
        if longest:
            answer = max(self.arg("max_length") - before_answer, answer)
        width = before_answer + answer
        scored = width - 1 if self.device == "cpu" else answer
        if self.recipe.stage != "dpo" and not self.trees:
            return Batch(rows, width, rows, rows * scored)
        if self.recipe.stage != "dpo":  # without padding, one after the other
            trees = tuple(Tree(i * width, width) for i in range(rows))
            return Batch(1, rows * width, rows, rows * scored, trees=trees)
        rows *= self.images_per_row
        if not self._shares_prefix():  # as TRL does: both answers padded, each with its own prompt and image
            return Batch(2 * rows, width, 2 * rows, 2 * rows * scored)
        tree_width = before_answer + 2 * answer
        return Batch(
            rows=1,
            width=rows * tree_width,
            images=rows,
            scored=2 * rows * answer,
            answers=2 * rows,
            trees=tuple(Tree(i * tree_width, before_answer, (answer, answer)) for i in range(rows)),
        )

    def _batch_of_groups(self, answers: int, before_answer: int, answer: int) -> Batch:
        """Return a batch of answers of grpo or rloo: a tree for each prompt, or padded as TRL does."""
        width = before_answer + answer
        if not self._shares_prefix():
            scored = width - 1 if self.device == "cpu" else answer
            return Batch(answers, width, answers, answers * scored)
        trees, start = [], 0
        whole, rest = divmod(answers, self.arg("num_generations"))
        for count in [self.arg("num_generations")] * whole + [rest] * bool(rest):
            trees.append(Tree(start, before_answer, (answer,) * count))
            start += before_answer + count * answer
        return Batch(1, start, len(trees), answers * answer, answers, tuple(trees))

    def _half_weights(self, settings: RunSettings) -> bool:
        """Whether the forward pass reads weights in half precision, and not float32 ones under autocast."""
        sharded = settings.accelerate_config.deepspeed or "weights" in settings.accelerate_config.shards
        return bool(self.recipe.weights) or (sharded and self.precision != "float32")

    def _profile(
        self,
        rows: int,
        checkpointing: bool,
        accumulating: bool,
        longest: bool = False,
        training: bool = True,
        half_weights: bool = False,
    ) -> StepProfile:
        few_rows = self.arg("num_generations") if self.generates else FEW_ROWS
        packed = self._shares_prefix() or (self.trees and self.recipe.stage != "dpo" and not self.generates)
        if packed and rows > 2 * few_rows:
            # Attention runs row by row, so profiling many rows would take minutes; each row costs the same.
            few, more = (
                self.profiled(n, checkpointing, accumulating, longest, training, half_weights)
                for n in (few_rows, 2 * few_rows)
            )
            return _extrapolated(few, more, rows / few_rows - 1)
        half = AUTOCAST[self.precision] or torch.bfloat16
        return profile_step(
            self.meta_model(),
            self._batch(rows, longest),
            self.image,
            AUTOCAST[self.precision] if not half_weights or self.recipe.weights else None,
            checkpointing,
            accumulating,
            reference=training and self.memory.live_reference and not self.generates,
            training=training,
            weights=half if half_weights else torch.float32,
        )

    def _training_peak(self, settings: RunSettings, longest: bool = False) -> MemoryPeak:
        profile = self.profiled(
            settings.batch,
            settings.checkpointing,
            settings.accumulation > 1,
            longest,
            half_weights=self._half_weights(settings),
        )
        name = "training, rows of mean length"
        if longest:
            name = "training, longest answers" if self.generates else "training, rows of max_length"
        return self.memory.training(settings, profile, name)

    def _peaks(self, settings: RunSettings) -> list[MemoryPeak]:
        """Return the memory peaks that every run with these settings reaches."""
        peaks = [self._training_peak(settings)]
        if self.memory.cached_reference:
            profile = self.profiled(
                settings.batch, False, False, training=False, half_weights=self._half_weights(settings)
            )
            peaks.append(self.memory.filling_cache(settings, profile))
        if self.generates:
            peaks.append(self._generating_peak(settings))
        return peaks

    def _gpu_estimate(
        self,
        gpu: Gpu,
        settings: RunSettings,
        peaks: list[MemoryPeak],
        longest_peaks: list[MemoryPeak],
        flops: float,
        generations: float,
    ) -> GpuEstimate:
        available = gpu.memory_bytes - RESERVE
        fits = all(peak.total <= available for peak in peaks)
        peak_flops = gpu.float32_flops if self.precision == "float32" else gpu.half_flops
        seconds = flops / (peak_flops * self.hfu)
        if self.decoding is not None:
            seconds += generations * settings.processes * self._decoding_seconds(gpu, settings, peak_flops * self.hfu)
        hours = seconds / 3600
        return GpuEstimate(
            gpu=gpu.name,
            gpu_hours=hours,
            wall_hours=hours / settings.processes,
            fits=fits,
            fits_longest=fits and all(peak.total <= available for peak in longest_peaks),
            advice={} if fits else self._advice(settings, available),
        )

    def _decoding_seconds(self, gpu: Gpu, settings: RunSettings, flops_per_second: float) -> float:
        """Return the seconds of a generation behind its prompts: by the bytes that are read, or by FLOPs if longer."""
        assert self.decoding is not None
        answers = settings.batch * self._schedule(settings).batches
        before, answer = self.image_tokens + self.prompt, self._tokens_of_answer()
        traffic = weight_traffic(self._half_weights(settings), self.precision != "float32")
        read = self.decoding.bytes_of_answers(answers, before, answer, traffic, self.memory.compute_bytes)
        flops = answers * self.decoding.flops_of_answer(before, answer)
        return max(read / gpu.bandwidth, flops / flops_per_second)

    def _advice(self, current: RunSettings, available: int) -> dict[str, Any] | None:
        """Return the first changes of the settings that make the stage fit into the available bytes."""
        for settings in candidates(current):
            # A profile takes seconds, so none is made for settings that do not fit even without activations.
            if sum(self.memory.static(settings).values()) > available:
                continue
            if self.generates:
                schedule = Schedule.of(self.recipe.stage, self.arg, settings.at_once, settings.accumulation)
                if self._problem_of(schedule, settings) is not None:
                    continue
            if all(peak.total <= available for peak in self._peaks(settings)):
                changes = current.changes(settings)
                if self.recipe.global_batch is None and settings.accumulation != current.accumulation:
                    changes["args.gradient_accumulation_steps"] = settings.accumulation
                return changes
        return None


def _mllm_config(loaded: LoadedRecipe) -> PreTrainedConfig:
    """Find the config of the MLLM that a recipe's lineage starts from, or that of the parts that it joins."""
    model = loaded.recipe.model
    if isinstance(model, MllmSpec):
        return whole_config(loaded.locate(model.mllm), model.revision)
    spec = loaded.parts("the planner")
    vision = part_config(loaded.locate(spec.vision), spec.vision_revision, squares=spec.family is None)
    language = part_config(loaded.locate(spec.language), spec.language_revision)
    return joined_config(vision, language, spec.feature_layer, spec.family)


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


def _count_parameters(model: PreTrainedModel) -> dict[str, dict[str, int]]:
    """Count the trained and the frozen parameters of each part."""
    counts = {}
    for part, parameters in parts_of(model).items():
        counts[part] = {
            "trained": sum(p.numel() for p in parameters.values() if p.requires_grad),
            "frozen": sum(p.numel() for p in parameters.values() if not p.requires_grad),
        }
    return counts


def _block_sizes(model: PreTrainedModel) -> tuple[int, int]:
    """Return the parameters of the largest block, and of everything outside of all blocks."""
    network = cast(nn.Module, model)
    blocks = [block for module in network.modules() if isinstance(module, nn.ModuleList) for block in module]
    counts = [sum(p.numel() for p in block.parameters()) for block in blocks]
    return max(counts), sum(p.numel() for p in network.parameters()) - sum(counts)
