"""Estimate what a stage will cost before any weight is loaded: parameters, tokens, FLOPs, memory, hours, disk.

FLOPs and activations come from one batch that is run on fake tensors (`planner.fake_step`); the rest is arithmetic on
the recipe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from pivot_hub.config.data_section import ShapesData
from pivot_hub.config.recipe import LoadedRecipe
from pivot_hub.config.stages import argument_defaults, stage_of
from pivot_hub.errors import RecipeError
from pivot_hub.mllm.lora import add_lora
from pivot_hub.mllm.published_configs import meta_mllm, part_config
from pivot_hub.mllm.trainable import freeze_parts, parts_of
from pivot_hub.planner.fake_step import Batch, StepProfile, profile_step
from pivot_hub.planner.gpus import GPUS, MFU, RESERVE, Gpu
from pivot_hub.planner.report import PHASES, Device, Moment, Plan, Precision, Verdict
from pivot_hub.training.dpo import SPEED_OPTIONS
from pivot_hub.training.tree_layout import Layout, Tree

SHAPES_TOKENS = (40.0, 25.0)  # prompt and answer of a row of the built-in world, chat format included
# Bytes of state for each trained parameter.
OPTIMIZERS = {"adamw_torch": 8.0, "adamw_torch_fused": 8.0, "adamw_bnb_8bit": 2.03, "adamw_8bit": 2.03}
OPTIMIZERS |= {"lion_32bit": 4.0, "lion_8bit": 1.02, "sgd": 0.0}
# What each machine file divides among the processes.
MACHINES: dict[str, frozenset[str]] = {
    "single": frozenset(),
    "ddp": frozenset(),
    "zero2": frozenset({"gradients", "optimizer"}),
    "zero3": frozenset({"weights", "gradients", "optimizer", "reference"}),
    "fsdp2": frozenset({"weights", "gradients", "optimizer", "reference"}),
}
FEW_PAIRS = 4
ZERO2_BUCKET = 500_000_000  # parameters; DeepSpeed's default, one bucket to reduce and one to gather
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": None}


@dataclass(frozen=True)
class _Setting:
    """What may be changed to make a stage fit."""

    machine: str
    processes: int
    batch: int
    checkpointing: bool
    optim: str
    rows_per_step: int

    @property
    def accumulation(self) -> int:
        return self.rows_per_step // (self.batch * self.processes)

    def changes(self, to: _Setting) -> dict[str, Any]:
        """Overrides and arguments of `plan_stage` that make another setting of this one."""
        made: dict[str, Any] = {}
        if to.checkpointing != self.checkpointing:
            made["args.gradient_checkpointing"] = to.checkpointing
        if to.batch != self.batch:
            made["args.per_device_train_batch_size"] = to.batch
        if to.machine != self.machine:
            made["machine"] = to.machine
        if to.optim != self.optim:
            made["args.optim"] = to.optim
        if to.processes != self.processes:
            made["processes"] = to.processes
        return made


def plan_stage(
    loaded: LoadedRecipe,
    machine: str = "ddp",
    processes: int = 8,
    mfu: float = MFU,
    lengths: Mapping[str, float] | None = None,
    device: Device = "cuda",
) -> Plan:
    """Count what a stage will cost.

    Rows have the mean length, one image each, and no padding; attention counts as the full square of queries and keys.
    Weights are float32, as the stages train them, with autocast in half precision.

    Args:
        loaded: a recipe of align, instruct, sft or dpo.
        machine: single, ddp, zero2, zero3 or fsdp2.
        processes: one a GPU.
        mfu: model FLOPs utilisation: the share of the GPU's peak at which all FLOPs run, recomputed ones too.
        lengths: rows, prompt_tokens and answer_tokens of an epoch, as `pivot data check` reports them; without it each
            source's `expect` is read.
        device: what the trainer runs on: a CPU trains in float32 and scores every position.

    Raises:
        RecipeError: the stage is not one of these, a source says not what it holds, or settings do not go together.
        CheckpointError: a part's config is not found.
    """
    return _Planner(loaded, mfu, lengths, device).plan(machine, processes)


class _Planner:
    """Counts one recipe under any setting, rehearsing each batch once."""

    def __init__(self, loaded: LoadedRecipe, mfu: float, lengths: Mapping[str, float] | None, device: Device) -> None:
        self.loaded, self.recipe, self.mfu, self.device = loaded, loaded.recipe, mfu, device
        if stage_of(self.recipe.stage).base_part:
            raise RecipeError(
                f"{loaded.path}: stage {self.recipe.stage} makes a base part, whose cost is in its first lines; plan "
                "align, instruct, sft or dpo."
            )
        if not 0 < mfu <= 1:
            raise RecipeError(f"mfu is {mfu}: give the share of the peak, above 0 and at most 1.")
        assert self.recipe.model is not None
        spec = self.recipe.model
        self.configs = (
            part_config(loaded.locate(spec.vision), spec.vision_revision),
            part_config(loaded.locate(spec.language), spec.language_revision),
        )
        self.feature_layer = spec.feature_layer
        meta = self.model()
        self.image_tokens = int(meta.config.image_seq_length)
        self.sizes = _sizes(meta)
        self.parameters = {
            part: {
                name: sum(p.numel() for p in _parameters(modules) if p.requires_grad is (name == "trained"))
                for name in ("trained", "frozen")
            }
            for part, modules in parts_of(meta).items()
        }
        self.trained = sum(p["trained"] for p in self.parameters.values())
        self.total = self.trained + sum(p["frozen"] for p in self.parameters.values())
        self.assumptions = ["rows of mean length without padding, an image each; no tokens added to the vocabulary"]
        self.rows, self.prompt, self.answer = self._rows(lengths)
        self.precision: Precision = "bf16" if self.arg("bf16", device == "cuda" and not self.arg("fp16")) else "float32"
        if self.arg("fp16"):
            self.precision = "fp16"
        self.profiled = lru_cache(None)(self._rehearse)

    def model(self) -> LlavaForConditionalGeneration:
        """The stage's model on the meta device, what it does not train frozen."""
        made = meta_mllm(*self.configs, self.feature_layer)
        freeze_parts(made, self.recipe.learning_rate.trained())
        if self.recipe.lora is not None:
            add_lora(made, self.recipe.lora, self.recipe.seed)
        return made

    def arg(self, name: str, default: Any = None) -> Any:
        """A trainer argument, or the default its config class has."""
        if name in self.recipe.args:
            return self.recipe.args[name]
        return argument_defaults(stage_of(self.recipe.stage)).get(name) if default is None else default

    def plan(self, machine: str, processes: int) -> Plan:
        now = self._setting(machine, processes)
        rows_seen = self.arg("num_train_epochs") * self.rows
        steps = self._steps(now)
        if self.arg("max_steps") > 0:
            steps, rows_seen = self.arg("max_steps"), self.arg("max_steps") * now.rows_per_step
        made = self.profiled(now.batch, now.checkpointing, now.accumulation > 1)
        per_row = {
            part: {phase: phases.get(phase, 0) / now.batch for phase in PHASES}  # type: ignore[call-overload]
            for part, phases in made.flops.items()
        }
        run = {phase: sum(phases[phase] for phases in per_row.values()) * rows_seen for phase in PHASES}
        if self._caches_reference():
            run["reference"] = sum(phases["forward"] for phases in per_row.values()) * self.rows
        moments = self._moments(now)
        longest = [self._training(now, longest=True)] if self.arg("max_length") else []
        tokens_per_row = self._tokens_per_row()
        return Plan(
            recipe=self.loaded.name,
            stage=self.recipe.stage,
            machine=machine,
            processes=now.processes,
            device=self.device,
            precision=self.precision,
            mfu=self.mfu,
            gradient_checkpointing=now.checkpointing,
            optim=now.optim,
            per_device_train_batch_size=now.batch,
            gradient_accumulation_steps=now.accumulation,
            parameters=self.parameters,
            image_tokens=self.image_tokens,
            prompt_tokens=round(self.prompt, 2),
            answer_tokens=round(self.answer, 2),
            rows=self.rows,
            rows_per_step=now.rows_per_step,
            steps=steps,
            epochs=rows_seen / self.rows,
            tokens_per_step=round(tokens_per_row * now.rows_per_step),
            tokens=round(tokens_per_row * rows_seen),
            flops_per_step={
                part: {phase: count * now.rows_per_step for phase, count in phases.items()}
                for part, phases in per_row.items()
            },
            flops=run,
            memory=(*moments, *longest),
            disk=self._disk(),
            gpus=tuple(self._verdict(gpu, now, moments, longest, sum(run.values())) for gpu in GPUS),
            assumptions=tuple(self.assumptions),
        )

    def _rows(self, lengths: Mapping[str, float] | None) -> tuple[int, float, float]:
        """Rows of an epoch and their mean tokens of prompt and answer, cut at max_length."""
        if lengths is not None:
            rows, prompt, answer = int(lengths["rows"]), lengths["prompt_tokens"], lengths["answer_tokens"]
        else:
            counted = [self._source(i) for i in range(len(self.recipe.data))]
            rows = sum(r for r, _, _ in counted)
            prompt, answer = (sum(c[0] * c[k] for c in counted) / rows for k in (1, 2))
        longest = self.arg("max_length")
        if longest is not None:
            before = self.image_tokens + prompt
            if before >= longest:
                raise RecipeError(
                    f"{self.loaded.path}: image and prompt take {before:.0f} tokens and leave no room for an answer in "
                    f"max_length {longest}; raise `args.max_length`."
                )
            answer = min(answer, longest - before)
        return rows, prompt, answer

    def _source(self, i: int) -> tuple[int, float, float]:
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

    def _setting(self, machine: str, processes: int) -> _Setting:
        path, batch, optim = self.loaded.path, self.arg("per_device_train_batch_size"), str(self.arg("optim"))
        if machine not in MACHINES:
            raise RecipeError(f"there is no machine {machine!r}; give one of {', '.join(MACHINES)}.")
        if processes < 1 or (machine == "single" and processes > 1):
            raise RecipeError(f"machine {machine} does not run {processes} processes; give another of either.")
        if optim not in OPTIMIZERS:
            raise RecipeError(
                f"{path}: the planner does not know the memory of `args.optim` {optim}; it knows "
                f"{', '.join(OPTIMIZERS)}."
            )
        together = batch * processes
        step = self.recipe.global_batch or together * self.arg("gradient_accumulation_steps")
        if step % together:
            raise RecipeError(
                f"{path}: `global_batch` {step} is not a multiple of {together} rows, a batch of every process; change "
                "`args.per_device_train_batch_size` or the number of processes."
            )
        return _Setting(machine, processes, batch, bool(self.arg("gradient_checkpointing")), optim, step)

    def _steps(self, now: _Setting) -> int:
        """As transformers' trainer counts: batches of each process, then steps of an epoch."""
        whole = math.floor if self.arg("dataloader_drop_last") else math.ceil
        batches = math.ceil(whole(self.rows / now.batch) / now.processes)
        return math.ceil(self.arg("num_train_epochs") * max(math.ceil(batches / now.accumulation), 1))

    def _on(self, switch: str) -> bool:
        return self.recipe.stage == "dpo" and bool(self.arg(switch))

    def _caches_reference(self) -> bool:
        return self._on("cache_reference")

    def _tokens_per_row(self) -> float:
        """Tokens that the language model runs for a row."""
        before = self.image_tokens + self.prompt
        if self.recipe.stage != "dpo":
            return before + self.answer
        return (1 if self._on("share_prefix") else 2) * before + 2 * self.answer

    def _batch(self, rows: int, longest: bool) -> Batch:
        """What a process runs at a time, laid out as the stage's trainer does."""
        before = self.image_tokens + round(self.prompt)
        answer = max(round(self.answer), 1)
        if longest:
            answer = max(self.arg("max_length") - before, answer)
        width = before + answer
        everywhere = self.device == "cpu"
        if self.recipe.stage != "dpo":
            return Batch(rows, width, rows, rows, rows * (width - 1 if everywhere else answer))
        if not any(self._on(switch) for switch in SPEED_OPTIONS):
            return Batch(2 * rows, width, 2 * rows, 2 * rows, 2 * rows * (width - 1 if everywhere else answer))
        if self._on("share_prefix"):
            trees = [Tree(i * (width + answer), before, (answer, answer)) for i in range(rows)]
        else:
            trees = [Tree(i * width, width) for i in range(2 * rows)]
        tree_width = width + answer if self._on("share_prefix") else width
        if self._on("pack"):
            if self.arg("pack_tokens"):  # one chunk of several, each forward and backward
                pairs = max(self.arg("pack_tokens") * rows // (tree_width * len(trees)), 1)
                trees = trees[: min(pairs, rows) * len(trees) // rows]
            layout: Layout = (tuple(trees),)
        else:
            layout = tuple((replace(tree, start=0),) for tree in trees)
        pairs = len(trees) if self._on("share_prefix") else len(trees) // 2
        images = pairs if self._on("encode_once") else len(trees)
        return Batch(
            rows=len(layout),
            width=tree_width * len(layout[0]),
            images=images,
            shown=len(trees),
            scored=2 * pairs * answer,
            answers=2 * pairs,
            layout=layout,
        )

    def _rehearse(
        self, rows: int, checkpointing: bool, accumulating: bool, longest: bool = False, training: bool = True
    ) -> StepProfile:
        if self._on("pack") and not self.arg("pack_tokens") and rows > 2 * FEW_PAIRS:
            # Attention runs pair by pair, so that many would take minutes, and each costs the same.
            few, more = (
                self.profiled(n, checkpointing, accumulating, longest, training) for n in (FEW_PAIRS, 2 * FEW_PAIRS)
            )
            return _extended(few, more, rows / FEW_PAIRS - 1)
        batch = self._batch(rows, longest)
        pairs = batch.answers // 2 or rows  # fewer than rows where pack_tokens makes chunks of them
        made = profile_step(
            self.model(),
            batch,
            AUTOCAST[self.precision],
            checkpointing,
            accumulating or pairs < rows,
            reference=training and self.recipe.stage == "dpo" and not self._caches_reference(),
            training=training,
        )
        times = rows / pairs
        flops = {part: {k: round(v * times) for k, v in phases.items()} for part, phases in made.flops.items()}
        return replace(made, flops=flops)

    def _static(self, now: _Setting) -> dict[str, int]:
        """Bytes that lie on a GPU all the time."""
        terms = {"weights": 4 * self.total, "gradients": 4 * self.trained}
        terms["optimizer"] = int(OPTIMIZERS[now.optim] * self.trained)
        if self.recipe.stage == "dpo" and not self._caches_reference():
            terms["reference"] = 4 * self.total
        divided = MACHINES[now.machine]
        terms = {k: v // now.processes if k in divided else v for k, v in terms.items()}
        if now.machine == "ddp" and now.processes > 1:
            terms["buckets"] = 4 * self.trained
        if now.machine == "zero2":
            terms["buckets"] = 2 * self._wide * min(self.trained, ZERO2_BUCKET)
        if "weights" in divided:
            terms["gathered"] = self._gathered()
        return terms

    @property
    def _wide(self) -> int:
        """Bytes of a weight as the forward pass reads it."""
        return 4 if self.precision == "float32" else 2

    def _gathered(self) -> int:
        """Whole weights that a sharded step holds: two blocks, one ahead of the other, and what lies in no block.

        The gradients of one block and of the latter come on top before they are divided.
        """
        largest, rest = self.sizes
        return self._wide * (2 * largest + rest + largest + rest)

    def _training(self, now: _Setting, longest: bool = False) -> Moment:
        lengths = (True,) if longest else ()
        made = self.profiled(now.batch, now.checkpointing, now.accumulation > 1, *lengths)
        terms = self._static(now)
        if "gradients" in MACHINES[now.machine]:
            terms["activations"] = made.activations_alone
            # Sharded weights are gathered in half precision; whole ones are copied by autocast.
            if "weights" not in MACHINES[now.machine]:
                terms["copies"] = made.copies
        else:
            step = {**terms, "activations": 0, "copies": 0}
            terms |= {"gradients": made.gradients, "activations": made.activations, "copies": made.copies}
            if sum(step.values()) > sum(terms.values()):  # more than the backward pass, the optimizer's step holds
                terms = step
        return Moment("training, rows of max_length" if longest else "training, rows of mean length", terms)

    def _filling(self, now: _Setting) -> Moment | None:
        """The reference's pass over the rows, before there are gradients and an optimizer."""
        if not self._caches_reference():
            return None
        made = self.profiled(now.batch, False, False, training=False)
        divided = MACHINES[now.machine]
        terms = {"reference": 4 * self.total, "activations": made.activations, "copies": made.copies}
        if "weights" in divided:
            terms |= {"reference": 4 * self.total // now.processes, "gathered": self._gathered(), "copies": 0}
        if not divided:  # a sharding engine takes the policy only when training starts
            terms["weights"] = 4 * self.total
        return Moment("filling the reference cache", terms)

    def _disk(self) -> dict[str, int]:
        weights = 4 * self.total
        state = 0 if self.arg("save_only_model") else int(OPTIMIZERS[str(self.arg("optim"))] * self.trained)
        kept = self.recipe.args.get("save_total_limit", 2)
        checkpoint = weights + state
        most = (kept + 1) * checkpoint if checkpoint > weights else kept * checkpoint + weights
        return {"checkpoint": checkpoint, "final": weights, "most": most}

    def _moments(self, now: _Setting) -> list[Moment]:
        """Those that a run passes through for certain."""
        fill = self._filling(now)
        return [self._training(now), *([fill] if fill else [])]

    def _verdict(self, gpu: Gpu, now: _Setting, moments: list[Moment], longest: list[Moment], flops: float) -> Verdict:
        room = gpu.memory_bytes - RESERVE
        fits = all(moment.total <= room for moment in moments)
        peak = gpu.float32_flops if self.precision == "float32" else gpu.half_flops
        hours = flops / (peak * self.mfu) / 3600
        return Verdict(
            gpu=gpu.name,
            gpu_hours=hours,
            wall_hours=hours / now.processes,
            fits=fits,
            fits_longest=fits and all(moment.total <= room for moment in longest),
            advice={} if fits else self._advice(now, room),
        )

    def _advice(self, now: _Setting, room: int) -> dict[str, Any] | None:
        for setting in _candidates(now):
            # A rehearsal takes seconds: none for what does not fit without activations.
            if sum(self._static(setting).values()) > room:
                continue
            if all(moment.total <= room for moment in self._moments(setting)):
                changes = now.changes(setting)
                if self.recipe.global_batch is None and setting.accumulation != now.accumulation:
                    changes["args.gradient_accumulation_steps"] = setting.accumulation
                return changes
        return None


def _extended(few: StepProfile, more: StepProfile, steps: float) -> StepProfile:
    """What lies on the line through two rehearsals, so many of their distance behind the first."""

    def at(a: int, b: int) -> int:
        return round(a + (b - a) * steps)

    held = {
        name: at(getattr(few, name), getattr(more, name))
        for name in ("activations", "copies", "gradients", "activations_alone")
    }
    flops = {part: {k: at(v, more.flops[part][k]) for k, v in phases.items()} for part, phases in few.flops.items()}
    return StepProfile(flops, **held)


def _candidates(now: _Setting) -> Iterator[_Setting]:
    """Settings in the order in which they are tried: the cheapest change first, the step's rows unchanged."""
    for grown in (1, 2, 4, 8, 16):
        processes = now.processes * grown
        spread = ["zero2", "fsdp2"] if processes > 1 else []
        own = [now.machine] if now.machine != "single" or processes == 1 else ["ddp"]
        for optim in dict.fromkeys((now.optim, "adamw_bnb_8bit")):
            for machine in dict.fromkeys((*own, *spread)):
                batch = now.batch
                while batch >= 1:
                    if now.rows_per_step % (batch * processes) == 0:
                        yield _Setting(machine, processes, batch, True, optim, now.rows_per_step)
                    batch //= 2


def _parameters(modules: list[nn.Module]) -> list[nn.Parameter]:
    """Each parameter once, however many modules share it."""
    return list({id(p): p for module in modules for p in module.parameters()}.values())


def _sizes(model: LlavaForConditionalGeneration) -> tuple[int, int]:
    """Parameters of the largest block, and of all that lies in no block."""
    network = cast(nn.Module, model)
    blocks = [block for m in network.modules() if isinstance(m, nn.ModuleList) for block in m]
    counts = [sum(p.numel() for p in block.parameters()) for block in blocks]
    return max(counts), sum(p.numel() for p in network.parameters()) - sum(counts)
