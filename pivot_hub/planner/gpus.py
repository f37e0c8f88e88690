"""GPUs and what the planner takes for granted of them: memory, peak FLOPs, utilisation."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
MFU = 0.35  # of the peak, over all FLOPs, recomputed ones too; our assumption, to be replaced by a measured one
RESERVE = 3 * GIB  # CUDA context, NCCL, fragmentation of the allocator


@dataclass(frozen=True)
class Gpu:
    """A GPU's memory as CUDA reports it, and its dense peaks as the vendor gives them."""

    name: str
    memory_bytes: int
    half_flops: float
    float32_flops: float


GPUS = (
    Gpu("A100 80GB", int(79.2 * GIB), 312e12, 19.5e12),
    Gpu("H100 80GB", int(79.1 * GIB), 989.5e12, 67e12),
    Gpu("H200 141GB", int(139.7 * GIB), 989.5e12, 67e12),
)


def peak_flops(device_name: str) -> float | None:
    """Return the half-precision dense peak of a GPU in FLOPs per second.

    Args:
        device_name: Name of the device as CUDA reports it, such as "NVIDIA H100 80GB HBM3".

    Returns:
        The peak, or None for a GPU that is not in `GPUS`.
    """
    return next((gpu.half_flops for gpu in GPUS if gpu.name.split()[0] in device_name), None)
