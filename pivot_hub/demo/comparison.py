"""Two MLLMs on one image: answers, probabilities, saliency maps, scores, and a one-sentence summary."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from pivot_hub.data.synthetic import Kind, ShapesDataset
from pivot_hub.demo.model_bundle import Mllm, ModelBundle
from pivot_hub.errors import DataError
from pivot_hub.explain.gradcam import (
    Explain,
    Method,
    TokenMap,
    answer_batch,
    answer_log_probs,
    gradient_map,
    token_maps,
)
from pivot_hub.explain.heatmaps import densities, overlap
from pivot_hub.explain.patch_features import patch_tokens
from pivot_hub.probes.localization.gradient_maps import MapScores, score_map
from pivot_hub.probes.vqa.synthetic import generate_answers

MOST_CHARACTERS = 500  # of a question or an answer: the cost grows with the square of the length
MOST_NEW_TOKENS = 80  # of an answer; the longest description in the Shapes dataset has about 70


@dataclass(frozen=True)
class Subject:
    """An image and a question, with what is known about the answer.

    Args:
        image: RGB image of any size.
        question: Question to both models.
        right_answer: Right answer; empty if it is unknown.
        wrong_answer: Wrong answer; empty if there is none.
        mask: Mask (px, px) of the object that the question is about; None if it is unknown.
    """

    image: Image.Image
    question: str
    right_answer: str = ""
    wrong_answer: str = ""
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class ModelResult:
    """The results of one MLLM in a comparison.

    Args:
        name: Name of the MLLM.
        answer: Answer that the MLLM generates greedily.
        explained: Answer that the maps explain.
        right_log_prob: Log-probability of the right answer; None if there is no right answer.
        wrong_log_prob: Log-probability of the wrong answer; None if there is no wrong answer.
        value: Value of the explained quantity.
        maps: Saliency map (H, W) of each method.
        scores: Scores of each map; None if the true mask is unknown.
    """

    name: str
    answer: str
    explained: str
    right_log_prob: float | None
    wrong_log_prob: float | None
    value: float
    maps: dict[Method, np.ndarray]
    scores: dict[Method, MapScores] | None

    @property
    def preference(self) -> float | None:
        """Probability of the right answer if only the right and the wrong one could be given."""
        if self.right_log_prob is None or self.wrong_log_prob is None:
            return None
        return 1 / (1 + math.exp(min(self.wrong_log_prob - self.right_log_prob, 700)))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, maps as nested lists."""
        return {
            "name": self.name,
            "answer": self.answer,
            "explained": self.explained,
            "right_log_prob": self.right_log_prob,
            "wrong_log_prob": self.wrong_log_prob,
            "preference": self.preference,
            "value": self.value,
            "maps": {k: np.round(m, 7).tolist() for k, m in self.maps.items()},
            "maps_times_even": {k: np.round(densities([m])[0], 4).tolist() for k, m in self.maps.items()},
            "scores": None if self.scores is None else {k: asdict(s) for k, s in self.scores.items()},
        }


