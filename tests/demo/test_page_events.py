"""What the controls of the page do, without a browser: the functions behind them are called as Gradio calls them."""

from __future__ import annotations

import base64
import io
import json
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl

import gradio as gr
import numpy as np
import pytest
from gradio.utils import get_upload_folder
from PIL import Image
from typer.testing import CliRunner

from pivot_hub.cli.app import app as command_line
from pivot_hub.demo import comparison_figure
from pivot_hub.demo.bundle_cache import BundleCache
from pivot_hub.demo.comparison_figure import draw_comparison
from pivot_hub.demo.downloads import uri_maker
from pivot_hub.demo.gradio_calls import UNEXPECTED
from pivot_hub.demo.launch import load_module
from pivot_hub.demo.model_bundle import BundleNames
from pivot_hub.demo.page_events import CLEARED, PageEvents
from pivot_hub.demo.page_layout import build_page
from pivot_hub.demo.service import FROM_A_LINK, ON_PHOTOGRAPHS, DemoService
from pivot_hub.demo.view_state import PHOTO_FOLDER, PHOTOS, ViewState, read_view_state
from pivot_hub.errors import CheckpointError, DataError

QUESTION = "What is at the top?"

EXAMPLES = [
    ViewState(scene=27, kind="colour"),
    ViewState(scene=17, kind="position"),
    ViewState(photo="cat", question="What animal is it?", right_answer="cat", wrong_answer="dog"),
]


@pytest.fixture(scope="module")
def events() -> PageEvents:
    module = load_module()
    service = DemoService(BundleCache(), module.Panels(module.HERE))
    with gr.Blocks():
        page = build_page("", "", service.default_bundle.layers, [])
    return PageEvents(page, service, EXAMPLES)


def test_a_photograph_of_the_gallery_is_compared_with_its_own_question(events: PageEvents) -> None:
    page = events.page
    updates = events.show_example(SimpleNamespace(index=2), ViewState(), None, *controls(events, ViewState()))
    state = updates[page.state]
    assert (state.photo, state.question, state.right_answer, state.image) == ("cat", "What animal is it?", "cat", "")
    assert "know nothing but synthetic scenes" in updates[page.results.comparison]
    assert "photo=cat" in updates[page.query]
    assert read_view_state(dict(parse_qsl(updates[page.query]))) == state
    numbers = events.service.numbers(updates[page.view])
    assert (numbers["photo"], numbers["scene"]) == ("cat", None)
    back = events.show_another_scene(state, None, *controls(events, state))[page.state]
    assert (back.photo, back.right_answer == "cat") == ("", False)
    own = events.show_upload(state, photograph((90, 60)), *controls(events, state))[page.state]
    assert own.photo == ""
    assert own.image


@pytest.mark.parametrize("photo", PHOTOS)
def test_the_photographs_are_there_with_their_sources(photo: str) -> None:
    assert min(ViewState(photo=photo).load_image().size) >= 224  # type: ignore[union-attr]
    assert f"`{photo}.webp`" in (PHOTO_FOLDER / "README.md").read_text()
    assert sum(file.stat().st_size for file in PHOTO_FOLDER.iterdir()) < 1_000_000


@pytest.fixture(scope="module")
def example(events: PageEvents) -> dict[Any, Any]:
    """Updates of the page after a click on the first example."""
    return events.show_example(SimpleNamespace(index=0), ViewState(), None, *controls(events, ViewState()))


def controls(events: PageEvents, state: ViewState, **changes: Any) -> list[Any]:
    """Values that the page sends from its controls."""
    values = {name: getattr(state, name) for name in events.page.controls} | {"layer": 5} | changes
    return list(values.values())


def used(events: PageEvents, updates: dict[Any, Any]) -> dict[str, Any]:
    """Texts and scene that a comparison sets, by the name of the field."""
    values = json.loads(updates[events.page.used_values])
    return dict(zip(events.page.editable, values["used"], strict=True))


def photograph(size: tuple[int, int], name: str = "photo.jpg") -> dict[str, str]:
    """Upload a photograph to the app; return the value of the image input."""
    folder = Path(get_upload_folder()) / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").convert("RGB").resize(size).save(folder / name)
    return {"path": str(folder / name)}


