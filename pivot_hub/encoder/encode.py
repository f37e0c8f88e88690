"""Encode the images of any source, and write their features to one file or to a folder of parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from PIL import Image
from torch import nn

from pivot_hub.config.encoder_names import resolve_encoder
from pivot_hub.data.image_blocks import BLOCK, Block, ImageSource, SourceImage, SourceOptions
from pivot_hub.data.image_source import open_source
from pivot_hub.encoder.batches import (
    BatchEncoder,
    Engine,
    Processes,
    RowEncoder,
)
from pivot_hub.encoder.device import compute_device
from pivot_hub.encoder.encoding_run import EncodingRun, Progress
from pivot_hub.encoder.feature_file import (
    SUFFIXES,
    check_fits,
    check_target,
    partial_folder,
)
from pivot_hub.encoder.feature_parts import (
    PartFolder,
    check_part_folder,
)
from pivot_hub.encoder.feature_table import STORES, FeatureTable
from pivot_hub.encoder.repository import encoder_metadata, read_encoder
from pivot_hub.encoder.share import Share
from pivot_hub.errors import CheckpointError, DataError
from pivot_hub.outputs import lock_output

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class EncodeOptions:
    """How images are encoded.

    Args:
        tokens: Whether to write all patch tokens (H*W, D) of an image instead of their mean (D). Those of a tower of
            native resolution are written as Parquet only, in which the columns `height` and `width` are the shape of
            the image's own grid.
        batch: Number of images in a forward pass.
        dtype: Precision that the encoder computes in: float32, float16 or bfloat16.
        store: Type of the stored features: float32, float16, bfloat16 (as its bits, uint16) or int8 (with the number
            that an image's features are multiplied by, in the column `scale`). By default float32, and float16 if that
            is the precision.
        workers: Number of processes that decode images; by default one for each core, 0 for none.
    """

    tokens: bool = False
    batch: int = 32
    dtype: str = "float32"
    store: str | None = None
    workers: int | None = None

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            DataError: The message names the value and the range.
        """
        if self.dtype not in DTYPES:
            raise DataError(f"dtype {self.dtype!r} is not known; give one of {', '.join(DTYPES)}.")
        if self.store is not None and self.store not in STORES:
            raise DataError(f"store {self.store!r} is not known; give one of {', '.join(STORES)}.")
        if self.batch < 1:
            raise DataError(f"batch {self.batch}: give 1 image or more.")
        if self.workers is not None and self.workers < 0:
            raise DataError(f"workers {self.workers}: give 0 or more processes.")

    def row_encoder(self, model: Any, further_layers: Sequence[int] = ()) -> RowEncoder:
        """Return the holder of an encoder that is on its device in the precision of the options.

        Args:
            model: The encoder.
            further_layers: Numbers of hidden states besides the model's own feature layer.
        """
        encoder = BatchEncoder(model, self.tokens, further_layers)
        store = self.store or ("float16" if self.dtype == "float16" else "float32")
        return RowEncoder(encoder, FeatureTable(encoder.shapes(), store, self.dtype))


def encode_source(
    encoder: str | Path,
    source: str | Path,
    output: str | Path,
    tokens: bool = False,
    batch: int = 32,
    dtype: str = "float32",
    workers: int | None = None,
    progress: Progress = lambda done, total, speed: None,
    feature_layer: int | str | Sequence[int | str] | None = None,
    store: str | None = None,
    share: Share = Share(),
    source_options: SourceOptions = SourceOptions(),
    ray: str | None = None,
) -> dict[str, Any]:
    """Encode every image of a source; a stopped run resumes when it is called again.

    If images were added to a source or replaced since a finished run, only those are encoded.

    Args:
        encoder: Folder, Hub name or short name of the encoder.
        source: Images, see `pivot_hub.data.image_source.open_source`.
        output: File to write, `.parquet` with the columns `id`, `sha256` and `features`, or `.npy`, for which the
            report lists the file of each row; or a folder of such Parquet parts with a `manifest.json`.
        tokens: Whether to write all patch tokens, see `EncodeOptions`.
        batch: Number of images in a forward pass.
        dtype: Precision that the encoder computes in: float32, float16 or bfloat16.
        workers: Number of processes that decode images; by default one for each core, 0 for none.
        progress: Function that is called after every batch.
        feature_layer: Hidden state to write, see `PivotVisionModel.from_pretrained`; the repository's own by default.
            Of several, the further ones are numbers, and each has its columns, as in `features_26`.
        store: Type of the stored features, see `EncodeOptions`.
        share: Which of several processes this is. They write to a folder.
        source_options: How tables are read.
        ray: Address of a Ray cluster that decodes and encodes the images, see `pivot_hub.encoder.ray_cluster`; by
            default this process does.

    Returns:
        Of a file, the report, which is also written beside it as `<output>.json`: encoder, shape of an image's
        features, ids in order (`files`), corrupt images with their reason, what was not read, images per second. Of a
        folder, its manifest, with what this process did.

    Raises:
        CheckpointError: The encoder cannot be loaded, or gives other features than it was published with.
        DataError: There is no image, the output has an unknown suffix or one that the features do not fit, the parts
            of another run are in its place, features are not finite, or Ray cannot be used.
        OutputError: The output was not written by this function, or another process is writing it.
    """
    target = Path(output)
    is_file = target.suffix in SUFFIXES
    if target.suffix and not is_file and not target.is_dir():
        raise DataError(f"{target}: features are written as .parquet or .npy, or to a folder; give --out such a name.")
    if is_file and share.count > 1:
        raise DataError(f"{target}: several processes write to a folder; give --out one, then join it with --merge.")
    options = EncodeOptions(tokens, batch, dtype, store, workers)
    options.check()
    opened = open_source(str(source), source_options)
    if opened.once and share.count > 1:
        raise DataError("stdin reaches one process only; write the paths to a .txt file for several.")
    (check_target if is_file else check_part_folder)(target)
    layers: Sequence[Any] = feature_layer if isinstance(feature_layer, (list, tuple)) else [feature_layer]
    encoder = resolve_encoder(encoder)
    model, processor = read_encoder(encoder, dtype=DTYPES[options.dtype], feature_layer=layers[0])
    metadata = encoder_metadata(encoder)
    rows = options.row_encoder(model, layers[1:])
    if ray is None:
        cast(nn.Module, model).to(compute_device())
        engine: Engine = Processes(rows, workers)
    else:
        from pivot_hub.encoder.ray_cluster import RayCluster

        place = Path(encoder).absolute() if Path(encoder).exists() else encoder
        engine = RayCluster(ray, EncoderLoader(place, metadata["encoder_sha256"], layers, options), workers)
    run = EncodingRun(rows, processor, _Sources(), batch, progress, engine)
    job = run.job(metadata)
    if is_file:
        check_fits(target, run.table)
        with lock_output(target):
            check_target(target)
            return run.to_file(opened, target, job, reuse=True)
    return run.to_folder(opened, target, {**job, "source": opened.name, **vars(source_options)}, share)


@dataclass(frozen=True)
class EncoderLoader:
    """Loads the encoder of a run in another process.

    Args:
        encoder: Folder, Hub name or short name of the encoder.
        sha256: Hash of its weights.
        layers: Hidden state that the model returns, None for that of its config, and the numbers of further ones.
        options: How images are encoded.
    """

    encoder: str | Path
    sha256: str
    layers: Sequence[Any]
    options: EncodeOptions

    def __call__(self) -> RowEncoder:
        """Load the encoder onto this process's device.

        Raises:
            CheckpointError: It cannot be loaded here, or has other weights here.
        """
        model, _ = read_encoder(self.encoder, dtype=DTYPES[self.options.dtype], feature_layer=self.layers[0])
        if encoder_metadata(self.encoder)["encoder_sha256"] != self.sha256:
            raise CheckpointError(f"{self.encoder} has other weights on another machine; give all the same ones.")
        cast(nn.Module, model).to(compute_device())
        return self.options.row_encoder(model, self.layers[1:])


class Images(Protocol):
    """Sequence of named images, which is copied to worker processes."""

    @property
    def names(self) -> Sequence[str]: ...

    def open(self, index: int) -> Image.Image:
        """Decode an image as RGB, or raise a DataError that names it if it cannot be decoded."""


def encode_images(
    model: Any,
    processor: Any,
    images: Images,
    target: Path,
    metadata: dict[str, Any],
    options: EncodeOptions = EncodeOptions(),
    progress: Progress = lambda done, total, speed: None,
) -> dict[str, Any]:
    """Encode named images into one file that is a cache; a stopped run resumes with the same metadata.

    Another process that writes the file is waited for, and whatever is in its place is replaced.

    Args:
        model: The encoder, on its device in the precision of the options.
        processor: Image processor of the encoder.
        images: Images to encode, in order.
        target: File to write, `.parquet` or `.npy` as in `encode_source`.
        metadata: Identity of the encoder and of the images, which decides whether a stopped run can be resumed.
        options: How images are encoded.
        progress: Function that is called after every batch.

    Returns:
        The report that `encode_source` describes.

    Raises:
        DataError: The features do not fit the output, are not finite, or the processes that decode images cannot run.
    """
    run = _named_run(model, processor, images, target, options, progress)
    with lock_output(target, wait=True):
        return run.to_file(_named_source(images), target, run.job(metadata), reuse=False)


def encode_share(
    model: Any,
    processor: Any,
    images: Images,
    target: Path,
    metadata: dict[str, Any],
    share: Share,
    options: EncodeOptions = EncodeOptions(),
    progress: Progress = lambda done, total, speed: None,
) -> None:
    """Encode one process's share of named images, before one process writes them all by `encode_images`.

    Args:
        model: The encoder, on its device in the precision of the options.
        processor: Image processor of the encoder.
        images: Images to encode, in order.
        target: File that `encode_images` is to write.
        metadata: Identity of the encoder and of the images.
        share: Which of the processes this is.
        options: How images are encoded.
        progress: Function that is called after every batch.

    Raises:
        DataError: As in `encode_images`.
    """
    run = _named_run(model, processor, images, target, options, progress)
    parts = PartFolder(partial_folder(target), run.job(metadata), run.table)
    with lock_output(target, wait=True):
        parts.open()
    run.encode(_named_source(images), share, parts)


def _named_run(
    model: Any, processor: Any, images: Images, target: Path, options: EncodeOptions, progress: Progress
) -> EncodingRun:
    rows = options.row_encoder(model)
    check_fits(target, rows.table)
    return EncodingRun(rows, processor, _NamedImages(images), options.batch, progress, Processes(rows, options.workers))


@dataclass(frozen=True)
class _Index:
    """An image of a sequence."""

    id: str
    index: int


def _named_source(images: Images) -> ImageSource:
    count = len(images.names)

    def block(start: int) -> Block:
        indices = range(start, min(start + BLOCK, count))
        return Block(f"{start:012}", lambda: (_Index(images.names[i], i) for i in indices), lambda: "")

    return ImageSource("", lambda: map(block, range(0, count, BLOCK)), count)


@dataclass(frozen=True)
class _NamedImages:
    """Loader of a sequence of images, whose contents are known by the job."""

    images: Images

    def load(self, place: _Index, known: str | None) -> tuple[str, Image.Image | DataError | None]:
        try:
            return "", None if known is not None else self.images.open(place.index)
        except DataError as error:
            return "", error


class _Sources:
    """Loader of the images of a source."""

    def load(self, place: SourceImage, known: str | None) -> tuple[str, Image.Image | DataError | None]:
        return place.load(known)
