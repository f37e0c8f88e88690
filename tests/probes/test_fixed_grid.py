"""Probes of towers of native resolution: each map is brought to one grid, and results say how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from typer.testing import CliRunner

from pivot_hub.cli import app
from pivot_hub.data.synthetic import ShapesDataset
from pivot_hub.encoder.repository import read_encoder
from pivot_hub.errors import ProbeError
from pivot_hub.probes.features import EncodingOptions, patch_features
from pivot_hub.probes.fixed_grid import FixedGrid, scene_px
from pivot_hub.probes.run import Sizes, probe_encoder
from pivot_hub.probes.segmentation.labelled_masks import open_masks
from pivot_hub.probes.segmentation.protocols import (
    SegmentationOptions,
    at_size,
    cached_encode,
    encode_masked,
    segment_masks,
)
from pivot_hub.probes.segmentation.synthetic import _patch_shares
from tests.encoder.native_towers import TOWERS, WIDTH, write_tower
from tests.probes.classification.test_protocols import class_folder

CONDITIONS: dict[str, Any] = {"feature_layer": -2, "encoder": "test", "encoder_sha256": "0"}
SHAPES_PX = {"qwen3_vl_vision": 224, "pixtral": 112, "siglip2_vision_model": 128}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("towers")
    return {model_type: write_tower(model_type, folder) for model_type in TOWERS}


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write images of three shapes with a bright half, left, right, above or below, and masks of the two classes."""
    folder, rng = tmp_path_factory.mktemp("masks"), np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for i in range(40):
        ids = np.zeros(((56, 84), (84, 56), (70, 70))[i % 3], np.uint8)
        rows, columns = ids.shape[0] // 2, ids.shape[1] // 2
        half = (np.s_[:rows], np.s_[rows:], np.s_[:, :columns], np.s_[:, columns:])[i % 4]
        ids[half] = 1
        pixels = rng.integers(0, 60, (*ids.shape, 3)) + 170 * ids[..., None]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{i:02}.png")
        Image.fromarray(ids).save(folder / "masks" / f"{i:02}.png")
    return folder


