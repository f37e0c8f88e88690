"""Run by `torchrun` from test_pairs: a few steps of TRL's trainer and of ours, each in two processes.

`two_processes.py FOLDER` reads `mllm/` and `reference/` there and writes, from the first process, both ends' weights;
each process writes how many rows it computed reference values of.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pivot_hub.errors import TrainingError
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
    seen: list[int] = []
    compute = PivotDPOTrainer._compute_rows

    def count(self: Any, cache: ReferenceCache, rows: dict[str, Any]) -> None:
        seen.append(len(rows))
        compute(self, cache, rows)

    PivotDPOTrainer._compute_rows = count  # type: ignore[method-assign]
    args = {"use_cpu": True, "ddp_backend": "gloo", "num_train_epochs": 3, "learning_rate": 1e-3}
    rows = [*ROWS, *ROWS[:3]]
    settings: list[tuple[str, dict[str, bool] | None]] = [("stock", None), ("ours", {})]
    for name, switches in settings:
        made = trainer(models, folder / name, switches, rows, per_device_train_batch_size=2, **args)
        made.train()
        assert made.accelerator.num_processes == 2
        rank = made.accelerator.process_index
        if rank == 0:
            weights = made.accelerator.unwrap_model(made.model).state_dict()
            save_file({k: v.clone().contiguous() for k, v in weights.items()}, folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps([h["loss"] for h in made.state.log_history if "loss" in h]))
    with pytest.raises(TrainingError, match="pack_tokens is for one process"):
        trainer(models, folder / "chunks", {}, rows, pack_tokens=99, **args)
    (folder / f"computed-{rank}.json").write_text(json.dumps(sum(seen)))


if __name__ == "__main__":
    main()
    leave_processes()
