"""Segmentation of real images: heads on frozen patch tokens, scored at the pixels of each image's own mask."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from pivot_hub.data.synthetic import Split
from pivot_hub.encoder.encode import Progress
from pivot_hub.encoder.feature_model import FeatureModel
from pivot_hub.errors import DataError, ProbeError
from pivot_hub.metrics.mean_iou.mean_iou import mean_iou
from pivot_hub.probes.features import cached_values
from pivot_hub.probes.result import ProbeResult, measure, statistic_of
from pivot_hub.probes.segmentation.heads import (
    DECAYS,
    KINDS,
    LABEL_STRIDE,
    RATES,
    Head,
    Rows,
    Setting,
    fit_heads,
    label_tallies,
    scale_of,
    tally,
)
from pivot_hub.probes.segmentation.labelled_masks import MaskData, Pair, ids_within, open_masks

METRICS = ("mean_iou", "pixel_accuracy", "mean_recall")
ENCODE_BATCH = 16  # images of one forward pass
Encode = Callable[[Sequence[Pair], int], Rows]  # images and their size in px to tokens (N, H*W, D)
Say = Callable[[str], None]


def segment_folder(
    model: FeatureModel,
    image_processor: Any,
    data: str | Path,
    *,
    masks: str | Path | None = None,
    seed: int = 0,
    on_bad_row: str = "stop",
    **options: Any,
) -> tuple[list[ProbeResult], list[str]]:
    """Probe on a folder, archive or Hub data set of images and id masks: `open_masks`, then `segment_masks`.

    Args:
        model: the encoder.
        image_processor: its own.
        data: as for `open_masks`, with `masks`.
        masks: where they lie apart from the images.
        seed: of the split, the heads and the bootstrap.
        on_bad_row: stop at a file that cannot be used, or skip it.
        **options: as for `segment_masks`.
    """
    found = open_masks(data, masks, seed, on_bad_row)
    return segment_masks(model, image_processor, found, seed=seed, on_bad_row=on_bad_row, **options)


def segment_masks(
    model: FeatureModel,
    image_processor: Any,
    data: MaskData,
    *,
    conditions: dict[str, Any],
    ignore_ids: Iterable[int] | None = None,
    classes: int | None = None,
    names: Mapping[int, str] | None = None,
    heads: Sequence[str] = KINDS,
    image_px: Sequence[int] | None = None,
    seed: int = 0,
    on_bad_row: str = "stop",
    encode: Encode | None = None,
    steps: int | None = None,
    log: Say = lambda line: None,
) -> tuple[list[ProbeResult], list[str]]:
    """Fit heads on frozen patch tokens and score them on the part that is reported.

    Images are squashed to a square, whole: a crop, as some processors make, would leave masks without tokens. Heads are
    fitted on train at a label for every LABEL_STRIDE pixels of that square; learning rate and decay are those with the
    best mIoU on validation; then each head is fitted anew on both. Only then is the reported part opened; its logits
    are upsampled to the mask's own size.

    Args:
        model: the encoder.
        image_processor: its own; sizes are ours, all else its.
        data: pairs in parts.
        conditions: encoder, encoder_sha256, feature_layer of the results.
        ignore_ids: ids that count nowhere; by default the data's.
        classes: how many ids there are, ignored ones among them; by default as many as the data or `names` say, or as
            the masks hold that are fitted.
        names: of ids.
        heads: of KINDS.
        image_px: sides the encoder takes images at, by interpolated positions where they are not its own; each is
            fitted, chosen and reported by itself.
        seed: of the heads and the bootstrap.
        on_bad_row: stop at a file that cannot be used, or skip it.
        encode: gives the tokens of pairs at a size, as from a cache; by default they are made, on disk while in use.
        steps: of each fit; see `fit_heads`.
        say: told how far it is.

    Returns:
        mIoU, pixel accuracy and mean recall of each head at each size; the tallies (n, 3, classes) are by id. And a
        sentence for each file that was skipped.

    Raises:
        ProbeError: the settings, or the data as a whole, allow no measurement.
        DataError: a file cannot be used and `on_bad_row` says stop.
    """
    if odd := [h for h in heads if h not in KINDS] or (not heads and ["none"]):
        raise ProbeError(f"head {odd[0]!r} is not known; give {' or '.join(KINDS)}, or both.")
    if on_bad_row not in ("stop", "skip"):
        raise ProbeError(f"on_bad_row is {on_bad_row!r}: it is stop or skip.")
    sizes = _sizes(model, image_processor, image_px)
    ignored = data.ignored if ignore_ids is None else frozenset(ignore_ids)
    skipped = list(data.unpaired)
    fitted_on: tuple[Split, ...] = ("train", "validation")
    parts = {split: _check(data, split, ignored, on_bad_row, skipped) for split in fitted_on}
    pairs = [p for part in parts.values() for p in part.pairs]
    named = max(names) + 1 if names else None
    classes = classes or named or data.classes or 1 + max(part.highest for part in parts.values())
    rows = range(len(parts["train"].pairs)), range(len(parts["train"].pairs), len(pairs))

    def tokens_of(some: Sequence[Pair], px: int, folder: str) -> Rows:
        return encode(some, px) if encode else encode_pairs(model, image_processor, some, px, folder, log)

    fitted: dict[int, list[tuple[Setting, Head]]] = {}
    durations: dict[int, float] = {}
    commonest = 0
    for px in sizes:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="pivot-segment-") as scratch:
            tokens = tokens_of(pairs, px, scratch)
            labels, counts = _labels(pairs, px, classes, ignored, scratch)
            fitted[px] = _choose(heads, tokens, labels, rows, classes, seed, model.device, steps, log)
            commonest = int(counts.argmax())
            del tokens, labels
        durations[px] = time.monotonic() - started

    # From here on nothing is chosen: the part that is reported is opened for the first time.
    test = _check(data, "test", ignored, on_bad_row, skipped)
    digest = hashlib.sha256("".join([*(p.sha256 for p in parts.values()), test.sha256]).encode()).hexdigest()
    results: list[ProbeResult] = []
    for px, chosen in fitted.items():
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="pivot-segment-") as scratch:
            tokens = tokens_of(test.pairs, px, scratch)
            example_scores = _score([head for _, head in chosen], tokens, test.pairs, classes, ignored)
            del tokens
        if not example_scores[0][:, 2].any():
            raise ProbeError(f"{data.name}: no pixel of {data.reported} counts; are its masks empty, or all ignored?")
        duration = durations[px] + time.monotonic() - started
        for (setting, _), tallied in zip(chosen, example_scores, strict=True):
            for metric in METRICS:
                results.append(
                    measure(
                        f"segmentation/{data.name}/{setting.kind}/{px}px",
                        metric,
                        tallied,
                        protocol=_protocol(setting, px, tokens_side(model, px), ignored, metric, tallied, commonest),
                        seed=seed,
                        duration_s=duration,
                        split=data.reported,
                        data_sha256=digest,
                        **conditions,
                    )
                )
    return results, skipped


def per_class(example_scores: np.ndarray, names: Mapping[int, str] | None = None) -> list[dict[str, Any]]:
    """What each class adds to the means: its id, name, true pixels, IoU and recall in percent.

    Args:
        tallies: (n, 3, classes) of a result.
        names: of ids.

    Returns:
        One entry for each class that is in the masks or was predicted; recall is None where no pixel is of it.
    """
    hit, predicted, true = example_scores.sum(0, dtype=np.int64)
    return [
        {
            "id": int(i),
            "name": (names or {}).get(int(i), str(i)),
            "pixels": int(true[i]),
            "iou": round(100 * float(hit[i] / (true[i] + predicted[i] - hit[i])), 2),
            "recall": round(100 * float(hit[i] / true[i]), 2) if true[i] else None,
        }
        for i in np.flatnonzero(true + predicted)
    ]


def encode_pairs(
    model: FeatureModel,
    image_processor: Any,
    pairs: Sequence[Pair],
    image_px: int,
    folder: str | Path,
    log: Say = lambda line: None,
) -> np.ndarray:
    """Patch tokens of images squashed to a square: (N, H*W, D) float32, in a file that is mapped, not held.

    Raises:
        DataError: an image cannot be decoded.
        ProbeError: features are not finite, or the folder's disk is too small for them.
    """
    file, made = Path(folder) / "tokens.npy", np.zeros(0)
    began = said = time.monotonic()
    for start in range(0, len(pairs), ENCODE_BATCH):
        some = pairs[start : start + ENCODE_BATCH]
        tokens = _tokens(model, image_processor, [p.open_image() for p in some], image_px)
        if (bad := ~np.isfinite(tokens).all(axis=(1, 2))).any():
            raise ProbeError(
                f"the encoder's features of {some[int(bad.argmax())].name} are not finite; check its weights, or run "
                "it in float32."
            )
        if not start:
            needed = tokens[0].nbytes * len(pairs)
            if needed > shutil.disk_usage(folder).free:
                raise ProbeError(
                    f"features of {len(pairs)} images at {image_px} px take {needed / 1e9:.1f} GB, more than is free "
                    "in the temporary folder; set TMPDIR to a larger disk."
                )
            made = np.lib.format.open_memmap(file, "w+", np.float32, (len(pairs), *tokens.shape[1:]))
        made[start : start + len(some)] = tokens
        if time.monotonic() - said > 10:
            said = time.monotonic()
            done = start + len(some)
            rate = done / (said - began)
            left = (len(pairs) - done) / rate
            log(f"features at {image_px} px: {done}/{len(pairs)} images, {rate:.1f}/s, {left:.0f} s left")
    return made


def cached_encode(
    model: Any, image_processor: Any, metadata: dict[str, Any], cache: Path, progress: Progress
) -> Encode:
    """Tokens that are kept on disk, for `segment_masks`: computed once, and a stopped run goes on.

    Args:
        model, image_processor: of the probe.
        facts: encoder and encoder_sha256.
        cache: folder of the tokens.
        progress: called after every batch.
    """

    def encode(pairs: Sequence[Pair], px: int) -> Rows:
        sized = _AtSize(model, px), _Squashed(image_processor, px)
        values, _, bad = cached_values(
            *sized, _PairImages(pairs), metadata, tokens=True, cache=cache, batch=ENCODE_BATCH, progress=progress
        )
        if bad:
            raise DataError(bad[0])
        return values

    return encode


class _AtSize:
    """An encoder that takes images of one size, by interpolated positions where that is not its own."""

    def __init__(self, model: Any, px: int) -> None:
        known = model.config
        self._model, self._options = model, {} if px == known.image_size else {"interpolate_pos_encoding": True}
        self.device, self.dtype = model.device, model.dtype
        self.config = SimpleNamespace(
            image_size=px, patch_size=known.patch_size, hidden_size=known.hidden_size, pivot=known.pivot
        )

    def __call__(self, pixels: torch.Tensor) -> Any:
        return self._model(pixels, **self._options)


class _Squashed:
    """An image processor that takes whole images to a square of one size."""

    def __init__(self, processor: Any, px: int) -> None:
        self._processor, self._px = processor, px

    def __call__(self, images: Sequence[Image.Image], return_tensors: str) -> Any:
        # Resized here, by the processor's filter, because processors differ in how they are told a size, and some crop.
        squares = [image.resize((self._px, self._px), self._processor.resample) for image in images]
        return self._processor(images=squares, do_resize=False, do_center_crop=False, return_tensors=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        return {**self._processor.to_dict(), "squashed_px": self._px}


@dataclass(frozen=True)
class _PairImages:
    """The images of pairs, as features are made of."""

    pairs: Sequence[Pair]

    @cached_property
    def names(self) -> Sequence[str]:  # asked for at every image
        return [f"{i}: {pair.name}" for i, pair in enumerate(self.pairs)]

    def open(self, index: int) -> Image.Image:
        return self.pairs[index].open_image()

    def stamp(self) -> str:
        return hashlib.sha256(repr([pair.image.stamp() for pair in self.pairs]).encode()).hexdigest()


def tokens_side(model: FeatureModel, image_px: int) -> int:
    """Patches along a side of an image."""
    return int(image_px // model.config.patch_size)


@torch.no_grad()
def _tokens(model: FeatureModel, image_processor: Any, images: Sequence[Image.Image], px: int) -> np.ndarray:
    pixels = _Squashed(image_processor, px)(images, "pt")["pixel_values"].to(model.device)
    tokens: np.ndarray = _AtSize(model, px)(pixels).last_hidden_state.float().cpu().numpy()
    return tokens


def _sizes(model: FeatureModel, image_processor: Any, image_px: Sequence[int] | None) -> list[int]:
    """Sides of images that the encoder takes, each tried on a blank image before any file is opened."""
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
                made = model(blank, **({} if px == own else {"interpolate_pos_encoding": True})).last_hidden_state
            if made.shape[1] != tokens_side(model, px) ** 2:
                raise ValueError(f"it gives {made.shape[1]} tokens for {tokens_side(model, px) ** 2} patches")
        except (ValueError, RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise ProbeError(f"the encoder takes no images of {px} px ({reason}); its own size is {own}.") from error
    return sizes


@dataclass(frozen=True)
class _Part:
    """Pairs that can be used, the highest id in their masks, and a hash of their names and ids."""

    pairs: list[Pair]
    highest: int
    sha256: str


def _check(data: MaskData, split: Split, ignored: Iterable[int], on_bad_row: str, skipped: list[str]) -> _Part:
    """Open every image and mask of a part once."""
    good, highest, made = [], -1, hashlib.sha256()
    for pair in data.parts[split]:
        try:
            image, ids = pair.open_image(), pair.open_ids()
            if image.size != ids.shape[::-1]:
                raise DataError(
                    f"mask {pair.mask} is {ids.shape[1]} x {ids.shape[0]} px, its image {image.width} x "
                    f"{image.height}; scale one to the other, a mask without blending ids."
                )
        except DataError as error:
            if on_bad_row == "stop":
                raise
            skipped.append(str(error))
            continue
        counted = np.where(np.isin(ids, list(ignored)), -1, ids)
        highest = max(highest, int(counted.max()))
        made.update(f"{pair.name} {ids.shape}\n".encode())
        made.update(counted.astype("<i4").tobytes())
        good.append(pair)
    if not good:
        raise ProbeError(f"{data.name}: no image of the {split} part can be used; mend the files that were skipped.")
    return _Part(good, highest, made.hexdigest())


def _labels(
    pairs: Sequence[Pair], px: int, classes: int, ignored: Iterable[int], folder: str
) -> tuple[np.ndarray, np.ndarray]:
    """Class ids under the centres of a square grid, and how many there are of each.

    Returns:
        (N, side, side) int32 in a mapped file, -1 where ignored; (classes,).
    """
    side = px // LABEL_STRIDE
    made = np.lib.format.open_memmap(Path(folder) / "labels.npy", "w+", np.int32, (len(pairs), side, side))
    counts = np.zeros(classes, np.int64)
    for i, pair in enumerate(pairs):
        ids = ids_within(pair.open_ids(), classes, ignored, pair.name)
        rows, columns = (((np.arange(side) + 0.5) * length / side).astype(int) for length in ids.shape)
        made[i] = ids[np.ix_(rows, columns)]
        counts += np.bincount(made[i][made[i] >= 0], minlength=classes)
    return made, counts


def _choose(
    kinds: Sequence[str],
    tokens: Rows,
    labels: Rows,
    rows: tuple[Sequence[int], Sequence[int]],
    classes: int,
    seed: int,
    device: torch.device,
    steps: int | None,
    log: Say,
) -> list[tuple[Setting, Head]]:
    """The best setting of each kind on validation, and its head fitted on train and validation."""
    train, validation = rows
    candidates = [Setting(k, rate, decay) for k in kinds for rate in RATES for decay in DECAYS]
    scale = scale_of(tokens, train)
    log(f"heads: {len(candidates)} candidates on {len(train)} images")
    made = fit_heads(candidates, tokens, labels, train, scale, seed, device, steps, log)
    score = {
        setting: float(mean_iou(label_tallies(head, tokens, labels, validation, classes).sum(0)[None])[0])
        for setting, head in zip(candidates, made, strict=True)
    }
    best = [max((s for s in candidates if s.kind == kind), key=lambda s: score[s]) for kind in kinds]
    log("heads: chosen " + ", ".join(f"{s.kind} rate {s.rate:g}, decay {s.decay:g}" for s in best))
    both = [*train, *validation]
    again = fit_heads(best, tokens, labels, both, scale_of(tokens, both), seed, device, steps, log)
    return list(zip(best, again, strict=True))


def _score(
    heads: Sequence[Head], tokens: Rows, pairs: Sequence[Pair], classes: int, ignored: Iterable[int]
) -> list[np.ndarray]:
    """Tallies (n, 3, classes) of each head at the masks' own pixels."""
    example_scores: list[list[np.ndarray]] = [[] for _ in heads]
    for i, pair in enumerate(pairs):
        truth = ids_within(pair.open_ids(), classes, ignored, pair.name)
        shown = np.ascontiguousarray(tokens[np.array([i])])
        for made, head in zip(example_scores, heads, strict=True):
            made.append(tally(head.predict(shown, (truth.shape[0], truth.shape[1]))[0], truth, classes))
    return [np.stack(made) for made in example_scores]


def _protocol(
    setting: Setting,
    px: int,
    side: int,
    ignored: Iterable[int],
    metric: str,
    example_scores: np.ndarray,
    commonest: int,
) -> str:
    """How, in one line, with what naming one class everywhere would score: the class most of the fitted pixels are."""
    hit, predicted, true = example_scores.sum(0, dtype=np.float64)
    hit, predicted = np.zeros_like(hit), np.zeros_like(predicted)
    hit[commonest], predicted[commonest] = true[commonest], true.sum()
    alone = 100 * float(statistic_of(metric)(np.stack([hit, predicted, true])[None])[0])
    head = "linear head" if setting.kind == "linear" else "2-layer head"
    left_out = f"; ids {', '.join(map(str, sorted(ignored)))} ignored" if ignored else ""
    return (
        f"{head} on {side} x {side} patch tokens, images squashed to {px} px, logits upsampled to the mask; rate "
        f"{setting.rate:g}, decay {setting.decay:g} by validation{left_out}; the commonest class alone {alone:.1f}"
    )
