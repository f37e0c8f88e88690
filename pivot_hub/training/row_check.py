"""Checks of rows before training: the answers are there, differ, and fit behind image and prompt."""

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
    """Read and check the rows of an align, instruct, sft or dpo stage; the main process reads them first.

    Args:
        loaded: The recipe.
        processor: Processor of the MLLM that will read the rows.
        max_length: Largest number of tokens of a row, from the stage's trainer config.
        options: Further arguments of `index_rows`.

    Raises:
        DataError: A row or a data file cannot be used; see `index_rows`.
    """
    columns = columns_of(loaded.recipe.stage)
    check = RowCheck(processor, max_length, columns, pairs=loaded.recipe.stage in ("sft", "dpo"))
    with PartialState().main_process_first():
        return index_rows(loaded, check, **options)


def columns_of(stage: str) -> Columns:
    """Return the form in which a stage reads rows."""
    forms: dict[str, Columns] = {"align": "plain", "dpo": "preference"}
    return forms.get(stage, "conversation")


def check_data(loaded: LoadedRecipe, **options: Any) -> RowIndex:
    """Read and check all rows of a recipe without loading weights: only configs of encoder and LLM are read.

    A stage that is trained afterwards reuses the index of the checked rows.

    Args:
        loaded: The recipe.
        options: Further arguments of `index_rows`.

    Raises:
        RecipeError: The stage trains a base part, whose rows come from the synthetic Shapes dataset.
        CheckpointError: A part's processor cannot be read.
        DataError: A row cannot be read.
    """
    recipe = loaded.recipe
    if recipe.model is None:
        raise RecipeError(f"{loaded.path}: stage {recipe.stage} draws its own rows; there is nothing to check.")
    spec = recipe.model
    vision, language = loaded.locate(spec.vision), loaded.locate(spec.language)
    processor = read_processor(vision, language, spec.vision_revision, spec.language_revision)
    default = argument_defaults(stage_of(recipe.stage))["max_length"]
    return rows_of(loaded, processor, recipe.args.get("max_length", default), **options)


class RowCheck:
    """Finds the problems of rows for a stage, and counts the rows' tokens.

    Args:
        processor: Processor of the MLLM that will read the rows.
        max_length: Largest number of tokens of prompt and answer together, image tokens included; None for no limit.
        columns: Form in which the stage reads rows.
        pairs: Whether a row must be a preference pair. This holds for sft too, which trains on the same rows as dpo.
    """

    def __init__(self, processor: LlavaProcessor, max_length: int | None, columns: Columns, pairs: bool) -> None:
        self.processor, self.max_length, self.columns, self.pairs = processor, max_length, columns, pairs
        size = getattr(processor.image_processor, "crop_size", None) or processor.image_processor.size
        patches = (size["height"] // processor.patch_size) * (size["width"] // processor.patch_size)
        # LLaVA's classes drop the CLS token; register tokens stay in front of the patches.
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
        row_texts = [_Texts() if p else self._texts(row) for row, p in zip(rows, problems, strict=True)]
        all_texts = [text for texts in row_texts for text in (*texts.first, *texts.rest, *texts.answers)]
        tokenizer: Any = self.processor.tokenizer
        ids = tokenizer(all_texts, add_special_tokens=False)["input_ids"] if all_texts else []
        lengths = iter(map(len, ids))
        results = []
        for row, problem, texts in zip(rows, problems, row_texts, strict=True):
            first = sum(next(lengths) for _ in texts.first)
            rest = sum(next(lengths) for _ in texts.rest)
            answers = [next(lengths) for _ in texts.answers]
            results.append(CheckResult(problem) if problem else self._measured(row, first, rest, answers))
        return results

    def _problem(self, row: Row) -> tuple[str, str] | None:
        """Return the kind of the row's problem and its description, or None."""
        texts = [text for _, text in row.earlier] + [row.prompt, row.chosen, row.rejected or ""]
        if any(self.processor.image_token in text for text in texts):
            return "image token", f"its text contains {self.processor.image_token}, which stands for images"
        answers = [t for role, t in row.earlier if role == "assistant"] + [row.chosen]
        if not all(answer.strip() for answer in answers):
            return "empty answer", "the answer is empty"
        if self.columns == "plain" and row.image is None:
            return "no image", "it has no image, but align learns from images only"
        if self.pairs:
            if row.rejected is None or not row.rejected.strip():
                return "no rejected answer", "the rejected answer is missing or empty"
            if row.chosen.strip() == row.rejected.strip():
                return "same answers", "chosen and rejected are the same"
        return None

    def _texts(self, row: Row) -> _Texts:
        image = [] if row.image is None else [Image.new("RGB", (1, 1))]
        columns = example(image, row, self.columns, self.processor.image_token)
        if self.columns == "plain":
            return _Texts([columns["prompt"]], [], [columns["completion"]])
        if self.columns == "preference":
            # The loss is on the last answer only; earlier answers are part of the prompt.
            chosen = segments(self.processor, [*columns["prompt"], *columns["chosen"]])
            rejected = segments(self.processor, [*columns["prompt"], *columns["rejected"]])
            return _Texts([segment.text for segment in chosen[:-1]], [], [chosen[-1].text, rejected[-1].text])
        pieces = segments(self.processor, columns["messages"])
        prompts = [segment.text for segment in pieces if not segment.answer]
        answers = [segment.text for segment in pieces if segment.answer]
        return _Texts(prompts[:2], prompts[2:], answers)

    def _measured(self, row: Row, first: int, rest: int, answers: list[int]) -> CheckResult:
        """Count a row's tokens.

        Args:
            row: The row.
            first: Tokens before the first answer, the image's placeholder included.
            rest: Tokens of later prompts.
            answers: Tokens of each answer.
        """
        image_tokens = 0 if row.image is None else self.image_tokens
        # The text has one placeholder for all of the image's tokens.
        first -= row.image is not None
        if self.max_length is not None and image_tokens + first >= self.max_length:
            reason = (
                f"image and prompt take {image_tokens + first} tokens ({image_tokens} of the image) and leave no room "
                f"for an answer in max_length {self.max_length}; raise `args.max_length`"
            )
            return CheckResult(("too long", reason))
        if self.columns == "preference":
            longest_answer = max(answers)
            answer_tokens = (sum(answers) + 1) // 2  # mean of both answers, rounded up
        else:
            longest_answer = answer_tokens = sum(answers)
        total = image_tokens + first + rest + longest_answer
        cut = self.max_length is not None and total > self.max_length
        return CheckResult(None, first + rest, answer_tokens, cut)


class _Texts(NamedTuple):
    """The texts of a row: those before the first answer, those of later prompts, and the answers."""

    first: Sequence[str] = ()
    rest: Sequence[str] = ()
    answers: Sequence[str] = ()
