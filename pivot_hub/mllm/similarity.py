"""How similar the features of two vision towers of one architecture are, layer by layer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table

from pivot_hub.data.image import list_folder, open_image
from pivot_hub.encoder import PivotVisionModel
from pivot_hub.encoder.configuration_pivot import LAST, backbone_of
from pivot_hub.encoder.device import compute_device
from pivot_hub.encoder.encoding_run import Progress
from pivot_hub.encoder.modeling_pivot import select_features
from pivot_hub.errors import CheckpointError, DataError

# CKA is computed on at most so many tokens, and on fewer where those of all layers would take more memory than this.
MOST_TOKENS, MOST_BYTES = 4096, 1 << 30
MOST_PX = 1024  # longer side to which an image is reduced for towers of native resolution


@dataclass(frozen=True)
class LayerSimilarity:
    """Similarity of two towers' features at one layer.

    Args:
        layer: Number of the hidden state, 0 for the embeddings and i + 1 for the output of block i, or
            `last_hidden_state`, the output after the final norm.
        cka: Linear CKA (Kornblith et al., 2019): 1 for equal features, also up to rotation and scale. None where the
            features of a tower do not vary.
        relative_l2: ||a - b|| / ||a|| over all tokens.
    """

    layer: int | str
    cka: float | None
    relative_l2: float


@dataclass(frozen=True)
class FeatureSimilarity:
    """Similarity of two towers' features on the same images.

    Args:
        images: Number of images that were encoded.
        listed: Number of images of the folder.
        tokens: Number of tokens that CKA was computed on, at the layer with the most.
        seed: Seed of the choice of tokens.
        layers: The layers in order.
        skipped: Messages that name the images that could not be decoded.
    """

    images: int
    listed: int
    tokens: int
    seed: int
    layers: list[LayerSimilarity]
    skipped: list[str] = field(default_factory=list)

    def method(self) -> str:
        """Describe what the numbers were computed on."""
        return (
            f"Both towers encoded the same {self.images} of {self.listed} images, prepared by A's image processor, in "
            f"float32; for a tower of native resolution, their longer side has at most {MOST_PX} px. Linear CKA is "
            f"computed on {self.tokens} tokens, drawn with seed {self.seed}; relative L2 is ||a - b|| / ||a|| over all "
            "tokens."
        )

    def table(self) -> Table:
        table = Table(box=SIMPLE, title="Features", title_justify="left")
        for column in ("layer", "linear CKA", "relative L2"):
            table.add_column(column, no_wrap=True)
        for row in self.layers:
            cka = "-" if row.cka is None else "1" if row.cka == 1 else f"{row.cka:.6f}"
            table.add_row(str(row.layer), cka, f"{row.relative_l2:.1e}" if row.relative_l2 else "0")
        return table


def check_images(folder: Path, limit: int) -> Sequence[Path]:
    """List the images of a folder in sorted order.

    Raises:
        DataError: There is no such folder, no image in it, or none is to be encoded.
    """
    if limit < 1:
        raise DataError(f"limit {limit}: give 1 image or more.")
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give the folder that holds the images.")
    images = list_folder(folder).images
    if not images:
        raise DataError(f"{folder} holds no image file; give the folder that holds the images.")
    return images


@torch.inference_mode()
def compare_features(
    a: PivotVisionModel,
    b: PivotVisionModel,
    images: Sequence[Path],
    limit: int = 64,
    seed: int = 0,
    progress: Progress = lambda done, total, speed: None,
) -> FeatureSimilarity:
    """Encode images with two towers and compare every hidden state.

    Args:
        a: The first encoder, whose image processor prepares the images.
        b: The second encoder, of the same architecture.
        images: Image files.
        limit: Number of images to encode; the first ones that can be decoded are taken.
        seed: Seed of the choice of tokens that CKA is computed on.
        progress: Function that is called after every image.

    Raises:
        DataError: No image can be decoded.
        CheckpointError: The features of a tower are not finite.
    """
    device = compute_device()
    modules: tuple[Any, Any] = (a, b)
    for module in modules:
        module.to(device, torch.float32).eval()
    started, total, done, skipped = time.monotonic(), min(limit, len(images)), 0, []
    sums: list[_LayerSums] = []
    tokens_per_image = 0
    for path in images:
        if done == total:
            break
        try:
            image = open_image(path, path.name)
        except DataError as error:
            skipped.append(str(error))
            total = min(limit, len(images) - len(skipped))
            continue
        if a.config.image_size is None:  # the hidden states of all layers of an image are in memory at once
            image.thumbnail((MOST_PX, MOST_PX))
        inputs = a.prepare([image])
        states = [_hidden_states(model, inputs) for model in (a, b)]
        if not sums:
            layers = [layer for layer, _ in states[0]]
            sums = [_LayerSums(layer) for layer in layers]
            bytes_per_token = 8 * sum(tokens.shape[1] for _, tokens in states[0])
            tokens_per_image = max(1, min(MOST_TOKENS, MOST_BYTES // bytes_per_token) // total)
        for layer_sums, (_, first), (_, other) in zip(sums, *states, strict=True):
            if not (first.isfinite().all() and other.isfinite().all()):
                raise CheckpointError(
                    f"the features of {path.name} are not finite (NaN or infinite) at layer {layer_sums.layer}; check "
                    "both models with `pivot verify`, or where they come from."
                )
            layer_sums.add(first, other, _chosen(len(first), tokens_per_image, seed + done))
        done += 1
        progress(done, total, done / (time.monotonic() - started))
    if not done:
        raise DataError(f"no image can be decoded; the first: {skipped[0]}")
    return FeatureSimilarity(
        done, len(images), max(s.tokens for s in sums), seed, [s.similarity() for s in sums], skipped
    )


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float | None:
    """Compute the linear CKA of two sets of features, in float64.

    Args:
        x: Features (N, D).
        y: Features (N, E) of the same N tokens.

    Returns:
        ||Y^T X||^2 / (||X^T X|| ||Y^T Y||) in Frobenius norms, with centred columns; None if a set does not vary.
    """
    if torch.equal(x, y):
        return 1.0 if bool((x != x[:1]).any()) else None
    x, y = (features.double() - features.double().mean(0) for features in (x, y))
    if len(x) < x.shape[1]:  # the same products between tokens, which are smaller then
        kernels = x @ x.T, y @ y.T
        joint = (kernels[0] * kernels[1]).sum()
    else:
        kernels = x.T @ x, y.T @ y
        joint = (y.T @ x).square().sum()
    scale = (kernels[0].norm() * kernels[1].norm()).item()
    return min(joint.item() / scale, 1.0) if scale > 0 else None


class _LayerSums:
    """What is kept of one layer: squared norms over all tokens, and the tokens that were drawn for CKA."""

    def __init__(self, layer: int | str) -> None:
        self.layer = layer
        self.squared_distance = self.squared_norm = 0.0
        self.drawn: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])

    def add(self, first: torch.Tensor, other: torch.Tensor, chosen: torch.Tensor) -> None:
        self.squared_distance += (first - other).double().square().sum().item()
        self.squared_norm += first.double().square().sum().item()
        for drawn, tokens in zip(self.drawn, (first, other), strict=True):
            drawn.append(tokens[chosen.to(tokens.device)].cpu())

    @property
    def tokens(self) -> int:
        return sum(map(len, self.drawn[0]))

    def similarity(self) -> LayerSimilarity:
        x, y = (torch.cat(drawn) for drawn in self.drawn)
        relative = (self.squared_distance / self.squared_norm) ** 0.5 if self.squared_norm else 0.0
        return LayerSimilarity(self.layer, linear_cka(x, y), relative)


def _hidden_states(model: PivotVisionModel, inputs: dict[str, torch.Tensor]) -> list[tuple[int | str, torch.Tensor]]:
    """Encode one image, and return the patch tokens (N, D) of every layer without padding and prefix tokens."""
    shapes = dict(inputs)
    pixels = shapes.pop("pixel_values")
    if model.config.image_size is None:
        outputs = model._run_native_resolution(pixels, shapes, False, True)
        return [(layer, model.maps(outputs, layer, inputs)[0].flatten(0, 1)) for layer in _layers(model, outputs)]
    outputs = model._run_backbone(pixels, False, False, True)
    return [
        (layer, model._patch_tokens(select_features(outputs, layer)).flatten(0, 1)) for layer in _layers(model, outputs)
    ]


def _layers(model: PivotVisionModel, outputs: Any) -> list[int | str]:
    """List the layers of a model's outputs; timm's last hidden state may be pooled, so it is left out."""
    last: list[int | str] = [] if backbone_of(model.config.backbone_config).maps else [LAST]
    return [*range(len(outputs.hidden_states)), *last]


def _chosen(count: int, most: int, seed: int) -> torch.Tensor:
    """Draw the places of at most `most` of `count` tokens; the same ones for the same seed."""
    if count <= most:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].sort().values
