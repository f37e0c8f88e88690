"""The encoder repositories that the suite loads, each with an image and the features expected for it."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from pivot_hub.encoder.repository import read_encoder, write_repository


def write_one(original: Path, target: Path) -> None:
    """Write an encoder as a repository, and beside it a file with an image and the encoder's features of it.

    Args:
        original: Folder of the encoder in the form of its original.
        target: Folder that the repository is written to. The file beside it, `<target>.safetensors`, holds `image`
            (50, 70, 3) in uint8 and `image_features` (1, tokens, width).
    """
    encoder, _ = read_encoder(original)
    write_repository(target, encoder)
    image = torch.randint(0, 256, (50, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = encoder.forward_features([Image.fromarray(image.numpy())]).last_hidden_state
    save_file({"image": image, "image_features": features.contiguous()}, target.with_suffix(".safetensors"))
