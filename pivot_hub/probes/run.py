"""Run the probes of an encoder, and of the MLLM it came from, on the synthetic Shapes dataset or on other data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, ProcessorMixin

from pivot_hub.config.data_section import OnBadRow
from pivot_hub.config.encoder_names import resolve_encoder
from pivot_hub.data.synthetic import (
    KINDS,
    SCAN_SIDE,
    SPLITS,
    Form,
    Pair,
    Question,
    RenderedScene,
    Scene,
    ShapesDataset,
    Split,
)
from pivot_hub.encoder import PivotVisionConfig
from pivot_hub.encoder.device import compute_device
from pivot_hub.encoder.encode import DTYPES
from pivot_hub.encoder.encoding_run import Progress
from pivot_hub.encoder.feature_model import FeatureModel
from pivot_hub.encoder.repository import encoder_metadata, read_encoder
from pivot_hub.encoder.share import wait_for_all
from pivot_hub.errors import CheckpointError, ProbeError
from pivot_hub.mllm.families import family_of
from pivot_hub.probes.classification.labelled_images import open_classes
from pivot_hub.probes.classification.protocols import PROTOCOLS, cache_shares, classify_images, classify_shapes
from pivot_hub.probes.features import EncodingOptions, patch_features, pooled
from pivot_hub.probes.fixed_grid import FixedGrid, scene_px
from pivot_hub.probes.localization.gradient_maps import Target, localize
from pivot_hub.probes.result import ProbeResult, read_results
from pivot_hub.probes.segmentation.synthetic import class_masks, segment_patches
from pivot_hub.probes.vqa.synthetic import answer_questions
from pivot_hub.provenance import cached_commit, weights_sha256

FIRST_SCENE = 5_000_000  # first probe scene of every split: no recipe trains on scenes from here on


@dataclass(frozen=True)
class Sizes:
    """Number of scenes that each probe uses."""

    train: int = 1200
    validation: int = 400
    test: int = 1000
    questions: int = 600
    targets_validation: int = 40
    targets_test: int = 120
    harder: int = 500  # of each harder dataset
    pairs: int = 400


EXPORT_SIZES = Sizes(train=600, validation=200, test=600)


@dataclass(frozen=True)
class Scenes:
    """Scenes of one split with their rendered images."""

    scenes: list[Scene]
    rendered: list[RenderedScene]


@lru_cache(maxsize=16)
def probe_scenes(dataset: ShapesDataset, split: Split, count: int) -> Scenes:
    """Return the scenes of a split that probes use, rendered once per process."""
    scenes = [dataset.scene(split, FIRST_SCENE + i) for i in range(count)]
    return Scenes(scenes, [s.render() for s in scenes])


def probe_shapes(
    model: FeatureModel,
    image_processor: Any,
    name: str,
    sha256: str,
    sizes: Sizes = Sizes(),
    seed: int = 0,
    dataset: ShapesDataset | None = None,
    harder: Mapping[str, ShapesDataset] = {},
) -> list[ProbeResult]:
    """Run classification and segmentation on the synthetic Shapes dataset, for an encoder alone.

    Args:
        model: The encoder.
        image_processor: Image processor of the encoder.
        name: Name of the encoder in the results.
        sha256: Hash of the encoder's weights.
        sizes: Number of scenes that each probe uses.
        seed: Seed of the sampling and of the bootstrap.
        dataset: Dataset that the probes are fitted and tested on; by default the standard one in the size of
            `scene_px`, which the protocol of each result gives for a tower of native resolution.
        harder: Harder datasets by name; the same fitted probes are also tested on their test scenes.
    """
    is_native = model.config.image_size is None
    dataset = ShapesDataset(image_px=scene_px(model.config)) if dataset is None else dataset
    about = ""
    if is_native:
        model = FixedGrid(model, image_processor, dataset.image_px)
        about = f"; scenes of {dataset.image_px} px, {model.side} x {model.side} tokens at native resolution"
    parts: dict[str, Scenes] = {split: probe_scenes(dataset, split, getattr(sizes, split)) for split in SPLITS}
    parts |= {other: probe_scenes(shapes, "test", sizes.harder) for other, shapes in harder.items()}
    tokens = {
        key: patch_features(model, image_processor, (r.image for r in part.rendered)) for key, part in parts.items()
    }
    counts: dict[str, int] = {split: getattr(sizes, split) for split in SPLITS}
    conditions = {
        "feature_layer": model.config.pivot["feature_layer"],
        "encoder": name,
        "encoder_sha256": sha256,
        "data_sha256": _scenes_sha256(dataset, counts),
    }
    scenes = {key: part.scenes for key, part in parts.items()}
    results = classify_shapes({s: pooled(t) for s, t in tokens.items()}, scenes, conditions, seed)
    masks = {key: class_masks(part.scenes, part.rendered) for key, part in parts.items()}
    results += segment_patches(tokens, masks, conditions, seed)
    hashes = {other: _scenes_sha256(shapes, {**counts, "harder": sizes.harder}) for other, shapes in harder.items()}
    return [
        replace(r, data_sha256=hashes.get(r.task.split("/")[1], r.data_sha256), protocol=r.protocol + about)
        for r in results
    ]


def probe_export(model: FeatureModel, image_processor: Any, name: str, sha256: str) -> list[ProbeResult]:
    """Probe one format of an exported encoder, on fewer scenes than the encoder itself."""
    return probe_shapes(model, image_processor, name, sha256, EXPORT_SIZES)


def probe_mllm(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    reference: PreTrainedModel,
    name: str,
    sha256: str,
    partner: str,
    sizes: Sizes = Sizes(),
    seed: int = 0,
) -> list[ProbeResult]:
    """Score gradient maps and answers to held-out questions, for an encoder inside its MLLM.

    Args:
        model: The MLLM.
        processor: Processor of the MLLM.
        reference: The frozen parent, for the DPO loss.
        name: Name of the encoder in the results.
        sha256: Hash of the encoder's weights.
        partner: Name of the MLLM in its recipe.
        sizes: Number of scenes that each probe uses.
        seed: Seed of the bootstrap.
    """
    model.eval()
    dataset = ShapesDataset(image_px=scene_px(PivotVisionConfig(model.config.vision_config)))
    counts = {k: getattr(sizes, k) for k in ("questions", "targets_validation", "targets_test")}
    conditions = {
        "feature_layer": family_of(model.config).feature_layer(model.config),
        "encoder": name,
        "encoder_sha256": sha256,
        "partner": partner,
        "data_sha256": _scenes_sha256(dataset, counts),
    }
    targets = {
        "validation": probe_targets(dataset, "validation", sizes.targets_validation),
        "test": probe_targets(dataset, "test", sizes.targets_test),
    }
    results = localize(model, processor, reference, targets, conditions, seed)
    images, questions = probe_questions(dataset, "test", sizes.questions)
    return results + answer_questions(model, processor, questions, images, conditions, seed=seed)


def probe_language(name: str, sizes: Sizes = Sizes(), seed: int = 0) -> list[ProbeResult]:
    """Let a language model alone answer questions on scans of held-out scenes, to measure what it can read of them.

    Args:
        name: Folder or Hub name of the language model.
        sizes: Number of scenes that each probe uses.
        seed: Seed of the bootstrap.

    Raises:
        CheckpointError: The language model cannot be loaded.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: no language model can be loaded: {str(error).splitlines()[0]}") from error
    model.to(compute_device())  # type: ignore[arg-type]
    dataset = ShapesDataset()
    _, questions = probe_questions(dataset, "test", sizes.questions)
    scenes = probe_scenes(dataset, "test", sizes.questions).scenes
    scans = [s.scan(SCAN_SIDE, dataset.scene_rng("test", FIRST_SCENE + i, 5)) for i, s in enumerate(scenes)]
    path = Path(name)
    sha256 = weights_sha256(path) if path.is_dir() else str(cached_commit(str(path)))
    conditions = {"feature_layer": None, "encoder": "none", "encoder_sha256": sha256, "partner": name}
    return answer_questions(model, tokenizer, questions, scans, conditions, seed=seed)


