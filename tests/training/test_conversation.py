"""Conversations as tokens: equal to TRL's where TRL supports them, with the loss of the paper's authors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast, SiglipImageProcessorPil
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from pivot_hub.config.recipe import load_recipe
from pivot_hub.data.index import index_rows
from pivot_hub.data.llava import parse_conversation
from pivot_hub.data.row import ImageSize, Row
from pivot_hub.data.source import Columns, example
from pivot_hub.errors import DataError
from pivot_hub.mllm.build import build_mllm
from pivot_hub.mllm.chat_templates import GEMMA, LLAMA3, QWEN, ChatFormat, chat_format, markers_of
from pivot_hub.training.conversation import ConversationCollator, segments
from pivot_hub.training.row_check import RowCheck

TURNS = [
    {"from": "human", "value": "<image>\nWhat is it?\nOne word."},
    {"from": "gpt", "value": "a star"},
    {"from": "human", "value": "Where? "},
    {"from": "gpt", "value": "on the left\n"},
]


def processor_of(chat: ChatFormat) -> LlavaProcessor:
    """A processor for images of four tokens, whose tokens are single characters and a chat format's markers."""
    marks = [m for m in (*chat.markers, chat.image_token, chat.turn_start, chat.turn_end) if len(m) > 2]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({t: i for i, t in enumerate([*letters, "ĊĊ"])}, [("Ċ", "Ċ")]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token=chat.turn_end)
    tokenizer.add_special_tokens({"extra_special_tokens": sorted({*marks, "<bos>"})})
    return processor_with(tokenizer, chat)


def processor_with(tokenizer: Any, chat: ChatFormat) -> LlavaProcessor:
    """A processor for images of four tokens."""
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        image_token=chat.image_token,
        chat_template=chat.template,
    )


def row_of(turns: list[dict[str, str]], image: str | None = "a.jpg") -> Row:
    row = parse_conversation("a:1", {"image": image, "conversations": turns})
    assert isinstance(row, Row)
    return row


def collated(processor: LlavaProcessor, row: Row, columns: Columns = "conversation", **options: Any) -> dict[str, Any]:
    images = [] if row.image is None else [Image.new("RGB", (40, 30), "red")]
    return ConversationCollator(processor, **options)([example(images, row, columns, processor.image_token)])


def learnt(processor: LlavaProcessor, batch: dict[str, Any]) -> str:
    """Return the text of the tokens that the loss is on, with one bar for each run of other tokens."""
    tokenizer: Any = processor.tokenizer
    text, bar = "", False
    for token in batch["labels"][0].tolist():
        if token >= 0:
            text += tokenizer.decode([token], skip_special_tokens=False)
        elif not bar:
            text += "|"
        bar = token < 0
    return text


@pytest.mark.parametrize(
    ("stage", "columns"), [("1-align", "plain"), ("2-instruct", "conversation"), ("3-sft", "conversation")]
)
def test_batches_of_single_answers_are_trls_own(recipes: Path, parts: Path, stage: str, columns: Columns) -> None:
    processor: Any = build_mllm(str(parts / "vision"), str(parts / "language"))[1]
    check = RowCheck(processor, 70, columns, pairs=False)
    rows = index_rows(load_recipe(recipes / f"{stage}.yaml", ["data.0.rows=12"]), check)
    examples = [rows.as_dataset(columns, processor.image_token)[i] for i in range(len(rows.table))]
    ours = ConversationCollator(processor, 70)(examples)
    assert ours.pop("row") == list(range(12))
    if columns == "conversation":
        split = [(e["images"], e["messages"][:-1], e["messages"][-1:]) for e in examples]
        examples = [{"images": i, "prompt": p, "completion": c} for i, p, c in split]
    theirs = DataCollatorForVisionLanguageModeling(processor, 70, completion_only_loss=True)(examples)
    assert ours.keys() == theirs.keys()
    assert ours["input_ids"].shape[1] <= 70
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def test_every_answer_of_a_conversation_is_learnt_and_nothing_else() -> None:
    processor = processor_of(QWEN)
    assert learnt(processor, collated(processor, row_of(TURNS))) == "|a star<|im_end|>\n|on the left\n<|im_end|>\n"


def test_llava_nexts_labels_are_its_code() -> None:
    """As in preprocess_qwen: answers with their header, and <|im_start|>, <|im_end|> and newlines everywhere."""
    processor = processor_of(QWEN)
    batch = collated(processor, row_of(TURNS), labels="llava_next")
    assert learnt(processor, batch) == (
        "<|im_start|>|\n|<|im_end|>\n"  # system
        "<|im_start|>|\n|\n|\n|<|im_end|>\n"  # after the role, the image and the question's first line
        "<|im_start|>assistant\na star<|im_end|>\n"
        "<|im_start|>|\n|<|im_end|>\n"
        "<|im_start|>assistant\non the left\n<|im_end|>\n"
    )


@pytest.mark.parametrize("labels", [None, "llava_next"])
def test_rows_have_the_same_labels_and_weights_one_after_the_other_as_padded(labels: Any) -> None:
    """The first token of a row, which nothing predicts, is not predicted from the row before it."""
    processor = processor_of(QWEN)
    images = [Image.new("RGB", (40, 30), "red")]
    rows = [example(images, row_of(turns), "conversation", "") for turns in (TURNS, TURNS[:2], TURNS)]
    padded = ConversationCollator(processor, labels=labels, weigh_rows=True)(rows)
    one_row = ConversationCollator(processor, None, labels, lambda text: torch.arange(len(text.ids))[None], True)(rows)
    for batch in (padded, one_row):
        assert float(batch["label_weights"][:, 1:].sum()) == pytest.approx(3)
    predicted = [int((batch["labels"][:, 1:] != -100).sum()) for batch in (padded, one_row)]
    assert predicted[0] == predicted[1]


