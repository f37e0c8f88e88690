"""The measures of one run of a study: probes, answers, maps, distance of the weights, and gradients of words."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from pivot_hub.data.synthetic import (
    ERROR_TYPES,
    KINDS,
    Counterfactual,
    ErrorType,
    Form,
    ShapesDataset,
    Split,
    draw_counterfactual,
    draw_fact,
)
from pivot_hub.encoder.configuration_pivot import prefix_tokens
from pivot_hub.encoder.device import compute_device
from pivot_hub.encoder.repository import encoder_metadata, read_encoder
from pivot_hub.explain.gradcam import gradient_map, token_maps
from pivot_hub.explain.word_kinds import token_kinds
from pivot_hub.mllm.load import load_llava
from pivot_hub.mllm.trainable import parts_of
from pivot_hub.probes.localization.gradient_maps import localize
from pivot_hub.probes.ranking import rank_pairs, true_answer_probability
from pivot_hub.probes.result import ProbeResult, measure
from pivot_hub.probes.run import (
    FIRST_SCENE,
    Sizes,
    probe_pairs,
    probe_questions,
    probe_scenes,
    probe_shapes,
    probe_targets,
)
from pivot_hub.probes.vqa.synthetic import answer_questions
from pivot_hub.study.design import Measure

BATCH = 64  # images in a forward pass
WORD_KINDS = ("seen", "known", "other")  # words that only the image tells, words of a fact, and all others


def measure_run(
    encoder: Path,
    checkpoint: Path | None,
    parent: Path | None,
    name: str,
    measures: Sequence[Measure],
    dataset: ShapesDataset,
    harder: Mapping[str, ShapesDataset],
    sizes: Sizes,
) -> list[ProbeResult]:
    """Measure one run of a study.

    Args:
        encoder: Folder of the run's encoder.
        checkpoint: Folder of the run's MLLM; None for an encoder alone.
        parent: Folder of the MLLM that the run started from.
        name: Name of the run in the results.
        measures: Names of what is measured.
        dataset: Dataset that probes are fitted and tested on, and that questions are about.
        harder: Further datasets by name, on which probes and questions are tested if `measures` has `harder`.
        sizes: Sizes of the probes.
    """
    harder = harder if "harder" in measures else {}
    sha256 = encoder_metadata(str(encoder))["encoder_sha256"]
    results = []
    if "encoder" in measures:
        model, image_processor = read_encoder(str(encoder))
        model.to(compute_device())  # type: ignore[arg-type]
        results += probe_shapes(model, image_processor, name, sha256, sizes, dataset=dataset, harder=harder)
    if checkpoint is None:
        return results
    mllm, processor = load_llava(checkpoint)
    mllm.to(compute_device()).eval()  # type: ignore[arg-type]
    conditions = {
        "feature_layer": mllm.config.vision_feature_layer,
        "encoder": name,
        "encoder_sha256": sha256,
        "partner": name,
    }
    if "maps" in measures:
        targets = {
            "validation": probe_targets(dataset, "validation", sizes.targets_validation),
            "test": probe_targets(dataset, "test", sizes.targets_test),
        }
        results += localize(mllm, processor, None, targets, conditions, explains=("answer",))
    if "answers" in measures:
        results += _measure_answers(mllm, processor, dataset, harder, sizes, conditions)
    if "blind" in measures:
        images, questions = probe_questions(dataset, "test", sizes.questions)
        blind = answer_questions(mllm, processor, questions, [_grey(image) for image in images], conditions)
        results += [replace(r, task=r.task.replace("shapes/vqa", "shapes/vqa of a grey image")) for r in blind]
    if "counterfactuals" in measures:
        counterfactuals = probe_counterfactuals(dataset, "test", sizes.pairs)
        results += sensitivity(mllm, processor, counterfactuals, conditions)
        results += rank_counterfactuals(mllm, processor, counterfactuals, conditions)
    if "distance" in measures and parent is not None:
        parent_mllm = load_llava(parent)[0]
        results += distances(mllm.cpu(), parent_mllm, conditions)
        images = [rendered.image for rendered in probe_scenes(dataset, "test", sizes.pairs).rendered]
        results += feature_drift(mllm, parent_mllm, processor, images, conditions)
        mllm.to(compute_device())  # type: ignore[arg-type]
    if "gradients" in measures:
        results += word_gradients(mllm, processor, dataset, sizes.targets_validation, conditions)
    return results


def _measure_answers(
    mllm: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: ShapesDataset,
    harder: Mapping[str, ShapesDataset],
    sizes: Sizes,
    conditions: dict[str, Any],
) -> list[ProbeResult]:
    """Answers to test questions and probabilities of true ones by kind, harder answers, and ranked pairs."""
    images, questions = probe_questions(dataset, "test", sizes.questions)
    results = answer_questions(mllm, processor, questions, images, conditions)
    results += true_answer_probability(mllm, processor, questions, images, conditions)
    for name, harder_dataset in harder.items():
        images, questions = probe_questions(harder_dataset, "test", sizes.harder)
        overall = answer_questions(mllm, processor, questions, images, conditions)[0]
        results.append(replace(overall, task=overall.task.replace("shapes/", f"shapes/{name}/")))
    images, pairs = probe_pairs(dataset, "test", sizes.pairs)
    return [*results, rank_pairs(mllm, processor, pairs, images, conditions)]


def distances(model: PreTrainedModel, parent: PreTrainedModel, conditions: dict[str, Any]) -> list[ProbeResult]:
    """Measure how far training moved each part: norm of the change over norm of the parent's weights, in percent."""
    results = []
    parent_parts = parts_of(parent)
    for part, parameters in parts_of(model).items():
        moved, size = 0.0, 0.0  # squared norms
        for name, weight in parameters.items():
            before = parent_parts[part][name]
            moved += float((weight - before).detach().double().square().sum())
            size += float(before.detach().double().square().sum())
        results.append(
            measure(
                f"shapes/distance/{part}",
                "relative_distance",
                np.array([[moved**0.5, size**0.5]]),
                protocol="norm of the change over the norm of the parent's weights",
                seed=0,
                duration_s=0,
                **conditions,
            )
        )
    return results


