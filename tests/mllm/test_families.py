"""Every family of the table: its encoder is taken out, equals the one inside, and loads with plain AutoModel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText

from pivot_hub import PivotVisionModel, diff_towers, extract_encoder
from pivot_hub.encoder.configuration_pivot import BACKBONES, MERGED
from pivot_hub.encoder.encode import encode_source
from pivot_hub.encoder.native_resolution import LAYOUTS
from pivot_hub.encoder.repository import verify_repository
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.families import FAMILIES
from pivot_hub.mllm.vision_part import read_vision_part
from tests.mllm.tiny_mllms import IMAGE_TOKEN, PATCH, SIDE, TINY, make_mllm

# Without torchvision, which the image processor of Kimi needs, its encoder takes prepared patches only.
WITHOUT_PROCESSOR = ("kimi_k25",)


@pytest.fixture(scope="module", params=TINY)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def source(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mllm") / "model"
    make_mllm(folder, name)
    return folder


@pytest.fixture(scope="module")
def mllm(source: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def repository(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extract_encoder(source, tmp_path_factory.mktemp("encoder") / "encoder")


@pytest.fixture(scope="module")
def encoder(repository: Path) -> Any:
    return PivotVisionModel.from_pretrained(repository)


@pytest.fixture(scope="module")
def inputs(name: str, encoder: Any) -> dict[str, torch.Tensor]:
    """Three images of different shapes, as the encoder's image processor prepares them."""
    torch.manual_seed(1)
    # LFM2-VL's projector takes grids of even sides only, to which its own image processor resizes.
    sizes = ((120, 30), (30, 120), (64, 64)) if name == "lfm2_vl" else ((90, 60), (40, 120), (64, 64))
    images = [_noise(size) for size in sizes]
    if name not in WITHOUT_PROCESSOR:
        return encoder.prepare(images)
    grids = [(4, 6), (6, 2), (4, 4)]
    pixels = torch.rand(sum(h * w for h, w in grids), 3, encoder.config.patch_size, encoder.config.patch_size) * 2 - 1
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([(1, *grid) for grid in grids])}


def _noise(size: tuple[int, int]) -> Image.Image:
    width, height = size
    return Image.fromarray((torch.rand(height, width, 3) * 255).byte().numpy())


def test_every_family_is_tested() -> None:
    assert {recipe.model_type for recipe in TINY.values()} == set(FAMILIES)


def test_the_extracted_repository_verifies_and_holds_the_towers_own_weights(
    name: str, mllm: Any, repository: Path, encoder: Any
) -> None:
    assert verify_repository(repository) == []
    tower = getattr(mllm.model, FAMILIES[mllm.config.model_type].tower).state_dict()
    own = encoder.backbone.state_dict()
    assert tower.keys() == own.keys()
    assert all(torch.equal(tower[key], own[key]) for key in tower)
    assert encoder.config.pivot["stage"] == "extracted"