def test_the_plain_format_is_image_then_caption() -> None:
    processor = processor_of(QWEN)
    batch = collated(processor, row_of([{"from": "human", "value": "Say.\n<image>"}, TURNS[1]]), "plain")
    image = processor.image_token_id
    assert batch["input_ids"][0, :4].tolist() == [image] * 4
    assert learnt(processor, batch) == "|a star\n"


@pytest.mark.parametrize("chat", [QWEN, LLAMA3, GEMMA], ids=["qwen", "llama3", "gemma"])
def test_each_family_of_language_models_has_its_own_turns(chat: ChatFormat) -> None:
    processor = processor_of(chat)
    assert chat_format(processor.tokenizer) is chat
    assert len(markers_of(processor.tokenizer)) == len(chat.markers)
    row = row_of(TURNS)
    messages = example([], row, "conversation", processor.image_token)["messages"]
    whole = processor.apply_chat_template(messages, tokenize=False)
    pieces = segments(processor, messages)
    assert "".join(p.text for p in pieces) == whole
    assert [p.text.replace(chat.turn_end, "").rstrip("\n") for p in pieces if p.answer] == ["a star", "on the left"]
    assert all(p.text.startswith(chat.turn_start) for p in pieces if p.header)
    assert learnt(processor, collated(processor, row)).startswith(f"|a star{chat.turn_end}")


def test_rows_with_and_without_an_image_share_a_batch() -> None:
    processor = processor_of(QWEN)
    rows = [row_of(TURNS), row_of([{"from": "human", "value": "Hi"}, TURNS[1]], None)]
    images: list[list[Image.Image]] = [[Image.new("RGB", (8, 8))], []]
    examples = [example(i, r, "conversation", processor.image_token) for i, r in zip(images, rows, strict=True)]
    batch = ConversationCollator(processor)(examples)
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [4, 0]
    assert "pixel_values" not in ConversationCollator(processor)(examples[1:])


def test_a_row_with_another_number_of_images_is_refused() -> None:
    processor = processor_of(QWEN)
    columns = example([], row_of(TURNS), "conversation", processor.image_token)
    with pytest.raises(DataError, match="another number of images"):
        ConversationCollator(processor)([columns])


def test_the_check_counts_the_tokens_of_the_collator() -> None:
    processor = processor_of(QWEN)
    rows = [row_of(TURNS), row_of(TURNS[:2]), row_of([{"from": "human", "value": "Hi"}, TURNS[1]], None)]
    forms: tuple[Columns, ...] = ("plain", "conversation")
    for columns in forms:
        check = RowCheck(processor, None, columns, pairs=False)
        sizes = [None if row.image is None else ImageSize(30, 40) for row in rows]
        for row, measured in zip(rows, check(rows, sizes), strict=True):
            if measured.problem:
                assert (columns, measured.problem[0]) == ("plain", "no image")
                continue
            batch = collated(processor, row, columns)
            images = int((batch["input_ids"] == processor.image_token_id).sum())
            assert batch["input_ids"].shape[1] - images == measured.prompt_tokens + measured.answer_tokens
            assert int((batch["labels"] >= 0).sum()) == measured.answer_tokens
    cut = RowCheck(processor, 128, "conversation", pairs=False)(rows[:1], [ImageSize(30, 40)])[0]
    assert cut.answer_cut
    assert collated(processor, rows[0], max_length=128)["input_ids"].shape[1] == 128


def test_text_that_holds_the_image_token_is_refused() -> None:
    processor = processor_of(QWEN)
    row = row_of([{"from": "human", "value": "<|image_pad|>"}, TURNS[1]])
    check = RowCheck(processor, None, "conversation", pairs=False)
    assert "stands for images" in check([row], [ImageSize(30, 40)])[0].problem[1]  # type: ignore[index]


def test_an_image_behind_a_cut_answer_is_refused_before_training_and_in_it() -> None:
    """Its tokens would be cut off while the model still gets its pixels."""
    processor = processor_of(QWEN)
    late = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "a star " * 30}, *TURNS]
    row = row_of(late)
    assert collated(processor, row)["pixel_values"].shape[0] == 1
    check = RowCheck(processor, 100, "conversation", pairs=False)([row], [ImageSize(30, 40)])[0]
    assert check.problem is not None
    assert "its image is shown behind an answer, and max_length 100 may cut it off" in check.problem[1]
    with pytest.raises(DataError, match=r"a row's image lies behind max_length 100.*; raise max_length"):
        collated(processor, row, max_length=100)


def test_a_row_that_the_chat_template_refuses_is_a_bad_row() -> None:
    """As Gemma's, whose roles must alternate. Other rows are checked all the same."""
    processor = processor_of(QWEN)
    refuse = "{% if messages|length > 2 %}{{ raise_exception('Roles must alternate.') }}{% endif %}"
    assert isinstance(processor.chat_template, str)
    processor.chat_template = refuse + processor.chat_template
    check = RowCheck(processor, None, "conversation", pairs=False)
    long, short = check([row_of(TURNS), row_of(TURNS[:2])], [ImageSize(30, 40)] * 2)
    assert long.problem == ("chat template", "the MLLM's chat template does not take it: Roles must alternate.")
    assert short.problem is None
    assert short.prompt_tokens > 0
