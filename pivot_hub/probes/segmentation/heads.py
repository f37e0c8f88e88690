"""Heads on frozen patch tokens, fitted at pixels while the tokens stream from disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pivot_hub.errors import ProbeError

KINDS = ("linear", "mlp")
RATES = (3e-4, 3e-3, 3e-2)
DECAYS = (1e-2, 1.0)
BATCH = 16  # images of a step
MIN_STEPS, EPOCHS = 1000, 10  # whichever is more
LABEL_STRIDE = 4  # pixels of the encoder's image for one label that is fitted
CLASS_BLOCK = 16  # classes whose logits are upsampled at once
BLOCK = 16  # images whose tokens are in memory at once


class Rows(Protocol):
    """An array on disk or in memory whose first axis is images, as np.memmap."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Setting:
    """How a head is fitted.

    Args:
        kind: linear, or mlp, the 2-layer head.
        rate: AdamW's peak learning rate.
        decay: its weight decay.
    """

    kind: str
    rate: float
    decay: float


@dataclass(frozen=True)
class Scale:
    """Mean and spread (D,) of each channel over the tokens of the train part."""

    mean: np.ndarray
    spread: np.ndarray


class Head(nn.Module):
    """Logits of each patch: a linear map of its token, or two with a GELU between them, as wide as the token.

    The 2-layer head is that of the MLLM's projector. DINOv2's heads begin with batch norm; tokens here are scaled by
    the train part's statistics instead, which gives the same to every batch, in any order.
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
        """(B, H*W, D) to (B, classes, H, W), of the classes that were fitted."""
        side = math.isqrt(tokens.shape[1])
        logits: torch.Tensor = self.layers((tokens - self.mean) / self.spread)
        return logits.transpose(1, 2).unflatten(2, (side, side))

    @torch.no_grad()
    def predict(self, tokens: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Class ids (B, *size) of images by their tokens (B, H*W, D), logits upsampled bilinearly."""
        grid = self(torch.from_numpy(tokens).to(self.mean.device))
        best, pick = grid.new_full((len(grid), *size), -torch.inf), torch.zeros(len(grid), *size, dtype=torch.long)
        pick = pick.to(grid.device)
        # Some classes at a time: all logits of a large photograph would take gigabytes.
        for start in range(0, grid.shape[1], CLASS_BLOCK):
            some = functional.interpolate(grid[:, start : start + CLASS_BLOCK], size=size, mode="bilinear")
            top, where = some.max(1)
            pick = torch.where(top > best, where + start, pick)
            best = torch.maximum(top, best)
        predicted: np.ndarray = self.ids[pick].cpu().numpy()
        return predicted


def scale_of(tokens: Rows, rows: Sequence[int]) -> Scale:
    """Mean and spread of channels over images, a block of them in memory at a time."""
    shift = _flat(tokens, rows[:1]).mean(0)  # near the mean, so that the difference of squares keeps its digits
    count, total, squares = 0, np.zeros_like(shift), np.zeros_like(shift)
    for start in range(0, len(rows), BLOCK):
        off = _flat(tokens, rows[start : start + BLOCK]) - shift
        count += len(off)
        total += off.sum(0)
        squares += (off**2).sum(0)
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
    """Fit a head for each setting, all on the same batches, so that tokens are read once for all of them.

    Cross-entropy between bilinearly upsampled logits and labels, pixels of label -1 left out; AdamW, warm-up of a
    tenth, then a cosine to zero.

    Args:
        settings: of the heads.
        tokens: (N, H*W, D) float32.
        labels: (N, side, side) class ids, -1 where ignored.
        rows: images that are fitted on.
        scale: of the tokens.
        seed: of the 2-layer head's start and of the order of images.
        device: to fit on; deterministic on a CPU.
        steps: of BATCH images; by default MIN_STEPS, or EPOCHS passes where that is more.
        say: told how far it is, every ten seconds.

    Raises:
        ProbeError: the labels are all of one class, or none counts.
    """
    ids = _seen(labels, rows)
    if len(ids) < 2:
        found = f"only class {ids[0]}" if len(ids) else "no class"
        raise ProbeError(f"the masks that are fitted hold {found}; a probe needs at least two that are not ignored.")
    index = np.full(int(ids.max()) + 1, -1)
    index[ids] = np.arange(len(ids))
    heads = [Head(s.kind, scale, ids, seed).to(device) for s in settings]
    groups = [
        {"params": list(head.parameters()), "lr": s.rate, "weight_decay": s.decay}
        for head, s in zip(heads, settings, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups)
    steps = steps or max(MIN_STEPS, EPOCHS * math.ceil(len(rows) / BATCH))
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: (t + 1) / warm if t < warm else (1 + math.cos(math.pi * (t - warm) / max(1, steps - warm))) / 2,
    )
    rng, queue = np.random.default_rng(seed), np.zeros(0, np.int64)
    began = said = time.monotonic()
    for step in range(1, steps + 1):
        while len(queue) < min(BATCH, len(rows)):
            queue = np.concatenate([queue, rng.permutation(np.asarray(rows))])
        batch, queue = np.sort(queue[:BATCH]), queue[BATCH:]  # a disk reads in order
        shown = torch.from_numpy(np.ascontiguousarray(tokens[batch])).to(device)
        known = np.asarray(labels[batch])
        truth = torch.from_numpy(np.where(known < 0, -1, index[known])).to(device)
        counted = (truth >= 0).sum().clamp(min=1)
        optimizer.zero_grad()
        for head in heads:
            logits = functional.interpolate(head(shown), size=truth.shape[1:], mode="bilinear")
            (functional.cross_entropy(logits, truth, ignore_index=-1, reduction="sum") / counted).backward()
        optimizer.step()
        schedule.step()
        if time.monotonic() - said > 10:
            said = time.monotonic()
            rate = step / (said - began)
            log(f"heads: step {step}/{steps}, {rate:.1f} steps/s, {(steps - step) / rate:.0f} s left")
    return [head.eval() for head in heads]


def tally(predicted: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Pixels hit, predicted and true of each id in one image: (3, classes); pixels whose truth is -1 count nowhere."""
    counted = truth >= 0
    said, true = predicted[counted], truth[counted]
    return np.stack([np.bincount(ids, minlength=classes) for ids in (true[said == true], said, true)])


def label_tallies(head: Head, tokens: Rows, labels: Rows, rows: Sequence[int], classes: int) -> np.ndarray:
    """Tallies (n, 3, classes) on labels as they are fitted: what a setting is chosen by."""
    made = []
    for start in range(0, len(rows), BLOCK):
        some = np.asarray(rows[start : start + BLOCK])
        truth = np.asarray(labels[some])
        predicted = head.predict(np.ascontiguousarray(tokens[some]), (truth.shape[1], truth.shape[2]))
        made += [tally(p, t, classes) for p, t in zip(predicted, truth, strict=True)]
    return np.stack(made)


def _flat(tokens: Rows, rows: Sequence[int]) -> np.ndarray:
    """Tokens of images, one after the other: (n*H*W, D) float64."""
    some = tokens[np.asarray(rows)].astype(np.float64)
    return some.reshape(-1, some.shape[-1])


def _seen(labels: Rows, rows: Sequence[int]) -> np.ndarray:
    """Ids that occur: a class without a label cannot be learnt, and has no output."""
    found: set[int] = set()
    for start in range(0, len(rows), BLOCK):
        found |= set(np.unique(labels[np.asarray(rows[start : start + BLOCK])]).tolist())
    return np.array(sorted(found - {-1}), np.int64)
