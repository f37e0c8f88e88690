"""The mode for any two encoders for programs: an endpoint for `gradio_client`, HTTP, and MCP if it is installed.

Gradio publishes signature and docstring of the endpoint, so both are written for its users.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from pivot_hub.demo.encoder_service import EncoderService
from pivot_hub.demo.encoder_set import ENCODER_VIEWS, EncoderViewName
from pivot_hub.demo.encoder_state import EncoderState, split_names
from pivot_hub.demo.gradio_calls import PROGRAMS, as_gradio_error, png_path, upload_path
from pivot_hub.demo.view_state import whole_number


def add_encoder_endpoint(service: EncoderService) -> None:
    """Add the endpoint to the current `gr.Blocks`.

    Args:
        service: Encoders.
    """
    endpoint = EncoderEndpoint(service)

    def text(label: str) -> Any:
        return gr.Textbox("", visible=False, label=label)

    def number(name: str, label: str) -> Any:
        default = getattr(EncoderState, name)
        return gr.Number(default, visible=False, label=label, precision=0, minimum=min(default, 0))

    def image(label: str) -> Any:
        return gr.Image(visible=False, type="filepath", label=label)

    inputs = [
        image("Image: empty for a scene of the Shapes dataset"),
        text("Encoders: two to four Hub names, separated by commas; empty for the built-in ones"),
        gr.Radio(list(ENCODER_VIEWS), value=EncoderState.view, visible=False, label="View"),
        text("Layers: one number for each encoder, separated by commas; empty for their feature layers"),
        number("row", "Row of the patch, from 0 at the top, on the finest grid of the encoders: -1 for any"),
        number("column", "Column of the patch, from 0 at the left: -1 for any"),
        number("regions", "Number of regions"),
        image("Second image, for matches: empty for a scene"),
        number("scene", "Scene: any whole number gives its own"),
        number("other_scene", "Scene of the second image"),
    ]
    outputs = [gr.Image(visible=False, label="Figure", format="png"), gr.JSON(visible=False, label="Numbers")]
    gr.Button(visible=False).click(endpoint.encoders, inputs, outputs, api_name="encoders", **PROGRAMS)


class EncoderEndpoint:
    """The endpoint; the name of its public method is that of the endpoint."""

    def __init__(self, service: EncoderService) -> None:
        """Store the service.

        Args:
            service: Encoders.
        """
        self._service = service

    @as_gradio_error
    def encoders(
        self,
        image: dict[str, Any] | None = None,
        encoders: str = "",
        view: EncoderViewName = EncoderState.view,
        layers: str = "",
        row: int = EncoderState.row,
        column: int = EncoderState.column,
        regions: int = EncoderState.regions,
        other_image: dict[str, Any] | None = None,
        scene: int = EncoderState.scene,
        other_scene: int = EncoderState.other_scene,
    ) -> tuple[str, dict[str, Any]]:
        """Compare the patch features of two to four vision encoders on one image, at any layer.

        Args:
            image: Image as PNG, JPEG, WebP or GIF; empty for a synthetic scene.
            encoders: Hub names of two to four encoders or MLLMs, separated by commas; empty for the built-in ones.
            view: What to compute: similarity (of one patch with all), matching (its best matches in a second image),
                colours (principal components), regions (k-means), attention (of the CLS token) or drift (1 - cosine).
            layers: Layer of each encoder, separated by commas: 0 for the embeddings, negative numbers from the last
                one; empty for the layers that enter an MLLM.
            row: Row of the patch, from 0 at the top, on the finest grid of the encoders; -1 for any patch.
            column: Column of the patch, from 0 at the left; -1 for any patch.
            regions: Number of regions, 2 to 12.
            other_image: Second image, for matching; empty for a synthetic scene.
            scene: Number of the synthetic scene.
            other_scene: Number of the second synthetic scene.

        Returns:
            The figure, and all numbers: for each encoder its layers, its grid, the map and the best matches.
        """
        state = EncoderState(
            encoders=",".join(split_names(encoders or "")),
            view=view,
            layers=layers or "",
            row=whole_number("row", row),  # a JSON number may arrive as a float
            column=whole_number("column", column),
            regions=whole_number("regions", regions),
            scene=whole_number("scene", scene),
            other_scene=whole_number("other_scene", other_scene),
        )
        shown = self._service.view(state, upload_path(image), upload_path(other_image))
        return png_path(self._service.figure(shown)), self._service.numbers(shown)
