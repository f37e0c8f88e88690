"""Run by `accelerate launch` from test_machines: the `pivot` command, FSDP2 on CPU processes included.

accelerate reads its FSDP settings where it finds accelerators only; torch shards over gloo as well. When accelerate
decides, it is told of GPUs. Everything after that is its own, the Trainer's and ours.
"""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from pivot_hub.cli import main

decide = AcceleratorState.__init__


def as_on_gpus(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
    if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    decide(self, *args, **kwargs)


if __name__ == "__main__":
    AcceleratorState.__init__ = as_on_gpus
    main()
