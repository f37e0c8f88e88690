"""A look: everything one visitor of the Space chose, and the link that restores it."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any
from urllib.parse import urlencode

from PIL import Image

from pivot_hub.data.image import read_upload
from pivot_hub.data.synthetic import KINDS, Kind
from pivot_hub.demo.model_bundle import BundleNames
from pivot_hub.errors import DataError
from pivot_hub.explain.gradcam import EXPLAINS, METHODS, Explain, Method
from pivot_hub.explain.heatmaps import COLOURS

CLOSER = ("swipe", "patches", "colours", "words")
CHOICES: dict[str, tuple[str, ...]] = {
    "ask": KINDS,
    "explain": EXPLAINS,
    "method": METHODS,
    "colours": COLOURS,
    "closer": CLOSER,
}
KINDS_OF_VALUE = {int: "a whole number", str: "a text"}
LARGEST = 999_999_999
LINK_BYTES = 4000  # of a picture inside a link: servers and proxies take addresses of about 8 KB


@dataclass(frozen=True)
class ViewState:
    """The choices of one visitor; a link names the scene, and of the others those that are not the defaults.

    Args:
        scene: of the built-in world, where there is no picture.
        ask: kind of question about the scene.
        question: what is asked; empty for the scene's own.
        right: answer, and wrong: another; empty for the scene's own, or unknown.
        explain: answer, sft or dpo.
        method: gradcam or gradient.
        layer: that Grad-CAM looks at, 0 for the one the MLLM sees.
        colours: of the maps.
        opacity: of the maps over the picture, percent.
        closer: what is shown below the maps.
        row: of the patch that is compared with all others, from 0 at the top; column: from the left.
        first: name of an MLLM, second and parent: empty for the pair that the app was started with.
        picture: the visitor's own, small, as base64; empty for a scene.
    """

    scene: int = 27
    ask: Kind = "colour"
    question: str = ""
    right: str = ""
    wrong: str = ""
    explain: Explain = "answer"
    method: Method = "gradcam"
    layer: int = 0
    colours: str = COLOURS[0]
    opacity: int = 85
    closer: str = CLOSER[0]
    row: int = 3
    column: int = 3
    first: str = ""
    second: str = ""
    parent: str = ""
    picture: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot be chosen: looks come from links and programs, not from the page alone.

        Raises:
            DataError: a value is none of those allowed, or of another kind; the message names it.
        """
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise DataError(f"{name} is {str(value)[:40]!r}: it is one of {', '.join(allowed)}.")
        for name, start in ((f.name, f.default) for f in fields(self)):
            value = getattr(self, name)
            if type(value) is not type(start):
                raise DataError(f"{name} is {str(value)[:40]!r}: it has to be {KINDS_OF_VALUE[type(start)]}.")
            if isinstance(value, int) and not 0 <= value <= LARGEST:
                raise DataError(f"{name} is {value}: it lies between 0 and {LARGEST:,}.")

    @property
    def names(self) -> BundleNames:
        """Of the pair."""
        return BundleNames(self.first, self.second, self.parent)

    def query(self) -> str:
        """What stands behind the `?` of the link."""
        start = ViewState()
        chosen = {f.name: getattr(self, f.name) for f in fields(self)}
        return urlencode({k: v for k, v in chosen.items() if k in ("scene", "ask") or v != getattr(start, k)})

    def with_picture(self, image: Image.Image) -> ViewState:
        """Put a picture into the link, as large as the link can carry."""
        for side in (160, 128, 96, 64, 48):
            small = image.copy()
            small.thumbnail((side, side))
            file = io.BytesIO()
            small.save(file, "WEBP", quality=70)
            if len(file.getvalue()) <= LINK_BYTES or side == 48:
                break
        return replace(self, picture=base64.urlsafe_b64encode(file.getvalue()).decode())

    def image(self) -> Image.Image | None:
        """The picture inside the link.

        Raises:
            DataError: it is none.
        """
        if not self.picture:
            return None
        try:
            content = base64.urlsafe_b64decode(self.picture)
        except (binascii.Error, ValueError):
            raise DataError("The picture inside this link is damaged; copy the whole link again.") from None
        return read_upload(io.BytesIO(content))


def read_view_state(query: Mapping[str, str]) -> ViewState:
    """Read a look from the parameters of a link; parameters of others are left alone.

    Raises:
        DataError: a value is none that can be chosen; the message names it.
    """
    chosen: dict[str, Any] = {}
    for name, start in ((f.name, f.default) for f in fields(ViewState)):
        if name in query:
            value = query[name]
            if isinstance(start, int) and not (value.isdecimal() and len(value) < 10):
                raise DataError(f"{name} is {value[:40]!r}, which is no whole number.")
            chosen[name] = int(value) if isinstance(start, int) else value
    return ViewState(**chosen)
