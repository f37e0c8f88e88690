"""Segmentation heads on frozen patch tokens, fitted on pixel labels while the tokens stream from disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pivot_hub.errors import ProbeError
from pivot_hub.probes.read_ahead import read_ahead

KINDS = ("linear", "mlp")
LEARNING_RATES = (3e-4, 3e-3, 3e-2)
DECAYS = (1e-2, 1.0)
BATCH = 16  # images per step
MIN_STEPS, EPOCHS = 1000, 10  # whichever gives more steps
LABEL_STRIDE = 4  # pixels of the encoder's image per fitted label
CLASS_BLOCK = 16  # classes whose logits are upsampled together
BLOCK = 16  # images whose tokens are in memory together


class Rows(Protocol):
    """An array on disk or in memory whose first axis is images, such as np.memmap."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Setting:
    """Settings of one head.

    Args:
        kind: `linear`, or `mlp` for the 2-layer head.
        learning_rate: Peak learning rate of AdamW.
        decay: Weight decay of AdamW.
    """

    kind: str
    learning_rate: float
    decay: float


@dataclass(frozen=True)
class Scale:
    """Mean (D,) and standard deviation (D,) of each channel over the tokens of the train part."""

    mean: np.ndarray
    spread: np.ndarray


class Head(nn.Module):
    """Segmentation head: one linear layer on each patch token, or two of the token's width with a GELU between them.

    The 2-layer head has the shape of the MLLM's projector. DINOv2's heads begin with batch norm. Here tokens are scaled
    by the statistics of the train part instead, which do not depend on the batch.
    """

    mean: torch.Tensor
    spread: torch.Tensor
    ids: torch.Tensor

    def __init__(self, kind: str, scale: Scale, ids: np.ndarray, seed: int) -> None:
        super().__init__()
        width, out = len(scale.mean), len(ids)
        self.register_buffer("mean", torch.from_numpy(scale.mean).float())
        self.register_buffer("spread", torch.from_numpy(scale.spread).float())
        self.register_buffer("ids", torch.from_numpy(ids).long())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            last = nn.Linear(width, out)
            self.layers = last if kind == "linear" else nn.Sequential(nn.Linear(width, width), nn.GELU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute the logits of the fitted classes: (B, H*W, D) -> (B, classes, H, W)."""
        side = math.isqrt(tokens.shape[1])
        logits: torch.Tensor = self.layers((tokens - self.mean) / self.spread)
        return logits.transpose(1, 2).unflatten(2, (side, side))

    @torch.no_grad()
    def predict(self, tokens: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Predict class ids (B, *size) from tokens (B, H*W, D), with logits upsampled bilinearly."""
        grid = self(torch.from_numpy(tokens).to(self.mean.device))
        best = grid.new_full((len(grid), *size), -torch.inf)
        best_class = torch.zeros(len(grid), *size, dtype=torch.long, device=grid.device)
        # A few classes at a time, because all logits of a large image would take gigabytes.
        for start in range(0, grid.shape[1], CLASS_BLOCK):
            logits = functional.interpolate(grid[:, start : start + CLASS_BLOCK], size=size, mode="bilinear")
            top, where = logits.max(1)
            best_class = torch.where(top > best, where + start, best_class)
            best = torch.maximum(top, best)
        predicted: np.ndarray = self.ids[best_class].cpu().numpy()
        return predicted


def scale_of(tokens: Rows, rows: Sequence[int]) -> Scale:
    """Compute the mean and standard deviation of channels over images, with one block of them in memory at a time."""
    shift = _flat(tokens, rows[:1]).mean(0)  # near the mean, so that the difference of squares keeps its precision
    count, total, squares = 0, np.zeros_like(shift), np.zeros_like(shift)
    for start in range(0, len(rows), BLOCK):
        shifted = _flat(tokens, rows[start : start + BLOCK]) - shift
        count += len(shifted)
        total += shifted.sum(0)
        squares += (shifted**2).sum(0)
    mean = total / count
    return Scale(shift + mean, np.sqrt(np.maximum(squares / count - mean**2, 0)) + 1e-8)


def fit_heads(
    settings: Sequence[Setting],
    tokens: Rows,
    labels: Rows,
    rows: Sequence[int],
    scale: Scale,
    seed: int = 0,
    device: torch.device | str = "cpu",
    steps: int | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> list[Head]:
    """Fit one head for each setting, all on the same batches, so that tokens are read once for all heads.

    The loss is the cross-entropy between bilinearly upsampled logits and labels, without pixels labelled -1. The
    optimiser is AdamW, with a warm-up over a tenth of the steps and a cosine decay to zero.

    Args:
        settings: Settings of the heads.
        tokens: (N, H*W, D) float32 patch tokens.
        labels: (N, side, side) class ids, -1 where ignored.
        rows: Images to fit on.
        scale: Mean and standard deviation of the tokens.
        seed: Seed of the 2-layer head's initial weights and of the order of images.
        device: Device to fit on; fits are deterministic on a CPU.
        steps: Number of steps of BATCH images; by default MIN_STEPS or EPOCHS passes, whichever is more.
        log: Function that receives a progress message every ten seconds.

    Raises:
        ProbeError: All labels belong to one class, or all are ignored.
    """
    ids = _present_ids(labels, rows)
    if len(ids) < 2:
        content = f"only class {ids[0]}" if len(ids) else "no class"
        raise ProbeError(f"the masks that are fitted hold {content}; a probe needs at least two that are not ignored.")
    index = np.full(int(ids.max()) + 1, -1)
    index[ids] = np.arange(len(ids))
    heads = [Head(s.kind, scale, ids, seed).to(device) for s in settings]
    steps = steps or max(MIN_STEPS, EPOCHS * math.ceil(len(rows) / BATCH))
    optimizer, schedule = _optimizer(heads, settings, steps)

    def read(batch: np.ndarray) -> tuple[Tensor, Tensor]:
        batch_labels = np.asarray(labels[batch])
        truth = torch.from_numpy(np.where(batch_labels < 0, -1, index[batch_labels]))
        return torch.from_numpy(np.ascontiguousarray(tokens[batch])), truth

    started = logged = time.monotonic()
    for step, (inputs, truth) in enumerate(read_ahead(_draw_batches(rows, steps, seed), read, device), start=1):
        counted = (truth >= 0).sum().clamp(min=1)
        optimizer.zero_grad()
        for head in heads:
            logits = functional.interpolate(head(inputs), size=truth.shape[1:], mode="bilinear")
            (functional.cross_entropy(logits, truth, ignore_index=-1, reduction="sum") / counted).backward()
        optimizer.step()
        schedule.step()
        if time.monotonic() - logged > 10:
            logged = time.monotonic()
            steps_per_s = step / (logged - started)
            log(f"heads: step {step}/{steps}, {steps_per_s:.1f} steps/s, {(steps - step) / steps_per_s:.0f} s left")
    return [head.eval() for head in heads]


def _draw_batches(rows: Sequence[int], steps: int, seed: int) -> Iterator[np.ndarray]:
    """Draw the images of each step: all of them in one random order after another."""
    rng, queue = np.random.default_rng(seed), np.zeros(0, np.int64)
    for _ in range(steps):
        while len(queue) < min(BATCH, len(rows)):
            queue = np.concatenate([queue, rng.permutation(np.asarray(rows))])
        yield np.sort(queue[:BATCH])  # sorted, because disks read in order
        queue = queue[BATCH:]


def _optimizer(
    heads: Sequence[Head], settings: Sequence[Setting], steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Build AdamW with one parameter group for each head, and its warm-up and cosine schedule."""
    optimizer = torch.optim.AdamW(
        [
            {"params": list(head.parameters()), "lr": s.learning_rate, "weight_decay": s.decay}
            for head, s in zip(heads, settings, strict=True)
        ]
    )
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: (
            (t + 1) / warmup if t < warmup else (1 + math.cos(math.pi * (t - warmup) / max(1, steps - warmup))) / 2
        ),
    )
    return optimizer, schedule


def count_pixels(predicted: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Count correct, predicted and true pixels of each class in one image, without pixels labelled -1: (3, classes)."""
    counted = truth >= 0
    kept, true = predicted[counted], truth[counted]
    return np.stack([np.bincount(ids, minlength=classes) for ids in (true[kept == true], kept, true)])


def label_scores(head: Head, tokens: Rows, labels: Rows, rows: Sequence[int], classes: int) -> np.ndarray:
    """Compute per-example scores (n, 3, classes) on the labels that heads are fitted on, to choose settings by."""
    scores = []
    for start in range(0, len(rows), BLOCK):
        block = np.asarray(rows[start : start + BLOCK])
        truth = np.asarray(labels[block])
        predicted = head.predict(np.ascontiguousarray(tokens[block]), (truth.shape[1], truth.shape[2]))
        scores += [count_pixels(p, t, classes) for p, t in zip(predicted, truth, strict=True)]
    return np.stack(scores)


def _flat(tokens: Rows, rows: Sequence[int]) -> np.ndarray:
    """Concatenate the tokens of images: (n*H*W, D) float64."""
    values = tokens[np.asarray(rows)].astype(np.float64)
    return values.reshape(-1, values.shape[-1])


def _present_ids(labels: Rows, rows: Sequence[int]) -> np.ndarray:
    """Return the ids that occur in labels; a class without a label cannot be learnt and has no output."""
    ids: set[int] = set()
    for start in range(0, len(rows), BLOCK):
        ids |= set(np.unique(labels[np.asarray(rows[start : start + BLOCK])]).tolist())
    return np.array(sorted(ids - {-1}), np.int64)
