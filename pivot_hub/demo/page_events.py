"""The events of the page: what each control does, and which components it updates."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import gradio as gr

from pivot_hub.data.synthetic import DESCRIBE
from pivot_hub.demo.downloads import connect_download, json_bytes
from pivot_hub.demo.gradio_calls import LOADING, PRIVATE, error_message, upload_path
from pivot_hub.demo.model_bundle import BundleNames
from pivot_hub.demo.page_layout import Page
from pivot_hub.demo.page_turns import Updates, VisitorEvents, in_turn
from pivot_hub.demo.service import ComparisonView, DemoService
from pivot_hub.demo.view_state import ViewState, read_view_state, whole_number
from pivot_hub.errors import PivotError

CLEARED = "The answers belonged to the former question, so they were cleared."

SET_OPACITY = "(percent) => { document.documentElement.style.setProperty('--heat', percent / 100); }"
SHOW_LINK = """(query) => {
  const theme = new URLSearchParams(location.search).get("__theme");
  const parameters = [query, theme && `__theme=${theme}`].filter(Boolean).join("&");
  const url = location.origin + location.pathname + (parameters ? `?${parameters}` : "");
  if (!location.search.includes("mode=encoders")) history.replaceState(null, "", url);
  const shown = new URLSearchParams(query);
  for (const example of document.querySelectorAll("#examples button")) {
    const own = new URLSearchParams(example.dataset.query);
    const same = ["scene", "kind", "photo"].every((name) => shown.get(name) === own.get(name));
    example.setAttribute("aria-pressed", same && !shown.has("image"));
  }
  return [url, url && `<iframe src="${url.replaceAll("&", "&amp;")}" width="100%" height="1200"></iframe>`];
}"""
# What the visitor typed while the comparison was running stays.
KEEP_TYPED = """(text, ...current) => {
  if (!text) return current;
  const { sent, used } = JSON.parse(text);
  return current.map((value, i) => (value === sent[i] ? used[i] : value));
}"""
SHOW_MESSAGE = "() => { document.querySelector('#message .message')?.scrollIntoView({ block: 'nearest' }); }"
# On a narrow screen the maps are above the controls.
SHOW_MAPS = "() => { if (innerWidth <= 900) document.querySelector('#comparison').scrollIntoView(); }"


class PageEvents(VisitorEvents):
    """The functions behind the controls of the mode for two MLLMs."""

    def __init__(self, page: Page, service: DemoService, examples: Sequence[ViewState]) -> None:
        """Store the page's components, and what the functions need.

        Args:
            page: Components of the page.
            service: Models and templates.
            examples: View states of the gallery.
        """
        super().__init__({ViewState: page.state, ComparisonView: page.view})
        self.page, self.service, self.examples = page, service, examples
        self._serials = itertools.count()

    def failed(self, error: Exception, values: Sequence[Any]) -> Updates:
        """Return the message of an error."""
        return {self.page.texts.message: self.service.panels.message(error_message(error))}

    @in_turn("compare")
    def show_comparison(self, state: ViewState, upload: Any, *values: Any) -> Updates:
        """Compare the models on what the controls say; answers to the former question are cleared."""
        page, panels = self.page, self.service.panels
        chosen, cleared = _without_former_answers(state, self._read_controls(state, values))
        if not cleared:
            return self._compare(chosen, upload, values)
        try:
            return {**self._compare(chosen, upload, values), page.texts.message: panels.message(CLEARED, "note")}
        except PivotError as error:
            message = panels.message(f"{CLEARED} {error}")
            return {page.state: chosen, page.texts.message: message, page.used_values: self._used(chosen, values)}

    @in_turn("compare")
    def show_scene(self, state: ViewState, upload: Any, *values: Any) -> Updates:
        """Compare on the scene of the controls, with its own question."""
        return self._show_scene(self._read_controls(state, values), values)

    @in_turn("compare")
    def show_another_scene(self, state: ViewState, upload: Any, *values: Any) -> Updates:
        """Compare on a random scene."""
        chosen = self._read_controls(state, values, scene=random.randrange(100_000))
        return self._show_scene(chosen, values)

    @in_turn("compare")
    def show_example(self, event: gr.EventData, state: ViewState, upload: Any, *values: Any) -> Updates:
        """Compare on an example of the gallery."""
        example = self.examples[int(event.index) % len(self.examples)]
        chosen = self._read_controls(state, values, scene=example.scene, kind=example.kind)
        return self._show_scene(chosen, values, example)

    @in_turn("compare")
    def show_upload(self, state: ViewState, upload: Any, *values: Any) -> Updates:
        """Compare on an image that was added, or on the scene if the visitor removed the image.

        The input also changes when another function empties it to show a scene; then there is nothing to do.
        """
        page = self.page
        if upload is None and not state.image:
            return {page.state: state}
        described = _without_texts(self._read_controls(state, values, scene=state.scene))
        # Without a right answer there is no loss to explain.
        described = replace(described, question=DESCRIBE if upload else "", explain="answer")
        try:
            return {page.settings.explain: "answer", **self._compare(described, upload, values)}
        except Exception as error:
            message = self.service.panels.message(error_message(error))
            return {page.texts.message: message, page.images.upload: None, page.state: replace(state, image="")}

    @in_turn("redraw")
    def redraw(self, view: ComparisonView | None, method: str, colours: str, opacity: float, details: str) -> Updates:
        """Display the same comparison by another method, in other colours or with other details."""
        if view is None:
            return {self.page.view: None}
        return self._display(
            view.with_state(method=method, colours=colours, opacity=whole_number("opacity", opacity), details=details)
        )

    @in_turn("opacity")
    def store_opacity(self, view: ComparisonView | None, percent: float) -> Updates:
        """Store the opacity, which the browser has applied already, in the link."""
        page = self.page
        if view is None:
            return {page.view: None}
        view = view.with_state(opacity=whole_number("opacity", percent))
        return {page.state: view.state, page.view: view, page.query: view.state.query()}

    @in_turn("patch")
    def choose_patch(self, event: gr.EventData, view: ComparisonView | None) -> Updates:
        """Compare another patch with all others."""
        page = self.page
        if view is None:
            return {page.view: None}
        view = view.with_state(row=int(event.row), column=int(event.column))
        return {
            page.state: view.state,
            page.view: view,
            page.results.details_panel: self.service.details_panel(view),
            page.query: view.state.query(),
            page.texts.message: "",
        }

    def load_models(
        self, state: ViewState, upload: Any, *values: Any, progress: gr.Progress = gr.Progress()
    ) -> Updates:
        """Load the models that the visitor names, and compare them."""
        page, panels = self.page, self.service.panels
        *control_values, first, second, parent = values
        names = BundleNames(first.strip(), second.strip(), parent.strip())
        try:
            info = self.service.load(names, progress)
        except Exception as error:
            return {page.models.status: panels.message(f"{error_message(error)} The current models stay.")}

        def compare(state: ViewState) -> Updates:
            try:
                chosen = self._read_controls(state, control_values)
                chosen = replace(chosen, first=names.first, second=names.second, parent=names.parent, layer=0)
                updates = self._compare(chosen, upload, control_values)
            except Exception as error:
                return {page.models.status: panels.message(f"{error_message(error)} The current models stay.")}
            return {
                **updates,
                page.models.status: panels.message(f"Loaded: {info.names[0]} and {info.names[1]}.", "note"),
                page.settings.layer: gr.Slider(maximum=info.layers, value=info.layers),
            }

        return self.take_turn("compare", compare, [state])

    def load_built_in(self, *values: Any, progress: gr.Progress = gr.Progress()) -> Updates:
        """Return to the models that the app was started with."""
        no_names = ("", "", "")
        updates = self.load_models(*values[: -len(no_names)], *no_names, progress=progress)
        if not isinstance(updates, dict) or self.page.state not in updates:  # replaced by a later call, or an error
            return updates
        return {**dict(zip(self.page.model_names, no_names, strict=True)), **updates}

    def open_link(self, request: gr.Request) -> Updates:
        """Restore the view of the link; an invalid link shows a message above the default view."""
        page, problem = self.page, ""
        try:
            is_ours = request.query_params.get("mode") != "encoders"  # otherwise its parameters are the other mode's
            state = read_view_state(dict(request.query_params) if is_ours else {})
            updates = self._compare(state, None)
        except Exception as error:
            problem, state = error_message(error), ViewState()
            updates = self._compare(state, None)
        state = updates[page.state]
        layers = updates[page.view].info.layers
        layer = page.settings.layer
        control_values = {
            control: getattr(state, name)
            for name, control in page.controls.items()
            if control not in updates and control is not layer
        }
        return {
            **updates,
            **control_values,
            **dict(zip(page.model_names, (state.first, state.second, state.parent), strict=True)),
            layer: gr.Slider(maximum=layers, value=state.layer or layers),
            page.texts.message: self.service.panels.message(problem),
        }

    def _read_controls(self, state: ViewState, values: Sequence[Any], **choices: Any) -> ViewState:
        """The visitor's view state with the current values of the controls, and with choices that replace them."""
        choices = dict(zip(self.page.controls, values, strict=True)) | choices
        for name in ("scene", "layer", "opacity"):
            choices[name] = whole_number(name, choices[name])  # sliders send floats
        if choices["layer"] == self.service.info(state).layers:
            choices["layer"] = 0  # the last layer is each encoder's own
        return replace(state, **choices)

    def _show_scene(self, state: ViewState, values: Sequence[Any], example: ViewState = ViewState()) -> Updates:
        texts = {
            name: getattr(example, name) for name in ("question", "right_answer", "wrong_answer", "photo", "image")
        }
        return {self.page.images.upload: None, **self._compare(replace(state, **texts), None, values)}

    def _compare(self, state: ViewState, upload: Any, values: Sequence[Any] | None = None) -> Updates:
        """Run the comparison, and display it with the texts it used.

        Args:
            state: View state of the comparison.
            upload: Value of the image input.
            values: Values of the controls when the call was sent; None to set them whatever they are.
        """
        page = self.page
        view = self.service.compare(state, upload_path(upload))
        if values is None:
            used = {component: getattr(view.state, name) for name, component in page.editable.items()}
        else:
            used = {page.used_values: self._used(view.state, values)}
        return {**self._display(view), **used}

    def _used(self, state: ViewState, values: Sequence[Any]) -> str:
        """Text for KEEP_TYPED: what was sent from the editable controls, and what the comparison has used."""
        sent = dict(zip(self.page.controls, values, strict=True))
        names = list(self.page.editable)
        return json.dumps(
            {
                "serial": next(self._serials),  # so that each text is a change
                "sent": [sent[name] for name in names],
                "used": [getattr(state, name) for name in names],
            }
        )

    def _display(self, view: ComparisonView) -> Updates:
        page = self.page
        return {
            page.state: view.state,
            page.view: view,
            page.results.comparison: self.service.comparison_panel(view),
            page.results.details_panel: self.service.details_panel(view),
            page.texts.message: "",
            page.query: view.state.query(),
        }


