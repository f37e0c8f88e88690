"""The Space's work behind its page: a view state becomes a comparison, and that becomes panels, figure and numbers."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
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
    scene_subject,
)
from pivot_hub.demo.cropping import crop_for_encoders
from pivot_hub.demo.html import Panels, same_place
from pivot_hub.demo.model_bundle import BundleInfo, BundleNames, Progress
from pivot_hub.demo.swipe_animation import draw_swipe
from pivot_hub.demo.view_state import ViewState
from pivot_hub.demo.worker import WorkerPool
from pivot_hub.errors import DataError
from pivot_hub.explain.gradcam import TokenMap
from pivot_hub.explain.heatmaps import SIDE_PX
from pivot_hub.explain.patch_features import principal_colours, similarity

UPLOAD_SIDE_PX = 2 * SIDE_PX  # longer side to which an upload is reduced, as the panels show it
ON_PHOTOGRAPHS = (
    "The built-in models know nothing but synthetic scenes of shapes: on another image, their answers and maps mean "
    "little. Load other models for photographs, or compare encoders in the other tab."
)
FROM_A_LINK = "This image is the reduced copy inside a link: answers and maps may differ from those of the original."


@dataclass(frozen=True)
class ComparisonView:
    """A comparison with the view state it is shown in.

    Args:
        state: View state; its texts are the question and the answers that were compared.
        comparison: Results of both models.
        info: Description of the models.
        notes: Sentences that are shown beside the maps.
    """

    state: ViewState
    comparison: Comparison
    info: BundleInfo
    notes: tuple[str, ...] = ()

    def with_state(self, **changes: Any) -> ComparisonView:
        """Return the same comparison with another view state, of which only the display may differ."""
        return replace(self, state=replace(self.state, **changes))


class DemoService:
    """Models and templates, shared by all visitors. The data of one visitor are passed as arguments."""

    def __init__(
        self,
        bundles: BundleCache,
        panels: Panels,
        on_gpu: Callable[[Any], Any] = lambda function: function,
        workers: WorkerPool | None = None,
    ) -> None:
        """Load the bundle that the app starts with.

        Args:
            bundles: Cache of the model bundles.
            panels: Renderer of the panels.
            on_gpu: Decorator of the functions that run models; ZeroGPU's lends a GPU for the time of a call.
            workers: Processes for the models that visitors name by Hub name.

        Raises:
            CheckpointError: The bundle cannot be loaded.
        """
        self.bundles, self.panels = bundles, panels
        self.workers = workers or WorkerPool(runs=bundles.runs)
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

        self._in_this_process = {"compare": compare_by_name, "tokens": tokens_by_name, "patches": patches_by_name}

    def load(self, names: BundleNames, progress: Progress | None = None) -> BundleInfo:
        """Load the bundle of these names unless it is loaded, and describe it.

        Args:
            names: Names that a visitor gave.
            progress: Callback that takes the finished share, from 0 to 1, and the next step.

        Raises:
            CheckpointError: A name is not allowed, the bundle cannot be loaded, or it exceeds a limit.
        """
        if names != BundleNames():
            self.bundles.check_names(names)
        if self.bundles.are_local(names):
            return self.bundles.get(names, progress).info
        return self.workers.info(names, progress)

    def info(self, state: ViewState) -> BundleInfo:
        """Describe the bundle that a view state names; see `load`."""
        return self.load(state.bundle_names)

    def subject(self, example: ViewState) -> Subject:
        """Return image and question of an example, for the bundle that the app starts with."""
        image = example.load_image()
        if image is None:
            return _scene_subject(self.default_bundle.info, example)
        return Subject(image, example.question, example.right_answer, example.wrong_answer)

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
        info = self.info(state)
        if state.layer > info.layers:
            raise DataError(f"layer is {state.layer}: it must be between 0 and {info.layers}, the last layer of both.")
        image = read_reduced(upload) if upload else state.load_image()
        notes = []
        if image is None:
            subject = _scene_subject(info, state)
        else:
            image = crop_for_encoders(info, image)
            subject = Subject(image, state.question, state.right_answer, state.wrong_answer)
            if upload:
                state = state.with_image(image)
            elif state.image:
                notes.append(FROM_A_LINK)
            if state.bundle_names == self.bundles.names == BundleNames():
                notes.append(ON_PHOTOGRAPHS)
        layer = state.layer if 0 < state.layer < info.layers else None
        comparison = self._run(state.bundle_names, "compare", subject, state.explain, layer)
        comparison = replace(comparison, subject=subject)  # a process of its own leaves it out of the answer
        return ComparisonView(state, comparison, info, tuple(notes)).with_state(
            question=subject.question, right_answer=subject.right_answer, wrong_answer=subject.wrong_answer
        )

    def _run(self, names: BundleNames, function: str, *arguments: Any) -> Any:
        """Run a function where the models of these names are: in this process, or in one of their own."""
        if self.bundles.are_local(names):
            return self._in_this_process[function](names, *arguments)
        return self.workers.run(names, function, *arguments)

    def comparison_panel(self, view: ComparisonView) -> str:
        """Render the saliency maps side by side, as HTML."""
        return self.panels.comparison(view.comparison, view.state.method, view.state.colours, view.notes)

    def details_panel(self, view: ComparisonView) -> str:
        """Render the panel below the maps that the visitor chose, as HTML."""
        state, comparison = view.state, view.comparison
        if state.details == "swipe":
            return self.panels.swipe(comparison, state.method, state.colours)
        if state.details == "tokens":
            tokens = self._tokens(view)
            return self.panels.tokens(comparison, tokens, state.method, state.colours)
        features = self._features(view)
        if state.details == "colours":
            return self.panels.colours(comparison, features)
        return self.panels.patches(comparison, features, _patch_position(state, features[0]), state.colours)

    def figure(self, view: ComparisonView) -> bytes:
        """Draw the content of the page as one image, colour scales included, as PNG."""
        from pivot_hub.demo.comparison_figure import draw_comparison

        file = io.BytesIO()
        draw_comparison(view.comparison, file, view.state.method, view.state.colours)
        return file.getvalue()

    def animation(self, view: ComparisonView) -> bytes:
        """Draw the swipe between both maps as an animated WebP."""
        return draw_swipe(view.comparison, view.state.method, view.state.colours)

    def numbers(self, view: ComparisonView) -> dict[str, Any]:
        """Return the content of the page as numbers."""
        state = view.state
        values = view.comparison.to_dict()
        roles = ("first", "second", "parent")
        return {
            **values,
            "origins": dict(zip(roles, map(asdict, view.info.origins), strict=False)),
            "notes": list(view.notes),
            "scene": None if state.image or state.photo else state.scene,
            "photo": state.photo or None,
            "method": state.method,
            "link": f"?{state.query()}",
            "sentence": view.comparison.summary(state.method),
        }

    def patch_numbers(self, view: ComparisonView) -> dict[str, Any]:
        """Return the chosen patch's similarity with all others and the features as colours, in both encoders."""
        state, features = view.state, self._features(view)
        position = _patch_position(state, features[0])
        colours, variance_share, joint = principal_colours(features)
        models = []
        for result, grid, pixels in zip(view.comparison.results, features, colours, strict=True):
            row, column = same_place(position, features[0], grid)
            similarities = np.round(similarity(grid, row, column), 4).tolist()
            models.append(
                {"name": result.name, "row": row, "column": column, "similarity": similarities, "rgb": pixels.tolist()}
            )
        return {"models": models, "variance_of_rgb": round(variance_share, 4), "one_basis": joint}

    def token_numbers(self, view: ComparisonView) -> dict[str, Any]:
        """Return the probability and the saliency map of each token of the explained answers."""
        method = view.state.method
        tokens = self._tokens(view)
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
        features: tuple[np.ndarray, np.ndarray] = self._run(
            view.state.bundle_names, "patches", comparison.subject.image, comparison.layer
        )
        return features

    def _tokens(self, view: ComparisonView) -> tuple[list[TokenMap], list[TokenMap]]:
        """Token attribution of the explained answers in both models."""
        tokens: tuple[list[TokenMap], list[TokenMap]] = self._run(view.state.bundle_names, "tokens", view.comparison)
        return tokens


