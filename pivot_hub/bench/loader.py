"""Whether reading rows keeps up with the GPU that trains on them."""

from __future__ import annotations

import io
import json
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader
from transformers import LlavaProcessor

from pivot_hub.bench.models import text_processor
from pivot_hub.config.recipe import load_recipe
from pivot_hub.data.index import index_rows
from pivot_hub.data.sampler import BlockSampler
from pivot_hub.encoder.configuration_pivot import backbone_of
from pivot_hub.mllm.published_configs import part_config
from pivot_hub.planner.estimate import plan_stage
from pivot_hub.planner.report import Plan
from pivot_hub.provenance import machine, versions
from pivot_hub.training.conversation import ConversationCollator
from pivot_hub.training.row_check import RowCheck

SOURCE_PX = (640, 480)  # size of the JPEG files, as COCO's
JPEG_QUALITY = 90
WORDS = ("the", "a", "red", "small", "dog", "stands", "left", "of", "two", "trees", "while", "people", "walk", "along")
# Packings of the rows, and how the data section of a recipe names them.
PACKINGS = {"zip": "rows.json, images: images.zip", "parquet": "rows.parquet"}


def bench_loader(
    recipe: str = "siglip2-so400m/2-instruct",
    rows: int = 512,
    batch: int = 8,
    rounds: int = 5,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Compare the rows per second that one core prepares with the rows per second that a GPU trains on.

    Preparing is reading, decoding and tokenising. Rows are conversations of 90 and 130 words about generated images,
    which have the size, detail and JPEG quality of photographs, in a zip archive and inside Parquet. They are prepared
    at the recipe's image size. The rows that a GPU needs follow from the planner, at its assumed share of the peak.

    Args:
        recipe: Recipe that gives the image size and the time of a step.
        rows: Rows of the data set.
        batch: Rows of a collated batch.
        rounds: Passes over the data set, in which the two packings take turns.
        log: Callback that receives one line for each packing and each GPU.

    Returns:
        rows_per_s_per_core for each packing (median over rounds); source_image_kb (mean size of a file); for each GPU
        the rows_per_s that it takes, and the cores that keep it busy with the slower packing.
    """
    loaded = load_recipe(recipe)
    spec = loaded.parts("the benchmark")
    plan = plan_stage(loaded)
    vision = part_config(loaded.locate(spec.vision), spec.vision_revision)
    image_px = backbone_of(vision).image_px(vision)
    processor = text_processor(image_px, cast(Any, vision).patch_size)
    images = [noise_jpeg(seed) for seed in range(rows)]
    with tempfile.TemporaryDirectory() as folder:
        _write_rows(Path(folder), images)
        loaders = {packing: _open_rows(Path(folder), packing, rows, batch, processor) for packing in PACKINGS}
        rows_per_s = _time_loaders(loaders, rounds)
    for packing, speed in rows_per_s.items():
        log(f"{packing:8} {speed:8.1f} rows/s on one core")
    return {
        "benchmark": "loader",
        "recipe": recipe,
        "image_px": image_px,
        "source_image_px": SOURCE_PX,
        "source_image_kb": round(statistics.mean(map(len, images)) / 1000, 1),
        "rows_per_s_per_core": rows_per_s,
        "rounds": rounds,
        "hfu": plan.hfu,
        "gpus": _cores_per_gpu(plan, min(rows_per_s.values()), log),
        "machine": machine(),
        "versions": versions(),
    }


def _open_rows(folder: Path, packing: str, rows: int, batch: int, processor: LlavaProcessor) -> DataLoader[Any]:
    """A loader of one packing as the stages build it, on the main process."""
    recipe = folder / f"{packing}.yaml"
    recipe.write_text(
        "stage: align\nmodel: {vision: v, language: l}\nlearning_rate: {projector: 1.0e-3}\n"
        f"data: [{{format: llava, path: {PACKINGS[packing]}}}]\n"
    )
    check = RowCheck(processor, None, "conversation", pairs=False)
    index = index_rows(load_recipe(recipe), check, folder / "index", workers=1)
    blocks = index.blocks()
    sampler = BlockSampler(np.arange(rows) if blocks is None else blocks, seed=0)
    dataset: Any = index.as_dataset("conversation", processor.image_token)
    return DataLoader(dataset, batch, sampler=sampler, collate_fn=ConversationCollator(processor))


def _time_loaders(loaders: dict[str, DataLoader[Any]], rounds: int) -> dict[str, float]:
    """Median rows per second of each loader."""
    speeds: dict[str, list[float]] = {packing: [] for packing in loaders}
    for turn in range(rounds):
        # The order alternates, so that a drift of the machine's speed favours no packing.
        for packing in list(loaders)[:: 1 if turn % 2 == 0 else -1]:
            began = time.perf_counter()
            count = sum(len(batch["input_ids"]) for batch in loaders[packing])
            speeds[packing].append(count / (time.perf_counter() - began))
    return {packing: round(statistics.median(measured), 1) for packing, measured in speeds.items()}


def _cores_per_gpu(plan: Plan, rows_per_s: float, log: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """For each GPU, the rows per second that it trains on, and the cores that prepare them at `rows_per_s` each."""
    gpus = {}
    for verdict in plan.gpus:
        needed = plan.rows * plan.epochs / (verdict.gpu_hours * 3600)
        gpus[verdict.gpu] = {"rows_per_s": round(needed, 1), "cores": round(needed / rows_per_s, 2)}
        log(f"{verdict.gpu:12} trains on {needed:6.1f} rows/s: {needed / rows_per_s:.2f} cores keep it busy")
    return gpus


def noise_jpeg(seed: int) -> bytes:
    """A JPEG file with a photograph's detail: noise at several scales."""
    rng = np.random.default_rng(seed)
    width, height = SOURCE_PX
    layers = []
    for scale in (4, 16, 64):
        small = rng.integers(0, 256, (height // scale + 1, width // scale + 1, 3), np.uint8)
        layers.append(np.asarray(Image.fromarray(small).resize(SOURCE_PX, Image.Resampling.BICUBIC), np.float32))
    image = Image.fromarray(np.mean(layers, axis=0).astype(np.uint8)).filter(ImageFilter.SHARPEN)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _write_rows(folder: Path, images: list[bytes]) -> None:
    """Write the same rows in both packings."""
    rng = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=count))

    conversations = [
        [{"from": "human", "value": f"<image>\n{words(90)}"}, {"from": "gpt", "value": words(130)}] for _ in images
    ]
    names = [f"{i:05d}.jpg" for i in range(len(images))]
    rows = [
        {"image": name, "conversations": conversation} for name, conversation in zip(names, conversations, strict=True)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for name, image in zip(names, images, strict=True):
            archive.writestr(name, image)
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": i, "path": n} for n, i in zip(names, images, strict=True)], image_type)
    table = pa.table({"image": column, "conversations": conversations})
    pq.write_table(table, folder / "rows.parquet", row_group_size=100)