def test_plain_automodel_loads_it_without_a_missing_key(name: str, repository: Path, encoder: Any) -> None:
    family = FAMILIES[TINY[name].model_type]
    if family.native_from is None:
        with pytest.raises(ValueError, match=r"custom code|Unrecognized configuration class"):
            AutoModel.from_pretrained(repository)
        return
    if family.native_from <= transformers.__version__:
        native, info = AutoModel.from_pretrained(repository, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert type(native) is type(encoder.backbone)


def test_features_equal_those_that_enter_the_projector(
    name: str, mllm: Any, encoder: Any, inputs: dict[str, torch.Tensor], repository: Path
) -> None:
    """Bit for bit, with the inputs in the MLLM's own call."""
    with torch.no_grad():
        features = encoder(**inputs).last_hidden_state
        expected = ENTERED[mllm.config.model_type](mllm, encoder, inputs)
    maps = (
        features if encoder.config.image_size is None else features.unflatten(1, encoder._grid(inputs["pixel_values"]))
    )
    assert len(maps) == len(expected) == 3
    for own, inside in zip(maps, expected, strict=True):
        assert torch.equal(own, inside)
    assert encoder.config.hidden_size == maps[0].shape[-1]


def test_pixels_are_those_of_the_mllms_own_image_processor(name: str, source: Path, mllm: Any, encoder: Any) -> None:
    """For an MLLM that cuts tiles, those of its thumbnail, which Idefics3 and SmolVLM resize twice."""
    own = TINY[name].processor["image_processor_type"].removesuffix("Fast")
    processor_class = getattr(transformers, f"{own}Pil", None)
    if processor_class is None:
        assert name in ("kimi_k25", "lfm2_vl")  # the former needs torchvision; the latter's difference is recorded
        return
    processor = processor_class.from_pretrained(source)
    options = {}
    if own == "PixtralImageProcessor":  # as PixtralProcessor calls it
        side = PATCH * FAMILIES[mllm.config.model_type].merge(mllm.config)
        options["patch_size"] = {"height": side, "width": side}
    torch.manual_seed(3)
    images = [_noise(size) for size in ((90, 60), (40, 120), (64, 64))]
    expected = processor(images=images, return_tensors="pt", **options)["pixel_values"]
    pixels = encoder.image_processor(images=images, return_tensors="pt")["pixel_values"]
    tiles = FAMILIES[mllm.config.model_type].tiles
    if tiles == "best resolution":
        expected = torch.stack([image[0] for image in expected])
    elif own in ("Idefics3ImageProcessor", "SmolVLMImageProcessor"):
        expected = torch.stack(
            [image[-1] for image in processor(images=images[2:], return_tensors="pt")["pixel_values"]]
        )
        assert (expected - pixels[2:]).abs().mean() < 0.1
        return
    elif tiles == "tiles and thumbnail":
        counts = processor(images=images, return_tensors="pt")["num_patches"].cumsum(0)
        expected = expected[counts - 1]
    assert torch.equal(pixels, expected)


def test_images_of_different_shapes_give_maps_of_their_shapes(encoder: Any, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        outputs = encoder(**inputs)
    assert outputs.pooler_output.shape == (3, encoder.config.hidden_size)
    if encoder.config.image_size is not None:
        assert outputs.last_hidden_state.shape[0] == 3
        return
    heights, widths, _ = zip(*(features.shape for features in outputs.last_hidden_state), strict=True)
    assert heights[1] > heights[0]
    assert widths[1] < widths[0]
    assert [m.shape[1:] for m in encoder.feature_map(**inputs)] == list(zip(heights, widths, strict=True))
    # An image's features do not depend on those beside it.
    for i, alone in enumerate(_one_by_one(encoder, inputs)):
        assert torch.allclose(alone, outputs.last_hidden_state[i], atol=1e-5)


def _one_by_one(encoder: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Encode each image of a batch alone."""
    config = encoder.config.backbone_config
    layout = LAYOUTS[BACKBONES[config.model_type].layout]  # type: ignore[index]
    counts = [height * width for height, width in layout.grids(inputs, config)]
    pixels = inputs["pixel_values"]
    flat = pixels.split(counts) if len(pixels) == sum(counts) else pixels.split(1)
    with torch.no_grad():
        return [
            encoder(part, **{n: inputs[n][i : i + 1] for n in layout.inputs}).last_hidden_state[0]
            for i, part in enumerate(flat)
        ]


def test_an_image_becomes_as_many_tokens_as_the_table_says(
    mllm: Any, encoder: Any, inputs: dict[str, torch.Tensor]
) -> None:
    family = FAMILIES[mllm.config.model_type]
    assert family.image_token_id(mllm.config) == IMAGE_TOKEN
    if not family.image_tokens:
        assert not hasattr(mllm.model, "get_image_features")
        return
    with torch.no_grad():
        outputs = _image_features(mllm, encoder, inputs)
    counts = [len(tokens) for tokens in outputs]
    if family.tiles == "best resolution":  # the tokens of tiles are packed by a rule of their own
        counts = [mllm.model.multi_modal_projector(m.flatten(0, 1)).shape[0] for m in _llava(mllm, encoder, inputs)]
    if encoder.config.image_size is None:
        config = encoder.config.backbone_config
        layout = LAYOUTS[BACKBONES[config.model_type].layout]  # type: ignore[index]
        grids = layout.grids(inputs, config)
    else:
        grids = [encoder._grid(inputs["pixel_values"])] * 3
    merge = family.merge(mllm.config)
    # The last row and column of a grid that the merger does not divide are padded.
    expected = [-(-height // merge) * -(-width // merge) for height, width in grids]
    assert counts == expected


def test_positions_and_tiles_are_as_the_table_says(mllm: Any, source: Path, tmp_path: Path) -> None:
    family = FAMILIES[mllm.config.model_type]
    assert (family.positions == "mrope") == hasattr(mllm.model, "get_rope_index")
    lines: list[str] = []
    extract_encoder(source, tmp_path / "encoder", log=lines.append)
    assert lines[0].startswith(f"{family.title}: read ")
    is_square = BACKBONES[mllm.config.vision_config.model_type].layout is None
    assert any("takes the whole image as one square" in line for line in lines) == (
        is_square and family.tiles != "none"
    )


def test_merged_tokens_and_the_layers_below_have_names(
    mllm: Any, encoder: Any, inputs: dict[str, torch.Tensor], repository: Path
) -> None:
    config = encoder.config.backbone_config
    if BACKBONES[config.model_type].merge is None:
        with pytest.raises(ValueError, match="feature layer 'merged' is not known"):
            PivotVisionModel.from_pretrained(repository, feature_layer=MERGED)
        return
    merged = PivotVisionModel.from_pretrained(repository, feature_layer=MERGED)
    patches = PivotVisionModel.from_pretrained(repository, feature_layer=1)
    with torch.no_grad():
        maps, below = merged(**inputs).last_hidden_state, patches(**inputs).last_hidden_state
    side = FAMILIES[mllm.config.model_type].merge(mllm.config)
    assert [m.shape[0] * side for m in maps] == [m.shape[0] for m in below]
    assert maps[0].shape[-1] == merged.config.hidden_size
    assert below[0].shape[-1] == patches.config.hidden_size
    if FAMILIES[mllm.config.model_type].projector is None:  # the language model receives them as they are
        with torch.no_grad():
            received = _image_features(mllm, encoder, inputs)
        for own, tokens in zip(maps, received, strict=True):
            assert torch.equal(own.flatten(0, 1), tokens)


def test_only_the_tower_and_the_projector_are_read(source: Path, mllm: Any) -> None:
    family = FAMILIES[mllm.config.model_type]
    parts = [getattr(mllm.model, part) for part in (family.tower, family.projector) if part]
    part = read_vision_part(source)
    stored = sum(p.numel() * p.element_size() for module in parts for p in module.state_dict().values())
    asked: list[int] = []
    read_vision_part(source, progress=lambda done, total: asked.append(total))
    # Buffers are not stored.
    assert 0.9 * stored < asked[0] <= stored
    assert part.weights.total_bytes > stored


def test_diff_tells_a_moved_tower_from_a_frozen_one(
    name: str, source: Path, repository: Path, mllm: Any, tmp_path: Path
) -> None:
    assert diff_towers(source, repository).frozen

    def train_all_but_the_tower(model: Any) -> None:
        for part in (FAMILIES[model.config.model_type].language, FAMILIES[model.config.model_type].projector):
            for parameter in getattr(model.model, part).parameters() if part else ():
                parameter.data.add_(0.5)

    make_mllm(tmp_path / "frozen", name, train_all_but_the_tower)
    frozen = diff_towers(source, tmp_path / "frozen")
    assert frozen.frozen
    assert "the vision tower is frozen" in frozen.summary()

    tower = FAMILIES[mllm.config.model_type].tower
    keys = [k for k in getattr(mllm.model, tower).state_dict() if ".1." in k and k.endswith("weight")]

    def train_the_tower(model: Any) -> None:
        getattr(model.model, tower).get_parameter(keys[0]).data.add_(0.5)

    make_mllm(tmp_path / "moved", name, train_the_tower)
    moved = diff_towers(source, tmp_path / "moved")
    assert not moved.frozen
    assert moved.changed_blocks == 1


def test_encode_writes_the_features_of_images_of_different_shapes(
    name: str, encoder: Any, repository: Path, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    (tmp_path / "images").mkdir()
    images = [_noise(size) for size in ((90, 60), (40, 120), (64, 64))]
    for i, image in enumerate(images):
        image.save(tmp_path / "images" / f"{i}.png")
    if name in WITHOUT_PROCESSOR:
        with pytest.raises(CheckpointError, match="has no form without torchvision"):
            encode_source(repository, tmp_path / "images", tmp_path / "features.npy", workers=0)
        return
    encode_source(repository, tmp_path / "images", tmp_path / "features.npy", workers=0)
    with torch.no_grad():
        expected = encoder.forward_features(images).pooler_output
    assert np.allclose(np.load(tmp_path / "features.npy"), expected.numpy(), atol=1e-5)


# -- What enters each family's projector, as one map (H, W, D) for each image ------------------------------------------


def _entered(module: torch.nn.Module, call: Callable[[], Any]) -> list[torch.Tensor]:
    """Return the first argument of each call of a module."""
    captured: list[torch.Tensor] = []

    def keep(_: Any, arguments: Any, keywords: Any) -> None:
        captured.append(next(iter((*arguments, *keywords.values()))).detach().clone())

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    call()
    handle.remove()
    return captured


def _image_features(mllm: Any, encoder: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the tokens that the language model receives for each image."""
    named = dict(inputs)
    if mllm.config.model_type in ("idefics3", "smolvlm"):
        named["pixel_values"] = named["pixel_values"][:, None]
    if mllm.config.model_type in ("llava_next", "llava_onevision"):
        # An image of this size has a thumbnail and two tiles; here all are the same pixels.
        squares = torch.stack([inputs["pixel_values"]] * 3, dim=1)
        named = {"pixel_values": squares, "image_sizes": torch.tensor([[SIDE, SIDE]] * 3)}
    options = {}
    if "vision_feature_layer" in mllm.config:
        options["vision_feature_layer"] = mllm.config.vision_feature_layer
    if "vision_feature_select_strategy" in mllm.config:
        options["vision_feature_select_strategy"] = mllm.config.vision_feature_select_strategy
    return list(mllm.model.get_image_features(**named, **options).pooler_output)


def _projector(mllm: Any) -> torch.nn.Module:
    family = FAMILIES[mllm.config.model_type]
    module: torch.nn.Module = getattr(mllm.model, family.projector)  # type: ignore[arg-type]
    return module


def _square_tokens(mllm: Any, encoder: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The projector takes (B, N, D) patches of squares."""
    entered = _entered(_projector(mllm), lambda: _image_features(mllm, encoder, inputs))
    tokens = torch.cat(entered)
    if FAMILIES[mllm.config.model_type].tiles == "best resolution":
        tokens = tokens[::3]  # the thumbnails
    side = int(tokens.shape[1] ** 0.5)
    return list(tokens.unflatten(1, (side, side)))


def _llava(mllm: Any, encoder: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    if encoder.config.image_size is None:
        return _flat_tokens(mllm, encoder, inputs)
    return _square_tokens(mllm, encoder, inputs)


def _flat_tokens(mllm: Any, encoder: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The projector takes the rows of all images one after the other."""
    entered = _entered(_projector(mllm), lambda: _image_features(mllm, encoder, inputs))
    flat = torch.cat([tokens.flatten(0, -2) for tokens in entered])
    config = encoder.config.backbone_config
    grids = LAYOUTS[BACKBONES[config.model_type].layout].grids(inputs, config)  # type: ignore[index]
    if len(flat) != sum(height * width for height, width in grids):  # Gemma 4 has pooled them
        side = FAMILIES[mllm.config.model_type].merge(mllm.config)
        grids = [(height // side, width // side) for height, width in grids]
    parts = flat.split([height * width for height, width in grids])
    return [part.unflatten(0, grid) for part, grid in zip(parts, grids, strict=True)]


def _shuffled(mllm: Any, encoder: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """InternVL's projector takes tokens whose channels are those of 2 x 2 patches."""
    (entered,) = _entered(_projector(mllm), lambda: _image_features(mllm, encoder, inputs))
    maps = encoder(**inputs).last_hidden_state.unflatten(1, encoder._grid(inputs["pixel_values"]))
    own = mllm.model.pixel_shuffle(maps, scale_factor=mllm.config.downsample_ratio)
    assert torch.equal(own.flatten(1, 2), entered)
    return list(maps)


def _before_merger(mllm: Any, encoder: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The merger in the tower takes patches in blocks of 2 x 2, which Qwen2.5-VL sorts by windows besides."""
    (entered,) = _entered(mllm.model.visual.merger, lambda: _image_features(mllm, encoder, inputs))
    maps: list[torch.Tensor] = []
    for image in encoder(**inputs).last_hidden_state:
        blocks = image if mllm.config.model_type.startswith("glm") else _blocks(image)
        merged = mllm.model.visual.merger(blocks)
        maps.append(merged)
    received = _image_features(mllm, encoder, inputs)
    for own, tokens in zip(maps, received, strict=True):
        assert torch.allclose(own.reshape(tokens.shape), tokens, atol=1e-5)
    features = list(encoder(**inputs).last_hidden_state)
    if mllm.config.model_type == "qwen2_5_vl":  # the same patches, in the order of windows
        rows = {tuple(row.tolist()) for row in entered}
        assert {tuple(row.tolist()) for m in features for row in m.flatten(0, 1)} == rows
    elif mllm.config.model_type.startswith("glm"):
        assert torch.equal(torch.cat([m.flatten(0, 1) for m in features]), entered.flatten(0, -2))
    else:
        assert torch.equal(torch.cat([_blocks(m) for m in features]), entered.flatten(0, -2))
    return features


def _blocks(features: torch.Tensor) -> torch.Tensor:
    """Bring a map (H, W, D) into the order of its blocks of 2 x 2 patches: (H*W, D)."""
    height, width, _ = features.shape
    return features.unflatten(0, (height // 2, 2)).unflatten(2, (width // 2, 2)).transpose(1, 2).flatten(0, 3)


def _image_by_image(mllm: Any, encoder: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """LFM2-VL's projector takes one map (1, H, W, D) at a time."""
    return [m[0] for m in _entered(_projector(mllm), lambda: _image_features(mllm, encoder, inputs))]


def _kimi(mllm: Any, encoder: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Kimi's projector takes the four patches of a token beside each other."""
    (entered,) = _entered(_projector(mllm), lambda: _image_features(mllm, encoder, inputs))
    maps = list(encoder(**inputs).last_hidden_state)
    assert torch.equal(torch.cat([_blocks(m) for m in maps]), entered.flatten(0, 1))
    return maps


def _mllama(mllm: Any, encoder: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Mllama's projector takes all tiles of an image, and their CLS tokens."""
    ids = torch.tensor([[IMAGE_TOKEN, 7]])
    named = {"cross_attention_mask": torch.ones(1, 2, 3, mllm.config.vision_config.max_num_tiles), **inputs}
    (entered,) = _entered(_projector(mllm), lambda: mllm(input_ids=ids, **named))
    side = mllm.config.vision_config.image_size // mllm.config.vision_config.patch_size
    ratios = mllm.config.vision_config.supported_aspect_ratios
    maps = []
    for tiles, index in zip(entered[0], inputs["aspect_ratio_ids"].flatten().tolist(), strict=True):
        rows, columns = ratios[index - 1]
        strips = [
            torch.cat([tiles[r * columns + c, 1:].unflatten(0, (side, side)) for c in range(columns)], dim=1)
            for r in range(rows)
        ]
        maps.append(torch.cat(strips))
    return maps


ENTERED: dict[str, Callable[[Any, Any, dict[str, torch.Tensor]], list[torch.Tensor]]] = {
    "llava": _llava,
    **dict.fromkeys(("llava_next", "llava_onevision", "paligemma", "gemma3", "idefics3", "smolvlm"), _square_tokens),
    "internvl": _shuffled,
    **dict.fromkeys((f for f in FAMILIES if f.startswith(("qwen", "glm"))), _before_merger),
    "mistral3": _flat_tokens,
    "gemma4": _flat_tokens,
    "lfm2_vl": _image_by_image,
    "kimi_k25": _kimi,
    "mllama": _mllama,
}
