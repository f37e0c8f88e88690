"""The mode for any two encoders without its page: encoders by name, maps of every view, links, numbers, errors."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pivot_hub.demo.bundle_cache import BundleCache
from pivot_hub.demo.cropping import with_margin
from pivot_hub.demo.encoder_cache import EncoderCache
from pivot_hub.demo.encoder_service import FROM_A_LINK, ON_PHOTOGRAPHS, EncoderService
from pivot_hub.demo.encoder_set import ENCODER_VIEWS, NO_ATTENTION, NO_CLS, EncoderNames, MapRequest, _crop_scale
from pivot_hub.demo.encoder_state import EncoderState, read_encoder_state
from pivot_hub.demo.worker import WorkerPool
from pivot_hub.encoder.repository import read_encoder
from pivot_hub.errors import CheckpointError, DataError, PivotError
from pivot_hub.explain.encoder_layers import encode_image
from pivot_hub.explain.patch_features import similarity
from tests.encoder.native_towers import write_tower
from tests.encoder.originals import make_vision


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of encoders that visitors may name: two of CLIP's kind of other widths, one with CLS, one native."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in ("siglip", "dinov2", "clip"):
        make_vision(folder / kind, kind)
    make_vision(folder / "wide", "siglip", hidden_size=48)
    make_vision(folder / "deep", "siglip", num_hidden_layers=6)
    make_vision(folder / "fine", "siglip", patch_size=4)
    write_tower("pixtral", folder)
    (folder / "text").mkdir()
    (folder / "text" / "config.json").write_text('{"model_type": "bert"}')
    return folder


@pytest.fixture(scope="module")
def service(runs: Path) -> Iterator[EncoderService]:
    workers = WorkerPool(runs=runs)
    yield EncoderService(EncoderCache(BundleCache(runs=runs)), workers)
    workers.close()


def test_the_app_starts_with_the_encoders_of_its_bundle(service: EncoderService) -> None:
    view = service.view(EncoderState(row=5, column=2))
    assert [encoder.name for encoder in view.info.encoders] == ["SFT", "DPO"]
    bundle = service.encoders._bundles.default()
    for mllm, shown in zip((bundle.first, bundle.second), view.maps, strict=True):
        assert shown.position == (5, 2)
        assert shown.values is not None
        tower: Any = mllm.model.model.vision_tower
        image: Any = mllm.processor.image_processor(images=[view.image], return_tensors="pt")
        hidden = tower(**image, output_hidden_states=True).hidden_states[mllm.model.config.vision_feature_layer]
        expected = similarity(hidden.detach().reshape(8, 8, -1).numpy(), 5, 2)
        assert np.allclose(shown.values, expected, atol=1e-5)


@pytest.mark.parametrize("view_name", ENCODER_VIEWS)
def test_every_view_has_a_map_in_each_kind_of_encoder(service: EncoderService, view_name: Any) -> None:
    state = EncoderState(encoders="dinov2, clip", view=view_name, layers="1,-1", row=1, column=2, regions=4)
    view = service.view(state)
    for shown, layer in zip(view.maps, (1, 3), strict=True):
        assert shown.layer == layer
        assert shown.grid == (4, 4)
        assert [t.shape for t in shown.thumbnails] == [(4, 4, 3)] * 4
    values = [shown.values for shown in view.maps]
    if view_name == "drift":
        assert values[0] is None
        assert view.maps[1].cka is not None
    assert values[1] is not None
    assert values[1].shape == ((4, 4, 3) if view_name == "colours" else (4, 4))
    assert [len(shown.matches) > 0 for shown in view.maps] == [view_name == "matching"] * 2
    numbers = json.loads(json.dumps(service.numbers(view)))
    assert [encoder["layer"] for encoder in numbers["encoders"]] == ["1", "3"]
    assert np.allclose(numbers["encoders"][1]["values"], values[1], atol=1e-5)
    assert len(numbers["encoders"][0]["origin"]["weights_sha256"]) == 64
    assert service.view(read_encoder_state(_parameters(view.state))).state == view.state


def test_matching_finds_the_patch_of_the_second_image(service: EncoderService, tmp_path: Path) -> None:
    """The second image is the first one, so that the best match is the chosen patch itself."""
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "same.png")
    file = tmp_path / "same.png"
    view = service.view(EncoderState(encoders="clip,fine", view="matching", row=5, column=3), file, file)
    for shown in view.maps:
        best = shown.matches[0]
        assert (best.row, best.column) == shown.position
        assert best.similarity == pytest.approx(1, abs=1e-5)
    assert [shown.position for shown in view.maps] == [(2, 1), (5, 3)]
    assert (view.with_patch(0, 3, 0).row, view.with_patch(0, 3, 0).column) == (7, 1)
    assert view.with_patch(1, 6, 2).row == 6
    with pytest.raises(DataError, match="row is 9"):
        service.view(replace(view.state, row=9))
    scaled = service.view(replace(view.state, row=9, column=0), grid=(10, 10))
    assert (scaled.maps[1].position, scaled.state.row) == ((7, 0), 7)
    assert service.view(EncoderState(encoders="clip,fine")).state.query().endswith("&row=6&column=1")


def test_attention_says_where_there_is_none(service: EncoderService) -> None:
    view = service.view(EncoderState(encoders="siglip,dinov2,clip,pixtral", view="attention", layers=",0,,"))
    assert [shown.note for shown in view.maps] == [NO_CLS, NO_ATTENTION, "", NO_CLS]
    assert [shown.values is None for shown in view.maps] == [True, True, False, True]


def test_a_tower_of_native_resolution_keeps_the_shape_of_the_image(service: EncoderService, tmp_path: Path) -> None:
    Image.effect_noise((112, 56), 90).convert("RGB").save(tmp_path / "wide.png")
    view = service.view(EncoderState(encoders="siglip,pixtral", row=3, column=7), tmp_path / "wide.png")
    assert view.image.size == (112, 56)
    assert [shown.grid for shown in view.maps] == [(4, 4), (4, 8)]
    assert [shown.position for shown in view.maps] == [(3, 3), (3, 7)]


def test_an_mllm_is_named_by_its_stage_and_compared_by_its_tower(trained: Path) -> None:
    encoders = EncoderCache(BundleCache(runs=trained))
    assert {"2-instruct", "3-sft", "3-dpo"} <= set(encoders.local_names())
    names = EncoderNames(("3-sft", "3-dpo", "2-instruct", "3-sft"))
    assert [e.name for e in encoders.get(names).info.encoders] == ["3-sft (1)", "3-dpo", "2-instruct", "3-sft (2)"]
    drift = encoders.get(names).maps(MapRequest("drift", Image.effect_noise((32, 32), 90).convert("RGB")))
    assert drift[3].values is not None
    assert np.allclose(drift[3].values, 0, atol=1e-6)
    assert drift[1].values is not None
    assert drift[1].values.max() > 1e-6


def test_an_encoder_that_crops_sees_the_whole_square(runs: Path) -> None:
    """DINOv2's processor resizes to 36 px here and crops 32: the image gets a margin that it cuts off."""
    encoder, _ = read_encoder(runs / "dinov2")
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    whole = with_margin(image, _crop_scale(encoder))
    assert whole.size == (72, 72)
    assert np.array_equal(np.asarray(whole)[4:-4, 4:-4], np.asarray(image))
    assert with_margin(image, _crop_scale(read_encoder(runs / "clip")[0])) is image
    encoded = EncoderCache(BundleCache(runs=runs)).get(EncoderNames(("dinov2", "clip")))
    assert encoded.info.crops
    shown = encoded.maps(MapRequest("similarity", image, row=1, column=1))[0].values
    assert shown is not None
    assert np.allclose(shown, similarity(encode_image(encoder, whole).maps[2], 1, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "1,9"}, "clip: layer is 9: it must be between -4 and 3 in this encoder"),
        ({"layers": "1"}, "1 layers are given for 2 encoders; give one for each"),
        ({"layers": "one,2"}, "layers is 'one,2': give a whole number for each encoder"),
        ({"row": 4}, "row is 4: it must be between 0 and 3 in these encoders"),
        ({"view": "drift", "encoders": "siglip,wide"}, "features have 32 and 48 channels"),
        ({"view": "drift", "encoders": "siglip,fine"}, "grids have 4 x 4 and 8 x 8 patches"),
        ({"view": "regions", "regions": 40}, "regions is 40: it must be between 2 and 12"),
        ({"view": "taste"}, "view is 'taste': it must be one of similarity, matching"),
        ({"encoders": "siglip"}, "The number of encoders is 1: give 2 to 4 names"),
        ({"encoders": "a/b,c/d,e/f,g/h,i/j"}, "The number of encoders is 5: give 2 to 4 names"),
        ({"encoders": "siglip,../../etc"}, r"'../../etc' names no encoder: give a Hub repository as owner/name"),
        ({"encoders": "siglip,text"}, "'text' names no encoder"),
        ({"image": "bm90IGFuIGltYWdl"}, "not an image"),
    ],
)
def test_bad_input_gets_one_sentence(service: EncoderService, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PivotError, match=message) as raised:
        service.view(EncoderState(**{"encoders": "siglip,clip", **changes}))
    assert "/tmp" not in str(raised.value)


