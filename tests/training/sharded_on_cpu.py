"""Script for `accelerate launch` in test_processes: the `pivot` command, with FSDP2 on CPU processes.

accelerate reads its FSDP settings only where there are accelerators, although torch can shard over gloo too. This
script makes accelerate believe in GPUs when it chooses; everything after that is the code that users run.
"""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from pivot_hub.cli import main

initialise = AcceleratorState.__init__


def as_on_gpus(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
    if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    initialise(self, *args, **kwargs)


if __name__ == "__main__":
    AcceleratorState.__init__ = as_on_gpus
    main()