def test_answers_to_the_former_question_are_cleared(events: PageEvents, example: dict[Any, Any]) -> None:
    page, state = events.page, example[events.page.state]
    assert state.right_answer == "It is teal."
    updates = events.show_comparison(state, None, *controls(events, state, question=QUESTION))
    assert CLEARED in updates[page.texts.message]
    assert "not right" not in updates[page.results.comparison]
    assert list(used(events, updates).values())[:3] == [QUESTION, "", ""]
    own = {"question": QUESTION, "right_answer": "A star.", "wrong_answer": state.wrong_answer}
    updates = events.show_comparison(state, None, *controls(events, state, **own))
    assert used(events, updates)["right_answer"] == "A star."
    assert used(events, updates)["wrong_answer"] == ""
    updates = events.show_comparison(state, None, *controls(events, state, explain="dpo", question=QUESTION))
    assert CLEARED in updates[page.texts.message]
    assert "give a right and a wrong one" in updates[page.texts.message]
    again = controls(events, updates[page.state], right_answer="It is teal.", wrong_answer="It is red.")
    assert used(events, events.show_comparison(updates[page.state], None, *again))["right_answer"] == "It is teal."


def test_a_comparison_says_which_values_it_was_sent(events: PageEvents, example: dict[Any, Any]) -> None:
    """So that the browser keeps what was typed since."""
    values = json.loads(example[events.page.used_values])
    sent = dict(zip(events.page.editable, values["sent"], strict=True))
    assert sent["question"] == ""
    assert used(events, example)["question"] == example[events.page.state].question
    assert not {*events.page.editable.values()} & {*example}, "the field is set, whatever was typed"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scene": None}, "scene is empty: give a whole number."),
        ({"scene": 2.7}, "scene is &#39;2.7&#39;: it must be a whole number."),
        ({"scene": -3}, "scene is -3: it must be between 0"),
        ({"opacity": 5000}, "opacity is 5000: it must be between 0 and 100."),
        ({"layer": 99}, "layer is 99: it must be between 0 and 5"),
    ],
)
def test_wrong_numbers_get_a_message(events: PageEvents, values: dict[str, Any], message: str) -> None:
    updates = events.show_scene(ViewState(), None, *controls(events, ViewState(), **values))
    assert list(updates) == [events.page.texts.message]
    assert message in updates[events.page.texts.message]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"layer": "99"}, "layer is 99: it must be between 0 and 5"),
        ({"opacity": "5000"}, "opacity is 5000: it must be between 0 and 100"),
        ({"row": "99", "details": "patches"}, "row is 99: it must be between 0 and 7"),
        ({"column": "8", "details": "patches"}, "column is 8: it must be between 0 and 7"),
    ],
)
def test_a_link_with_a_number_out_of_range_gets_a_message(
    events: PageEvents, query: dict[str, str], message: str
) -> None:
    request: Any = SimpleNamespace(query_params=query)
    updates = events.open_link(request)
    assert message in updates[events.page.texts.message]
    assert updates[events.page.state].query() == ViewState(**_texts(updates[events.page.state])).query()


def _texts(state: ViewState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in ("question", "right_answer", "wrong_answer")}


