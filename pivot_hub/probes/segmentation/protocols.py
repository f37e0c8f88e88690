"""Segmentation of labelled images: heads on frozen patch tokens, scored at the pixels of each image's own mask."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from pivot_hub.config.data_section import OnBadRow
from pivot_hub.data.synthetic import Split
from pivot_hub.encoder.configuration_pivot import backbone_of
from pivot_hub.encoder.encoding_run import Progress
from pivot_hub.encoder.feature_model import FeatureModel
from pivot_hub.errors import DataError, ProbeError
from pivot_hub.metrics.mean_iou.mean_iou import mean_iou
from pivot_hub.outputs import scratch_folder
from pivot_hub.probes.features import EncodingOptions, cached_values, patch_features
from pivot_hub.probes.fixed_grid import FixedGrid
from pivot_hub.probes.grid import described
from pivot_hub.probes.result import ProbeResult, measure, statistic_of
from pivot_hub.probes.segmentation.heads import (
    DECAYS,
    KINDS,
    LABEL_STRIDE,
    LEARNING_RATES,
    Head,
    Rows,
    Setting,
    count_pixels,
    fit_heads,
    label_scores,
    scale_of,
)
from pivot_hub.probes.segmentation.labelled_masks import MaskData, MaskedImage, ids_within, open_masks

METRICS = ("mean_iou", "pixel_accuracy", "mean_recall")
ENCODE_BATCH = 16  # images per forward pass
ROUNDING = 0.01  # share of a channel's spread by which float16 may round tokens on disk
NATIVE_SIDE = 32  # patches a side of an image for a tower of native resolution, which has no size of its own
Encode = Callable[[Sequence[MaskedImage], int], Rows]  # images and their size in px -> tokens (N, H*W, D)
Log = Callable[[str], None]


@dataclass(frozen=True)
class SegmentationOptions:
    """Options of `segment_masks`.

    Args:
        ignore_ids: Ids that are never counted; by default those of the data.
        classes: Number of ids, including ignored ones; by default the number that the data or `names` give, or that
            the fitted masks contain.
        names: Names of ids.
        heads: Kinds of heads, from KINDS.
        image_px: Sides of the encoder's input. Positions are interpolated for sizes other than the encoder's own. Heads
            are fitted, chosen and reported for each size. For a tower of native resolution, the sides of squares whose
            area images are scaled to; by default that of NATIVE_SIDE x NATIVE_SIDE patches.
        seed: Seed of the split, the heads and the bootstrap.
        on_bad_row: Whether a file that cannot be used raises an error, or is skipped and reported.
        steps: Number of steps of each fit, see `fit_heads`.
    """

    ignore_ids: Iterable[int] | None = None
    classes: int | None = None
    names: Mapping[int, str] | None = None
    heads: Sequence[str] = KINDS
    image_px: Sequence[int] | None = None
    seed: int = 0
    on_bad_row: OnBadRow | str = OnBadRow.STOP
    steps: int | None = None


def segment_folder(
    model: FeatureModel,
    image_processor: Any,
    data: str | Path,
    *,
    conditions: dict[str, Any],
    masks: str | Path | None = None,
    options: SegmentationOptions = SegmentationOptions(),
    encode: Encode | None = None,
    log: Log = lambda line: None,
) -> tuple[list[ProbeResult], list[str]]:
    """Probe a folder, an archive or a Hub data set of images and id masks: `open_masks`, then `segment_masks`.

    Args:
        model: The encoder.
        image_processor: Image processor of the encoder.
        data: Folder, archive or Hub name, see `open_masks`.
        conditions: Fields of the results: encoder, encoder_sha256, feature_layer.
        masks: Folder or archive of the masks, if `data` contains only the images.
        options: Options of the heads, the images and the data.
        encode: Function that computes tokens, see `segment_masks`.
        log: Function that receives progress messages.
    """
    opened = open_masks(data, masks, options.seed, options.on_bad_row)
    return segment_masks(model, image_processor, opened, conditions=conditions, options=options, encode=encode, log=log)


def segment_masks(
    model: FeatureModel,
    image_processor: Any,
    data: MaskData,
    *,
    conditions: dict[str, Any],
    options: SegmentationOptions = SegmentationOptions(),
    encode: Encode | None = None,
    log: Log = lambda line: None,
) -> tuple[list[ProbeResult], list[str]]:
    """Fit heads on frozen patch tokens and score them on the reported part.

    Whole images are resized to a square without keeping the aspect ratio, because a crop, as some processors make,
    would leave parts of the masks without tokens. A tower of native resolution gets images of one area in their own
    aspect ratio, and each map is interpolated to the grid of a square image.

    Heads are fitted on train with one label for every LABEL_STRIDE pixels of that square. Learning rate and weight
    decay are those with the best mIoU on validation. Each head is then fitted again on both splits. Only then is the
    reported part opened; its logits are upsampled to the size of each mask.

    Args:
        model: The encoder.
        image_processor: Image processor of the encoder; all of its settings except sizes are used.
        data: Masked images in their parts.
        conditions: Fields of the results: encoder, encoder_sha256, feature_layer.
        options: Options of the heads, the images and the data.
        encode: Function that returns the tokens of images at a size, for example from a cache. By default the tokens
            are computed and stay on disk while they are used.
        log: Function that receives progress messages.

    Returns:
        mIoU, pixel accuracy and mean recall of each head at each size, whose per-example scores (n, 3, classes) are
        ordered by id; and one error message for each file that was skipped.

    Raises:
        ProbeError: The settings are invalid, or the data as a whole cannot be measured.
        DataError: A file cannot be used and `on_bad_row` is STOP.
    """
    _check_heads(options.heads)
    on_bad_row = OnBadRow.parse(options.on_bad_row)
    sizes = _sizes(model, image_processor, options.image_px)
    ignored = data.ignored if options.ignore_ids is None else frozenset(options.ignore_ids)
    skipped = list(data.unpaired)
    fitted_splits: tuple[Split, ...] = ("train", "validation")
    parts = {split: _check(data, split, ignored, on_bad_row, skipped) for split in fitted_splits}
    _check_classes(data, parts.values(), ignored)
    images = [image for part in parts.values() for image in part.images]
    train_count = len(parts["train"].images)
    rows = range(train_count), range(train_count, len(images))
    classes = _class_count(options, data, parts.values())
    run = _Run(model, image_processor, options, classes, ignored, encode, log)
    fits = {px: run.fit(images, rows, px) for px in sizes}
    commonest = next(reversed(fits.values())).commonest

    # Every setting is chosen. Only now is the reported part opened.
    test = _check(data, "test", ignored, on_bad_row, skipped)
    digest = hashlib.sha256("".join([*(p.sha256 for p in parts.values()), test.sha256]).encode()).hexdigest()
    known = {file for part in parts.values() for file in part.digests}
    about = ""
    if copies := sum(file in known for file in test.digests):
        about = f"; {copies} of the {len(test.images)} reported images are copies of fitted images"
        log(f"warning: {data.name}{about}, which raises the scores; remove them.".replace("; ", ": ", 1))
    results: list[ProbeResult] = []
    for px, fit in fits.items():
        started = time.monotonic()
        head_scores = run.score(fit, test.images, px)
        if not head_scores[0][:, 2].any():
            raise ProbeError(f"{data.name}: no pixel of {data.reported} counts; are its masks empty, or all ignored?")
        duration = fit.duration_s + time.monotonic() - started
        *head_scores, position_scores = head_scores
        for (setting, _), scores in zip(fit.heads, head_scores, strict=True):
            for metric in METRICS:
                results.append(
                    measure(
                        f"segmentation/{data.name}/{setting.kind}/{px}px",
                        metric,
                        scores,
                        protocol=_protocol(setting, sizes[px], ignored, metric, position_scores, commonest) + about,
                        seed=options.seed,
                        duration_s=duration,
                        split=data.reported,
                        data_sha256=digest,
                        **conditions,
                    )
                )
    return results, skipped


@dataclass(frozen=True)
class _Fit:
    """The heads fitted at one image size, the commonest class among their labels, and the time they took.

    `by_position` holds the commonest class at each position of the image: (side, side).
    """

    heads: list[tuple[Setting, Head]]
    commonest: int
    by_position: np.ndarray
    duration_s: float


@dataclass(frozen=True)
class _Run:
    """Fitting and scoring of heads at any image size, with everything that is the same for all sizes."""

    model: FeatureModel
    image_processor: Any
    options: SegmentationOptions
    classes: int
    ignored: Iterable[int]
    encode: Encode | None
    log: Log

    def fit(self, images: Sequence[MaskedImage], rows: tuple[Sequence[int], Sequence[int]], px: int) -> _Fit:
        """Choose settings and fit heads on the train and validation rows of images."""
        started = time.monotonic()
        with scratch_folder("pivot-segment") as scratch:
            tokens = self._tokens(images, px, scratch)
            labels, counts = _labels(images, px, self.classes, self.ignored, scratch)
            heads = _choose(self.options, tokens, labels, rows, self.classes, self.model.device, self.log)
            by_position = _commonest_at(labels, self.classes, int(counts.argmax()))
            del tokens, labels
        return _Fit(heads, int(counts.argmax()), by_position, time.monotonic() - started)

    def score(self, fit: _Fit, images: Sequence[MaskedImage], px: int) -> list[np.ndarray]:
        """Compute the per-example scores (n, 3, classes) of each head, and of the commonest class at each position."""
        with scratch_folder("pivot-segment") as scratch:
            tokens = self._tokens(images, px, scratch)
            heads = [head for _, head in fit.heads]
            head_scores = _score(heads, fit.by_position, tokens, images, self.classes, self.ignored)
            del tokens
        return head_scores

    def _tokens(self, images: Sequence[MaskedImage], px: int, folder: Path) -> Rows:
        if self.encode:
            return self.encode(images, px)
        return encode_masked(self.model, self.image_processor, images, px, folder, self.log)


def _check_heads(heads: Sequence[str]) -> None:
    """Raise a ProbeError for no head or an unknown one."""
    unknown = [kind for kind in heads if kind not in KINDS]
    if not heads:
        unknown = ["none"]
    if unknown:
        raise ProbeError(f"head {unknown[0]!r} is not known; give {' or '.join(KINDS)}, or both.")


def _class_count(options: SegmentationOptions, data: MaskData, parts: Iterable[_Part]) -> int:
    """Return the number of ids from the options, the names, the data or the masks, in this order."""
    named = max(options.names) + 1 if options.names else None
    return options.classes or named or data.classes or 1 + max(part.highest for part in parts)


def per_class(example_scores: np.ndarray, names: Mapping[int, str] | None = None) -> list[dict[str, Any]]:
    """List the id, name, true pixels, IoU and recall of each class, in percent.

    Args:
        example_scores: (n, 3, classes) per-example scores of a result.
        names: Names of ids.

    Returns:
        One entry for each class that is in the masks or was predicted; recall is None if no pixel belongs to the class.
    """
    correct, predicted, true = example_scores.sum(0, dtype=np.int64)
    return [
        {
            "id": int(i),
            "name": (names or {}).get(int(i), str(i)),
            "pixels": int(true[i]),
            "iou": round(100 * float(correct[i] / (true[i] + predicted[i] - correct[i])), 2),
            "recall": round(100 * float(correct[i] / true[i]), 2) if true[i] else None,
        }
        for i in np.flatnonzero(true + predicted)
    ]


def encode_masked(
    model: FeatureModel,
    image_processor: Any,
    images: Sequence[MaskedImage],
    image_px: int,
    folder: str | Path,
    log: Log = lambda line: None,
) -> np.ndarray:
    """Compute the patch tokens of images at a size, see `at_size`: (N, H*W, D), memory-mapped from a file.

    They are stored as `token_dtype` says of the first batch.

    Args:
        model: The encoder.
        image_processor: Image processor of the encoder.
        images: The images to encode.
        image_px: Side of the square, in pixels.
        folder: Folder that the file is written to.
        log: Function that receives a progress message every ten seconds.

    Raises:
        DataError: An image cannot be decoded.
        ProbeError: Features are not finite, or the disk of the folder is too small for them.
    """
    file, features = Path(folder) / "tokens.npy", np.zeros(0)
    sized = at_size(model, image_processor, image_px)
    started = logged = time.monotonic()
    for start in range(0, len(images), ENCODE_BATCH):
        batch = images[start : start + ENCODE_BATCH]
        tokens = patch_features(*sized, [image.open_image() for image in batch])
        bad = ~np.isfinite(tokens).all(axis=(1, 2))
        if bad.any():
            raise ProbeError(
                f"the encoder's features of {batch[int(bad.argmax())].name} are not finite; check its weights, or run "
                "it in float32."
            )
        if not start:
            dtype = token_dtype(tokens)
            needed = tokens[0].size * dtype.itemsize * len(images)
            if needed > shutil.disk_usage(folder).free:
                raise ProbeError(
                    f"features of {len(images)} images at {image_px} px take {needed / 1e9:.1f} GB, more than is free "
                    "in the temporary folder; set TMPDIR to a larger disk."
                )
            features = np.lib.format.open_memmap(file, "w+", dtype, (len(images), *tokens.shape[1:]))
        largest = np.finfo(features.dtype).max  # no number becomes infinite
        features[start : start + len(batch)] = tokens.clip(-largest, largest)
        if time.monotonic() - logged > 10:
            logged = time.monotonic()
            done = start + len(batch)
            per_s = done / (logged - started)
            left = (len(images) - done) / per_s
            log(f"features at {image_px} px: {done}/{len(images)} images, {per_s:.1f}/s, {left:.0f} s left")
    return features


def token_dtype(tokens: np.ndarray) -> np.dtype[Any]:
    """Return float16 where it rounds tokens by at most ROUNDING of the spread of each channel, else float32.

    Heads are fitted on channels that are divided by their spread, so a channel that varies little around a large mean
    needs float32.

    Args:
        tokens: (N, H*W, D) float32 tokens of some images.
    """
    flat = tokens.reshape(-1, tokens.shape[-1])
    with np.errstate(over="ignore"):
        error = np.abs(flat.astype(np.float16) - flat).mean(0)
    return np.dtype(np.float16 if (error <= ROUNDING * flat.std(0)).all() else np.float32)


def cached_encode(
    model: Any, image_processor: Any, metadata: dict[str, Any], cache: Path, progress: Progress
) -> Encode:
    """Return a function for `segment_masks` that caches tokens on disk, so that a stopped run resumes.

    Args:
        model: The encoder.
        image_processor: Image processor of the encoder.
        metadata: Name and hash of the encoder: encoder and encoder_sha256.
        cache: Folder of the tokens.
        progress: Function that is called after every batch.
    """
    options = EncodingOptions(cache=cache, batch=ENCODE_BATCH, progress=progress)

    def encode(images: Sequence[MaskedImage], px: int) -> Rows:
        sized_model, sized_processor = at_size(model, image_processor, px)
        values, _, errors = cached_values(
            sized_model, sized_processor, _NamedImages(images), metadata, tokens=True, options=options
        )
        if errors:
            raise DataError(errors[0])
        return values

    return encode


def at_size(model: Any, image_processor: Any, px: int) -> tuple[FeatureModel, Any]:
    """Return an encoder and its image processor for images of one size, whose tokens all have one grid.

    Args:
        model: The encoder.
        image_processor: Image processor of the encoder.
        px: Side of the square that whole images are resized to. For a tower of native resolution, of the square whose
            area they are scaled to.
    """
    if not _is_native(model):
        return _AtSize(model, px), _SquareProcessor(image_processor, px)
    scaled = _AreaProcessor(image_processor, px, _has_tiles(model))
    return FixedGrid(model, scaled, px), scaled


def _is_native(model: FeatureModel) -> bool:
    return model.config.image_size is None


def _has_tiles(model: FeatureModel) -> bool:
    """Return whether the tower pads images to tiles, so that its map of an image is larger than the image."""
    return backbone_of(model.config.backbone_config).layout == "tiles"


class _AtSize:
    """Encoder for images of one size, with interpolated positions if that is not the encoder's own size."""

    def __init__(self, model: Any, px: int) -> None:
        config = model.config
        self._model, self._options = model, {} if px == config.image_size else {"interpolate_pos_encoding": True}
        self.device, self.dtype = model.device, model.dtype
        self.config = SimpleNamespace(
            image_size=px, patch_size=config.patch_size, hidden_size=config.hidden_size, pivot=config.pivot
        )

    def __call__(self, pixel_values: torch.Tensor) -> Any:
        return self._model(pixel_values, **self._options)


