"""Compare the vision towers of two models: whether post-training moved it, where, and how far."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table

from pivot_hub.encoder.encoding_run import Progress
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.any_tower import AnyTower, dtype_name, read_tower, same_model
from pivot_hub.mllm.similarity import FeatureSimilarity, check_images, compare_features
from pivot_hub.provenance import versions

EMBEDDINGS = "embeddings"
# Parts that only some copies of an architecture have, and that no MLLM uses: heads that pool all patches to one vector.
POOLING = ("head.", "pooler.")
PRECISION = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # from the coarsest to the finest
NUMBER = re.compile(r"^(?P<series>.*?)\.(?P<number>\d+)\.")
# Mllama registers its norm after the blocks before them.
AFTER_BLOCKS = re.compile(r"^(layernorm_post|post_layernorm)\.")


@dataclass(frozen=True)
class BlockChange:
    """Change of one part of a tower.

    Args:
        name: `embeddings`, `block 0` and so on, or the module's own name for what follows the blocks.
        number: Number of the block; None for other parts.
        relative_change: ||a - b|| / ||a|| over all weights of the part; 1 where a is zero and b is not.
        tensors: The same for each tensor by its name; 0 where it is equal.
    """

    name: str
    number: int | None
    relative_change: float
    tensors: dict[str, float]

    @property
    def changed(self) -> int:
        """Number of tensors that differ."""
        return sum(change > 0 for change in self.tensors.values())

    @property
    def largest(self) -> str | None:
        """Name of the tensor with the largest relative change; None if none differs."""
        return max(self.tensors, key=self.tensors.__getitem__) if self.changed else None

    def to_dict(self) -> dict[str, Any]:
        largest = self.largest
        return {
            "name": self.name,
            "number": self.number,
            "relative_change": self.relative_change,
            "changed_tensors": self.changed,
            "largest": largest,
            "largest_change": 0.0 if largest is None else self.tensors[largest],
            "tensors": self.tensors,
        }


@dataclass(frozen=True)
class TowerDiff:
    """Difference of two vision towers of one architecture.

    Args:
        a: What the first model is: name, revision, kind, model_type, dtype, feature_layer, tensors_sha256.
        b: The same for the second one.
        dtype: Type in which the weights were compared, the coarser one of those that they are stored in.
        relative_change: ||a - b|| / ||a|| over all weights.
        parts: Changes of embeddings, blocks, and what follows them, in the order of the tower.
        above: Numbers of the blocks above the feature layer, which training of an MLLM does not reach.
        not_compared: Names of tensors of a pooling head that only one of the towers has.
        features: Similarity of the features; None if no images were given.
    """

    a: dict[str, Any]
    b: dict[str, Any]
    dtype: str
    relative_change: float
    parts: list[BlockChange]
    above: list[int]
    not_compared: list[str]
    features: FeatureSimilarity | None = None

    @property
    def frozen(self) -> bool:
        """Whether all tensors are equal."""
        return not any(part.changed for part in self.parts)

    @property
    def blocks(self) -> list[BlockChange]:
        """The numbered blocks, without embeddings and what follows the blocks."""
        return [part for part in self.parts if part.number is not None]

    @property
    def changed_blocks(self) -> int:
        """Number of blocks that differ."""
        return sum(block.changed > 0 for block in self.blocks)

    def summary(self) -> str:
        """Say in one line whether the tower moved, and where."""
        if self.frozen:
            return f"the vision tower is frozen: {self._equal_blocks()}{self._stored_types()}"
        others = [part.name for part in self.parts if part.number is None and part.changed]
        if not self.changed_blocks:
            return (
                f"the vision tower moved outside of its blocks: {self._equal_blocks()}, but {_joined(others)} "
                f"{'differs' if len(others) == 1 else 'differ'} (relative change {self.relative_change:.1e})"
            )
        moved = _joined([f"{self.changed_blocks} of {len(self.blocks)} blocks", *others])
        verb = "differs" if self.changed_blocks == 1 and not others else "differ"
        text = f"the vision tower moved: {moved} {verb}; relative change {self.relative_change:.1e}"
        if self.untrained_above:
            numbers = ", ".join(map(str, self.above))
            text += (
                f"; block {numbers} is equal: it is above the feature layer, where blocks get no gradient"
                if len(self.above) == 1
                else f"; blocks {numbers} are equal: they are above the feature layer, where blocks get no gradient"
            )
        return text

    @property
    def untrained_above(self) -> bool:
        """Whether blocks above the feature layer are equal while some below it differ."""
        changed = {block.number for block in self.blocks if block.changed}
        return bool(self.above) and bool(changed) and not changed & set(self.above)

    def method(self) -> str:
        """Describe how the numbers were computed."""
        types = (self.a["dtype"], self.b["dtype"])
        of_types = "" if types[0] == types[1] else f", the coarser of the stored types ({types[0]} and {types[1]})"
        text = f"Weights are compared in {self.dtype}{of_types}; the relative change is ||a - b|| / ||a||, in float64."
        if self.not_compared:
            count = len(self.not_compared)
            text += f" Not compared: {count} tensors of a pooling head or of further blocks that only one of them has."
        return text if self.features is None else f"{text} {self.features.method()}"

    def table(self) -> Table:
        title = f"Vision tower of {self.b['name']} compared with {self.a['name']}"
        table = Table(box=SIMPLE, title=title, title_justify="left")
        for column in ("part", "tensors that differ", "relative change", "largest change", "tensor"):
            table.add_column(column, no_wrap=True)
        for part in self.parts:
            cells = ["equal", "", ""]
            if part.largest is not None:
                cells = [f"{part.relative_change:.1e}", f"{part.tensors[part.largest]:.1e}", part.largest]
            table.add_row(part.name, f"{part.changed} of {len(part.tensors)}", *cells)
        return table

    def to_dict(self) -> dict[str, Any]:
        return {
            "a": self.a,
            "b": self.b,
            "frozen": self.frozen,
            "summary": self.summary(),
            "dtype": self.dtype,
            "relative_change": self.relative_change,
            "changed_blocks": self.changed_blocks,
            "blocks": len(self.blocks),
            "above_feature_layer": self.above,
            "not_compared": self.not_compared,
            "parts": [part.to_dict() for part in self.parts],
            "features": None if self.features is None else asdict(self.features),
            "method": self.method(),
            "versions": versions(),
        }

    def _equal_blocks(self) -> str:
        count = len(self.blocks)
        return f"all {count} blocks are equal" if count > 1 else "all of its tensors are equal"

    def _stored_types(self) -> str:
        if self.a["dtype"] == self.b["dtype"]:
            return ""
        return f"; only the stored type differs ({self.a['dtype']} and {self.b['dtype']}, compared in {self.dtype})"


def diff_towers(
    a: str | Path,
    b: str | Path,
    images: str | Path | None = None,
    revision_a: str | None = None,
    revision_b: str | None = None,
    limit: int = 64,
    seed: int = 0,
    progress: Progress = lambda done, total, speed: None,
) -> TowerDiff:
    """Compare the vision towers of two models, to find out whether post-training moved the tower at all.

    Only the towers' tensors of an MLLM are read.

    Args:
        a: Model before training: folder or Hub name of an MLLM, an encoder, or a two-tower model.
        b: Model after training, of any of these kinds.
        images: Folder of images on which the features of both towers are compared too.
        revision_a: Revision of the first Hub repository.
        revision_b: Revision of the second Hub repository.
        limit: Number of images to encode; the first ones in sorted order.
        seed: Seed of the choice of tokens that CKA is computed on.
        progress: Function that is called after every image.

    Raises:
        CheckpointError: A model cannot be read or has no vision tower, both are the same model, or the architectures
            of their towers differ.
        DataError: The folder holds no image that can be decoded.
    """
    if same_model(a, b, revision_a, revision_b):
        raise CheckpointError(f"{a} is given twice; give the model before training and the one after it.")
    files = None if images is None else check_images(Path(images), limit)
    first, other = read_tower(a, revision_a), read_tower(b, revision_b)
    diff = compare_towers(first, other)
    if files is None:
        return diff
    features = compare_features(first.encoder(), other.encoder(), files, limit, seed, progress)
    return TowerDiff(**{**vars(diff), "features": features})


@torch.no_grad()
def compare_towers(a: AnyTower, b: AnyTower) -> TowerDiff:
    """Compare the weights of two vision towers that were read.

    Raises:
        CheckpointError: The architectures of the towers differ; the message names both and the first difference.
    """
    tensors, others = a.tensors, b.tensors
    not_compared = _check_architectures(a, tensors, b, others)
    names = [name for name in tensors if name in others]
    dtype = min(a.dtype, b.dtype, key=PRECISION.index)
    changes: dict[str, float] = {}
    squares: dict[str, tuple[float, float]] = {}
    for name in names:
        stored, stored_other = tensors[name].cpu(), others[name].cpu()
        first, other = stored.to(dtype), stored_other.to(dtype)
        # float16 and bfloat16 hold values that the other does not, so that a copy is equal in one direction only.
        if (
            torch.equal(first, other)
            or torch.equal(stored.to(stored_other.dtype), stored_other)
            or torch.equal(stored, stored_other.to(stored.dtype))
        ):
            squares[name] = (0.0, first.double().square().sum().item())
        else:
            difference = (first.double() - other.double()).square().sum().item()
            squares[name] = (difference, first.double().square().sum().item())
        changes[name] = _relative([squares[name]])
    parts = [
        BlockChange(part, number, _relative([squares[n] for n in inside]), {n: changes[n] for n in inside})
        for (part, number), inside in _parts(names).items()
    ]
    layer = a.feature_layer if b.feature_layer is None else b.feature_layer
    return TowerDiff(
        a.describe(),
        b.describe(),
        dtype_name(dtype),
        _relative(list(squares.values())),
        parts,
        _above(layer, [part.number for part in parts if part.number is not None]),
        not_compared,
    )


def _check_architectures(
    a: AnyTower, tensors: Mapping[str, torch.Tensor], b: AnyTower, others: Mapping[str, torch.Tensor]
) -> list[str]:
    """Return the tensors of a pooling head or of further blocks that only one tower has; refuse other differences.

    Raises:
        CheckpointError: The towers differ; the message names the first difference.
    """
    absent = [
        (name, owner)
        for one, two, owner in ((tensors, others, a), (others, tensors, b))
        for name in one
        if name not in two
    ]
    deeper = {name for name, owner in absent if _is_further_block(name, others if owner is a else tensors)}
    wrong = [
        f"only {owner.name} has {name}" for name, owner in absent if not name.startswith(POOLING) and name not in deeper
    ]
    wrong += [
        f"{name} is {_shape(tensors[name])} in one and {_shape(others[name])} in the other"
        for name in tensors
        if name in others and tensors[name].shape != others[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"the vision towers of {a.name} ({a.model_type}) and {b.name} ({b.model_type}) are of different "
            f"architectures: {wrong[0]}; give two models whose towers have the same layers and sizes, such as a model "
            "and the one that it was trained from."
        )
    return [name for name, _ in absent]


def _is_further_block(name: str, others: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a tensor is of a block above all blocks of the other tower, whose last layers were cut off."""
    match = NUMBER.match(name)
    if match is None:
        return False
    numbers = [int(m["number"]) for m in map(NUMBER.match, others) if m and m["series"] == match["series"]]
    return bool(numbers) and int(match["number"]) > max(numbers)