def connect_events(app: gr.Blocks, page: Page, service: DemoService, examples: Sequence[ViewState]) -> None:
    """Connect the controls of the page with their functions, within the context of the app.

    Args:
        app: App that contains the page.
        page: Components of the page.
        service: Models and templates.
        examples: View states of the gallery.
    """
    events = PageEvents(page, service, examples)
    displayed = _connect_comparison(page, events)
    _connect_display(page, events, displayed)
    _connect_models(app, page, events, displayed)
    _connect_browser(page)
    _connect_downloads(page, service)


def _connect_comparison(page: Page, events: PageEvents) -> list[Any]:
    """Connect the controls that start a comparison; return the components that a comparison updates."""
    texts, images, settings = page.texts, page.images, page.settings
    inputs = [page.state, images.upload, *page.controls.values()]
    displayed = [
        *(page.state, page.view, page.results.comparison, page.results.details_panel, texts.message, page.query),
        *(page.used_values, images.upload, settings.explain),
    ]
    submits = [texts.compare.click, texts.question.submit, texts.right_answer.submit, texts.wrong_answer.submit]
    gr.on(submits, events.show_comparison, inputs, displayed, **PRIVATE)
    gr.on([settings.explain.input, settings.layer.input], events.show_comparison, inputs, displayed, **PRIVATE)
    gr.on([images.scene.input, images.kind.input], events.show_scene, inputs, displayed, **PRIVATE)
    images.another.click(events.show_another_scene, inputs, displayed, **PRIVATE)
    page.gallery.select(events.show_example, inputs, displayed, **PRIVATE)
    # Not `input`: Gradio 6.31 fires it for uploaded files but not for pasted images or the camera.
    images.upload.change(events.show_upload, inputs, displayed, **PRIVATE)
    return displayed