class _SquareProcessor:
    """Image processor that resizes whole images to a square of one size, without keeping the aspect ratio."""

    def __init__(self, processor: Any, px: int) -> None:
        self._processor, self._px = processor, px

    def __call__(self, images: Sequence[Image.Image], return_tensors: str) -> Any:
        # Resized here, with the processor's filter, because processors take sizes in different ways and some crop.
        squares = [image.resize((self._px, self._px), self._processor.resample) for image in images]
        return self._processor(images=squares, do_resize=False, do_center_crop=False, return_tensors=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        return {**self._processor.to_dict(), "squashed_px": self._px}  # a part of the cache key


class _AreaProcessor:
    """Image processor of a tower of native resolution that scales whole images to one area first.

    Args:
        processor: The image processor, which may scale images further as its own settings say.
        px: Side of the square that has this area.
        squares: Whether images are resized to that square, instead of keeping their aspect ratio.
    """

    def __init__(self, processor: Any, px: int, squares: bool) -> None:
        self._processor, self._px, self._squares = processor, px, squares
        self._resample = getattr(processor, "resample", None) or Image.Resampling.BICUBIC

    def __call__(self, images: Sequence[Image.Image], return_tensors: str) -> Any:
        scaled = [image.resize(self._size(*image.size), self._resample) for image in images]
        return self._processor(images=scaled, return_tensors=return_tensors)

    def _size(self, width: int, height: int) -> tuple[int, int]:
        if self._squares:
            return self._px, self._px
        scale = self._px / (width * height) ** 0.5
        return max(1, round(width * scale)), max(1, round(height * scale))

    def to_dict(self) -> dict[str, Any]:
        return {**self._processor.to_dict(), "area_px": self._px, "squares": self._squares}  # a part of the cache key


@dataclass(frozen=True)
class _NamedImages:
    """The images without their masks, for `cached_values`."""

    images: Sequence[MaskedImage]

    @cached_property
    def names(self) -> Sequence[str]:  # cached, because it is read for every image
        return [f"{i}: {image.name}" for i, image in enumerate(self.images)]

    def open(self, index: int) -> Image.Image:
        return self.images[index].open_image()

    def digest(self, index: int) -> bytes:
        return self.images[index].image_digest()

    def stamp(self) -> str:
        return hashlib.sha256(repr([image.image.stamp() for image in self.images]).encode()).hexdigest()


def tokens_side(model: FeatureModel, image_px: int) -> int:
    """Return the number of patches along a side of an image."""
    return int(image_px // model.config.patch_size)


@dataclass(frozen=True)
class _Size:
    """An image size that heads are fitted at: the side in pixels, the grid of tokens, and what is done to images."""

    px: int
    side: int
    about: str


def _sizes(model: FeatureModel, image_processor: Any, image_px: Sequence[int] | None) -> dict[int, _Size]:
    """Return the requested sizes by their pixels, after a forward pass of a blank image at each, before any file is
    opened.
    """
    if _is_native(model):
        return {
            px: _native_size(model, image_processor, px) for px in image_px or [NATIVE_SIDE * model.config.patch_size]
        }
    if not hasattr(image_processor, "resample"):
        kind = type(image_processor).__name__
        raise ProbeError(f"{kind} crops images, which would leave masks without tokens; write the encoder as `vit`.")
    own = int(model.config.image_size)
    sizes = list(dict.fromkeys(image_px or [own]))
    for px in sizes:
        try:
            if px < 1 or px % model.config.patch_size:
                raise ValueError(f"its patch of {model.config.patch_size} px does not divide them")
            with torch.no_grad():
                blank = torch.zeros(1, 3, px, px, device=model.device)
                tokens = model(blank, **({} if px == own else {"interpolate_pos_encoding": True})).last_hidden_state
            if tokens.shape[1] != tokens_side(model, px) ** 2:
                raise ValueError(f"it gives {tokens.shape[1]} tokens for {tokens_side(model, px) ** 2} patches")
        except (ValueError, RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise ProbeError(f"the encoder takes no images of {px} px ({reason}); its own size is {own}.") from error
    return {px: _Size(px, tokens_side(model, px), f"images resized to {px} x {px} px") for px in sizes}


def _native_size(model: FeatureModel, image_processor: Any, px: int) -> _Size:
    """Measure the grid that a tower of native resolution gives a square image."""
    try:
        if px < LABEL_STRIDE:
            raise ValueError(f"one label is fitted for every {LABEL_STRIDE} px")
        grid = cast(FixedGrid, at_size(model, image_processor, px)[0])
    except (ValueError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ProbeError(f"the encoder takes no images of {px} px ({reason}); give another --image-px.") from error
    if _has_tiles(model):
        return _Size(px, grid.side, f"images resized to {px} x {px} px, because tiles are padded otherwise")
    scaled = f"images scaled to the area of {px} x {px} px in their own aspect ratio"
    return _Size(px, grid.side, f"{scaled}, maps interpolated bilinearly to one grid")


@dataclass(frozen=True)
class _Part:
    """The usable images of a part, the highest id in their masks, and a hash of their names, files and ids.

    `digests` holds the hash of each image's file.
    """

    images: list[MaskedImage]
    highest: int
    sha256: str
    digests: list[bytes]


def _check(data: MaskData, split: Split, ignored: Iterable[int], on_bad_row: OnBadRow, skipped: list[str]) -> _Part:
    """Open every image and mask of a part once; messages about skipped ones are added to `skipped`."""
    usable, highest, digest, digests = [], -1, hashlib.sha256(), []
    for masked in data.parts[split]:
        try:
            image, ids = masked.open_image(), masked.open_ids()
            if image.size != ids.shape[::-1]:
                raise DataError(
                    f"mask {masked.mask} is {ids.shape[1]} x {ids.shape[0]} px, its image {image.width} x "
                    f"{image.height}; scale one to the other, a mask without blending ids."
                )
        except DataError as error:
            if on_bad_row == OnBadRow.STOP:
                raise
            skipped.append(str(error))
            continue
        counted = np.where(np.isin(ids, list(ignored)), -1, ids)
        highest = max(highest, int(counted.max()))
        digest.update(f"{masked.name} {ids.shape}\n".encode())
        digest.update(counted.astype("<i4").tobytes())
        digests.append(masked.image_digest())
        digest.update(digests[-1])
        usable.append(masked)
    if not usable:
        raise ProbeError(f"{data.name}: no image of the {split} part can be used; fix the files that were skipped.")
    return _Part(usable, highest, digest.hexdigest(), digests)


def _check_classes(data: MaskData, parts: Iterable[_Part], ignored: Iterable[int]) -> None:
    """Raise a ProbeError if masks hold one class only besides ids that are ignored, as masks of 0 and 255 do."""
    ids: set[int] = set()
    for image in (image for part in parts for image in part.images):
        ids |= set(np.unique(image.open_ids()).tolist())
        if len(ids - set(ignored)) > 1:
            return
    if dropped := sorted(ids & set(ignored)):
        kept = ", ".join(map(str, sorted(ids - set(ignored)))) or "no id"
        raise ProbeError(
            f"{data.name}: the masks that are fitted hold {kept} besides the ignored {', '.join(map(str, dropped))}; a "
            "probe needs at least two classes. If an ignored id is a class, name the ids that are none with --ignore, "
            'or give --ignore "" to count all.'
        )


def _labels(
    images: Sequence[MaskedImage], px: int, classes: int, ignored: Iterable[int], folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Sample class ids at the centres of a square grid, and count the labels of each class.

    Returns:
        (N, side, side) int32 labels, memory-mapped from a file, -1 where ignored; (classes,) counts.
    """
    side = px // LABEL_STRIDE
    labels = np.lib.format.open_memmap(Path(folder) / "labels.npy", "w+", np.int32, (len(images), side, side))
    counts = np.zeros(classes, np.int64)
    for i, image in enumerate(images):
        ids = ids_within(image.open_ids(), classes, ignored, image.name)
        rows, columns = (((np.arange(side) + 0.5) * length / side).astype(int) for length in ids.shape)
        labels[i] = ids[np.ix_(rows, columns)]
        counts += np.bincount(labels[i][labels[i] >= 0], minlength=classes)
    return labels, counts


def _choose(
    options: SegmentationOptions,
    tokens: Rows,
    labels: Rows,
    rows: tuple[Sequence[int], Sequence[int]],
    classes: int,
    device: torch.device,
    log: Log,
) -> list[tuple[Setting, Head]]:
    """Choose the best setting of each kind of head on validation, and fit its head on train and validation."""
    train, validation = rows
    candidates = [
        Setting(kind, learning_rate, decay)
        for kind in options.heads
        for learning_rate in LEARNING_RATES
        for decay in DECAYS
    ]
    scale = scale_of(tokens, train)
    log(f"heads: {len(candidates)} candidates on {len(train)} images")
    heads = fit_heads(candidates, tokens, labels, train, scale, options.seed, device, options.steps, log)
    score = {
        setting: float(mean_iou(label_scores(head, tokens, labels, validation, classes).sum(0)[None])[0])
        for setting, head in zip(candidates, heads, strict=True)
    }
    best = [max((s for s in candidates if s.kind == kind), key=lambda s: score[s]) for kind in options.heads]
    log("heads: chosen " + ", ".join(f"{s.kind} learning rate {s.learning_rate:g}, decay {s.decay:g}" for s in best))
    both = [*train, *validation]
    refitted = fit_heads(best, tokens, labels, both, scale_of(tokens, both), options.seed, device, options.steps, log)
    return list(zip(best, refitted, strict=True))


def _commonest_at(labels: np.ndarray, classes: int, commonest: int) -> np.ndarray:
    """Find the commonest class at each position of the labels (N, side, side): (side, side).

    Positions whose labels are all ignored have the commonest class of all.
    """
    best = np.full(labels.shape[1:], commonest)
    for row in range(labels.shape[1]):  # row by row, since the counts of all positions may not fit in memory
        counts = np.zeros((labels.shape[2], classes), np.int64)
        for column, ids in enumerate(np.asarray(labels[:, row]).T):
            counts[column] = np.bincount(ids[ids >= 0], minlength=classes)
        seen = counts.any(1)
        best[row, seen] = counts.argmax(1)[seen]
    return best


def _score(
    heads: Sequence[Head],
    by_position: np.ndarray,
    tokens: Rows,
    images: Sequence[MaskedImage],
    classes: int,
    ignored: Iterable[int],
) -> list[np.ndarray]:
    """Compute the per-example scores (n, 3, classes) of each head, then of positions, at the masks' own pixels."""
    head_scores: list[list[np.ndarray]] = [[] for _ in (*heads, by_position)]
    for i, image in enumerate(images):
        truth = ids_within(image.open_ids(), classes, ignored, image.name)
        image_tokens = np.ascontiguousarray(tokens[np.array([i])])
        predictions = [head.predict(image_tokens, (truth.shape[0], truth.shape[1]))[0] for head in heads]
        rows, columns = (np.arange(length) * len(by_position) // length for length in truth.shape)
        predictions.append(by_position[np.ix_(rows, columns)])
        for scores, predicted in zip(head_scores, predictions, strict=True):
            scores.append(count_pixels(predicted, truth, classes))
    return [np.stack(scores) for scores in head_scores]


def _protocol(
    setting: Setting,
    size: _Size,
    ignored: Iterable[int],
    metric: str,
    position_scores: np.ndarray,
    commonest: int,
) -> str:
    """Describe the method in one line, with what the commonest fitted class, everywhere and by position, scores."""
    true = position_scores.sum(0, dtype=np.float64)[2]
    correct, predicted = np.zeros_like(true), np.zeros_like(true)
    correct[commonest], predicted[commonest] = true[commonest], true.sum()
    alone = 100 * float(statistic_of(metric)(np.stack([correct, predicted, true])[None])[0])
    position = 100 * float(statistic_of(metric)(position_scores.sum(0, dtype=np.float64)[None])[0])
    rate = described(setting.learning_rate, setting.learning_rate in (LEARNING_RATES[0], LEARNING_RATES[-1]))
    head = "linear head" if setting.kind == "linear" else "2-layer head"
    left_out = f"; ids {', '.join(map(str, sorted(ignored)))} ignored" if ignored else ""
    return (
        f"{head} on {size.side} x {size.side} patch tokens, {size.about}, logits upsampled to the mask; "
        f"learning rate {rate}, decay {setting.decay:g} by validation{left_out}; "
        f"the commonest class alone {alone:.1f}, position alone {position:.1f}"
    )
