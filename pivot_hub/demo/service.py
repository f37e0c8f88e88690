"""The Space's work behind its page: a view state becomes a comparison, and that becomes panels, figure and numbers."""

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
from pivot_hub.demo.bundle_cache import BundleCache
from pivot_hub.demo.comparison import (
    Comparison,
    Subject,
    compare,
    compare_patches,
    compare_tokens,
    crop_for_encoders,
    scene_subject,
)
from pivot_hub.demo.html import Panels
from pivot_hub.demo.model_bundle import BundleNames, ModelBundle
from pivot_hub.demo.view_state import ViewState
from pivot_hub.explain.gradcam import TokenMap
from pivot_hub.explain.patch_features import principal_colours, similarity


@dataclass(frozen=True)
class ComparisonView:
    """A comparison with the view state it is shown in.

    Args:
        state: View state; its texts are the question and the answers that were compared.
        comparison: Results of both models.
    """

    state: ViewState
    comparison: Comparison

    def with_state(self, **changes: Any) -> ComparisonView:
        """Return the same comparison with another view state, of which only the display may differ."""
        return ComparisonView(replace(self.state, **changes), self.comparison)


class DemoService:
    """Models and templates, shared by all visitors. The data of one visitor are passed as arguments."""

    def __init__(
        self, bundles: BundleCache, panels: Panels, on_gpu: Callable[[Any], Any] = lambda function: function
    ) -> None:
        """Load the bundle that the app starts with.

        Args:
            bundles: Cache of the model bundles.
            panels: Renderer of the panels.
            on_gpu: Decorator of the functions that run models; ZeroGPU's lends a GPU for the time of a call.

        Raises:
            CheckpointError: The bundle cannot be loaded.
        """
        self.bundles, self.panels = bundles, panels
        self.default_bundle = bundles.default()

        # Under ZeroGPU the arguments of these functions are sent to another process: pass names, not models.
        @on_gpu
        def compare_by_name(names: BundleNames, subject: Subject, explain: Any, layer: int | None) -> Comparison:
            return compare(bundles.get(names), subject, explain, layer)

        @on_gpu
        def tokens_by_name(names: BundleNames, comparison: Comparison) -> tuple[list[TokenMap], list[TokenMap]]:
            return compare_tokens(bundles.get(names), comparison)

        @on_gpu
        def patches_by_name(names: BundleNames, image: Image.Image, layer: int | None) -> tuple[np.ndarray, np.ndarray]:
            return compare_patches(bundles.get(names), image, layer)

        self._compare, self._tokens, self._patches = compare_by_name, tokens_by_name, patches_by_name

    def bundle(self, state: ViewState) -> ModelBundle:
        """Return the bundle that a view state names.

        Raises:
            CheckpointError: The bundle cannot be loaded.
        """
        return self.bundles.get(state.bundle_names)

    def compare(self, state: ViewState, upload: str | Path | None = None) -> ComparisonView:
        """Compare both MLLMs as a view state says.

        Args:
            state: View state; a scene without a question gets its own question and answers.
            upload: File of the visitor's own image, which takes precedence over the view state's image.

        Returns:
            The comparison; its view state contains the image of an upload and the texts that were used.

        Raises:
            DataError: The image, the question or an answer cannot be used.
            CheckpointError: The bundle cannot be loaded.
        """
        bundle = self.bundle(state)
        image = read_upload(Path(upload)) if upload else state.load_image()
        if image is None:
            subject = _scene_subject(bundle, state)
        else:
            image = crop_for_encoders(bundle, image)
            subject = Subject(image, state.question, state.right_answer, state.wrong_answer)
            if upload:
                state = state.with_image(image)
        layer = state.layer if 0 < state.layer < bundle.layers else None
        comparison = self._compare(state.bundle_names, subject, state.explain, layer)
        return ComparisonView(state, comparison).with_state(
            question=subject.question, right_answer=subject.right_answer, wrong_answer=subject.wrong_answer
        )

    def comparison_panel(self, view: ComparisonView) -> str:
        """Render the saliency maps side by side, as HTML."""
        return self.panels.comparison(view.comparison, view.state.method, view.state.colours)

    def details_panel(self, view: ComparisonView) -> str:
        """Render the panel below the maps that the visitor chose, as HTML."""
        state, comparison = view.state, view.comparison
        if state.details == "swipe":
            return self.panels.swipe(comparison, state.method, state.colours)
        if state.details == "tokens":
            tokens = self._tokens(state.bundle_names, comparison)
            return self.panels.tokens(comparison, tokens, state.method, state.colours)
        features = self._features(view)
        if state.details == "colours":
            return self.panels.colours(comparison, features)
        return self.panels.patches(comparison, features, (state.row, state.column), state.colours)

    def figure(self, view: ComparisonView) -> Image.Image:
        """Draw the content of the page as one image, colour scales included."""
        from pivot_hub.demo.comparison_figure import draw_comparison

        file = io.BytesIO()
        draw_comparison(view.comparison, file, view.state.method, view.state.colours)
        return Image.open(file)

    def numbers(self, view: ComparisonView) -> dict[str, Any]:
        """Return the content of the page as numbers."""
        state = view.state
        return {
            **view.comparison.to_dict(),
            "scene": None if state.image else state.scene,
            "method": state.method,
            "link": f"?{state.query()}",
            "sentence": view.comparison.summary(state.method),
        }

    def patch_numbers(self, view: ComparisonView) -> dict[str, Any]:
        """Return the chosen patch's similarity with all others and the features as colours, in both encoders."""
        state, features = view.state, self._features(view)
        colours, variance_share, joint = principal_colours(features)
        models = []
        for result, grid, pixels in zip(view.comparison.results, features, colours, strict=True):
            row, column = min(state.row, grid.shape[0] - 1), min(state.column, grid.shape[1] - 1)
            similarities = np.round(similarity(grid, row, column), 4).tolist()
            models.append(
                {"name": result.name, "row": row, "column": column, "similarity": similarities, "rgb": pixels.tolist()}
            )
        return {"models": models, "variance_of_rgb": round(variance_share, 4), "one_basis": joint}

    def token_numbers(self, view: ComparisonView) -> dict[str, Any]:
        """Return the probability and the saliency map of each token of the explained answers."""
        method = view.state.method
        tokens = self._tokens(view.state.bundle_names, view.comparison)
        models = [
            {
                "name": result.name,
                "answer": result.explained,
                "tokens": [
                    {"text": t.text, "log_prob": t.log_prob, "map": np.round(t.maps[method], 7).tolist()}
                    for t in model_tokens
                ],
            }
            for result, model_tokens in zip(view.comparison.results, tokens, strict=True)
        ]
        return {"method": method, "models": models}

    def _features(self, view: ComparisonView) -> tuple[np.ndarray, np.ndarray]:
        """Patch features (H, W, D) of the compared image in both encoders."""
        comparison = view.comparison
        return self._patches(view.state.bundle_names, comparison.subject.image, comparison.layer)


def _scene_subject(bundle: ModelBundle, state: ViewState) -> Subject:
    """The scene of a view state, with the visitor's question if there is one and otherwise its own."""
    scene = scene_subject(ShapesDataset(image_px=bundle.image_px), state.scene, state.kind)
    if not state.question:
        return scene
    # The mask is that of the object in the scene's own question, so it does not fit any other question.
    mask = scene.mask if state.question.strip() == scene.question else None
    return Subject(scene.image, state.question, state.right_answer, state.wrong_answer, mask)
