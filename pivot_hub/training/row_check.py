"""Checks of rows before training: the answers are there, differ, and fit behind image and prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from accelerate import PartialState
from jinja2 import TemplateError
from PIL import Image
from transformers import ProcessorMixin

from pivot_hub.config.data_section import ShapesData
from pivot_hub.config.recipe import LoadedRecipe, Recipe, RewardSpec
from pivot_hub.config.stages import argument_defaults, stage_of
from pivot_hub.data.index import RowIndex, index_rows
from pivot_hub.data.preference import REJECTED_IMAGE_KEYS
from pivot_hub.data.report import CheckResult
from pivot_hub.data.row import IMAGE_TAG, ImageSize, Row
from pivot_hub.data.source import Columns, example
from pivot_hub.errors import DataError, RecipeError, shown_text
from pivot_hub.mllm.build import read_processor
from pivot_hub.mllm.image_tokens import ImageTokens
from pivot_hub.mllm.load import mllm_config
from pivot_hub.mllm.processor import load_processor
from pivot_hub.training.conversation import segments
from pivot_hub.training.losses import compares_images
from pivot_hub.training.reference_cache import tokenizer_text
from pivot_hub.training.rewards.load import load_rewards


def rows_of(loaded: LoadedRecipe, processor: ProcessorMixin, max_length: int | None, **options: Any) -> RowIndex:
    """Read and check the rows of a stage that trains an MLLM; the main process reads them first.

    Args:
        loaded: The recipe.
        processor: Processor of the MLLM that will read the rows.
        max_length: Largest number of tokens of a row, from the stage's trainer config.
        options: Further arguments of `index_rows`.

    Raises:
        DataError: A row or a data file cannot be used; see `index_rows`.
        RecipeError: The loss compares two images, and a source draws one for each row.
        TrainingError: A reward of the recipe cannot be loaded.
    """
    columns = columns_of(loaded.recipe)
    if columns == "image_preference":
        for source in loaded.recipe.data:
            if isinstance(source, ShapesData) and not source.counterfactual:
                raise RecipeError(
                    f"{loaded.path}: `args.loss_type` compares two images; set `counterfactual: true` in the source of "
                    "format shapes."
                )
    pairs = loaded.recipe.stage in ("sft", "dpo")
    check = RowCheck(processor, max_length, columns, pairs, loaded.recipe.rewards or ())
    with PartialState().main_process_first():
        return index_rows(loaded, check, **options)


def columns_of(recipe: Recipe) -> Columns:
    """Return the form in which the stage of a recipe reads rows."""
    if stage_of(recipe.stage).takes_rewards:
        return "verifiable"
    if recipe.stage == "dpo":
        return "image_preference" if compares_images(recipe.args.get("loss_type", ())) else "preference"
    return "plain" if recipe.stage == "align" else "conversation"


def check_data(loaded: LoadedRecipe, **options: Any) -> RowIndex:
    """Read and check all rows of a recipe without loading weights: only configs, tokenizer and processor are read.

    A stage that is trained afterwards reuses the index of the checked rows.

    Args:
        loaded: The recipe.
        options: Further arguments of `index_rows`.

    Raises:
        RecipeError: The stage trains a base part, whose rows come from the synthetic Shapes dataset.
        CheckpointError: The MLLM's processor, or a part's, cannot be read.
        DataError: A row cannot be read.
        TrainingError: A reward of the recipe cannot be loaded.
    """
    recipe = loaded.recipe
    if recipe.model is None:
        raise RecipeError(f"{loaded.path}: stage {recipe.stage} draws its own rows; there is nothing to check.")
    default = argument_defaults(stage_of(recipe.stage)).get("max_length")  # stages with rewards have none
    return rows_of(loaded, _processor(loaded), recipe.args.get("max_length", default), **options)


def _processor(loaded: LoadedRecipe) -> ProcessorMixin:
    """Load the processor that a recipe's MLLM has when training starts, without its weights."""
    start = loaded.start(None)
    if start is not None:
        mllm_config(*start)  # names an MLLM of no family
        return load_processor(*start)
    spec = loaded.parts("the check")
    vision, language = loaded.locate(spec.vision), loaded.locate(spec.language)
    return read_processor(vision, language, spec.vision_revision, spec.language_revision, spec.family)


