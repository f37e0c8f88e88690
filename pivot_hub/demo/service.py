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
from pivot_hub.data.synthetic import World
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
from pivot_hub.demo.model_bundle import MllmPair, PairNames, PairShelf
from pivot_hub.demo.view_state import Look
from pivot_hub.explain.gradcam import TokenMap
from pivot_hub.explain.patch_features import principal_colours, similarity


@dataclass(frozen=True)
class Seen:
    """A look with what it shows; the look's texts are those that were asked in the end."""

    look: Look
    comparison: Comparison


class Viewer:
    """Shared by all visitors: models and templates. What is one visitor's comes and goes as arguments."""

    def __init__(self, shelf: PairShelf, panels: Panels, on_gpu: Callable[[Any], Any] = lambda run: run) -> None:
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
        def compare_named(names: PairNames, *given: Any) -> Comparison:
            return compare(shelf.get(names), *given)

        @on_gpu
        def tokens_named(names: PairNames, comparison: Comparison) -> tuple[list[TokenMap], list[TokenMap]]:
            return compare_tokens(shelf.get(names), comparison)

        @on_gpu
        def patches_named(names: PairNames, image: Image.Image, layer: int | None) -> tuple[np.ndarray, np.ndarray]:
            return compare_patches(shelf.get(names), image, layer)

        self._compare, self._tokens, self._patches = compare_named, tokens_named, patches_named

    def pair(self, look: Look) -> MllmPair:
        """The pair a look names.

        Raises:
            CheckpointError: it cannot be had.
        """
        return self.shelf.get(look.names)

    def see(self, look: Look, upload: str | Path | None = None) -> Seen:
        """Compare both MLLMs as a look says.

        Args:
            look: what was chosen; without a question a scene brings its own, with its answers.
            upload: the visitor's own picture, which comes before the look's.

        Raises:
            DataError: the picture, the question or an answer cannot be used.
            CheckpointError: the pair cannot be had.
        """
        pair = self.pair(look)
        image = read_upload(Path(upload)) if upload else look.image()
        if image is None:
            scene = scene_subject(World(image_px=pair.image_px), look.scene, look.ask)
            own = bool(look.question)
            # The outline is that of the thing the scene's own question is about.
            mask = None if own and look.question.strip() != scene.question else scene.mask
            subject = Subject(scene.image, look.question, look.right, look.wrong, mask) if own else scene
        else:
            subject = Subject(fit_picture(pair, image), look.question, look.right, look.wrong)
            look = look.with_picture(subject.image) if upload else look
        layer = look.layer if 0 < look.layer < pair.layers else None
        comparison = self._compare(look.names, subject, look.explain, layer)
        return Seen(replace(look, question=subject.question, right=subject.right, wrong=subject.wrong), comparison)

    def stage(self, seen: Seen) -> str:
        """The maps side by side, as HTML."""
        return self.panels.stage(seen.comparison, seen.look.method, seen.look.colours)

    def closer(self, seen: Seen) -> str:
        """What the visitor chose to see below the maps, as HTML."""
        look, comparison = seen.look, seen.comparison
        if look.closer == "swipe":
            return self.panels.swipe(comparison, look.method, look.colours)
        if look.closer == "words":
            return self.panels.words(comparison, self._tokens(look.names, comparison), look.method, look.colours)
        tokens = self._patches(look.names, comparison.subject.image, comparison.layer)
        if look.closer == "colours":
            return self.panels.colours(comparison, tokens)
        return self.panels.patches(comparison, tokens, (look.row, look.column), look.colours)

    def figure(self, seen: Seen) -> Image.Image:
        """What is on the page as one picture, scales included."""
        from pivot_hub.demo.comparison_figure import draw_comparison

        file = io.BytesIO()
        draw_comparison(seen.comparison, file, seen.look.method, seen.look.colours)
        return Image.open(file)

    def numbers(self, seen: Seen) -> dict[str, Any]:
        """What is on the page as numbers."""
        look = seen.look
        chosen = {"scene": None if look.picture else look.scene, "method": look.method, "link": f"?{look.query()}"}
        return {**seen.comparison.facts(), **chosen, "sentence": seen.comparison.sentence(look.method)}

    def patch_numbers(self, seen: Seen) -> dict[str, Any]:
        """Similarity of the chosen patch with all, and the main axes as colour, in both encoders."""
        look, comparison = seen.look, seen.comparison
        tokens = self._patches(look.names, comparison.subject.image, comparison.layer)
        colours, share, joint = principal_colours(tokens)
        models = []
        for view, grid, picture in zip((comparison.first, comparison.second), tokens, colours, strict=True):
            row, column = min(look.row, grid.shape[0] - 1), min(look.column, grid.shape[1] - 1)
            alike = np.round(similarity(grid, row, column), 4).tolist()
            models.append(
                {"name": view.name, "row": row, "column": column, "similarity": alike, "rgb": picture.tolist()}
            )
        return {"models": models, "variance_of_rgb": round(share, 4), "one_basis": joint}

    def word_numbers(self, seen: Seen) -> dict[str, Any]:
        """Probability and map of each token of the explained answers."""
        comparison = seen.comparison
        sides = self._tokens(seen.look.names, comparison)
        models = [
            {
                "name": view.name,
                "answer": view.explained,
                "tokens": [
                    {"text": t.text, "log_prob": t.log_prob, "map": np.round(t.maps[seen.look.method], 7).tolist()}
                    for t in side
                ],
            }
            for view, side in zip((comparison.first, comparison.second), sides, strict=True)
        ]
        return {"method": seen.look.method, "models": models}