def _connect_display(page: Page, events: PageEvents, displayed: list[Any]) -> None:
    """Connect the controls that display the same comparison differently."""
    settings, results = page.settings, page.results
    display_settings = [settings.method, settings.colours, settings.opacity, results.details]
    changes = [settings.method.input, settings.colours.input, results.details.input]
    gr.on(changes, events.redraw, [page.view, *display_settings], displayed, **PRIVATE)
    opacity_outputs = [page.state, page.view, page.query, page.texts.message]
    settings.opacity.input(events.store_opacity, [page.view, settings.opacity], opacity_outputs, **PRIVATE)
    patch_outputs = [page.state, page.view, results.details_panel, page.query, page.texts.message]
    results.details_panel.select(events.choose_patch, [page.view], patch_outputs, **PRIVATE)


def _connect_models(app: gr.Blocks, page: Page, events: PageEvents, displayed: list[Any]) -> None:
    """Connect the controls that load other models, and the link that names them."""
    models, settings = page.models, page.settings
    inputs = [page.state, page.images.upload, *page.controls.values(), *page.model_names]
    outputs = [*displayed, settings.layer, models.status, *page.model_names]
    options: dict[str, Any] = {
        **PRIVATE,
        **LOADING,
        "show_progress": "full",
        "show_progress_on": models.status,
        "trigger_mode": "multiple",
    }
    models.load.click(events.load_models, inputs, outputs, **options)
    models.built_in.click(events.load_built_in, inputs, outputs, **options)
    display = [settings.method, settings.opacity, settings.colours, page.results.details]
    link_outputs = [*outputs, *page.editable.values(), *display]
    app.load(events.open_link, None, link_outputs, **{**PRIVATE, **LOADING})


