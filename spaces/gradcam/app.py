"""The Space: what DPO changed, in a browser. Layout and events only: `pivot_hub` computes and draws."""

from __future__ import annotations

import base64
import functools
import importlib.util
import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# ZeroGPU's package has to come before torch; a folder of its name, as in a checkout, has no file to load.
_zero = importlib.util.find_spec("spaces")
if _zero is not None and _zero.origin is not None:
    import spaces

    on_gpu: Callable[[Any], Any] = vars(spaces)["GPU"]
else:

    def on_gpu(run: Any) -> Any:
        """Without ZeroGPU a function runs where it is."""
        return run


import gradio as gr  # noqa: E402
from gradio.utils import get_upload_folder  # noqa: E402
from PIL import Image  # noqa: E402

from pivot_hub.data.synthetic import DESCRIBE, KINDS, Kind, ShapesDataset  # noqa: E402
from pivot_hub.demo.comparison import scene_subject  # noqa: E402
from pivot_hub.demo.html import Panels  # noqa: E402
from pivot_hub.demo.model_bundle import BundleCache, BundleNames  # noqa: E402
from pivot_hub.demo.service import Seen, Viewer  # noqa: E402
from pivot_hub.demo.view_state import CLOSER, ViewState, read_view_state  # noqa: E402
from pivot_hub.errors import DataError, PivotError  # noqa: E402
from pivot_hub.explain.gradcam import EXPLAINS, METHODS, Explain, Method  # noqa: E402
from pivot_hub.explain.heatmaps import COLOURS, data_uri  # noqa: E402

HERE = Path(__file__).parent
INTRO = """# What did DPO change?
Two vision encoders from one parent: one trained on by **SFT**, one by **DPO**. Both get the same picture and the same
question. Bright colours show where each one looked for the answer."""
ABOUT = """**Grad-CAM** weighs the encoder's features by how much each raises the answer, and keeps what speaks for it.
The **gradient map** of [the paper](https://arxiv.org/abs/2510.16333) is the size of the gradient at the tokens that
enter the language model. Both are the encoder's own grid of patches, enlarged. The built-in pair is small: it was
trained on drawn scenes in minutes on two CPU cores, so of photographs it knows nothing. What a pair shows on one
picture is an example, not a result: measured over many scenes, the built-in pair shows no difference between
SFT and DPO."""
# One line: maps hang hooks into shared models. Whoever waits is served in the order of arrival.
QUEUE: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1}
# Values come as they were sent: Gradio's own reading of pictures would answer a broken one with an error of Pillow's.
# `path_of`, `read_upload` and `Look` judge them.
AS_SENT: dict[str, Any] = {**QUEUE, "preprocess": False}
# Programs and those who load other encoders, minutes of a download perhaps, keep nobody else waiting.
PROGRAMS: dict[str, Any] = {**AS_SENT, "concurrency_id": "programs"}
LOADING: dict[str, Any] = {"concurrency_id": "loading", "concurrency_limit": 4}
# What a visitor does while the answer to the step before is on its way is not lost: the last step wins.
HIDDEN: dict[str, Any] = {
    **AS_SENT,
    "api_visibility": "private",
    "show_progress": "hidden",
    "trigger_mode": "always_last",
}
MOST_WAITING = 200
SET_OPACITY = "(percent) => { document.documentElement.style.setProperty('--heat', percent / 100); }"
SHOW_LINK = """(query) => {
  const theme = new URLSearchParams(location.search).get("__theme");
  const all = [query, theme && `__theme=${theme}`].filter(Boolean).join("&");
  const url = location.origin + location.pathname + (all ? `?${all}` : "");
  history.replaceState(null, "", url);
  for (const example of document.querySelectorAll("#examples button"))
    example.setAttribute("aria-pressed", query.startsWith(`${example.dataset.query}&`) && !query.includes("picture="));
  return url;
}"""
SHOW_MESSAGE = "() => { document.querySelector('#message .message')?.scrollIntoView({ block: 'nearest' }); }"
SHOW_MAPS = "() => { if (innerWidth <= 900) document.querySelector('#stage').scrollIntoView(); }"  # they stand above
SAVE_AS = """(uri) => {
  if (!uri) return;
  const link = document.createElement("a");
  link.href = uri;
  link.download = "%s";
  link.click();
}"""
THEME = gr.themes.Default(
    font=[gr.themes.Font(name) for name in ("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")],
    font_mono=[gr.themes.Font(name) for name in ("ui-monospace", "Consolas", "monospace")],
    primary_hue="indigo",
).set(  # Gradio's own greys are too faint to read
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
)
LAUNCH: dict[str, Any] = {
    "theme": THEME,
    "css_paths": HERE / "style.css",
    "footer_links": ["api", "settings"],
    "max_file_size": "20mb",
    "ssr_mode": False,
    "mcp_server": importlib.util.find_spec("mcp") is not None,
}


