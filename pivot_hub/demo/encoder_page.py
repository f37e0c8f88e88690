"""The page of the mode for any two encoders: its components, and what each of them does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gradio as gr

from pivot_hub.demo.downloads import connect_download, json_bytes
from pivot_hub.demo.encoder_html import EncoderPanels
from pivot_hub.demo.encoder_service import EncoderService, EncoderView
from pivot_hub.demo.encoder_set import ENCODER_VIEWS, EncoderNames
from pivot_hub.demo.encoder_state import MODE, EncoderState, read_encoder_state, split_names
from pivot_hub.demo.gradio_calls import LOADING, PRIVATE, error_message, upload_path
from pivot_hub.demo.html import Panels
from pivot_hub.demo.page_turns import Updates, VisitorEvents, in_turn
from pivot_hub.demo.view_state import whole_number
from pivot_hub.explain.patch_views import FEWEST_REGIONS, MOST_REGIONS

INTRO = """# Any two encoders
One image in two to four vision encoders, at any layer: which patches are alike for each of them?"""
VIEW_LABELS = ("Similar patches", "Matches", "Colours (PCA)", "Regions", "CLS attention", "Drift")
SHOW_LINK = """(query) => {
  if (!query) return "";
  const parameters = new URLSearchParams(location.search);
  const theme = parameters.get("__theme");
  const url = `${location.origin}${location.pathname}?${query}${theme ? `&__theme=${theme}` : ""}`;
  if (parameters.get("mode") === "encoders") history.replaceState(null, "", url);
  return url;
}"""
# The address is the link of the mode that is shown. Gradio selects the first tab before it has a link.
ENTER_MLLMS = """(link) => { if (link) history.replaceState(null, "", link); }"""
ENTER_ENCODERS = """(link) => {
  const parameters = new URLSearchParams(location.search);
  if (parameters.get("mode") === "encoders") return;
  const theme = parameters.get("__theme");
  const empty = `${location.origin}${location.pathname}?mode=encoders${theme ? `&__theme=${theme}` : ""}`;
  history.replaceState(null, "", link || empty);
}"""


@dataclass(frozen=True)
class Tabs:
    """The tabs of both modes.

    Args:
        modes: The row of tabs.
        mllms: Tab of the mode for two MLLMs.
        encoders: Tab of the mode for any two encoders.
        mllms_link: Link that restores the view of the mode for two MLLMs.
    """

    modes: Any
    mllms: Any
    encoders: Any
    mllms_link: Any


@dataclass(frozen=True)
class EncoderPage:
    """All components of the mode.

    Args:
        names: Names of the encoders, one a line.
        load: Button that loads them.
        built_in: Button that returns to the encoders that the app was started with.
        status: Place of messages about the names.
        scene: Number of the scene.
        other_scene: Number of the second scene.
        upload: The visitor's own image.
        other_upload: The visitor's own second image.
        choice: Name of the view.
        regions: Number of regions.
        together: Whether the layers of all encoders move together.
        message: Place of error messages.
        panel: The maps.
        link: Link that restores the view.
        save_figure: Button that saves the images and maps as a figure.
        save_numbers: Button that saves the numbers.
        view: The `EncoderView` that is displayed; None before the first one.
        linked: Whether the page was opened by a link to this mode.
        query: Query string of the link, hidden.
        file_uri: Data URI of a file to download, hidden.
    """

    names: Any
    load: Any
    built_in: Any
    status: Any
    scene: Any
    other_scene: Any
    upload: Any
    other_upload: Any
    choice: Any
    regions: Any
    together: Any
    message: Any
    panel: Any
    link: Any
    save_figure: Any
    save_numbers: Any
    view: Any
    linked: Any
    query: Any
    file_uri: Any

    @property
    def controls(self) -> dict[str, Any]:
        """The components that set a field of the view state, by the name of the field."""
        return {
            "view": self.choice,
            "regions": self.regions,
            "scene": self.scene,
            "other_scene": self.other_scene,
        }


def build_encoder_page(script: str, local_names: list[str]) -> EncoderPage:
    """Build the mode's part of the page inside the current `gr.Tab`.

    Args:
        script: JavaScript of the panel.
        local_names: Names of the encoders that visitors may give without the Hub.
    """
    also = f" Also here: {', '.join(local_names)}." if local_names else ""
    gr.Markdown(INTRO, elem_classes="intro")
    with gr.Row(elem_classes="layout"):
        with gr.Column(scale=1, min_width=280, elem_classes="controls"):
            with gr.Group():
                names = gr.Textbox(
                    label="Encoders",
                    info="Two to four Hub names, one a line: vision encoders, or MLLMs, of which the encoder is taken. "
                    f"Empty: the built-in ones.{also}",
                    placeholder="facebook/dinov2-small\nopenai/clip-vit-base-patch32",
                    lines=3,
                    max_lines=4,
                    elem_id="encoder-names",
                )
                with gr.Row():
                    load = gr.Button("Load", variant="primary", elem_id="load-encoders", min_width=80)
                    built_in = gr.Button("Built-in", elem_id="built-in-encoders", min_width=80)
            status = gr.HTML(elem_id="encoder-status")
            scene, upload = _image_inputs("", EncoderState.scene)
            with gr.Accordion("Second image, for matches", open=False):
                other_scene, other_upload = _image_inputs("second ", EncoderState.other_scene)
        with gr.Column(scale=3, min_width=340, elem_classes="result"):
            choice = gr.Radio(
                list(zip(VIEW_LABELS, ENCODER_VIEWS, strict=True)),
                value=EncoderState.view,
                label="View",
                elem_id="encoder-view",
            )
            regions = gr.Slider(
                FEWEST_REGIONS,
                MOST_REGIONS,
                value=EncoderState.regions,
                step=1,
                label="Number of regions",
                visible=False,
                elem_id="regions",
            )
            message = gr.HTML(elem_id="encoder-message")
            panel = gr.HTML(js_on_load=script, elem_id="encoder-panel", min_height=300)
            together = gr.Checkbox(
                True,
                label="Move the layers together",
                info="The other encoders follow to the same share of their depth. A star marks the layer that an MLLM "
                "gets.",
                elem_id="together",
            )
            with gr.Row(elem_classes="share"):
                link = gr.Textbox(
                    label="Share",
                    info="This link restores the view, with reduced copies of your own images.",
                    interactive=False,
                    buttons=["copy"],
                    elem_id="encoder-link",
                    max_lines=1,
                    scale=3,
                )
                with gr.Column(scale=1, min_width=220):
                    save_figure = gr.Button("Save figure (PNG)", size="sm", elem_id="save-encoder-figure")
                    save_numbers = gr.Button("Save numbers (JSON)", size="sm", elem_id="save-encoder-numbers")
    return EncoderPage(
        names=names,
        load=load,
        built_in=built_in,
        status=status,
        scene=scene,
        other_scene=other_scene,
        upload=upload,
        other_upload=other_upload,
        choice=choice,
        regions=regions,
        together=together,
        message=message,
        panel=panel,
        link=link,
        save_figure=save_figure,
        save_numbers=save_numbers,
        view=gr.State(),
        linked=gr.State(False),
        query=gr.Textbox(visible="hidden", elem_id="encoder-query"),
        file_uri=gr.Textbox(visible="hidden"),
    )


def _image_inputs(which: str, scene_number: int) -> tuple[Any, Any]:
    """Build the inputs of the first or the second image: its scene, and an upload."""
    with gr.Tabs():
        with gr.Tab("Scene"):
            scene = gr.Number(
                scene_number,
                label=f"Number of the {which}scene",
                info="Any whole number gives its own scene of shapes.",
                precision=0,
                minimum=0,
            )
        with gr.Tab("Your own image"):
            upload = gr.Image(
                type="filepath",
                label=f"Your {which}image",
                sources=["upload", "clipboard", "webcam"],
                height=220,
                elem_id=f"{which.strip() or 'first'}-upload",
                alt_text=f"Your own {which}image",
            )
    return scene, upload


class EncoderEvents(VisitorEvents):
    """The functions behind the controls of the mode for any two encoders."""

    def __init__(
        self,
        page: EncoderPage,
        service: EncoderService,
        panels: EncoderPanels,
        messages: Callable[..., str],
    ) -> None:
        """Store the components, and what the functions need.

        Args:
            page: Components of the mode.
            service: Encoders.
            panels: Renderer of the maps.
            messages: Function that renders a message of a kind, see `Panels.message`.
        """
        super().__init__({EncoderView: page.view})
        self.page, self.service, self.panels, self._message = page, service, panels, messages

    def failed(self, error: Exception, values: Sequence[Any]) -> Updates:
        """Return the message of an error; the control that asked for what cannot be shown returns to what is shown."""
        shown = next((value.state for value in values if isinstance(value, EncoderView)), EncoderState())
        return {self.page.message: self._message(error_message(error)), self.page.choice: shown.view}

    @in_turn("show")
    def show(self, view: EncoderView | None, upload: Any, other_upload: Any, *values: Any) -> Updates:
        """Show what the controls say."""
        return self._show(view, self._state(view, values), upload, other_upload)

    @in_turn("show")
    def show_scene(self, view: EncoderView | None, upload: Any, other_upload: Any, *values: Any) -> Updates:
        """Show the first scene in place of the visitor's own image."""
        updates = self._show(view, replace(self._state(view, values), image=""), None, other_upload)
        return {**updates, self.page.upload: None}

    @in_turn("show")
    def show_other_scene(self, view: EncoderView | None, upload: Any, other_upload: Any, *values: Any) -> Updates:
        """Match in the second scene in place of the visitor's own second image."""
        state = replace(self._state(view, values), other_image="", view="matching")
        updates = self._show(view, state, upload, None)
        return {**updates, self.page.other_upload: None, self.page.choice: "matching"}

    @in_turn("show")
    def show_upload(self, view: EncoderView | None, upload: Any, other_upload: Any, *values: Any) -> Updates:
        """Show an image that was added, or the scene if the visitor removed it."""
        state = self._state(view, values)
        return self._show(view, state if upload else replace(state, image=""), upload, other_upload)

    @in_turn("show")
    def show_other_upload(self, view: EncoderView | None, upload: Any, other_upload: Any, *values: Any) -> Updates:
        """Match in a second image that was added, or in the second scene if the visitor removed it."""
        page, state = self.page, self._state(view, values)
        if not other_upload:
            return self._show(view, replace(state, other_image=""), upload, None)
        return {**self._show(view, replace(state, view="matching"), upload, other_upload), page.choice: "matching"}

    @in_turn("choose")
    def choose(
        self, event: gr.EventData, view: EncoderView | None, together: bool, upload: Any, other_upload: Any
    ) -> Updates:
        """Choose another patch, or another layer of one encoder."""
        if view is None:
            return {self.page.view: None}
        encoder, layer = int(event.encoder) % len(view.maps), getattr(event, "layer", None)
        if layer is not None:
            state = view.with_layer(encoder, int(layer), bool(together))
        else:
            state = view.with_patch(encoder, int(event.row), int(event.column))
        return self._show(view, state, upload, other_upload)

    def load_encoders(
        self,
        names: str,
        view: EncoderView | None,
        upload: Any,
        other_upload: Any,
        *values: Any,
        progress: gr.Progress = gr.Progress(),
    ) -> Any:
        """Load the encoders that the visitor names, and show them."""
        page = self.page
        given = split_names(names or "")
        stay = "" if view is None else " The current encoders stay."
        try:
            info = self.service.load(EncoderNames(tuple(given)), progress)
        except Exception as error:
            return {page.status: self._message(f"{error_message(error)}{stay}")}

        def show(view: EncoderView | None) -> Updates:
            state = replace(self._state(view, values), encoders=",".join(given), layers="")
            try:
                updates = self._show(view, state, upload, other_upload)
            except Exception as error:
                return {page.status: self._message(f"{error_message(error)}{stay}")}
            loaded = ", ".join(encoder.name for encoder in info.encoders)
            return {**updates, page.status: self._message(f"Loaded: {loaded}.", "note")}

        return self.take_turn("show", show, [view])

    def load_built_in(
        self, view: EncoderView | None, upload: Any, other_upload: Any, *values: Any, progress: Any = gr.Progress()
    ) -> Any:
        """Return to the encoders that the app was started with."""
        updates = self.load_encoders("", view, upload, other_upload, *values, progress=progress)
        return {**updates, self.page.names: ""} if isinstance(updates, dict) else updates

    @in_turn("show")
    def enter(self, linked: bool, view: EncoderView | None, upload: Any, other_upload: Any, *values: Any) -> Any:
        """Show the first maps when the visitor comes to this mode; `open_link` shows those of a link."""
        if linked or view is not None:
            return gr.skip()
        return self._show(None, self._state(None, values), upload, other_upload)

    def open_link(self, request: gr.Request) -> Any:
        """Restore the view of a link to this mode; an invalid link shows a message above the default view."""
        page, problem = self.page, ""
        if not _opens_mode(request):
            return gr.skip()
        try:
            state = read_encoder_state(dict(request.query_params))
            updates = self._show(None, state, None, None)
        except Exception as error:
            problem, state = error_message(error), EncoderState()
            updates = self._show(None, state, None, None)
        return {
            **updates,
            **{control: getattr(state, name) for name, control in page.controls.items() if control is not page.regions},
            page.regions: gr.Slider(value=state.regions, visible=state.view == "regions"),
            page.names: "\n".join(state.names.names),
            page.message: self._message(problem),
        }

    def _state(self, view: EncoderView | None, values: Sequence[Any]) -> EncoderState:
        """The displayed view state with the current values of the controls."""
        choices = dict(zip(self.page.controls, values, strict=True))
        for name in ("regions", "scene", "other_scene"):
            choices[name] = whole_number(name, choices[name])  # sliders send floats
        return replace(EncoderState() if view is None else view.state, **choices)

    def _show(self, before: EncoderView | None, state: EncoderState, upload: Any, other_upload: Any) -> Updates:
        """Compute and display a view state, whose patch is counted on the grid of the view before it."""
        page, grid = self.page, None if before is None else before.maps[before.finest].grid
        view = self.service.view(state, upload_path(upload), upload_path(other_upload), grid)
        return {
            page.view: view,
            page.panel: self.panels.render(view),
            page.regions: gr.Slider(visible=state.view == "regions"),
            page.message: "",
            page.query: view.state.query(),
        }


