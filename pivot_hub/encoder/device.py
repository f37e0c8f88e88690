"""The device that encoders, MLLMs and probes compute on."""

from __future__ import annotations

import torch


def compute_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
