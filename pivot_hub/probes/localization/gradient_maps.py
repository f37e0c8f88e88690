"""Localisation: do gradient maps of an answer sit on the thing it is about, in the built-in world and in photos?"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from pivot_hub.data.boxes_and_masks import AnnotatedImage, read_annotated_images
from pivot_hub.data.image import open_image
from pivot_hub.data.synthetic import Pair, RenderedScene
from pivot_hub.errors import ProbeError
from pivot_hub.explain.gradcam import EXPLAINS, METHODS, Explain, enlarge, gradient_map, seen_mask
from pivot_hub.metrics.energy_inside.energy_inside import energy_inside
from pivot_hub.metrics.pointing_accuracy.pointing_accuracy import points_at
from pivot_hub.mllm.load import load_mllm
from pivot_hub.mllm.trainable import randomise_vision
from pivot_hub.probes.result import ProbeResult, measure
from pivot_hub.provenance import state_sha256

THRESHOLDS = np.round(np.arange(0.05, 1.0, 0.05), 2)
FEWEST_PHOTOS = 4  # one to choose the threshold on, three to test


@dataclass(frozen=True)
class Target:
    """A pair with its picture, about one thing whose mask (image_px, image_px) is known.

    `image` names the picture among others: intervals are over images, of which one may hold several targets.
    """

    pair: Pair
    picture: RenderedScene
    image: str = ""

    @property
    def mask(self) -> np.ndarray:
        assert self.pair.target is not None
        return self.picture.masks[self.pair.target]


@dataclass(frozen=True)
class MapScores:
    """How one map sits on a target: the peak on it or not, and shares from 0 to 1."""

    peak_inside: bool
    energy_inside: float
    iou: float
    area: float  # of the target: what an even map has inside


def score_map(grid: np.ndarray, mask: np.ndarray, threshold: float = 0.5) -> MapScores:
    """Score one map against a true mask, as `localize` scores many.

    Args:
        grid: (H, W), non-negative.
        mask: (px, px) bool.
        threshold: of THRESHOLDS, the share of its peak above which a cell counts for the IoU.
    """
    heat = enlarge(grid, len(mask))
    return MapScores(
        peak_inside=bool(points_at(heat, mask)),
        energy_inside=float(energy_inside(heat, mask)),
        iou=float(overlaps(heat, mask)[np.searchsorted(THRESHOLDS, threshold)]),
        area=float(mask.mean()),
    )


@dataclass(frozen=True)
class Wording:
    """What is asked and answered about a class in a photo: templates of {name} and its {article}."""

    question: str = "Is there {article} {name}?"
    answer: str = "Yes, there is {article} {name}."
    rejected: str = "No, there is no {name}."

    def pair(self, name: str) -> Pair:
        """Fill the templates for one class.

        Raises:
            ProbeError: a template asks for something else.
        """
        words = {"name": name, "article": "an" if name[:1].lower() in "aeiou" else "a"}
        try:
            question, answer, rejected = (t.format(**words) for t in (self.question, self.answer, self.rejected))
        except (KeyError, IndexError, ValueError) as error:
            raise ProbeError(f"a template of {self} cannot be filled ({error!r}): use {{name}}, {{article}}.") from None
        return Pair("presence", "question", question, answer, rejected, target=0)


def localize(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    reference: LlavaForConditionalGeneration | None,
    targets: Mapping[str, Iterable[Target]],
    conditions: dict[str, Any],
    seed: int = 0,
    task: str = "shapes",
    explains: Sequence[Explain] = EXPLAINS,
    about: str = "",
) -> list[ProbeResult]:
    """Score Grad-CAM and the paper's gradient map against true masks, for each thing explained.

    Pointing accuracy: the map's peak lies on the target. Energy: the share of the map's sum inside the target.
    IoU: of the map above a share of its peak with the target, the share chosen on validation. The mean is over
    targets, its interval over images.

    Args:
        model: the MLLM whose maps are scored.
        processor: its processor.
        reference: the frozen parent, for the DPO loss.
        targets: `validation` and `test`, each read once.
        conditions: encoder, encoder_sha256, feature_layer, partner of the results.
        seed: of the bootstrap.
        task: what the results are named after.
        explains: what is explained.
        about: what protocols say of the targets.

    Raises:
        ProbeError: a part has no target.
    """
    started, digest = time.monotonic(), hashlib.sha256()
    kinds = [(explain, method) for explain in explains for method in METHODS]
    rows: dict[str, list[np.ndarray]] = {}  # each (explained x method, pointing, energy, IoU at each threshold)
    images: dict[str, list[str]] = {}
    areas: list[float] = []
    for split, some in targets.items():
        rows[split], images[split] = [], []
        for target in some:
            scored = [s for e in explains for s in _scores(model, processor, reference, target, e)]
            rows[split].append(np.array(scored))
            images[split].append(target.image or f"{len(images[split]):08}")
            if split == "test":
                areas.append(float(target.mask.mean()))
            said = (split, target.image, target.pair.question, target.pair.chosen, target.pair.rejected)
            digest.update("\0".join(said).encode() + np.packbits(target.mask).tobytes())
    for split in ("validation", "test"):
        if not rows.get(split):
            raise ProbeError(f"{task}: there is no {split} target to localise; give more images.")
    validation, test = np.stack(rows["validation"]), np.stack(rows["test"])
    area = 100 * float(np.mean(areas))
    about = about and f"; {len(test)} targets, {about}"
    metadata = {**conditions, "data_sha256": digest.hexdigest()}
    metadata |= {"seed": seed, "duration_s": (time.monotonic() - started) / len(kinds)}
    results = []
    for i, (explain, method) in enumerate(kinds):
        best = int(validation[:, i, 2:].mean(0).argmax())
        chosen = f"map above {THRESHOLDS[best]:g} of its peak, chosen on validation; whole image {area:.1f}"
        for metric, column, protocol in (
            ("pointing_accuracy", 0, f"peak on the target; chance {area:.1f}"),
            ("energy_inside", 1, f"share on the target; uniform map {area:.1f}"),
            ("iou", 2 + best, chosen),
        ):
            example_scores = _by_image(test[:, i, column], images["test"])
            name = f"{task}/localisation/{method} of {explain}"
            results.append(measure(name, metric, example_scores, protocol=protocol + about, **metadata))
    return results


def localize_folder(
    checkpoint: Path,
    folder: Path,
    boxes: Path | None = None,
    masks: Path | None = None,
    names: Path | None = None,
    ignore: Sequence[int] = (255,),
    explains: Sequence[str] = ("answer",),
    reference: Path | None = None,
    wording: Wording = Wording(),
    limit: int | None = None,
    seed: int = 0,
    on_bad_row: str = "stop",
    name: str | None = None,
    random_vision: bool = False,
) -> tuple[list[ProbeResult], list[str]]:
    """Localise an MLLM's maps on a folder of photos with boxes, polygons or id masks.

    A target is a class of a photo, the union of its instances. A quarter of the photos, drawn by the seed, chooses the
    thresholds; the others are scored. A mask goes the photo's way through the processor, resized or cropped.

    Args:
        checkpoint: folder of the MLLM.
        folder: of photos; with boxes, masks, names, ignore and on_bad_row as `read_annotated_images` takes them.
        explains: of answer, sft, dpo.
        reference: folder of the parent, for dpo.
        wording: of question and answers.
        limit: how many photos, drawn by the seed; all by default.
        seed: of the split, the bootstrap and random weights.
        name: of the encoder in the results; the checkpoint's by default.
        random_vision: give the vision tower random weights first, the floor that trained ones are held against.

    Returns:
        The results, and a sentence for each photo or target that was left out.

    Raises:
        DataError: photos or labels are bad; the sentence names file and line.
        ProbeError: there are too few photos, or something unknown is to be explained.
    """
    unknown = [e for e in explains if e not in EXPLAINS]
    if unknown or not explains:
        raise ProbeError(f"explain is {','.join(explains)!r}: it is some of {', '.join(EXPLAINS)}.")
    if "dpo" in explains and reference is None:
        raise ProbeError("the dpo loss compares two answers under two models: give --reference.")
    wording.pair("thing")
    photos, left_out = read_annotated_images(folder, boxes, masks, names, ignore, on_bad_row)
    order = np.random.default_rng(seed).permutation(len(photos))[:limit]
    if len(order) < FEWEST_PHOTOS:
        raise ProbeError(f"{folder}: {len(order)} photo(s) with labels; give at least {FEWEST_PHOTOS}.")
    drawn = [photos[i] for i in order]
    model, processor = load_mllm(checkpoint)
    parent = None if reference is None else load_mllm(reference)[0].eval()
    if random_vision:
        randomise_vision(model, seed)
    metadata = {
        "feature_layer": model.config.vision_feature_layer,
        "encoder": name or checkpoint.absolute().name,
        "encoder_sha256": state_sha256(model.model.vision_tower),
        "partner": "/".join(checkpoint.absolute().parts[-2:]),
    }
    held = len(drawn) // 4
    parts = {
        "validation": photo_targets(drawn[:held], processor, wording, left_out),
        "test": photo_targets(drawn[held:], processor, wording, left_out),
    }
    about = f"{'masks' if masks else 'boxes'}, {wording.question!r}, {held} photos for validation"
    task = folder.absolute().name
    found = [e for e in EXPLAINS if e in explains]
    return localize(model.eval(), processor, parent, parts, metadata, seed, task, found, about), left_out


def photo_targets(
    photos: Sequence[AnnotatedImage], processor: LlavaProcessor, wording: Wording, left_out: list[str]
) -> Iterator[Target]:
    """A target for each class of each photo, its mask as the encoder sees it.

    Args:
        photos: read as they are reached.
        processor: of the MLLM.
        wording: of question and answers.
        left_out: gets a sentence for each target that is smaller than a pixel of what the encoder sees, or cropped.
    """
    for photo in photos:
        image = open_image(photo.file, photo.name)
        for name, region in sorted(photo.regions.items()):
            mask = seen_mask(processor, region())
            if not mask.any():
                left_out.append(f"{photo.name}: {name} is smaller than a pixel of what the encoder sees, or outside.")
                continue
            rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
            box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            yield Target(wording.pair(name), RenderedScene(image, mask[None], box[None]), photo.name)


def overlaps(heat: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """IoU of a target with a map above each of THRESHOLDS of its peak: (thresholds,).

    A map that is zero everywhere overlaps with nothing.
    """
    if heat.max() <= 0:
        return np.zeros(len(THRESHOLDS))
    above = heat[None] >= THRESHOLDS[:, None, None] * heat.max()
    return (above & mask).sum((1, 2)) / (above | mask).sum((1, 2))


def _scores(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    reference: LlavaForConditionalGeneration | None,
    target: Target,
    explain: Explain,
) -> list[list[float]]:
    """Pointing, energy and IoU at each threshold, of each method's map."""
    pair, mask = target.pair, target.mask
    made = gradient_map(
        model, processor, target.picture.image, pair.question, pair.chosen, explain, pair.rejected, reference
    )
    heats = [enlarge(made.maps[method], len(mask)) for method in METHODS]
    return [[points_at(h, mask), energy_inside(h, mask), *overlaps(h, mask)] for h in heats]


def _by_image(scores: np.ndarray, images: Sequence[str]) -> np.ndarray:
    """Sum and number of the scores of each image, in order of their names: (images, 2)."""
    _, place = np.unique(images, return_inverse=True)
    return np.stack([np.bincount(place, scores), np.bincount(place)], axis=1)
