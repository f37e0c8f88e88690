"""Stage language: a small Qwen2 with a byte-level BPE tokenizer, trained on text of the synthetic Shapes dataset.

It has the role of Qwen2.5 in the paper. It learns the chat format and answers questions about a scene that is given
as text: sentences, or a scan with one word for each cell of a grid. An MLLM then only has to learn to read image
tokens in place of these words.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from pivot_hub.config.data_section import ShapesData
from pivot_hub.config.recipe import LoadedRecipe
from pivot_hub.data.report import RowReport
from pivot_hub.data.source import ShapesSource
from pivot_hub.data.synthetic import DESCRIBE, KINDS, SCAN_SIDE
from pivot_hub.errors import RecipeError
from pivot_hub.mllm.chat_templates import QWEN, SYSTEM

END = "<|endoftext|>"
SPECIAL = [END, QWEN.turn_start, QWEN.turn_end, QWEN.image_token]  # Qwen2.5's names


def build_trainer(
    loaded: LoadedRecipe,
    args: SFTConfig,
    parent: Path | None,
    report: RowReport,
    callbacks: list[TrainerCallback],
) -> SFTTrainer:
    """Build the trainer of a language recipe: TRL's SFTTrainer on text alone.

    Args:
        loaded: The recipe.
        args: Config of the trainer.
        parent: None: a base part has no parent.
        report: Report that receives the number of rows.
        callbacks: Callbacks of the trainer.

    Raises:
        RecipeError: The architecture has a setting that Qwen2Config does not know, or sizes that do not fit together.
    """
    recipe = loaded.recipe
    assert recipe.architecture is not None
    specs = [spec for spec in recipe.data if isinstance(spec, ShapesData)]
    rows = [row for spec in specs for row in conversations(ShapesSource(spec))]
    report.rows = len(rows)
    texts = (turn["content"] for row in rows for turns in row.values() for turn in turns)
    tokenizer = train_tokenizer(texts, recipe.tokenizer_size or 512)
    torch.manual_seed(recipe.seed)
    try:
        config = Qwen2Config(
            **recipe.architecture,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.convert_tokens_to_ids(QWEN.turn_end),
            bos_token_id=None,
        )
        model = Qwen2ForCausalLM(config)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{loaded.path}: `architecture` does not give a Qwen2 model: {error}") from error
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def conversations(source: ShapesSource) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Yield one question and answer per scene, with the scene as text in place of its image.

    Two thirds of the scenes are given as a scan and one third as a description in sentences. A quarter of the requests
    ask for a description; the others are questions, of each kind in turn.
    """
    spec, dataset = source.spec, source.dataset
    for i in range(spec.start, spec.start + spec.rows):
        scene, rng = dataset.scene(spec.split, i), dataset.scene_rng(spec.split, i, 2)
        question = scene.question(KINDS[i % 5], rng)  # drawn for every scene, so that the random draws keep their order
        asks_for_description = i // 5 % 4 == 0
        request, answer = (DESCRIBE, scene.caption()) if asks_for_description else (question.text, question.answer)
        scene_text = scene.caption() if i // 20 % 3 == 0 else scene.scan(SCAN_SIDE, rng)
        yield {
            "prompt": [{"role": "user", "content": f"{scene_text}\n{request}"}],
            "completion": [{"role": "assistant", "content": answer}],
        }


def train_tokenizer(texts: Iterator[str], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with Qwen2.5's special tokens and chat format.

    Args:
        texts: Texts to train on.
        size: Number of tokens of the vocabulary.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The roles and the system prompt of the chat format are text too.
    bpe.train_from_iterator([*texts, *[f"system\n{SYSTEM}\nuser\nassistant\n"] * 50], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=QWEN.turn_end,
        pad_token=END,
        additional_special_tokens=SPECIAL,
        chat_template=QWEN.template,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
