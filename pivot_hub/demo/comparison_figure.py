"""The figure of a comparison: what the Space shows, as one PNG."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib.figure import Figure  # not pyplot, which needs a display and keeps global state

from pivot_hub.demo.comparison import Comparison
from pivot_hub.explain.gradcam import Method
from pivot_hub.explain.heatmaps import COLOURS, DIVERGING, densities, stretch

TITLE_CHARACTERS = 48
MAP_OPACITY = 0.72


def draw_comparison(
    comparison: Comparison, file: Path | IO[bytes], method: Method = "gradcam", colours: str = COLOURS[0]
) -> None:
    """Draw the image, both saliency maps on one scale and their difference, with the colour scales below them.

    Args:
        comparison: Comparison of two MLLMs.
        file: PNG file that the figure is written to.
        method: Method of the saliency maps.
        colours: Colour scale of the maps; the difference has a diverging scale.
    """
    subject, (first, second) = comparison.subject, comparison.results
    image = subject.image
    maps = [stretch(m, image.size) for m in densities([result.maps[method] for result in comparison.results])]
    highest = max(float(m.max()) for m in maps) or 1.0
    difference = maps[1] - maps[0]
    reach = float(np.abs(difference).max()) or 1.0
    figure = Figure(figsize=(12.5, 3.9), layout="constrained")
    axes = figure.subplots(1, 4)
    titles = [
        ("Image", _shorten(subject.question)),
        (first.name, f"says: {_shorten(first.answer)}"),
        (second.name, f"says: {_shorten(second.answer)}"),
        ("Difference", f"{second.name} minus {first.name}"),
    ]
    for ax, (title, subtitle) in zip(axes, titles, strict=True):
        ax.imshow(image if ax is axes[0] else image.convert("L"), cmap="gray")
        ax.set_title(f"{_shorten(title)}\n{subtitle}", fontsize=9, parse_math=False)
        if subject.mask is not None:
            x = np.linspace(0, image.width - 1, subject.mask.shape[1])
            y = np.linspace(0, image.height - 1, subject.mask.shape[0])
            ax.contour(x, y, subject.mask, levels=[0.5], colors="white", linewidths=1.2)
        ax.set_axis_off()
    drawn_maps = [
        ax.imshow(m, cmap=colours, alpha=MAP_OPACITY, vmin=0, vmax=highest)
        for ax, m in zip(axes[1:3], maps, strict=True)
    ]
    drawn_difference = axes[3].imshow(difference, cmap=DIVERGING, alpha=MAP_OPACITY, vmin=-reach, vmax=reach)
    bar: Any = {"location": "bottom", "shrink": 0.9, "aspect": 40}
    label = f"{method} of {comparison.explain}, relative to a uniform map"
    figure.colorbar(drawn_maps[0], ax=axes[1:3], label=label, **bar)
    figure.colorbar(drawn_difference, ax=axes[3], **bar)
    # "tight" grows the figure where two-line titles need more room than the constrained layout leaves.
    figure.savefig(file, dpi=130, format="png", bbox_inches="tight", pad_inches=0.1)


def _shorten(text: str) -> str:
    """Return a text as one line of at most TITLE_CHARACTERS characters."""
    line = " ".join(text.split())
    return line if len(line) <= TITLE_CHARACTERS else f"{line[: TITLE_CHARACTERS - 1]}…"
