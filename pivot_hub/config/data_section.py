"""The data section of a recipe: where rows come from."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from pivot_hub.config.yaml_loader import Strict
from pivot_hub.errors import DataError


class OnBadRow(StrEnum):
    """What to do with a row, an image or a label that cannot be used: raise an error, or skip the row and count it."""

    STOP = "stop"
    SKIP = "skip"

    @classmethod
    def parse(cls, value: str | OnBadRow) -> OnBadRow:
        """Return the policy that a value names.

        Raises:
            DataError: The value is neither `stop` nor `skip`.
        """
        try:
            return cls(value)
        except ValueError:
            raise DataError(f"on_bad_row is {value!r}: it is {' or '.join(cls)}.") from None


class ShapesSettings(Strict):
    """Settings of the built-in world that a recipe may change; see `data.shapes.World`."""

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


class ShapesData(Strict):
    """Rows of the built-in world, rendered as they are read."""

    format: Literal["shapes"]
    content: Literal["captions", "instruct", "pairs"]
    rows: int = Field(ge=1)
    split: Literal["train", "validation", "test"] = "train"
    start: int = Field(0, ge=0)  # index of the first scene: stages that must not share scenes start apart
    slip: Literal["visual", "fact", "format"] | None = None  # of pairs: a fact behind each answer, and what is wrong
    world: ShapesSettings = ShapesSettings()


class Expected(Strict):
    """What a source should hold: the planner counts with it before the data is there, `pivot data check` compares."""

    rows: int = Field(ge=1)  # that an epoch sees where there is no sample, as often as `subsets` say
    prompt_tokens: int = Field(ge=0)  # mean of a row: all turns that are read, without the image
    answer_tokens: int = Field(ge=1)  # mean of a row: all answers, or of one of a pair


class FileData(Strict):
    """Annotation files with their images; see `data/README.md` in the package for each format's columns.

    `path` is a JSON list, JSONL or Parquet file, a folder of such files, MMPR's meta file, or a Hub dataset. `images`
    is the folder or archive (.zip, .tar) that image names start from; rows that hold their images need none.
    `subsets` are folders below `path`, each with the times its rows are seen in an epoch; a `sample` takes each group
    of rows (source of a meta file, subset) by its share.
    """

    format: Literal["llava", "mmpr", "rlaif_v", "vlfeedback", "preference"]
    path: str
    images: str | None = None
    revision: str | None = None
    subsets: dict[str, Annotated[float, Field(gt=0)]] | None = Field(None, min_length=1)
    sample: int | None = Field(None, ge=1)
    seed: int = 0
    expect: Expected | None = None


DataSpec = Annotated[ShapesData | FileData, Field(discriminator="format")]