@dataclass(frozen=True)
class Comparison:
    """The results of both MLLMs, with the subject and the settings of the maps."""

    subject: Subject
    explain: Explain
    layer: int | None
    first: ModelResult
    second: ModelResult

    @property
    def results(self) -> tuple[ModelResult, ModelResult]:
        """Results of both MLLMs, the first one first."""
        return self.first, self.second

    def overlap(self, method: Method) -> float:
        """Return the share of the two maps' mass that falls on the same places, from 0 to 1."""
        return overlap(self.first.maps[method], self.second.maps[method])

    def summary(self, method: Method) -> str:
        """Describe in one or two plain sentences what the two maps show."""
        empty = [result.name for result in self.results if result.maps[method].max() <= 0]
        if len(empty) == 2:
            return "Both maps are empty: no place raises this answer by Grad-CAM. Try the gradient map."
        if empty:
            return f"The map of {empty[0]} is empty: no place raises this answer. Try the gradient map."
        percent = round(100 * self.overlap(method))
        if percent >= 90:
            places = "the same places"
        elif percent >= 75:
            places = "mostly the same places"
        elif percent >= 50:
            places = "partly different places"
        else:
            places = "different places"
        text = f"The two models look at {places} ({percent}% of their maps overlap)"
        if self.first.scores is None or self.second.scores is None:
            return f"{text}."
        pointing = [result.name for result in self.results if result.scores and result.scores[method].peak_inside]
        if len(pointing) == 2:
            return f"{text}, and both maps are brightest on the object of the question."
        if not pointing:
            return f"{text}, and neither map is brightest on the object of the question."
        missing = self.second.name if pointing == [self.first.name] else self.first.name
        return f"{text}. The map of {pointing[0]} is brightest on the object of the question, that of {missing} is not."

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, maps as nested lists."""
        return {
            "question": self.subject.question,
            "right": self.subject.right_answer or None,
            "wrong": self.subject.wrong_answer or None,
            "explain": self.explain,
            "layer": self.layer,
            "overlap": {method: round(self.overlap(method), 4) for method in self.first.maps},
            "models": [result.to_dict() for result in self.results],
        }


def scene_subject(dataset: ShapesDataset, number: int, kind: Kind) -> Subject:
    """Render a scene of the synthetic Shapes dataset with one of its questions.

    Args:
        dataset: Dataset of the scene.
        number: Number of the scene in the test split.
        kind: Kind of the question.

    Returns:
        The subject; its mask is that of the one object the question is about, or None if there is no such object.
    """
    scene = dataset.scene("test", number)
    preference = scene.pair(kind, "question", dataset.scene_rng("test", number, 1))
    rendered = scene.render()
    mask = None if preference.target is None else rendered.masks[preference.target]
    return Subject(rendered.image, preference.question, preference.chosen, preference.rejected, mask)


def compare(bundle: ModelBundle, subject: Subject, explain: Explain = "answer", layer: int | None = None) -> Comparison:
    """Ask both MLLMs the same question and explain the same answer.

    Without a right answer, each model's own answer is explained.

    Args:
        bundle: MLLMs to compare.
        subject: Image and question.
        explain: Quantity that is explained: answer, sft or dpo.
        layer: Hidden state that Grad-CAM explains; each encoder's feature layer by default.

    Raises:
        DataError: The question is empty, a text is too long, or the DPO loss lacks an answer or a parent.
    """
    for name, text in (
        ("question", subject.question),
        ("right answer", subject.right_answer),
        ("wrong answer", subject.wrong_answer),
    ):
        if len(text) > MOST_CHARACTERS:
            raise DataError(f"The {name} has {len(text):,} characters; at most {MOST_CHARACTERS} are allowed.")
    if not subject.question.strip():
        raise DataError("There is no question; ask something about the image.")
    if explain == "dpo" and not (subject.right_answer and subject.wrong_answer):
        raise DataError("The DPO loss compares two answers: give a right and a wrong one.")
    if explain == "dpo" and bundle.parent is None:
        raise DataError("The DPO loss needs the parent of both encoders: name it beside them.")
    with bundle.exclusive():
        first, second = (_model_result(mllm, bundle, subject, explain, layer) for mllm in (bundle.first, bundle.second))
    return Comparison(subject, explain, layer, first, second)


def compare_tokens(bundle: ModelBundle, comparison: Comparison) -> tuple[list[TokenMap], list[TokenMap]]:
    """Return the token attribution of both MLLMs: a saliency map of each token of the explained answer."""
    subject = comparison.subject
    with bundle.exclusive():
        first, second = (
            token_maps(mllm.model, mllm.processor, mllm.with_margin(subject.image), subject.question, result.explained)
            for mllm, result in zip((bundle.first, bundle.second), comparison.results, strict=True)
        )
    return first, second


def compare_patches(bundle: ModelBundle, image: Image.Image, layer: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the patch features (H, W, D) of an image in both encoders."""
    with bundle.exclusive():
        first, second = (
            patch_tokens(mllm.model, mllm.processor, mllm.with_margin(image), layer)
            for mllm in (bundle.first, bundle.second)
        )
    return first, second


def _model_result(
    mllm: Mllm, bundle: ModelBundle, subject: Subject, explain: Explain, layer: int | None
) -> ModelResult:
    model, processor, image = mllm.model, mllm.processor, mllm.with_margin(subject.image)
    answer = generate_answers(model, processor, [subject.question], [image], MOST_NEW_TOKENS)[0]
    log_probs = _log_probs(mllm, subject)
    explained = subject.right_answer or answer
    explanation = gradient_map(
        model,
        processor,
        image,
        subject.question,
        explained,
        explain,
        subject.wrong_answer or None,
        None if bundle.parent is None else bundle.parent.model,
        layer=layer,
    )
    maps, mask = explanation.maps, subject.mask
    return ModelResult(
        name=mllm.name,
        answer=answer,
        explained=explained,
        right_log_prob=log_probs.get(subject.right_answer),
        wrong_log_prob=log_probs.get(subject.wrong_answer),
        value=explanation.value,
        maps=maps,
        scores=None if mask is None else {method: score_map(grid, mask) for method, grid in maps.items()},
    )


def _log_probs(mllm: Mllm, subject: Subject) -> dict[str, float]:
    """Log-probability of the right and the wrong answer, of those that the subject has."""
    answers = [answer for answer in (subject.right_answer, subject.wrong_answer) if answer]
    if not answers:
        return {}
    batch = answer_batch(mllm.processor, mllm.with_margin(subject.image), subject.question, answers)
    with torch.inference_mode():
        values = answer_log_probs(mllm.model, batch).tolist()
    return dict(zip(answers, values, strict=True))
