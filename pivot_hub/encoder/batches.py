"""Batches of images: decoded and prepared in worker processes, and encoded by one model.

`Decoder` and `RowEncoder` are the two halves of the computation, which any engine calls: the first needs no model, the
second holds it. `Processes` is the engine of one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from pivot_hub.encoder.configuration_pivot import check_feature_layer
from pivot_hub.encoder.feature_table import FeatureTable, StoredRow
from pivot_hub.encoder.image_shapes import token_shape
from pivot_hub.errors import CheckpointError, DataError

NUMBERS = 32_000_000  # of the pixels of images of their own shapes in a forward pass
# Inputs of the encoder's forward by their names: pixel_values, and for a tower of native resolution its shapes.
Inputs = dict[str, np.ndarray]


class Loader(Protocol):
    """Reader of images by whatever names their place, which is copied to worker processes."""

    def load(self, place: Any, known: str | None) -> tuple[str, Image.Image | DataError | None]:
        """Return the hash of an image's file, and the image as `SourceImage.load` does."""


@dataclass(frozen=True)
class Item:
    """An image to be prepared.

    Args:
        block: Number of its block in this run.
        name: Name of the image.
        place: What the loader needs to read it.
        known: Hash of the image's file whose features are there already.
    """

    block: int
    name: str
    place: Any
    known: str | None


@dataclass(frozen=True)
class Prepared:
    """An image that was read.

    Args:
        block: Number of its block in this run.
        name: Name of the image.
        sha256: Hash of its file; empty if it cannot be read.
        inputs: Inputs (1, ...) of the encoder; None if the hash is the known one, or there is a problem.
        problem: Why the image cannot be used.
        numbers: Number of values in its pixels, 0 without inputs.
    """

    block: int
    name: str
    sha256: str
    inputs: Inputs | None = None
    problem: str | None = None
    numbers: int = 0


@dataclass(frozen=True)
class Preparer:
    """Prepares images for an encoder, without the encoder.

    Args:
        processor: Image processor of the encoder.
        names: Names of the inputs that the encoder takes, see `input_names`.
    """

    processor: Any
    names: Sequence[str]

    def __call__(self, name: str, image: Image.Image) -> Inputs:
        """Return the inputs (1, ...) of an RGB image.

        Raises:
            DataError: The image processor refuses its shape.
        """
        try:
            prepared = self.processor(images=[image], return_tensors="pt")
        except ValueError as error:
            if len(self.names) == 1:
                raise
            # Processors of towers of native resolution refuse extreme shapes.
            raise DataError(
                f"{name}: its image processor does not take {image.width} x {image.height} px ({error})"
            ) from None
        # Arrays, because every tensor would take a file descriptor, and where those run out workers would wait
        # indefinitely.
        return {key: np.asarray(prepared[key]) for key in self.names}