def connect_encoder_events(
    app: gr.Blocks, page: EncoderPage, service: EncoderService, panels: EncoderPanels, messages: Panels, tabs: Tabs
) -> None:
    """Connect the controls of the mode with their functions, within the context of the app.

    Args:
        app: App that contains the page.
        page: Components of the mode.
        service: Encoders.
        panels: Renderer of the maps.
        messages: Renderer of messages.
        tabs: The tabs of both modes.
    """
    events = EncoderEvents(page, service, panels, messages.message)
    inputs = [page.view, page.upload, page.other_upload, *page.controls.values()]
    displayed = [page.view, page.panel, page.regions, page.message, page.query, page.choice]
    gr.on([page.choice.input, page.regions.input], events.show, inputs, displayed, **PRIVATE)
    page.scene.input(events.show_scene, inputs, [*displayed, page.upload], **PRIVATE)
    page.other_scene.input(events.show_other_scene, inputs, [*displayed, page.other_upload], **PRIVATE)
    page.upload.change(events.show_upload, inputs, displayed, **PRIVATE)
    page.other_upload.change(events.show_other_upload, inputs, displayed, **PRIVATE)
    chosen = [page.view, page.together, page.upload, page.other_upload]
    page.panel.select(events.choose, chosen, displayed, **PRIVATE)
    options: dict[str, Any] = {**PRIVATE, **LOADING, "show_progress": "full", "show_progress_on": page.status}
    page.load.click(events.load_encoders, [page.names, *inputs], [*displayed, page.status], **options)
    page.built_in.click(events.load_built_in, inputs, [*displayed, page.status, page.names], **options)
    outputs = [*displayed, page.names, *page.controls.values()]
    at_once = {**PRIVATE, "queue": False, "concurrency_id": None, "concurrency_limit": None}
    app.load(_select_mode, None, [tabs.modes, page.linked], **at_once)
    app.load(events.open_link, None, list(dict.fromkeys(outputs)), **{**PRIVATE, **LOADING})
    tabs.encoders.select(None, page.link, js=ENTER_ENCODERS)
    tabs.encoders.select(events.enter, [page.linked, *inputs], displayed, **PRIVATE)
    tabs.mllms.select(None, tabs.mllms_link, js=ENTER_MLLMS)
    page.query.change(None, page.query, page.link, js=SHOW_LINK)
    connect = partial(connect_download, view=page.view, file_uri=page.file_uri)
    connect(page.save_figure, make=service.figure, media_type="image/png", name="pivot-encoders.png")
    connect(
        page.save_numbers,
        make=lambda view: json_bytes(service.numbers(view)),
        media_type="application/json",
        name="pivot-encoders.json",
    )


def _opens_mode(request: gr.Request) -> bool:
    """Return whether the page was opened by a link to this mode."""
    return bool(request.query_params.get("mode") == MODE)


def _select_mode(request: gr.Request) -> tuple[Any, bool]:
    """Open the tab of the mode that the link names, before its maps are computed."""
    linked = _opens_mode(request)
    return gr.Tabs(selected=MODE) if linked else gr.skip(), linked
