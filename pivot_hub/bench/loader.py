"""Does reading rows keep up with the GPU that trains on them?"""

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

from pivot_hub.config.recipe import RECIPES, load_recipe
from pivot_hub.data.index import index_rows
from pivot_hub.data.sampler import BlockSampler
from pivot_hub.encoder.configuration_pivot import backbone_of
from pivot_hub.mllm.build import read_processor
from pivot_hub.mllm.published_configs import part_config
from pivot_hub.planner.estimate import plan_stage
from pivot_hub.provenance import machine, versions
from pivot_hub.training.conversation import ConversationCollator
from pivot_hub.training.row_check import RowCheck

PX = (640, 480)  # of a picture, as COCO's
QUALITY = 90
WORDS = ("the", "a", "red", "small", "dog", "stands", "left", "of", "two", "trees", "while", "people", "walk", "along")


def bench_loader(
    recipe: str = "siglip2-so400m/2-instruct",
    rows: int = 512,
    batch: int = 8,
    rounds: int = 5,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Rows a second that one core reads, decodes and tokenises, against the rows a second that a GPU trains on.

    Rows are conversations of 90 and 130 words on pictures of photographs' size, detail and JPEG quality, made here, in
    a zip archive and inside Parquet; they are prepared for the recipe's image size. The GPU's need is the planner's, at
    its stated share of the peak.

    Args:
        recipe: whose image size and step time are taken.
        rows: of the data set.
        batch: of a collated batch.
        rounds: passes over it, in turns of the two packings.
        say: called with a line a packing.

    Returns:
        For each packing rows_per_s of one core (median over rounds), kilobytes of a picture; of each GPU rows_per_s
        that it takes and the cores that feed it, by the slower packing.
    """
    loaded = load_recipe(recipe)
    assert loaded.recipe.model is not None
    plan = plan_stage(loaded)
    vision = part_config(loaded.locate(loaded.recipe.model.vision), loaded.recipe.model.vision_revision)
    side = backbone_of(vision).image_px(vision)
    processor = read_processor(str(RECIPES / "shapes/base/vision"), str(RECIPES / "shapes/base/language"))
    processor.image_processor.size = {"height": side, "width": side}
    processor.patch_size = cast(Any, vision).patch_size
    collate = ConversationCollator(processor)
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pictures = [_picture(i) for i in range(rows)]
        _write(folder, pictures)
        loaders = {}
        for packing, where in (("zip", "rows.json, images: images.zip"), ("parquet", "rows.parquet")):
            (folder / f"{packing}.yaml").write_text(
                "stage: align\nmodel: {vision: v, language: l}\nlearning_rate: {projector: 1.0e-3}\n"
                f"data: [{{format: llava, path: {where}}}]\n"
            )
            check = RowCheck(processor, None, "conversation", pairs=False)
            index = index_rows(load_recipe(folder / f"{packing}.yaml"), check, folder / "index", workers=1)
            blocks = index.blocks()
            sampler = BlockSampler(np.arange(rows) if blocks is None else blocks, seed=0)
            dataset: Any = index.as_dataset("conversation", processor.image_token)
            loaders[packing] = DataLoader(dataset, batch, sampler=sampler, collate_fn=collate)
        for turn in range(rounds):
            for packing in list(loaders)[:: 1 if turn % 2 == 0 else -1]:
                began = time.perf_counter()
                read = sum(len(made["input_ids"]) for made in loaders[packing])
                rates.setdefault(packing, []).append(read / (time.perf_counter() - began))
    measured = {packing: round(statistics.median(some), 1) for packing, some in rates.items()}
    for packing, rate in measured.items():
        log(f"{packing:8} {rate:8.1f} rows/s on one core")
    slowest = min(measured.values())
    gpus = {}
    for verdict in plan.gpus:
        needed = plan.rows * plan.epochs / (verdict.gpu_hours * 3600)
        gpus[verdict.gpu] = {"rows_per_s": round(needed, 1), "cores": round(needed / slowest, 2)}
        log(f"{verdict.gpu:12} trains on {needed:6.1f} rows/s: {needed / slowest:.2f} cores feed it")
    return {
        "benchmark": "loader",
        "recipe": recipe,
        "image_px": side,
        "picture_px": PX,
        "picture_kb": round(statistics.mean(map(len, pictures)) / 1000, 1),
        "rows_per_s_per_core": measured,
        "rounds": rounds,
        "mfu": plan.mfu,
        "gpus": gpus,
        "machine": machine(),
        "versions": versions(),
    }


def _picture(seed: int) -> bytes:
    """A JPEG with a photograph's detail: noise at several scales."""
    rng = np.random.default_rng(seed)
    layers = []
    for scale in (4, 16, 64):
        small = rng.integers(0, 256, (PX[1] // scale + 1, PX[0] // scale + 1, 3), np.uint8)
        layers.append(np.asarray(Image.fromarray(small).resize(PX, Image.Resampling.BICUBIC), np.float32))
    image = Image.fromarray(np.mean(layers, axis=0).astype(np.uint8)).filter(ImageFilter.SHARPEN)
    made = io.BytesIO()
    image.save(made, "JPEG", quality=QUALITY)
    return made.getvalue()


def _write(folder: Path, pictures: list[bytes]) -> None:
    rng = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=count))

    talks = [
        [{"from": "human", "value": f"<image>\n{words(90)}"}, {"from": "gpt", "value": words(130)}] for _ in pictures
    ]
    names = [f"{i:05d}.jpg" for i in range(len(pictures))]
    rows = [{"image": n, "conversations": talk} for n, talk in zip(names, talks, strict=True)]
    (folder / "rows.json").write_text(json.dumps(rows))
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for name, picture in zip(names, pictures, strict=True):
            archive.writestr(name, picture)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": p, "path": n} for n, p in zip(names, pictures, strict=True)], kind)
    pq.write_table(pa.table({"image": images, "conversations": talks}), folder / "rows.parquet", row_group_size=100)