@torch.no_grad()
def hidden_states(model: PreTrainedModel, processor: ProcessorMixin, images: Sequence[Image.Image]) -> list[np.ndarray]:
    """Compute the patch tokens of every hidden state of an MLLM's encoder, from the embeddings on.

    Returns:
        For each hidden state (N, H*W, D) float32.
    """
    encoder: Any = cast(Any, model).get_submodule("model.vision_tower")
    image_processor: Any = cast(Any, processor).image_processor
    prefix = prefix_tokens(encoder.config)
    batches = []
    for start in range(0, len(images), BATCH):
        pixels = image_processor(images=list(images[start : start + BATCH]), return_tensors="pt")["pixel_values"]
        output = encoder(pixels.to(model.device), output_hidden_states=True)
        batches.append([state[:, prefix:].float().cpu().numpy() for state in output.hidden_states])
    return [np.concatenate(states) for states in zip(*batches, strict=True)]


def feature_drift(
    model: PreTrainedModel,
    parent: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    conditions: dict[str, Any],
) -> list[ProbeResult]:
    """Measure how far training moved the features of each layer: norm of the change over the parent's norm, in percent.

    Args:
        model: MLLM that is measured.
        parent: MLLM that it was trained from.
        processor: Processor of both.
        images: Images of test scenes.
        conditions: Values of encoder, encoder_sha256, feature_layer and partner in the results.
    """
    states = zip(hidden_states(model, processor, images), hidden_states(parent, processor, images), strict=True)
    return [
        measure(
            f"shapes/drift/layer {layer}",
            "relative_distance",
            np.stack([np.linalg.norm(after - before, axis=(1, 2)), np.linalg.norm(before, axis=(1, 2))], axis=1),
            protocol="norm of the change of an image's patch tokens over their norm in the parent, summed over images",
            seed=0,
            duration_s=0,
            **conditions,
        )
        for layer, (after, before) in enumerate(states)
    ]