def test_an_encoder_that_does_not_exist_is_named(service: EncoderService) -> None:
    with pytest.raises(CheckpointError, match="no-such-owner/nothing: it could not be fetched") as raised:
        service.encoders.get(EncoderNames(("no-such-owner/nothing", "siglip")))
    assert len(str(raised.value)) < 200


def test_encoders_run_where_zero_gpu_lends_a_gpu(runs: Path) -> None:
    calls: list[str] = []

    def gpu(function: Any) -> Any:
        def wrapped(*arguments: Any) -> Any:
            calls.append(function.__name__)
            return pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps(arguments)))))

        return wrapped

    service = EncoderService(EncoderCache(BundleCache(runs=runs)), WorkerPool(runs=runs), gpu)
    for _ in range(2):
        service.view(EncoderState(encoders="siglip,clip"))
    assert calls == ["info_by_name", "maps_by_name", "maps_by_name"]


@pytest.mark.slow
def test_a_process_of_its_own_gives_the_same_maps(service: EncoderService, runs: Path) -> None:
    """Its answer consists of classes that the app accepts."""
    names = EncoderNames(("siglip", "clip"))
    image = Image.effect_noise((40, 40), 90).convert("RGB")
    request = MapRequest("matching", image, image)
    expected = service.encoders.get(names)
    assert service.workers.info(names) == expected.info
    maps = service.workers.run(names, "maps", request)
    for ours, theirs in zip(expected.maps(request), maps, strict=True):
        assert ours.values is not None
        assert np.array_equal(ours.values, theirs.values)
        assert ours.matches == theirs.matches
    with pytest.raises(DataError, match="layer is 7"):
        service.workers.run(names, "maps", replace(request, layers=(7, 1)))


