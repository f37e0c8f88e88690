"""What MLLMs make of an image, planned from their configs, compared with transformers' own processors."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    GotOcr2ImageProcessorPil,
    LlavaOnevisionImageProcessorPil,
    Qwen2VLImageProcessorPil,
    SmolVLMImageProcessorPil,
)

from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.published_configs import meta_model, whole_config
from pivot_hub.planner.image_inputs import HEIGHT_PX, WIDTH_PX, PlannedImage, planned_image
from tests.mllm.tiny_mllms import TINY

SIZE = (HEIGHT_PX, WIDTH_PX)
QWEN, QWEN3, ONEVISION = (
    "Qwen/Qwen2.5-VL-3B-Instruct",
    "Qwen/Qwen3-VL-4B-Instruct",
    "llava-hf/llava-onevision-qwen2-7b-ov-hf",
)
INTERNVL, SMOLVLM, GEMMA = "OpenGVLab/InternVL3-2B-hf", "HuggingFaceTB/SmolVLM2-2.2B-Instruct", "google/gemma-3-4b-it"


@lru_cache
def image_of(name: str, tokens: int | None = None) -> PlannedImage:
    return planned_image(meta_model(whole_config(name)), tokens)


def leading(image: PlannedImage) -> tuple[int, ...]:
    """Sizes of the pixels of one image, without those of a patch or a square."""
    shape = image.inputs(1, torch.float32)["pixel_values"].shape
    return tuple(shape[: 1 if len(shape) == 2 else -3])


def test_an_image_becomes_the_patches_and_squares_that_the_processors_make() -> None:
    """The settings are those of the published preprocessor_config.json."""
    for name, patch in ((QWEN, 14), (QWEN3, 16)):
        processor: Any = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2)
        assert leading(image_of(name)) == (processor.get_number_of_image_patches(*SIZE),)
    internvl: Any = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, crop_to_patches=True)
    assert leading(image_of(INTERNVL)) == (internvl.get_number_of_image_patches(*SIZE),)
    smolvlm: Any = SmolVLMImageProcessorPil(size={"longest_edge": 1536}, max_image_size={"longest_edge": 384})
    assert leading(image_of(SMOLVLM)) == (1, smolvlm.get_number_of_image_patches(*SIZE)[0])
    black = torch.zeros(3, *SIZE, dtype=torch.uint8).numpy()
    onevision: Any = LlavaOnevisionImageProcessorPil()(black, return_tensors="pt")
    assert leading(image_of(ONEVISION)) == tuple(onevision["pixel_values"].shape[:2])
    assert leading(image_of(GEMMA)) == (1,)


def test_features_of_an_image_of_640_by_480_pixels() -> None:
    """By hand: patches over merged ones; 13 squares; LLaVA-OneVision's 27*27, and 40 lines of 54 and a line's end."""
    expected = {QWEN: 23 * 17, QWEN3: 20 * 15, INTERNVL: 13 * 256, SMOLVLM: 13 * 81, GEMMA: 256}
    expected[ONEVISION] = 27 * 27 + 40 * (54 + 1)
    assert {name: image_of(name).features for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "tokens", "features"),
    [(QWEN, 1000, 27 * 37), (INTERNVL, 770, 3 * 256), (ONEVISION, 2929, 2929), (GEMMA, 260, 256), (GEMMA, 3, 256)],
)
def test_a_given_number_of_tokens_is_an_image_and_text_around_it(name: str, tokens: int, features: int) -> None:
    image = image_of(name, tokens)
    assert (image.features, image.tokens) == (features, max(tokens, features))
    assert image.assumption.startswith(f"images of {tokens} tokens, each ")


def test_an_mllm_that_is_not_planned_is_named() -> None:
    tiny = TINY["mistral3"]
    config_class: Any = CONFIG_MAPPING[tiny.model_type]
    config = config_class(vision_config=tiny.vision, text_config=tiny.text, **tiny.further)
    with pytest.raises(CheckpointError, match=r"does not know what Mistral 3 makes of an image; it plans .*Gemma"):
        planned_image(meta_model(config), None)
