"""Preference rows from labelled photographs and multiple-choice questions, written as a folder that a recipe reads."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pivot_hub.config.data_section import OnBadRow
from pivot_hub.data.boxes_and_masks import read_annotated_images
from pivot_hub.data.image import open_image
from pivot_hub.data.pairs.blind_probe import BlindAccuracy, check_blind, measure_blind
from pivot_hub.data.pairs.counterfactuals import COUNTERFACTUALS, Counterfactual, EditInputs, open_cv
from pivot_hub.data.pairs.from_labels import KINDS
from pivot_hub.data.pairs.from_options import OPTION, SHORT, option_units, read_questions
from pivot_hub.data.pairs.on_policy import Policy, PolicyAnswer, PolicyReport, ask, on_policy_units, questions_of
from pivot_hub.data.pairs.pair_row import MADE, PHOTOGRAPH, PHOTOS, PairRow, Question, RowImage, Unit, photograph
from pivot_hub.data.pairs.photos import SPLITS, LabelledPhoto, PhotoFolder
from pivot_hub.data.pairs.words import noun
from pivot_hub.errors import DataError, shown
from pivot_hub.files import write_json, write_whole
from pivot_hub.outputs import OutputKind, check_replaceable, whole_folder
from pivot_hub.provenance import versions

REPORT = "report.json"
PAIRS = OutputKind("a folder of preference rows", REPORT, "pivot data pairs", mark="train.jsonl")
NAMED = 20  # skipped images and questions that the report names
MARGIN_PCT = 5.0
Progress = Callable[[int, int | None, float], None]
_Rows = TypeVar("_Rows", bound=Sized)  # that are kept or left out together


@dataclass(frozen=True)
class PairOptions:
    """What rows are made of.

    Args:
        boxes: Boxes or outlines, as `read_annotated_images` takes them.
        masks: Folder of id masks.
        names: File of class names.
        ignore: Ids in masks that are no class.
        questions: File of multiple-choice questions.
        kinds: Kinds of questions that labels answer.
        counterfactuals: Ways to make rejected images.
        inpaint: Whether an erased region is filled by OpenCV's inpainting, or with its blurred surroundings.
        limit: Largest number of rows of each kind, and of each kind with each counterfactual.
        validation: Share of the photographs that go to validation.
        seed: Seed of the split and of all draws.
        margin_pct: Percentage points above chance that the blind probe may reach.
        allow_priors: Whether rows beyond the margin are written anyway.
        written_truth: Whether an on-policy row may have the written right answer, where no answer of the MLLM is right.
        on_bad_row: Whether a bad image, label or question raises an error or is skipped.
    """

    boxes: Path | None = None
    masks: Path | None = None
    names: Path | None = None
    ignore: Sequence[int] = (255,)
    questions: Path | None = None
    kinds: Sequence[str] = tuple(KINDS)
    counterfactuals: Sequence[str] = ()
    inpaint: bool = False
    limit: int | None = None
    validation: float = 0.1
    seed: int = 0
    margin_pct: float = MARGIN_PCT
    allow_priors: bool = False
    written_truth: bool = False
    on_bad_row: OnBadRow = OnBadRow.STOP

    def check(self) -> None:
        """Refuse values that are unknown or contradict each other.

        Raises:
            DataError: A value is wrong.
        """
        for option, values, known in (
            ("--kinds", self.kinds, tuple(KINDS)),
            ("--counterfactual", self.counterfactuals, tuple(COUNTERFACTUALS)),
        ):
            if unknown := [value for value in values if value not in known]:
                raise DataError(f"{option} {unknown[0]!r} is unknown; give {', '.join(known)}.")
        for name in self.counterfactuals:
            kinds = COUNTERFACTUALS[name][1]
            if not set(kinds) & set(self.kinds):
                raise DataError(
                    f"--counterfactual {name} changes the answer of {' and '.join(kinds)}: add it to --kinds."
                )
        if not 0 <= self.seed < 2**63:
            raise DataError(f"--seed is {shown(self.seed)}; give a whole number from 0 to below 2**63.")
        if not 0 <= self.margin_pct <= 50:  # NaN is none of these
            raise DataError(f"--margin is {self.margin_pct}; give points from 0 to 50, or --allow-priors.")
        if not 0 <= self.validation < 1:
            raise DataError(f"--validation is {self.validation}; give a share of the photographs from 0 to below 1.")
        if self.inpaint:
            open_cv()


@dataclass
class PairReport:
    """What was written, and what was not.

    Attributes:
        rows: Number of rows by group and split.
        photographs: Number of photographs that rows show, by split.
        duplicates: Number of photographs whose pixels equal those of another one, which is in the same split.
        blind: Accuracy of a probe that reads no image.
        beyond_margin: Groups whose accuracy is beyond the margin; only where such rows are allowed.
        left_out: Number of photographs, classes or rows that gave none, by reason.
        skipped: Number of images and questions that could not be used.
        first_skipped: The reasons for the first of them.
        policy: What the MLLM answered whose answers on-policy rows have; None without one.
    """

    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    photographs: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    blind: list[BlindAccuracy] = field(default_factory=list)
    beyond_margin: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    first_skipped: list[str] = field(default_factory=list)
    policy: PolicyReport | None = None

    def text(self) -> str:
        """Format the report for a terminal."""
        lines = [f"{'kind':24} {'train':>8} {'validation':>11}   blind probe, percent (chance 50)"]
        for one in self.blind:
            counts = self.rows[one.group]
            measured = "too few rows to measure"
            if one.ci95 is not None:
                measured = f"{one.accuracy_pct:.1f} [{one.ci95[0]:.1f}, {one.ci95[1]:.1f}]"
            lines.append(f"{one.group:24} {counts['train']:8} {counts['validation']:11}   {measured}")
        lines += [f"{group}: text alone tells the answers, beyond the margin" for group in self.beyond_margin]
        numbers = ", ".join(f"{count} {split}" for split, count in self.photographs.items())
        lines.append(f"photographs: {numbers}; {self.duplicates} exact duplicates, each in the split of its equals")
        lines += [f"left out, {reason}: {count}" for reason, count in sorted(self.left_out.items()) if count]
        if self.policy is not None:
            lines += self.policy.lines()
        if self.skipped:
            lines.append(f"skipped: {self.skipped}, the first: {self.first_skipped[0]}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        left_out = {reason: count for reason, count in sorted(self.left_out.items()) if count}
        policy = self.policy and self.policy.to_dict()
        return {**vars(self), "left_out": left_out, "blind": [one.to_dict() for one in self.blind], "policy": policy}


def write_pairs(
    folder: Path,
    output: Path,
    options: PairOptions,
    progress: Progress | None = None,
    policy: Policy | None = None,
) -> PairReport:
    """Make preference rows from a folder of photographs, and write them with their images.

    The output holds `train.jsonl` and `validation.jsonl` in MMPR's columns, `<split>-rejected-image.jsonl` with those
    of their rows that have a rejected image, `photos` (hard links, or copies on another disk), `made`, and
    `report.json`. It depends on the inputs, the options and the seed alone.

    Args:
        folder: Folder of photographs.
        output: Output folder; one of an earlier call is replaced.
        options: What rows are made of.
        progress: Called for each question that is answered, and while images are made, for each photograph and way to
            edit it: with how many are done, how many there are, and how many a second.
        policy: An MLLM that answers the questions; its answers take the place of the written ones in rows without a
            rejected image.

    Raises:
        DataError: An input is bad, no row can be made, or the blind probe is beyond the margin.
        OutputError: The output holds other files.
    """
    options.check()
    if options.written_truth and policy is None:
        raise DataError("--written-truth is for the rows of an MLLM's own answers; give --policy too.")
    check_replaceable(output, PAIRS)
    report = PairReport()
    photos = PhotoFolder(folder, options.validation, options.seed)
    labelled = _read_labelled(folder, photos, options, report)
    units = _label_units(labelled, options, report)
    questions = _read_questions(photos, options, report, with_short_answers=policy is not None)
    if policy is not None:
        of_kind = {kind: [(q,) for q in questions if q.kind == kind] for kind in (OPTION, SHORT)}
        limited = [q for kind, listed in of_kind.items() for (q,) in _limited(listed, options, kind)]
        units = _on_policy_units(questions_of(units) + limited, labelled, photos, options, report, progress, policy)
    elif questions:
        from_options = option_units(questions, report.left_out, _rng(options, "option balance"))
        units += _limited(from_options, options, OPTION)
    if options.counterfactuals and not options.allow_priors:  # before any image is made
        check_blind(measure_blind(units, options.seed), options.margin_pct)
    with whole_folder(output, PAIRS) as target:
        made = list(_counterfactual_units(labelled, target, options, report, progress))
        units = _without_repeats(units, made) + made
        if not any(unit[0].split == "train" for unit in units):
            raise DataError(
                f"no preference row for training can be made of {folder}; left out: {_reasons(report)}. Nothing was "
                "written: give more photographs, or other --kinds."
            )
        report.blind = measure_blind(units, options.seed)
        if not options.allow_priors:
            check_blind(report.blind, options.margin_pct)
        report.beyond_margin = [one.group for one in report.blind if one.exceeds(options.margin_pct)]
        rows = [row for unit in units for row in unit]
        _check_splits(rows, photos)
        report.rows = {
            one.group: {split: sum(r.group == one.group and r.split == split for r in rows) for split in SPLITS}
            for one in report.blind
        }
        shown = _photographs(rows)
        report.photographs = {split: sum(of_split == split for of_split in shown.values()) for split in SPLITS}
        report.duplicates = photos.duplicates(shown)
        for name in shown:
            _link(folder / name, target / PHOTOS / name)
        _write_rows(target, rows)
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(options).items()}
        for key in ("boxes", "masks", "names", "questions"):  # names, not paths of this machine
            settings[key] = settings[key] and Path(settings[key]).name
        files = sorted(f.relative_to(target).as_posix() for f in target.rglob("*") if f.is_file())
        write_json(target / REPORT, {**report.to_dict(), "options": settings, "versions": versions(), "files": files})
    return report


def _read_labelled(folder: Path, photos: PhotoFolder, options: PairOptions, report: PairReport) -> list[LabelledPhoto]:
    """Read the labels; without any, a file of questions is enough."""
    no_labels = options.boxes is None and options.masks is None and not (folder / "labels").is_dir()
    if options.questions is not None and no_labels:
        return []
    images, skipped = read_annotated_images(
        folder, options.boxes, options.masks, options.names, options.ignore, options.on_bad_row
    )
    _count_skipped(report, skipped)
    labelled = []
    for image in images:
        name = image.file.relative_to(folder).as_posix()
        labelled.append(LabelledPhoto(image, name, photos.split_of(name)))
    by_words: dict[str, str] = {}
    for name in sorted({name for photo in labelled for name in photo.labelled}):
        if (other := by_words.setdefault(noun(name).casefold(), name)) != name:
            raise DataError(f"the classes {shown(other)} and {shown(name)} are the same words; give them one name.")
    return labelled


def _read_questions(
    photos: PhotoFolder, options: PairOptions, report: PairReport, with_short_answers: bool
) -> list[Question]:
    if options.questions is None:
        return []
    questions, skipped = read_questions(
        options.questions, photos, options.on_bad_row, with_short_answers, _rng(options, OPTION)
    )
    _count_skipped(report, skipped)
    return questions


def _on_policy_units(
    questions: Sequence[Question],
    labelled: Sequence[LabelledPhoto],
    photos: PhotoFolder,
    options: PairOptions,
    report: PairReport,
    progress: Progress | None,
    policy: Policy,
) -> list[Unit]:
    """Let an MLLM answer questions, and make rows of its answers."""
    start = time.monotonic()

    def answers() -> Iterator[Sequence[PolicyAnswer]]:
        for done, answered in enumerate(policy.answers(asked), 1):
            yield answered
            if progress is not None:
                progress(done, len(asked), done / (time.monotonic() - start))

    asked = ask(questions, labelled, photos, options.seed)
    report.policy = PolicyReport(policy.metadata())
    rng = _rng(options, "on-policy balance")
    return on_policy_units(questions, asked, answers(), options.written_truth, report.policy, report.left_out, rng)


def _label_units(labelled: Sequence[LabelledPhoto], options: PairOptions, report: PairReport) -> list[Unit]:
    units: list[Unit] = []
    for kind in dict.fromkeys(options.kinds):
        if kind != "presence" and options.masks is not None:
            report.left_out[f"{kind}: photographs whose masks do not tell objects apart"] += len(labelled)
            continue
        of_kind = KINDS[kind](labelled, report.left_out, _rng(options, kind))
        units += _limited(of_kind, options, kind)
    return units


def _counterfactual_units(
    labelled: Sequence[LabelledPhoto],
    target: Path,
    options: PairOptions,
    report: PairReport,
    progress: Progress | None,
) -> Iterator[Unit]:
    """Make the images of each photograph, write them, and yield a row for each of a pair's two images."""
    tasks = [(kind, name) for name in options.counterfactuals for kind in COUNTERFACTUALS[name][1]]
    answered = options.kinds if options.masks is None else ("presence",)
    tasks = [(kind, name) for kind, name in dict.fromkeys(tasks) if kind in options.kinds and kind in answered]
    lenders = {split: [photo for photo in labelled if photo.split == split] for split in SPLITS}
    start, total = time.monotonic(), len(tasks) * len(labelled)
    for number, (kind, name) in enumerate(tasks):
        make, _ = COUNTERFACTUALS[name]
        rng, rows = _rng(options, f"{kind} {name}"), 0
        inputs = EditInputs(kind, lenders, options.inpaint, report.left_out, rng)
        for place, i in enumerate(rng.permutation(len(labelled))):
            if options.limit is not None and rows + 2 > options.limit:
                break
            pair = make(labelled[i], inputs)
            if pair and options.limit is not None and rows + 2 * len(pair.asked) > options.limit:
                _check_limit(options, f"{kind}, {name}", 2 * len(pair.asked))
                break
            unit = pair and _write_images(pair, name, target)
            if unit:
                rows += len(unit)
                yield unit
            elif pair:
                report.left_out[f"{kind}, {name}: both images have the same pixels"] += 1
            done = number * len(labelled) + place + 1
            if progress is not None:
                progress(done, total, done / (time.monotonic() - start))


