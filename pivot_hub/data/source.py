"""Sources of rows: read and checked before training, decoded only when a batch needs the pixels."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image

from pivot_hub.config.data_section import FileData, ShapesData
from pivot_hub.config.recipe import LoadedRecipe
from pivot_hub.data.image_store import ARCHIVES, FileStore, ParquetStore
from pivot_hub.data.llava import parse_conversation
from pivot_hub.data.mmpr_meta import read_meta
from pivot_hub.data.preference import parse_preference, parse_question_pair, parse_vlfeedback_pair
from pivot_hub.data.row import IMAGE_TAG, SUFFIXES, Row, read_records
from pivot_hub.data.synthetic import DESCRIBE, KINDS, ShapesDataset
from pivot_hub.errors import DataError

PARSERS: dict[str, Callable[[str, dict[str, Any]], Row | DataError]] = {
    "llava": parse_conversation,
    "mmpr": parse_question_pair,
    "rlaif_v": parse_question_pair,
    "vlfeedback": parse_vlfeedback_pair,
    "preference": parse_preference,
}
Columns = Literal["plain", "conversation", "preference"]


class Source(Protocol):
    """Where rows come from."""

    checks_images: bool  # whether its images can be missing or broken

    def rows(self) -> Iterator[Row | DataError]: ...

    def locate(self, row: Row) -> Row:
        """Give a row the place of its image; DataError where there is none."""

    def open_image(self, row: Row) -> Image.Image:
        """An RGB image; DataError naming the row where it cannot be decoded."""

    def times(self) -> dict[str | None, float]:
        """How often the rows of each group are seen in an epoch; 1 where it is not said."""

    def to_dict(self) -> dict[str, Any]:
        """What tells its rows from others, without reading them."""


@dataclass(frozen=True)
class ShapesSource:
    """Rows of the built-in world; see `data.shapes`."""

    spec: ShapesData
    checks_images = False

    @property
    def dataset(self) -> ShapesDataset:
        return ShapesDataset(**self.spec.world.model_dump())

    def rows(self) -> Iterator[Row | DataError]:
        dataset, spec = self.dataset, self.spec
        for i in range(spec.start, spec.start + spec.rows):
            scene, rng = dataset.scene(spec.split, i), dataset.scene_rng(spec.split, i, 1)
            name = f"{spec.split}/{i}"
            # Kind and form follow the index, so every run of ten rows holds each combination once.
            kind, form = KINDS[i % 5], ("describe", "question")[i // 5 % 2]
            if spec.content == "captions":
                yield Row(name, name, DESCRIBE, scene.caption())
            elif spec.content == "pairs":
                if spec.slip:
                    fact_rng = dataset.scene_rng(spec.split, i, 6)
                    pair = scene.pair_with_fact(kind, form, spec.slip, rng, fact_rng)  # type: ignore[arg-type]
                else:
                    pair = scene.pair(kind, form, rng)  # type: ignore[arg-type]
                yield Row(name, name, pair.question, pair.chosen, pair.rejected)
            elif form == "describe":
                yield Row(name, name, DESCRIBE, scene.caption())
            else:
                asked = scene.question(kind, rng)
                yield Row(name, name, asked.text, asked.answer)

    def locate(self, row: Row) -> Row:
        return row

    def open_image(self, row: Row) -> Image.Image:
        assert row.image is not None
        split, index = row.image.split("/")
        return self.dataset.scene(split, int(index)).render().image  # type: ignore[arg-type]

    def times(self) -> dict[str | None, float]:
        return {}

    def to_dict(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class AnnotationFile:
    """One file of rows.

    Args:
        file: .json, .jsonl or .parquet.
        name: of it in row names.
        group: of its rows.
        root: folder that its image names start from, below that of all images.
        length: rows it should have, where that is said.
        times: how often they are seen in an epoch.
    """

    file: Path
    name: str
    group: str | None = None
    root: str | None = None
    length: int | None = None
    times: float = 1


@dataclass(frozen=True)
class FileSource:
    """Rows of annotation files.

    Args:
        format: of PARSERS.
        files: in order.
        folder: that Parquet files' names start from.
        images: of rows that name image files; None where all rows hold their images.
    """

    format: str
    files: tuple[AnnotationFile, ...]
    folder: Path
    images: FileStore | None
    embedded: ParquetStore = field(init=False)
    checks_images = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "embedded", ParquetStore(self.folder))

    def rows(self) -> Iterator[Row | DataError]:
        parse = PARSERS[self.format]
        for source in self.files:
            count = 0
            for name, record in read_records(source.file, source.name):
                count += 1
                item = record if isinstance(record, DataError) else parse(name, record)
                yield self._placed(item, source)
            if source.length not in (None, count):
                yield DataError(
                    f"{source.group}: {count} rows where the meta file says {source.length}: download it again"
                )

    def locate(self, row: Row) -> Row:
        if row.block is not None:
            return row
        if self.images is None:
            raise DataError(f"{row.id}: the row names image {row.image}: say where it lies, by `images` in the recipe")
        return self.images.locate(row)

    def open_image(self, row: Row) -> Image.Image:
        if row.block is not None:
            return self.embedded.open(row)
        assert self.images is not None
        return self.images.open(row)

    def times(self) -> dict[str | None, float]:
        return {f.group: f.times for f in self.files}

    def to_dict(self) -> dict[str, Any]:
        listing = [
            [f.name, f.group, f.root, f.length, f.times, f.file.stat().st_size, f.file.stat().st_mtime_ns]
            for f in self.files
        ]
        return {"files": listing, "images": str(self.images.root) if self.images else None}

    def _placed(self, item: Row | DataError, source: AnnotationFile) -> Row | DataError:
        if isinstance(item, DataError):
            return DataError(f"{source.group}/{item}") if source.root is not None else item
        if source.root is not None:  # of a meta file
            image = None if item.image is None else str(PurePosixPath(source.root, item.image))
            return replace(item, id=f"{source.group}/{item.id}", image=image, group=source.group)
        inside = item.image is not None and item.image.startswith(f"{source.name}#")
        block = self.embedded.block(item.image) if inside and item.image is not None else None
        return replace(item, group=source.group, block=block)


def sources_of(loaded: LoadedRecipe) -> list[Source]:
    """Open the data a recipe names, without reading rows; what is not on this machine is fetched from the Hub.

    Raises:
        DataError: a file or folder does not exist.
    """
    return [_open(loaded, spec) for spec in loaded.recipe.data]


def files_sha256(source: Source) -> str | None:
    """One hash over a source's annotation files: of JSON the content, of Parquet, which holds images, name and size."""
    if not isinstance(source, FileSource):
        return None
    made = hashlib.sha256()
    for each in source.files:
        made.update(f"{each.name} {each.file.stat().st_size}\n".encode())
        if each.file.suffix != ".parquet":
            with each.file.open("rb") as file:
                made.update(hashlib.file_digest(file, "sha256").digest())
    return made.hexdigest()


