"""Sources of rows: rows are read and checked before training, images decoded only when a batch needs the pixels."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

import numpy as np
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image

from pivot_hub.config.data_section import FileData, QuestionKind, ShapesData
from pivot_hub.config.recipe import LoadedRecipe
from pivot_hub.data.boxes_and_masks import image_folder, scan_annotated_images
from pivot_hub.data.image import image_files, open_image, require_utf8
from pivot_hub.data.image_store import ARCHIVES, FileStore, ParquetStore
from pivot_hub.data.llava import parse_conversation, parse_questions
from pivot_hub.data.mmpr_meta import read_meta
from pivot_hub.data.preference import parse_preference, parse_question_pair, parse_vlfeedback_pair
from pivot_hub.data.row import IMAGE_TAG, SUFFIXES, Box, ImageSize, Row, bad_character, read_records
from pivot_hub.data.synthetic import (
    DESCRIBE,
    DESCRIBE_WITH_FACTS,
    KINDS,
    Counterfactual,
    Form,
    Kind,
    Scene,
    ShapesDataset,
    draw_counterfactual,
    put_between_facts,
)
from pivot_hub.errors import DataError, shown_text

PARSERS: dict[str, Callable[[str, dict[str, Any]], Row | DataError]] = {
    "llava": parse_conversation,
    "mmpr": parse_question_pair,
    "rlaif_v": parse_question_pair,
    "vlfeedback": parse_vlfeedback_pair,
    "preference": parse_preference,
}
IMAGE_KEYS = {"vlfeedback": "img_path"}  # key that a format reads its image from; "image" by default
# Keys that other data sets hold their images under.
OTHER_IMAGE_KEYS = re.compile(r"(image|img|picture|photo)s?(_(path|file|name|bytes)s?)?", re.IGNORECASE)
SCENE, OTHER = "scene", "other"  # of a counterfactual, behind the name of its row: the scene, and the other one
ANSWER_WORDS = 5  # of an answer of format vqa, by default
Columns = Literal["plain", "conversation", "preference", "image_preference", "verifiable"]


class Source(Protocol):
    """A source of rows."""

    def rows(self) -> Iterator[Row | DataError]:
        """Yield every row, or an error in place of a row that cannot be parsed."""

    def locate(self, row: Row) -> Row:
        """Return the row with the location of its image.

        Args:
            row: Row that names an image.

        Raises:
            DataError: The image does not exist.
        """

    def open_image(self, row: Row) -> Image.Image:
        """Decode the image of a located row as RGB.

        Args:
            row: Row as `locate` returned it.

        Raises:
            DataError: The image cannot be decoded; the message names the row.
        """

    def measure_image(self, row: Row) -> tuple[ImageSize, str | None]:
        """Return the size of a located row's image, and the mode that it was stored in.

        An image that can be broken is decoded. One that is rendered is not, and its mode is None.

        Raises:
            DataError: The image cannot be decoded; the message names the row.
        """

    def times(self) -> dict[str | None, float]:
        """Return how often the rows of each group are seen in an epoch; groups that are missing are seen once."""

    def to_dict(self) -> dict[str, Any]:
        """Return what distinguishes the rows from those of other sources, without reading them."""


@dataclass(frozen=True)
class ShapesSource:
    """Rows of the synthetic Shapes dataset; see `data.synthetic`.

    Args:
        spec: Source of a recipe.
        wrong_answers: Wrong answers by the number of their scene, of a source that takes them from a file.
    """

    spec: ShapesData
    wrong_answers: Mapping[int, str] | None = None

    @property
    def dataset(self) -> ShapesDataset:
        return ShapesDataset(**self.spec.world.model_dump())

    def rows(self) -> Iterator[Row | DataError]:
        dataset, spec = self.dataset, self.spec
        for i in range(spec.start, spec.start + spec.rows):
            name = image = f"{spec.split}/{i}"
            if spec.wrong_images:  # the next row's image; the last row has the first one's
                image = f"{spec.split}/{spec.start + (i - spec.start + 1) % spec.rows}"
            if spec.counterfactual:
                pair = self._counterfactual(i).pair
                chosen, rejected = f"{name}/{SCENE}", f"{name}/{OTHER}"
                row = Row(name, chosen, pair.question, pair.chosen, pair.rejected, rejected_image=rejected)
                yield self._with_facts(row, i)
                continue
            scene, rng = dataset.scene(spec.split, i), dataset.scene_rng(spec.split, i, 1)
            kind, form = self._kind_and_form(i)
            if self.wrong_answers is not None:
                if i in self.wrong_answers:
                    yield replace(_verifiable(scene, name, image, kind, rng), rejected=self.wrong_answers[i])
            elif spec.content == "questions":
                kinds: Sequence[QuestionKind] = spec.kinds or KINDS
                yield _verifiable(scene, name, image, kinds[i % len(kinds)], rng)
            elif spec.content == "captions":
                yield Row(name, image, DESCRIBE, scene.caption())
            elif spec.content == "pairs":
                if spec.slip:
                    fact_rng = dataset.scene_rng(spec.split, i, 6)
                    pair = scene.pair_with_fact(kind, form, spec.slip, rng, fact_rng)
                else:
                    pair = scene.pair(kind, form, rng)
                yield self._with_facts(Row(name, image, pair.question, pair.chosen, pair.rejected), i)
            elif form == "describe":
                yield self._with_facts(Row(name, image, DESCRIBE, scene.caption()), i)
            else:
                question = scene.question(kind, rng)
                yield Row(name, image, question.text, question.answer)

    def locate(self, row: Row) -> Row:
        return row

    def open_image(self, row: Row) -> Image.Image:
        assert row.image is not None
        split, index, *role = row.image.split("/")
        if not role:
            return self.dataset.scene(split, int(index)).render().image  # type: ignore[arg-type]
        counterfactual = self._counterfactual(int(index))
        return (counterfactual.other if role == [OTHER] else counterfactual.scene).render().image

    def measure_image(self, row: Row) -> tuple[ImageSize, str | None]:
        return ImageSize(self.spec.world.image_px, self.spec.world.image_px), None

    def times(self) -> dict[str | None, float]:
        return {}

    def to_dict(self) -> dict[str, Any]:
        if self.wrong_answers is None:
            return {}
        text = json.dumps(sorted(self.wrong_answers.items()))
        return {"wrong_answers_sha256": hashlib.sha256(text.encode()).hexdigest()}

    def _counterfactual(self, index: int) -> Counterfactual:
        return draw_counterfactual(self.dataset, self.spec.split, index, *self._kind_and_form(index))

    def _kind_and_form(self, index: int) -> tuple[Kind, Form]:
        """Return kind and form of a row: by default any ten consecutive rows hold each combination once."""
        form = self._form(index)
        return KINDS[index % 5], "describe" if form == "with_facts" else form

    def _form(self, index: int) -> Form | Literal["with_facts"]:
        forms: Sequence[Form | Literal["with_facts"]] = self.spec.forms or ("describe", "question")
        return forms[index // 5 % len(forms)]

    def _with_facts(self, row: Row, index: int) -> Row:
        """Return a row of descriptions with facts around them, if that is its form."""
        if self._form(index) != "with_facts":
            return row
        answers = [row.chosen] if row.rejected is None else [row.chosen, row.rejected]
        rng = self.dataset.scene_rng(self.spec.split, index, 11)
        chosen, *rejected = put_between_facts(answers, rng)
        return replace(row, prompt=DESCRIBE_WITH_FACTS, chosen=chosen, rejected=rejected[0] if rejected else None)


def _verifiable(scene: Scene, name: str, image: str, kind: QuestionKind, rng: np.random.Generator) -> Row:
    """Ask a question about a scene whose answer rewards can verify."""
    if kind == "describe":
        return Row(name, image, DESCRIBE, scene.caption(), kind=kind)
    if kind == "box":
        target = int(rng.integers(len(scene.objects)))
        x1, y1, x2, y2 = scene.render().boxes[target].tolist()
        return _box_row(name, image, scene.objects[target].name, (x1, y1, x2, y2))
    question = scene.question(kind, rng)
    return Row(name, image, question.text, question.answer, kind=kind)


def _box_row(name: str, image: str, label: str, box: Box) -> Row:
    """Ask for the box of the only object of a label."""
    return Row(name, image, f"Give the box of the {label}.", json.dumps(box), boxes=(box,), kind="box")


@dataclass(frozen=True)
class BoxSource:
    """A row for each label that has one instance in an image; an image without such a label has no row.

    Args:
        folder: Folder of the images.
        labels: COCO's JSON of instances, or a folder of YOLO's or VOC's label files.
    """

    folder: Path
    labels: Path

    def rows(self) -> Iterator[Row | DataError]:
        for image in scan_annotated_images(self.folder, self.labels):
            if isinstance(image, DataError):
                yield image
                continue
            path = image.file.relative_to(self.folder).as_posix()
            for label, box in image.boxes.items():
                x1, y1, x2, y2 = (round(side, 2) for side in box)
                yield _box_row(f"{path}: {label}", path, label, (x1, y1, x2, y2))

    def locate(self, row: Row) -> Row:
        return row

    def open_image(self, row: Row) -> Image.Image:
        assert row.image is not None
        return open_image(self.folder / row.image, row.id)

    def measure_image(self, row: Row) -> tuple[ImageSize, str | None]:
        image = self.open_image(row)
        return ImageSize(image.height, image.width), image.info["mode"]

    def times(self) -> dict[str | None, float]:
        return {}

    def to_dict(self) -> dict[str, Any]:
        listing = hashlib.sha256()
        for file in self.label_files():
            status = file.stat()
            listing.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
        for file in image_files(self.folder):
            listing.update(f"{file}\n".encode())
        return {"labels_and_images": listing.hexdigest()}

    def label_files(self) -> list[Path]:
        """List the files that hold the labels, sorted."""
        return [self.labels] if self.labels.is_file() else sorted(f for f in self.labels.rglob("*") if f.is_file())


@dataclass(frozen=True)
class AnnotationFile:
    """One file of rows.

    Args:
        file: File of rows: .json, .jsonl or .parquet.
        name: Name of the file in row names.
        group: Group of its rows.
        root: Folder that its image names start from, below the folder of all images; None outside of meta files.
        length: Number of rows that it should have, where the meta file states it.
        times: Number of times that its rows are seen in an epoch.
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
        format: Name of the format: a key of PARSERS, or `vqa`.
        files: Annotation files, in the order of their rows.
        folder: Folder that the names of Parquet files start from.
        images: Store of the image files that rows name; None where all rows hold their images.
        answer_words: Largest number of words of an answer of format vqa.
    """

    format: str
    files: tuple[AnnotationFile, ...]
    folder: Path
    images: FileStore | None
    answer_words: int = ANSWER_WORDS
    embedded: ParquetStore = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "embedded", ParquetStore(self.folder))

    def rows(self) -> Iterator[Row | DataError]:
        keys_without_image: set[str] | None = set()
        for annotation_file in self.files:
            count = 0
            for name, record in read_records(annotation_file.file, annotation_file.name):
                count += 1
                for row in [record] if isinstance(record, DataError) else self._parse(name, record):
                    if isinstance(row, Row) and row.image is not None:
                        keys_without_image = None
                    elif isinstance(row, Row) and keys_without_image is not None:
                        keys_without_image |= record.keys() if isinstance(record, dict) else set()
                    yield self._complete(row, annotation_file)
            if annotation_file.length not in (None, count):
                yield DataError(
                    f"{annotation_file.group}: {count} rows where the meta file says {annotation_file.length}: "
                    "download it again"
                )
        if self.images is not None and keys_without_image:
            keys = shown_text(", ".join(sorted(keys_without_image)))
            raise DataError(
                f"{self.folder}: no row names an image, but the recipe gives `images`: format {self.format} reads "
                f"`{self._image_key}`, and the rows have {keys}; rename the key, or leave out `images`."
            )

    def locate(self, row: Row) -> Row:
        if row.block is not None:
            return row
        if self.images is None:
            raise DataError(f"{row.id}: the row names image {row.image}; give its folder by `images` in the recipe.")
        return self.images.locate(row)

    def open_image(self, row: Row) -> Image.Image:
        if row.block is not None:
            return self.embedded.open(row)
        assert self.images is not None
        return self.images.open(row)

    def measure_image(self, row: Row) -> tuple[ImageSize, str | None]:
        image = self.open_image(row)
        return ImageSize(image.height, image.width), image.info["mode"]

    def times(self) -> dict[str | None, float]:
        return {f.group: f.times for f in self.files}

    def to_dict(self) -> dict[str, Any]:
        listing = [
            [f.name, f.group, f.root, f.length, f.times, f.file.stat().st_size, f.file.stat().st_mtime_ns]
            for f in self.files
        ]
        return {"files": listing, "images": str(self.images.root) if self.images else None}

    @property
    def _image_key(self) -> str:
        return IMAGE_KEYS.get(self.format, "image")

    def _parse(self, name: str, record: dict[str, Any]) -> list[Row | DataError]:
        """Parse a record to its rows, or to an error."""
        if self.format != "vqa":
            return [self._check(PARSERS[self.format](name, record), record)]
        rows = parse_questions(name, record, self.answer_words)
        return [self._check(row, record) for row in ([rows] if isinstance(rows, DataError) else rows)]

    def _check(self, row: Row | DataError, record: dict[str, Any]) -> Row | DataError:
        """Return an error in place of a row that has text that cannot be stored, or an image that is not read."""
        if isinstance(row, DataError):
            return row
        images = [row.image or "", row.rejected_image or ""]
        texts = [*images, row.prompt, row.chosen, row.rejected or "", *(text for _, text in row.earlier)]
        if (character := bad_character(*texts)) is not None:
            return DataError(
                f"{row.id}: holds {character!r}, which is no character: the file is not UTF-8, or half of a surrogate "
                "pair is missing; convert the file to UTF-8, or fix the row"
            )
        if row.image is not None:
            return row
        other = next((key for key, value in record.items() if value and OTHER_IMAGE_KEYS.fullmatch(key)), None)
        if other is not None:
            return DataError(
                f"{row.id}: has an image as `{other}`, but format {self.format} reads `{self._image_key}`; rename it"
            )
        asked = [row.prompt, *(text for role, text in row.earlier if role == "user")]
        if any(IMAGE_TAG in text for text in asked):
            keys = shown_text(", ".join(record))
            return DataError(
                f"{row.id}: its text shows an image by {IMAGE_TAG}, but there is none as `{self._image_key}`; the row "
                f"has {keys}"
            )
        return row

    def _complete(self, row: Row | DataError, annotation_file: AnnotationFile) -> Row | DataError:
        """Add to a row what its annotation file says about all rows: group, folder of the images, and block."""
        from_meta_file = annotation_file.root is not None
        if isinstance(row, DataError):
            return DataError(f"{annotation_file.group}/{row}") if from_meta_file else row
        if annotation_file.root is not None:
            image, rejected_image = (
                None if name is None else str(PurePosixPath(annotation_file.root, name))
                for name in (row.image, row.rejected_image)
            )
            id_, group = f"{annotation_file.group}/{row.id}", annotation_file.group
            return replace(row, id=id_, image=image, rejected_image=rejected_image, group=group)
        images_inside = [
            image.startswith(f"{annotation_file.name}#")
            for image in (row.image, row.rejected_image)
            if image is not None
        ]
        if any(images_inside) and not all(images_inside):
            return DataError(
                f"{row.id}: one of its images is in the Parquet file and the other in a file of its own; put both into "
                "the Parquet file, or both into files"
            )
        block = self.embedded.block(row.image) if row.image is not None and any(images_inside) else None
        return replace(row, group=annotation_file.group, block=block)


def sources_of(loaded: LoadedRecipe) -> list[Source]:
    """Open the data of a recipe without reading rows; data that does not exist locally is fetched from the Hub.

    Args:
        loaded: Recipe that names the data.

    Raises:
        DataError: A file or folder does not exist.
    """
    return [_open(loaded, spec) for spec in loaded.recipe.data]


def files_sha256(source: Source) -> str | None:
    """Hash a source's annotation files to one value; None for a source without files.

    Files enter by name, size and content, but Parquet files, which hold images, by name and size alone.
    """
    if isinstance(source, BoxSource):
        files = [(file.name, file) for file in source.label_files()]
    elif isinstance(source, FileSource):
        files = [(annotation_file.name, annotation_file.file) for annotation_file in source.files]
    else:
        return None
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(f"{name} {path.stat().st_size}\n".encode())
        if path.suffix != ".parquet":
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def example(
    images: list[Image.Image],
    row: Row,
    columns: Columns,
    image_token: str,
    rejected_images: list[Image.Image] | None = None,
) -> dict[str, Any]:
    """Convert a row to TRL's columns.

    Args:
        images: Decoded images of the row.
        row: Row to convert.
        columns: Form of the columns: `plain` (image then text, no chat template), `conversation` (all turns as
            messages), `preference` (prompt, chosen and rejected), `image_preference` (rejected_images beside these),
            or `verifiable` (prompt and the columns that rewards read: solution, boxes in pixels, image_size [width,
            height], kind, and the row's id).
        image_token: Token that stands for the image in plain prompts.
        rejected_images: Decoded rejected images of the row.
    """
    if columns == "plain":
        return {"images": images, "prompt": image_token * len(images), "completion": f"{row.chosen}\n"}
    turns = [*row.earlier, ("user", row.prompt)]
    if row.image is not None:
        turns = _with_image(turns)
    else:
        turns = [(role, text.replace(IMAGE_TAG, "")) for role, text in turns]
    prompt = [_message(role, text, row.image is not None) for role, text in turns]
    if columns == "verifiable":
        return {
            "images": images,
            "prompt": prompt,
            "solution": row.chosen,
            "boxes": [list(box) for box in row.boxes] or None,
            "image_size": list(images[0].size) if images else None,
            "kind": row.kind,
            "id": row.id,
        }
    chosen = [_message("assistant", row.chosen)]
    if columns == "conversation":
        return {"images": images, "messages": prompt + chosen}
    rejected = [_message("assistant", row.rejected or "")]
    pair = {"images": images, "prompt": prompt, "chosen": chosen, "rejected": rejected}
    return pair if columns == "preference" else {**pair, "rejected_images": rejected_images}


def _with_image(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Move the image's tag to the front of the first user turn that has it; with no tag, add it to the first turn."""
    user_turns = [i for i, (role, _) in enumerate(turns) if role == "user"]
    image_turn = next((i for i in user_turns if IMAGE_TAG in turns[i][1]), user_turns[0])
    result = []
    for i, (role, text) in enumerate(turns):
        in_place = i == image_turn and text.startswith(IMAGE_TAG) and text.count(IMAGE_TAG) == 1
        if role == "user" and not in_place:
            # LLaVA's code strips a question whose tag it moves, and leaves others as they are.
            text = text.replace(IMAGE_TAG, "").strip() if IMAGE_TAG in text else text
            text = f"{IMAGE_TAG}\n{text}" if i == image_turn else text
        result.append((role, text))
    return result


def _message(role: str, text: str, image: bool = False) -> dict[str, Any]:
    """Convert a turn to a message of parts; the chat template puts a newline after the image."""
    parts: list[dict[str, str]] = []
    if image and text.startswith(IMAGE_TAG):
        parts.append({"type": "image"})
        text = text.removeprefix(IMAGE_TAG).removeprefix("\n")
    if text or not parts:
        parts.append({"type": "text", "text": text})
    return {"role": role, "content": parts}


def _open(loaded: LoadedRecipe, spec: ShapesData | FileData) -> Source:
    if isinstance(spec, ShapesData):
        if spec.wrong_answers is None:
            return ShapesSource(spec)
        return ShapesSource(spec, _read_wrong_answers(Path(loaded.locate(spec.wrong_answers)), spec))
    path = _resolve(loaded, "path", spec.path, spec)
    images = None if spec.images is None else _resolve(loaded, "images", spec.images, spec)
    if images is not None and images.is_file() and images.suffix not in ARCHIVES:
        raise DataError(f"{loaded.path}: data images {images} is neither a folder nor a .zip or .tar; unpack it.")
    if spec.format == "boxes":
        assert images is not None  # the recipe was checked
        if not images.is_dir():
            raise DataError(f"{loaded.path}: data images {images} is not a folder; format boxes reads no archive.")
        return BoxSource(image_folder(images), path)
    folder = path if path.is_dir() else path.parent
    store = FileStore(images) if images is not None else None
    files = tuple(_annotation_files(path, spec, images))
    return FileSource(spec.format, files, folder, store, spec.answer_words or ANSWER_WORDS)


def _read_wrong_answers(file: Path, spec: ShapesData) -> dict[int, str]:
    """Read a file of wrong answers, `{"answers": {"SCENE": "ANSWER"}}`, each about a scene of the source."""
    try:
        answers = {int(scene): answer for scene, answer in json.loads(file.read_text("utf-8"))["answers"].items()}
        if not all(isinstance(answer, str) for answer in answers.values()):
            raise TypeError("an answer is no text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'{file}: no file of wrong answers ({type(error).__name__}); it holds {{"answers": {{"SCENE": "ANSWER"}}}}.'
        ) from error
    if other := answers.keys() - set(range(spec.start, spec.start + spec.rows)):
        raise DataError(
            f"{file}: scene {min(other)} is none of the source, whose rows are {spec.rows} from {spec.start}."
        )
    return answers


def _resolve(loaded: LoadedRecipe, key: str, reference: str, spec: FileData) -> Path:
    """Return the local path of a reference: a local file or folder, a Hub dataset, or a file of a Hub dataset."""
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
            patterns = [f"{name}/*" for name in spec.subsets] if spec.subsets else None
            return Path(snapshot_download(repo, repo_type="dataset", revision=spec.revision, allow_patterns=patterns))
        except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
            first_line = str(error).strip().splitlines()[0][:120]
            reason = f", and no such dataset could be fetched from the Hub ({first_line})"
    raise DataError(f"{loaded.path}: data {key} {path} does not exist{reason}; give it relative to the recipe.")


def _annotation_files(path: Path, spec: FileData, images: Path | None) -> Iterator[AnnotationFile]:
    if path.is_file():
        meta = read_meta(path)
        if meta is None:
            if path.suffix not in SUFFIXES:
                raise DataError(f"{path}: rows are read from {', '.join(SUFFIXES)} files; convert it to one of them.")
            require_utf8(path.name, path.parent)
            yield AnnotationFile(path, path.name)
            return
        for source in meta:
            file = _find_annotation(path, source.annotation, images)
            yield AnnotationFile(
                file, file.name, source.name, root=source.root, length=source.length, times=source.repeat_time
            )
        return
    subsets: dict[str | None, float] = dict(spec.subsets.items()) if spec.subsets else {None: 1}
    for group, times in subsets.items():
        folder = path if group is None else path / group
        # Only files of one suffix are read: Parquet takes precedence over JSONL, and JSONL over JSON.
        files_by_suffix = (sorted(folder.rglob(f"*{suffix}")) for suffix in reversed(SUFFIXES))
        files = next((files for files in files_by_suffix if files), [])
        if not files:
            raise DataError(f"{folder}: there is no {', '.join(SUFFIXES)} file in it; check `path` and `subsets`.")
        for file in files:
            require_utf8(file.relative_to(path).as_posix(), path)
            yield AnnotationFile(file, file.relative_to(path).as_posix(), group, times=times)


def _find_annotation(meta: Path, annotation: str, images: Path | None) -> Path:
    """Find an annotation file that a meta file names, below the folder of the images or beside the meta file."""
    parts = PurePosixPath(annotation).parts
    places = [images / annotation] if images is not None and images.is_dir() else []
    places += [meta.parent.joinpath(*parts[i:]) for i in range(len(parts))]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise DataError(f"{meta}: {places[0]} does not exist; `images` is the folder its paths start from.")
    return file
