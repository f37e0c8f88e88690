"""The figure of a comparison: what the Space shows, as one PNG."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib.figure import Figure  # not pyplot: no display and no global state are needed

from pivot_hub.demo.comparison import Comparison
from pivot_hub.explain.gradcam import Method
from pivot_hub.explain.heatmaps import COLOURS, DIVERGING, densities, stretch


def draw_comparison(
    comparison: Comparison, file: Path | IO[bytes], method: Method = "gradcam", colours: str = COLOURS[0]
) -> None:
    """Draw what the Space shows: the picture, both maps on one scale, their difference, with the scales beside them.

    Args:
        comparison: of two MLLMs.
        file: the PNG.
        method: whose maps.
        colours: of the maps; the difference has its own.
    """
    subject, views = comparison.subject, (comparison.first, comparison.second)
    image = subject.image
    large = [stretch(m, image.size) for m in densities([v.maps[method] for v in views])]
    top = max(float(m.max()) for m in large) or 1.0
    difference = large[1] - large[0]
    reach = float(np.abs(difference).max()) or 1.0
    figure = Figure(figsize=(12.5, 3.9), layout="constrained")
    axes = figure.subplots(1, 4)
    said = [f"says: {_plain(v.answer)}" for v in views]
    for ax, (title, text) in zip(
        axes,
        [
            ("The picture", _plain(subject.question)),
            (views[0].name, said[0]),
            (views[1].name, said[1]),
            ("Difference", f"{views[1].name} minus {views[0].name}"),
        ],
        strict=True,
    ):
        ax.imshow(image if ax is axes[0] else image.convert("L"), cmap="gray")
        ax.set_title(f"{_plain(title)}\n{text}", fontsize=9, parse_math=False)
        if subject.mask is not None:
            x, y = (
                np.linspace(0, image.width - 1, subject.mask.shape[1]),
                np.linspace(0, image.height - 1, subject.mask.shape[0]),
            )
            ax.contour(x, y, subject.mask, levels=[0.5], colors="white", linewidths=1.2)
        ax.set_axis_off()
    shown = [ax.imshow(m, cmap=colours, alpha=0.72, vmin=0, vmax=top) for ax, m in zip(axes[1:], large, strict=False)]
    apart = axes[3].imshow(difference, cmap=DIVERGING, alpha=0.72, vmin=-reach, vmax=reach)
    scale: Any = {"location": "bottom", "shrink": 0.9, "aspect": 40}
    figure.colorbar(shown[0], ax=axes[1:3], label=f"{method} of {comparison.explain}, times an even spread", **scale)
    figure.colorbar(apart, ax=axes[3], **scale)
    figure.savefig(file, dpi=130, format="png")


def _plain(text: str) -> str:
    """One line of at most 48 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 48 else f"{line[:47]}…"
