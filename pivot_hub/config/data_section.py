"""The data section of a recipe: the sources that rows come from."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from pivot_hub.config.yaml_loader import Strict
from pivot_hub.errors import DataError


class OnBadRow(StrEnum):
    """What to do with a row, an image or a label that cannot be used: raise an error, or skip and count it."""

    STOP = "stop"
    SKIP = "skip"

    @classmethod
    def parse(cls, value: str | OnBadRow) -> OnBadRow:
        """Return the policy of a value.

        Raises:
            DataError: The value is neither `stop` nor `skip`.
        """
        try:
            return cls(value)
        except ValueError:
            raise DataError(f"on_bad_row is {value!r}; give {' or '.join(cls)}.") from None


class ShapesSettings(Strict):
    """Settings of the synthetic Shapes dataset that a recipe may change; see `data.synthetic.ShapesDataset`."""

    image_px: int = Field(64, ge=16)
    things: tuple[int, int] = (1, 5)
    noise: int = Field(24, ge=0, le=255)
    jitter: int = Field(30, ge=0, le=255)
    tint: float = Field(0.5, ge=0, le=1)
    tilt: float = 0.3
    seed: int = 0
    gap: float | None = Field(None, gt=0, le=2)
    scale: float | None = Field(None, gt=0, le=2)
    combinations: Literal["seen", "unseen"] | None = None


QuestionKind = Literal["colour", "shape", "position", "count", "presence", "describe", "box"]


class ShapesData(Strict):
    """Rows of the synthetic Shapes dataset, rendered when they are read.

    Args:
        format: The value `shapes`.
        content: Captions, conversations (instruct), preference pairs, or questions whose answers rewards can verify.
        rows: Number of rows.
        split: Split that the scenes are drawn from.
        start: Index of the first scene. Stages that must not share scenes have different starts.
        slip: Error type of the rejected answers of pairs whose answers end in a fact: an error in what is visible, in
            the fact, or in the format. Without it, pairs have no fact and the error is visual.
        kinds: Kinds of questions, in turn: by default all whose answer is a sentence about one aspect. `describe` asks
            for a description, `box` for the box of an object.
        counterfactual: Whether the rejected answer of a pair is the right one of another scene, which differs in one
            thing and is the row's rejected image; see `data.synthetic.counterfactual`.
        forms: Forms of instructions and preference pairs, in turn: `describe`, a description of the scene, `question`,
            a question with its answer, and `with_facts`, a description between six facts that need no image, about
            100 tokens; the first two by default.
        wrong_images: Whether each row shows the image of another row, so that its text is wrong: noise as a control,
            which should make an encoder worse.
        wrong_answers: JSON file of wrong answers, relative to the recipe, as `study.on_policy` writes an MLLM's own:
            rows of `pairs` ask the questions of content `questions`, and those without a wrong answer are left out.
        world: Settings of the dataset.
    """

    format: Literal["shapes"]
    content: Literal["captions", "instruct", "pairs", "questions"]
    rows: int = Field(ge=1)
    split: Literal["train", "validation", "test"] = "train"
    start: int = Field(0, ge=0)
    slip: Literal["visual", "fact", "format"] | None = None
    kinds: list[QuestionKind] | None = Field(None, min_length=1)
    counterfactual: bool | None = None
    forms: list[Literal["describe", "question", "with_facts"]] | None = Field(None, min_length=1)
    wrong_images: bool | None = None
    wrong_answers: str | None = None
    world: ShapesSettings = ShapesSettings()


class Expected(Strict):
    """Expected size of a source, which the planner counts with and `pivot data check` compares with the files.

    Args:
        rows: Rows of an epoch without a sample, each counted as often as `subsets` repeats it.
        prompt_tokens: Mean number of prompt tokens of a row, over all of its turns, without the image.
        answer_tokens: Mean number of answer tokens of a row: all answers, or one answer of a preference pair.
        image_tokens: Mean number of tokens that an image takes in the MLLM; by default the planner assumes one of
            640x480 pixels.
    """

    rows: int = Field(ge=1)
    prompt_tokens: int = Field(ge=0)
    answer_tokens: int = Field(ge=1)
    image_tokens: int | None = Field(None, ge=1)


class FileData(Strict):
    """Annotation files with their images; `docs/reference/data.md` lists the columns of each format.

    Args:
        format: Format of the annotation files.
        path: A JSON list, a JSONL or Parquet file, a folder of such files, MMPR's meta file, or a Hub dataset. Of
            format boxes, COCO's JSON of instances, or a folder of YOLO's or VOC's label files.
        images: Folder or archive (.zip, .tar) that image names are relative to; None where rows hold their images.
        revision: Commit or branch of a Hub dataset.
        subsets: Folders below `path`, each with the number of times that an epoch repeats its rows.
        sample: Number of rows to sample, from each group (a source of a meta file, or a subset) in proportion.
        seed: Seed of the sample.
        answer_words: Largest number of words of an answer that format vqa takes, 5 by default.
        expect: Expected size of the source.
    """

    format: Literal["llava", "mmpr", "rlaif_v", "vlfeedback", "preference", "vqa", "boxes"]
    path: str
    images: str | None = None
    revision: str | None = None
    subsets: dict[str, Annotated[float, Field(gt=0)]] | None = Field(None, min_length=1)
    sample: int | None = Field(None, ge=1)
    seed: int = 0
    answer_words: int | None = Field(None, ge=1)
    expect: Expected | None = None


DataSpec = Annotated[ShapesData | FileData, Field(discriminator="format")]