def _write_images(pair: Counterfactual, name: str, target: Path) -> Unit | None:
    """Write the images of a counterfactual and return a row of each question for each; None if the images are equal."""
    first, second = pair.images
    first = open_image(pair.photo.image.file, pair.photo.name) if first is None else first
    if np.array_equal(np.asarray(first), np.asarray(second)):
        return None
    images = []
    for place, (image, origin) in enumerate(zip(pair.images, pair.origins, strict=True)):
        if image is None:
            images.append(photograph(pair.photo.name))
            continue
        file = f"{MADE}/{pair.kind}-{name}/{pair.photo.name}-{'ab'[place]}.jpg"
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        image.save(target / file, quality=95)
        images.append(RowImage(file, origin))
    rows: list[PairRow] = []
    for question, right, wrong in pair.asked:
        row = PairRow(pair.kind, pair.photo.split, images[0], question, right, wrong, images[1], name)
        rows += [row, replace(row, image=images[1], chosen=wrong, rejected=right, rejected_image=images[0])]
    return tuple(rows)


def _without_repeats(units: Sequence[Unit], made: Sequence[Unit]) -> list[Unit]:
    """Leave out units with a row that a counterfactual has too, as a photograph whose mirror image is rejected."""
    repeated = {(row.image, row.question, row.chosen) for unit in made for row in unit}
    return [unit for unit in units if not any((row.image, row.question, row.chosen) in repeated for row in unit)]


