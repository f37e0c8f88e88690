"""The panels of the mode for any two encoders as HTML, with every image embedded and every typed text escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from pivot_hub.data.image import data_uri
from pivot_hub.demo.encoder_service import EncoderView
from pivot_hub.demo.encoder_set import EncoderInfo, EncoderMap
from pivot_hub.demo.html import image_values
from pivot_hub.explain.encoder_layers import OUTPUT
from pivot_hub.explain.heatmaps import COLOURS, SIDE_PX, scale_bar, translucent

# Colours of regions that colour-blind people can tell apart (Paul Tol's "muted"), and two greys.
REGION_COLOURS = np.array(
    [
        *((51, 34, 136), (221, 204, 119), (68, 170, 153), (204, 102, 119), (136, 204, 238), (17, 119, 51)),
        *((170, 68, 153), (153, 153, 51), (136, 34, 85), (221, 221, 221), (102, 102, 102), (240, 150, 70)),
    ],
    np.uint8,
)
REGION_OPACITY = 200  # of 255
SUMMARIES = {
    "similarity": "Bright patches resemble the chosen one, each by the features of its encoder.",
    "matching": "Where is the chosen patch in the second image? The best matches are numbered.",
    "colours": "Patches of similar colour have similar features.",
    "regions": "Each encoder divides the image into regions of similar features; the colours have no order.",
    "attention": "Bright patches are those that the CLS token, which stands for the whole image, attends to most.",
    "drift": "Bright patches have features that differ most from those of the first encoder.",
}


class EncoderPanels:
    """Renderer of the panels, with the templates of a folder."""

    def __init__(self, folder: Path) -> None:
        """Read the templates.

        Args:
            folder: Folder of `encoders.html.jinja`.
        """
        loader = FileSystemLoader(folder)
        env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
        self._macros: Any = env.get_template("encoders.html.jinja").module

    def render(self, view: EncoderView) -> str:
        """Render the image and the map of each encoder, with the slider and the thumbnails of its layers."""
        low, high = limits(view)
        image = image_values(view.image)
        models = [
            _model_values(view, number, info, shown, low, high)
            for number, (info, shown) in enumerate(zip(view.info.encoders, view.maps, strict=True))
        ]
        values = {
            "summary": SUMMARIES[view.state.view],
            "notes": view.notes,
            "hint": "Click a patch." if view.other is not None else "Click a patch, here or in a map.",
            "other": view.other is not None,
            "grid": _grid_values(view.finest, view.maps[view.finest]),
            "image": image,
            "shown": image if view.other is None else image_values(view.other),
            "models": models,
            **_scale_values(view, low, high),
        }
        return str(self._macros.encoders(values))


def _model_values(
    view: EncoderView, number: int, info: EncoderInfo, shown: EncoderMap, low: float, high: float
) -> dict[str, Any]:
    """Values of one encoder's figure."""
    name, values = view.state.view, shown.values
    entries: dict[str, Any] = {
        "number": number,
        "name": info.name,
        "caption": f"{shown.grid[0]} by {shown.grid[1]} patches{_layer_kind(info, shown)}",
        "labels": info.labels,
        "layer": shown.layer,
        "layer_label": info.labels[shown.layer],
        "last_label": [label for label in info.labels if label != OUTPUT][-1],
        "thumbnails": [
            {"uri": data_uri(Image.fromarray(pixels)), "label": label, "own": i == info.own}
            for i, (pixels, label) in enumerate(zip(shown.thumbnails, info.labels, strict=True))
        ],
        "grid": _grid_values(number, shown),
        "note": shown.note,
        "foot": "" if values is None else _foot(view, shown),
    }
    if values is None:
        return entries | {"kind": "empty"}
    return entries | {
        "kind": {"colours": "colours", "matching": "matches"}.get(name, "map"),
        "uri": data_uri(_enlarged(map_image(view, values, low, high))),
        "alt": f"{_alt(name)} in {info.name}.",
        "matches": [{"style": _cell((m.row, m.column), values.shape[:2])} for m in shown.matches],
    }


def map_image(view: EncoderView, values: np.ndarray, low: float, high: float) -> Image.Image:
    """Colour a map: one pixel for each patch, translucent unless the map is itself the image.

    Args:
        view: View that the map belongs to.
        values: Values of the map, see `EncoderMap`.
        low: Value at the lower end of the colour scale.
        high: Value at the upper end.
    """
    if view.state.view == "colours":
        return Image.fromarray(values)
    if view.state.view == "regions":
        image = Image.fromarray(REGION_COLOURS[values])
        image.putalpha(REGION_OPACITY)
        return image
    scaled = values / max(float(values.max()), 1e-12) if view.state.view == "attention" else values
    return translucent(scaled, COLOURS[0], low, high, low)


