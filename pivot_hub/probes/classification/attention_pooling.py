"""Attention-pooling probe: one learnt query attends to frozen patch tokens, followed by a linear head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pivot_hub.probes.read_ahead import read_ahead

HEADS = 8
EPOCHS, BATCH = 20, 64
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)


class AttentionPool(nn.Module):
    """Cross-attention of one learnt query to patch tokens, then a linear head.

    This is the attentive probe of AIM (El-Nouby et al., 2024) and V-JEPA, without its feed-forward block.

    Args:
        width: Width of a token.
        classes: Number of classes.
        mean: (D,) mean of the training tokens, which is subtracted from every token.
        spread: (D,) standard deviation of the training tokens, by which every token is divided.
    """

    def __init__(self, width: int, classes: int, mean: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.heads = next(h for h in range(min(HEADS, width), 0, -1) if width % h == 0)
        self.query = nn.Parameter(torch.randn(width) / width**0.5)
        self.key_value = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, classes)
        self.mean, self.spread = nn.Buffer(mean), nn.Buffer(spread)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, H*W, D) -> (B, classes)."""
        b, n, d = tokens.shape
        tokens = (tokens - self.mean) / self.spread
        key, value = self.key_value(tokens).view(b, n, 2, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        query = self.query.view(1, self.heads, 1, -1).expand(b, -1, -1, -1)
        gathered = nn.functional.scaled_dot_product_attention(query, key, value)  # (B, heads, 1, D / heads)
        return self.head(gathered.flatten(1))


def fit_attention(
    tokens: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
    classes: int,
    learning_rate: float,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> AttentionPool:
    """Train on selected rows by AdamW with a cosine schedule.

    Args:
        tokens: (N, H*W, D) patch tokens, in memory or memory-mapped from disk.
        labels: (N,) class numbers.
        rows: Rows to train on.
        classes: Number of classes.
        learning_rate: Peak learning rate.
        seed: Seed of the initial weights and of the order of rows.
        device: Device to train on.
    """
    sample = _batch(tokens, rows[:4096], "cpu").flatten(0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AttentionPool(tokens.shape[-1], classes, sample.mean(0), sample.std(0) + 1e-6).to(device)
    steps = EPOCHS * -(-len(rows) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng(seed)
    orders = (rng.permutation(rows) for _ in range(EPOCHS))
    batches = (np.sort(order[start : start + BATCH]) for order in orders for start in range(0, len(order), BATCH))

    def read(chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        return _batch(tokens, chosen, "cpu"), torch.from_numpy(labels[chosen])

    for inputs, target in read_ahead(batches, read, device):
        loss = nn.functional.cross_entropy(model(inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def predict_attention(model: AttentionPool, tokens: np.ndarray, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """Predict the most likely class of each selected row: (len(rows),)."""
    device = model.query.device
    parts = [np.asarray(rows[s : s + BATCH]) for s in range(0, len(rows), BATCH)]
    return torch.cat([model(_batch(tokens, part, device)).argmax(1).cpu() for part in parts]).numpy()


def _batch(tokens: np.ndarray, rows: np.ndarray, device: str | torch.device) -> Tensor:
    return torch.from_numpy(np.asarray(tokens[rows], np.float32)).to(device)