def _check_splits(rows: Sequence[PairRow], photos: PhotoFolder) -> None:
    """Refuse an image whose pixels both splits show; `PhotoFolder` splits by pixels, so that there should be none."""
    splits: dict[str | bytes, str] = {}
    for row in rows:
        for image in (row.image, row.rejected_image):
            if image is None:
                continue
            photo = image.origin == PHOTOGRAPH
            key = photos.digest_of(image.file.removeprefix(f"{PHOTOS}/")) if photo else image.file
            if splits.setdefault(key, row.split) != row.split:
                raise DataError(f"{image.file} is in both splits. Nothing was written.")


def _photographs(rows: Sequence[PairRow]) -> dict[str, str]:
    """Return the split of each photograph that a row shows as it is, by its path below the folder."""
    images = [(image, row.split) for row in rows for image in (row.image, row.rejected_image) if image is not None]
    return {image.file.removeprefix(f"{PHOTOS}/"): split for image, split in images if image.origin == PHOTOGRAPH}


def _write_rows(target: Path, rows: Sequence[PairRow]) -> None:
    for split in SPLITS:
        of_split = [row for row in rows if row.split == split]
        with_two = [row for row in of_split if row.rejected_image is not None]
        for name, selected in ((split, of_split), (f"{split}-rejected-image", with_two)):
            if selected:
                lines = (json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in selected)
                write_whole(target / f"{name}.jsonl", "".join(lines))