class RowCheck:
    """Finds the problems of rows for a stage, and counts the rows' tokens.

    Args:
        processor: Processor of the MLLM that will read the rows.
        max_length: Largest number of tokens of prompt and answer together, image tokens included; None for no limit.
        columns: Form in which the stage reads rows.
        pairs: Whether a row must be a preference pair. This holds for sft too, which trains on the same rows as dpo.
        rewards: Rewards, at least one of which must be able to score a row; none for stages without rewards.

    Attributes:
        reads_rejected_images: Whether the stage reads the rejected image of a row.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        max_length: int | None,
        columns: Columns,
        pairs: bool,
        rewards: Sequence[RewardSpec] = (),
    ) -> None:
        self.processor: Any = processor
        self.reward_specs, (self.rewards, _) = rewards, load_rewards(rewards)
        self.max_length, self.columns, self.pairs = max_length, columns, pairs
        self.reads_rejected_images = columns == "image_preference"
        self.images = ImageTokens(processor)
        names = (self.images.placeholder, processor.image_token, getattr(processor, "video_token", None))  # type: ignore[attr-defined]
        self._not_text = tuple(dict.fromkeys(name for name in names if name))

    def to_dict(self) -> dict[str, Any]:
        text = [tokenizer_text(self.processor.tokenizer), str(self.processor.chat_template), self.images.settings()]
        return {
            "processor": hashlib.sha256("\0".join(text).encode()).hexdigest(),
            "max_length": self.max_length,
            "columns": self.columns,
            "pairs": self.pairs,
            "rewards": [spec.model_dump(mode="json") for spec in self.reward_specs],
        }

    def __call__(
        self, rows: Sequence[Row], sizes: Sequence[ImageSize | None], rejected_sizes: Sequence[ImageSize | None] = ()
    ) -> list[CheckResult]:
        scorable = self._scorable(rows, sizes)
        problems = [self._problem(row) or self._unscorable(by) for row, by in zip(rows, scorable, strict=True)]
        row_texts = []
        for i, row in enumerate(rows):
            row_texts.append(_Texts())
            if problems[i] is None:
                try:
                    row_texts[i] = self._texts(row)
                except (TemplateError, DataError) as error:
                    problems[i] = ("chat template", f"the MLLM's chat template does not take it: {error}")
        all_texts = [text for texts in row_texts for text in (*texts.first, *texts.rest, *texts.answers)]
        ids = self.processor.tokenizer(all_texts, add_special_tokens=False)["input_ids"] if all_texts else []
        lengths = iter(map(len, ids))
        results = []
        both_sizes = zip(sizes, rejected_sizes or [None] * len(rows), strict=True)
        for image_sizes, problem, texts, rewards in zip(both_sizes, problems, row_texts, scorable, strict=True):
            first = sum(next(lengths) for _ in texts.first)
            rest = sum(next(lengths) for _ in texts.rest)
            answers = [next(lengths) for _ in texts.answers]
            in_first_prompt = any(self.images.placeholder in text for text in texts.first)
            result = (
                CheckResult(problem) if problem else self._measured(image_sizes, first, rest, answers, in_first_prompt)
            )
            results.append(result._replace(rewards=rewards))
        return results

    def _scorable(self, rows: Sequence[Row], sizes: Sequence[ImageSize | None]) -> list[dict[str, bool]]:
        """Return for each row which rewards score its solution; one of the user's is not asked, and scores all."""
        result: list[dict[str, bool]] = [{} for _ in rows]
        if not self.rewards or not rows:
            return result
        examples = [example([], row, "verifiable", self.images.placeholder) for row in rows]
        columns = {key: [one[key] for one in examples] for key in examples[0]}
        columns |= {
            "image_size": [None if size is None else [size.width, size.height] for size in sizes],
            "prompts": columns.pop("prompt"),
            "completion_ids": [[] for _ in rows],  # whether a row can be scored does not depend on the completion
        }
        for reward in self.rewards:
            values = [1.0] * len(rows) if reward.scores_every_row else reward([row.chosen for row in rows], **columns)
            for scored_by, value in zip(result, values, strict=True):
                scored_by[reward.name] = value is not None
        return result

    def _unscorable(self, scorable: dict[str, bool]) -> tuple[str, str] | None:
        """Return the problem of a row that none of the rewards can score."""
        if not self.rewards or any(scorable.values()):
            return None
        return "no reward", f"none of the rewards can score it: {', '.join(scorable)}"

    def _problem(self, row: Row) -> tuple[str, str] | None:
        """Return the kind of the row's problem and its description, or None."""
        asked = [text.replace(IMAGE_TAG, "") for role, text in (*row.earlier, ("user", row.prompt)) if role == "user"]
        texts = [*asked, *(text for role, text in row.earlier if role != "user"), row.chosen, row.rejected or ""]
        if token := next((token for token in self._not_text if any(token in text for text in texts)), None):
            return "image token", f"its text contains {token}, which stands for images"
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
        if self.reads_rejected_images:
            if row.image is None:
                return "no image", "it has no image, but the loss compares two images"
            if row.rejected_image is None:
                keys = " or ".join(f"`{key}`" for key in REJECTED_IMAGE_KEYS)
                return "no rejected image", f"the loss compares two images, and it has no {keys}"
        return None

    def _texts(self, row: Row) -> _Texts:
        image = [] if row.image is None else [Image.new("RGB", (1, 1))]
        columns = example(image, row, self.columns, self.images.placeholder)
        if self.columns == "plain":
            return _Texts([columns["prompt"]], [], [columns["completion"]])
        if self.columns == "verifiable":
            pieces = segments(self.processor, example(image, row, "conversation", self.images.placeholder)["messages"])
            return _Texts([segment.text for segment in pieces[:-1]], [], [pieces[-1].text])
        if self.columns in ("preference", "image_preference"):
            # The loss is on the last answer only; earlier answers are part of the prompt.
            chosen = segments(self.processor, [*columns["prompt"], *columns["chosen"]])
            rejected = segments(self.processor, [*columns["prompt"], *columns["rejected"]])
            return _Texts([segment.text for segment in chosen[:-1]], [], [chosen[-1].text, rejected[-1].text])
        pieces = segments(self.processor, columns["messages"])
        prompts = [segment.text for segment in pieces if not segment.answer]
        answers = [segment.text for segment in pieces if segment.answer]
        return _Texts(prompts[:2], prompts[2:], answers)

    def _measured(
        self,
        sizes: tuple[ImageSize | None, ImageSize | None],
        first: int,
        rest: int,
        answers: list[int],
        in_first_prompt: bool,
    ) -> CheckResult:
        """Count a row's tokens, those of the image that takes more of them.

        Args:
            sizes: Sizes of the row's image and of its rejected image.
            first: Tokens before the first answer, the image's placeholder included.
            rest: Tokens of later prompts.
            answers: Tokens of each answer.
            in_first_prompt: Whether the image is shown before the first answer.
        """
        image_tokens = 0
        has_image = sizes[0] is not None
        first -= has_image  # the text has one placeholder for all of the image's tokens
        for size in sizes:
            if size is None:
                continue
            try:
                image_tokens = max(image_tokens, self.images.count(size.height, size.width))
            except ValueError as error:
                reason = f"the MLLM takes no image of {size.width}x{size.height} pixels: {shown_text(str(error))}"
                return CheckResult(("image size", reason))
        if self.max_length is not None and image_tokens + first >= self.max_length:
            reason = (
                f"image and prompt take {image_tokens + first} tokens ({image_tokens} of the image) and leave no room "
                f"for an answer in max_length {self.max_length}; raise `args.max_length`"
            )
            return CheckResult(("too long", reason))
        if self.columns in ("preference", "image_preference"):
            longest_answer = max(answers)
            answer_tokens = (sum(answers) + 1) // 2  # mean of both answers, rounded up
        else:
            longest_answer = answer_tokens = sum(answers)
        total = image_tokens + first + rest + longest_answer
        cut = self.max_length is not None and total > self.max_length
        if cut and has_image and not in_first_prompt:
            reason = f"its image is shown behind an answer, and max_length {self.max_length} may cut it off"
            return CheckResult(("too long", f"{reason}; raise `args.max_length`"))
        return CheckResult(None, first + rest, answer_tokens, cut, image_tokens)


class _Texts(NamedTuple):
    """The texts of a row: those before the first answer, those of later prompts, and the answers."""

    first: Sequence[str] = ()
    rest: Sequence[str] = ()
    answers: Sequence[str] = ()
