"""The Space's panels: a comparison as HTML, with every image embedded and every typed text escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from pivot_hub.data.image import data_uri
from pivot_hub.demo.comparison import Comparison, ModelResult, Subject
from pivot_hub.demo.view_state import ViewState
from pivot_hub.explain.gradcam import Explain, Method, TokenMap
from pivot_hub.explain.heatmaps import (
    DIVERGING,
    SIDE_PX,
    colour,
    densities,
    outline,
    scale_bar,
    shown_size,
    stretch,
    translucent,
)
from pivot_hub.explain.patch_features import principal_colours, similarity

TOKEN_MAP_PX = 96
THUMBNAIL_PX = 192  # longer side of an example
PATCH_PX = 16  # side of a patch in a similarity map
METHOD_NAMES: dict[Method, str] = {"gradcam": "Grad-CAM", "gradient": "Gradient map"}
EXPLAIN_NAMES: dict[Explain, str] = {"answer": "the answer", "sft": "the SFT loss", "dpo": "the DPO loss"}


class Panels:
    """Renderer of the panels, with the templates of a folder."""

    def __init__(self, folder: Path) -> None:
        """Read the templates.

        Args:
            folder: Folder of `panels.html.jinja`.
        """
        loader = FileSystemLoader(folder)
        env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
        self._macros: Any = env.get_template("panels.html.jinja").module

    def comparison(self, comparison: Comparison, method: Method, colours: str, notes: Sequence[str] = ()) -> str:
        """Render the image, both maps on one scale, their difference, the answers, the scores and the notes."""
        values = _comparison_values(comparison, method, colours)
        return str(self._macros.comparison(values | {"notes": notes}))

    def swipe(self, comparison: Comparison, method: Method, colours: str) -> str:
        """Render both maps over one image, with a movable divider between them."""
        return str(self._macros.swipe(_comparison_values(comparison, method, colours)))

    def patches(
        self,
        comparison: Comparison,
        features: tuple[np.ndarray, np.ndarray],
        position: tuple[int, int],
        colours: str,
    ) -> str:
        """Render the similarity of one patch with all others, in both encoders.

        Args:
            comparison: Comparison that is shown.
            features: Patch features (H, W, D) of both encoders.
            position: Row and column of the patch on the first encoder's grid.
            colours: Colour scale of the similarity.
        """
        rows, columns = features[0].shape[:2]
        row, column = min(position[0], rows - 1), min(position[1], columns - 1)
        similarities = [similarity(grid, *same_place((row, column), features[0], grid)) for grid in features]
        lowest = min(float(s.min()) for s in similarities)
        models = [
            {
                "name": result.name,
                "heat": _enlarged_uri(colour(grid, colours, lowest, 1.0)),
                "alt": f"Similarity in {result.name}: on average {grid.mean():.2f}.",
            }
            for result, grid in zip(comparison.results, similarities, strict=True)
        ]
        cell_style = (
            f"left:{100 * column / columns:.3f}%;top:{100 * row / rows:.3f}%;"
            f"width:{100 / columns:.3f}%;height:{100 / rows:.3f}%"
        )
        values = {
            "rows": rows,
            "columns": columns,
            "row": row,
            "column": column,
            "cell": cell_style,
            "models": models,
            "lowest": f"{lowest:.2f}",
            "middle": f"{(1 + lowest) / 2:.2f}",
            "bar": data_uri(scale_bar(colours)),
        }
        return str(self._macros.patches(values | image_values(comparison.subject.image)))

    def colours(self, comparison: Comparison, features: tuple[np.ndarray, np.ndarray]) -> str:
        """Render the first three principal components of both encoders' patch features as colours.

        Args:
            comparison: Comparison that is shown.
            features: Patch features (H, W, D) of both encoders.
        """
        images, variance_share, joint = principal_colours(features)
        models = [
            {
                "name": result.name,
                "uri": data_uri(Image.fromarray(pixels)),
                "alt": f"Patch features of {result.name} as colours.",
            }
            for result, pixels in zip(comparison.results, images, strict=True)
        ]
        values = {"models": models, "percent": round(100 * variance_share), "joint": joint}
        return str(self._macros.colours(values | image_values(comparison.subject.image)))

    def tokens(
        self,
        comparison: Comparison,
        tokens: tuple[Sequence[TokenMap], Sequence[TokenMap]],
        method: Method,
        colours: str,
    ) -> str:
        """Render the token attribution: a small saliency map of each token of the explained answers.

        Args:
            comparison: Comparison that is shown.
            tokens: Maps of each token, in both MLLMs.
            method: Method of the maps.
            colours: Colour scale of the maps.
        """
        grids_by_model = [densities([token.maps[method] for token in model_tokens]) for model_tokens in tokens]
        highest = max((float(grid.max()) for grids in grids_by_model for grid in grids), default=0.0) or 1.0
        models = [
            {
                "name": result.name,
                "tokens": [
                    _token_values(token, grid, result.name, colours, highest)
                    for token, grid in zip(model_tokens, grids, strict=True)
                ],
            }
            for result, model_tokens, grids in zip(comparison.results, tokens, grids_by_model, strict=True)
        ]
        explained = comparison.first.explained
        same = explained == comparison.second.explained
        subject = f"Each token of “{explained}”" if same else "Each token of the model's own answer"
        text = f"{subject}, given the tokens before it: its probability and its saliency map ({METHOD_NAMES[method]})."
        values = {
            "text": text,
            "models": models,
            "highest": f"{highest:.1f}",
            "middle": f"{highest / 2:.1f}",
            "bar": data_uri(scale_bar(colours)),
        }
        return str(self._macros.tokens(values | image_values(comparison.subject.image)))

    def gallery(self, examples: Sequence[tuple[Subject, ViewState]]) -> str:
        """Render the examples as buttons.

        Args:
            examples: Subject of each example, and its view state.
        """
        values = [
            {
                "uri": _thumbnail_uri(subject.image),
                "question": subject.question,
                "alt": f"{f'Photograph ({state.photo})' if state.photo else 'Scene of shapes'}: {subject.question}",
                "query": state.query(),
            }
            for subject, state in examples
        ]
        return str(self._macros.gallery(values))

    def message(self, text: str, kind: str = "problem") -> str:
        """Render a message to the visitor.

        Args:
            text: Text of the message; nothing is rendered for an empty one.
            kind: Kind of the message: `problem` or `note`.
        """
        return str(self._macros.message(text, kind))


def same_place(position: tuple[int, int], grid: np.ndarray, other: np.ndarray) -> tuple[int, int]:
    """Return row and column of the patch of another grid (H, W, D) that is at the same place of the image.

    Args:
        position: Row and column of the patch on the first grid.
        grid: First grid (H, W, D).
        other: Other grid, which may differ in size.
    """
    (row, column), (rows, columns), (height, width) = position, grid.shape[:2], other.shape[:2]
    return int((row + 0.5) / rows * height), int((column + 0.5) / columns * width)


def _comparison_values(comparison: Comparison, method: Method, colours: str) -> dict[str, Any]:
    subject, (first, second) = comparison.subject, comparison.results
    size = shown_size(subject.image)
    grids = [stretch(m, size) for m in densities([result.maps[method] for result in comparison.results])]
    highest = max(float(m.max()) for m in grids) or 1.0
    difference = grids[1] - grids[0]
    reach = float(np.abs(difference).max()) or 1.0
    map_name = f"{METHOD_NAMES[method]} of {EXPLAIN_NAMES[comparison.explain]}"
    return {
        "summary": comparison.summary(method),
        "question": subject.question,
        "right_answer": subject.right_answer,
        "wrong_answer": subject.wrong_answer,
        "outline": None if subject.mask is None else data_uri(outline(subject.mask, size)),
        "image_alt": f"The image of the question: {subject.question}",
        "models": [
            _model_values(result, subject, method, map_name)
            | {
                "heat": data_uri(translucent(grid, colours, 0, highest, 0)),
                "alt": f"{map_name} in {result.name}, over the image; {_describe_peak(grid)}.",
            }
            for result, grid in zip(comparison.results, grids, strict=True)
        ],
        "difference": data_uri(translucent(difference, DIVERGING, -reach, reach, 0)),
        "difference_alt": f"{second.name} minus {first.name}: the largest difference is {reach:.1f} times the mean.",
        "overlap": f"The two maps overlap by {round(100 * comparison.overlap(method))}%.",
        "bar": data_uri(scale_bar(colours)),
        "difference_bar": data_uri(scale_bar(DIVERGING)),
        "highest": f"{highest:.1f}",
        "middle": f"{highest / 2:.1f}",
        "reach": f"{reach:.1f}",
        **image_values(subject.image),
    }


def _model_values(result: ModelResult, subject: Subject, method: Method, map_name: str) -> dict[str, Any]:
    correct = None
    if subject.right_answer and subject.wrong_answer:
        correct = result.answer.casefold() == subject.right_answer.casefold()
    preference, probability = result.preference, None
    if result.right_log_prob is not None and preference is None:
        probability = _percent(math.exp(result.right_log_prob))
    return {
        "name": result.name,
        "answer": result.answer,
        "correct": correct,
        "preference": None if preference is None else _percent(preference),
        "width": None if preference is None else round(100 * preference, 1),
        "probability": probability,
        "scores": _describe_scores(result, method, map_name),
    }


def _describe_scores(result: ModelResult, method: Method, map_name: str) -> str:
    if result.scores is None:
        return f"Map: {map_name}."
    if result.maps[method].max() <= 0:
        return "The map is empty here."
    scores = result.scores[method]
    brightest = "on the object" if scores.peak_inside else "elsewhere"
    return (
        f"Brightest {brightest}. {100 * scores.energy_inside:.0f}% of the map is on the object, which covers "
        f"{100 * scores.area:.0f}% of the picture."
    )


def _token_values(token: TokenMap, grid: np.ndarray, model_name: str, colours: str, highest: float) -> dict[str, str]:
    text = _token_text(token.text)
    return {
        "text": text,
        "probability": f"{100 * math.exp(token.log_prob):.0f}%" + ("" if grid.max() > 0 else ", no map"),
        "heat": data_uri(colour(stretch(grid, (TOKEN_MAP_PX, TOKEN_MAP_PX)), colours, 0, highest)),
        "alt": f"Map of {text} in {model_name}; {_describe_peak(grid)}.",
    }


def _token_text(token: str) -> str:
    """Return a token's text, and the meaning of a special token."""
    if token.startswith("<|") or re.fullmatch(r"</?[a-z_]+>", token):  # as </s>, <eos> and <end_of_turn>
        return "(end)"
    return token.strip() or "␣"


