"""Attention-pool probe: a learnt query that looks at frozen patch tokens, and a linear head on what it gathers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

HEADS = 8
EPOCHS, BATCH = 20, 64
RATES = (3e-4, 1e-3, 3e-3, 1e-2)


class AttentionPool(nn.Module):
    """Cross-attention of one learnt query to patch tokens, then a linear head.

    As the attentive probes of AIM (El-Nouby et al., 2024) and V-JEPA, without their feed-forward block.

    Args:
        width: of a token.
        classes: of the head.
        mean: (D,) of the training tokens, and spread: their standard deviation; tokens are brought to 0 and 1.
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
    rate: float,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> AttentionPool:
    """Train on chosen rows by AdamW with a cosine schedule.

    Args:
        tokens: (N, H*W, D), in memory or mapped from disk.
        labels: (N,) class numbers.
        rows: to train on.
        classes: how many there are.
        rate: peak learning rate.
        seed: of start and order.
        device: that computes.
    """
    some = _batch(tokens, rows[:4096], "cpu").flatten(0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AttentionPool(tokens.shape[-1], classes, some.mean(0), some.std(0) + 1e-6).to(device)
    steps = EPOCHS * -(-len(rows) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng(seed)
    for _ in range(EPOCHS):
        order = rng.permutation(rows)
        for start in range(0, len(order), BATCH):
            chosen = np.sort(order[start : start + BATCH])
            target = torch.from_numpy(labels[chosen]).to(device)
            loss = nn.functional.cross_entropy(model(_batch(tokens, chosen, device)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def predict_attention(model: AttentionPool, tokens: np.ndarray, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """The likeliest class of each chosen row: (len(rows),)."""
    device = model.query.device
    parts = [np.asarray(rows[s : s + BATCH]) for s in range(0, len(rows), BATCH)]
    return torch.cat([model(_batch(tokens, part, device)).argmax(1).cpu() for part in parts]).numpy()


def _batch(tokens: np.ndarray, rows: np.ndarray, device: str | torch.device) -> Tensor:
    return torch.from_numpy(np.asarray(tokens[rows], np.float32)).to(device)
