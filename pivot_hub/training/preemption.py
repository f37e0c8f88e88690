"""Signals that end a run early: of a cluster that takes a node back, of a closed terminal, of a user's Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# SIGUSR1 is what SLURM's `--signal=USR1@90` sends; Windows has neither it nor SIGHUP.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
# A terminal sends Ctrl-C to the launcher and to its processes, and the launcher passes it on: that is one request.
ONE_REQUEST_S = 1.0


class Preemption(TrainerCallback):
    """Callback and context manager: inside its `with` block, one of SIGNALS ends training after the current step.

    That step is saved as a checkpoint. With several processes it is enough that one of them gets the signal: all of
    them stop after the same step. A second Ctrl-C raises KeyboardInterrupt at once. A signal that the process ignores,
    as SIGHUP under nohup, stays ignored.

    Attributes:
        requested: Number of the signal that asked a process of the run to stop, or 0.
    """

    def __init__(self) -> None:
        self.requested = 0
        self._requested_at = 0.0
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():  # Python takes handlers nowhere else
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous_handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    @property
    def name(self) -> str:
        """Name of the signal that asked to stop."""
        name = signal.Signals(self.requested).name
        return "SIGINT (Ctrl-C)" if name == "SIGINT" else name

    def _request(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._requested_at = number, now
            if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
                # print() may not be entered a second time from a signal's handler.
                os.write(2, b"pivot: stopping after this step, which will be saved; Ctrl-C again stops at once\n")
        elif number == signal.SIGINT and now - self._requested_at > ONE_REQUEST_S:
            raise KeyboardInterrupt

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if dist.is_available() and dist.is_initialized():
            any_requested = torch.tensor(int(self.requested), device=args.device)
            dist.all_reduce(any_requested, dist.ReduceOp.MAX)
            self.requested = int(any_requested)
        if self.requested:
            control.should_save = control.should_training_stop = True
