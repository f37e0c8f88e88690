"""Preemption: a cluster that takes a node back sends SIGTERM to its processes and waits a little."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Preemption(TrainerCallback):
    """Callback and context manager: inside its `with` block, SIGTERM ends training after the current step.

    That step is saved as a checkpoint. With several processes it is enough that one of them gets the signal: all of
    them stop after the same step.

    Attributes:
        requested: Whether a process of the run was asked to stop.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous_handler: Any = None

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():  # Python takes handlers nowhere else
            self._previous_handler = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if dist.is_available() and dist.is_initialized():
            any_requested = torch.tensor(int(self.requested), device=args.device)
            dist.all_reduce(any_requested, dist.ReduceOp.MAX)
            self.requested = bool(any_requested)
        if self.requested:
            control.should_save = control.should_training_stop = True
