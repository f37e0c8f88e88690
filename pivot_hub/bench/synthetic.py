"""Whether drawing the synthetic Shapes dataset keeps up with the training that consumes it."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, cast

from trl import SFTConfig

from pivot_hub.config.recipe import load_recipe
from pivot_hub.data.report import RowReport
from pivot_hub.provenance import machine, versions
from pivot_hub.training import sft
from pivot_hub.training.stage import trainer_arguments


def bench_shapes(repeats: int = 5, batch: int = 64) -> dict[str, Any]:
    """Compare the time of drawing a batch of the synthetic Shapes dataset with that of a training step on it.

    Rendering, tokenising and the step of the align recipe's MLLM alternate, so that a slow period of the machine
    affects all of them.

    Args:
        repeats: Number of batches.
        batch: Rows of each batch.

    Returns:
        Median seconds a batch for `render`, `collate` and `step`, and the time of rendering over that of the step.
    """
    align = load_recipe("shapes/1-align", [f"data.0.rows={batch * repeats}"])
    with tempfile.TemporaryDirectory() as folder:
        args = trainer_arguments(align, Path(folder))
        trainer = sft.build_trainer(align, cast(SFTConfig, args), None, RowReport(), [])
        times: dict[str, list[float]] = {"render": [], "collate": [], "step": []}
        for start in range(0, batch * repeats, batch):
            began = time.perf_counter()
            rows = [trainer.train_dataset[i] for i in range(start, start + batch)]  # type: ignore[index]
            rendered = time.perf_counter()
            inputs = trainer.data_collator(rows)
            collated = time.perf_counter()
            trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs)).backward()
            finished = time.perf_counter()
            times["render"].append(rendered - began)
            times["collate"].append(collated - rendered)
            times["step"].append(finished - collated)
    medians = {name: round(statistics.median(seconds), 4) for name, seconds in times.items()}
    return {
        "benchmark": "shapes",
        "batch": batch,
        "seconds_per_batch": medians,
        "render_share_of_step": round(medians["render"] / medians["step"], 3),
        "machine": machine(),
        "versions": versions(),
    }
