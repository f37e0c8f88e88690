"""Checkpoints by time: when a node fails, a long run loses minutes, however long a quarter of it takes."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

EVERY_S = 20 * 60  # writing and hashing the 24 GB of a 2B model's checkpoint takes about 3% of this


class TimedCheckpoints(TrainerCallback):
    """Saves a checkpoint after a step that ends more than a time after the last checkpoint.

    With several processes it is enough that the clock of one of them says so: all of them save after the same step.

    Args:
        every_s: Longest time between two checkpoints, in seconds.
    """

    def __init__(self, every_s: float = EVERY_S) -> None:
        self.every_s = every_s
        self.saved_at = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.saved_at = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saved_at = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        due = time.monotonic() - self.saved_at > self.every_s
        if dist.is_available() and dist.is_initialized():
            due_anywhere = torch.tensor(int(due), device=args.device)
            dist.all_reduce(due_anywhere, dist.ReduceOp.MAX)
            due = bool(due_anywhere)
        if due:
            control.should_save = True
