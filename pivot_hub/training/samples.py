"""Samples of a grpo or rloo run: answers to some prompts with their rewards, kept as JSON lines and shown as a page."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pivot_hub.data.image import data_uri
from pivot_hub.files import write_whole
from pivot_hub.training.metrics_log import cut_records
from pivot_hub.training.rewards.completion import Completion, text_of
from pivot_hub.training.samples_page import PAGE, samples_page

SAMPLES = "samples.jsonl"
MOST_STEPS = 40  # that a run samples, evenly spaced
PROMPTS = 4  # of a sampled step
MOST_IMAGES = 4  # of a prompt
MOST_CHARACTERS = 1000  # of a text
IMAGE_PX = 192  # longer side of an image
PAGE_EVERY_S = 30.0  # between two versions of the page without a new sample


class Samples(TrainerCallback):
    """Keeps samples of a run in `samples.jsonl`, and shows them with the curves of its metrics in `samples.html`.

    The page has no script and needs no other file. It is written after the first log behind a sample, after other logs
    where the last version is older than PAGE_EVERY_S, and at the end. A resumed run drops the samples after its
    checkpoint, and draws them again.

    Args:
        folder: Folder of both files.
        every: Steps between two samples; below 1, a share of all steps of the run; 0 for no samples and no page. At
            most MOST_STEPS steps are sampled: a run of more has as many at even distances.
        rewards: Name of each reward in TRL's metrics.
        weights: Weight of each reward.
        warnings: Warnings about the run, which grow while it runs; the page shows them.
    """

    def __init__(
        self, folder: Path, every: float, rewards: Sequence[str], weights: Sequence[float], warnings: Sequence[str]
    ) -> None:
        self.file, self.page = folder / SAMPLES, folder / PAGE
        self.every, self.warnings = every, warnings
        self.weights = dict(zip(rewards, weights, strict=True))
        self._next_step: int | None = None  # first step that is sampled; None outside of training
        self._distance = 0
        self._page_time = -math.inf

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.every or not state.is_world_process_zero:
            return
        wanted = math.ceil(self.every * state.max_steps) if self.every < 1 else math.ceil(self.every)
        self._distance = max(wanted, math.ceil(state.max_steps / MOST_STEPS))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        kept = cut_records(self.file, lambda record: record["step"] <= state.global_step)
        self._next_step = kept[-1]["step"] + self._distance if kept else 1

    def is_due(self, step: int) -> bool:
        """Return whether the answers that are generated for a step are to be sampled."""
        return self._next_step is not None and step >= self._next_step

    def add(
        self,
        step: int,
        rows: Sequence[Mapping[str, Any]],
        completions: Sequence[Completion],
        rewards: Mapping[str, Sequence[float]],
        advantages: Sequence[float],
    ) -> None:
        """Keep the answers to some prompts of a step.

        Args:
            step: Number of the step, from 1.
            rows: A row for each prompt; those after the first PROMPTS are left out.
            completions: Completions in the order of the rows, equally many for each.
            rewards: For each reward its value of each completion, NaN where it does not apply.
            advantages: Advantage of each completion.
        """
        answers = len(completions) // len(rows)
        prompts = []
        for i, row in enumerate(rows[:PROMPTS]):
            of_row = range(i * answers, (i + 1) * answers)
            prompts.append(
                {
                    **_described(row),
                    "answers": [
                        {
                            "text": _shortened(text_of(completions[k])),
                            **self._scored({name: values[k] for name, values in rewards.items()}),
                            "advantage": advantages[k],
                        }
                        for k in of_row
                    ],
                }
            )
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, "prompts": prompts}) + "\n")
        self._next_step = step + self._distance
        self._page_time = -math.inf

    def _scored(self, rewards: Mapping[str, float]) -> dict[str, Any]:
        """Return each reward of an answer, None where it does not apply, and their weighted sum."""
        applied = {name: value for name, value in rewards.items() if not math.isnan(value)}
        total = sum(self.weights[name] * value for name, value in applied.items()) if applied else None
        return {"rewards": {name: applied.get(name) for name in rewards}, "reward": total}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if time.monotonic() - self._page_time >= PAGE_EVERY_S:
            self._write_page(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write_page(state)

    def _write_page(self, state: TrainerState) -> None:
        if self._next_step is None:
            return
        samples = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.is_file() else []
        page = samples_page(state.log_history, samples, list(self.weights), self.warnings, state.max_steps)
        write_whole(self.page, page.encode(errors="replace"))  # rows can hold halves of surrogate pairs
        self._page_time = time.monotonic()


def _described(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page shows of a row, in values of JSON; images are small and written as data URIs."""
    given = row.get("images") or [row.get("image")]
    images: list[Image.Image] = [image for image in given if image is not None][:MOST_IMAGES]
    mask, solution = row.get("masks"), row.get("solution")
    return {
        "id": str(row.get("id", "")),
        "images": [_image_uri(image) for image in images],
        "size": list(images[0].size) if images else None,
        "question": _shortened(text_of(row["prompt"], "user")),
        "solution": None if solution is None else _shortened(str(solution)),
        "boxes": [[float(side) for side in box] for box in row.get("boxes") or []],
        "mask": None if mask is None else data_uri(_mask_image(np.asarray(mask, bool))),
    }


def _image_uri(image: Image.Image) -> str:
    """Return an image of at most IMAGE_PX a side; one that is smaller keeps its pixels."""
    is_small = max(image.size) <= IMAGE_PX // 2
    small = image.convert("RGB")
    small.thumbnail((IMAGE_PX, IMAGE_PX))
    return data_uri(small, "PNG" if is_small else "WEBP")


def _mask_image(mask: np.ndarray) -> Image.Image:
    """Return a mask (H, W) as an image that is white and half transparent inside it, and clear outside."""
    alpha = Image.fromarray(np.where(mask, 128, 0).astype(np.uint8))
    alpha.thumbnail((IMAGE_PX, IMAGE_PX))
    image = Image.new("RGBA", alpha.size, (255, 255, 255, 0))
    image.putalpha(alpha)
    return image


def _shortened(text: str) -> str:
    left_out = len(text) - MOST_CHARACTERS
    return text if left_out <= 0 else f"{text[:MOST_CHARACTERS]}… ({left_out} more characters)"
