"""GPUs and what the planner assumes about them: memory, peak FLOPs, utilisation."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
# Assumed hardware FLOPs utilisation (HFU): the share of the GPU's peak at which all FLOPs run, recomputed ones too.
# Model FLOPs utilisation (MFU) leaves recomputed FLOPs out, and is lower where activations are recomputed. These are
# the definitions of the planner, its plans and all benchmarks.
HFU = 0.35
RESERVE = 3 * GIB  # CUDA context, NCCL, fragmentation of the allocator


@dataclass(frozen=True)
class Gpu:
    """A GPU's memory as CUDA reports it, and its peaks as the vendor gives them, without sparsity.

    Args:
        name: Name with the size of its memory.
        memory_bytes: Memory in bytes.
        half_flops: Peak FLOPs per second in half precision.
        float32_flops: Peak FLOPs per second in float32.
        bandwidth: Bytes of its memory that it reads per second.
    """

    name: str
    memory_bytes: int
    half_flops: float
    float32_flops: float
    bandwidth: float

    @property
    def model(self) -> str:
        """Name without the size of the memory, as in `H100`."""
        return self.name.split()[0]


GPUS = (
    Gpu("A100 80GB", int(79.2 * GIB), 312e12, 19.5e12, 2.039e12),
    Gpu("H100 80GB", int(79.1 * GIB), 989.5e12, 67e12, 3.35e12),
    Gpu("H200 141GB", int(139.7 * GIB), 989.5e12, 67e12, 4.8e12),
)


def peak_flops(device_name: str) -> float | None:
    """Return a GPU's peak FLOPs per second in half precision, or None for a GPU that is not in the table.

    Args:
        device_name: Name of the device as CUDA gives it, as in `NVIDIA H100 80GB HBM3`.
    """
    return next((gpu.half_flops for gpu in GPUS if gpu.model in device_name), None)
