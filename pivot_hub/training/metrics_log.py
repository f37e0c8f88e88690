"""Logs of a training run: metrics as JSON lines, and plain progress lines where there is no terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pivot_hub.files import write_whole


def cut_records(path: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Keep some lines of a JSONL file, and return their records. A last line that was cut off is dropped.

    Args:
        path: The file; nothing is done where there is none.
        keep: Function that returns whether a record is kept.
    """
    if not path.is_file():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = [(line, record) for line in lines if keep(record := json.loads(line))]
    write_whole(path, "".join(line for line, _ in kept))
    return [record for _, record in kept]


class MetricsLog(TrainerCallback):
    """Appends each log of the trainer to a JSONL file, each line with its step.

    Args:
        path: The JSONL file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut_to(self, step: int) -> None:
        """Drop the lines after a step, and the summary of a stopped run: a resumed run logs them again."""
        cut_records(self.path, lambda record: record["step"] <= step and "train_runtime" not in record)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class PlainProgress(TrainerCallback):
    """Logs step, loss, steps per second and the remaining time, at most every few seconds.

    Args:
        name: Name of the run, with which each line begins.
        log: Function that takes each line.
        every_s: Shortest time between two lines, in seconds.
    """

    def __init__(self, name: str, log: Callable[[str], None], every_s: float = 10.0) -> None:
        self.name, self.log, self.every_s = name, log, every_s
        self.started = self.last = 0.0
        self.first_step = 0
        self.loss: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = self.last = time.monotonic()
        self.first_step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.loss = (logs or {}).get("loss", self.loss)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.monotonic()
        if now - self.last < self.every_s and state.global_step < state.max_steps:
            return
        self.last = now
        steps_per_s = (state.global_step - self.first_step) / max(now - self.started, 1e-9)
        left_s = (state.max_steps - state.global_step) / steps_per_s
        loss = "" if self.loss is None else f", loss {float(self.loss):.3f}"
        self.log(
            f"{self.name}: step {state.global_step}/{state.max_steps}{loss}, {steps_per_s:.2f} steps/s, "
            f"{left_s:.0f} s left"
        )
