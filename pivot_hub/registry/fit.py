"""Which encoder fits an MLLM: its vision config compared with each encoder of the registry; no weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pivot_hub.encoder.configuration_pivot import LAST, backbone_of, native_config
from pivot_hub.mllm.families import family_of
from pivot_hub.mllm.published_configs import whole_config
from pivot_hub.registry.encoders import EncoderEntry, list_encoders

Verdict = Literal["drop-in", "new projector", "no"]


@dataclass(frozen=True)
class EncoderFit:
    """How an encoder fits an MLLM.

    Args:
        encoder: Short name of the encoder.
        status: Its status, see `EncoderShape`.
        verdict: `drop-in`: its weights load into the MLLM's vision tower, and the projector keeps its shape. `new
            projector`: the vision config changes, and a projector is trained for it. `no`: the MLLM takes images of
            native resolution, and no encoder of square images takes the place of its tower.
        differences: What differs from the MLLM's vision tower, in a few words each.
    """

    encoder: str
    status: str
    verdict: Verdict
    differences: tuple[str, ...]


@dataclass(frozen=True)
class MllmFit:
    """The encoders of the registry for an MLLM.

    Args:
        mllm: Folder or Hub name of the MLLM.
        tower: Description of its vision tower.
        encoders: How each encoder fits, those that fit best first.
    """

    mllm: str
    tower: str
    encoders: tuple[EncoderFit, ...]


@dataclass(frozen=True)
class _Tower:
    """What a projector sees of a vision tower of square images.

    Args:
        architecture: Model type.
        image_px: Side of the images.
        patch_px: Side of a patch.
        dim: Channels.
        depth: Blocks that features have passed, and whether the final norm followed.
    """

    architecture: str
    image_px: int
    patch_px: int
    dim: int
    depth: str

    def differences(self, own: _Tower) -> tuple[str, ...]:
        """Say what differs from another tower, that of the MLLM."""
        pairs = [
            (self.architecture, own.architecture, "{} instead of {}"),
            (self.image_px, own.image_px, "images of {} px instead of {}"),
            (self.patch_px, own.patch_px, "patches of {} px instead of {}"),
            (self.dim, own.dim, "{} channels instead of {}"),
            (self.depth, own.depth, "features of {} instead of {}"),
        ]
        return tuple(text.format(a, b) for a, b, text in pairs if a != b)


def fit_encoders(mllm: str, filter: str = "") -> MllmFit:
    """Find out which encoders can take the place of an MLLM's vision tower, from its config.

    Args:
        mllm: Folder or Hub name of the MLLM; those of `recipes/parts.yaml` are known without the Hub.
        filter: Encoders to compare, see `list_encoders`.

    Raises:
        CheckpointError: There is no config, or it is not of an MLLM that this package knows.
    """
    config = whole_config(mllm)
    vision: Any = native_config(config)
    if backbone_of(vision).layout is not None:
        tower = f"{vision.model_type}, images of native resolution"
        fits = [EncoderFit(e.name, e.status, "no", ("square images of one size",)) for e in list_encoders(filter)]
        return MllmFit(mllm, tower, tuple(fits))
    own = _Tower(
        vision.model_type,
        backbone_of(vision).image_px(vision),
        vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0],
        vision.hidden_size,
        _depth(family_of(config).feature_layer(config), vision.num_hidden_layers),
    )
    tower = f"{own.architecture}, images of {own.image_px} px, patches of {own.patch_px} px, {own.dim} channels"
    return MllmFit(mllm, f"{tower}, features of {own.depth}", tuple(_ranked(list_encoders(filter), own)))


def _ranked(entries: Sequence[EncoderEntry], own: _Tower) -> list[EncoderFit]:
    fits = []
    for entry in entries:
        layer = int(entry.feature_layer) if entry.feature_layer != LAST else LAST
        depth = _depth(layer, entry.layers)
        tower = _Tower(entry.architecture, entry.image_px, entry.patch_px, entry.dim, depth)
        differences = tower.differences(own)
        fits.append(EncoderFit(entry.name, entry.status, "new projector" if differences else "drop-in", differences))
    return sorted(fits, key=lambda fit: len(fit.differences))


def _depth(layer: int | str, layers: int) -> str:
    """Name the depth of features: 26 blocks are the last hidden state of a tower of 26, the one before in one of 27."""
    if isinstance(layer, str):
        return f"{layers} blocks and the final norm"
    return f"{layer if layer >= 0 else layers + 1 + layer} blocks"
