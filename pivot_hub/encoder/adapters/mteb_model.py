"""An encoder as a model of MTEB, for its tasks of images alone: classification, clustering, retrieval, similarity."""

from __future__ import annotations

from typing import Any

import torch

from pivot_hub.config.encoder_names import resolve_encoder
from pivot_hub.encoder.device import compute_device
from pivot_hub.encoder.repository import encoder_metadata, read_encoder
from pivot_hub.errors import DataError


def mteb_model(name: str, **options: Any) -> Any:
    """Load an encoder as a model that `mteb.evaluate` takes.

    An image's embedding is the mean of its patch tokens at the feature layer.

    Args:
        name: Folder, Hub name or short name of the encoder.
        **options: Options of `read_encoder`, such as dtype and feature_layer.

    Returns:
        A model of MTEB's `EncoderProtocol`; its texts raise an error, because an encoder has no text tower.

    Raises:
        CheckpointError: The encoder cannot be loaded.

    Example:
        >>> mteb.evaluate(mteb_model("shapes-base"), mteb.get_tasks(tasks=["CIFAR10"]))
    """
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction

    name = resolve_encoder(name, revision=options.get("revision"))
    encoder, _ = read_encoder(name, **options)
    module: Any = encoder
    module.to(compute_device())
    metadata = encoder_metadata(name)

    class PivotEncoder(AbsEncoder):
        """Encodes the column `image` of MTEB's batches."""

        mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": metadata["encoder"] if "/" in metadata["encoder"] else f"local/{metadata['encoder']}",
                "revision": metadata["encoder_sha256"],
                "n_parameters": sum(parameter.numel() for parameter in module.parameters()),
                "embed_dim": encoder.config.hidden_size,
                "modalities": ["image"],
                "framework": ["PyTorch", "Transformers"],
                "similarity_fn_name": ScoringFunction.COSINE,
                "open_weights": True,
                "use_instructions": False,
            }
        )

        def __init__(self) -> None:
            self.model = encoder

        @torch.no_grad()
        def encode(self, inputs: Any, **kwargs: Any) -> Any:
            """Return embeddings (N, D) of the images of a DataLoader."""
            embeddings = []
            for batch in inputs:
                if "image" not in batch or "text" in batch:
                    raise DataError("a vision encoder has no text tower; give MTEB tasks of images alone.")
                embeddings.append(encoder.forward_features(batch["image"]).pooler_output.float().cpu())
            return torch.cat(embeddings)

    return PivotEncoder()