def _link(source: Path, target: Path) -> None:
    """Link a file, or copy it where links are not possible, as on another disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except FileExistsError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def _limited(units: list[_Rows], options: PairOptions, purpose: str) -> list[_Rows]:
    """Draw units, in their order, until the limit of rows is reached.

    Raises:
        DataError: The first unit, whose rows are balanced together, has more rows than the limit.
    """
    if options.limit is None or not units:
        return units
    order = _rng(options, f"{purpose} limit").permutation(len(units))
    sizes = np.cumsum([len(units[i]) for i in order])
    kept = int((sizes <= options.limit).sum())
    _check_limit(options, purpose, int(sizes[0]))
    return [units[i] for i in sorted(order[:kept])]


def _check_limit(options: PairOptions, purpose: str, rows: int) -> None:
    if options.limit is not None and rows > options.limit:
        raise DataError(f"--limit {options.limit}: the {purpose} rows of a question are {rows}; raise the limit.")


def _rng(options: PairOptions, purpose: str) -> np.random.Generator:
    return np.random.default_rng([options.seed, *purpose.encode()])


def _count_skipped(report: PairReport, skipped: Sequence[str]) -> None:
    report.skipped += len(skipped)
    report.first_skipped += skipped[: NAMED - len(report.first_skipped)]


def _reasons(report: PairReport) -> str:
    counts = [f"{reason}: {count}" for reason, count in report.left_out.most_common(3) if count]
    return "; ".join(counts) or "no two photographs or objects balance each other"
