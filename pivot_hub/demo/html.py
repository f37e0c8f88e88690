"""The Space's panels: a comparison as HTML, every picture inside the page, every typed word escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from pivot_hub.demo.comparison import Comparison, Subject, View
from pivot_hub.explain.gradcam import Method, TokenMap
from pivot_hub.explain.heatmaps import (
    DIVERGING,
    SIDE_PX,
    colour,
    data_uri,
    densities,
    outline,
    scale_bar,
    shown_size,
    stretch,
    translucent,
)
from pivot_hub.explain.patch_features import principal_colours, similarity

WORD_PX = 96  # side of a word's map
METHOD_NAMES: dict[Method, str] = {"gradcam": "Grad-CAM", "gradient": "Gradient map"}


class Panels:
    """Draws the panels with the templates of a folder."""

    def __init__(self, folder: Path) -> None:
        """Read `panels.html.jinja` of the folder."""
        loader = FileSystemLoader(folder)
        env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
        self._macros: Any = env.get_template("panels.html.jinja").module

    def stage(self, comparison: Comparison, method: Method, colours: str) -> str:
        """Picture, both maps on one scale, their difference, answers and scores."""
        return str(self._macros.stage(_stage(comparison, method, colours)))

    def swipe(self, comparison: Comparison, method: Method, colours: str) -> str:
        """Both maps over one picture, with a line between them that moves."""
        return str(self._macros.swipe(_stage(comparison, method, colours)))

    def patches(
        self, comparison: Comparison, tokens: tuple[np.ndarray, np.ndarray], place: tuple[int, int], colours: str
    ) -> str:
        """How alike both encoders find one patch and all others.

        Args:
            tokens: (H, W, D) of both encoders.
            place: row and column of the patch on the first encoder's grid.
        """
        rows, columns = tokens[0].shape[:2]
        row, column = min(place[0], rows - 1), min(place[1], columns - 1)
        made = []
        for grid in tokens:  # grids of other sizes: the patch at the same place of the picture
            h, w = grid.shape[:2]
            made.append(similarity(grid, int((row + 0.5) / rows * h), int((column + 0.5) / columns * w)))
        low = min(float(m.min()) for m in made)
        image = comparison.subject.image
        views = [
            {
                "name": view.name,
                "heat": _patches_uri(colour(grid, colours, low, 1.0)),
                "alt": f"Similarity in {view.name}: on average {grid.mean():.2f}.",
            }
            for view, grid in zip((comparison.first, comparison.second), made, strict=True)
        ]
        cell = (
            f"left:{100 * column / columns:.3f}%;top:{100 * row / rows:.3f}%;"
            f"width:{100 / columns:.3f}%;height:{100 / rows:.3f}%"
        )
        metadata = {
            "rows": rows,
            "columns": columns,
            "row": row,
            "column": column,
            "cell": cell,
            "views": views,
            "low": f"{low:.2f}",
            "middle": f"{(1 + low) / 2:.2f}",
            "bar": data_uri(scale_bar(colours)),
        }
        return str(self._macros.patches(metadata | _picture(image)))

    def colours(self, comparison: Comparison, tokens: tuple[np.ndarray, np.ndarray]) -> str:
        """The main axes of both encoders' patch features as colour."""
        pictures, share, joint = principal_colours(tokens)
        views = [
            {
                "name": view.name,
                "uri": data_uri(Image.fromarray(picture)),
                "alt": f"Patch features of {view.name} as colour.",
            }
            for view, picture in zip((comparison.first, comparison.second), pictures, strict=True)
        ]
        metadata = {"views": views, "share": round(100 * share), "joint": joint}
        return str(self._macros.colours(metadata | _picture(comparison.subject.image)))

    def words(
        self,
        comparison: Comparison,
        tokens: tuple[Sequence[TokenMap], Sequence[TokenMap]],
        method: Method,
        colours: str,
    ) -> str:
        """A small map of each token of the explained answers."""
        sides = [densities([t.maps[method] for t in side]) for side in tokens]
        top = max((float(m.max()) for side in sides for m in side), default=0.0) or 1.0
        views = []
        for view, side, maps in zip((comparison.first, comparison.second), tokens, sides, strict=True):
            made = [
                {
                    "text": _shown(token.text),
                    "probability": f"{100 * math.exp(token.log_prob):.0f}%" + ("" if grid.max() > 0 else ", no map"),
                    "heat": data_uri(colour(stretch(grid, (WORD_PX, WORD_PX)), colours, 0, top)),
                    "alt": f"Map of {_shown(token.text)} in {view.name}; {_peak(grid)}.",
                }
                for token, grid in zip(side, maps, strict=True)
            ]
            views.append({"name": view.name, "tokens": made})
        explained = comparison.first.explained
        same = explained == comparison.second.explained
        text = f"Each token of “{explained}”" if same else "Each token of what the model says itself"
        metadata = {
            "text": f"{text}, given the tokens before it: its probability, and where its {METHOD_NAMES[method]} lies.",
            "views": views,
            "top": f"{top:.1f}",
            "middle": f"{top / 2:.1f}",
            "bar": data_uri(scale_bar(colours)),
        }
        return str(self._macros.words(metadata | _picture(comparison.subject.image)))

    def gallery(self, scenes: Sequence[tuple[Subject, str]]) -> str:
        """Examples as buttons, each with how the link of its look begins."""
        shown = [
            {"uri": data_uri(s.image), "question": s.question, "alt": f"Scene of shapes: {s.question}", "query": query}
            for s, query in scenes
        ]
        return str(self._macros.gallery(shown))

    def message(self, text: str, kind: str = "problem") -> str:
        """One sentence to the visitor: a `problem` or a `note`; nothing for an empty text."""
        return str(self._macros.message(text, kind))