def _connect_browser(page: Page) -> None:
    """Connect what the browser does itself, without the server."""
    texts = page.texts
    page.settings.opacity.change(None, page.settings.opacity, js=SET_OPACITY)
    texts.message.change(None, js=SHOW_MESSAGE)
    editable = list(page.editable.values())
    page.used_values.change(None, [page.used_values, *editable], editable, js=KEEP_TYPED)
    gr.on([texts.compare.click, page.images.another.click], None, js=SHOW_MAPS)
    page.query.change(None, page.query, [page.results.link, page.results.embed], js=SHOW_LINK)


def _connect_downloads(page: Page, service: DemoService) -> None:
    """Connect the buttons that save the figure, the animation and the numbers."""
    results, connect = page.results, partial(connect_download, view=page.view, file_uri=page.file_uri)
    connect(results.save_figure, make=service.figure, media_type="image/png", name="pivot-maps.png")
    connect(results.save_animation, make=service.animation, media_type="image/webp", name="pivot-maps.webp")
    connect(
        results.save_numbers,
        make=lambda view: json_bytes(service.numbers(view)),
        media_type="application/json",
        name="pivot-maps.json",
    )


def _without_former_answers(state: ViewState, chosen: ViewState) -> tuple[ViewState, bool]:
    """Clear the answers that belong to another question than the visitor's, as they would judge the wrong thing.

    Args:
        state: View state of the last comparison.
        chosen: View state of the controls.

    Returns:
        The view state, and whether an answer was cleared.
    """
    if not state.question or not chosen.question.strip() or chosen.question.strip() == state.question.strip():
        return chosen, False
    former: dict[str, Any] = {
        name: ""
        for name in ("right_answer", "wrong_answer")
        if getattr(chosen, name) and getattr(chosen, name) == getattr(state, name)
    }
    return replace(chosen, **former), bool(former)


def _without_texts(state: ViewState) -> ViewState:
    """The view state without an image, question and answers."""
    return replace(state, question="", right_answer="", wrong_answer="", image="", photo="")
