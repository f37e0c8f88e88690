"""Checkpoints of a run: hashed as they are written, checked before one is resumed, with the totals of the run so far.

A checkpoint holds `checksums.json`, the hash of each of its files, and `totals.json`, which has what transformers and
TRL count from zero after a resume: the loss that was summed, the tokens that were seen and the metrics of the steps
since the last log.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pivot_hub.errors import CheckpointError
from pivot_hub.files import write_json
from pivot_hub.provenance import file_sha256
from pivot_hub.training.part_trainer import SHARDS

CHECKSUMS, TOTALS = "checksums.json", "totals.json"


class CheckpointFiles(TrainerCallback):
    """Completes each checkpoint with the totals of the run and the hash of every file.

    After a resume, it restores the totals, so that `num_tokens`, `train_loss` and the logs between two checkpoints are
    those of a run that was never stopped.

    Args:
        trainer: Trainer of the run.
        resumed: Checkpoint that the run resumes from.

    Attributes:
        train_loss: Mean loss of all steps, once training has ended.
    """

    def __init__(self, trainer: Trainer, resumed: Path | None = None) -> None:
        self.trainer: Any = trainer
        self.resumed = resumed
        self.train_loss: float | None = None
        self._earlier_loss = 0.0  # summed over the steps of earlier calls
        self._earlier_steps = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        file = None if self.resumed is None else self.resumed / TOTALS
        if file is None or not file.is_file():  # earlier versions wrote none
            self._earlier_steps = state.global_step
            return
        totals = json.loads(file.read_text())
        trainer = self.trainer
        self._earlier_loss = totals["loss_sum"]
        trainer._tr_loss = torch.tensor(totals["loss_since_log"], device=args.device)
        trainer._globalstep_last_logged = totals["last_logged_step"]
        if hasattr(trainer, "_total_train_tokens"):
            trainer._total_train_tokens = totals["num_tokens"]
            trainer._metrics["train"] = defaultdict(list, totals["metrics_since_log"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        pending = trainer._tr_loss.detach()
        if PartialState().num_processes > 1:
            pending = trainer.accelerator.gather(pending.reshape(1)).mean()  # every process writes its files first
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        totals: dict[str, Any] = {
            "loss_sum": self._earlier_loss + trainer._total_loss_scalar,
            "loss_since_log": float(pending),
            "last_logged_step": trainer._globalstep_last_logged,
        }
        if hasattr(trainer, "_total_train_tokens"):
            totals["num_tokens"] = trainer._total_train_tokens
            totals["metrics_since_log"] = {name: list(map(float, v)) for name, v in trainer._metrics["train"].items()}
        write_json(folder / TOTALS, totals)
        write_checksums(folder)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "train_loss" in logs:
            steps = state.global_step - self._earlier_steps
            self.train_loss = (self._earlier_loss + self.trainer._total_loss_scalar) / max(steps, 1)
            logs["train_loss"] = self.train_loss


def write_checksums(folder: Path) -> None:
    """Write the hash of each file of a checkpoint beside them."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    write_json(folder / CHECKSUMS, {"files": {str(p.relative_to(folder)): file_sha256(p) for p in files}})


def last_checkpoint(work: Path, log: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that is whole, after clearing those that were cut off while written.

    A checkpoint whose files differ from their hashes is renamed to `damaged-<step>`, and the one before it is taken.

    Args:
        work: Folder that the run works in.
        log: Function that takes messages.

    Raises:
        CheckpointError: Every checkpoint is damaged.
    """
    for folder in work.glob("checkpoint-*"):
        if not is_complete(folder):
            shutil.rmtree(folder)
    damaged = []
    for folder in sorted(work.glob("checkpoint-*"), key=step_of, reverse=True):
        if not (folder / CHECKSUMS).is_file():
            log(
                f"{folder} has no {CHECKSUMS}, as those of earlier versions: it is resumed without a check of its files"
            )
            return folder
        file = changed_file(folder)
        if file is None:
            return folder
        aside = folder.with_name(f"damaged-{step_of(folder)}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.replace(aside)
        damaged.append(f"{folder} is damaged: {file} is not as it was written")
        log(f"{damaged[-1]}; the checkpoint before it is resumed, and this one is kept as {aside.name}")
    if damaged:
        raise CheckpointError(
            f"{damaged[0]}, and there is no whole checkpoint before it; run the same command again to train from the "
            "start."
        )
    return None


def is_complete(folder: Path) -> bool:
    """Return whether a checkpoint was written to its end.

    trainer_state.json is the last file of a checkpoint that a trainer writes, and .metadata the last file of a folder
    of shards.
    """
    try:
        json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    shard_folders = [folder / name for name in SHARDS if (folder / name).is_dir()]
    return all((shards / ".metadata").is_file() for shards in shard_folders)


def changed_file(folder: Path) -> str | None:
    """Return the first file of a checkpoint that differs from its hash or is missing, or None if all are whole."""
    try:
        checksums: dict[str, str] = json.loads((folder / CHECKSUMS).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return CHECKSUMS
    for name, checksum in checksums.items():
        if not (folder / name).is_file() or file_sha256(folder / name) != checksum:
            return name
    return None


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(checkpoint.name.rsplit("-", 1)[1])
