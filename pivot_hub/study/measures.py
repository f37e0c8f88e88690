"""The measures of one run of a study: probes, answers, maps, and what its other modules measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from pivot_hub.data.synthetic import ShapesDataset
from pivot_hub.encoder.device import compute_device
from pivot_hub.encoder.repository import encoder_metadata, read_encoder
from pivot_hub.mllm.families import family_of
from pivot_hub.mllm.load import load_mllm
from pivot_hub.probes.localization.gradient_maps import localize
from pivot_hub.probes.ranking import rank_pairs, true_answer_probability
from pivot_hub.probes.result import ProbeResult
from pivot_hub.probes.run import Sizes, probe_pairs, probe_questions, probe_scenes, probe_shapes, probe_targets
from pivot_hub.probes.vqa.synthetic import answer_questions
from pivot_hub.study.counterfactuals import grey_image, probe_counterfactuals, rank_counterfactuals, sensitivity
from pivot_hub.study.design import Measure
from pivot_hub.study.movement import distances, feature_drift
from pivot_hub.study.word_gradients import word_gradients


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
    mllm, processor = load_mllm(checkpoint)
    mllm.to(compute_device()).eval()  # type: ignore[arg-type]
    conditions = {
        "feature_layer": family_of(mllm.config).feature_layer(mllm.config),
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
        blind = answer_questions(mllm, processor, questions, [grey_image(image) for image in images], conditions)
        results += [replace(r, task=r.task.replace("shapes/vqa", "shapes/vqa of a grey image")) for r in blind]
    if "counterfactuals" in measures:
        counterfactuals = probe_counterfactuals(dataset, "test", sizes.pairs)
        results += sensitivity(mllm, processor, counterfactuals, conditions)
        results += rank_counterfactuals(mllm, processor, counterfactuals, conditions)
    if "distance" in measures and parent is not None:
        parent_mllm = load_mllm(parent)[0]
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
