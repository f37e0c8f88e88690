"""Script for `torchrun` in test_tree_layout: a few steps of TRL's trainer and of ours, each in two processes.

`two_processes.py FOLDER` reads `mllm/` and `reference/` there. The first process writes the final weights of both
trainers; each process writes the number of rows whose reference values it computed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pivot_hub.mllm.load import load_mllm
from pivot_hub.training.dpo import PivotDPOTrainer
from pivot_hub.training.reference_cache import ReferenceCache
from pivot_hub.training.stage import leave_processes
from tests.training.test_tree_layout import ROWS, trainer


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    policy, processor = load_mllm(folder / "mllm")
    models = (policy, load_mllm(folder / "reference")[0], processor)
    row_counts: list[int] = []
    compute = PivotDPOTrainer._compute_rows

    def count(self: Any, cache: ReferenceCache, rows: dict[str, Any]) -> None:
        row_counts.append(len(rows))
        compute(self, cache, rows)

    PivotDPOTrainer._compute_rows = count  # type: ignore[method-assign]
    args = {"use_cpu": True, "ddp_backend": "gloo", "num_train_epochs": 3, "learning_rate": 1e-3}
    rows = [*ROWS, *ROWS[:3]]
    settings: list[tuple[str, dict[str, bool] | None]] = [("trl", None), ("ours", {})]
    for name, enabled in settings:
        one = trainer(models, folder / name, enabled, rows, per_device_train_batch_size=2, **args)
        one.train()
        assert one.accelerator.num_processes == 2
        rank = one.accelerator.process_index
        if rank == 0:
            weights = one.accelerator.unwrap_model(one.model).state_dict()
            save_file({k: v.clone().contiguous() for k, v in weights.items()}, folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps([h["loss"] for h in one.state.log_history if "loss" in h]))
    (folder / f"computed-{rank}.json").write_text(json.dumps(sum(row_counts)))


if __name__ == "__main__":
    main()
    leave_processes()
