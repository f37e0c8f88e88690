"""The order of an epoch: seeded, resumable at any row, with rows that are near on disk also near in time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import cycle

import numpy as np
from torch.utils.data import Sampler

WINDOW = 2048  # rows among which rows are mixed: eight steps of the paper's batch


class BlockSampler(Sampler[int]):
    """Shuffle blocks, join consecutive blocks to windows, and shuffle the rows of each window.

    A block is read as a whole (a Parquet row group), so each is read once a window. The order is a function of seed and
    epoch alone: a resumed run skips to its row without reading the rows before it.

    Batches go to the processes in turn, and in each process to its loader workers in turn. With a stream of windows for
    each worker, of which each yields a batch in turn, a worker reads the blocks of its own windows only, and not every
    block for its few rows of each.

    Args:
        blocks: Number of each row's block: (rows,) int.
        seed: Seed of the order.
        window: Smallest number of rows in the windows of all streams together; a window ends with a whole block.
        streams: Number of loader workers of all processes together.
        batch: Number of rows in a batch of one process.
    """

    def __init__(self, blocks: np.ndarray, seed: int, window: int = WINDOW, streams: int = 1, batch: int = 1) -> None:
        self.by_block = np.argsort(blocks, kind="stable")
        _, self.starts, self.sizes = np.unique(blocks[self.by_block], return_index=True, return_counts=True)
        self.seed, self.window, self.epoch = seed, window, 0
        self.streams, self.batch = streams, batch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.by_block)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        blocks = iter(rng.permutation(len(self.starts)))
        streams: list[deque[int]] = [deque() for _ in range(self.streams)]  # the rows left of each stream's window
        rest: list[int] = []  # rows that do not fill a batch, which would shift the turns after it
        for turn in cycle(range(self.streams)):
            stream = streams[turn]
            while len(stream) < self.batch and (window := self._window(blocks, rng)):
                stream.extend(window)
            if len(stream) < self.batch:
                # No block is left: the worker whose turn it is helps the one with the most rows left.
                rest += [stream.popleft() for _ in range(len(stream))]
                stream = streams[turn] = max(streams, key=len)
            if len(stream) < self.batch:
                break
            for _ in range(self.batch):
                yield stream.popleft()
        yield from rest
        for stream in streams:
            while stream:
                yield stream.popleft()

    def _window(self, blocks: Iterator[int], rng: np.random.Generator) -> Sequence[int]:
        """Take the blocks of a stream's next window, and mix their rows."""
        window: list[np.ndarray] = []
        rows = 0
        while rows < self.window / self.streams and (block := next(blocks, None)) is not None:
            start = self.starts[block]
            window.append(self.by_block[start : start + self.sizes[block]])
            rows += len(window[-1])
        mixed: list[int] = rng.permutation(np.concatenate(window)).tolist() if window else []
        return mixed
