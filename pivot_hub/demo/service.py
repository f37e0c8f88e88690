"""The Space's work behind its page: a look becomes a comparison, a comparison becomes panels, figure and numbers."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pivot_hub.data.image import read_upload
from pivot_hub.data.synthetic import ShapesDataset
from pivot_hub.demo.comparison import (
    Comparison,
    Subject,
    compare,
    compare_patches,
    compare_tokens,
    fit_picture,
    scene_subject,
)
from pivot_hub.demo.html import Panels
from pivot_hub.demo.model_bundle import BundleCache, BundleNames, ModelBundle
from pivot_hub.demo.view_state import ViewState
from pivot_hub.explain.gradcam import TokenMap
from pivot_hub.explain.patch_features import principal_colours, similarity


@dataclass(frozen=True)
class Seen:
    """A look with what it shows; the look's texts are those that were asked in the end."""

    view_state: ViewState
    comparison: Comparison


class Viewer:
    """Shared by all visitors: models and templates. What is one visitor's comes and goes as arguments."""

    def __init__(self, shelf: BundleCache, panels: Panels, on_gpu: Callable[[Any], Any] = lambda run: run) -> None:
        """Load the pair to start with.

        Args:
            shelf: of pairs.
            panels: that draw.
            on_gpu: wraps what computes: a decorator that lends a GPU for the time of a call.

        Raises:
            CheckpointError: the pair cannot be loaded.
        """
        self.shelf, self.panels, self.start = shelf, panels, shelf.start()

        # Arguments of these travel to another process under ZeroGPU: names, not models.
        @on_gpu
        def compare_named(names: BundleNames, *given: Any) -> Comparison:
            return compare(shelf.get(names), *given)

        @on_gpu
        def tokens_named(names: BundleNames, comparison: Comparison) -> tuple[list[TokenMap], list[TokenMap]]:
            return compare_tokens(shelf.get(names), comparison)

        @on_gpu
        def patches_named(names: BundleNames, image: Image.Image, layer: int | None) -> tuple[np.ndarray, np.ndarray]:
            return compare_patches(shelf.get(names), image, layer)

        self._compare, self._tokens, self._patches = compare_named, tokens_named, patches_named

    def pair(self, view_state: ViewState) -> ModelBundle:
        """The pair a look names.

        Raises:
            CheckpointError: it cannot be had.
        """
        return self.shelf.get(view_state.names)

    def see(self, view_state: ViewState, upload: str | Path | None = None) -> Seen:
        """Compare both MLLMs as a look says.

        Args:
            look: what was chosen; without a question a scene brings its own, with its answers.
            upload: the visitor's own picture, which comes before the look's.

        Raises:
            DataError: the picture, the question or an answer cannot be used.
            CheckpointError: the pair cannot be had.
        """
        pair = self.pair(view_state)
        image = read_upload(Path(upload)) if upload else view_state.image()
        if image is None:
            scene = scene_subject(ShapesDataset(image_px=pair.image_px), view_state.scene, view_state.ask)
            own = bool(view_state.question)
            # The outline is that of the thing the scene's own question is about.
            mask = None if own and view_state.question.strip() != scene.question else scene.mask
            subject = (
                Subject(scene.image, view_state.question, view_state.right, view_state.wrong, mask) if own else scene
            )
        else:
            subject = Subject(fit_picture(pair, image), view_state.question, view_state.right, view_state.wrong)
            view_state = view_state.with_picture(subject.image) if upload else view_state
        layer = view_state.layer if 0 < view_state.layer < pair.layers else None
        comparison = self._compare(view_state.names, subject, view_state.explain, layer)
        return Seen(
            replace(view_state, question=subject.question, right=subject.right, wrong=subject.wrong), comparison
        )

    def stage(self, seen: Seen) -> str:
        """The maps side by side, as HTML."""
        return self.panels.stage(seen.comparison, seen.view_state.method, seen.view_state.colours)

    def closer(self, seen: Seen) -> str:
        """What the visitor chose to see below the maps, as HTML."""
        view_state, comparison = seen.view_state, seen.comparison
        if view_state.closer == "swipe":
            return self.panels.swipe(comparison, view_state.method, view_state.colours)
        if view_state.closer == "words":
            return self.panels.words(
                comparison, self._tokens(view_state.names, comparison), view_state.method, view_state.colours
            )
        tokens = self._patches(view_state.names, comparison.subject.image, comparison.layer)
        if view_state.closer == "colours":
            return self.panels.colours(comparison, tokens)
        return self.panels.patches(comparison, tokens, (view_state.row, view_state.column), view_state.colours)

    def figure(self, seen: Seen) -> Image.Image:
        """What is on the page as one picture, scales included."""
        from pivot_hub.demo.comparison_figure import draw_comparison

        file = io.BytesIO()
        draw_comparison(seen.comparison, file, seen.view_state.method, seen.view_state.colours)
        return Image.open(file)

    def numbers(self, seen: Seen) -> dict[str, Any]:
        """What is on the page as numbers."""
        view_state = seen.view_state
        chosen = {
            "scene": None if view_state.picture else view_state.scene,
            "method": view_state.method,
            "link": f"?{view_state.query()}",
        }
        return {**seen.comparison.to_dict(), **chosen, "sentence": seen.comparison.sentence(view_state.method)}

    def patch_numbers(self, seen: Seen) -> dict[str, Any]:
        """Similarity of the chosen patch with all, and the main axes as colour, in both encoders."""
        view_state, comparison = seen.view_state, seen.comparison
        tokens = self._patches(view_state.names, comparison.subject.image, comparison.layer)
        colours, share, joint = principal_colours(tokens)
        models = []
        for view, grid, picture in zip((comparison.first, comparison.second), tokens, colours, strict=True):
            row, column = min(view_state.row, grid.shape[0] - 1), min(view_state.column, grid.shape[1] - 1)
            alike = np.round(similarity(grid, row, column), 4).tolist()
            models.append(
                {"name": view.name, "row": row, "column": column, "similarity": alike, "rgb": picture.tolist()}
            )
        return {"models": models, "variance_of_rgb": round(share, 4), "one_basis": joint}

    def word_numbers(self, seen: Seen) -> dict[str, Any]:
        """Probability and map of each token of the explained answers."""
        comparison = seen.comparison
        sides = self._tokens(seen.view_state.names, comparison)
        models = [
            {
                "name": view.name,
                "answer": view.explained,
                "tokens": [
                    {
                        "text": t.text,
                        "log_prob": t.log_prob,
                        "map": np.round(t.maps[seen.view_state.method], 7).tolist(),
                    }
                    for t in side
                ],
            }
            for view, side in zip((comparison.first, comparison.second), sides, strict=True)
        ]
        return {"method": seen.view_state.method, "models": models}
