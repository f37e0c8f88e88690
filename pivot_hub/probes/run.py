"""Run the probes: which scenes of the built-in world they are on, for an encoder and for the MLLM it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor

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
from pivot_hub.encoder.encode import DTYPES, Progress
from pivot_hub.encoder.feature_model import FeatureModel
from pivot_hub.encoder.repository import check_golden, encoder_metadata, read_encoder
from pivot_hub.errors import CheckpointError, ProbeError
from pivot_hub.mllm.load import image_px
from pivot_hub.probes.classification.labelled_images import open_classes
from pivot_hub.probes.classification.protocols import PROTOCOLS, classify_images, classify_shapes
from pivot_hub.probes.features import patch_features, pooled
from pivot_hub.probes.localization.gradient_maps import Target, localize
from pivot_hub.probes.result import ProbeResult, read_results
from pivot_hub.probes.segmentation.synthetic import class_masks, segment_patches
from pivot_hub.probes.vqa.synthetic import answer_questions
from pivot_hub.provenance import cached_commit, weights_sha256

FIRST_SCENE = 5_000_000  # of every split: no recipe trains on scenes from here on


@dataclass(frozen=True)
class Sizes:
    """How many scenes each probe takes."""

    train: int = 1200
    validation: int = 400
    test: int = 1000
    questions: int = 600
    targets_validation: int = 40
    targets_test: int = 120
    harder: int = 500  # of each harder world
    pairs: int = 400


EXPORT_SIZES = Sizes(train=600, validation=200, test=600)


@dataclass(frozen=True)
class Scenes:
    """Scenes of one split with their pictures."""

    scenes: list[Scene]
    pictures: list[RenderedScene]


@lru_cache(maxsize=16)
def probe_scenes(dataset: ShapesDataset, split: Split, count: int) -> Scenes:
    """The scenes that probes use of a split, drawn once a process."""
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
    """Classification and segmentation of the built-in world, for an encoder alone.

    Args:
        world: that the probes are fitted and tested on; the default one at the encoder's size if None.
        harder: worlds by name on whose test scenes the same fitted probes are tested too.
    """
    dataset = ShapesDataset(image_px=model.config.image_size) if dataset is None else dataset
    parts: dict[str, Scenes] = {split: probe_scenes(dataset, split, getattr(sizes, split)) for split in SPLITS}
    parts |= {other: probe_scenes(w, "test", sizes.harder) for other, w in harder.items()}
    tokens = {
        key: patch_features(model, image_processor, (p.image for p in part.pictures)) for key, part in parts.items()
    }
    counts: dict[str, int] = {split: getattr(sizes, split) for split in SPLITS}
    conditions = _conditions(model, name, sha256) | {"data_sha256": _world_sha256(dataset, counts)}
    scenes = {key: part.scenes for key, part in parts.items()}
    results = classify_shapes({s: pooled(t) for s, t in tokens.items()}, scenes, conditions, seed)
    masks = {key: class_masks(part.scenes, part.pictures) for key, part in parts.items()}
    results += segment_patches(tokens, masks, conditions, seed)
    hashes = {other: _world_sha256(w, {**counts, "harder": sizes.harder}) for other, w in harder.items()}
    return [replace(r, data_sha256=hashes.get(r.task.split("/")[1], r.data_sha256)) for r in results]


def probe_export(model: FeatureModel, image_processor: Any, name: str, sha256: str) -> list[ProbeResult]:
    """Probe one form of an exported encoder, on fewer scenes than the encoder itself."""
    return probe_shapes(model, image_processor, name, sha256, EXPORT_SIZES)


def probe_mllm(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    reference: LlavaForConditionalGeneration,
    name: str,
    sha256: str,
    partner: str,
    sizes: Sizes = Sizes(),
    seed: int = 0,
) -> list[ProbeResult]:
    """Localisation of gradient maps, and answers to held-out questions, for an encoder inside its MLLM.

    Args:
        reference: the frozen parent, for the DPO loss.
        name: of the encoder.
        sha256: of the encoder's weights.
        partner: the MLLM, as its recipe names it.
    """
    model.eval()
    dataset = ShapesDataset(image_px=image_px(model))
    metadata = {"feature_layer": model.config.vision_feature_layer, "encoder": name, "encoder_sha256": sha256}
    asked = {k: getattr(sizes, k) for k in ("questions", "targets_validation", "targets_test")}
    conditions = {**metadata, "partner": partner, "data_sha256": _world_sha256(dataset, asked)}
    targets = {
        "validation": probe_targets(dataset, "validation", sizes.targets_validation),
        "test": probe_targets(dataset, "test", sizes.targets_test),
    }
    results = localize(model, processor, reference, targets, conditions, seed)
    images, questions = probe_questions(dataset, "test", sizes.questions)
    return results + answer_questions(model, processor, questions, images, conditions, seed=seed)


def probe_language(name: str, sizes: Sizes = Sizes(), seed: int = 0) -> list[ProbeResult]:
    """Answers of a language model alone to questions on scans of held-out scenes: what it can read of a scene."""
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: no language model can be loaded: {str(error).splitlines()[0]}") from error
    dataset = ShapesDataset()
    _, questions = probe_questions(dataset, "test", sizes.questions)
    scenes = probe_scenes(dataset, "test", sizes.questions).scenes
    scans = [s.scan(SCAN_SIDE, dataset.scene_rng("test", FIRST_SCENE + i, 5)) for i, s in enumerate(scenes)]
    path = Path(name)
    sha256 = weights_sha256(path) if path.is_dir() else str(cached_commit(str(path)))
    metadata = {"feature_layer": None, "encoder": "none", "encoder_sha256": sha256, "partner": name}
    return answer_questions(model, tokenizer, questions, scans, metadata, seed=seed)


def probe_questions(dataset: ShapesDataset, split: Split, count: int) -> tuple[list[Any], list[Question]]:
    """Questions on the scenes that probes use, kinds in turn, each with its image."""
    part = probe_scenes(dataset, split, count)
    asked = [
        scene.question(KINDS[i % len(KINDS)], dataset.scene_rng(split, FIRST_SCENE + i, 3))
        for i, scene in enumerate(part.scenes)
    ]
    return [p.image for p in part.pictures], asked


def probe_pairs(dataset: ShapesDataset, split: Split, count: int) -> tuple[list[Any], list[Pair]]:
    """Preference pairs on the scenes that probes use, kinds and forms in turn, each with its image."""
    part = probe_scenes(dataset, split, count)
    forms: tuple[Form, ...] = ("describe", "question")
    pairs = [
        scene.pair(KINDS[i % 5], forms[i // 5 % 2], dataset.scene_rng(split, FIRST_SCENE + i, 9))
        for i, scene in enumerate(part.scenes)
    ]
    return [p.image for p in part.pictures], pairs


def probe_encoder(
    encoder: str,
    data: str = "shapes",
    seed: int = 0,
    on_bad_row: str = "stop",
    sizes: Sizes = Sizes(),
    protocols: Sequence[str] = PROTOCOLS[:-1],
    revision: str | None = None,
    dtype: str = "float32",
    cache: Path | None = None,
    workers: int | None = None,
    progress: Progress = lambda done, total, rate: None,
) -> tuple[list[ProbeResult], list[str]]:
    """Probe an encoder by name, on the built-in world or on labelled images.

    Args:
        encoder: folder or Hub name; if it holds golden vectors, they are replayed first.
        data: `shapes`, or what `dataset.open_classes` takes, with `revision`.
        seed: of splits, samples and bootstrap.
        on_bad_row: stop at an image that cannot be decoded, or skip it.
        sizes: of the world's probes.
        protocols, dtype, cache, workers, progress: of labelled images, see `classify.classify_images`.

    Returns:
        The results, and a sentence for each image that was skipped.

    Raises:
        CheckpointError: the encoder cannot be loaded, or gives other features than it was published with.
        ProbeError: the data cannot be probed.
    """
    if on_bad_row not in ("stop", "skip"):
        raise ProbeError(f"on_bad_row is {on_bad_row!r}: it is stop or skip.")
    if dtype not in DTYPES:
        raise ProbeError(f"dtype {dtype!r} is not known; give one of {', '.join(DTYPES)}.")
    classes = None if data == "shapes" else open_classes(data, revision, seed)
    model, image_processor = read_encoder(encoder)
    check_golden(encoder, model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device, DTYPES[dtype])  # type: ignore[arg-type]
    metadata = encoder_metadata(encoder)
    if classes is None:
        return probe_shapes(model, image_processor, metadata["encoder"], metadata["encoder_sha256"], sizes, seed), []
    return classify_images(
        model, image_processor, classes, metadata, protocols, seed, dtype, on_bad_row, cache, workers, progress
    )


def probe_all(
    encoders: Sequence[str],
    data: str = "shapes",
    seed: int = 0,
    protocols: Sequence[str] = PROTOCOLS[:-1],
    progress: Progress = lambda done, total, rate: None,
) -> dict[str, list[ProbeResult]]:
    """Results of several encoders by name: probed now, or read from a file that a probe wrote.

    Raises:
        ProbeError: two have one name.
    """
    found: dict[str, list[ProbeResult]] = {}
    for encoder in encoders:
        path = Path(encoder)
        if path.suffix == ".json":
            results = read_results(path)
        else:
            results, _ = probe_encoder(encoder, data, seed, protocols=protocols, progress=progress)
        name = results[0].encoder
        if name in found and path.suffix == ".json":
            name = path.stem
        if name in found:
            raise ProbeError(
                f"two encoders are named {name!r}; rename a folder or a file, so that a table can tell them."
            )
        found[name] = results
    return found


def _world_sha256(dataset: ShapesDataset, sizes: dict[str, int]) -> str:
    """Scenes follow from the world, where they start, and how many there are."""
    return hashlib.sha256(json.dumps([dataset.to_dict(), FIRST_SCENE, sizes]).encode()).hexdigest()


def _conditions(model: FeatureModel, name: str, sha256: str) -> dict[str, Any]:
    return {"feature_layer": model.config.pivot["feature_layer"], "encoder": name, "encoder_sha256": sha256}


def probe_targets(dataset: ShapesDataset, split: Split, count: int) -> Sequence[Target]:
    """Pairs that are about one visible thing: questions of colour, shape and position."""
    part = probe_scenes(dataset, split, count)
    made = []
    for i, (scene, picture) in enumerate(zip(part.scenes, part.pictures, strict=True)):
        rng = dataset.scene_rng(split, FIRST_SCENE + i, 4)
        pair = scene.pair(KINDS[i % 3], "question", rng)  # colour, shape, position
        made.append(Target(pair, picture))
    return made
