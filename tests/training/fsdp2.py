"""Script for `torchrun` in test_tree_layout: loss and gradients of a batch under FSDP2 and in one process.

`fsdp2.py FOLDER` reads `mllm/` and `reference/` there. Both processes take the same batch, so that the mean of their
gradients is the batch's own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pivot_hub.mllm.load import load_mllm
from pivot_hub.training.stage import leave_processes
from tests.training.test_tree_layout import ROWS, step, trainer


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    policy, processor = load_mllm(folder / "mllm")
    models = (policy, load_mllm(folder / "reference")[0], processor)
    ours = trainer(models, folder / "ours", {}, use_cpu=True, ddp_backend="gloo")
    loss, _, gradients = step(ours, ROWS)
    mesh = init_device_mesh("cpu", (2,))
    model: Any = ours.model
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded_loss, _, sharded = step(ours, ROWS)
    difference = 0.0
    for name, gradient in gradients.items():
        whole: Any = sharded[name]
        scale = gradient.abs().max().clamp(min=1e-6)
        difference = max(difference, ((whole.full_tensor() - gradient).abs().max() / scale).item())
    if dist.get_rank() == 0:
        result = {
            "loss": loss,
            "sharded_loss": sharded_loss,
            "gradient_difference": difference,
            "parameter_types": sorted({type(p).__name__ for p in model.parameters()}),
        }
        (folder / "fsdp2.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
    leave_processes()
