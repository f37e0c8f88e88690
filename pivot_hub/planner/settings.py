"""Settings that decide whether a stage fits on a GPU, and which of them the planner tries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pivot_hub.config.accelerate import AccelerateConfig, accelerate_config

SHARDED_CONFIGS = ("zero2", "fsdp2")  # Accelerate configs that are tried, the one that communicates less first
SMALL_OPTIMIZER = "adamw_bnb_8bit"


@dataclass(frozen=True)
class RunSettings:
    """The settings that may be changed to make a stage fit.

    Args:
        accelerate_config: Accelerate config of the run.
        processes: Number of processes, one per GPU.
        batch: Rows that a process runs at a time.
        checkpointing: Whether activations are recomputed in the backward pass.
        optim: Name of the optimizer, as in `args.optim`.
        rows_per_step: Rows of an optimizer step over all processes.
    """

    accelerate_config: AccelerateConfig
    processes: int
    batch: int
    checkpointing: bool
    optim: str
    rows_per_step: int

    @property
    def accumulation(self) -> int:
        """Batches of a process in an optimizer step."""
        return self.rows_per_step // self.at_once

    @property
    def at_once(self) -> int:
        """Rows that all processes run at a time."""
        return self.batch * self.processes

    def changes(self, to: RunSettings) -> dict[str, Any]:
        """Return the overrides, and the arguments of `plan_stage`, that turn these settings into others."""
        changes: dict[str, Any] = {}
        if to.checkpointing != self.checkpointing:
            changes["args.gradient_checkpointing"] = to.checkpointing
        if to.batch != self.batch:
            changes["args.per_device_train_batch_size"] = to.batch
        if to.accelerate_config != self.accelerate_config:
            changes["machine"] = to.accelerate_config.name
        if to.optim != self.optim:
            changes["args.optim"] = to.optim
        if to.processes != self.processes:
            changes["processes"] = to.processes
        return changes


def candidates(current: RunSettings) -> Iterator[RunSettings]:
    """Yield settings in the order in which to try them: the cheapest change first, with the same rows per step."""
    own_config = current.accelerate_config
    for factor in (1, 2, 4, 8, 16):
        processes = current.processes * factor
        if own_config.one_process and processes > 1:
            own_config = accelerate_config("ddp")
        sharded = [accelerate_config(name) for name in SHARDED_CONFIGS] if processes > 1 else []
        for optim in dict.fromkeys((current.optim, SMALL_OPTIMIZER)):
            for config in dict.fromkeys((own_config, *sharded)):
                batch = current.batch
                while batch >= 1:
                    if current.rows_per_step % (batch * processes) == 0:
                        yield RunSettings(config, processes, batch, True, optim, current.rows_per_step)
                    batch //= 2
