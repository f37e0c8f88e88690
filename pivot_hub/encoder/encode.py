"""Features of many images, written to one file; what an encoder's user does first."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pivot_hub.data.image import DECODING, list_folder, open_image
from pivot_hub.encoder.repository import encoder_metadata, read_encoder
from pivot_hub.errors import DataError
from pivot_hub.files import write_json
from pivot_hub.provenance import machine, versions

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Between two points that a stopped run can go on from: at most so many batches, and so many bytes of features.
SHARD_BATCHES, SHARD_BYTES = 32, 64_000_000
Progress = Callable[[int, int, float], None]  # images done, images in all, images per second


def encode_folder(
    encoder: str | Path,
    folder: str | Path,
    output: str | Path,
    tokens: bool = False,
    batch: int = 32,
    dtype: str = "float32",
    workers: int | None = None,
    progress: Progress = lambda done, total, rate: None,
) -> dict[str, Any]:
    """Encode every image of a folder; a stopped run goes on where it was.

    Args:
        encoder: folder or Hub name.
        folder: images in it and below it.
        output: `.parquet`, with columns `file` and `features`, or `.npy`, whose rows' files are in the report.
        tokens: all patch tokens (H*W, D) of an image instead of their mean (D).
        batch: images of one forward pass.
        dtype: the encoder computes in: float32, float16 (stored as it is) or bfloat16 (stored as float32).
        workers: processes that decode; one a core by default, 0 for none.
        progress: called after every batch.

    Returns:
        The report, which also lies beside the output as `<output>.json`: encoder, shape of an image's features, files
        in order, corrupt images with their reason, files and linked folders that were not read, rate.

    Raises:
        CheckpointError: there is no such encoder.
        DataError: there is no image, the output's kind is unknown, or another run's parts lie there.
    """
    source, target = Path(folder), Path(output)
    if target.suffix not in (".parquet", ".npy"):
        raise DataError(f"{target}: features are written as .parquet or .npy; give --out such a name.")
    if dtype not in DTYPES:
        raise DataError(f"dtype {dtype!r} is not known; give one of {', '.join(DTYPES)}.")
    if not source.is_dir():
        raise DataError(f"{source} is no folder; give the folder that holds the images.")
    listing = list_folder(source)
    files = listing.images
    if not files:
        raise DataError(f"{source} holds no image file; give the folder that holds the images.")
    model, processor = read_encoder(encoder, dtype=DTYPES[dtype])
    cast(nn.Module, model).to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    names = [str(f.relative_to(source)) for f in files]
    images = FolderImages(source, names)
    metadata = {**encoder_metadata(encoder), "files_sha256": _listing_sha256(names, files)}
    report = encode_images(model, processor, images, target, metadata, tokens, batch, dtype, workers, progress)
    report |= {"not_read": listing.not_read()}
    write_json(target.with_name(f"{target.name}.json"), report)
    return report


class Images(Protocol):
    """Named images; worker processes get a copy."""

    @property
    def names(self) -> Sequence[str]: ...

    def open(self, index: int) -> Image.Image:
        """An RGB image; DataError naming it where it cannot be decoded."""


@dataclass(frozen=True)
class FolderImages:
    """Image files by their names from a folder."""

    folder: Path
    names: Sequence[str]

    def open(self, index: int) -> Image.Image:
        return open_image(self.folder / self.names[index], self.names[index])


def encode_images(
    model: Any,
    processor: Any,
    images: Images,
    target: Path,
    metadata: dict[str, Any],
    tokens: bool = False,
    batch: int = 32,
    dtype: str = "float32",
    workers: int | None = None,
    progress: Progress = lambda done, total, rate: None,
) -> dict[str, Any]:
    """Encode named images into one file; a stopped run with the same facts goes on where it was.

    Args:
        model: the encoder, on its device in `dtype`.
        processor: its image processor.
        images: to encode, in order.
        target: `.parquet` or `.npy`, see `encode_folder`.
        facts: of the encoder and the images: a run with others does not go on from this one's parts.
        tokens, batch, dtype, workers, progress: see `encode_folder`.

    Returns:
        The report, see `encode_folder`.

    Raises:
        DataError: another run's parts lie there.
    """
    started = time.monotonic()
    names = images.names
    grid = (model.config.image_size // model.config.patch_size) ** 2
    shape = [grid, model.config.hidden_size] if tokens else [model.config.hidden_size]
    stored = np.dtype("float16" if dtype == "float16" else "float32")
    fitting = SHARD_BYTES // (int(np.prod(shape)) * stored.itemsize * batch)
    per_shard = batch * max(1, min(SHARD_BATCHES, fitting))
    job = {
        **metadata,
        "feature_layer": model.config.pivot["feature_layer"],
        "shape": shape,
        "dtype": dtype,
        "per_shard": per_shard,
    }
    parts = target.with_name(f"{target.name}.partial")
    _open_job(parts, job)
    starts = range(0, len(names), per_shard)
    resumed = sum(len(names[s : s + per_shard]) for s in starts if (parts / f"{s}.json").is_file())
    done = resumed
    for start in starts:
        some = range(start, min(start + per_shard, len(names)))
        if (parts / f"{start}.json").is_file():
            continue
        kept: list[str] = []
        made: list[np.ndarray] = []
        corrupt: list[dict[str, str]] = []
        for batch_names, pixels, bad in _batches(processor, images, some, batch, workers):
            corrupt += bad
            if batch_names:
                made.append(_features(model, pixels, tokens).astype(stored))
                kept += batch_names
            done += len(batch_names) + len(bad)
            progress(done, len(names), (done - resumed) / (time.monotonic() - started))
        np.save(parts / f"{start}.npy", np.concatenate(made) if made else np.empty((0, *shape), stored))
        write_json(parts / f"{start}.json", {"files": kept, "corrupt": corrupt})  # last: it says the shard is whole
    wholes = [json.loads((parts / f"{s}.json").read_text()) for s in starts]
    kept = [name for whole in wholes for name in whole["files"]]
    corrupt = [bad for whole in wholes for bad in whole["corrupt"]]
    shards = (parts / f"{s}.npy" for s in starts)
    _merge(target, shards, wholes, len(kept), shape, stored)
    duration = time.monotonic() - started
    report = {
        **{k: v for k, v in job.items() if k not in ("per_shard", "files_sha256")},
        "images": len(kept),
        "corrupt": corrupt,
        "resumed_images": resumed,
        "duration_s": round(duration, 2),
        "images_per_s": round((len(names) - resumed) / duration, 2),
        "files": kept,
        "machine": machine(),
        "versions": versions(),
    }
    write_json(target.with_name(f"{target.name}.json"), report)
    shutil.rmtree(parts)
    return report


class _Decoded(Dataset[tuple[str, torch.Tensor | str]]):
    """Each file's name, with its pixels (3, image_px, image_px) or the reason why there are none."""

    def __init__(self, processor: Any, images: Images, some: range) -> None:
        self.processor, self.images, self.some = processor, images, some

    def __len__(self) -> int:
        return len(self.some)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor | str]:
        name = self.images.names[self.some[index]]
        try:
            image = self.images.open(self.some[index])
        except DataError as error:
            return name, str(error)
        return name, self.processor(images=[image], return_tensors="pt")["pixel_values"][0]


