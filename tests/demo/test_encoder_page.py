"""What the controls of the mode for any two encoders do, without a browser, and its endpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
from gradio.utils import get_upload_folder
from PIL import Image

from pivot_hub.demo.bundle_cache import BundleCache
from pivot_hub.demo.downloads import json_bytes
from pivot_hub.demo.encoder_cache import EncoderCache
from pivot_hub.demo.encoder_endpoints import EncoderEndpoint
from pivot_hub.demo.encoder_html import EncoderPanels
from pivot_hub.demo.encoder_page import EncoderEvents, build_encoder_page
from pivot_hub.demo.encoder_service import EncoderService, EncoderView
from pivot_hub.demo.encoder_set import ENCODER_VIEWS, NO_CLS, UNRELATED
from pivot_hub.demo.encoder_state import EncoderState
from pivot_hub.demo.gradio_calls import UNEXPECTED
from pivot_hub.demo.html import Panels
from pivot_hub.demo.launch import load_module
from pivot_hub.demo.worker import WorkerPool
from tests.encoder.native_towers import write_tower
from tests.encoder.originals import make_vision


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EncoderEvents]:
    runs = tmp_path_factory.mktemp("runs")
    for kind in ("siglip", "dinov2", "clip"):
        make_vision(runs / kind, kind)
    write_tower("qwen3_vl_vision", runs)
    module = load_module()
    workers = WorkerPool(runs=runs)
    service = EncoderService(EncoderCache(BundleCache(runs=runs)), workers)
    with gr.Blocks():
        page = build_encoder_page("", service.encoders.local_names())
    yield EncoderEvents(page, service, EncoderPanels(module.HERE), Panels(module.HERE).message)
    workers.close()


def controls(events: EncoderEvents, **changes: Any) -> list[Any]:
    """Values that the page sends from its controls."""
    values = {name: getattr(EncoderState, name) for name in events.page.controls} | changes
    return list(values.values())


def opened(events: EncoderEvents, **query: str) -> dict[Any, Any]:
    request: Any = SimpleNamespace(query_params={"mode": "encoders", **query})
    return dict(events.open_link(request))


def chosen(events: EncoderEvents, view: EncoderView, together: bool = True, **choice: int) -> EncoderView:
    event: Any = SimpleNamespace(**choice)
    shown: EncoderView = events.choose(event, view, together, None, None)[events.page.view]
    return shown


def photograph(name: str, size: tuple[int, int]) -> dict[str, str]:
    folder = Path(get_upload_folder()) / "encoders"
    folder.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 90).convert("RGB").save(folder / name)
    return {"path": str(folder / name)}


def test_the_mode_opens_with_the_built_in_encoders(events: EncoderEvents) -> None:
    page = events.page
    updates = events.enter(False, None, None, None, *controls(events))
    assert [e.name for e in updates[page.view].info.encoders] == ["SFT", "DPO"]
    assert updates[page.panel].count("patch-grid") == 3
    assert updates[page.query] == "mode=encoders&row=6&column=1"
    assert events.enter(False, updates[page.view], None, None, *controls(events)) == gr.skip(), "computed again"
    assert events.enter(True, None, None, None, *controls(events)) == gr.skip(), "the maps of a link are replaced"


def test_a_patch_and_layers_are_chosen(events: EncoderEvents) -> None:
    view = opened(events, encoders="siglip,clip")[events.page.view]
    view = chosen(events, view, encoder=1, row=2, column=0)
    assert (view.state.row, view.state.column) == (2, 0)
    view = chosen(events, view, encoder=0, layer=1)
    assert view.state.layers == "1,1"
    view = chosen(events, view, together=False, encoder=1, layer=3)
    assert view.state.layers == "1,3"
    panel = events.panels.render(view)
    assert 'data-layer="1" aria-pressed="true"' in panel
    assert 'data-layer="3" aria-pressed="true"' in panel
    assert (view.state.row, view.state.column) == (2, 0)


@pytest.mark.parametrize("view_name", ENCODER_VIEWS)
def test_every_view_has_a_panel_and_a_link(events: EncoderEvents, view_name: str) -> None:
    page = events.page
    start = opened(events, encoders="siglip,clip")[page.view]
    updates = events.show(start, None, None, *controls(events, view=view_name, regions=3.0))
    assert page.message not in updates or updates[page.message] == ""
    assert updates[page.regions].visible == (view_name == "regions")
    panel = updates[page.panel]
    assert panel.count('class="layer-slider"') == 2
    again = opened(events, **dict(pair.split("=") for pair in updates[page.query].replace("%2C", ",").split("&")))
    assert again[page.panel] == panel
    assert again[page.choice] == view_name
    assert again[page.names] == "siglip\nclip"
    expected = {
        "matching": "Second image",
        "colours": "colours are its own",
        "attention": NO_CLS,
        "drift": UNRELATED[:30],
        "similarity": "Cosine similarity",
        "regions": "regions of similar features",
    }
    assert expected[view_name] in panel


def test_what_cannot_be_shown_leaves_the_maps_and_resets_the_control(events: EncoderEvents) -> None:
    page = events.page
    view = opened(events, encoders="siglip,qwen3_vl_vision")[page.view]
    updates = events.show(view, None, None, *controls(events, view="drift"))
    assert set(updates) == {page.message, page.choice}
    assert "choose encoders of one grid" in updates[page.message]
    assert updates[page.choice] == "similarity"
    updates = events.show_scene(view, None, None, *controls(events, scene=None))
    assert "scene is empty" in updates[page.message]


def test_images_of_visitors_replace_scenes_and_scenes_replace_them(events: EncoderEvents) -> None:
    page = events.page
    view = opened(events, encoders="siglip,qwen3_vl_vision", row="6", column="6")[page.view]
    height, width = view.maps[view.finest].grid
    wide = photograph("wide.png", (336, 112))
    updates = events.show_upload(view, wide, None, *controls(events))
    view = updates[page.view]
    assert view.image.size == (336, 112)
    rows, columns = view.maps[1].grid
    assert columns >= 2 * rows
    assert (view.state.row, view.state.column) == (int(6.5 / height * rows), int(6.5 / width * columns))
    updates = events.show_other_upload(view, wide, wide, *controls(events))
    assert updates[page.choice] == updates[page.view].state.view == "matching"
    assert updates[page.view].maps[0].matches[0].similarity == pytest.approx(1, abs=1e-5)
    updates = events.show_scene(updates[page.view], wide, wide, *controls(events, scene=3, view="colours"))
    assert updates[page.upload] is None
    assert updates[page.view].state.image == ""
    assert updates[page.view].state.other_image
    updates = events.show_other_scene(updates[page.view], None, wide, *controls(events, scene=3, other_scene=4))
    state = updates[page.view].state
    assert (state.view, state.scene, state.other_scene, state.image, state.other_image) == ("matching", 3, 4, "", "")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"layers": "99,1"}, "layer is 99: it must be between -7 and 6"),
        ({"view": "taste"}, "view is &#39;taste&#39;"),
        ({"encoders": "../etc,/root"}, "names no encoder"),
        ({"encoders": "siglip"}, "The number of encoders is 1"),
        ({"row": "99"}, "row is 99: it must be between 0 and 7"),
        ({"regions": "99", "view": "regions"}, "regions is 99: it must be between 2 and 12"),
    ],
)
def test_a_bad_link_gets_a_message_above_the_built_in_encoders(
    events: EncoderEvents, query: dict[str, str], message: str
) -> None:
    updates = opened(events, **query)
    assert message in updates[events.page.message]
    assert updates[events.page.view].state == EncoderState(row=6, column=1)


def test_a_link_to_the_other_mode_is_left_to_it(events: EncoderEvents) -> None:
    request: Any = SimpleNamespace(query_params={"scene": "3"})
    assert events.page.view not in events.open_link(request)


def test_encoders_are_loaded_by_name_and_wrong_ones_leave_the_current(events: EncoderEvents) -> None:
    page = events.page
    view = opened(events, layers="1,1")[page.view]
    updates = events.load_encoders("siglip\n dinov2, clip", view, None, None, *controls(events))
    assert "Loaded: siglip, dinov2, clip." in updates[page.status]
    assert updates[page.view].state.encoders == "siglip,dinov2,clip"
    assert updates[page.view].state.layers == ""
    for names, message in (("siglip", "number of encoders is 1"), ("siglip nowhere", "names no encoder")):
        wrong = events.load_encoders(names, updates[page.view], None, None, *controls(events))
        assert list(wrong) == [page.status]
        assert message in wrong[page.status]
        assert "The current encoders stay." in wrong[page.status]
    back = events.load_built_in(updates[page.view], None, None, *controls(events))
    assert back[page.names] == ""
    assert [e.name for e in back[page.view].info.encoders] == ["SFT", "DPO"]


def test_numbers_are_those_of_the_view(events: EncoderEvents, monkeypatch: pytest.MonkeyPatch) -> None:
    view = opened(events, encoders="siglip,clip", view="colours")[events.page.view]
    numbers = json.loads(json_bytes(events.service.numbers(view)))
    assert np.array_equal(numbers["encoders"][0]["values"], view.maps[0].values)

    def fail(*arguments: Any) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(events.service, "view", fail)
    assert UNEXPECTED in events.show(view, None, None, *controls(events))[events.page.message]


def test_the_endpoint_returns_figure_and_numbers(events: EncoderEvents) -> None:
    endpoint = EncoderEndpoint(events.service)
    for view in ("matching", "colours", "attention"):
        figure, numbers = endpoint.encoders(encoders="siglip,clip", view=view, layers="1,-1", row=2.0, column=1)
        with Image.open(figure) as drawn:
            assert drawn.width > 2 * drawn.height
        assert [e["layer"] for e in numbers["encoders"]] == ["1", "3"]
        assert numbers["encoders"][0]["row"] == 2
    for wrong, message in (
        ({"layers": "9,9"}, "layer is 9"),
        ({"row": 2.5}, "row is '2.5': it must be a whole number"),
        ({"encoders": "siglip,nothing"}, "'nothing' names no encoder"),
        ({"image": {"path": "/etc/passwd"}}, "not an image that was uploaded here"),
        ({"view": "taste"}, "view is 'taste'"),
    ):
        with pytest.raises(gr.Error, match=message):
            endpoint.encoders(**wrong)
