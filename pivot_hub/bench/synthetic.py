"""Does drawing the built-in world keep up with the training that consumes it?"""

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
    """Time drawing a batch of the built-in world against the training step that consumes it.

    Rendering, tokenising and the step of the instruct recipe's MLLM alternate, so that a slow spell hits all.

    Args:
        repeats: batches.
        batch: rows of each.

    Returns:
        Median seconds a batch for `render`, `collate` and `step`, and the share of the step that drawing takes.
    """
    align = load_recipe("shapes/1-align", [f"data.0.rows={batch * repeats}"])
    with tempfile.TemporaryDirectory() as folder:
        args = trainer_arguments(align, Path(folder))
        trainer = sft.build_trainer(align, cast(SFTConfig, args), None, RowReport(), [])
        times: dict[str, list[float]] = {"render": [], "collate": [], "step": []}
        for start in range(0, batch * repeats, batch):
            began = time.perf_counter()
            rows = [trainer.train_dataset[i] for i in range(start, start + batch)]  # type: ignore[index]
            drawn = time.perf_counter()
            inputs = trainer.data_collator(rows)
            collated = time.perf_counter()
            trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs)).backward()
            done = time.perf_counter()
            for name, seconds in zip(times, (drawn - began, collated - drawn, done - collated), strict=True):
                times[name].append(seconds)
    medians = {name: round(statistics.median(some), 4) for name, some in times.items()}
    return {
        "benchmark": "shapes",
        "batch": batch,
        "seconds_per_batch": medians,
        "render_share_of_step": round(medians["render"] / medians["step"], 3),
        "machine": machine(),
        "versions": versions(),
    }
