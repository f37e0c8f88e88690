"""What two MLLMs say and see of one picture: answers, probabilities, maps, scores, and one sentence about them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from pivot_hub.data.synthetic import Kind, Pair, ShapesDataset
from pivot_hub.demo.model_bundle import Mllm, ModelBundle
from pivot_hub.errors import DataError
from pivot_hub.explain.gradcam import (
    Explain,
    GradientMaps,
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

MOST_CHARACTERS = 500  # of a question or an answer: a longer one is no question, and costs time by its square
MOST_NEW_TOKENS = 80  # of an answer; the longest description of the built-in world has about 70


@dataclass(frozen=True)
class Subject:
    """What is looked at: a picture, a question, and what is known about the answer.

    Args:
        image: any size.
        question: what is asked.
        right: the right answer; empty where it is not known.
        wrong: a wrong one; empty where there is none.
        mask: (px, px) of the thing that is asked about; None where it is not known.
    """

    image: Image.Image
    question: str
    right: str = ""
    wrong: str = ""
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class View:
    """One MLLM's side of a comparison.

    Args:
        name: of the MLLM.
        answer: what it says, greedily.
        explained: the answer its maps are of.
        right_log_prob: of the right answer; None where there is none.
        wrong_log_prob: of the wrong answer.
        value: the quantity that was explained.
        maps: by method, (H, W).
        scores: of each map where the true mask is known.
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


@dataclass(frozen=True)
class Comparison:
    """Both sides, and what was explained of them."""

    subject: Subject
    explain: Explain
    layer: int | None
    first: View
    second: View

    def overlap(self, method: Method) -> float:
        """How much of the two maps falls on the same places, from 0 to 1."""
        return overlap(self.first.maps[method], self.second.maps[method])

    def sentence(self, method: Method) -> str:
        """Say in plain words what the two maps show."""
        one, other = self.first, self.second
        blank = [v.name for v in (one, other) if v.maps[method].max() <= 0]
        if len(blank) == 2:
            return "Neither map shows anything here: no place raises this answer by Grad-CAM. Try the gradient map."
        if blank:
            return f"The map of {blank[0]} is empty here: no place raises this answer. Try the gradient map."
        percent = round(100 * self.overlap(method))
        alike = (
            "The two look at the same places"
            if percent >= 90
            else "The two look at much the same places"
            if percent >= 75
            else "The two look at partly different places"
            if percent >= 50
            else "The two look at different places"
        )
        alike = f"{alike} ({percent}% of their maps coincide)"
        if one.scores is None or other.scores is None:
            return f"{alike}."
        inside = [v.name for v in (one, other) if v.scores and v.scores[method].peak_inside]
        if len(inside) == 2:
            return f"{alike}, and both point at the thing that was asked about."
        if not inside:
            return f"{alike}, and neither points at the thing that was asked about."
        missed = other.name if inside == [one.name] else one.name
        return f"{alike}: {inside[0]} points at the thing that was asked about, {missed} does not."

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, maps as nested lists."""
        return {
            "question": self.subject.question,
            "right": self.subject.right or None,
            "wrong": self.subject.wrong or None,
            "explain": self.explain,
            "layer": self.layer,
            "overlap": {method: round(self.overlap(method), 4) for method in self.first.maps},
            "models": [_view_metadata(v) for v in (self.first, self.second)],
        }


def scene_subject(dataset: ShapesDataset, seed: int, kind: Kind) -> Subject:
    """A scene of the built-in world with one of its questions; the mask is that of the one thing it is about."""
    scene = dataset.scene("test", seed)
    pair: Pair = scene.pair(kind, "question", dataset.scene_rng("test", seed, 1))
    picture = scene.render()
    mask = None if pair.target is None else picture.masks[pair.target]
    return Subject(picture.image, pair.question, pair.chosen, pair.rejected, mask)


def fit_picture(pair: ModelBundle, image: Image.Image) -> Image.Image:
    """Cut a picture to what both encoders see of it: some take its middle square, others the whole."""
    processors: list[Any] = [m.processor.image_processor for m in (pair.first, pair.second)]
    if not any(getattr(p, "do_center_crop", False) for p in processors):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def compare(pair: ModelBundle, subject: Subject, explain: Explain = "answer", layer: int | None = None) -> Comparison:
    """Ask both MLLMs the same and explain the same answer.

    Without a right answer each explains what it said itself.

    Args:
        pair: the MLLMs.
        subject: picture and question.
        explain: as `gradient_map` takes it.
        layer: hidden state that Grad-CAM looks at; by default each encoder's feature layer.

    Raises:
        DataError: the question is empty, a text is too long, or the DPO loss lacks an answer or a parent.
    """
    for what, text in (
        ("question", subject.question),
        ("right answer", subject.right),
        ("wrong answer", subject.wrong),
    ):
        if len(text) > MOST_CHARACTERS:
            raise DataError(f"The {what} has {len(text):,} characters; at most {MOST_CHARACTERS} are read.")
    if not subject.question.strip():
        raise DataError("There is no question; ask something about the picture.")
    if explain == "dpo" and not (subject.right and subject.wrong):
        raise DataError("The DPO loss compares two answers: give a right and a wrong one.")
    if explain == "dpo" and pair.parent is None:
        raise DataError("The DPO loss needs the parent of both encoders: name it beside them.")
    with pair.alone():
        views = [_view(mllm, pair, subject, explain, layer) for mllm in (pair.first, pair.second)]
    return Comparison(subject, explain, layer, *views)


def compare_tokens(pair: ModelBundle, comparison: Comparison) -> tuple[list[TokenMap], list[TokenMap]]:
    """Maps of each token of the explained answer, in both MLLMs."""
    subject = comparison.subject
    with pair.alone():
        one, other = (
            token_maps(mllm.model, mllm.processor, subject.image, subject.question, view.explained)
            for mllm, view in ((pair.first, comparison.first), (pair.second, comparison.second))
        )
    return one, other


def compare_patches(pair: ModelBundle, image: Image.Image, layer: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Patch features (H, W, D) of a picture in both encoders."""
    with pair.alone():
        one, other = (patch_tokens(m.model, m.processor, image, layer) for m in (pair.first, pair.second))
    return one, other