def _batches(
    processor: Any, images: Images, some: range, batch: int, workers: int | None
) -> Iterator[tuple[list[str], torch.Tensor, list[dict[str, str]]]]:
    """Names and pixels of each batch's good images, and its corrupt ones."""
    count = min(os.cpu_count() or 1, 16) if workers is None else workers
    loader = DataLoader(
        _Decoded(processor, images, some), batch, num_workers=min(count, len(some) // batch), collate_fn=list
    )
    for rows in loader:
        good = {name: pixels for name, pixels in rows if isinstance(pixels, torch.Tensor)}
        bad = [{"file": name, "reason": reason} for name, reason in rows if isinstance(reason, str)]
        yield list(good), torch.stack(list(good.values())) if good else torch.empty(0), bad


@torch.inference_mode()
def _features(model: Any, pixels: torch.Tensor, tokens: bool) -> np.ndarray:
    made = model(pixels.to(model.device, model.dtype))
    chosen = made.last_hidden_state if tokens else made.pooler_output
    features: np.ndarray = chosen.float().cpu().numpy()
    return features


def _listing_sha256(names: list[str], files: Sequence[Path]) -> str:
    """What tells a folder's images from others, without reading them: their names and sizes."""
    listing = f"decoding {DECODING}\n" + "".join(
        f"{name}\0{file.stat().st_size}\n" for name, file in zip(names, files, strict=True)
    )
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()


def _open_job(parts: Path, job: dict[str, Any]) -> None:
    """Make the folder of parts, or find in it an unfinished run of the same job."""
    file = parts / "job.json"
    if file.is_file() and json.loads(file.read_text()) != job:
        raise DataError(
            f"{parts} holds parts of another run (another encoder, other images or settings); delete it or choose "
            "another --out."
        )
    parts.mkdir(parents=True, exist_ok=True)
    write_json(file, job)


def _merge(
    target: Path,
    shards: Iterator[Path],
    metadata: list[dict[str, Any]],
    rows: int,
    shape: list[int],
    dtype: np.dtype[Any],
) -> None:
    """Join the shards into one file, a shard at a time in memory, and rename it in."""
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if target.suffix == ".npy":
            whole = np.lib.format.open_memmap(beside, mode="w+", dtype=dtype, shape=(rows, *shape))
            at = 0
            for shard in shards:
                part = np.load(shard)
                whole[at : at + len(part)] = part
                at += len(part)
            whole.flush()
        else:
            width = int(np.prod(shape))
            kind = pa.list_(pa.from_numpy_dtype(dtype), width)
            schema = pa.schema([("file", pa.string()), ("features", kind)], {"shape": json.dumps(shape)})
            with pq.ParquetWriter(beside, schema) as writer:
                for shard, fact in zip(shards, metadata, strict=True):
                    values = pa.array(np.load(shard).reshape(-1))
                    features = pa.FixedSizeListArray.from_arrays(values, width)
                    writer.write_table(pa.table([pa.array(fact["files"], pa.string()), features], schema=schema))
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
