"""Utilisation of a GPU: the share of its peak at which a benchmark computes."""

from __future__ import annotations

import torch

from pivot_hub.planner.gpus import peak_flops


def utilisation(flops: float, seconds: float) -> float | None:
    """Return FLOPs per second over the half-precision dense peak of this machine's GPU.

    With the FLOPs of a model's forward and backward passes this is MFU (model FLOPs utilisation). With those of
    recomputed activations added it is HFU (hardware FLOPs utilisation), as `planner.gpus.HFU`.

    Args:
        flops: Floating-point operations of the measured step.
        seconds: Duration of the step.

    Returns:
        The share, between 0 and 1; None without a GPU, or for a GPU whose peak is not known.
    """
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return None if peak is None else round(flops / seconds / peak, 4)
