"""The planner's result: a stage's cost as values and as one screen of text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from pivot_hub.planner.gpus import GIB

Device = Literal["cuda", "cpu"]
Precision = Literal["bf16", "fp16", "float32"]


@dataclass(frozen=True)
class Moment:
    """A GPU's memory when most of it is taken, in bytes by what takes it."""

    name: str
    terms: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.terms.values())


@dataclass(frozen=True)
class Verdict:
    """What a stage is on one kind of GPU.

    Args:
        fits: rows of mean length; fits_longest: a whole batch of rows of max_length too.
        advice: the first changes that were found to make it fit: overrides of the recipe, `machine`, `processes`.
            Empty where it fits, None where nothing that was tried did.
    """

    gpu: str
    gpu_hours: float
    wall_hours: float
    fits: bool
    fits_longest: bool
    advice: dict[str, Any] | None


@dataclass(frozen=True)
class Plan:
    """A stage's cost and what it was counted with.

    Args:
        parameters: of each part, trained and frozen.
        flops_per_step: of each part in each phase, over all processes; flops: of the whole run by phase, with the
            reference forward that fills the cache.
        memory: moments of one GPU.
        disk: bytes of a checkpoint, of the final one, and the most that lies there at a time.
        assumptions: what was not known and taken for granted, a sentence each.
    """

    recipe: str
    stage: str
    machine: str
    processes: int
    device: Device
    precision: Precision
    mfu: float
    gradient_checkpointing: bool
    optim: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    parameters: dict[str, dict[str, int]]
    image_tokens: int
    prompt_tokens: float
    answer_tokens: float
    rows: int
    rows_per_step: int
    steps: int
    epochs: float
    tokens_per_step: int
    tokens: int
    flops_per_step: dict[str, dict[str, float]]
    flops: dict[str, float]
    memory: tuple[Moment, ...]
    disk: dict[str, int]
    gpus: tuple[Verdict, ...]
    assumptions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        made = asdict(self)
        made["memory"] = [{**asdict(moment), "total": moment.total} for moment in self.memory]
        return made

    def table(self) -> str:
        """One screen of text."""
        lines = [
            f"{self.recipe}: {self.stage} on {self.processes} process(es), {self.machine}, {self.precision}, "
            f"gradient checkpointing {'on' if self.gradient_checkpointing else 'off'}, {self.optim}",
            "",
            f"  {'parameters':<16}{'trained':>14}{'frozen':>14}",
        ]
        for part, counts in self.parameters.items():
            lines.append(f"  {part:<16}{_count(counts['trained']):>14}{_count(counts['frozen']):>14}")
        lines += [
            "",
            f"  rows    {self.rows:,} x {self.epochs:g} epoch(s); {self.rows_per_step} a step = {self.processes} x "
            f"{self.per_device_train_batch_size} x {self.gradient_accumulation_steps}; {self.steps:,} steps",
            f"  tokens  {self.image_tokens} image + {self.prompt_tokens:g} prompt + {self.answer_tokens:g} answer a "
            f"row; {_count(self.tokens_per_step)} a step, {_count(self.tokens)} in all",
            "",
            "  TFLOPs a step   " + "".join(f"{phase:>12}" for phase in PHASES),
        ]
        for part, phases in self.flops_per_step.items():
            lines.append(f"  {part:<16}" + "".join(f"{phases[p] / 1e12:>12,.2f}" for p in PHASES))
        lines.append("  run, PFLOPs     " + "".join(f"{self.flops[p] / 1e15:>12,.2f}" for p in PHASES))
        names = [name for name in _TERMS if any(name in m.terms for m in self.memory)]
        lines += ["", f"  {'GiB a GPU':<30}" + "".join(f"{n:>12}" for n in names) + f"{'total':>8}"]
        for moment in self.memory:
            cells = "".join(f"{moment.terms.get(n, 0) / GIB:>12,.1f}" for n in names)
            lines.append(f"  {moment.name:<30}{cells}{moment.total / GIB:>8,.1f}")
        lines += ["", f"  {f'at {self.mfu:.0%} of peak':<16}{'GPU-hours':>12}{'wall hours':>12}  memory"]
        for gpu in self.gpus:
            lines.append(f"  {gpu.gpu:<16}{gpu.gpu_hours:>12,.1f}{gpu.wall_hours:>12,.1f}  {_said(gpu)}")
        disk = {k: f"{v / 1e9:,.1f} GB" for k, v in self.disk.items()}
        lines += ["", f"  disk    checkpoint {disk['checkpoint']}, final {disk['final']}, at most {disk['most']}"]
        return "\n".join([*lines, *(f"  assumed {each}" for each in self.assumptions)])


PHASES = ("forward", "backward", "recompute", "reference")
_TERMS = ("weights", "gradients", "optimizer", "activations", "copies", "buckets", "gathered", "reference")


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:g}"


def _said(verdict: Verdict) -> str:
    if verdict.fits_longest:
        return "fits"
    if verdict.fits:
        return "fits, but not a batch of rows of max_length"
    if not verdict.advice:
        return "does not fit, whatever was tried; take smaller parts"
    options = {"machine": "--machine ", "processes": "--processes "}
    return "does not fit; fits with " + " ".join(f"{options.get(k, f'{k}=')}{v}" for k, v in verdict.advice.items())
