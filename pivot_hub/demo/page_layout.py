"""The components of the page, in the order in which it shows them; each function builds one part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from pivot_hub.data.synthetic import KINDS
from pivot_hub.demo.view_state import DETAILS, ViewState
from pivot_hub.explain.heatmaps import COLOURS

TITLE = "Where does each model look?"
INTRO = f"""# {TITLE}
Two AI models answer the same question about one picture. **Bright places** counted most for the answer. Both models
come from one parent: **SFT** trained one on right answers, **DPO** the other to prefer right answers to wrong ones."""
ABOUT = """**Grad-CAM** weights each feature of the encoder by how much it raises the answer, and keeps the places that
support it. The **gradient map** of [the paper](https://arxiv.org/abs/2510.16333) is the size of the gradient at the
tokens that enter the language model. Both have the resolution of the encoder's patch grid and are enlarged. The
built-in models are small: they were trained on synthetic scenes in minutes on two CPU cores, so they know nothing about
photographs. A comparison on one image is an example, not a result: the examples were chosen for maps that can be read,
and measured over many scenes, the built-in models show no difference between SFT and DPO. The photographs are in the
public domain or CC0, from the [sample data of scikit-image](https://scikit-image.org/docs/stable/api/skimage.data.html)."""
DETAILS_LABELS = ("Swipe", "Similar patches", "Patch colours", "Token attribution")


@dataclass(frozen=True)
class TextInputs:
    """Question and answers, with the button that compares the models and the place of error messages."""

    question: Any
    right_answer: Any
    wrong_answer: Any
    compare: Any
    message: Any


@dataclass(frozen=True)
class ImageInputs:
    """The scene, or the visitor's own image."""

    scene: Any
    kind: Any
    another: Any
    upload: Any


@dataclass(frozen=True)
class Settings:
    """Settings of the saliency maps."""

    explain: Any
    method: Any
    layer: Any
    opacity: Any
    colours: Any


@dataclass(frozen=True)
class ModelInputs:
    """Names of other models, and the place of messages about them."""

    first: Any
    second: Any
    parent: Any
    load: Any
    built_in: Any
    status: Any


@dataclass(frozen=True)
class Results:
    """The comparison, the details below it, and what shares them."""

    comparison: Any
    details: Any
    details_panel: Any
    link: Any
    embed: Any
    save_figure: Any
    save_animation: Any
    save_numbers: Any


@dataclass(frozen=True)
class Page:
    """All components of the page.

    Args:
        gallery: Examples.
        texts: Question and answers.
        images: Scene or upload.
        settings: Settings of the maps.
        models: Names of other models.
        results: Comparison, details and sharing.
        state: The visitor's `ViewState`.
        view: The `ComparisonView` that is displayed; None before the first one.
        query: Query string of the link, hidden.
        used_values: Question, answers and scene of the last comparison, with those that were sent for it, hidden.
        file_uri: Data URI of a file to download, hidden.
    """

    gallery: Any
    texts: TextInputs
    images: ImageInputs
    settings: Settings
    models: ModelInputs
    results: Results
    state: Any
    view: Any
    query: Any
    used_values: Any
    file_uri: Any

    @property
    def editable(self) -> dict[str, Any]:
        """The controls that a comparison may set while the visitor edits them, by the name of the field."""
        return {
            "question": self.texts.question,
            "right_answer": self.texts.right_answer,
            "wrong_answer": self.texts.wrong_answer,
            "scene": self.images.scene,
            "kind": self.images.kind,
        }

    @property
    def controls(self) -> dict[str, Any]:
        """The components that set a field of the view state, by the name of the field."""
        return {
            "scene": self.images.scene,
            "kind": self.images.kind,
            "question": self.texts.question,
            "right_answer": self.texts.right_answer,
            "wrong_answer": self.texts.wrong_answer,
            "explain": self.settings.explain,
            "method": self.settings.method,
            "layer": self.settings.layer,
            "colours": self.settings.colours,
            "opacity": self.settings.opacity,
            "details": self.results.details,
        }

    @property
    def model_names(self) -> list[Any]:
        """The components that name the models."""
        return [self.models.first, self.models.second, self.models.parent]


def build_page(gallery_html: str, script: str, layers: int, local_names: list[str]) -> Page:
    """Build the page inside the current `gr.Blocks`.

    Args:
        gallery_html: HTML of the examples.
        script: JavaScript of the panels.
        layers: Number of hidden states that Grad-CAM can explain.
        local_names: Names of the checkpoints that visitors may give without the Hub.
    """
    gr.Markdown(INTRO, elem_classes="intro")
    gallery = gr.HTML(gallery_html, js_on_load=script, elem_id="examples")
    with gr.Row(elem_classes="layout"):
        with gr.Column(scale=1, min_width=300, elem_classes="controls"):
            texts = _text_inputs()
            images = _image_inputs()
            settings = _settings(layers)
            models = _model_inputs(local_names)
        with gr.Column(scale=3, min_width=340, elem_classes="result"):
            results = _results(script)
    with gr.Accordion("What do the maps show?", open=False):
        gr.Markdown(ABOUT)
    return Page(
        gallery=gallery,
        texts=texts,
        images=images,
        settings=settings,
        models=models,
        results=results,
        # Both belong to one visitor; the models belong to all.
        state=gr.State(ViewState()),
        view=gr.State(),
        query=gr.Textbox(visible="hidden", elem_id="query"),
        used_values=gr.Textbox(visible="hidden", elem_id="used-values"),
        file_uri=gr.Textbox(visible="hidden"),
    )


def _text_inputs() -> TextInputs:
    with gr.Group():
        question = gr.Textbox(label="Question", info="Question about the image, to both models.", max_lines=3)
        right_answer = gr.Textbox(
            label="Right answer",
            info="The maps show what supports it. Leave it empty if you do not know it: each model's own answer is "
            "explained then.",
            max_lines=3,
        )
        wrong_answer = gr.Textbox(
            label="Wrong answer",
            info="Optional: shows how strongly each model prefers the right one to this one.",
            max_lines=3,
        )
        compare = gr.Button("Compare", variant="primary", elem_id="compare")
    message = gr.HTML(elem_id="message")
    return TextInputs(question, right_answer, wrong_answer, compare, message)


def _image_inputs() -> ImageInputs:
    with gr.Tabs():
        with gr.Tab("Synthetic scene"):
            scene = gr.Number(
                ViewState.scene, label="Scene", info="Any whole number gives its own scene.", precision=0, minimum=0
            )
            kind = gr.Dropdown(
                list(KINDS),
                value=ViewState.kind,
                label="Kind of question",
                info="The scene's own question, with its true answer and a wrong one.",
                filterable=False,
            )
            another = gr.Button("Another scene", elem_id="another")
        with gr.Tab("Your own image"):
            upload = gr.Image(
                type="filepath",
                label="Your image",
                sources=["upload", "clipboard", "webcam"],
                height=260,
                elem_id="upload",
                alt_text="Your own image",
            )
            gr.Markdown(
                "Upload or paste an image, or take one with the camera. The server deletes it within two hours.",
                elem_classes="hint",
            )
    return ImageInputs(scene, kind, another, upload)


def _settings(layers: int) -> Settings:
    with gr.Accordion("Settings", open=False):
        explain = gr.Radio(
            [("answer", "answer"), ("SFT loss", "sft"), ("DPO loss", "dpo")],
            value=ViewState.explain,
            label="Explained quantity",
            info="The log-probability of the answer, or the loss of one of the two trainings.",
        )
        method = gr.Radio(
            [("Grad-CAM", "gradcam"), ("gradient map", "gradient")],
            value=ViewState.method,
            label="Saliency map",
            info="Grad-CAM shows what supports the answer, the paper's gradient map everything that affects it.",
        )
        layer = gr.Slider(
            1,
            layers,
            value=layers,
            step=1,
            label="Layer",
            info="Layer of the encoder that Grad-CAM explains; the language model receives the last one.",
        )
        opacity = gr.Slider(
            0,
            100,
            value=ViewState.opacity,
            step=5,
            label="Opacity",
            info="Opacity of the map over the image, in percent.",
            elem_id="opacity",
        )
        colours = gr.Dropdown(
            list(COLOURS),
            value=ViewState.colours,
            label="Colours",
            info="All three scales are safe for colour-blind readers.",
            filterable=False,
        )
    return Settings(explain, method, layer, opacity, colours)


def _model_inputs(local_names: list[str]) -> ModelInputs:
    also = f" Also here: {', '.join(local_names)}." if local_names else ""
    with gr.Accordion("Other models", open=False):
        gr.Markdown(
            "Any two MLLMs of transformers: LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen-VL, InternVL, SmolVLM, Idefics3, "
            "Gemma 3, GLM-4V, by their Hub names (`owner/name` or `owner/name@revision`). One that cuts an image into "
            "tiles is explained on its view of the whole image. The current models stay until both others are loaded."
            f"{also}",
            elem_classes="hint",
        )
        first = gr.Textbox(label="First MLLM", info="Shown on the left.", max_lines=1)
        second = gr.Textbox(label="Second MLLM", info="Shown on the right.", max_lines=1)
        parent = gr.Textbox(label="Parent", info="Parent of both; only the DPO loss needs it.", max_lines=1)
        with gr.Row():
            load = gr.Button("Load", elem_id="load", min_width=80)
            built_in = gr.Button("Built-in models", elem_id="built-in", min_width=80)
        status = gr.HTML(elem_id="status", min_height=40)
    return ModelInputs(first, second, parent, load, built_in, status)


def _results(script: str) -> Results:
    comparison = gr.HTML(elem_id="comparison")
    details = gr.Radio(
        list(zip(DETAILS_LABELS, DETAILS, strict=True)), value=ViewState.details, label="Details", elem_id="details"
    )
    details_panel = gr.HTML(js_on_load=script, elem_id="details-panel")
    with gr.Row(elem_classes="share"):
        link = gr.Textbox(
            label="Share",
            info="This link restores the view. Of your own image it contains a reduced copy, on which answers and maps "
            "may differ.",
            interactive=False,
            buttons=["copy"],
            elem_id="link",
            max_lines=1,
            scale=3,
        )
        with gr.Column(scale=1, min_width=220):
            save_figure = gr.Button("Save figure (PNG)", size="sm", elem_id="save-figure")
            save_animation = gr.Button("Save swipe (animated WebP)", size="sm", elem_id="save-animation")
            save_numbers = gr.Button("Save numbers (JSON)", size="sm", elem_id="save-numbers")
    embed = gr.Textbox(
        label="Embed",
        info="These lines show the view inside another page.",
        interactive=False,
        buttons=["copy"],
        elem_id="embed",
        max_lines=1,
    )
    return Results(comparison, details, details_panel, link, embed, save_figure, save_animation, save_numbers)
