"""Sources of rows: read and checked before training, decoded only when a batch needs the pixels."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from datasets import Dataset
from PIL import Image

from pivot_hub.data import llava, mmpr
from pivot_hub.data.image import open_image
from pivot_hub.data.row import IMAGE_TAG, Row
from pivot_hub.data.shapes import DESCRIBE, KINDS, World
from pivot_hub.errors import DataError
from pivot_hub.recipe import LoadedRecipe, ShapesData


class Source(Protocol):
    """Where rows come from. `open_image` returns an RGB image or raises DataError naming the row."""

    def rows(self) -> Iterator[Row | DataError]: ...

    def open_image(self, row: Row) -> Image.Image: ...


Columns = Literal["plain", "completion", "preference"]


@dataclass
class RowReport:
    """What was read, and what was left out and why; it travels into the stage's report."""

    rows: int = 0
    skipped: list[str] = field(default_factory=list)
    image_modes: Counter[str] = field(default_factory=Counter)
    sources: list[dict[str, Any]] = field(default_factory=list)  # of each: rows, hash of their ids, rows of each group
    answers_cut: int = 0  # rows whose answer `max_length` shortens

    def facts(self) -> dict[str, Any]:
        return {**asdict(self), "skipped_rows": len(self.skipped), "image_modes": dict(self.image_modes)}


