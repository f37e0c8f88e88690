"""Golden vectors: inputs and the features that an encoder gives for them, which are replayed when it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils.hub import cached_file

from pivot_hub.encoder.configuration_pivot import backbone_of
from pivot_hub.encoder.modeling_pivot import PivotVisionModel, select_features
from pivot_hub.encoder.native_resolution import LAYOUTS, merge_side
from pivot_hub.errors import CheckpointError

# Relative; golden vectors are replayed on other machines, whose kernels sum in another order.
GOLDEN_TOLERANCE = 1e-3
FEATURES = ("last_hidden_state", "pooler_output")


@torch.no_grad()
def golden_vectors(model: PivotVisionModel) -> dict[str, torch.Tensor]:
    """Encode two seeded random images, which `verify_repository` will encode again to compare the features.

    Returns:
        The inputs: pixel_values (2, 3, image_px, image_px), or for a tower of native resolution those of two images of
        different shapes; last_hidden_state (2, H*W, D), or all tokens of both images (N, D); pooler_output (2, D). On
        the CPU in float32.
    """
    inputs = random_inputs(model)
    outputs = model(**_on_device(inputs, model))
    tokens = outputs.last_hidden_state
    if model.config.image_size is None:
        tokens = torch.cat([features.flatten(0, 1) for features in tokens])
    vectors = dict(zip(FEATURES, (tokens, outputs.pooler_output), strict=True))
    return {**inputs, **{k: v.float().cpu().contiguous() for k, v in vectors.items()}}


def random_inputs(model: PivotVisionModel) -> dict[str, torch.Tensor]:
    """Draw two images of random pixels from -1 to 1 with a fixed seed, in the form that the encoder's forward takes."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) * 2 - 1

    config: Any = model.config.backbone_config
    backbone = backbone_of(config)
    if backbone.layout is None:
        size = model.config.image_size
        return {"pixel_values": random(2, 3, size, size)}
    unit, patch = 2 * merge_side(config, backbone.merge), model.config.patch_size
    grids = [(unit, 2 * unit), (2 * unit, unit)]
    counts = [height * width for height, width in grids]
    most = max(counts)
    if backbone.layout.startswith("grid_thw"):
        size = (3, patch, patch)
        flat = (3 * getattr(config, "temporal_patch_size", 1) * patch * patch,)
        pixels = random(sum(counts), *(size if hasattr(config, "merge_kernel_size") else flat))
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, *grid] for grid in grids])}
    if backbone.layout == "image_sizes":
        side = 2 * unit * patch
        sizes = torch.tensor([[height * patch, width * patch] for height, width in grids])
        return {"pixel_values": random(2, 3, side, side), "image_sizes": sizes}
    if backbone.layout == "spatial_shapes":
        mask = torch.arange(most)[None] < torch.tensor(counts)[:, None]
        shapes = {"pixel_attention_mask": mask.long(), "spatial_shapes": torch.tensor(grids)}
        return {"pixel_values": random(2, most, 3 * patch * patch), **shapes}
    if backbone.layout == "position_ids":
        rows_columns = [torch.cartesian_prod(torch.arange(height), torch.arange(width)) for height, width in grids]
        positions = torch.stack([pair.flip(-1) for pair in rows_columns])
        return {"pixel_values": random(2, most, 3 * patch * patch), "image_position_ids": positions}
    ratios, tiles, side = config.supported_aspect_ratios, config.max_num_tiles, config.image_size
    ids = torch.tensor([[1], [len(ratios)]])
    counts = [rows * columns for rows, columns in (ratios[i - 1] for i in ids.flatten().tolist())]
    mask = (torch.arange(tiles)[None] < torch.tensor(counts)[:, None]).long()[:, None]
    return {"pixel_values": random(2, 1, tiles, 3, side, side), "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}


def check_golden(name: str | Path, model: PivotVisionModel, revision: str | None = None) -> None:
    """Replay the golden vectors of the repository that a model was loaded from, if it has any.

    Args:
        name: Folder or Hub name of the repository.
        model: The encoder that was loaded from it, in float32.
        revision: Revision of the Hub repository.

    Raises:
        CheckpointError: The features differ from those that the repository was published with.
    """
    golden = golden_file(name, revision)
    if golden is None:
        return
    distance = golden_distance(model, golden)
    if not distance < GOLDEN_TOLERANCE:
        raise CheckpointError(
            f"{name}: its features differ from the golden vectors by {distance:.1e} relative, so it is not what was "
            "published; pull the repository again, or check torch and its kernels."
        )


def golden_file(name: str | Path, revision: str | None) -> Path | None:
    """Find the golden vectors of a repository; None for an original encoder, which has none."""
    try:
        golden = cached_file(
            str(name), "golden.safetensors", revision=revision, _raise_exceptions_for_missing_entries=False
        )
    except OSError:  # the Hub is out of reach, or the repository does not exist
        return None
    return None if golden is None else Path(golden)


def golden_distance(model: PivotVisionModel, golden: Path) -> float:
    """Relative distance of a model's features, at the layer of the repository's config, from golden vectors.

    Raises:
        CheckpointError: The golden vectors cannot be replayed.
    """
    try:
        expected = load_file(golden)["last_hidden_state"]
        layer = json.loads(golden.with_name("config.json").read_text())["pivot"]["feature_layer"]
        features = replay(model, golden, layer)
        return ((features - expected).norm() / expected.norm()).item()
    except (OSError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"golden.safetensors cannot be replayed ({error}); pull the repository again.") from error


@torch.no_grad()
def replay(model: PivotVisionModel, golden: Path, layer: int | str) -> torch.Tensor:
    """Encode the inputs of golden vectors again.

    Args:
        model: The encoder.
        golden: File of the golden vectors.
        layer: Feature layer.

    Returns:
        Features in the form of the stored ones, on the CPU in float32.
    """
    inputs = {k: v for k, v in load_file(golden).items() if k not in FEATURES}
    prepared = _on_device(inputs, model)
    pixels = prepared.pop("pixel_values")
    if model.config.image_size is not None:
        outputs = model.backbone(pixels, output_hidden_states=True)
        return model._patch_tokens(select_features(outputs, layer)).float().cpu()
    layout = LAYOUTS[str(backbone_of(model.config.backbone_config).layout)]
    named = {a: prepared[n] for n, a in zip(layout.inputs, layout.arguments, strict=True)}
    outputs = model.backbone(pixels, output_hidden_states=True, return_dict=True, **named)
    return torch.cat([m.flatten(0, 1) for m in model.maps(outputs, layer, prepared)]).float().cpu()


def _on_device(inputs: dict[str, torch.Tensor], model: PivotVisionModel) -> dict[str, torch.Tensor]:
    moved = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    return {**moved, "pixel_values": moved["pixel_values"].to(model.dtype)}