def example(images: list[Image.Image], row: Row, columns: Columns, image_token: str) -> dict[str, Any]:
    """One row in TRL's columns.

    Args:
        images: the row's decoded images.
        columns: plain (image then text, no chat template), conversation (all turns as messages), or preference
            (prompt, chosen and rejected).
        image_token: stands for the image in plain prompts.
    """
    if columns == "plain":
        return {"images": images, "prompt": image_token * len(images), "completion": f"{row.chosen}\n"}
    turns = [*row.earlier, ("user", row.prompt)]
    turns = _with_image(turns) if row.image is not None else [(r, t.replace(IMAGE_TAG, "")) for r, t in turns]
    prompt = [_message(role, text, row.image is not None) for role, text in turns]
    chosen = [_message("assistant", row.chosen)]
    if columns == "conversation":
        return {"images": images, "messages": prompt + chosen}
    rejected = [_message("assistant", row.rejected or "")]
    return {"images": images, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def _with_image(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Put the image's tag in front of the user's turn that has it, of the first one where none has."""
    said = [i for i, (role, _) in enumerate(turns) if role == "user"]
    shown = next((i for i in said if IMAGE_TAG in turns[i][1]), said[0])
    made = []
    for i, (role, text) in enumerate(turns):
        if role == "user" and not (i == shown and text.startswith(IMAGE_TAG) and text.count(IMAGE_TAG) == 1):
            # LLaVA's code strips a question whose tag it moves, and leaves others as they are.
            text = text.replace(IMAGE_TAG, "").strip() if IMAGE_TAG in text else text
            text = f"{IMAGE_TAG}\n{text}" if i == shown else text
        made.append((role, text))
    return made


def _message(role: str, text: str, image: bool = False) -> dict[str, Any]:
    """A message as parts; the chat template puts a newline behind the image."""
    parts: list[dict[str, str]] = []
    if image and text.startswith(IMAGE_TAG):
        parts, text = [{"type": "image"}], text.removeprefix(IMAGE_TAG).removeprefix("\n")
    return {"role": role, "content": [*parts, *([{"type": "text", "text": text}] if text or not parts else [])]}


def _open(loaded: LoadedRecipe, spec: ShapesData | FileData) -> Source:
    if isinstance(spec, ShapesData):
        return ShapesSource(spec)
    path = _find(loaded, "path", spec.path, spec)
    images = None if spec.images is None else _find(loaded, "images", spec.images, spec)
    if images is not None and images.is_file() and images.suffix not in ARCHIVES:
        raise DataError(f"{loaded.path}: data images {images} is neither a folder nor a .zip or .tar; unpack it.")
    folder = path if path.is_dir() else path.parent
    store = FileStore(images) if images is not None else None
    return FileSource(spec.format, tuple(_files(path, spec, images)), folder, store)


def _find(loaded: LoadedRecipe, key: str, reference: str, spec: FileData) -> Path:
    """A path of the recipe: beside it, or a dataset of the Hub, or a file of one."""
    path = Path(loaded.locate(reference))
    if path.exists():
        return path
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/(.+))?", reference)
    reason = ""
    if hub and not reference.startswith("."):
        repo, file = hub.groups()
        try:
            if file is not None:
                return Path(hf_hub_download(repo, file, repo_type="dataset", revision=spec.revision))
            wanted = [f"{name}/*" for name in spec.subsets] if spec.subsets else None
            return Path(snapshot_download(repo, repo_type="dataset", revision=spec.revision, allow_patterns=wanted))
        except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
            reason = f", and the Hub has no such dataset within reach ({str(error).strip().splitlines()[0][:120]})"
    raise DataError(f"{loaded.path}: data {key} {path} does not exist{reason}; give it relative to the recipe.")


def _files(path: Path, spec: FileData, images: Path | None) -> Iterator[AnnotationFile]:
    if path.is_file():
        meta = read_meta(path)
        if meta is None:
            if path.suffix not in SUFFIXES:
                raise DataError(f"{path}: rows are read from {', '.join(SUFFIXES)} files; convert it to one of them.")
            yield AnnotationFile(path, path.name)
            return
        for source in meta:
            file = _annotation(path, source.annotation, images)
            yield AnnotationFile(
                file, file.name, source.name, root=source.root, length=source.length, times=source.repeat_time
            )
        return
    subsets: dict[str | None, float] = dict(spec.subsets.items()) if spec.subsets else {None: 1}
    for group, times in subsets.items():
        folder = path if group is None else path / group
        found = next((f for s in reversed(SUFFIXES) if (f := sorted(folder.rglob(f"*{s}")))), [])
        if not found:
            raise DataError(f"{folder}: there is no {', '.join(SUFFIXES)} file in it; check `path` and `subsets`.")
        for file in found:
            yield AnnotationFile(file, file.relative_to(path).as_posix(), group, times=times)


def _annotation(meta: Path, annotation: str, images: Path | None) -> Path:
    """An annotation file that a meta file names: from the folder of the images, or beside the meta file."""
    parts = PurePosixPath(annotation).parts
    places = [images / annotation] if images is not None and images.is_dir() else []
    places += [meta.parent.joinpath(*parts[i:]) for i in range(len(parts))]
    found = next((p for p in places if p.is_file()), None)
    if found is None:
        raise DataError(f"{meta}: {places[0]} does not exist; `images` is the folder its paths start from.")
    return found