def test_an_unexpected_error_is_a_message_without_its_text(
    events: PageEvents, example: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(events.service, "compare", fail)
    state = example[events.page.state]
    updates = events.show_comparison(state, None, *controls(events, state))
    assert UNEXPECTED in updates[events.page.texts.message]
    with pytest.raises(gr.Error, match="for a reason that the app does not know"):
        uri_maker(fail, "image/png")(example[events.page.view])


def test_a_download_is_a_data_uri_and_nothing_before_the_first_view(
    events: PageEvents, example: dict[Any, Any]
) -> None:
    make = uri_maker(events.service.figure, "image/png")
    assert make(None) == ""
    media, _, content = make(example[events.page.view]).partition(",")
    assert media == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as figure:
        assert (figure.format, figure.size) == ("PNG", (1250, 430))


def test_a_photograph_is_reduced_to_the_panel(events: PageEvents) -> None:
    upload = photograph((9166, 6875))
    start = time.process_time()
    view = events.service.compare(ViewState(question=QUESTION), upload["path"])
    assert view.comparison.subject.image.size == (640, 480)
    assert time.process_time() - start < 5  # it was 36 s, in one queue
    assert ON_PHOTOGRAPHS in events.service.comparison_panel(view)
    again = events.service.compare(view.state)
    assert again.notes == (FROM_A_LINK, ON_PHOTOGRAPHS)
    assert FROM_A_LINK in events.service.comparison_panel(again)
    assert events.service.compare(ViewState()).notes == ()


def test_numbers_name_the_models(events: PageEvents, trained: Path, example: dict[Any, Any]) -> None:
    numbers = events.service.numbers(example[events.page.view])
    assert list(numbers["origins"]) == ["first", "second", "parent"]
    for origin in numbers["origins"].values():
        assert origin["repository"] == "pivot_hub:recipes/shapes/pair"
        assert len(origin["revision"]) == 40
        assert len(origin["weights_sha256"]) == 64
    info = BundleCache(runs=trained).get(BundleNames("3-sft", "3-dpo")).info
    provenance = json.loads((trained / "3-dpo" / "provenance.json").read_text())
    assert asdict(info.origins[1]) == {
        "repository": None,
        "revision": None,
        "weights_sha256": provenance["weights_sha256"],
    }


def test_the_titles_of_a_figure_are_whole(events: PageEvents) -> None:
    state = ViewState(scene=77462, kind="shape", question="What shape is there?")
    file = io.BytesIO()
    draw_comparison(events.service.compare(state).comparison, file)
    with Image.open(file) as figure:
        pixels = np.asarray(figure.convert("L"))
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert edge.min() == 255, "the figure is cut"


def test_a_figure_does_not_depend_on_the_one_before(events: PageEvents) -> None:
    """The axes are made once. Images differ in size and shape, masks and answers are there or not."""
    states = [
        ViewState(scene=3),
        ViewState(photo="cat", question="What animal is it?", right_answer="cat", wrong_answer="dog"),
        ViewState(scene=5, question="What $x$ is it?", layer=2),
    ]
    comparisons = [events.service.compare(state).comparison for state in states]
    settings = [("gradcam", "viridis"), ("gradient", "magma"), ("gradcam", "cividis")]

    def drawn(number: int) -> bytes:
        file = io.BytesIO()
        arguments: Any = settings[number]
        draw_comparison(comparisons[number], file, *arguments)
        return file.getvalue()

    fresh = []
    for number in range(3):
        comparison_figure._row.cache_clear()
        fresh.append(drawn(number))
    assert len(set(fresh)) == 3
    for number in (0, 1, 2, 0, 2, 1, 0):
        assert drawn(number) == fresh[number], number


def test_the_second_encoder_shows_the_same_place(events: PageEvents, monkeypatch: pytest.MonkeyPatch) -> None:
    view = events.service.compare(ViewState(row=7, column=4))
    grids = np.random.default_rng(0).normal(size=(8, 8, 4)), np.random.default_rng(0).normal(size=(16, 16, 4))
    monkeypatch.setattr(events.service, "_features", lambda view: grids)
    models = events.service.patch_numbers(view)["models"]
    assert [(m["row"], m["column"]) for m in models] == [(7, 4), (15, 9)]
    with pytest.raises(DataError, match="row is 8"):
        events.service.patch_numbers(view.with_state(row=8))


def test_one_model_alone_is_refused() -> None:
    with pytest.raises(CheckpointError, match="give --first and --second, or neither"):
        BundleCache(BundleNames(first="anywhere")).default()
    result = CliRunner().invoke(command_line, ["space", "--first", "anywhere"])
    assert isinstance(result.exception, CheckpointError)


def test_colours_of_the_theme_have_enough_contrast() -> None:
    """White on the main button, and the selected tab on the page (WCAG AA: 4.5)."""
    theme = load_module().THEME

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    for name in ("button_primary_background_fill", "button_primary_background_fill_dark", "color_accent"):
        assert contrast(getattr(theme, getattr(theme, name).removeprefix("*")), "#ffffff") >= 4.5, name
    style = (load_module().HERE / "style.css").read_text()
    dark = style.partition("--color-accent: ")[2].partition(";")[0]
    assert contrast(dark, theme.neutral_900) >= 4.5
    panels = (load_module().HERE / "panels.html.jinja").read_text()
    assert "<h2>" in panels
    assert "<h3>" not in panels, "a level of headings is left out below the page's h1"