def test_wrong_repositories_are_refused_before_their_weights_are_read(service: EncoderService, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    make_vision(folder / "broken")
    (folder / "broken" / "model.safetensors").write_bytes(b"nothing")
    make_vision(folder / "huge")
    config = json.loads((folder / "huge" / "config.json").read_text())
    (folder / "huge" / "config.json").write_text(json.dumps(config | {"hidden_size": 60_000, "num_attention_heads": 1}))
    encoders = EncoderCache(BundleCache(runs=folder))
    for name, message in (("huge", "billion parameters are more than"), ("broken", "broken: no encoder can be loaded")):
        with pytest.raises(CheckpointError, match=message) as raised:
            encoders.get(EncoderNames((name, name)))
        assert str(tmp_path) not in str(raised.value)


def test_layers_move_together_to_the_same_share_of_the_depth(service: EncoderService) -> None:
    view = service.view(EncoderState(encoders="siglip,deep,clip"))
    assert [shown.layer for shown in view.maps] == [2, 5, 2]
    assert view.with_layer(0, 1, together=True).layers == "1,2,1"
    assert view.with_layer(1, 0, together=True).layers == "0,0,0"
    assert view.with_layer(1, 1, together=False).layers == "2,1,2"
    moved = service.view(view.with_layer(0, 1, together=True))
    assert moved.with_layer(0, 2, together=True).layers == "", "feature layers follow each other"


def test_links_hold_both_images_and_say_so(service: EncoderService, tmp_path: Path) -> None:
    for name in ("one", "two"):
        Image.effect_noise((900, 600), 90).convert("RGB").save(tmp_path / f"{name}.png")
    view = service.view(EncoderState(view="matching"), tmp_path / "one.png", tmp_path / "two.png")
    assert view.image.size == (640, 427)
    assert view.notes == (ON_PHOTOGRAPHS,)
    assert len(view.state.query()) < 8000
    again = service.view(read_encoder_state(_parameters(view.state)))
    assert again.notes == (FROM_A_LINK, ON_PHOTOGRAPHS)
    assert service.view(EncoderState()).notes == ()
    assert service.view(replace(view.state, view="colours", image="")).notes == (), "the second image is not shown"
    with pytest.raises(DataError, match="row is 'x', which is not a whole number"):
        read_encoder_state({"row": "x"})


def _parameters(state: EncoderState) -> dict[str, str]:
    from urllib.parse import parse_qsl

    parameters = dict(parse_qsl(state.query(), keep_blank_values=True))
    assert parameters["mode"] == "encoders"
    return parameters
