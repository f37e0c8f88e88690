"""What a row must be before it is trained on: answers that differ, and room for them behind the image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from accelerate import PartialState
from PIL import Image
from transformers import LlavaProcessor

from pivot_hub.config.recipe import LoadedRecipe
from pivot_hub.config.stages import argument_defaults, stage_of
from pivot_hub.data.index import RowIndex, index_rows
from pivot_hub.data.report import CheckResult
from pivot_hub.data.row import Row
from pivot_hub.data.source import Columns, example
from pivot_hub.errors import RecipeError
from pivot_hub.mllm.build import read_processor
from pivot_hub.training.conversation import segments
from pivot_hub.training.reference_cache import tokenizer_text


def rows_of(loaded: LoadedRecipe, processor: LlavaProcessor, max_length: int | None, **options: Any) -> RowIndex:
    """The checked rows of an align, instruct, sft or dpo stage; the main process reads them first.

    Args:
        max_length: of the stage's trainer config.
        options: of `index_rows`.

    Raises:
        DataError: as `index_rows`.
    """
    columns = columns_of(loaded.recipe.stage)
    check = RowCheck(processor, max_length, columns, pairs=loaded.recipe.stage in ("sft", "dpo"))
    with PartialState().main_process_first():
        return index_rows(loaded, check, **options)


def columns_of(stage: str) -> Columns:
    """The form in which a stage reads rows."""
    forms: dict[str, Columns] = {"align": "plain", "dpo": "preference"}
    return forms.get(stage, "conversation")


def check_data(loaded: LoadedRecipe, **options: Any) -> RowIndex:
    """Read and check all rows of a recipe before any weight is loaded: its encoder and head give configs alone.

    A stage that is trained afterwards finds what was checked.

    Args:
        options: of `index_rows`.

    Raises:
        RecipeError: the stage makes a base part, whose rows are the built-in world's.
        CheckpointError, DataError: a part's processor, or a row, cannot be read.
    """
    recipe = loaded.recipe
    if recipe.model is None:
        raise RecipeError(f"{loaded.path}: stage {recipe.stage} makes its own rows; there is nothing to check.")
    spec = recipe.model
    places = loaded.locate(spec.vision), loaded.locate(spec.language)
    processor = read_processor(*places, spec.vision_revision, spec.language_revision)
    default = argument_defaults(stage_of(recipe.stage))["max_length"]
    return rows_of(loaded, processor, recipe.args.get("max_length", default), **options)


class RowCheck:
    """Says what is wrong with rows for a stage, and counts their tokens.

    Args:
        processor: of the MLLM that will read the rows.
        max_length: tokens of prompt and answer together, image tokens included; None for no bound.
        columns: the form in which the stage reads rows.
        pairs: whether a row must be a preference pair; so for sft too, which trains on the same rows as dpo.
    """

    def __init__(self, processor: LlavaProcessor, max_length: int | None, columns: Columns, pairs: bool) -> None:
        self.processor, self.max_length, self.columns, self.pairs = processor, max_length, columns, pairs
        size = getattr(processor.image_processor, "crop_size", None) or processor.image_processor.size
        patches = (size["height"] // processor.patch_size) * (size["width"] // processor.patch_size)
        # LLaVA's classes drop CLS; registers stay in front of the patches.
        self.image_tokens = patches + max(processor.num_additional_image_tokens - 1, 0)

    def to_dict(self) -> dict[str, Any]:
        tokenizer: Any = self.processor.tokenizer
        text = [tokenizer_text(tokenizer), str(self.processor.chat_template), self.processor.image_token]
        return {
            "text": hashlib.sha256("\0".join(text).encode()).hexdigest(),
            "image_tokens": self.image_tokens,
            "max_length": self.max_length,
            "columns": self.columns,
            "pairs": self.pairs,
        }

    def __call__(self, rows: Sequence[Row]) -> list[CheckResult]:
        problems = [self._problem(row) for row in rows]
        texts = [_Texts() if p else self._texts(row) for row, p in zip(rows, problems, strict=True)]
        flat = [text for t in texts for text in (*t.first, *t.rest, *t.answers)]
        tokenizer: Any = self.processor.tokenizer
        lengths = iter(len(i) for i in tokenizer(flat, add_special_tokens=False)["input_ids"]) if flat else iter(())
        made = []
        for row, problem, t in zip(rows, problems, texts, strict=True):
            first, rest, answers = ([next(lengths) for _ in some] for some in (t.first, t.rest, t.answers))
            made.append(CheckResult(problem) if problem else self._measured(row, sum(first), sum(rest), answers))
        return made

    def _problem(self, row: Row) -> tuple[str, str] | None:
        said = [t for _, t in row.earlier] + [row.prompt, row.chosen, row.rejected or ""]
        if any(self.processor.image_token in text for text in said):
            return "image token", f"its text holds {self.processor.image_token}, which stands for images"
        answers = [t for role, t in row.earlier if role == "assistant"] + [row.chosen]
        if not all(answer.strip() for answer in answers):
            return "empty answer", "the answer is empty"
        if self.columns == "plain" and row.image is None:
            return "no image", "it has no image, and align learns from images only"
        if self.pairs:
            if row.rejected is None or not row.rejected.strip():
                return "no rejected answer", "the rejected answer is missing or empty"
            if row.chosen.strip() == row.rejected.strip():
                return "same answers", "chosen and rejected are the same"
        return None

    def _texts(self, row: Row) -> _Texts:
        image = [] if row.image is None else [Image.new("RGB", (1, 1))]
        made = example(image, row, self.columns, self.processor.image_token)
        if self.columns == "plain":
            return _Texts([made["prompt"]], [], [made["completion"]])
        if self.columns == "preference":
            # The last answer alone is learnt from; earlier ones are part of what is asked.
            chosen, rejected = (segments(self.processor, [*made["prompt"], *made[s]]) for s in ("chosen", "rejected"))
            return _Texts([p.text for p in chosen[:-1]], [], [chosen[-1].text, rejected[-1].text])
        parts = [(p.text, p.answer) for p in segments(self.processor, made["messages"])]
        asked = [text for text, answer in parts if not answer]
        return _Texts(asked[:2], asked[2:], [text for text, answer in parts if answer])

    def _measured(self, row: Row, first: int, rest: int, answers: list[int]) -> CheckResult:
        shown = 0 if row.image is None else self.image_tokens
        # The text holds one placeholder for all of the image's tokens.
        first -= row.image is not None
        if self.max_length is not None and shown + first >= self.max_length:
            reason = (
                f"image and prompt take {shown + first} tokens ({shown} of the image) and leave no room for an answer "
                f"in max_length {self.max_length}; raise `args.max_length`"
            )
            return CheckResult(("too long", reason))
        pair = self.columns == "preference"
        longest = shown + first + rest + (max(answers) if pair else sum(answers))
        told = (sum(answers) + 1) // 2 if pair else sum(answers)
        return CheckResult(None, first + rest, told, self.max_length is not None and longest > self.max_length)


class _Texts(NamedTuple):
    """Of a row: what comes before the first answer, what else is asked, and the answers."""

    first: Sequence[str] = ()
    rest: Sequence[str] = ()
    answers: Sequence[str] = ()
