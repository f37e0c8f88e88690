"""Processors without a video processor: what is saved of it, and what loader processes get."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from transformers.utils.import_utils import is_torchvision_available

from pivot_hub.mllm.inputs import placeholder_of, process
from pivot_hub.mllm.processor import VIDEO, VIDEO_FILE, load_processor
from tests.mllm.tiny_mllms import make_mllm
from tests.mllm.tiny_processors import add_processor

pytestmark = pytest.mark.skipif(is_torchvision_available(), reason="torchvision is here: processors read videos")


@pytest.mark.parametrize("beside", [True, False], ids=["file of its own", "in the processor's file"])
def test_settings_of_a_video_processor_stay_with_a_processor_without_one(beside: bool, tmp_path: Path) -> None:
    make_mllm(tmp_path / "mllm", "qwen3_vl")
    add_processor(tmp_path / "mllm", "qwen3_vl")
    settings = {"video_processor_type": "Qwen3VLVideoProcessor", "fps": 2}
    if beside:
        (tmp_path / "mllm" / VIDEO_FILE).write_text(json.dumps(settings))
    else:
        file = tmp_path / "mllm" / "processor_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), VIDEO: settings}))
    load_processor(tmp_path / "mllm").save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "processor_config.json").read_text())[VIDEO] == settings


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl", "smolvlm"])
def test_a_processor_can_be_sent_to_another_process(name: str, tmp_path: Path) -> None:
    make_mllm(tmp_path, name)
    processor: Any = add_processor(tmp_path, name)
    sent = pickle.loads(pickle.dumps(processor))
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]
    text = processor.apply_chat_template(turns, tokenize=False)
    image = Image.new("RGB", (60, 40), (9, 90, 200))
    expected, actual = process(processor, text, [image]), process(sent, text, [image])
    assert actual.ids == expected.ids
    assert all((actual.images[key] == value).all() for key, value in expected.images.items())


@pytest.mark.parametrize("written", ["<start>", "<image>"])
def test_the_placeholder_of_an_image_is_the_one_that_the_chat_template_writes(written: str) -> None:
    """Gemma 3's template writes the first token of an image, Gemma 4's the one that is repeated."""
    processor: Any = SimpleNamespace(boi_token="<start>", image_token="<image>", chat_template=f"User: {written}")
    assert placeholder_of(processor) == written
