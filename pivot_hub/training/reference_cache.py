"""Log-probabilities under the reference model, computed once and kept on disk by what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaProcessor

from pivot_hub.errors import DataError
from pivot_hub.training.tree_layout import Logps, image_key


class ReferenceCache:
    """A folder of log-probabilities of answers, for one reference model, processor and settings.

    A row is found by its content, so other rows, another order or another epoch never mix; another model, processor
    or setting has another folder. Files are only added, each whole: several processes and runs may share a folder.

    Args:
        folder: of all caches.
        facts: everything but the rows that the values depend on.
    """

    def __init__(self, folder: str | Path, metadata: dict[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
        self.folder = Path(folder) / key[:32]
        self.known: dict[str, Logps] = {}

    def read(self) -> None:
        """Learn what lies on disk."""
        for file in sorted(self.folder.glob("*.npz")):
            with np.load(file) as part:
                pairs = zip(part["chosen"].tolist(), part["rejected"].tolist(), strict=True)
                self.known |= dict(zip(part["rows"].tolist(), pairs, strict=True))

    def write(self, rows: list[str], chosen: Iterable[float], rejected: Iterable[float]) -> None:
        """Keep the values of rows."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = uuid.uuid4().hex
        beside = self.folder / f".{name}.{os.getpid()}"
        try:
            with beside.open("wb") as file:
                np.savez(file, rows=np.array(rows), chosen=np.array(chosen), rejected=np.array(rejected))
            beside.replace(self.folder / f"{name}.npz")
        finally:
            beside.unlink(missing_ok=True)

    def find(self, example: dict[str, Any]) -> Logps:
        """Values of a row.

        Raises:
            DataError: it was not among the trainer's data sets.
        """
        key = row_key(example)
        if key not in self.known:
            raise DataError(
                "a row has no cached reference log-probabilities: give every data set to the trainer's constructor, or "
                "set cache_reference=False."
            )
        return self.known[key]


def row_key(example: dict[str, Any]) -> str:
    """Hash of a preference row: its texts and the pixels of its images."""
    images = [example["image"]] if "image" in example else example.get("images") or []
    texts = {side: example[side] for side in ("prompt", "chosen", "rejected")}
    metadata = {"texts": texts, "images": [image_key(i) for i in images]}
    return hashlib.sha256(json.dumps(metadata, sort_keys=True, default=_without_pixels).encode()).hexdigest()


def model_hash(model: torch.nn.Module) -> str:
    """SHA-256 over the weights and the config of a model."""
    made = hashlib.sha256()
    config: Any = model.config
    made.update(config.to_json_string(use_diff=False).encode())
    for name, tensor in sorted(model.state_dict().items()):
        made.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        made.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return made.hexdigest()


def processor_hash(processor: LlavaProcessor) -> str:
    """SHA-256 over how a processor prepares images and text."""
    image_processor: Any = processor.image_processor
    parts = [
        image_processor.to_json_string(),
        tokenizer_text(processor.tokenizer),
        str(processor.chat_template),
        f"{processor.patch_size} {processor.vision_feature_select_strategy} {processor.num_additional_image_tokens}",
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def tokenizer_text(tokenizer: Any) -> str:
    """All that decides how text becomes tokens."""
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    # These two are how the last call was padded and cut.
    return json.dumps(vocabulary | {"padding": None, "truncation": None}, sort_keys=True)


def _without_pixels(thing: Any) -> str:
    """An image inside a message: its pixels are hashed with the row's images."""
    return type(thing).__name__