def read_reduced(upload: str | Path) -> Image.Image:
    """Decode an upload, reduced to what the panels show: models need no more, and megapixels cost seconds.

    Raises:
        DataError: The file is not an image, not whole, or too large.
    """
    image = read_upload(Path(upload), side_px=3 * UPLOAD_SIDE_PX)
    if max(image.size) > UPLOAD_SIDE_PX:
        image.thumbnail((UPLOAD_SIDE_PX, UPLOAD_SIDE_PX), reducing_gap=3.0)
    return image


def _patch_position(state: ViewState, grid: np.ndarray) -> tuple[int, int]:
    """Row and column of the chosen patch on the first encoder's grid.

    Raises:
        DataError: The grid has no such patch.
    """
    position = []
    for name, number, length in zip(("row", "column"), (state.row, state.column), grid.shape, strict=False):
        if number >= length and number != getattr(ViewState, name):  # the default may exceed a very small grid
            raise DataError(f"{name} is {number}: it must be between 0 and {length - 1} in these encoders.")
        position.append(min(number, length - 1))
    return position[0], position[1]


def _scene_subject(info: BundleInfo, state: ViewState) -> Subject:
    """The scene of a view state, with the visitor's question if there is one and otherwise its own."""
    scene = scene_subject(ShapesDataset(image_px=info.image_px), state.scene, state.kind)
    if not state.question:
        return scene
    # The mask is that of the object in the scene's own question, so it does not fit any other question.
    mask = scene.mask if state.question.strip() == scene.question else None
    return Subject(scene.image, state.question, state.right_answer, state.wrong_answer, mask)