@dataclass(frozen=True)
class ShapesSource:
    """Rows of the built-in world; see `data.shapes`."""

    spec: ShapesData

    @property
    def world(self) -> World:
        return World(**self.spec.world.model_dump())

    def rows(self) -> Iterator[Row | DataError]:
        world, spec = self.world, self.spec
        for i in range(spec.start, spec.start + spec.rows):
            scene, rng = world.scene(spec.split, i), world.scene_rng(spec.split, i, 1)
            name = f"{spec.split}/{i}"
            # Kind and form follow the index, so every run of ten rows holds each combination once.
            kind, form = KINDS[i % 5], ("describe", "question")[i // 5 % 2]
            if spec.content == "captions":
                yield Row(name, name, DESCRIBE, scene.caption())
            elif spec.content == "pairs":
                pair = scene.pair(kind, form, rng)  # type: ignore[arg-type]
                yield Row(name, name, pair.question, pair.chosen, pair.rejected)
            elif form == "describe":
                yield Row(name, name, DESCRIBE, scene.caption())
            else:
                asked = scene.question(kind, rng)
                yield Row(name, name, asked.text, asked.answer)

    def open_image(self, row: Row) -> Image.Image:
        assert row.image is not None
        split, index = row.image.split("/")
        return self.world.scene(split, int(index)).render().image  # type: ignore[arg-type]


@dataclass(frozen=True)
class FileSource:
    """Rows of an annotation file whose images lie in a folder."""

    file: Path
    images: Path
    parse: Callable[[Path], Iterator[Row | DataError]]

    def rows(self) -> Iterator[Row | DataError]:
        return self.parse(self.file)

    def open_image(self, row: Row) -> Image.Image:
        assert row.image is not None
        return open_image(self.images / row.image, row.id)


def sources_of(loaded: LoadedRecipe) -> list[Source]:
    """Open the data a recipe names, without reading rows.

    Raises:
        DataError: a file or folder does not exist.
    """
    found: list[Source] = []
    for spec in loaded.recipe.data:
        if isinstance(spec, ShapesData):
            found.append(ShapesSource(spec))
            continue
        file, images = Path(loaded.locate(spec.path)), Path(loaded.locate(spec.images))
        for key, path in (("path", file), ("images", images)):
            if not path.exists():
                raise DataError(f"{loaded.path}: data {key} {path} does not exist; give it relative to the recipe.")
        parse = llava.read_rows if spec.format == "llava" else partial(mmpr.read_rows, base=images)
        found.append(FileSource(file, images, parse))
    return found


def read_rows(
    loaded: LoadedRecipe, check: Callable[[Row], str | None], report: RowReport
) -> tuple[list[Source], list[tuple[int, Row]]]:
    """Read and check every row before training, decoding each image file once.

    Args:
        loaded: the recipe; its `on_bad_row` says whether a bad row stops the run or is skipped and counted.
        check: returns what is wrong with a row for this stage, or None.
        report: filled with counts and reasons.

    Returns:
        The sources and the good rows, each with the index of its source.

    Raises:
        DataError: naming the file and row, when the recipe says stop, or when no row is left.
    """
    sources = sources_of(loaded)
    rows: list[tuple[int, Row]] = []
    for i, source in enumerate(sources):
        kept: list[Row] = []
        for item in source.rows():
            try:
                if isinstance(item, DataError):
                    raise item
                if problem := check(item):
                    raise DataError(f"{item.id}: {problem}.")
                if isinstance(source, FileSource) and item.image is not None:
                    source.open_image(item)
                    with Image.open(source.images / item.image) as image:
                        report.image_modes[image.mode] += 1
            except DataError as error:
                if loaded.recipe.on_bad_row == "stop":
                    hint = "mend the row, or set `on_bad_row: skip` in the recipe to leave such rows out"
                    raise DataError(f"{str(error).rstrip('.')}; {hint}.") from None
                report.skipped.append(str(error))
                continue
            kept.append(item)
        chosen = _sampled(kept, loaded.recipe.data[i])
        report.sources.append(_listing(chosen))
        rows.extend((i, row) for row in chosen)
    if not rows:
        reason = f": {report.skipped[0]}" if report.skipped else ""
        raise DataError(f"{loaded.path}: no usable row is left{reason}")
    report.rows = len(rows)
    return sources, rows


def _sampled(rows: list[Row], spec: Any) -> list[Row]:
    """A seeded sample of the rows where the recipe asks for one, in file order, each group by its share."""
    count = getattr(spec, "sample", None)
    if count is None or count >= len(rows):
        return rows
    groups: dict[str | None, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.group, []).append(i)
    exact = {name: count * len(some) / len(rows) for name, some in groups.items()}
    sizes = {name: int(share) for name, share in exact.items()}
    # Largest remainders take what rounding down left over.
    for name in sorted(exact, key=lambda n: (sizes[n] - exact[n], str(n)))[: count - sum(sizes.values())]:
        sizes[name] += 1
    rng = random.Random(spec.seed)
    return [rows[i] for i in sorted(i for name, some in groups.items() for i in rng.sample(some, sizes[name]))]


def _listing(rows: list[Row]) -> dict[str, Any]:
    """How many rows of each group were taken, and a hash that tells which."""
    counts = Counter(row.group for row in rows if row.group is not None)
    ids = "\n".join(row.id for row in rows)
    return {"rows": len(rows), "ids_sha256": hashlib.sha256(ids.encode()).hexdigest(), "groups": dict(counts)}


def as_dataset(
    sources: Sequence[Source], rows: Sequence[tuple[int, Row]], columns: Columns, image_token: str
) -> Dataset:
    """Turn rows into a dataset in TRL's vision columns; images are decoded as batches are read.

    Args:
        sources: as `read_rows` returned them.
        rows: each with the index of its source.
        columns: see `example`.
        image_token: stands for the image in plain prompts.
    """

    def render(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        made = []
        for r in batch["row"]:
            source, row = rows[r]
            images = [] if row.image is None else [sources[source].open_image(row)]
            made.append(example(images, row, columns, image_token))
        return {key: [e[key] for e in made] for key in made[0]}

    return Dataset.from_dict({"row": list(range(len(rows)))}).with_transform(render)


def example(images: list[Image.Image], row: Row, columns: Columns, image_token: str) -> dict[str, Any]:
    """One row in TRL's columns.

    Args:
        images: the row's decoded images.
        columns: plain (image then text, no chat template), completion (prompt and chosen answer), or
            preference (prompt, chosen and rejected).
        image_token: stands for the image in plain prompts.
    """
    if columns == "plain":
        return {"images": images, "prompt": image_token * len(images), "completion": f"{row.chosen}\n"}
    turns = [*row.earlier, ("user", row.prompt)]
    # The image belongs to the first turn, wherever the question about it stands.
    shown = [row.image is not None, *([False] * (len(turns) - 1))]
    prompt = [{"role": r, "content": _parts(t, s)} for (r, t), s in zip(turns, shown, strict=True)]
    chosen = [{"role": "assistant", "content": _parts(row.chosen, False)}]
    if columns == "completion":
        return {"images": images, "prompt": prompt, "completion": chosen}
    rejected = [{"role": "assistant", "content": _parts(row.rejected or "", False)}]
    return {"images": images, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def _parts(text: str, image: bool) -> list[dict[str, str]]:
    """Message content as parts: the image where its tag stands, in front where it stands nowhere."""
    if not image:
        return [{"type": "text", "text": text.replace(IMAGE_TAG, "").strip()}]
    before, tag, after = text.partition(IMAGE_TAG)
    if not tag:
        before, after = "", text
    parts = [("text", before.strip()), ("image", ""), ("text", after.replace(IMAGE_TAG, "").strip())]
    return [{"type": k, "text": t} if k == "text" else {"type": k} for k, t in parts if t or k == "image"]
