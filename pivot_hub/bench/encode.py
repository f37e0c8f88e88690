"""Whether `pivot encode` keeps its model busy: its images a second against bare forward passes and a plain loop."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pivot_hub.bench.encoder import SIZES, random_repository
from pivot_hub.bench.loader import noise_jpeg
from pivot_hub.config.encoder_names import resolve_encoder
from pivot_hub.data.image import list_folder, open_image
from pivot_hub.encoder.device import compute_device
from pivot_hub.encoder.encode import encode_source
from pivot_hub.encoder.image_shapes import refuse_native
from pivot_hub.encoder.repository import read_encoder
from pivot_hub.errors import DataError, PivotError
from pivot_hub.provenance import machine, versions

WAYS = ("bare", "pivot", "loop")


def bench_encode(
    encoder: str = "siglip-base-patch16-224",
    photos: Path | None = None,
    images: int = 128,
    batch: int = 16,
    workers: int = 2,
    rounds: int = 3,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Compare the images a second of three ways to encode the same files, in rounds in which they take turns.

    `bare` is the model's forward passes on a batch in memory, which is the limit. `pivot` is `pivot encode` into a
    folder of parts. `loop` is what users write: a DataLoader whose workers decode and prepare images, a forward pass,
    and one .npy file at the end. All have the model, its processor and the number of workers in common; loading the
    model is not counted.

    Args:
        encoder: Folder, Hub name or short name of an encoder, or the name of an entry of `bench.encoder.SIZES`, which
            gets random weights.
        photos: Folder of photographs; by default noise with a photograph's size and detail.
        images: Number of files, of which there must be as many in the folder.
        batch: Images of one pass.
        workers: Processes that decode.
        rounds: Rounds that are timed.
        log: Callback that receives one line for each way.

    Returns:
        Median images_per_s of each way, and its median ratio to `bare` in the same round.

    Raises:
        CheckpointError: The encoder does not exist, or is a tower of native resolution.
        DataError: The folder has too few images, or a number is out of range.
    """
    if min(images, batch, workers, rounds) < 1:
        raise DataError("give 1 or more for images, batch, workers and rounds.")
    if encoder not in SIZES:
        encoder = resolve_encoder(encoder)
        refuse_native(encoder, "the benchmark of encoding", "run pivot encode, which shows images a second")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = random_repository(folder / "encoder", SIZES[encoder]) if encoder in SIZES else encoder
        files = _link_photos(photos, images, folder / "photos")
        model, processor = read_encoder(source)
        cast(nn.Module, model).to(compute_device()).eval()
        speeds: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(rounds):
            # The order alternates, so that a drift of the machine's speed favours no way.
            for way in WAYS[:: 1 if turn % 2 == 0 else -1]:
                if way == "pivot":
                    shutil.rmtree(folder / "features", ignore_errors=True)
                    options: dict[str, Any] = {"batch": batch, "workers": workers}
                    speed = encode_source(source, folder / "photos", folder / "features", **options)["images_per_s"]
                elif way == "loop":
                    speed = _loop(model, processor, files, batch, workers, folder / "loop.npy")
                else:
                    speed = _bare(model, processor, files, batch)
                speeds[way].append(speed)
        _check_same(folder)
    records = {}
    for way, own in speeds.items():
        ratios = [speed / bare for speed, bare in zip(own, speeds["bare"], strict=True)]
        records[way] = {
            "images_per_s": round(statistics.median(own), 3),
            "ratio_to_bare": round(statistics.median(ratios), 4),
            "ratios": [round(ratio, 4) for ratio in ratios],
        }
        log(f"{way:6} {records[way]['images_per_s']:9.2f} images/s {100 * statistics.median(ratios):6.1f}% of bare")
    return {
        "benchmark": "encode",
        "encoder": Path(encoder).name if Path(encoder).is_dir() else encoder,
        "weights": "random" if encoder in SIZES else "the repository's",
        "photos": "noise" if photos is None else photos.absolute().name,
        "images": images,
        "batch": batch,
        "workers": workers,
        "rounds": rounds,
        "ways": records,
        "machine": machine(),
        "versions": versions(),
    }


def _link_photos(photos: Path | None, images: int, folder: Path) -> list[Path]:
    """Fill a folder with as many files, and return them in order."""
    folder.mkdir()
    if photos is None:
        for number in range(images):
            (folder / f"{number:06}.jpg").write_bytes(noise_jpeg(number))
    else:
        found = list_folder(photos).images[:images]
        if len(found) < images:
            raise DataError(f"{photos} holds {len(found)} images; give a folder of {images}, or fewer --images.")
        for number, file in enumerate(found):
            (folder / f"{number:06}{file.suffix}").symlink_to(file.absolute())
    return sorted(folder.iterdir())


class _Photos(Dataset[np.ndarray]):
    """Files as inputs of the model."""

    def __init__(self, files: list[Path], processor: Any) -> None:
        self.files, self.processor = files, processor

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        image = open_image(self.files[index], self.files[index].name)
        return np.asarray(self.processor(images=[image], return_tensors="np")["pixel_values"][0])


@torch.inference_mode()
def _bare(model: Any, processor: Any, files: list[Path], batch: int) -> float:
    """Images a second of forward passes on one batch in memory."""
    photos = _Photos(files, processor)
    pixels = torch.from_numpy(np.stack([photos[i] for i in range(min(batch, len(files)))])).to(compute_device())
    model(pixels)
    began, passes = time.perf_counter(), -(-len(files) // len(pixels))
    for _ in range(passes):
        pooled = model(pixels).last_hidden_state.mean(1)
    pooled.cpu()
    return passes * len(pixels) / (time.perf_counter() - began)


@torch.inference_mode()
def _loop(model: Any, processor: Any, files: list[Path], batch: int, workers: int, output: Path) -> float:
    """Images a second of a plain loop over a DataLoader, with the file that it writes."""
    began = time.perf_counter()
    loader = DataLoader(_Photos(files, processor), batch, num_workers=workers)
    features = [model(pixels.to(compute_device())).last_hidden_state.mean(1).cpu().numpy() for pixels in loader]
    np.save(output, np.concatenate(features))
    return len(files) / (time.perf_counter() - began)


def _check_same(folder: Path) -> None:
    """Check that both ways wrote the same features.

    Raises:
        PivotError: They differ by more than rounding.
    """
    table = pq.read_table(sorted((folder / "features").glob("*.parquet"))).sort_by("id")
    written = np.stack(table["features"].to_numpy())
    looped = np.load(folder / "loop.npy")
    if written.shape != looped.shape or np.abs(written - looped).max() > 1e-3 * np.abs(looped).max():
        raise PivotError("pivot encode and the plain loop gave different features, so their times cannot be compared.")
