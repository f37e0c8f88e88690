"""The view state of the mode for any two encoders: everything one visitor chose, and the link that restores it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any
from urllib.parse import urlencode

from PIL import Image

from pivot_hub.demo.encoder_set import ENCODER_VIEWS, EncoderNames, EncoderViewName
from pivot_hub.demo.view_state import LARGEST, MOST_LINK_BYTES, encode_for_link
from pivot_hub.errors import DataError

MODE = "encoders"  # value of the link's parameter `mode`


@dataclass(frozen=True)
class EncoderState:
    """The choices of one visitor. The fields are the parameters of the link.

    Args:
        encoders: Names of the encoders, separated by commas; empty for those that the app was started with.
        view: Name of the view.
        layers: Layer of each encoder, separated by commas; empty for their feature layers.
        row: Row of the chosen patch on the finest of the encoders' grids, from 0 at the top; -1 if none is chosen.
        column: Column of that patch, from 0 at the left; -1 if none is chosen.
        regions: Number of regions.
        scene: Number of the scene of the synthetic Shapes dataset; it counts only without an image.
        other_scene: Number of the second scene; it counts only without a second image.
        image: The visitor's own image, reduced, as base64; empty for a scene.
        other_image: The visitor's own second image, reduced, as base64; empty for a scene.
    """

    encoders: str = ""
    view: EncoderViewName = "similarity"
    layers: str = ""
    row: int = -1
    column: int = -1
    regions: int = 6
    scene: int = 27
    other_scene: int = 17
    image: str = ""
    other_image: str = ""

    def __post_init__(self) -> None:
        """Validate the values, which also come from links and programs.

        Raises:
            DataError: A value is not allowed; the message names it.
        """
        for name, default in _defaults().items():
            value = getattr(self, name)
            if type(value) is not type(default):
                kind = "a whole number" if isinstance(default, int) else "a text"
                raise DataError(f"{name} is {str(value)[:40]!r}: it must be {kind}.")
            if isinstance(value, int) and not min(default, 0) <= value <= LARGEST:
                raise DataError(f"{name} is {value}: it must be between {min(default, 0)} and {LARGEST:,}.")
        if self.view not in ENCODER_VIEWS:
            raise DataError(f"view is {self.view[:40]!r}: it must be one of {', '.join(ENCODER_VIEWS)}.")
        self.layer_numbers  # noqa: B018  (it raises for a layer that is no number)

    @property
    def names(self) -> EncoderNames:
        """Names of the encoders."""
        return EncoderNames(tuple(split_names(self.encoders)))

    @property
    def layer_numbers(self) -> tuple[int | None, ...]:
        """Layer of each encoder; None for its feature layer, and nothing at all for those of all encoders.

        Raises:
            DataError: A layer is no whole number.
        """
        if not self.layers.strip():
            return ()
        numbers: list[int | None] = []
        for text in self.layers.split(","):
            if text.strip() and not re.fullmatch(r"-?\d{1,4}", text.strip()):
                raise DataError(
                    f"layers is {self.layers[:40]!r}: give a whole number for each encoder, separated by commas."
                )
            numbers.append(int(text) if text.strip() else None)
        return tuple(numbers)

    def query(self) -> str:
        """Return the query string of the link: the mode, and every choice that is not the default."""
        defaults = _defaults()
        choices = {name: getattr(self, name) for name in defaults if getattr(self, name) != defaults[name]}
        return urlencode({"mode": MODE, **choices}, safe=",/@")

    def with_images(self, image: Image.Image | None, other: Image.Image | None) -> EncoderState:
        """Store the visitor's own images in the view state, reduced so that the link holds both."""
        given = [i for i in (image, other) if i is not None]
        changes: dict[str, Any] = {
            name: encode_for_link(own, MOST_LINK_BYTES // len(given))
            for name, own in (("image", image), ("other_image", other))
            if own is not None
        }
        return replace(self, **changes)


def split_names(text: str) -> list[str]:
    """Return the names in a text, which commas, spaces or new lines separate."""
    return re.findall(r"[^\s,]+", text)


def read_encoder_state(query: Mapping[str, str]) -> EncoderState:
    """Read a view state from the parameters of a link; unknown parameters are ignored.

    Raises:
        DataError: A value is not allowed; the message names it.
    """
    choices: dict[str, Any] = {}
    for name, default in _defaults().items():
        if name in query:
            value = query[name]
            if isinstance(default, int) and not (value.isdecimal() and len(value) < 10):
                raise DataError(f"{name} is {value[:40]!r}, which is not a whole number.")
            choices[name] = int(value) if isinstance(default, int) else value
    return EncoderState(**choices)


def _defaults() -> dict[str, Any]:
    return {field.name: field.default for field in fields(EncoderState)}