def _stage(comparison: Comparison, method: Method, colours: str) -> dict[str, Any]:
    subject, views = comparison.subject, (comparison.first, comparison.second)
    size = shown_size(subject.image)
    large = [stretch(m, size) for m in densities([v.maps[method] for v in views])]
    top = max(float(m.max()) for m in large) or 1.0
    difference = large[1] - large[0]
    reach = float(np.abs(difference).max()) or 1.0
    edge = None if subject.mask is None else data_uri(outline(subject.mask, size))
    what = f"{METHOD_NAMES[method]} of {_explained(comparison)}"
    return {
        "sentence": comparison.sentence(method),
        "question": subject.question,
        "right": subject.right,
        "wrong": subject.wrong,
        "outline": edge,
        "picture_alt": f"The picture that is asked about: {subject.question}",
        "views": [_side(v, subject, method, heat, what, colours, top) for v, heat in zip(views, large, strict=True)],
        "difference": data_uri(translucent(difference, DIVERGING, -reach, reach, 0)),
        "difference_alt": f"{views[1].name} minus {views[0].name}: at most {reach:.1f} times an even spread apart.",
        "coincide": f"{round(100 * comparison.overlap(method))}% of the two maps coincide.",
        "bar": data_uri(scale_bar(colours)),
        "difference_bar": data_uri(scale_bar(DIVERGING)),
        "top": f"{top:.1f}",
        "middle": f"{top / 2:.1f}",
        "reach": f"{reach:.1f}",
        **_picture(subject.image),
    }


def _side(
    view: View, subject: Subject, method: Method, heat: np.ndarray, what: str, colours: str, top: float
) -> dict[str, Any]:
    scores = None if view.scores is None else view.scores[method]
    if scores is None:
        text = f"Map: {what}."
    elif view.maps[method].max() <= 0:
        text = "The map is empty here."
    else:
        peak = "on the thing" if scores.peak_inside else "elsewhere"
        text = (
            f"Peak {peak}; {100 * scores.energy_inside:.0f}% of the map on it (even spread {100 * scores.area:.0f}%); "
            f"IoU {100 * scores.iou:.0f}%"
        )
    probability = None
    if view.right_log_prob is not None and view.preference is None:
        probability = _percent(math.exp(view.right_log_prob))
    return {
        "name": view.name,
        "answer": view.answer,
        "correct": view.answer.casefold() == subject.right.casefold() if subject.right and subject.wrong else None,
        "preference": None if view.preference is None else _percent(view.preference),
        "width": None if view.preference is None else round(100 * view.preference, 1),
        "probability": probability,
        "heat": data_uri(translucent(heat, colours, 0, top, 0)),
        "scores": text,
        "alt": f"{what} in {view.name}, over the picture; {_peak(heat)}.",
    }


def _percent(share: float) -> str:
    """A probability in words that never claim certainty."""
    if share > 0.9995:
        return "over 99.9%"
    return "under 0.1%" if share < 0.0005 else f"{100 * share:.1f}%"


def _explained(comparison: Comparison) -> str:
    return {"answer": "the answer", "sft": "the SFT loss", "dpo": "the DPO loss"}[comparison.explain]


def _peak(grid: np.ndarray) -> str:
    """Where a map is highest, in words."""
    if grid.max() <= 0:
        return "it is empty"
    y, x = np.unravel_index(grid.argmax(), grid.shape)
    row = ("top", "middle", "bottom")[min(int(3 * y / grid.shape[0]), 2)]
    column = ("left", "centre", "right")[min(int(3 * x / grid.shape[1]), 2)]
    return f"it is strongest at the {row} {column}"


def _picture(image: Image.Image) -> dict[str, Any]:
    """The picture itself, small ones pixel by pixel, and the proportions of every frame around it."""
    small = max(image.size) <= 128
    if not small:
        image = image.copy()
        image.thumbnail((2 * SIDE_PX, 2 * SIDE_PX))
    uri = data_uri(image, "PNG" if small else "WEBP")
    return {
        "picture": {"uri": uri, "small": small},
        "ratio": Markup(f"aspect-ratio: {image.width} / {image.height}"),
    }


def _patches_uri(image: Image.Image) -> str:
    """Patches as they are, with hard edges."""
    return data_uri(image.resize((image.width * 16, image.height * 16), Image.Resampling.NEAREST))


def _shown(token: str) -> str:
    """A token's text, special ones by their meaning."""
    if token.startswith("<|") or token in ("</s>", "<eos>", "<end_of_turn>"):
        return "(end)"
    return token.strip() or "␣"