def probe_questions(dataset: ShapesDataset, split: Split, count: int) -> tuple[list[Any], list[Question]]:
    """Return one question for each probe scene, taking the kinds in turn, and the images."""
    part = probe_scenes(dataset, split, count)
    questions = [
        scene.question(KINDS[i % len(KINDS)], dataset.scene_rng(split, FIRST_SCENE + i, 3))
        for i, scene in enumerate(part.scenes)
    ]
    return [r.image for r in part.rendered], questions


def probe_pairs(dataset: ShapesDataset, split: Split, count: int) -> tuple[list[Any], list[Pair]]:
    """Return one preference pair for each probe scene, taking the kinds and forms in turn, and the images."""
    part = probe_scenes(dataset, split, count)
    forms: tuple[Form, ...] = ("describe", "question")
    pairs = [
        scene.pair(KINDS[i % 5], forms[i // 5 % 2], dataset.scene_rng(split, FIRST_SCENE + i, 9))
        for i, scene in enumerate(part.scenes)
    ]
    return [r.image for r in part.rendered], pairs


def probe_targets(dataset: ShapesDataset, split: Split, count: int) -> Sequence[Target]:
    """Return one preference pair for each probe scene that is about one visible object, with the object's mask."""
    part = probe_scenes(dataset, split, count)
    targets = []
    for i, (scene, rendered) in enumerate(zip(part.scenes, part.rendered, strict=True)):
        rng = dataset.scene_rng(split, FIRST_SCENE + i, 4)
        pair = scene.pair(KINDS[i % 3], "question", rng)  # colour, shape, position
        targets.append(Target(pair, rendered))
    return targets


def probe_encoder(
    encoder: str,
    data: str = "shapes",
    seed: int = 0,
    on_bad_row: OnBadRow | str = OnBadRow.STOP,
    sizes: Sizes = Sizes(),
    protocols: Sequence[str] = PROTOCOLS[:-1],
    revision: str | None = None,
    encoding: EncodingOptions = EncodingOptions(),
    warn: Callable[[str], None] = lambda line: None,
    feature_layer: int | str | None = None,
) -> tuple[list[ProbeResult], list[str]]:
    """Probe an encoder by name, on the synthetic Shapes dataset or on labelled images.

    Args:
        encoder: Folder, Hub name or short name of the encoder; if it contains golden vectors, they are replayed first.
        data: `shapes`, or labelled images as `open_classes` takes them.
        seed: Seed of splits, samples and bootstrap.
        on_bad_row: Whether an image that cannot be decoded raises an error, or is skipped and reported.
        sizes: Number of scenes of the synthetic Shapes dataset that each probe uses.
        protocols: Classification protocols for labelled images, from PROTOCOLS.
        revision: Revision of a Hub data set.
        encoding: How labelled images are encoded.
        warn: Function that receives a warning if reported images are copies of train's.
        feature_layer: Hidden state to probe, see `PivotVisionModel.from_pretrained`; the repository's own by default.

    Returns:
        The results, and one error message for each image that was skipped. Of several processes, the first one fits the
        probes; the others return nothing once the images are encoded.

    Raises:
        CheckpointError: The encoder cannot be loaded, or gives other features than it was published with.
        DataError: An image cannot be decoded and `on_bad_row` is STOP.
        ProbeError: The data cannot be probed.
    """
    on_bad_row = OnBadRow.parse(on_bad_row)
    if encoding.dtype not in DTYPES:
        raise ProbeError(f"dtype {encoding.dtype!r} is not known; give one of {', '.join(DTYPES)}.")
    classes = None if data == "shapes" else open_classes(data, revision, seed)
    if classes is None and encoding.share.count > 1:
        raise ProbeError("several processes divide labelled images; run the probes of shapes in one process.")
    encoder = resolve_encoder(encoder)
    model, image_processor = read_encoder(encoder, feature_layer=feature_layer)
    model.to(compute_device(), DTYPES[encoding.dtype])  # type: ignore[arg-type]
    metadata = encoder_metadata(encoder)
    if classes is None:
        return probe_shapes(model, image_processor, metadata["encoder"], metadata["encoder_sha256"], sizes, seed), []
    if encoding.share.count > 1:
        cache_shares(model, image_processor, classes, metadata, protocols, encoding)
        wait_for_all()
        if encoding.share.number > 1:
            return [], []
    return classify_images(model, image_processor, classes, metadata, protocols, seed, on_bad_row, encoding, warn)


def probe_all(
    encoders: Sequence[str],
    data: str = "shapes",
    seed: int = 0,
    protocols: Sequence[str] = PROTOCOLS[:-1],
    progress: Progress = lambda done, total, rate: None,
    warn: Callable[[str], None] = lambda line: None,
) -> dict[str, list[ProbeResult]]:
    """Collect the results of several encoders by name: probed now, or read from a file that a probe wrote.

    Args:
        encoders: Folders or Hub names of encoders, or JSON files of results.
        data: Data that encoders are probed on, see `probe_encoder`.
        seed: Seed of splits, samples and bootstrap.
        protocols: Classification protocols for labelled images.
        progress: Function that is called after every batch of images.
        warn: Function that receives warnings, see `probe_encoder`.

    Raises:
        ProbeError: Two encoders have the same name.
    """
    by_name: dict[str, list[ProbeResult]] = {}
    for encoder in encoders:
        path = Path(encoder)
        if path.suffix == ".json":
            results = read_results(path)
        else:
            encoding = EncodingOptions(progress=progress)
            results, _ = probe_encoder(encoder, data, seed, protocols=protocols, encoding=encoding, warn=warn)
        name = results[0].encoder
        if name in by_name and path.suffix == ".json":
            name = path.stem
        if name in by_name:
            raise ProbeError(
                f"two encoders are named {name!r}; rename a folder or a file, so that a table can tell them apart."
            )
        by_name[name] = results
    return by_name


def _scenes_sha256(dataset: ShapesDataset, sizes: dict[str, int]) -> str:
    """Hash what determines the scenes: the dataset's settings, the first scene and the number of scenes."""
    return hashlib.sha256(json.dumps([dataset.to_dict(), FIRST_SCENE, sizes]).encode()).hexdigest()
