"""The order of an epoch: seeded, resumable at any row, with rows that are near on disk also near in time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

WINDOW = 2048  # rows among which rows are mixed: eight steps of the paper's batch


class BlockSampler(Sampler[int]):
    """Shuffle blocks, join consecutive blocks to windows, and shuffle the rows of each window.

    A block is read as a whole (a Parquet row group), so each is read once a window. The order is a function of seed and
    epoch alone: a resumed run skips to its row without reading the rows before it.

    Args:
        blocks: Number of each row's block: (rows,) int.
        seed: Seed of the order.
        window: Smallest number of rows in a window; a window ends with a whole block.
    """

    def __init__(self, blocks: np.ndarray, seed: int, window: int = WINDOW) -> None:
        self.by_block = np.argsort(blocks, kind="stable")
        _, self.starts, self.sizes = np.unique(blocks[self.by_block], return_index=True, return_counts=True)
        self.seed, self.window, self.epoch = seed, window, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.by_block)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        waiting: list[np.ndarray] = []
        held = 0
        for block in rng.permutation(len(self.starts)):
            start = self.starts[block]
            waiting.append(self.by_block[start : start + self.sizes[block]])
            held += len(waiting[-1])
            if held >= self.window:
                yield from rng.permutation(np.concatenate(waiting)).tolist()
                waiting, held = [], 0
        if waiting:
            yield from rng.permutation(np.concatenate(waiting)).tolist()