def _foot(view: EncoderView, shown: EncoderMap) -> str:
    """Sentence below a map."""
    assert shown.values is not None
    name = view.state.view
    if name == "matching":
        return f"Best match: similarity {shown.matches[0].similarity:.2f}."
    if name == "colours":
        assert shown.variance_share is not None
        partners = [
            info.name
            for info, other in zip(view.info.encoders, view.maps, strict=True)
            if other.basis == shown.basis and other is not shown
        ]
        meaning = f"a colour means the same in {_and(partners)}" if partners else "colours are its own: compare borders"
        return f"{round(100 * shown.variance_share)}% of the variance; {meaning}."
    if name == "attention":
        return f"{round(100 * float(shown.values.sum()))}% of its attention goes to patches."
    if name == "drift":
        cka = "" if shown.cka is None else f"; linear CKA {shown.cka:.2f}"
        return f"Average drift {shown.values.mean():.2f}{cka}. {shown.note}".strip()
    return ""


def limits(view: EncoderView) -> tuple[float, float]:
    """Values at the ends of the colour scale that all maps share."""
    maps = [shown.values for shown in view.maps if shown.values is not None]
    if view.state.view in ("similarity", "matching"):
        return min(float(values.min()) for values in maps), 1.0
    if view.state.view == "drift":
        return 0.0, max(max(float(values.max()) for values in maps), 1e-3)
    return 0.0, 1.0


def _scale_values(view: EncoderView, low: float, high: float) -> dict[str, Any]:
    """Values of the colour scale below the maps; without a bar for views that have none."""
    ends = f"{low:.2f}", f"{(low + high) / 2:.2f}", f"{high:.2f}"
    texts = {
        "similarity": (*ends, "Cosine similarity, one scale for all encoders: the patch itself has 1."),
        "matching": (*ends, "Cosine similarity with the chosen patch, one scale for all encoders."),
        "attention": (
            "least attended",
            "",
            "most attended",
            "Each map on a scale of its own, up to its highest value.",
        ),
        "drift": (*ends, "1 minus the cosine of both features of a patch: 0 where they point in one direction."),
    }
    if view.state.view not in texts or all(shown.values is None for shown in view.maps):
        return {"bar": None}
    left, middle, right, text = texts[view.state.view]
    return {"bar": data_uri(scale_bar(COLOURS[0])), "low": left, "middle": middle, "high": right, "scale_text": text}


def _grid_values(number: int, shown: EncoderMap) -> dict[str, Any]:
    """Values of an image that is clicked by the patches of one encoder."""
    return {
        "encoder": number,
        "rows": shown.grid[0],
        "columns": shown.grid[1],
        "row": shown.position[0],
        "column": shown.position[1],
        "cell": _cell(shown.position, shown.grid),
    }


def _cell(position: tuple[int, int], grid: tuple[int, ...]) -> Markup:
    """Style of the frame around a patch."""
    (row, column), (rows, columns) = position, grid
    return Markup(
        f"left:{100 * column / columns:.3f}%;top:{100 * row / rows:.3f}%;"
        f"width:{100 / columns:.3f}%;height:{100 / rows:.3f}%"
    )


def layer_name(info: EncoderInfo, layer: int) -> str:
    """Return the name of a layer, as in `layer 5`."""
    label = info.labels[layer]
    return "output" if label == OUTPUT else f"layer {label}"


def _layer_kind(info: EncoderInfo, shown: EncoderMap) -> str:
    """Say what is special about the layer that is shown."""
    kinds = [
        "output of the last norm" if info.labels[shown.layer] == OUTPUT else "",
        "embeddings" if shown.layer == 0 else "",
        "feature layer" if shown.layer == info.own else "",
    ]
    return "".join(f", {kind}" for kind in kinds if kind)


def _alt(view: str) -> str:
    return {
        "similarity": "Similarity with the chosen patch",
        "matching": "Similarity with the chosen patch, in the second image",
        "colours": "Patch features as colours",
        "regions": "Regions of similar features",
        "attention": "Attention of the CLS token",
        "drift": "Drift of the features",
    }[view]


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _enlarged(image: Image.Image) -> Image.Image:
    """Enlarge each pixel to a square with hard edges, so that a patch keeps its borders in every browser."""
    scale = max(SIDE_PX // max(image.size), 1)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
