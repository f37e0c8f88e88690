"""Two to four encoders that are compared on one image, and the maps that the page shows of them."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from PIL import Image

from pivot_hub.demo.cropping import crop_scale, with_margin
from pivot_hub.demo.html import same_place
from pivot_hub.demo.model_bundle import SINGLE_THREAD_BELOW, Origin, one_thread
from pivot_hub.encoder import PivotVisionModel
from pivot_hub.encoder.configuration_pivot import backbone_of
from pivot_hub.errors import CheckpointError, DataError
from pivot_hub.explain.encoder_layers import EncodedImage, encode_image, has_cls
from pivot_hub.explain.patch_views import (
    Match,
    best_matches,
    feature_drift,
    layer_thumbnails,
    patch_colours,
    patch_regions,
    similarity_to,
)
from pivot_hub.probes.fixed_grid import scene_px

EncoderViewName = Literal["similarity", "matching", "colours", "regions", "attention", "drift"]
ENCODER_VIEWS: tuple[EncoderViewName, ...] = ("similarity", "matching", "colours", "regions", "attention", "drift")
FEWEST_ENCODERS, MOST_ENCODERS = 2, 4
MATCHES = 5  # patches of the second image that are marked
MOST_CACHED_BYTES = 512_000_000  # of encoded images, which a click on another patch needs again
NO_CLS = "This tower has no CLS token, whose attention could be shown."
NO_ATTENTION = "Layer 0 is the input of the first block: no attention has taken place yet."
UNRELATED = (
    "The features point in unrelated directions, as those of encoders without a common parent or of distant layers do, "
    "so their drift says little. Compare the similarity maps instead."
)
FIRST_PATCH, FIRST_GRID = (6, 1), (8, 8)  # where the first scene has an object


@dataclass(frozen=True)
class EncoderNames:
    """Names of the encoders to compare; none for those that the app was started with."""

    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncoderInfo:
    """What the page has to know of an encoder that may be in another process.

    Args:
        name: Displayed name.
        origin: Where its weights come from.
        labels: Names of its layers, see `EncodedImage`.
        own: Index of its feature layer.
        has_cls: Whether it has a CLS token, whose attention can be shown.
        crops: Whether it crops an image to its middle square.
        image_px: Side in px at which scenes are rendered for it.
    """

    name: str
    origin: Origin
    labels: tuple[str, ...]
    own: int
    has_cls: bool
    crops: bool
    image_px: int


@dataclass(frozen=True)
class EncoderSetInfo:
    """What the page has to know of the encoders that are compared."""

    encoders: tuple[EncoderInfo, ...]

    @property
    def image_px(self) -> int:
        """Side in px at which scenes are rendered: the largest of all encoders."""
        return max(encoder.image_px for encoder in self.encoders)

    @property
    def crops(self) -> bool:
        """Whether an encoder crops an image to its middle square."""
        return any(encoder.crops for encoder in self.encoders)


@dataclass(frozen=True)
class EncoderMap:
    """The map of one encoder.

    Args:
        layer: Index of the layer that is shown.
        grid: Rows and columns of the patches of that layer.
        position: Row and column of the chosen patch on this grid.
        values: Similarity, attention or drift (H, W), numbers of regions (H, W), or colours (H, W, 3) in uint8; of the
            second image where patches are matched. None if the encoder has no such map.
        note: Why there is no map, or what else there is to say of it; empty for nothing.
        matches: The best patches of the second image.
        basis: Number of the basis that its colours come from; encoders of one number share it.
        variance_share: Share of the variance that the colours show; None for other views.
        cka: Linear CKA with the first encoder, for its drift; None for other views.
        thumbnails: Small images (h, w, 3) in uint8 of all layers.
    """

    layer: int
    grid: tuple[int, int]
    position: tuple[int, int]
    values: np.ndarray | None
    note: str = ""
    matches: tuple[Match, ...] = ()
    basis: int = 0
    variance_share: float | None = None
    cka: float | None = None
    thumbnails: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class MapRequest:
    """What is to be computed.

    Args:
        view: Name of the view.
        image: RGB image.
        other: Second image, in which patches are matched; other views do not need it.
        layers: Layer of each encoder, see `layer_index`; empty for their feature layers.
        row: Row of the chosen patch on the finest of the encoders' grids; negative if none is chosen.
        column: Column of that patch; negative if none is chosen.
        regions: Number of regions.
        grid: Rows and columns of another grid that row and column are counted on, such as that of other encoders.
    """

    view: EncoderViewName
    image: Image.Image
    other: Image.Image | None = None
    layers: tuple[int | None, ...] = ()
    row: int = -1
    column: int = -1
    regions: int = 6
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class NamedEncoder:
    """An encoder with the name that the page shows."""

    name: str
    model: PivotVisionModel
    origin: Origin


class EncoderSet:
    """Encoders in evaluation mode, with the images that they encoded last.

    Attributes:
        described: The description that `info` returns; None until it is known.
    """

    def __init__(self, names: EncoderNames, encoders: Sequence[NamedEncoder]) -> None:
        """Store the encoders.

        Args:
            names: Names under which they were requested.
            encoders: The encoders in the order of their columns.
        """
        self.names, self.encoders = names, tuple(encoders)
        self.described: EncoderSetInfo | None = None
        self._encoded: OrderedDict[tuple[int, str], tuple[EncodedImage, tuple[np.ndarray, ...]]] = OrderedDict()
        self._lock = threading.RLock()

    @property
    def info(self) -> EncoderSetInfo:
        """What the page has to know; each encoder encodes one image for it.

        Raises:
            CheckpointError: An encoder cannot encode an image; the message names it.
        """
        if self.described is not None:
            return self.described
        infos = []
        for number, (name, model, origin) in enumerate((e.name, e.model, e.origin) for e in self.encoders):
            px = scene_px(model.config)
            encoded, _ = self._encode(number, Image.new("RGB", (px, px), "grey"))
            infos.append(
                EncoderInfo(
                    name, origin, encoded.labels, encoded.own, has_cls(model), _crop_scale(model) is not None, px
                )
            )
        self.described = EncoderSetInfo(tuple(infos))
        return self.described

    def maps(self, request: MapRequest) -> tuple[EncoderMap, ...]:
        """Compute the map of each encoder.

        Args:
            request: What is to be computed.

        Raises:
            DataError: An encoder has no such layer, the grid no such patch, the number of regions is out of range, or
                the encoders have no drift.
            CheckpointError: An encoder cannot encode the image.
        """
        with self._exclusive():
            encoded = [self._encode(number, request.image) for number in range(len(self.encoders))]
            layers = request.layers or (None,) * len(encoded)
            if len(layers) != len(encoded):
                raise DataError(f"{len(layers)} layers are given for {len(encoded)} encoders; give one for each.")
            indices = [self._index(number, image, layers[number]) for number, (image, _) in enumerate(encoded)]
            shown = [image.maps[index] for (image, _), index in zip(encoded, indices, strict=True)]
            finest = max(shown, key=lambda features: features.shape[0] * features.shape[1])
            position = _position(request, finest)
            positions = [same_place(position, finest, features) for features in shown]
            values = self._values(request, encoded, indices, shown, positions)
        return tuple(
            EncoderMap(
                layer=index,
                grid=(features.shape[0], features.shape[1]),
                position=position,
                thumbnails=thumbnails,
                **entries,
            )
            for index, features, position, (_, thumbnails), entries in zip(
                indices, shown, positions, encoded, values, strict=True
            )
        )

    def _index(self, number: int, image: EncodedImage, layer: int | None) -> int:
        """Return the index of a layer of one encoder.

        Raises:
            DataError: There is no such layer; the message names encoder and range.
        """
        try:
            return image.index(layer)
        except DataError as error:
            raise DataError(f"{self.encoders[number].name}: {error}") from error

    def _values(
        self,
        request: MapRequest,
        encoded: Sequence[tuple[EncodedImage, Any]],
        indices: Sequence[int],
        shown: Sequence[np.ndarray],
        positions: Sequence[tuple[int, int]],
    ) -> list[dict[str, Any]]:
        """Compute the entries of each encoder's `EncoderMap` that depend on the view."""
        chosen = [features[position] for features, position in zip(shown, positions, strict=True)]
        if request.view == "similarity":
            return [{"values": similarity_to(f, vector)} for f, vector in zip(shown, chosen, strict=True)]
        if request.view == "matching":
            if request.other is None:
                raise DataError("Matching needs a second image; give one.")
            others = [self._encode(i, request.other)[0].maps[index] for i, index in enumerate(indices)]
            found = [similarity_to(f, vector) for f, vector in zip(others, chosen, strict=True)]
            return [{"values": values, "matches": tuple(best_matches(values, MATCHES))} for values in found]
        if request.view == "colours":
            colours = patch_colours(shown)
            rows = zip(colours.images, colours.bases, colours.variance_shares, strict=True)
            return [{"values": image, "basis": basis, "variance_share": share} for image, basis, share in rows]
        if request.view == "regions":
            return [{"values": labels} for labels in patch_regions(shown, request.regions)]
        if request.view == "attention":
            return [_attention(image, index) for (image, _), index in zip(encoded, indices, strict=True)]
        drifts = [feature_drift(shown[0], features) for features in shown[1:]]
        return [
            {"values": None, "note": "The drift of the others is measured from this encoder."},
            *({"values": d.values, "cka": d.cka, "note": "" if d.related else UNRELATED} for d in drifts),
        ]

    def _encode(self, number: int, image: Image.Image) -> tuple[EncodedImage, tuple[np.ndarray, ...]]:
        """Encode an image in one encoder unless it is still known; return it with the thumbnails of all layers."""
        digest = hashlib.sha256(image.tobytes() + repr(image.size).encode()).hexdigest()
        key, encoder = (number, digest), self.encoders[number]
        with self._exclusive():
            if key not in self._encoded:
                image = with_margin(image, _crop_scale(encoder.model))
                try:
                    encoded = encode_image(encoder.model, image)
                except CheckpointError as error:
                    raise CheckpointError(f"{encoder.name}: {error}") from error
                self._encoded[key] = encoded, tuple(layer_thumbnails(encoded.maps))
            self._encoded.move_to_end(key)
            kept = sum(encoded.nbytes for encoded, _ in self._encoded.values())
            while kept > MOST_CACHED_BYTES and len(self._encoded) > 1:
                kept -= self._encoded.popitem(last=False)[1][0].nbytes
            return self._encoded[key]

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Lock the encoders for this thread, and compute on one thread if they are small."""
        parameters = sum(p.numel() for p in cast(Any, self.encoders[0].model).parameters())
        with self._lock, one_thread() if parameters < SINGLE_THREAD_BELOW else nullcontext():
            yield


def _position(request: MapRequest, finest: np.ndarray) -> tuple[int, int]:
    """Return row and column of the chosen patch on the finest grid (H, W, D).

    Raises:
        DataError: The grid has no such patch.
    """
    grid = np.empty((*(request.grid or finest.shape[:2]), 0))
    first = same_place(FIRST_PATCH, np.empty((*FIRST_GRID, 0)), grid)
    row = first[0] if request.row < 0 else request.row
    column = first[1] if request.column < 0 else request.column
    for name, number, length in (("row", row, grid.shape[0]), ("column", column, grid.shape[1])):
        if number >= length:
            raise DataError(f"{name} is {number}: it must be between 0 and {length - 1} in these encoders.")
    return same_place((row, column), grid, finest)


def _attention(encoded: EncodedImage, index: int) -> dict[str, Any]:
    """Return the attention of the CLS token in the block whose output a layer is."""
    if encoded.cls_attention is None:
        return {"values": None, "note": NO_CLS}
    if index == 0:
        return {"values": None, "note": NO_ATTENTION}
    return {"values": encoded.cls_attention[min(index, len(encoded.cls_attention)) - 1]}


def _crop_scale(model: PivotVisionModel) -> float | None:
    """Return by how much an encoder crops, see `crop_scale`; None for one that sees the whole of a wide image."""
    if backbone_of(model.config.backbone_config).maps:  # timm's transforms crop, and hide by how much
        return 1.0
    return None if model.config.image_size is None else crop_scale(model.image_processor)
