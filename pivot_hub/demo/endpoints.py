"""The page's work for programs: endpoints for `gradio_client`, HTTP, and MCP if it is installed.

Gradio publishes signature and docstring of each endpoint, so both are written for their users.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from pivot_hub.data.synthetic import DESCRIBE, KINDS, Kind
from pivot_hub.demo.gradio_calls import PROGRAMS, as_gradio_error, png_path, upload_path
from pivot_hub.demo.service import ComparisonView, DemoService
from pivot_hub.demo.view_state import ViewState, whole_number
from pivot_hub.explain.gradcam import EXPLAINS, METHODS, Explain, Method
from pivot_hub.explain.heatmaps import COLOURS

WHOLE_NUMBERS = ("scene", "layer", "row", "column")


def add_endpoints(service: DemoService) -> None:
    """Add the endpoints to the current `gr.Blocks`.

    Args:
        service: Models and templates.
    """
    endpoints = Endpoints(service)
    parameters = _parameters()
    subject = ["image", "scene", "kind", "question", "right_answer", "wrong_answer"]
    models = ["first", "second", "parent"]
    figure = gr.Image(visible=False, label="Figure", format="png")
    numbers = gr.JSON(visible=False, label="Numbers")
    trigger = gr.Button(visible=False)
    for function, names, outputs in (
        (endpoints.compare, [*subject, "explain", "method", "layer", "colours", *models], [figure, numbers]),
        (endpoints.patch_features, ["image", "scene", "row", "column", *models], numbers),
        (endpoints.token_attribution, [*subject, "method", *models], numbers),
    ):
        inputs = [parameters[name] for name in names]
        trigger.click(function, inputs, outputs, api_name=function.__name__, **PROGRAMS)


def _parameters() -> dict[str, Any]:
    """Hidden components, one for each parameter: they give its type, its default and its label."""

    def text(label: str) -> Any:
        return gr.Textbox("", visible=False, label=label)

    def whole_number(default: int, label: str) -> Any:
        return gr.Number(default, visible=False, label=label, precision=0, minimum=0)

    return {
        "image": gr.Image(visible=False, type="filepath", label="Image: empty for a scene of the Shapes dataset"),
        "scene": whole_number(ViewState.scene, "Scene: any whole number gives its own"),
        "kind": gr.Dropdown(list(KINDS), value=ViewState.kind, visible=False, label="Kind of the scene's own question"),
        "question": text("Question: empty for the scene's own, with its answers"),
        "right_answer": text("Right answer: empty to explain each model's own answer"),
        "wrong_answer": text("Wrong answer"),
        "explain": gr.Radio(list(EXPLAINS), value=ViewState.explain, visible=False, label="Explained quantity"),
        "method": gr.Radio(list(METHODS), value=ViewState.method, visible=False, label="Method of the saliency maps"),
        "layer": whole_number(0, "Layer for Grad-CAM: 0 for the one that the language model receives"),
        "colours": gr.Dropdown(
            list(COLOURS), value=ViewState.colours, visible=False, label="Colour scale of the saliency maps"
        ),
        "first": text("First MLLM by Hub name: empty for the built-in models"),
        "second": text("Second MLLM"),
        "parent": text("Parent of both, for the DPO loss"),
        "row": whole_number(ViewState.row, "Row of the patch, from 0 at the top"),
        "column": whole_number(ViewState.column, "Column of the patch, from 0 at the left"),
    }


class Endpoints:
    """The endpoints; the name of each public method is that of its endpoint."""

    def __init__(self, service: DemoService) -> None:
        """Store the service.

        Args:
            service: Models and templates.
        """
        self._service = service

    @as_gradio_error
    def compare(
        self,
        image: dict[str, Any] | None = None,
        scene: int = ViewState.scene,
        kind: Kind = ViewState.kind,
        question: str = "",
        right_answer: str = "",
        wrong_answer: str = "",
        explain: Explain = ViewState.explain,
        method: Method = ViewState.method,
        layer: int = 0,
        colours: str = ViewState.colours,
        first: str = "",
        second: str = "",
        parent: str = "",
    ) -> tuple[str, dict[str, Any]]:
        """Show where two vision encoders, one trained by SFT and one by DPO, look for an answer on an image.

        Args:
            image: Image as PNG, JPEG, WebP or GIF; empty for a synthetic scene.
            scene: Number of the synthetic scene.
            kind: Kind of the scene's own question: colour, shape, position, count or presence.
            question: Question about the image; empty for the scene's own, with its answers.
            right_answer: Right answer, which the maps explain; empty to explain each model's own answer.
            wrong_answer: Wrong answer, for the probability of the right one compared with it.
            explain: Explained quantity: answer (its log-probability), or sft or dpo (a training loss).
            method: Method of the saliency maps: gradcam or gradient.
            layer: Layer of the encoder that Grad-CAM explains; 0 for the one that the language model receives.
            colours: Colour scale of the maps: viridis, cividis or magma.
            first: Hub name of an MLLM; empty for the built-in models.
            second: Hub name of the other MLLM.
            parent: Hub name of their parent, which the dpo loss needs.

        Returns:
            The figure, and all numbers: answers, log-probabilities, maps, scores, overlap.
        """
        view = self._view(
            image,
            scene=scene,
            kind=kind,
            question=question,
            right_answer=right_answer,
            wrong_answer=wrong_answer,
            explain=explain,
            method=method,
            layer=layer,
            colours=colours,
            first=first,
            second=second,
            parent=parent,
        )
        return png_path(self._service.figure(view)), self._service.numbers(view)

    @as_gradio_error
    def patch_features(
        self,
        image: dict[str, Any] | None = None,
        scene: int = ViewState.scene,
        row: int = ViewState.row,
        column: int = ViewState.column,
        first: str = "",
        second: str = "",
        parent: str = "",
    ) -> dict[str, Any]:
        """Compare the features of one patch with those of all others, and show the features as colours.

        Args:
            image: Image as PNG, JPEG, WebP or GIF; empty for a synthetic scene.
            scene: Number of the synthetic scene.
            row: Row of the patch, from 0 at the top.
            column: Column of the patch, from 0 at the left.
            first: Hub name of an MLLM; empty for the built-in models.
            second: Hub name of the other MLLM.
            parent: Hub name of their parent.

        Returns:
            For each encoder the cosine similarities (H, W) and the three principal components as colours (H, W, 3).
        """
        names = {"first": first, "second": second, "parent": parent}
        view = self._view(image, question=DESCRIBE, scene=scene, row=row, column=column, **names)
        return self._service.patch_numbers(view)

    @as_gradio_error
    def token_attribution(
        self,
        image: dict[str, Any] | None = None,
        scene: int = ViewState.scene,
        kind: Kind = ViewState.kind,
        question: str = "",
        right_answer: str = "",
        wrong_answer: str = "",
        method: Method = ViewState.method,
        first: str = "",
        second: str = "",
        parent: str = "",
    ) -> dict[str, Any]:
        """Show where each token of an answer depends on the image, in both encoders.

        Args:
            image: Image as PNG, JPEG, WebP or GIF; empty for a synthetic scene.
            scene: Number of the synthetic scene.
            kind: Kind of the scene's own question: colour, shape, position, count or presence.
            question: Question about the image; empty for the scene's own, with its answers.
            right_answer: Answer that is explained; empty for each model's own answer.
            wrong_answer: Wrong answer.
            method: Method of the saliency maps: gradcam or gradient.
            first: Hub name of an MLLM; empty for the built-in models.
            second: Hub name of the other MLLM.
            parent: Hub name of their parent.

        Returns:
            For each model its tokens, each with log-probability and saliency map (H, W).
        """
        texts = {"question": question, "right_answer": right_answer, "wrong_answer": wrong_answer}
        names = {"first": first, "second": second, "parent": parent}
        view = self._view(image, scene=scene, kind=kind, method=method, **texts, **names)
        return self._service.token_numbers(view)

    def _view(self, image: dict[str, Any] | None, **choices: Any) -> ComparisonView:
        """Compare the models as the parameters say."""
        for name in WHOLE_NUMBERS:  # a JSON number may arrive as a float
            if name in choices:
                choices[name] = whole_number(name, choices[name])
        return self._service.compare(ViewState(**choices), upload_path(image))
