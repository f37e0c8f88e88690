"""The share of the blocks that one of several processes encodes."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from pivot_hub.errors import DataError


@dataclass(frozen=True)
class Share:
    """One of several processes. It takes every `count`-th block, so that the blocks of all processes are the source's.

    Args:
        number: Number of the process, counted from 1.
        count: Number of processes.
        helps: Whether the process then takes blocks of the others that none of them is working on. All processes
            write to one folder then.
    """

    number: int = 1
    count: int = 1
    helps: bool = False

    def owns(self, index: int) -> bool:
        """Return whether a block is this process's own, by its number in the source."""
        return index % self.count == self.number - 1


def find_share(text: str | None) -> Share:
    """Return the share that an option names as `i/n`, or the one that a launcher such as torchrun gave this process.

    Raises:
        DataError: The option is not a share, or a launcher divides the blocks already.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if text is None:
        if processes == 1:
            return Share()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        return Share(int(os.environ.get("RANK", "0")) + 1, processes, helps=True)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise DataError(f"--shard {text!r} is not a share; give i/n with i from 1 to n, as in 1/8.")
    if processes > 1:
        raise DataError("--shard cannot be used under a launcher, which divides the images already; leave it out.")
    return Share(int(match[1]), int(match[2]))


def wait_for_all() -> None:
    """Wait until all processes of the launcher are here."""
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.1)  # gloo's threads need the interpreter's lock to end, see training.stage.leave_processes