def _percent(share: float) -> str:
    """Format a probability so that rounding never yields 0% or 100%."""
    if share > 0.9995:
        return "over 99.9%"
    return "under 0.1%" if share < 0.0005 else f"{100 * share:.1f}%"


def _describe_peak(grid: np.ndarray) -> str:
    """Describe in words where a map is highest."""
    if grid.max() <= 0:
        return "it is empty"
    y, x = np.unravel_index(grid.argmax(), grid.shape)
    row = ("top", "middle", "bottom")[min(int(3 * y / grid.shape[0]), 2)]
    column = ("left", "centre", "right")[min(int(3 * x / grid.shape[1]), 2)]
    return f"it is strongest at the {row} {column}"


def image_values(image: Image.Image) -> dict[str, Any]:
    """Return the image, which keeps its pixels if it is small, and the aspect ratio of the frames around it."""
    small = max(image.size) <= 128
    if not small:
        image = image.copy()
        image.thumbnail((2 * SIDE_PX, 2 * SIDE_PX))
    uri = data_uri(image, "PNG" if small else "WEBP")
    return {
        "image": {"uri": uri, "small": small},
        "ratio": Markup(f"aspect-ratio: {image.width} / {image.height}"),
    }


def _thumbnail_uri(image: Image.Image) -> str:
    """Return an image as it is if it is small, and otherwise reduced."""
    if max(image.size) <= THUMBNAIL_PX:
        return data_uri(image)
    reduced = image.copy()
    reduced.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return data_uri(reduced, "WEBP")


def _enlarged_uri(image: Image.Image) -> str:
    """Enlarge each pixel to a square of PATCH_PX with hard edges."""
    return data_uri(image.resize((image.width * PATCH_PX, image.height * PATCH_PX), Image.Resampling.NEAREST))
