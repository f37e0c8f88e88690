"""Fixtures of all tests: an isolated Hub cache, one thread, and the parts and recipes of a tiny MLLM."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

_HOME = tempfile.mkdtemp(prefix="pivot-test-hf-")
os.environ["HF_HOME"] = _HOME
os.environ["HF_HUB_OFFLINE"] = "1"
# This holds for the processes that tests start too: with another number of threads, sums differ in their last bits.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest  # noqa: E402  (the environment is set before any library reads it)
import torch  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from pivot_hub.data.synthetic import ShapesDataset  # noqa: E402
from pivot_hub.training.language import train_tokenizer  # noqa: E402
from pivot_hub.training.stage import run_lineage  # noqa: E402
from tests.encoder.originals import IMAGE_PX, make_vision  # noqa: E402


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker in {"slow", "nightly"} - set(re.findall(r"\w+", str(config.option.markexpr))):
        for item in items:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"long, and covered in part by others: make {marker}"))


def pytest_sessionfinish() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)


def make_language(folder: Path) -> Path:
    """Save a small random Qwen2 with a tokenizer trained on captions of the synthetic Shapes dataset.

    Args:
        folder: Folder that the model and the tokenizer are saved to.

    Returns:
        The same folder.
    """
    dataset = ShapesDataset()
    tokenizer = train_tokenizer((dataset.scene("train", i).caption() for i in range(200)), 400)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


RECIPE_TAIL = """
args:
  num_train_epochs: 1
  per_device_train_batch_size: 4
  max_length: 256
  gradient_checkpointing: false
  logging_steps: 1
"""
DATASET_KEYS = f"world: {{image_px: {IMAGE_PX}}}"
RECIPES = {
    "1-align": "stage: align\n"
    "model: {vision: base/vision, language: base/language, feature_layer: -2}\n"
    "learning_rate: {projector: 1.0e-2}\n"
    f"data: [{{format: shapes, content: captions, rows: 8, {DATASET_KEYS}}}]\n",
    "2-instruct": "stage: instruct\nparent: 1-align.yaml\n"
    "learning_rate: {vision: 1.0e-3, projector: 1.0e-2, language: 1.0e-3}\n"
    f"data: [{{format: shapes, content: instruct, rows: 8, {DATASET_KEYS}}}]\n",
    "3-sft": "stage: sft\nparent: 2-instruct.yaml\n"
    "learning_rate: {vision: 1.0e-3, projector: 1.0e-3, language: 1.0e-3}\n"
    f"data: [{{format: shapes, content: pairs, rows: 8, {DATASET_KEYS}}}]\n",
    "3-dpo": "stage: dpo\nparent: 2-instruct.yaml\n"
    "learning_rate: {vision: 1.0e-3, projector: 1.0e-3, language: 1.0e-3}\n"
    f"data: [{{format: shapes, content: pairs, rows: 8, {DATASET_KEYS}}}]\n",
}


def write_recipes(folder: Path) -> Path:
    """Write the tiny MLLM's recipes into a folder, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text + RECIPE_TAIL)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a small random encoder in `vision` and a small random language model in `language`."""
    folder = tmp_path_factory.mktemp("parts")
    make_vision(folder / "vision")
    make_language(folder / "language")
    return folder


@pytest.fixture(scope="session")
def recipes(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny MLLM's recipe folder, `tiny/`, with its parts in `base/`."""
    folder = write_recipes(tmp_path_factory.mktemp("recipes") / "tiny")
    shutil.copytree(parts, folder / "base")
    return folder


@pytest.fixture(scope="session")
def trained(recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny MLLM's folder of finished stages, a folder for each of the four recipes."""
    runs = tmp_path_factory.mktemp("runs")
    for branch in ("3-sft", "3-dpo"):
        run_lineage(recipes / f"{branch}.yaml", runs, log=lambda line: None)
    return runs / "tiny"


@pytest.fixture
def own_recipes(recipes: Path, tmp_path: Path) -> Path:
    """A copy of the recipe folder that a test may change."""
    folder = tmp_path / "tiny"
    shutil.copytree(recipes, folder)
    return folder
