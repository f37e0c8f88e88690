"""The planner's result: the cost of a stage, as values and as one screen of text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from pivot_hub.planner.gpus import GIB

MACHINE = 8  # most GPUs of one machine, for what its processes share
Device = Literal["cuda", "cpu"]
Precision = Literal["bf16", "fp16", "float32"]


@dataclass(frozen=True)
class MemoryPeak:
    """A moment at which a run holds much of a GPU's memory.

    Args:
        name: What the run is doing.
        terms: Bytes, by what takes them.
    """

    name: str
    terms: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.terms.values())


@dataclass(frozen=True)
class GpuEstimate:
    """A stage's hours and memory on one kind of GPU.

    Args:
        gpu: Name of the GPU.
        gpu_hours: Hours of all GPUs together.
        wall_hours: Hours from start to end.
        fits: Whether rows of mean length fit into its memory.
        fits_longest: Whether a whole batch of rows of max_length fits too, or of answers of max_completion_length.
        advice: The first changes that make the stage fit: overrides of the recipe, `machine` (the Accelerate config)
            and `processes`. Empty if the stage fits, None if nothing that was tried makes it fit.
    """

    gpu: str
    gpu_hours: float
    wall_hours: float
    fits: bool
    fits_longest: bool
    advice: dict[str, Any] | None


@dataclass(frozen=True)
class Plan:
    """The cost of a stage, and the settings that it was computed for.

    Args:
        recipe: Name of the recipe.
        stage: Name of the stage.
        machine: Name of the Accelerate config.
        processes: Number of processes, one per GPU.
        device: Device that the trainer runs on.
        precision: Data type of the forward pass.
        hfu: Share of the GPU's peak at which all FLOPs are assumed to run, recomputed ones included.
        mfu: The same without recomputed FLOPs.
        gradient_checkpointing: Whether activations are recomputed in the backward pass.
        optim: Name of the optimizer.
        per_device_train_batch_size: Rows that a process runs at a time.
        gradient_accumulation_steps: Batches of a process in an optimizer step.
        parameters: Trained and frozen parameters of each part.
        image_tokens: Tokens of an image.
        prompt_tokens: Mean tokens of a row's prompts.
        answer_tokens: Mean tokens of a row's answers; for a preference pair, of one answer.
        answers: Answers that are generated to each row and trained on; 1 where none are generated.
        rows: Rows of an epoch.
        rows_per_step: Rows of an optimizer step over all processes, or answers where they are generated.
        steps: Optimizer steps of the run.
        epochs: Epochs of the run.
        tokens_per_step: Tokens of an optimizer step over all processes.
        tokens: Tokens of the run.
        flops_per_step: FLOPs of an optimizer step over all processes, by part and phase.
        flops: FLOPs of the run by phase, including the reference's forward pass that fills the cache, and those of
            generated answers.
        memory: Memory peaks of one GPU.
        disk: Bytes on disk of a checkpoint, of the final model, and of everything at its largest.
        loading_bytes: CPU memory of one machine with up to eight of the processes while they load the models.
        gpus: Hours and memory on each kind of GPU.
        assumptions: Assumptions about what the recipe does not say, one phrase each.
        warnings: Effects of the settings that the numbers do not show, one sentence each.
    """

    recipe: str
    stage: str
    machine: str
    processes: int
    device: Device
    precision: Precision
    hfu: float
    mfu: float
    gradient_checkpointing: bool
    optim: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    parameters: dict[str, dict[str, int]]
    image_tokens: int
    prompt_tokens: float
    answer_tokens: float
    answers: int
    rows: int
    rows_per_step: int
    steps: int
    epochs: float
    tokens_per_step: int
    tokens: int
    flops_per_step: dict[str, dict[str, float]]
    flops: dict[str, float]
    memory: tuple[MemoryPeak, ...]
    disk: dict[str, int]
    loading_bytes: int
    gpus: tuple[GpuEstimate, ...]
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        values = asdict(self)
        values["memory"] = [{**asdict(peak), "total": peak.total} for peak in self.memory]
        return values

    def table(self) -> str:
        """Return the plan as one screen of text."""
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
            f"  rows    {self.rows:,} x {self.epochs:g} epoch(s){self._answers_text()}; {self.rows_per_step} a step = "
            f"{self.processes} x {self.per_device_train_batch_size} x {self.gradient_accumulation_steps}; "
            f"{self.steps:,} steps",
            f"  tokens  {self.image_tokens} image + {self.prompt_tokens:g} prompt + {self.answer_tokens:g} answer a "
            f"row; {_count(self.tokens_per_step)} a step, {_count(self.tokens)} in all",
            "",
            "  TFLOPs a step   " + "".join(f"{phase:>12}" for phase in self.flops),
        ]
        for part, phases in self.flops_per_step.items():
            lines.append(f"  {part:<16}" + "".join(f"{phases.get(p, 0) / 1e12:>12,.2f}" for p in self.flops))
        lines.append("  run, PFLOPs     " + "".join(f"{count / 1e15:>12,.2f}" for count in self.flops.values()))
        names = [name for name in _TERMS if any(peak.terms.get(name) for peak in self.memory)]
        lines += ["", f"  {'GiB a GPU':<30}" + "".join(f"{n:>12}" for n in names) + f"{'total':>8}"]
        for peak in self.memory:
            cells = "".join(f"{peak.terms.get(n, 0) / GIB:>12,.1f}" for n in names)
            lines.append(f"  {peak.name:<30}{cells}{peak.total / GIB:>8,.1f}")
        assumed = f"at {self.hfu:.0%} HFU, {self.mfu:.0%} MFU"
        lines += ["", f"  {assumed:<20}{'GPU-hours':>12}{'wall hours':>12}  memory"]
        for gpu in self.gpus:
            lines.append(f"  {gpu.gpu:<20}{gpu.gpu_hours:>12,.1f}{gpu.wall_hours:>12,.1f}  {_memory_text(gpu)}")
        disk = {k: f"{v / 1e9:,.1f} GB" for k, v in self.disk.items()}
        lines += [
            "",
            f"  disk    checkpoint {disk['checkpoint']}, final {disk['final']}, at most {disk['most']}",
            f"  CPU     {self.loading_bytes / 1e9:,.1f} GB of memory a machine, while {min(self.processes, MACHINE)} "
            "process(es) load",
        ]
        lines += [f"  assumed {assumption}" for assumption in self.assumptions]
        return "\n".join([*lines, *(f"  warning {warning}" for warning in self.warnings)])

    def _answers_text(self) -> str:
        return f" x {self.answers} answers" if self.answers > 1 else ""


PHASES = ("forward", "backward", "recompute", "reference")
# Further phases where answers are generated: decoding comes behind the prefill, which gives the first token.
GENERATING = ("old policy", "prefill", "decoding")
_TERMS = (
    "weights",
    "masters",
    "gradients",
    "optimizer",
    "activations",
    "copies",
    "buckets",
    "gathered",
    "reference",
    "cache",
)


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:g}"


def _memory_text(estimate: GpuEstimate) -> str:
    if estimate.fits_longest:
        return "fits"
    if estimate.fits:
        return "fits, but not a batch of the longest rows"
    if not estimate.advice:
        return "does not fit, and no change that was tried helps; choose smaller parts"
    options = {"machine": "--machine ", "processes": "--processes "}
    changes = [f"{options.get(name, f'{name}=')}{value}" for name, value in estimate.advice.items()]
    return "does not fit; fits with " + " ".join(changes)
