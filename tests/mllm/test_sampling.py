"""Sampled answers follow the model's probabilities, and those of a question its own seed alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pivot_hub.mllm.families import family_of
from pivot_hub.mllm.load import load_mllm
from pivot_hub.mllm.sampling import _Draws, sample_answers
from tests.mllm.tiny_mllms import make_mllm
from tests.mllm.tiny_processors import add_processor


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_token_is_drawn_as_often_as_its_probability_says(temperature: float) -> None:
    scores = torch.tensor([2.0, -torch.inf, 0.5, -1.0, 2.0])
    numbers = (torch.arange(10_000, dtype=torch.float64) + 0.5)[:, None] / 10_000
    draws = _Draws(numbers, length=3, temperature=temperature)
    left = draws(torch.zeros(10_000, 3, dtype=torch.long), scores.expand(10_000, -1))
    assert ((left == 0).sum(1) == 1).all()
    shares = torch.bincount(left.argmax(1), minlength=5) / 10_000
    assert torch.allclose(shares, (scores / temperature).softmax(0), atol=2e-4)
    assert shares[1] == 0


@pytest.fixture(scope="module", params=["llava", "llava_next", "qwen2_5_vl", "gemma3"])
def mllm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("mllm")
    make_mllm(folder, request.param)
    add_processor(folder, request.param)
    model, processor = load_mllm(folder)
    model.generation_config.eos_token_id = list(range(250, 320))  # a random model seldom draws its one end
    return model, processor


def test_the_answers_to_a_question_are_the_same_in_any_company(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    pixels = np.random.default_rng(0).integers(0, 255, (84, 168, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    images = [image, image.rotate(90, expand=True), image]
    questions, seeds = ["Which?", "Which of them?", "Which?"], [3, 2**100, 4]
    state = torch.get_rng_state()
    together = sample_answers(model, processor, questions, images, seeds, answers=3, max_tokens=8)
    assert torch.equal(torch.get_rng_state(), state)
    for order in ([0], [1], [2], [2, 1], [1, 0, 2]):
        some = sample_answers(
            model,
            processor,
            [questions[i] for i in order],
            [images[i] for i in order],
            [seeds[i] for i in order],
            answers=3,
            max_tokens=8,
        )
        assert some == [together[i] for i in order]
    assert together[0] != together[2]  # the same question with another seed
    assert any(text for texts in together for text in texts)


def test_answers_end_and_hold_no_token_of_an_image(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    image_token = family_of(model.config).image_token_id(model.config)
    placeholder = processor.tokenizer.convert_ids_to_tokens(image_token)
    images = [Image.new("RGB", (84, 84))]
    texts = sample_answers(model, processor, ["Which?"], images, [0], answers=60, max_tokens=4)[0]
    assert {text is None for text in texts} == {True, False}
    assert not any(placeholder in text for text in texts if text)
