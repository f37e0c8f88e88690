"""An encoder as a backbone of VisBench, whose probes range from classification to depth, normals and edges."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from pivot_hub.config.encoder_names import resolve_encoder
from pivot_hub.encoder.image_shapes import require_squares
from pivot_hub.encoder.repository import encoder_metadata, read_encoder


def visbench_backbone(name: str, device: str | None = None, **options: Any) -> Any:
    """Load an encoder as a backbone that `visbench.run` takes.

    Its layers are the blocks up to the feature layer, so VisBench's last layer is what enters an MLLM. There is no CLS
    token: the pooled vector is the mean of the patch tokens, as `PivotVisionModel` pools.

    Args:
        name: Folder, Hub name or short name of an encoder of square images.
        device: Device, by default the one that VisBench chooses.
        **options: Options of `read_encoder`, such as dtype and feature_layer.

    Returns:
        A `visbench.backbones.CustomBackbone`.

    Raises:
        CheckpointError: The encoder cannot be loaded, or is a tower of native resolution.

    Example:
        >>> visbench.run(visbench_backbone("shapes-base"), "retrieval", dataset)
    """
    from visbench.backbones import CustomBackbone

    name = resolve_encoder(name, revision=options.get("revision"))
    encoder, processor = read_encoder(name, **options)
    config: Any = encoder.config
    require_squares(config, name, "a backbone of VisBench", "use PivotVisionModel.forward_features on its images")
    layer, layers = config.pivot["feature_layer"], config.num_hidden_layers
    last = layers if isinstance(layer, str) else layer % (layers + 1)
    prefix = config.pivot["prefix_tokens"]

    def prepare(image: Image.Image) -> torch.Tensor:
        pixels = processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"]
        return torch.as_tensor(pixels)[0]

    def encode(module: Any, pixels: torch.Tensor, wanted: list[int]) -> list[tuple[Any, None, tuple[int, int]]]:
        outputs = module(pixels.to(module.dtype), output_hidden_states=True)
        grid = (pixels.shape[-2] // config.patch_size, pixels.shape[-1] // config.patch_size)
        tokens = [
            outputs.last_hidden_state if index + 1 == last else outputs.hidden_states[index + 1][:, prefix:]
            for index in wanted
        ]
        return [(each.float(), None, grid) for each in tokens]

    metadata = encoder_metadata(name)
    return CustomBackbone(
        encoder,
        prepare,
        name=metadata["encoder"],
        embed_dim=config.hidden_size,
        patch_size=config.patch_size,
        weights_id=f"{metadata['encoder_sha256']}/{layer}",
        image_size=config.image_size,
        device=device,
        layer_feature_fn=encode,
        num_layers=last,
    )