class BatchEncoder:
    """Holds an encoder, and computes the features of batches.

    Args:
        model: The encoder, on its device in its type.
        tokens: Whether to return all patch tokens of an image instead of their mean.
        further_layers: Numbers of hidden states to return besides the model's own feature layer.

    Raises:
        CheckpointError: The encoder has no such hidden state.
    """

    def __init__(self, model: Any, tokens: bool = False, further_layers: Sequence[int] = ()) -> None:
        self.model, self.tokens, self.further_layers = model, tokens, tuple(further_layers)
        for layer in self.further_layers:
            try:
                check_feature_layer(layer, model.config.num_hidden_layers)
            except ValueError as error:
                raise CheckpointError(f"{error}") from error

    @property
    def layers(self) -> list[int | str]:
        return [self.model.config.pivot["feature_layer"], *self.further_layers]

    def shapes(self) -> dict[str, Sequence[int | str]]:
        """Return the shape of an image's features in each layer, by the ending of its columns' names.

        The ending is empty for one layer. Of several, it is the number of the hidden state, counted from the input of
        the first block, or the layer's name.
        """
        own = token_shape(self.model.config) if self.tokens else [self.model.config.hidden_size]
        if not self.further_layers:
            return {"": own}
        depth = self.model.config.num_hidden_layers
        numbers = [layer if depth is None or isinstance(layer, str) else layer % (depth + 1) for layer in self.layers]
        if len(set(numbers)) < len(numbers):
            raise DataError(f"feature layers {', '.join(map(str, self.layers))}: two are the same; give each once.")
        return {f"_{number}": own for number in numbers}

    @torch.inference_mode()
    def __call__(self, inputs: Inputs) -> list[list[np.ndarray]]:
        """Encode a batch of images.

        Args:
            inputs: Inputs of the images, joined by `join_inputs`.

        Returns:
            For each image, the float32 features of each layer: (D), (H*W, D), or (H, W, D) for a tower of native
            resolution.
        """
        model = self.model
        tensors = {key: torch.from_numpy(array).to(model.device) for key, array in inputs.items()}
        tensors["pixel_values"] = tensors["pixel_values"].to(model.dtype)
        outputs = model(**tensors, **({"output_hidden_states": True} if self.further_layers else {}))
        chosen = [outputs.last_hidden_state if self.tokens else outputs.pooler_output]
        for layer in self.further_layers:
            if model.config.image_size is None:
                shapes = {key: tensor for key, tensor in tensors.items() if key != "pixel_values"}
                maps = tuple(model.maps(outputs, layer, shapes))
                chosen.append(maps if self.tokens else [one.mean(dim=(0, 1)) for one in maps])
            else:
                tokens = model._patch_tokens(outputs.hidden_states[layer])
                chosen.append(tokens if self.tokens else tokens.mean(dim=1))
        moved = [list(_on_cpu(c) if torch.is_tensor(c) else map(_on_cpu, c)) for c in chosen]
        return [list(layers) for layers in zip(*moved, strict=True)]


def _on_cpu(features: torch.Tensor) -> np.ndarray:
    return features.float().cpu().numpy()


class Decoder(Dataset[Prepared]):
    """Reads and prepares images, indexed by items.

    Args:
        loader: Reader of the images.
        prepare: Preparer of the images.
    """

    def __init__(self, loader: Loader, prepare: Preparer) -> None:
        self.loader, self.prepare = loader, prepare

    def __getitem__(self, item: Any) -> Prepared:
        sha256, image = self.loader.load(item.place, item.known)
        try:
            if isinstance(image, DataError):
                raise image
            inputs = None if image is None else self.prepare(item.name, image)
        except DataError as error:
            return Prepared(item.block, item.name, sha256, problem=str(error))
        return Prepared(item.block, item.name, sha256, inputs, numbers=inputs["pixel_values"].size if inputs else 0)

    def at_once(self, batch: int) -> int:
        """Return the number of images that are decoded in one piece of work: those of their own shapes may be large."""
        return batch if len(self.prepare.names) == 1 else 1


@dataclass(frozen=True)
class RowEncoder:
    """Computes the rows of batches.

    Args:
        encoder: Holder of the encoder.
        table: Columns of the features.
    """

    encoder: BatchEncoder
    table: FeatureTable

    def __call__(self, names: Sequence[str], inputs: Sequence[Inputs]) -> list[StoredRow]:
        """Encode images.

        Args:
            names: Their names.
            inputs: Inputs (1, ...) of each.

        Raises:
            NotFiniteError: Features of an image are not finite.
        """
        features = self.encoder(join_inputs(inputs)) if inputs else []
        return [self.table.row(name, layers) for name, layers in zip(names, features, strict=True)]


# An image that was read, and its row; None for one without inputs.
Encoded = tuple[Prepared, StoredRow | None]
# Encodes images in batches of a number of images, each of one block, in order. Items are taken when there is room for
# them, so that memory does not grow with their number.
Engine = Callable[[Iterator[Item], Decoder, int], Iterator[list[Encoded]]]


