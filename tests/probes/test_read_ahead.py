"""Reading ahead: batches come in order, the next one is read meanwhile, and a failing read ends the loop."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from pivot_hub.probes.read_ahead import read_ahead

BATCHES = [np.array([2 * i, 2 * i + 1]) for i in range(4)]


def test_batches_come_in_order_and_the_next_one_is_read_meanwhile() -> None:
    begun = [threading.Event() for _ in BATCHES]
    threads = set()

    def read(rows: np.ndarray) -> tuple[Tensor, Tensor]:
        begun[rows[0] // 2].set()
        threads.add(threading.get_ident())
        return torch.from_numpy(rows), torch.from_numpy(-rows)

    for i, (rows, negative) in enumerate(read_ahead(BATCHES, read, "cpu")):
        assert rows.tolist() == BATCHES[i].tolist()
        assert negative.tolist() == (-BATCHES[i]).tolist()
        assert i + 1 == len(BATCHES) or begun[i + 1].wait(timeout=30)
    assert i == len(BATCHES) - 1
    assert threading.get_ident() not in threads


def test_no_batch_and_a_read_that_fails() -> None:
    def read(rows: np.ndarray) -> tuple[Tensor]:
        if rows[0] == 4:
            raise OSError("the disk is gone")
        return (torch.from_numpy(rows),)

    assert list(read_ahead([], read, "cpu")) == []
    seen: list[int] = []
    with pytest.raises(OSError, match="the disk is gone"):
        seen.extend(int(rows[0]) for (rows,) in read_ahead(BATCHES, read, "cpu"))
    assert seen == [0, 2]
