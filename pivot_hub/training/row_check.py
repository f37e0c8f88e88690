"""What a row must be before it is trained on: answers that differ, and room for them behind the image."""

from __future__ import annotations

from transformers import LlavaProcessor

from pivot_hub.data.row import Row
from pivot_hub.data.source import Columns, RowReport, example


class RowCheck:
    """Says what is wrong with a row for a stage, counting answers that `max_length` shortens.

    Args:
        processor: of the MLLM that will read the row.
        max_length: tokens of prompt and answer together, image tokens included; None for no bound.
        columns: the form in which the stage reads rows.
        report: its `answers_cut` is counted up.
        pairs: whether the row must be a preference pair; so for sft too, which trains on the same rows as dpo.
    """

    def __init__(
        self,
        processor: LlavaProcessor,
        max_length: int | None,
        columns: Columns,
        report: RowReport,
        pairs: bool,
    ) -> None:
        self.processor, self.max_length, self.columns = processor, max_length, columns
        self.report, self.pairs = report, pairs
        size = getattr(processor.image_processor, "crop_size", None) or processor.image_processor.size
        patches = (size["height"] // processor.patch_size) * (size["width"] // processor.patch_size)
        # LLaVA's classes drop CLS; registers stay in front of the patches.
        self.image_tokens = patches + max(processor.num_additional_image_tokens - 1, 0)

    def __call__(self, row: Row) -> str | None:
        if not row.chosen.strip():
            return "the answer is empty"
        if self.columns == "plain" and row.image is None:
            return "it has no image, and align learns from images only"
        if self.pairs:
            if row.rejected is None or not row.rejected.strip():
                return "the rejected answer is missing or empty"
            if row.chosen.strip() == row.rejected.strip():
                return "chosen and rejected are the same"
        return self._too_long(row) if self.max_length is not None else None

    def _too_long(self, row: Row) -> str | None:
        assert self.max_length is not None
        made = example([], row, self.columns, self.processor.image_token)
        if self.columns == "plain":
            prompt, answer = "", row.chosen
        else:
            prompt = self.processor.apply_chat_template(made["prompt"], add_generation_prompt=True)
            answer = row.chosen
        images = 0 if row.image is None else 1
        # The template holds one placeholder an image, which the processor widens to all of its patches.
        before = len(self._ids(prompt)) - (images if prompt else 0) + images * self.image_tokens
        if before >= self.max_length:
            return (
                f"image and prompt take {before} tokens ({images * self.image_tokens} of the image) and leave no room "
                f"for an answer in max_length {self.max_length}; raise `args.max_length`"
            )
        longest = max(len(self._ids(a)) for a in (answer, row.rejected or ""))
        self.report.answers_cut += before + longest + 1 > self.max_length
        return None

    def _ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
