"""The preference row that is written, and the balanced group of rows that is kept or left out as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pivot_hub.data.pairs.photos import Split

PHOTOGRAPH = "photograph"
PHOTOS, MADE = "photos", "made"  # folders of the output
POLICY, WRITTEN = "policy", "written"  # origins of the answers of an on-policy row


@dataclass(frozen=True)
class RowImage:
    """An image of a row.

    Args:
        file: Path of the image below the output.
        origin: PHOTOGRAPH, or how the image was made of one.
    """

    file: str
    origin: str


def photograph(name: str) -> RowImage:
    """Return the image of a row that is a photograph as it was given, by its path below the folder."""
    return RowImage(f"{PHOTOS}/{name}", PHOTOGRAPH)


@dataclass(frozen=True)
class OnPolicy:
    """What is known of an on-policy row, whose answers an MLLM gave.

    Args:
        chosen_means: What the chosen answer means, in words that all such answers share.
        rejected_means: What the rejected answer means.
        chosen_origin: POLICY, or WRITTEN where no answer of the MLLM was right.
    """

    chosen_means: str
    rejected_means: str
    chosen_origin: str


@dataclass(frozen=True)
class PairRow:
    """A preference row.

    Args:
        kind: Kind of the question.
        split: Split of its photograph.
        image: Its image.
        question: Question without an image tag.
        chosen: Right answer.
        rejected: Wrong answer.
        rejected_image: Image for which the rejected answer is the right one.
        counterfactual: How the two images differ; None without a rejected image.
        on_policy: What is known of a row whose answers an MLLM gave; None for written answers.
    """

    kind: str
    split: Split
    image: RowImage
    question: str
    chosen: str
    rejected: str
    rejected_image: RowImage | None = None
    counterfactual: str | None = None
    on_policy: OnPolicy | None = None

    @property
    def group(self) -> str:
        """Rows that are counted and measured together: their kind, how their images differ, and whose answers."""
        if self.on_policy is not None:
            return on_policy_group(self.kind)
        return self.kind if self.counterfactual is None else f"{self.kind}, {self.counterfactual}"

    def to_dict(self) -> dict[str, Any]:
        """Return the row in MMPR's columns, with further ones that say where it comes from."""
        row: dict[str, Any] = {
            "image": self.image.file,
            "question": f"<image>\n{self.question}",
            "chosen": self.chosen,
            "rejected": self.rejected,
        }
        if self.rejected_image is not None:
            row["rejected_image"] = self.rejected_image.file
        row |= {"kind": self.kind, "image_origin": self.image.origin}
        if self.rejected_image is not None:
            row["rejected_image_origin"] = self.rejected_image.origin
        if self.on_policy is not None:
            row |= {"chosen_origin": self.on_policy.chosen_origin, "rejected_origin": POLICY}
        return row


def on_policy_group(kind: str) -> str:
    """Return the group of on-policy rows of a kind."""
    return f"{kind}, on-policy"


@dataclass(frozen=True)
class Question:
    """A question whose answer is known.

    Args:
        kind: Kind of the question.
        split: Split of its photograph.
        image: Its photograph.
        text: Question without an image tag.
        right: Right answer.
        wrong: Wrong answers; none of a question with a short answer.
    """

    kind: str
    split: Split
    image: RowImage
    text: str
    right: str
    wrong: tuple[str, ...]

    def rows(self) -> tuple[PairRow, ...]:
        """Return a row for the right answer against each wrong one."""
        return tuple(PairRow(self.kind, self.split, self.image, self.text, self.right, wrong) for wrong in self.wrong)


Unit = tuple[PairRow, ...]  # rows that are kept or left out together, so that the answers stay balanced