@dataclass(frozen=True)
class Processes:
    """The engine of one process, which holds the encoder, with worker processes that decode.

    Args:
        rows: Holder of the encoder.
        workers: Number of worker processes; by default one for each core, 0 for none.
    """

    rows: RowEncoder
    workers: int | None

    def __call__(self, items: Iterator[Item], decoder: Decoder, batch: int) -> Iterator[list[Encoded]]:
        """Encode images, see `Engine`.

        Raises:
            DataError: The worker processes cannot be started, or one of them ended.
        """
        for images in _prepared_batches(items, decoder, batch, self.workers):
            inputs = [image.inputs for image in images if image.inputs is not None]
            yield encoded(images, self.rows([image.name for image in images if image.numbers], inputs))


def encoded(images: Sequence[Prepared], rows: Sequence[StoredRow]) -> list[Encoded]:
    """Join images with the rows of those that have inputs."""
    remaining = iter(rows)
    return [(image, next(remaining) if image.numbers else None) for image in images]


def _prepared_batches(
    items: Iterator[Item], decoder: Decoder, batch: int, workers: int | None
) -> Iterator[list[Prepared]]:
    at_once = decoder.at_once(batch)
    count = min(os.cpu_count() or 1, 16) if workers is None else workers
    lists = item_lists(items, at_once)
    first = list(islice(lists, count * batch // at_once))
    count = min(count, sum(map(len, first)) // batch)
    loading: Iterable[list[Prepared]] = DataLoader(
        decoder,
        batch_sampler=cast(Any, _Lists(chain(first, lists))),
        num_workers=count,
        collate_fn=list,
    )
    try:
        yield from loading if at_once == batch else grouped((image for (image,) in loading), batch)
    except (OSError, RuntimeError) as error:
        if count == 0 and not isinstance(error, OSError):
            raise
        reason = str(error).strip().splitlines()[-1]
        raise DataError(
            f"the images cannot be decoded in {count} processes ({reason}); give fewer --workers, or raise the limits "
            "of open files (`ulimit -n`) and memory."
        ) from error


class _Lists:
    """Lists of items in the place of a batch sampler, which DataLoader iterates over once."""

    def __init__(self, lists: Iterator[list[Item]]) -> None:
        self.lists = lists

    def __iter__(self) -> Iterator[list[Item]]:
        return self.lists


def item_lists(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Group items to lists of one size; the last one of each block may be shorter."""
    group: list[Item] = []
    for item in items:
        if group and item.block != group[0].block:
            yield group
            group = []
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def grouped(images: Iterable[Prepared], batch: int) -> Iterator[list[Prepared]]:
    """Group images to batches of a block that hold NUMBERS numbers at most, unless one image holds more."""
    group: list[Prepared] = []
    numbers = 0
    for image in images:
        full = len(group) == batch or (numbers > 0 and numbers + image.numbers > NUMBERS)
        if group and (full or image.block != group[0].block):
            yield group
            group, numbers = [], 0
        group.append(image)
        numbers += image.numbers
    if group:
        yield group


def join_inputs(inputs: Sequence[Inputs]) -> Inputs:
    """Join the inputs of single images to those of a batch."""
    return {key: _join([one[key] for one in inputs]) for key in inputs[0]}


def _join(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Join inputs of single images along their first axis, padded with zeros to the largest along the others.

    Image processors join images in the same way: they pad images that a tower tells apart by their shapes, and write
    the patches of one image after those of another.
    """
    largest = [max(sides) for sides in zip(*(a.shape[1:] for a in arrays), strict=True)]
    padded = [
        np.pad(a, [(0, 0), *((0, most - side) for side, most in zip(a.shape[1:], largest, strict=True))])
        if list(a.shape[1:]) != largest
        else a
        for a in arrays
    ]
    return np.concatenate(padded)
