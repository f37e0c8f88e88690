"""Batches of features that are read from disk while a model trains on the batch before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor


def read_ahead(
    batches: Iterable[np.ndarray],
    read: Callable[[np.ndarray], tuple[Tensor, ...]],
    device: torch.device | str,
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors of each batch on a device, while a thread reads those of the next batch.

    For CUDA the thread puts them into pinned memory, from which they are copied beside the running kernels.

    Args:
        batches: Rows of each batch.
        read: Function that reads the tensors of a batch's rows into main memory; one call runs at a time.
        device: Device of the yielded tensors.
    """
    pinned = torch.device(device).type == "cuda" and torch.cuda.is_available()

    def load(rows: np.ndarray) -> tuple[Tensor, ...]:
        tensors = read(rows)
        return tuple(tensor.pin_memory() for tensor in tensors) if pinned else tensors

    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting: Future[tuple[Tensor, ...]] | None = None
        for rows in batches:
            following = thread.submit(load, rows)
            if waiting is not None:
                yield tuple(tensor.to(device, non_blocking=pinned) for tensor in waiting.result())
            waiting = following
        if waiting is not None:
            yield tuple(tensor.to(device, non_blocking=pinned) for tensor in waiting.result())