def path_of(file: Any) -> Path | None:
    """The file behind an image input as it was sent: one that was uploaded here, and no other of this machine.

    Gradio 6.31 checks this itself only where the sender marked the value as a file.

    Raises:
        DataError: it is none.
    """
    if file is None:
        return None
    path = file.get("path") if isinstance(file, dict) else None
    if not isinstance(path, str) or not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise DataError("This is no picture that was uploaded here; upload it again.")
    return Path(path)


def build_app(names: BundleNames = BundleNames(), runs: Path | None = None) -> gr.Blocks:
    """Build the app; models are loaded here, once for all visitors.

    Args:
        names: of the pair to start with; the shipped pair by default.
        runs: folder of checkpoints that visitors may name besides repositories of the Hub.

    Raises:
        CheckpointError: the pair cannot be loaded.
    """
    viewer = Viewer(BundleCache(names, runs), Panels(HERE), on_gpu)
    examples = [ViewState(**chosen) for chosen in json.loads((HERE / "examples.json").read_text())]
    dataset = ShapesDataset(image_px=viewer.start.image_px)
    pictures = [(scene_subject(dataset, e.scene, e.ask), e.query()) for e in examples]
    script = (HERE / "panels.js").read_text()

    with gr.Blocks(title="What did DPO change?", analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown(INTRO, elem_classes="intro")
        gallery = gr.HTML(viewer.panels.gallery(pictures), js_on_load=script, elem_id="examples")
        with gr.Row(elem_classes="desk"):
            with gr.Column(scale=1, min_width=300, elem_classes="choose"):
                with gr.Group():
                    question = gr.Textbox(
                        label="Question", info="What both models are asked about the picture.", max_lines=3
                    )
                    right = gr.Textbox(
                        label="Right answer",
                        info="The maps show what speaks for it. Leave it empty if you do not know: each model's own "
                        "answer is explained then.",
                        max_lines=3,
                    )
                    wrong = gr.Textbox(
                        label="Wrong answer",
                        info="Optional: shows how sure each model is of the right one against this one.",
                        max_lines=3,
                    )
                    button = gr.Button("Look", variant="primary", elem_id="look")
                message = gr.HTML(elem_id="message")
                with gr.Tabs():
                    with gr.Tab("A drawn scene"):
                        scene = gr.Number(
                            27, label="Scene", info="Any whole number draws its own scene.", precision=0, minimum=0
                        )
                        ask = gr.Dropdown(
                            list(KINDS),
                            value="colour",
                            label="Ask about",
                            info="The scene's own question, with its true answer and a wrong one.",
                            filterable=False,
                        )
                        another = gr.Button("Another scene", elem_id="another")
                    with gr.Tab("Your own picture"):
                        upload = gr.Image(
                            type="filepath",
                            label="Your picture",
                            sources=["upload", "clipboard", "webcam"],
                            height=260,
                            elem_id="upload",
                            alt_text="Your own picture",
                        )
                        gr.Markdown(
                            "Upload, paste or photograph one. The server deletes it within two hours.",
                            elem_classes="hint",
                        )
                with gr.Accordion("How to look", open=False):
                    explain = gr.Radio(
                        [("answer", "answer"), ("SFT loss", "sft"), ("DPO loss", "dpo")],
                        value="answer",
                        label="What to explain",
                        info="What speaks for the answer, or what each training loss would look at.",
                    )
                    method = gr.Radio(
                        [("Grad-CAM", "gradcam"), ("gradient map", "gradient")],
                        value="gradcam",
                        label="Map",
                        info="Grad-CAM shows what speaks for the answer, the paper's gradient map all that matters.",
                    )
                    layer = gr.Slider(
                        1,
                        viewer.start.layers,
                        value=viewer.start.layers,
                        step=1,
                        label="Layer",
                        info="Block of the encoder that Grad-CAM looks at; the language model sees the last one.",
                    )
                    opacity = gr.Slider(
                        0,
                        100,
                        value=ViewState.opacity,
                        step=5,
                        label="Opacity",
                        info="How much of the map covers the picture, percent.",
                        elem_id="opacity",
                    )
                    colours = gr.Dropdown(
                        list(COLOURS),
                        value=COLOURS[0],
                        label="Colours",
                        info="All three can be read by colour-blind people.",
                        filterable=False,
                    )
                with gr.Accordion("Other encoders", open=False):
                    gr.Markdown(
                        "Any two MLLMs in transformers' LLaVA format, by their Hub names (`owner/name` or "
                        "`owner/name@revision`). The pair that is shown stays until both are loaded."
                        + (f" Also here: {', '.join(viewer.shelf.known())}." if viewer.shelf.known() else ""),
                        elem_classes="hint",
                    )
                    first = gr.Textbox(label="First MLLM", info="Shown on the left.", max_lines=1)
                    second = gr.Textbox(label="Second MLLM", info="Shown on the right.", max_lines=1)
                    parent = gr.Textbox(label="Parent", info="Of both; only the DPO loss needs it.", max_lines=1)
                    with gr.Row():
                        load = gr.Button("Load", elem_id="load", min_width=80)
                        back = gr.Button("Built-in pair", elem_id="back", min_width=80)
                    loading = gr.HTML(elem_id="loading", min_height=40)
            with gr.Column(scale=3, min_width=340, elem_classes="result"):
                stage = gr.HTML(elem_id="stage")
                closer = gr.Radio(
                    list(zip(("Swipe", "Similar patches", "Patch colours", "Words"), CLOSER, strict=True)),
                    value="swipe",
                    label="Look closer",
                    elem_id="closer",
                )
                close = gr.HTML(js_on_load=script, elem_id="close")
                with gr.Row(elem_classes="share"):
                    link = gr.Textbox(
                        label="Link to this look",
                        info="Restores everything; your own picture travels in it, small.",
                        interactive=False,
                        buttons=["copy"],
                        elem_id="link",
                        max_lines=1,
                        scale=3,
                    )
                    with gr.Column(scale=1, min_width=220):
                        save_figure = gr.Button("Save figure (PNG)", size="sm", elem_id="save-figure")
                        save_numbers = gr.Button("Save numbers (JSON)", size="sm", elem_id="save-numbers")
        with gr.Accordion("What am I looking at?", open=False):
            gr.Markdown(ABOUT)

        # One visitor's own: what was chosen, and what it shows. Models are everybody's.
        chosen, seen = gr.State(ViewState()), gr.State()
        query = gr.Textbox(visible="hidden", elem_id="query")
        file_uri = gr.Textbox(visible="hidden")

        controls: dict[str, Any] = {
            "scene": scene,
            "ask": ask,
            "question": question,
            "right": right,
            "wrong": wrong,
            "explain": explain,
            "method": method,
            "layer": layer,
            "colours": colours,
            "opacity": opacity,
            "closer": closer,
        }
        given = [chosen, upload, *controls.values()]

        def take(view_state: ViewState, values: tuple[Any, ...]) -> ViewState:
            """The visitor's look with what the controls say now."""
            said = dict(zip(controls, values, strict=True))
            top = viewer.pair(view_state).layers
            said |= {name: int(said[name] or 0) for name in ("scene", "layer", "opacity")}  # sliders send floats
            said["layer"] %= top  # the last one is each encoder's own, which a look calls 0
            return replace(view_state, **said)

        def show(view_state: ViewState, file: Any) -> dict[Any, Any]:
            """Compare anew, and show all of it."""
            made = viewer.see(view_state, path_of(file))
            texts = {question: made.view_state.question, right: made.view_state.right, wrong: made.view_state.wrong}
            return {**redraw(made), **texts, scene: made.view_state.scene, ask: made.view_state.ask}

        def redraw(made: Seen) -> dict[Any, Any]:
            """Show what was compared before in other colours, by the other method, or closer."""
            return {
                chosen: made.view_state,
                seen: made,
                stage: viewer.stage(made),
                close: viewer.closer(made),
                message: "",
                query: made.view_state.query(),
            }

        def told(step: Callable[..., dict[Any, Any]]) -> Callable[..., dict[Any, Any]]:
            """Let what a visitor did wrong become a message on the page, which else stays as it is."""

            @functools.wraps(step)
            def run(*values: Any, **more: Any) -> dict[Any, Any]:
                try:
                    return step(*values, **more)
                except PivotError as error:
                    return {message: viewer.panels.message(str(error))}

            return run

        @told
        def look_now(view_state: ViewState, file: Any, *values: Any) -> dict[Any, Any]:
            return show(take(view_state, values), file)

        @told
        def look_at_scene(view_state: ViewState, file: Any, *values: Any) -> dict[Any, Any]:
            fresh = replace(take(view_state, values), question="", right="", wrong="", picture="")
            return {upload: None, **show(fresh, None)}

        @told
        def look_at_another(view_state: ViewState, file: Any, *values: Any) -> dict[Any, Any]:
            fresh = replace(take(view_state, values), question="", right="", wrong="", picture="")
            return {upload: None, **show(replace(fresh, scene=random.randrange(100_000)), None)}

        @told
        def look_at_example(event: gr.EventData, view_state: ViewState, file: Any, *values: Any) -> dict[Any, Any]:
            example = examples[int(event.index) % len(examples)]
            fresh = replace(take(view_state, values), question="", right="", wrong="", picture="")
            return {upload: None, **show(replace(fresh, scene=example.scene, ask=example.ask), None)}

        def look_at_own(view_state: ViewState, file: Any, *values: Any) -> dict[Any, Any]:
            """A picture was given, or taken away: by the visitor, or with a scene that is shown already."""
            if file is None and not view_state.picture:
                return {chosen: view_state}
            fresh = replace(take(view_state, values), question=DESCRIBE if file else "", right="", wrong="", picture="")
            fresh = replace(fresh, explain="answer")  # without a right answer there is no loss to explain
            try:
                return {explain: "answer", **show(fresh, file)}
            except PivotError as error:
                text = viewer.panels.message(str(error))
                return {message: text, upload: None, chosen: replace(view_state, picture="")}

        @told
        def draw_again(made: Seen | None, *values: Any) -> dict[Any, Any]:
            if made is None:
                return {seen: None}
            how = dict(zip(("method", "colours", "opacity", "closer"), values, strict=True))
            return redraw(Seen(replace(made.view_state, **how | {"opacity": int(how["opacity"])}), made.comparison))

        def remember_opacity(made: Seen | None, percent: float) -> dict[Any, Any]:
            """The page has set it already: only the link has to know."""
            if made is None:
                return {seen: None}
            made = Seen(replace(made.view_state, opacity=int(percent)), made.comparison)
            return {chosen: made.view_state, seen: made, query: made.view_state.query()}

        @told
        def pick_patch(event: gr.EventData, made: Seen | None) -> dict[Any, Any]:
            if made is None:
                return {seen: None}
            made = Seen(replace(made.view_state, row=int(event.row), column=int(event.column)), made.comparison)
            return {chosen: made.view_state, seen: made, close: viewer.closer(made), query: made.view_state.query()}

        def load_pair(
            view_state: ViewState, file: Any, *values: Any, progress: gr.Progress = gr.Progress()
        ) -> dict[Any, Any]:
            *values_of_controls, one, other, of_both = values
            wanted = BundleNames(one.strip(), other.strip(), of_both.strip())
            try:
                pair = viewer.shelf.get(wanted, progress)
                view_state = replace(
                    take(view_state, tuple(values_of_controls)),
                    first=wanted.first,
                    second=wanted.second,
                    parent=wanted.parent,
                    layer=0,
                )
                shown = show(view_state, file)
            except PivotError as error:
                return {loading: viewer.panels.message(f"{error} The pair that was shown stays.")}
            text = f"Shown: {pair.first.name} and {pair.second.name}."
            return {
                **shown,
                loading: viewer.panels.message(text, "note"),
                layer: gr.Slider(maximum=pair.layers, value=pair.layers),
            }

        def load_built_in(*values: Any, progress: gr.Progress = gr.Progress()) -> dict[Any, Any]:
            cleared = {first: "", second: "", parent: ""}
            return {**cleared, **load_pair(*values[:-3], "", "", "", progress=progress)}

        def open_link(request: gr.Request) -> dict[Any, Any]:
            """Restore what a link says; what it says wrong is told, and the rest of the page is as at the start."""
            problem = ""
            try:
                view_state = read_view_state(dict(request.query_params))
                shown = show(view_state, None)
            except PivotError as error:
                problem, view_state = str(error), ViewState()
                shown = show(view_state, None)
            pair = viewer.pair(view_state)
            top = gr.Slider(maximum=pair.layers, value=view_state.layer or pair.layers)
            others = {c: getattr(view_state, n) for n, c in controls.items() if c not in shown and c is not layer}
            named = {first: view_state.first, second: view_state.second, parent: view_state.parent}
            told_ = {message: viewer.panels.message(problem)}
            return {**shown, **others, **named, layer: top, **told_}

        all_shown = [chosen, seen, stage, close, message, query, question, right, wrong, scene, ask, upload, explain]
        gr.on([button.click, question.submit, right.submit, wrong.submit], look_now, given, all_shown, **HIDDEN)
        gr.on([explain.input, layer.input], look_now, given, all_shown, **HIDDEN)
        gr.on([scene.input, ask.input], look_at_scene, given, all_shown, **HIDDEN)
        another.click(look_at_another, given, all_shown, **HIDDEN)
        gallery.select(look_at_example, given, all_shown, **HIDDEN)
        # Not `input`: Gradio 6.31 fires it for files and not for what is pasted or photographed.
        upload.change(look_at_own, given, all_shown, **HIDDEN)
        how = [method, colours, opacity, closer]
        gr.on([method.input, colours.input, closer.input], draw_again, [seen, *how], all_shown, **HIDDEN)
        opacity.input(remember_opacity, [seen, opacity], [chosen, seen, query], **HIDDEN)
        close.select(pick_patch, [seen], [chosen, seen, close, query, message], **HIDDEN)
        opacity.change(None, opacity, js=SET_OPACITY)
        message.change(None, js=SHOW_MESSAGE)
        gr.on([button.click, another.click], None, js=SHOW_MAPS)
        query.change(None, query, link, js=SHOW_LINK)
        pair_shown = [*all_shown, layer, loading, first, second, parent]
        wanted = [*given, first, second, parent]
        loads: dict[str, Any] = {**HIDDEN, **LOADING, "show_progress": "full", "trigger_mode": "multiple"}
        loads["show_progress_on"] = loading
        load.click(load_pair, wanted, pair_shown, **loads)
        back.click(load_built_in, wanted, pair_shown, **loads)
        app.load(open_link, None, [*pair_shown, method, opacity, colours, closer], **{**HIDDEN, **LOADING})

        def figure_link(made: Seen | None) -> str:
            return "" if made is None else data_uri(viewer.figure(made))

        def numbers_link(made: Seen | None) -> str:
            if made is None:
                return ""
            text = json.dumps(viewer.numbers(made), indent=2)
            return f"data:application/json;base64,{base64.b64encode(text.encode()).decode()}"

        save_figure.click(figure_link, seen, file_uri, **HIDDEN).then(None, file_uri, js=SAVE_AS % "pivot-maps.png")
        save_numbers.click(numbers_link, seen, file_uri, **HIDDEN).then(None, file_uri, js=SAVE_AS % "pivot-maps.json")
        add_endpoints(viewer)
    return app.queue(max_size=MOST_WAITING)


def add_endpoints(viewer: Viewer) -> None:
    """Offer the page's work to programs: `gradio_client`, HTTP, and MCP where it is installed."""
    picture = gr.Image(visible=False, type="filepath", label="Picture: empty for a scene of the built-in world")
    scene = gr.Number(
        ViewState.scene, visible=False, label="Scene: any whole number draws its own", precision=0, minimum=0
    )
    ask = gr.Dropdown(list(KINDS), value=ViewState.ask, visible=False, label="Kind of the scene's own question")
    question = gr.Textbox("", visible=False, label="Question: empty for the scene's own, with its answers")
    right = gr.Textbox("", visible=False, label="Right answer: empty to explain what each model says")
    wrong = gr.Textbox("", visible=False, label="Wrong answer")
    explain = gr.Radio(list(EXPLAINS), value=ViewState.explain, visible=False, label="What to explain")
    method = gr.Radio(list(METHODS), value=ViewState.method, visible=False, label="Map")
    layer = gr.Number(0, visible=False, label="Layer for Grad-CAM: 0 for the one the MLLM sees", precision=0, minimum=0)
    colours = gr.Dropdown(list(COLOURS), value=ViewState.colours, visible=False, label="Colours of the maps")
    first = gr.Textbox("", visible=False, label="First MLLM by Hub name: empty for the built-in pair")
    second = gr.Textbox("", visible=False, label="Second MLLM")
    parent = gr.Textbox("", visible=False, label="Parent of both, for the DPO loss")
    row = gr.Number(ViewState.row, visible=False, label="Row of the patch, from 0 at the top", precision=0, minimum=0)
    column = gr.Number(ViewState.column, visible=False, label="Column, from 0 at the left", precision=0, minimum=0)
    what = [picture, scene, ask, question, right, wrong]
    pair = [first, second, parent]
    figure, numbers = gr.Image(visible=False, label="Figure", format="png"), gr.JSON(visible=False, label="Numbers")
    button = gr.Button(visible=False)

    def see(picture: dict[str, Any] | None = None, **chosen: Any) -> Seen:
        whole = ("scene", "layer", "row", "column")
        try:
            chosen |= {name: int(chosen[name]) for name in whole if chosen.get(name) is not None}  # JSON has one number
            return viewer.see(ViewState(**chosen), path_of(picture))
        except PivotError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def view_state(
        picture: dict[str, Any] | None = None,
        scene: int = ViewState.scene,
        ask: Kind = ViewState.ask,
        question: str = "",
        right: str = "",
        wrong: str = "",
        explain: Explain = ViewState.explain,
        method: Method = ViewState.method,
        layer: int = 0,
        colours: str = ViewState.colours,
        first: str = "",
        second: str = "",
        parent: str = "",
    ) -> tuple[Image.Image, dict[str, Any]]:
        """Show where two vision encoders, one trained by SFT and one by DPO, look for an answer on a picture.

        Args:
            picture: a PNG, JPEG, WebP or GIF; empty for a drawn scene.
            scene: number of the drawn scene.
            ask: kind of the scene's own question: colour, shape, position, count or presence.
            question: what is asked; empty for the scene's own, with its answers.
            right: the right answer, which the maps explain; empty to explain what each model says.
            wrong: a wrong answer, for the probability of the right one against it.
            explain: answer, sft or dpo: the answer's log-probability, or a training loss.
            method: gradcam or gradient.
            layer: block of the encoder that Grad-CAM looks at; 0 for the one the language model sees.
            colours: viridis, cividis or magma.
            first: Hub name of an MLLM in LLaVA format; empty for the built-in pair.
            second: Hub name of the other.
            parent: Hub name of their parent, which the dpo loss needs.

        Returns:
            The figure, and all numbers: answers, log-probabilities, maps, scores, overlap.
        """
        seen = see(
            picture,
            scene=scene,
            ask=ask,
            question=question,
            right=right,
            wrong=wrong,
            explain=explain,
            method=method,
            layer=layer,
            colours=colours,
            first=first,
            second=second,
            parent=parent,
        )
        return viewer.figure(seen), viewer.numbers(seen)

    def patches(
        picture: dict[str, Any] | None = None,
        scene: int = ViewState.scene,
        row: int = ViewState.row,
        column: int = ViewState.column,
        first: str = "",
        second: str = "",
        parent: str = "",
    ) -> dict[str, Any]:
        """Say how alike both encoders find one patch of a picture and every other, and show their features as colour.

        Args:
            picture: a PNG, JPEG, WebP or GIF; empty for a drawn scene.
            scene: number of the drawn scene.
            row: of the patch, from 0 at the top.
            column: of the patch, from 0 at the left.
            first: Hub name of an MLLM in LLaVA format; empty for the built-in pair.
            second: Hub name of the other.
            parent: Hub name of their parent.

        Returns:
            For each encoder the cosines (H, W) and the three main axes as colour (H, W, 3).
        """
        names = {"first": first, "second": second, "parent": parent}
        return viewer.patch_numbers(see(picture, question=DESCRIBE, scene=scene, row=row, column=column, **names))

    def words(
        picture: dict[str, Any] | None = None,
        scene: int = ViewState.scene,
        ask: Kind = ViewState.ask,
        question: str = "",
        right: str = "",
        wrong: str = "",
        method: Method = ViewState.method,
        first: str = "",
        second: str = "",
        parent: str = "",
    ) -> dict[str, Any]:
        """Show where each token of an answer depends on the picture, in both encoders.

        Args:
            picture: a PNG, JPEG, WebP or GIF; empty for a drawn scene.
            scene: number of the drawn scene.
            ask: kind of the scene's own question: colour, shape, position, count or presence.
            question: what is asked; empty for the scene's own, with its answers.
            right: the answer that is explained; empty for what each model says.
            wrong: a wrong answer.
            method: gradcam or gradient.
            first: Hub name of an MLLM in LLaVA format; empty for the built-in pair.
            second: Hub name of the other.
            parent: Hub name of their parent.

        Returns:
            For each model its tokens, each with log-probability and map (H, W).
        """
        texts = {"question": question, "right": right, "wrong": wrong}
        names = {"first": first, "second": second, "parent": parent}
        return viewer.word_numbers(see(picture, scene=scene, ask=ask, method=method, **texts, **names))

    button.click(
        view_state, [*what, explain, method, layer, colours, *pair], [figure, numbers], api_name="look", **PROGRAMS
    )
    button.click(patches, [picture, scene, row, column, *pair], numbers, api_name="patches", **PROGRAMS)
    button.click(words, [*what, method, *pair], numbers, api_name="words", **PROGRAMS)


def names_from_environment() -> tuple[BundleNames, Path | None]:
    """What to start with: PIVOT_FIRST, PIVOT_SECOND and PIVOT_PARENT, or what `pivot push --space` left; PIVOT_RUNS."""
    file = Path(__file__).with_name("pair.json")
    pushed = json.loads(file.read_text()) if file.is_file() else {}
    names = ("first", "second", "parent")
    first, second, parent = (os.environ.get(f"PIVOT_{name.upper()}", pushed.get(name, "")) for name in names)
    runs = os.environ.get("PIVOT_RUNS")
    return BundleNames(first, second, parent), Path(runs) if runs else None


if __name__ == "__main__":
    build_app(*names_from_environment()).launch(**LAUNCH)