def _parts(names: list[str]) -> dict[tuple[str, int | None], list[str]]:
    """Group the tensors of a tower into embeddings, blocks, and modules that follow the blocks.

    The blocks are the longest series of numbered modules.
    """
    matches = {name: match for name in names if (match := NUMBER.match(name))}
    lengths = Counter(series for series, _ in {(m["series"], m["number"]) for m in matches.values()})
    series = max(dict.fromkeys(m["series"] for m in matches.values()), key=lambda s: lengths[s], default="")
    root = f"{series.rpartition('.')[0]}."
    grouped: dict[tuple[str, int | None], list[str]] = {}
    before = bool(matches)
    for name in names:
        match = matches.get(name)
        part: tuple[str, int | None]
        if match is not None and match["series"] == series:
            before, number = False, int(match["number"])
            part = (f"block {number}", number)
        elif before and not AFTER_BLOCKS.match(name):
            part = (EMBEDDINGS, None)
        else:
            part = (name.removeprefix(root).split(".")[0], None)
        grouped.setdefault(part, []).append(name)
    order = {EMBEDDINGS: 0}
    return dict(sorted(grouped.items(), key=lambda item: order.get(item[0][0], 1 if item[0][1] is not None else 2)))


def _above(layer: int | str | None, numbers: list[int]) -> list[int]:
    """Return the blocks above the feature layer; hidden state i + 1 is the output of block i."""
    if not isinstance(layer, int):
        return []
    state = layer if layer >= 0 else len(numbers) + 1 + layer
    return [number for number in numbers if number >= state]


def _relative(squares: list[tuple[float, float]]) -> float:
    """Return ||a - b|| / ||a|| from the squares of both norms; 1 where a is zero and b is not."""
    difference, own = (sum(column) for column in zip(*squares, strict=True))
    if not own:
        return float(difference > 0)
    return float((difference / own) ** 0.5)


def _shape(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"


def _joined(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
