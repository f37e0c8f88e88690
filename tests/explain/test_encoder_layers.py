"""Every layer of a tiny encoder of each kind as a map, and the attention of its CLS token."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from pivot_hub.encoder import PivotVisionModel
from pivot_hub.encoder.repository import read_encoder
from pivot_hub.errors import CheckpointError, DataError
from pivot_hub.explain.encoder_layers import OUTPUT, EncodedImage, _patch_map, encode_image, has_cls, layer_index
from tests.encoder.native_towers import TOWERS, WIDTH, write_tower
from tests.encoder.originals import ORIGINALS, make_vision

IMAGE = Image.effect_noise((112, 56), 90).convert("RGB")


def square_encoder(folder: Path, kind: str = "siglip") -> PivotVisionModel:
    return read_encoder(make_vision(folder / kind, kind))[0]


@pytest.mark.parametrize("kind", [k for k in ORIGINALS if k not in ("siglip2", "mae")])
def test_layers_are_the_hidden_states_in_every_kind_of_square_encoder(kind: str, tmp_path: Path) -> None:
    encoder = square_encoder(tmp_path, kind)
    encoded = encode_image(encoder, IMAGE)
    assert encoded.labels == ("0", "1", "2", "3")
    assert encoded.own == 2
    with torch.no_grad():
        outputs = encoder.forward_features(IMAGE, output_hidden_states=True)
    for hidden, features in zip(outputs.hidden_states, encoded.maps, strict=True):
        patches = hidden[0, ORIGINALS[kind].prefix_tokens :]
        assert np.allclose(features, patches.reshape(4, 4, 32), atol=1e-6)
    assert np.allclose(encoded.maps[encoded.own].reshape(16, 32), outputs.last_hidden_state[0], atol=1e-6)
    assert has_cls(encoder) == (ORIGINALS[kind].prefix_tokens > 0)


@pytest.mark.parametrize("kind", ["clip", "dinov2", "dinov3"])
def test_the_attention_of_cls_is_that_of_the_native_class(kind: str, tmp_path: Path) -> None:
    encoder = square_encoder(tmp_path, kind)
    encoded = encode_image(encoder, IMAGE)
    native = PivotVisionModel.from_pretrained(str(tmp_path / kind), attn_implementation="eager")
    with torch.no_grad():
        outputs = native.forward_features(IMAGE, output_attentions=True)
    assert encoded.cls_attention is not None
    for shown, attention in zip(encoded.cls_attention, outputs.attentions, strict=True):
        expected = attention[0, :, 0, ORIGINALS[kind].prefix_tokens :].mean(0)
        assert np.allclose(shown, expected.reshape(4, 4), atol=1e-6)
        assert 0.5 < shown.sum() < 1
    assert encoder.backbone.config._attn_implementation == "sdpa", "the encoder is left changed"
    assert encode_image(square_encoder(tmp_path), IMAGE).cls_attention is None


@pytest.mark.parametrize("model_type", TOWERS)
def test_a_tower_of_native_resolution_has_a_map_in_the_shape_of_the_image(model_type: str, tmp_path: Path) -> None:
    encoder, _ = read_encoder(write_tower(model_type, tmp_path))
    encoded = encode_image(encoder, IMAGE)
    rows, columns, width = encoded.maps[0].shape
    assert columns == 2 * rows
    assert width == WIDTH
    own = cast(Any, encoder).forward_features(IMAGE).last_hidden_state[0].detach()
    assert np.allclose(encoded.maps[encoded.own], own, atol=1e-6)
    assert encoded.cls_attention is None
    named = encoder.config.pivot["feature_layer"] == "last_hidden_state"
    assert encoded.labels == ("0", "1", "2", "3", *([OUTPUT] if named else []))


def test_tokens_that_are_merged_have_a_map_of_their_own(tmp_path: Path) -> None:
    encoder, _ = read_encoder(write_tower("qwen3_vl_vision", tmp_path), check=False, feature_layer="merged")
    encoded = encode_image(encoder, IMAGE)
    assert encoded.maps[encoded.own].shape == (*(side // 2 for side in encoded.maps[0].shape[:2]), 48)


def test_layers_count_from_both_ends_and_others_are_refused() -> None:
    maps = tuple(np.full((1, 1, 1), float(i)) for i in range(4))
    encoded = EncodedImage(maps, ("0", "1", "2", "3"), 2, None)
    assert [encoded.index(layer) for layer in (0, 3, -1, -4, None)] == [0, 3, 3, 0, 2]
    assert layer_index(-2, 13, 11) == 11
    for layer in (4, -5):
        with pytest.raises(DataError, match=f"layer is {layer}: it must be between -4 and 3 in this encoder"):
            encoded.index(layer)


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    encoder = square_encoder(tmp_path)
    with torch.no_grad():
        next(iter(cast(Any, encoder).parameters())).fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        encode_image(encoder, IMAGE)


def test_hidden_states_that_are_maps_keep_their_rows() -> None:
    """As timm's are: (B, D, H, W)."""
    hidden = torch.arange(2 * 3 * 4.0).reshape(1, 2, 3, 4)
    model: Any = SimpleNamespace(config=SimpleNamespace(image_size=32))
    features = _patch_map(model, SimpleNamespace(hidden_states=[hidden]), 0, {})
    assert torch.equal(features, hidden[0].permute(1, 2, 0))
