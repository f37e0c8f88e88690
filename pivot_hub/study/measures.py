"""What a study measures of one run: probes, answers, maps, how far weights moved, where answers' gradients lie."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from pivot_hub.data.synthetic import ERROR_TYPES, KINDS, ShapesDataset, draw_fact
from pivot_hub.encoder.repository import encoder_metadata, read_encoder
from pivot_hub.explain.gradcam import gradient_map, token_maps
from pivot_hub.mllm.load import load_mllm
from pivot_hub.mllm.trainable import parts_of
from pivot_hub.probes.localization.gradient_maps import localize
from pivot_hub.probes.ranking import rank_pairs
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

WORDS = ("seen", "known", "other")  # of an answer: what only the image tells, what is a fact, and the rest


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
        encoder: its repository.
        checkpoint: its MLLM, None for an encoder alone.
        parent: the MLLM it started from.
        name: of the run in the results.
        measures: which.
        world: that probes are fitted and tested on, and questions are about.
        harder: that they are tested on too, where `measures` says so.
        sizes: of the probes.
    """
    harder = harder if "harder" in measures else {}
    sha256 = encoder_metadata(str(encoder))["encoder_sha256"]
    results = []
    if "encoder" in measures:
        model, image_processor = read_encoder(str(encoder))
        model.to(device())  # type: ignore[arg-type]
        results += probe_shapes(model, image_processor, name, sha256, sizes, dataset=dataset, harder=harder)
    if checkpoint is None:
        return results
    mllm, processor = load_mllm(checkpoint)
    mllm.to(device()).eval()  # type: ignore[arg-type]
    conditions = {"feature_layer": mllm.config.vision_feature_layer, "encoder": name, "encoder_sha256": sha256}
    conditions["partner"] = name
    if "maps" in measures:
        targets = {
            "validation": probe_targets(dataset, "validation", sizes.targets_validation),
            "test": probe_targets(dataset, "test", sizes.targets_test),
        }
        results += localize(mllm, processor, None, targets, conditions, explains=("answer",))
    if "answers" in measures:
        for other, asked in {"": dataset, **harder}.items():
            images, questions = probe_questions(asked, "test", sizes.harder if other else sizes.questions)
            made = answer_questions(mllm, processor, questions, images, conditions)
            results += (
                [replace(r, task=r.task.replace("shapes/", f"shapes/{other}/")) for r in made[:1]] if other else made
            )
        images, pairs = probe_pairs(dataset, "test", sizes.pairs)
        results.append(rank_pairs(mllm, processor, pairs, images, conditions))
    if "distance" in measures and parent is not None:
        results += distances(mllm.cpu(), load_mllm(parent)[0], conditions)
        mllm.to(device())  # type: ignore[arg-type]
    if "gradients" in measures:
        results += word_gradients(mllm, processor, dataset, sizes.targets_validation, conditions)
    return results


def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def distances(
    model: LlavaForConditionalGeneration, parent: LlavaForConditionalGeneration, conditions: dict[str, Any]
) -> list[ProbeResult]:
    """How far training moved each part: the norm of the change over the norm of the parent's weights, in percent."""
    results = []
    before = parts_of(parent)
    for part, modules in parts_of(model).items():
        moved, size = 0.0, 0.0
        for module, old in zip(modules, before[part], strict=True):
            for a, b in zip(module.parameters(), old.parameters(), strict=True):
                moved += float((a - b).detach().double().square().sum())
                size += float(b.detach().double().square().sum())
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


def word_gradients(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    dataset: ShapesDataset,
    count: int,
    conditions: dict[str, Any],
) -> list[ProbeResult]:
    """How much of an answer's gradient on the image tokens belongs to which of its words, and to which pairs.

    Magnitude is the L1 norm over image tokens and channels at the projector's output, as in the paper. Of single words
    it is that of their log-probability; of a pair that of the DPO loss with the model as its own reference, where
    every pair has the same weight. 100 is the mean word of the answer, or the pair whose error is visual.

    Args:
        count: test scenes, one question on each, of all kinds in turn.
    """
    started = time.monotonic()
    part = probe_scenes(dataset, "test", count)
    words, pairs = [], []
    for i, (scene, picture) in enumerate(zip(part.scenes, part.pictures, strict=True)):

        def drawn(slip: Any, i: int = i, scene: Any = scene) -> Any:
            streams = (dataset.scene_rng("test", FIRST_SCENE + i, purpose) for purpose in (7, 8))
            return scene.pair_with_fact(KINDS[i % len(KINDS)], "question", slip, *streams)

        some = {slip: drawn(slip) for slip in ERROR_TYPES}
        chosen, question = some["visual"].chosen, some["visual"].question
        fact = draw_fact(dataset.scene_rng("test", FIRST_SCENE + i, 8))
        answer = chosen.removesuffix(f" {fact.true}")
        told = some["visual"].rejected.removesuffix(f" {fact.true}")
        kinds = [*_differing(answer, told, "seen"), *_differing(fact.true, fact.wrong, "known")]
        made = token_maps(model, processor, picture.image, question, chosen, limit=64)[:-1]  # the last ends the turn
        sizes = [float(m.maps["gradient"].sum()) for m in made]
        of = _words_of([m.text for m in made], kinds)
        words.append([[sum(s for s, k in zip(sizes, of, strict=True) if k == w), of.count(w)] for w in WORDS])
        pairs.append(
            [
                float(
                    gradient_map(model, processor, picture.image, question, chosen, "dpo", some[slip].rejected, model)
                    .maps["gradient"]
                    .sum()
                )
                for slip in ERROR_TYPES
            ]
        )
    metadata = {**conditions, "seed": 0, "duration_s": time.monotonic() - started}
    tallied = np.array(words)  # (N, 3, 2): summed magnitudes and tokens
    average = tallied[:, :, 0].sum() / tallied[:, :, 1].sum()
    results = [
        measure(
            f"shapes/gradient/{kind} words",
            "relative_gradient",
            tallied[:, j] / (average, 1),
            protocol="L1 norm at the projector's output of a token's log-probability; 100 is the mean token",
            **metadata,
        )
        for j, kind in enumerate(WORDS)
    ]
    norms = np.array(pairs)
    return results + [
        measure(
            f"shapes/gradient/{slip} pairs",
            "relative_gradient",
            norms[:, [j, 0]],
            protocol="L1 norm at the projector's output of the DPO loss; 100 is the same pair with a visual error",
            **metadata,
        )
        for j, slip in enumerate(ERROR_TYPES)
        if j
    ]


def _differing(true: str, wrong: str, kind: str) -> list[str]:
    """For each word of a true sentence: `kind` where a wrong one of as many words differs, else `other`.

    Sentences of other lengths differ in the words that only the true one has.
    """
    words, others = true.split(), wrong.split()
    if len(words) == len(others):
        return [kind if a != b else "other" for a, b in zip(words, others, strict=True)]
    return [kind if w not in others else "other" for w in words]


def _words_of(tokens: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """The kind of each token's word; tokens that begin with a space begin a word."""
    made, word = [], -1
    for token in tokens:
        word += 1 if word < 0 or token[:1].isspace() else 0
        made.append(kinds[min(word, len(kinds) - 1)])
    return made
