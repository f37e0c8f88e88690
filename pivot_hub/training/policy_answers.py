"""An MLLM answers the questions of `data.pairs`, and the rewards say what its answers mean."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from pivot_hub.data.choices import plain
from pivot_hub.data.image import open_image
from pivot_hub.data.pairs.on_policy import PolicyAnswer, PolicyQuestion
from pivot_hub.encoder.device import compute_device
from pivot_hub.encoder.encode import DTYPES
from pivot_hub.errors import DataError
from pivot_hub.mllm.load import load_mllm
from pivot_hub.mllm.sampling import sample_answers
from pivot_hub.provenance import hub_commit, weights_sha256
from pivot_hub.training.rewards import count, exact_match
from pivot_hub.training.rewards.count import number_in

MAX_TOKENS = 32  # of an answer; a longer one is read as nothing


class MllmPolicy:
    """An MLLM of any family of `mllm/families.py`, as `data.pairs.write_pairs` takes it.

    Args:
        name: Folder or Hub name of the MLLM.
        samples: Number of answers to each question.
        temperature: Temperature of the answers.
        batch: Number of questions in one forward pass.
        dtype: float32, float16 or bfloat16.

    Raises:
        DataError: A value is out of range.
        CheckpointError: It is not an MLLM, or its weights are incomplete.
    """

    def __init__(
        self, name: str, samples: int = 8, temperature: float = 1.0, batch: int = 4, dtype: str = "float32"
    ) -> None:
        if samples < 2:
            raise DataError(f"--samples is {samples}; give 2 or more, for a right and a wrong answer.")
        if not (0 < temperature < math.inf):
            raise DataError(f"--temperature is {temperature:g}; give a number above 0, as 1.")
        if batch < 1:
            raise DataError(f"--batch is {batch}; give 1 or more questions.")
        if dtype not in DTYPES:
            raise DataError(f"--dtype is {dtype!r}; give one of {', '.join(DTYPES)}.")
        self.name, self.samples, self.temperature, self.batch, self.dtype = name, samples, temperature, batch, dtype
        model, self.processor = load_mllm(name)
        module: Any = model  # transformers types `to` as for one argument
        self.model = module.to(compute_device(), DTYPES[dtype])

    def metadata(self) -> dict[str, Any]:
        """Return the MLLM's name without a path, the hash of its weights, and how it answers."""
        path, commit = Path(self.name), None
        if not path.is_dir():
            config = try_to_load_from_cache(self.name, "config.json")
            path = Path(str(config)).parent
            commit = hub_commit(path)
        return {
            "name": path.resolve().name if commit is None else self.name,
            "commit": commit,
            "weights_sha256": weights_sha256(path),
            "samples": self.samples,
            "temperature": self.temperature,
            "max_tokens": MAX_TOKENS,
            "dtype": self.dtype,
        }

    def answers(self, questions: Sequence[PolicyQuestion]) -> Iterator[list[PolicyAnswer]]:
        """Yield the answers to each question; those of a question do not depend on the others, up to rounding."""
        for start in range(0, len(questions), self.batch):
            part = questions[start : start + self.batch]
            sampled = sample_answers(
                self.model,
                self.processor,
                [question.text for question in part],
                [open_image(question.file, question.file.name) for question in part],
                [question.seed for question in part],
                self.samples,
                self.temperature,
                MAX_TOKENS,
            )
            for question, texts in zip(part, sampled, strict=True):
                yield [PolicyAnswer(text or "", meaning_of(question, text) if text else None) for text in texts]


def meaning_of(question: PolicyQuestion, answer: str) -> str | None:
    """Return what an answer means: the first form of the right answer or of a wrong one, another number, or its words.

    Returns:
        None where that is not certain: of an answer that is none of the known ones, or has no number or several, or
        whose words hold the right ones or are a part of them.
    """
    right = question.right[0]
    if question.reading == "number":
        if count([answer], solution=[right], kind=["count"]) == [1.0]:
            return right
        number = number_in(answer)
        return None if number is None else str(number)
    if _is(answer, question.right, question.text):
        return right
    if question.reading == "forms":
        return next((forms[0] for forms in question.wrong if _is(answer, forms, question.text)), None)
    words, known = f" {plain(answer)} ", f" {plain(right)} "
    return None if not words.strip() or known in words or words in known else words.strip()


def _is(answer: str, forms: Sequence[str], question: str) -> bool:
    """Return whether `rewards.exact_match` rewards an answer for one of several forms."""
    rows = len(forms)
    return 1.0 in exact_match([answer] * rows, solution=list(forms), prompts=[question] * rows)
