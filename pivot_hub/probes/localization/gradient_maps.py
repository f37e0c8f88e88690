"""Localisation: do gradient maps of an answer lie on the object that the answer is about?

The targets are objects of the synthetic Shapes dataset, or classes in images with boxes or masks.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from pivot_hub.config.data_section import OnBadRow
from pivot_hub.data.boxes_and_masks import AnnotatedImage, read_annotated_images
from pivot_hub.data.image import open_image
from pivot_hub.data.synthetic import Pair, RenderedScene
from pivot_hub.encoder.device import compute_device
from pivot_hub.errors import ProbeError
from pivot_hub.explain.gradcam import EXPLAINS, METHODS, AnsweredImage, Explain, enlarge, gradient_maps
from pivot_hub.explain.image_maps import seen_mask
from pivot_hub.metrics.energy_inside.energy_inside import energy_inside
from pivot_hub.metrics.pointing_accuracy.pointing_accuracy import points_at
from pivot_hub.mllm.build import randomise_vision
from pivot_hub.mllm.families import family_of
from pivot_hub.mllm.load import load_mllm
from pivot_hub.probes.result import ProbeResult, measure
from pivot_hub.provenance import state_sha256

THRESHOLDS = np.round(np.arange(0.05, 1.0, 0.05), 2)
BATCH = 8  # images in a forward and backward pass
FEWEST_IMAGES = 4  # one to choose the threshold on, three to test


@dataclass(frozen=True)
class Target:
    """A preference pair about one object whose mask (height, width) is known, and the rendered image.

    Args:
        pair: The preference pair.
        rendered: The image and the masks of its objects.
        image_name: Name of the image. Intervals are computed over images, and one image may have several targets.
        image_sha256: Hash of the image's file; empty for an image that its scene determines.
    """

    pair: Pair
    rendered: RenderedScene
    image_name: str = ""
    image_sha256: str = ""

    @property
    def mask(self) -> np.ndarray:
        assert self.pair.target is not None
        return self.rendered.masks[self.pair.target]


@dataclass(frozen=True)
class MapScores:
    """How well one map lies on a target.

    Args:
        peak_inside: Whether the peak of the map is on the target.
        energy_inside: Share of the map's sum on the target, from 0 to 1.
        iou: IoU of the thresholded map with the target, from 0 to 1.
        area: Share of the image that the target covers, which is the energy inside of an even map.
    """

    peak_inside: bool
    energy_inside: float
    iou: float
    area: float


def score_map(grid: np.ndarray, mask: np.ndarray, threshold: float = 0.5) -> MapScores:
    """Score one map against a true mask in the same way as `localize`.

    Args:
        grid: (H, W) map without negative values.
        mask: (height, width) bool mask of the target.
        threshold: Share of the map's peak, from THRESHOLDS, above which a cell counts for the IoU.
    """
    heat = enlarge(grid, mask.shape)
    return MapScores(
        peak_inside=bool(points_at(heat, mask)),
        energy_inside=float(energy_inside(heat, mask)),
        iou=float(overlaps(heat, mask)[np.searchsorted(THRESHOLDS, threshold)]),
        area=float(mask.mean()),
    )


@dataclass(frozen=True)
class Wording:
    """Templates of the question and the answers about a class in an image, with {name} and its {article}."""

    question: str = "Is there {article} {name}?"
    answer: str = "Yes, there is {article} {name}."
    rejected: str = "No, there is no {name}."

    def pair(self, name: str) -> Pair:
        """Fill the templates for one class.

        Raises:
            ProbeError: A template contains another field.
        """
        words = {"name": name, "article": "an" if name[:1].lower() in "aeiou" else "a"}
        try:
            question, answer, rejected = (t.format(**words) for t in (self.question, self.answer, self.rejected))
        except (KeyError, IndexError, ValueError) as error:
            raise ProbeError(f"a template of {self} cannot be filled ({error!r}): use {{name}}, {{article}}.") from None
        return Pair("presence", "question", question, answer, rejected, target=0)


def localize(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    reference: PreTrainedModel | None,
    targets: Mapping[str, Iterable[Target]],
    conditions: dict[str, Any],
    seed: int = 0,
    task: str = "shapes",
    explains: Sequence[Explain] = EXPLAINS,
    about: str = "",
) -> list[ProbeResult]:
    """Score Grad-CAM and the paper's gradient map against true masks, for each quantity that is explained.

    Pointing accuracy: the peak of the map lies on the target. Energy inside: the share of the map's sum on the target.
    IoU: the overlap of the target with the map above a share of its peak; the share is chosen on validation. Values
    are means over targets, intervals are over images.

    Args:
        model: The MLLM whose maps are scored.
        processor: Processor of the MLLM.
        reference: The frozen parent, for the DPO loss.
        targets: Targets of `validation` and `test`; each is read once.
        conditions: Fields of the results: encoder, encoder_sha256, feature_layer, partner.
        seed: Seed of the bootstrap.
        task: Name that the tasks of the results begin with.
        explains: Quantities to explain.
        about: Description of the targets in the protocol of the results.

    Raises:
        ProbeError: A part has no target.
    """
    started = time.monotonic()
    kinds = [(explain, method) for explain in explains for method in METHODS]
    scores = _ScoredTargets()
    for split, split_targets in targets.items():
        remaining = iter(split_targets)
        while batch := list(islice(remaining, BATCH)):
            for target, rows in zip(batch, _scores(model, processor, reference, batch, explains), strict=True):
                scores.add(split, target, rows)
    for split in ("validation", "test"):
        if not scores.rows.get(split):
            raise ProbeError(f"{task}: there is no {split} target to localise; give more images.")
    validation, test = np.stack(scores.rows["validation"]), np.stack(scores.rows["test"])
    area = 100 * float(np.mean(scores.areas))
    about = about and f"; {len(test)} targets, {about}"
    fields = {**conditions, "data_sha256": scores.digest.hexdigest()}
    fields |= {"seed": seed, "duration_s": (time.monotonic() - started) / len(kinds)}
    results = []
    for i, (explain, method) in enumerate(kinds):
        best = int(validation[:, i, 2:].mean(0).argmax())
        iou_protocol = f"map above {THRESHOLDS[best]:g} of its peak, chosen on validation; whole image {area:.1f}"
        for metric, column, protocol in (
            ("pointing_accuracy", 0, f"peak on the target; chance {area:.1f}"),
            ("energy_inside", 1, f"share on the target; uniform map {area:.1f}"),
            ("iou", 2 + best, iou_protocol),
        ):
            example_scores = _by_image(test[:, i, column], scores.images["test"])
            name = f"{task}/localisation/{method} of {explain}"
            results.append(measure(name, metric, example_scores, protocol=protocol + about, **fields))
    return results


class _ScoredTargets:
    """Scores of targets, collected split by split.

    Attributes:
        rows: For each split, one array per target: (explained x method, 2 + thresholds) pointing, energy and IoU at
            each threshold.
        images: For each split, the name of each target's image.
        areas: Share of the image that each test target covers.
        digest: Hash of all targets.
    """

    def __init__(self) -> None:
        self.rows: dict[str, list[np.ndarray]] = {}
        self.images: dict[str, list[str]] = {}
        self.areas: list[float] = []
        self.digest = hashlib.sha256()

    def add(self, split: str, target: Target, rows: np.ndarray) -> None:
        """Add the scores of one target."""
        images = self.images.setdefault(split, [])
        self.rows.setdefault(split, []).append(rows)
        images.append(target.image_name or f"{len(images):08}")
        if split == "test":
            self.areas.append(float(target.mask.mean()))
        texts = (split, target.image_name, target.pair.question, target.pair.chosen, target.pair.rejected)
        self.digest.update("\0".join(texts).encode() + np.packbits(target.mask).tobytes())
        self.digest.update(target.image_sha256.encode())


@dataclass(frozen=True)
class LabelFiles:
    """Labels of a folder of images, as `read_annotated_images` takes them.

    Args:
        boxes: Folder of YOLO label files, or a COCO JSON file.
        masks: Folder of id masks.
        names: YAML file with the names of ids; found beside the labels by default.
        ignore: Ids of masks that are no class.
        on_bad_row: Whether a bad image or label raises an error, or the image is skipped and reported.
    """

    boxes: Path | None = None
    masks: Path | None = None
    names: Path | None = None
    ignore: Sequence[int] = (255,)
    on_bad_row: OnBadRow = OnBadRow.STOP


def localize_folder(
    checkpoint: Path,
    folder: Path,
    labels: LabelFiles = LabelFiles(),
    explains: Sequence[str] = ("answer",),
    reference: Path | None = None,
    wording: Wording = Wording(),
    limit: int | None = None,
    seed: int = 0,
    name: str | None = None,
    random_vision: bool = False,
) -> tuple[list[ProbeResult], list[str]]:
    """Score the maps of an MLLM on a folder of images with boxes, polygons or id masks.

    A target is a class in an image: the union of its instances. A quarter of the images, drawn by the seed, is used to
    choose the thresholds; the others are scored. The processor resizes or crops a mask in the same way as its image.

    Args:
        checkpoint: Folder of the MLLM.
        folder: Folder of the images.
        labels: Where the labels are, and what to do with bad ones.
        explains: Quantities to explain: answer, sft, dpo.
        reference: Folder of the parent, for dpo.
        wording: Templates of the question and the answers.
        limit: Number of images, drawn by the seed; all by default.
        seed: Seed of the split, the bootstrap and random weights.
        name: Name of the encoder in the results; the checkpoint's name by default.
        random_vision: Whether to give the vision tower random weights first. Such results are the floor that trained
            weights are compared with.

    Returns:
        The results, and one error message for each image or target that was left out.

    Raises:
        DataError: Images or labels are bad; the message names the file and the line.
        ProbeError: There are too few images, or an unknown quantity is to be explained.
    """
    unknown = [e for e in explains if e not in EXPLAINS]
    if unknown or not explains:
        raise ProbeError(f"explain is {','.join(explains)!r}: give one or more of {', '.join(EXPLAINS)}.")
    if "dpo" in explains and reference is None:
        raise ProbeError("the dpo loss compares two answers under two models: give --reference.")
    wording.pair("object")  # raises for a bad template before anything is loaded
    on_bad_row = OnBadRow.parse(labels.on_bad_row)
    images, left_out = read_annotated_images(
        folder, labels.boxes, labels.masks, labels.names, labels.ignore, on_bad_row
    )
    order = np.random.default_rng(seed).permutation(len(images))[:limit]
    if len(order) < FEWEST_IMAGES:
        raise ProbeError(f"{folder}: {len(order)} image(s) with labels; give at least {FEWEST_IMAGES}.")
    drawn = [images[i] for i in order]
    model, processor = load_mllm(checkpoint)
    parent = None if reference is None else load_mllm(reference)[0].eval()
    family = family_of(model.config)
    if random_vision:
        randomise_vision(model, seed)  # on the CPU, whose random numbers are the same on every machine
    for each in (model, parent):
        if each is not None:
            cast(torch.nn.Module, each).to(compute_device())
    conditions = {
        "feature_layer": family.feature_layer(model.config),
        "encoder": name or checkpoint.absolute().name,
        "encoder_sha256": state_sha256(getattr(model.model, family.tower)),
        "partner": "/".join(checkpoint.absolute().parts[-2:]),
    }
    quarter = len(drawn) // 4
    targets = {
        "validation": image_targets(drawn[:quarter], model.config, processor, wording, left_out),
        "test": image_targets(drawn[quarter:], model.config, processor, wording, left_out),
    }
    about = f"{'masks' if labels.masks else 'boxes'}, {wording.question!r}, {quarter} images for validation"
    task = folder.absolute().name
    ordered = [e for e in EXPLAINS if e in explains]
    return localize(model.eval(), processor, parent, targets, conditions, seed, task, ordered, about), left_out


def image_targets(
    images: Sequence[AnnotatedImage],
    config: PreTrainedConfig,
    processor: ProcessorMixin,
    wording: Wording,
    left_out: list[str],
) -> Iterator[Target]:
    """Yield a target for each class of each image, with its mask as the encoder sees it.

    Args:
        images: Labelled images; each is read when it is reached.
        config: Config of the MLLM.
        processor: Processor of the MLLM.
        wording: Templates of the question and the answers.
        left_out: List that receives an error message for each target that is cropped away, or smaller than a pixel of
            what the encoder sees.
    """
    for labelled in images:
        image = open_image(labelled.file, labelled.name)
        digest = hashlib.sha256(labelled.file.read_bytes()).hexdigest()
        for name, region in sorted(labelled.regions.items()):
            mask = seen_mask(config, processor, region())
            if not mask.any():
                left_out.append(
                    f"{labelled.name}: {name} is smaller than a pixel of what the encoder sees, or outside."
                )
                continue
            rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
            box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            yield Target(wording.pair(name), RenderedScene(image, mask[None], box[None]), labelled.name, digest)


def overlaps(heat: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Compute the IoU of a target with a map above each of THRESHOLDS of its peak: (thresholds,).

    A map that is zero everywhere has no overlap.
    """
    if heat.max() <= 0:
        return np.zeros(len(THRESHOLDS))
    above = heat[None] >= THRESHOLDS[:, None, None] * heat.max()
    return (above & mask).sum((1, 2)) / (above | mask).sum((1, 2))


def _scores(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    reference: PreTrainedModel | None,
    targets: Sequence[Target],
    explains: Sequence[Explain],
) -> np.ndarray:
    """Score the maps of targets: (targets, explained x method, 2 + thresholds) pointing, energy, IoU by threshold."""
    answered = [
        AnsweredImage(target.rendered.image, target.pair.question, target.pair.chosen, target.pair.rejected)
        for target in targets
    ]
    scores: list[list[list[float]]] = [[] for _ in targets]
    for explain in explains:
        explanations = gradient_maps(model, processor, answered, explain, reference)
        for rows, target, explanation in zip(scores, targets, explanations, strict=True):
            mask = target.mask
            heats = [enlarge(explanation.maps[method], mask.shape) for method in METHODS]
            rows += [[points_at(h, mask), energy_inside(h, mask), *overlaps(h, mask)] for h in heats]
    return np.array(scores)


def _by_image(scores: np.ndarray, images: Sequence[str]) -> np.ndarray:
    """Sum and count the scores of each image, in order of the images' names: (images, 2)."""
    _, positions = np.unique(images, return_inverse=True)
    return np.stack([np.bincount(positions, scores), np.bincount(positions)], axis=1)
