"""The view state: everything one visitor of the Space chose, and the link that restores it."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from PIL import Image

from pivot_hub.data.image import read_upload
from pivot_hub.data.synthetic import KINDS, Kind
from pivot_hub.demo.model_bundle import BundleNames
from pivot_hub.errors import DataError
from pivot_hub.explain.gradcam import EXPLAINS, METHODS, Explain, Method
from pivot_hub.explain.heatmaps import COLOURS

PHOTOS = ("cat", "coffee", "astronaut", "rocket")
PHOTO_FOLDER = Path(__file__).parent / "photos"
DETAILS = ("swipe", "patches", "colours", "tokens")
CHOICES: dict[str, tuple[str, ...]] = {
    "kind": KINDS,
    "explain": EXPLAINS,
    "method": METHODS,
    "colours": COLOURS,
    "details": DETAILS,
    "photo": ("", *PHOTOS),
}
TYPE_NAMES = {int: "a whole number", str: "a text"}
LARGEST = 999_999_999
LARGEST_OF = {"opacity": 100}
MOST_LINK_BYTES = 4000  # of an image inside a link: servers and proxies accept addresses of about 8 KB
LINK_SIDES_PX = (160, 128, 96, 64, 48)  # longer sides that are tried until the image fits; the last one always does


@dataclass(frozen=True)
class ViewState:
    """The choices of one visitor. The fields are the parameters of the link and of the endpoints.

    Args:
        scene: Number of the scene of the synthetic Shapes dataset; it counts only without an image or a photograph.
        kind: Kind of question about the scene.
        question: Question to both models; empty for the scene's own question.
        right_answer: Answer that is explained; empty if it is unknown or the scene's own.
        wrong_answer: Answer that the right one is compared with; empty if there is none or for the scene's own.
        explain: Quantity that is explained: answer, sft or dpo.
        method: Method of the saliency maps: gradcam or gradient.
        layer: Hidden state that Grad-CAM explains; 0 for the one that the language model receives.
        colours: Name of the maps' colour scale.
        opacity: Opacity of the maps over the image, in percent.
        details: Name of the panel below the maps.
        row: Row of the patch that is compared with all others, from 0 at the top.
        column: Column of that patch, from 0 at the left.
        first: Name of the first MLLM; empty for the bundle that the app was started with.
        second: Name of the second MLLM.
        parent: Name of the parent of both; empty if there is none.
        image: The visitor's own image, reduced, as base64; empty for a scene or a photograph.
        photo: Name of a photograph of the gallery, one of PHOTOS; empty for a scene.
    """

    scene: int = 1
    kind: Kind = "position"
    question: str = ""
    right_answer: str = ""
    wrong_answer: str = ""
    explain: Explain = "answer"
    method: Method = "gradcam"
    layer: int = 0
    colours: str = COLOURS[0]
    opacity: int = 85
    details: str = DETAILS[0]
    row: int = 3
    column: int = 3
    first: str = ""
    second: str = ""
    parent: str = ""
    image: str = ""
    photo: str = ""

    def __post_init__(self) -> None:
        """Validate the values, which also come from links and programs.

        Raises:
            DataError: A value is not allowed or has the wrong type; the message names it.
        """
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise DataError(f"{name} is {str(value)[:40]!r}: it must be one of {', '.join(allowed)}.")
        for name, default in _defaults().items():
            value = getattr(self, name)
            if type(value) is not type(default):
                raise DataError(f"{name} is {str(value)[:40]!r}: it must be {TYPE_NAMES[type(default)]}.")
            largest = LARGEST_OF.get(name, LARGEST)
            if isinstance(value, int) and not 0 <= value <= largest:
                raise DataError(f"{name} is {value}: it must be between 0 and {largest:,}.")

    @property
    def bundle_names(self) -> BundleNames:
        """Names of the models."""
        return BundleNames(self.first, self.second, self.parent)

    def query(self) -> str:
        """Return the query string of the link: the scene, and every other choice that is not the default."""
        defaults = _defaults()
        choices = {name: getattr(self, name) for name in defaults}
        return urlencode({k: v for k, v in choices.items() if k in ("scene", "kind") or v != defaults[k]})

    def with_image(self, image: Image.Image) -> ViewState:
        """Store an image in the view state, at the largest of LINK_SIDES_PX at which it fits into the link."""
        return replace(self, image=encode_for_link(image), photo="")

    def load_image(self) -> Image.Image | None:
        """Decode the image of the link, or open the photograph that it names; None if it holds neither.

        Raises:
            DataError: The content is not an image.
        """
        if self.photo and not self.image:
            return Image.open(PHOTO_FOLDER / f"{self.photo}.webp").convert("RGB")
        return decode_from_link(self.image)


def encode_for_link(image: Image.Image, most_bytes: int = MOST_LINK_BYTES) -> str:
    """Reduce an image to the largest of LINK_SIDES_PX at which it fits into a link, as base64.

    Args:
        image: RGB image.
        most_bytes: Largest size of the reduced image; the smallest side is taken even if it is larger.
    """
    for side in LINK_SIDES_PX:
        reduced = image.copy()
        reduced.thumbnail((side, side))
        file = io.BytesIO()
        reduced.save(file, "WEBP", quality=70)
        if len(file.getvalue()) <= most_bytes:
            break
    return base64.urlsafe_b64encode(file.getvalue()).decode()


def decode_from_link(text: str) -> Image.Image | None:
    """Decode the image of a link; None if the link holds none.

    Raises:
        DataError: The content is not an image.
    """
    if not text:
        return None
    try:
        content = base64.urlsafe_b64decode(text)
    except (binascii.Error, ValueError):
        raise DataError("The image inside this link is damaged; copy the whole link again.") from None
    return read_upload(io.BytesIO(content))


def whole_number(name: str, value: Any) -> int:
    """Return a number from the page or from a program, where 3.0 is a whole number too.

    Args:
        name: Name of the field, for the error message.
        value: Value of any type; None if the field is empty.

    Raises:
        DataError: The value is no whole number.
    """
    if value is None or value == "":
        raise DataError(f"{name} is empty: give a whole number.")
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise DataError(f"{name} is {str(value)[:40]!r}: it must be a whole number.")
    return int(value)


def read_view_state(query: Mapping[str, str]) -> ViewState:
    """Read a view state from the parameters of a link; unknown parameters are ignored.

    Raises:
        DataError: A value is not allowed; the message names it.
    """
    choices: dict[str, Any] = {}
    for name, default in _defaults().items():
        if name not in query:
            continue
        value = query[name]
        if isinstance(default, int):
            if not (value.isdecimal() and len(value) < 10):
                raise DataError(f"{name} is {value[:40]!r}, which is not a whole number.")
            choices[name] = int(value)
        else:
            choices[name] = value
    return ViewState(**choices)


def _defaults() -> dict[str, Any]:
    return {field.name: field.default for field in fields(ViewState)}
