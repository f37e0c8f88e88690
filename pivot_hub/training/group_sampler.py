"""The order of an epoch whose prompts are answered several times: whole groups, resumable at any row."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

from pivot_hub.data.sampler import BlockSampler
from pivot_hub.errors import DataError


class GroupSampler(Sampler[int]):
    """Repeat each row once for each of its answers, and each generation batch once for each time it is used.

    The order is that of TRL's RepeatSampler, but a function of seed and epoch alone: RepeatSampler draws each epoch's
    order from the state that the last one left, which a resumed run does not have. Rows that do not fill a generation
    batch are left out of the epoch.

    Args:
        order: Order of the rows.
        prompts: Number of different prompts in a generation batch of all processes.
        answers: Number of answers of each prompt.
        uses: Number of batches that are trained on for each generation batch, repeated iterations included.

    Raises:
        DataError: The rows do not fill one generation batch.
    """

    def __init__(self, order: BlockSampler, prompts: int, answers: int, uses: int) -> None:
        if len(order) < prompts:
            raise DataError(
                f"{len(order)} rows do not fill a generation batch of {prompts} prompts with {answers} answers each; "
                "give more rows, or lower `args.per_device_train_batch_size` or the gradient accumulation."
            )
        self.order, self.prompts, self.answers, self.uses = order, prompts, answers, uses

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.order) // self.prompts * self.prompts * self.answers * self.uses

    def __iter__(self) -> Iterator[int]:
        batch: list[int] = []
        for row in self.order:
            batch.append(row)
            if len(batch) == self.prompts:
                for _ in range(self.uses):
                    for each in batch:
                        yield from [each] * self.answers
                batch = []
