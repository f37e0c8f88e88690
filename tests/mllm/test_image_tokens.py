"""The number of an image's tokens is counted from its size as each family's processor prepares it."""

from __future__ import annotations

from typing import Any, cast

import pytest
from PIL import Image
from transformers import ProcessorMixin

from pivot_hub.data.row import ImageSize, Row
from pivot_hub.data.source import example
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.image_tokens import ImageTokens
from pivot_hub.mllm.inputs import process
from pivot_hub.mllm.processor import load_processor
from pivot_hub.training.conversation import segments
from pivot_hub.training.row_check import RowCheck
from tests.mllm.tiny_mllms import make_mllm
from tests.mllm.tiny_processors import PROCESSORS, add_processor

# Other sizes than those on which a processor's own counts are tried; the last is of one pixel a side.
SIZES = [ImageSize(*size) for size in ((64, 64), (40, 200), (300, 90), (700, 800), (1, 1))]
# Families whose processors do not compute the count, or leave out the markers around an image.
PREPARED = {"smolvlm", "gemma3"}
NEED_TORCHVISION = {"mistral3", "glm4v"}


@pytest.fixture(scope="module", params=sorted(PROCESSORS.keys() - NEED_TORCHVISION))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def processor(family: str, tmp_path_factory: pytest.TempPathFactory) -> ProcessorMixin:
    folder = tmp_path_factory.mktemp("processor")
    make_mllm(folder, family)
    add_processor(folder, family)
    return load_processor(folder)


@pytest.fixture(scope="module")
def check(processor: ProcessorMixin) -> RowCheck:
    return RowCheck(processor, None, "conversation", pairs=True)


def row_of(prompt: str = "<image>\nWhat is it?", chosen: str = "A star.", rejected: str = "A moon.") -> Row:
    return Row("a:1", "a.png", prompt, chosen, rejected)


def test_counts_are_those_of_prepared_rows(family: str, processor: ProcessorMixin, check: RowCheck) -> None:
    assert check.images.computes == (family not in PREPARED)
    row = row_of()
    for size in SIZES:
        image = Image.new("RGB", (size.width, size.height), "red")
        columns = example([image], row, "conversation", check.images.placeholder)
        text = "".join(segment.text for segment in segments(cast(Any, processor), columns["messages"]))
        tokens = len(process(processor, text, [image]).ids)
        result = check([row], [size])[0]
        assert result.image_tokens == check.images.count(*size)
        assert tokens == result.prompt_tokens + result.answer_tokens + result.image_tokens
        before_answer = tokens - result.answer_tokens
        limits = [before_answer, before_answer + 1, tokens - 1, tokens]
        limited = [problem_and_cut(check, row, size, limit) for limit in limits]
        assert limited == [("too long", False), (None, True), (None, True), (None, False)]


def problem_and_cut(check: RowCheck, row: Row, size: ImageSize, max_length: int) -> tuple[str | None, bool]:
    """Return the kind of a row's problem under a limit, and whether its answer is cut."""
    check.max_length = max_length
    result = check([row], [size])[0]
    check.max_length = None
    return result.problem and result.problem[0], result.answer_cut


@pytest.mark.parametrize("place", ["prompt", "chosen", "rejected"])
def test_text_with_the_token_of_an_image_is_refused(processor: Any, check: RowCheck, place: str) -> None:
    for token in {check.images.placeholder, processor.image_token, getattr(processor, "video_token", None)} - {None}:
        result = check([row_of(**{place: f"What is {token}?"})], [ImageSize(64, 64)])[0]
        # Every `<image>` of a question is a tag of the row's format, which is replaced by the image.
        expected = None if (place, token) == ("prompt", "<image>") else "image token"
        assert (result.problem and result.problem[0]) == expected


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_an_image_that_the_processor_refuses_is_a_bad_row(check: RowCheck) -> None:
    problem = check([row_of()], [ImageSize(5, 2000)])[0].problem
    assert problem == (
        "image size",
        "the MLLM takes no image of 2000x5 pixels: absolute aspect ratio must be smaller than 200, got 400.0",
    )


def test_a_processor_without_a_chat_template_is_refused(processor: Any) -> None:
    template, processor.chat_template = processor.chat_template, None
    try:
        with pytest.raises(CheckpointError, match="has no chat template"):
            ImageTokens(processor)
    finally:
        processor.chat_template = template