def probe_counterfactuals(dataset: ShapesDataset, split: Split, count: int) -> list[Counterfactual]:
    """Draw one pair of scenes that differ in one thing for each probe scene, taking the kinds and forms in turn."""
    forms: tuple[Form, ...] = ("describe", "question")
    return [
        draw_counterfactual(dataset, split, FIRST_SCENE + i, KINDS[i % len(KINDS)], forms[i // len(KINDS) % len(forms)])
        for i in range(count)
    ]


def sensitivity(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    counterfactuals: Sequence[Counterfactual],
    conditions: dict[str, Any],
) -> list[ProbeResult]:
    """Measure how the features at the feature layer change where two scenes differ, and elsewhere.

    The change of a patch is the distance of its two tokens over the root mean square distance of a token from the mean
    token, in percent. `object` is the mean over the patches in which a pixel differs, and `elsewhere` over the others.
    `object share` is the share of the squared change that lies on the patches in which a pixel differs.

    Args:
        model: MLLM that is measured.
        processor: Processor of the MLLM.
        counterfactuals: Pairs of scenes that differ in one thing.
        conditions: Values of encoder, encoder_sha256, feature_layer and partner in the results.
    """
    layer = cast(Any, model.config).vision_feature_layer
    first, second = (
        hidden_states(model, processor, [scene.render().image for scene in scenes])[layer]
        for scenes in ([c.scene for c in counterfactuals], [c.other for c in counterfactuals])
    )
    side = math.isqrt(first.shape[1])
    differs = np.stack([_patches(c.difference(), side) for c in counterfactuals])  # (N, H*W)
    spread = float(np.sqrt(((first - first.mean((0, 1))) ** 2).sum(2).mean()))
    change = np.linalg.norm(first - second, axis=2) / spread  # (N, H*W)
    scores = {
        "object": np.stack([(change * differs).sum(1), differs.sum(1)], axis=1),
        "elsewhere": np.stack([(change * ~differs).sum(1), (~differs).sum(1)], axis=1),
        "object share": np.stack([(change**2 * differs).sum(1), (change**2).sum(1)], axis=1),
    }
    return [
        measure(
            f"shapes/sensitivity/{where}",
            "relative_change",
            example_scores,
            protocol="two scenes that differ in one thing; change of a patch token over the spread of tokens",
            seed=0,
            duration_s=0,
            **conditions,
        )
        for where, example_scores in scores.items()
    ]


def _patches(difference: np.ndarray, side: int) -> np.ndarray:
    """Whether any pixel of each patch differs: (H*W,) bool, from (height, width) bool."""
    patch = len(difference) // side
    return difference.reshape(side, patch, side, patch).any(axis=(1, 3)).ravel()


def rank_counterfactuals(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    counterfactuals: Sequence[Counterfactual],
    conditions: dict[str, Any],
) -> list[ProbeResult]:
    """Rank the answers of pairs of scenes that differ in one thing, given the image and given a grey one.

    Either answer is right for one of the two scenes, so that a grey image leaves chance, 50%.
    """
    pairs = [c.pair for c in counterfactuals]
    images = [c.scene.render().image for c in counterfactuals]
    return [
        replace(rank_pairs(model, processor, pairs, shown, conditions), task=f"shapes/counterfactuals/{name}")
        for name, shown in (("image", images), ("grey image", [_grey(image) for image in images]))
    ]


def _grey(image: Image.Image) -> Image.Image:
    """An image of the same size that shows nothing."""
    return Image.new("RGB", image.size, (128, 128, 128))


@dataclass(frozen=True)
class _Example:
    """One test question whose answer has two sentences: what the image shows, and a fact that is known without it.

    Args:
        image: Image of the scene.
        question: Question about the scene.
        chosen: True answer, with the fact behind it.
        rejected: Wrong answer by its error type, in the order of `ERROR_TYPES`.
        word_kinds: Kind of each word of the true answer, out of `WORD_KINDS`.
    """

    image: Image.Image
    question: str
    chosen: str
    rejected: dict[ErrorType, str]
    word_kinds: list[str]


def word_gradients(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: ShapesDataset,
    count: int,
    conditions: dict[str, Any],
) -> list[ProbeResult]:
    """Measure how an answer's gradient on the image tokens divides among kinds of words, and among error types.

    The size of a gradient is its L1 norm over image tokens and channels at the projector's output, as in the paper.
    For a word it is the gradient of the log-probability of its tokens; 100 is the mean token of the answer. For a
    preference pair it is the gradient of the DPO loss with the model as its own reference, so that every pair has the
    same weight; 100 is the pair whose rejected answer has a visual error.

    Args:
        model: MLLM that is measured.
        processor: Processor of the MLLM.
        dataset: Dataset of the scenes.
        count: Number of test scenes; each has one question, and the kinds of question take turns.
        conditions: Values of encoder, encoder_sha256, feature_layer and partner in the results.

    Returns:
        One result for each kind of word, and one for each error type except the visual one.
    """
    started = time.monotonic()
    by_word_kind, by_error_type = [], []
    for example in _draw_examples(dataset, count):
        by_word_kind.append(_token_gradients(model, processor, example))
        by_error_type.append(_pair_gradients(model, processor, example))
    shared = {**conditions, "seed": 0, "duration_s": time.monotonic() - started}
    return [*_word_results(np.array(by_word_kind), shared), *_pair_results(np.array(by_error_type), shared)]


def _draw_examples(dataset: ShapesDataset, count: int) -> Iterator[_Example]:
    """Draw one question on each test scene, with a rejected answer of every error type."""
    scenes = probe_scenes(dataset, "test", count)
    for i, (scene, rendered) in enumerate(zip(scenes.scenes, scenes.rendered, strict=True)):
        pairs = {}
        for error_type in ERROR_TYPES:
            # Each draw starts from the same random streams, so the pairs differ in the rejected answer alone.
            pair_rng = dataset.scene_rng("test", FIRST_SCENE + i, 7)
            fact_rng = dataset.scene_rng("test", FIRST_SCENE + i, 8)
            pairs[error_type] = scene.pair_with_fact(KINDS[i % len(KINDS)], "question", error_type, pair_rng, fact_rng)
        fact = draw_fact(dataset.scene_rng("test", FIRST_SCENE + i, 8))
        visual = pairs["visual"]
        true_answer, wrong_answer = (text.removesuffix(f" {fact.true}") for text in (visual.chosen, visual.rejected))
        yield _Example(
            image=rendered.image,
            question=visual.question,
            chosen=visual.chosen,
            rejected={error_type: pair.rejected for error_type, pair in pairs.items()},
            word_kinds=[
                *_kinds_of_words(true_answer, wrong_answer, "seen"),
                *_kinds_of_words(fact.true, fact.wrong, "known"),
            ],
        )


def _token_gradients(model: PreTrainedModel, processor: ProcessorMixin, example: _Example) -> list[list[float]]:
    """Summed gradient size and number of tokens for each kind of word: (3, 2), in the order of `WORD_KINDS`."""
    maps = token_maps(model, processor, example.image, example.question, example.chosen, limit=64)
    sizes = [float(token.maps["gradient"].sum()) for token in maps]
    # A word has the space before it, which may be a token of its own. The tokens that end the turn are of no kind.
    words = zip(re.finditer(r"\s*\S+", example.chosen), example.word_kinds, strict=True)
    kinds = token_kinds(processor, example.chosen, [(*word.span(), kind) for word, kind in words])
    return [
        [sum(size for size, of_token in zip(sizes, kinds, strict=True) if of_token == kind), kinds.count(kind)]
        for kind in WORD_KINDS
    ]


def _pair_gradients(model: PreTrainedModel, processor: ProcessorMixin, example: _Example) -> list[float]:
    """Gradient size of the DPO loss for each error type: (3,), in the order of `ERROR_TYPES`."""
    sizes = []
    for rejected in example.rejected.values():
        explained = gradient_map(
            model, processor, example.image, example.question, example.chosen, "dpo", rejected, reference=model
        )
        sizes.append(float(explained.maps["gradient"].sum()))
    return sizes


def _word_results(sums: np.ndarray, shared: dict[str, Any]) -> list[ProbeResult]:
    """One result for each kind of word, from summed sizes and numbers of tokens (N, 3, 2)."""
    mean_token = sums[:, :, 0].sum() / sums[:, :, 1].sum()
    return [
        measure(
            f"shapes/gradient/{kind} words",
            "relative_gradient",
            sums[:, j] / (mean_token, 1),
            protocol="L1 norm at the projector's output of a token's log-probability; 100 is the mean token",
            **shared,
        )
        for j, kind in enumerate(WORD_KINDS)
    ]


def _pair_results(sizes: np.ndarray, shared: dict[str, Any]) -> list[ProbeResult]:
    """One result for each error type except the visual one, the first column of the sizes (N, 3)."""
    return [
        measure(
            f"shapes/gradient/{error_type} pairs",
            "relative_gradient",
            sizes[:, [j, 0]],
            protocol="L1 norm at the projector's output of the DPO loss; 100 is the same pair with a visual error",
            **shared,
        )
        for j, error_type in enumerate(ERROR_TYPES)
        if error_type != "visual"
    ]


def _kinds_of_words(true: str, wrong: str, kind: str) -> list[str]:
    """For each word of a true sentence: `kind` if the wrong sentence differs there, else `other`.

    Sentences of as many words are compared word by word. Otherwise a word differs if the wrong sentence lacks it.
    """
    words, wrong_words = true.split(), wrong.split()
    if len(words) == len(wrong_words):
        differs = [a != b for a, b in zip(words, wrong_words, strict=True)]
    else:
        differs = [word not in wrong_words for word in words]
    return [kind if different else "other" for different in differs]
