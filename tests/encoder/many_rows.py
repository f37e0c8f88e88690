"""Encodes a list of images that are not read, by a model that is not run, and prints the peak of memory in MB."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pivot_hub.encoder import encode
from pivot_hub.encoder.batches import Decoder, Encoded, Item, Prepared, RowEncoder, item_lists
from pivot_hub.encoder.feature_table import StoredRow


class Simulated:
    """An engine that gives every image the same features."""

    def __init__(self, rows: RowEncoder, workers: int | None) -> None:
        (width,) = rows.table.shapes[""]
        self.features = np.ones(int(width), np.float32)

    def __call__(self, items: Iterator[Item], decoder: Decoder, batch: int) -> Iterator[list[Encoded]]:
        for one in item_lists(items, batch):
            yield [(Prepared(i.block, i.name, "0" * 64, numbers=1), StoredRow([self.features.copy()])) for i in one]


if __name__ == "__main__":
    encoder, listing, out = map(Path, sys.argv[1:])
    simulated: Any = Simulated
    encode.Processes = simulated  # type: ignore[attr-defined]
    report = encode.encode_source(encoder, listing, out, batch=256)
    print(report["images"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
