"""Preemption: a cluster that takes its machine back sends SIGTERM and waits a little."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Preemption(TrainerCallback):
    """Within its `with` block, SIGTERM ends training after the running step, with a checkpoint.

    With several processes it is enough that one of them is told: all stop after the same step.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no signal handlers
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if dist.is_available() and dist.is_initialized():
            told = torch.tensor(int(self.asked), device=args.device)
            dist.all_reduce(told, dist.ReduceOp.MAX)
            self.asked = bool(told)
        if self.asked:
            control.should_save = control.should_training_stop = True
