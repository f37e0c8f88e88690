"""The repositories the suite is run on, each with a picture and what it must become."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from pivot_hub.encoder.repository import read_encoder, write_repository


def write_one(original: Path, target: Path) -> None:
    """Write an encoder as a repository, and beside it a picture (50, 70, 3) with its features."""
    encoder, _ = read_encoder(original)
    write_repository(target, encoder)
    picture = torch.randint(0, 256, (50, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = encoder.forward_features([Image.fromarray(picture.numpy())]).last_hidden_state
    save_file({"picture": picture, "picture_features": features.contiguous()}, target.with_suffix(".safetensors"))
