"""Encoders of square images of one size, and towers of native resolution: what code that uses encoders must tell apart.

A tower of native resolution takes each image in its own shape, and returns one map (H, W, D) for each. Its
`config.image_size` is None.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from pivot_hub.encoder.configuration_pivot import PivotVisionConfig
from pivot_hub.errors import CheckpointError

# Shape of an image's patch tokens whose numbers of rows and columns differ from image to image, before the channels.
OWN_GRID = ("height", "width")


def token_shape(config: Any) -> list[int | str]:
    """Return the shape of an image's patch tokens: [H*W, D], or [*OWN_GRID, D] for a tower of native resolution."""
    if config.image_size is None:
        return [*OWN_GRID, config.hidden_size]
    return [(config.image_size // config.patch_size) ** 2, config.hidden_size]


def require_squares(config: Any, name: object, what: str, remedy: str) -> None:
    """Refuse a tower of native resolution where square images of one size are needed.

    Args:
        config: PivotVisionConfig or native vision config.
        name: Name of the encoder or model, for the message.
        what: What needs square images, as the subject of a sentence.
        remedy: What to do instead, without a full stop.

    Raises:
        CheckpointError: The config is of a tower of native resolution.
    """
    pivot_config = config if isinstance(config, PivotVisionConfig) else PivotVisionConfig(config)
    if pivot_config.image_size is None:
        model_type = pivot_config.backbone_config.model_type
        raise CheckpointError(
            f"{name}: {what} needs an encoder of square images of one size, and {model_type} is a tower of native "
            f"resolution; {remedy}."
        )


def refuse_native(name: str | Path, what: str, remedy: str, revision: str | None = None) -> None:
    """Refuse a tower of native resolution by its config, before weights are loaded, see `require_squares`.

    A repository without a readable config is passed over, because loading it says what is wrong.

    Args:
        name: Folder or Hub name of the encoder.
        what: What needs square images.
        remedy: What to do instead.
        revision: Revision of the Hub repository.
    """
    try:
        config = PivotVisionConfig.from_pretrained(str(name), revision=revision or "main")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, StrictDataclassError):
        return
    require_squares(config, name, what, remedy)


def parse_layer(text: str | None) -> int | str | None:
    """Convert a feature layer from the command line: the number of a hidden state, a name, or None."""
    return int(text) if text is not None and text.removeprefix("-").isdecimal() else text