def _view(mllm: Mllm, pair: ModelBundle, subject: Subject, explain: Explain, layer: int | None) -> View:
    model, processor, image = mllm.model, mllm.processor, subject.image
    answer = generate_answers(model, processor, [subject.question], [image], MOST_NEW_TOKENS)[0]
    explained = subject.right or answer
    known = [a for a in (subject.right, subject.wrong) if a]
    scored: dict[str, float] = {}
    if known:
        with torch.inference_mode():
            scored = dict(
                zip(
                    known,
                    answer_log_probs(model, answer_batch(processor, image, subject.question, known)).tolist(),
                    strict=True,
                )
            )
    made: GradientMaps = gradient_map(
        model,
        processor,
        image,
        subject.question,
        explained,
        explain,
        subject.wrong or None,
        None if pair.parent is None else pair.parent.model,
        layer=layer,
    )
    return View(
        mllm.name,
        answer,
        explained,
        scored.get(subject.right),
        scored.get(subject.wrong),
        made.value,
        made.maps,
        None if subject.mask is None else {k: score_map(m, subject.mask) for k, m in made.maps.items()},
    )


def _view_metadata(view: View) -> dict[str, Any]:
    return {
        "name": view.name,
        "answer": view.answer,
        "explained": view.explained,
        "right_log_prob": view.right_log_prob,
        "wrong_log_prob": view.wrong_log_prob,
        "preference": view.preference,
        "value": view.value,
        "maps": {k: np.round(m, 7).tolist() for k, m in view.maps.items()},
        "maps_times_even": {k: np.round(densities([m])[0], 4).tolist() for k, m in view.maps.items()},
        "scores": None if view.scores is None else {k: asdict(s) for k, s in view.scores.items()},
    }