@pytest.mark.parametrize("model_type", TOWERS)
def test_maps_of_one_grid_are_kept_and_others_are_interpolated(model_type: str, towers: dict[str, Path]) -> None:
    model, processor = read_encoder(towers[model_type])
    rng = np.random.default_rng(0)
    square, wide = (Image.fromarray(rng.integers(0, 255, (*s, 3), np.uint8)) for s in ((84, 84), (56, 140)))
    grid = FixedGrid(model, processor, 84)
    tokens = torch.from_numpy(patch_features(grid, processor, [square, wide])).unflatten(1, (grid.side, grid.side))
    with torch.no_grad():
        own = [model.forward_features([image]).last_hidden_state[0] for image in (square, wide)]
    assert own[0].shape == (grid.side, grid.side, WIDTH)
    torch.testing.assert_close(tokens[0], own[0], atol=1e-5, rtol=1e-4)
    assert own[1].shape[0] < own[1].shape[1]
    resized = functional.interpolate(
        own[1].permute(2, 0, 1)[None], (grid.side, grid.side), mode="bilinear", antialias=True
    )
    torch.testing.assert_close(tokens[1], resized[0].permute(1, 2, 0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", TOWERS)
def test_shapes_are_probed_at_a_size_that_the_results_name(model_type: str, towers: dict[str, Path]) -> None:
    results, _ = probe_encoder(str(towers[model_type]), sizes=Sizes(24, 12, 12), feature_layer=2)
    tasks = ("colour", "shape", "position", "count", "segmentation")
    assert {r.task for r in results} == {f"shapes/{task}" for task in tasks}
    side = {"qwen3_vl_vision": 10, "pixtral": 8, "siglip2_vision_model": 4}[model_type]  # what the processors leave
    px = SHAPES_PX[model_type]
    for result in results:
        assert result.protocol.endswith(f"; scenes of {px} px, {side} x {side} tokens at native resolution")
        assert result.feature_layer == 2
    model, _ = read_encoder(towers[model_type])
    assert scene_px(model.config) == px


def test_square_encoders_say_nothing_about_native_resolution(parts: Path) -> None:
    results, _ = probe_encoder(str(parts / "vision"), sizes=Sizes(24, 12, 12))
    assert not any("native" in result.protocol for result in results)


def test_patches_that_do_not_end_at_a_pixel_share_the_pixels_that_they_touch() -> None:
    ids = np.zeros((1, 10, 10), np.int64)
    ids[0, :4] = 1
    shares = _patch_shares(ids, 9).reshape(3, 3, -1)
    np.testing.assert_allclose(shares[:, 0, 1], [1, 0.25, 0], atol=1e-6)  # rows 0 to 3, 3 to 6 and 6 to 9
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-6)
    scene = ShapesDataset(image_px=64).scene("test", 0).render()
    assert _patch_shares(np.stack([scene.masks[0].astype(np.int64)]), 64).shape[0] == 64


@pytest.mark.parametrize("model_type", TOWERS)
def test_masks_of_images_of_any_shape_are_segmented(
    model_type: str, towers: dict[str, Path], masks: Path, tmp_path: Path
) -> None:
    model, processor = read_encoder(towers[model_type])
    options = SegmentationOptions(heads=["linear"], image_px=[112], steps=60)
    results, skipped = segment_masks(model, processor, open_masks(masks), conditions=CONDITIONS, options=options)
    assert not skipped
    (result,) = [r for r in results if r.metric == "mean_iou"]
    assert result.value > 75, "halves of images of three shapes lie where their maps say"
    assert float(result.protocol.rsplit("position alone ", 1)[1]) < 60
    assert "images scaled to the area of 112 x 112 px in their own aspect ratio" in result.protocol
    assert "maps interpolated bilinearly to one grid" in result.protocol
    images = open_masks(masks).parts["test"]
    encode = cached_encode(model, processor, {"encoder": "t", "encoder_sha256": "0"}, tmp_path, lambda *_: None)
    plain = encode_masked(model, processor, images, 112, tmp_path)  # kept in 16 bits
    np.testing.assert_allclose(encode(images, 112)[np.arange(len(images))], plain, rtol=1e-3, atol=1e-3)


def test_the_size_of_segmentation_has_a_default_and_bad_ones_are_named(towers: dict[str, Path], masks: Path) -> None:
    model, processor = read_encoder(towers["pixtral"])
    data = open_masks(masks)
    options = SegmentationOptions(heads=["linear"], steps=1)
    results, _ = segment_masks(model, processor, data, conditions=CONDITIONS, options=options)
    assert results[0].task.endswith("/448px"), "32 patches of 14 px"
    with pytest.raises(ProbeError, match=r"takes no images of 2 px .*give another --image-px"):
        segment_masks(
            model, processor, data, conditions=CONDITIONS, options=SegmentationOptions(heads=["linear"], image_px=[2])
        )
    scaled = at_size(model, processor, 56)[1](images=[Image.new("RGB", (50, 200))], return_tensors="pt")
    assert scaled["image_sizes"].tolist() == [[112, 28]], "the area of 56 x 56 px, four times as high as wide"


def test_labelled_images_are_classified_by_pooled_features_of_the_layer_asked_for(
    towers: dict[str, Path], tmp_path: Path
) -> None:
    folder, out = class_folder(tmp_path / "data"), tmp_path / "results.json"
    command = ["probe", str(towers["qwen3_vl_vision"]), "--data", str(folder), "--cache", str(tmp_path / "cache")]
    command += ["--workers", "0", "--json", str(out), "--feature-layer", "merged"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    results = json.loads(out.read_text())
    rows = results["results"] if isinstance(results, dict) else results
    assert [row["task"] for row in rows] == ["data/prototypes", "data/fast", "data/full", "data/knn"]
    for row in rows:
        assert row["feature_layer"] == "merged"
        assert row["value"] > 80, row["task"]


def test_attention_pooling_of_such_a_tower_is_refused(towers: dict[str, Path], tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "data")
    with pytest.raises(ProbeError, match=r"pixtral: attention pooling needs .*leave attention out of the protocols"):
        probe_encoder(
            str(towers["pixtral"]),
            str(folder),
            protocols=("fast", "attention"),
            encoding=EncodingOptions(cache=tmp_path / "cache", workers=0),
        )
    assert not (tmp_path / "cache").exists()
