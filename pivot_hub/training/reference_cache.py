"""Log-probabilities under the reference model, computed once and cached on disk by everything they depend on."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import parse_flag_from_env
from transformers import ProcessorMixin, TrainingArguments

from pivot_hub.errors import DataError
from pivot_hub.files import write_whole
from pivot_hub.training.pair_collator import Logps, image_key, images_of, template_options

logger = logging.getLogger(__name__)


class ReferenceCache:
    """A folder of log-probabilities of answers, for one reference model, one processor and one choice of settings.

    A row is looked up by its content, so other rows, another order or another epoch never mix. Another model,
    processor or setting has another folder. Files are only added, each in one piece, so several processes and runs
    may share a folder. A file is named by the hash of its content; one that does not match it is deleted, and its
    values are computed again.

    Args:
        folder: Folder of all caches.
        metadata: Everything except the rows that the values depend on; it is hashed.

    Attributes:
        known: The values that were read, by the key of their row.
    """

    def __init__(self, folder: str | Path, metadata: dict[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
        self.folder = Path(folder) / key[:32]
        self.known: dict[str, Logps] = {}

    def read(self) -> None:
        """Read all values that are on disk and whole. Files of earlier versions, which have no hash, are left out."""
        for file in sorted(self.folder.glob(f"{'[0-9a-f]' * 64}.npz")):
            try:
                content = file.read_bytes()
            except FileNotFoundError:  # another process found it damaged
                continue
            if hashlib.sha256(content).hexdigest() != file.stem:
                logger.warning("%s is damaged; it is deleted, and its values are computed again.", file)
                file.unlink(missing_ok=True)
                continue
            with np.load(io.BytesIO(content)) as part:
                pairs = zip(part["chosen"].tolist(), part["rejected"].tolist(), strict=True)
                self.known |= dict(zip(part["rows"].tolist(), pairs, strict=True))

    def write(self, rows: list[str], chosen: Iterable[float], rejected: Iterable[float]) -> None:
        """Write the values of rows to disk.

        Args:
            rows: Keys of the rows.
            chosen: Log-probability of the chosen answer of each row.
            rejected: Log-probability of the rejected answer of each row.
        """
        content = io.BytesIO()
        np.savez(content, rows=np.array(rows), chosen=np.array(chosen), rejected=np.array(rejected))
        write_whole(self.folder / f"{hashlib.sha256(content.getvalue()).hexdigest()}.npz", content.getvalue())

    def find(self, example: dict[str, Any]) -> Logps:
        """Return the log-probabilities of a row's chosen and rejected answers.

        Raises:
            DataError: The row was not in any of the trainer's datasets.
        """
        key = row_key(example)
        if key not in self.known:
            raise DataError(
                "a row has no cached reference log-probabilities: give every dataset to the trainer's constructor, or "
                "set cache_reference=False."
            )
        return self.known[key]


def row_key(example: dict[str, Any]) -> str:
    """Return the hash of a preference row: of its texts and the pixels of its images."""
    texts = {side: example[side] for side in ("prompt", "chosen", "rejected")}
    metadata: dict[str, Any] = {"texts": texts, "images": [image_key(i) for i in images_of(example)]}
    if options := template_options(example):
        metadata["chat_template_kwargs"] = options
    return hashlib.sha256(json.dumps(metadata, sort_keys=True, default=_without_pixels).encode()).hexdigest()


def model_hash(model: torch.nn.Module) -> str:
    """Return the SHA-256 of a model's weights and config."""
    digest = hashlib.sha256()
    config: Any = model.config
    digest.update(config.to_json_string(use_diff=False).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def rounding_of(args: TrainingArguments) -> str:
    """Return what decides how the model's forward pass rounds: the device, and in half precision the sharding engine.

    FSDP and DeepSpeed hold hidden states in half precision where autocast alone holds them in float32.
    """
    half = args.bf16 or args.fp16
    if half and (args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")):
        engine = "FSDP"
    elif half and (args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")):
        engine = "DEEPSPEED"
    else:
        engine = "any"
    return f"{engine} {args.device.type}"


def processor_hash(processor: ProcessorMixin) -> str:
    """Return the SHA-256 of how a processor prepares images and text."""
    known: Any = processor
    parts = [
        json.dumps(processor.to_dict(), sort_keys=True, default=str),
        known.image_processor.to_json_string(),
        tokenizer_text(known.tokenizer),
        str(processor.chat_template),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def tokenizer_text(tokenizer: Any) -> str:
    """Return everything that decides how text becomes tokens, as JSON."""
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    # These two hold the padding and truncation of the last call, which are not the tokenizer's own.
    return json.dumps(vocabulary | {"padding": None, "truncation": None}, sort_keys=True)


def _without_pixels(value: Any) -> str:
    """Stand in for an image inside a message, whose pixels are hashed with the row's images."""
    return type(value).__name__
