"""Chat formats of language models: how a conversation becomes text, and which token represents an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedTokenizerBase, ProcessorMixin

SYSTEM = "You are a helpful assistant."
# Renders the content of one message: text as it is, and an image as its token and a newline.
_CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
)


@dataclass(frozen=True)
class ChatFormat:
    """Chat format of one family of language models.

    Args:
        template: Jinja chat template for transformers' tokenizers.
        image_token: Token of the family's vocabulary that never occurs in text; it represents an image.
        turn_start: Token that opens a turn; a tokenizer that has it belongs to this family.
        turn_end: Token that closes a turn and ends the model's answer.
        markers: Texts of one token each that surround the content of a turn.
    """

    template: str
    image_token: str
    turn_start: str
    turn_end: str
    markers: tuple[str, ...]


# The paper's qwen_1_5 format. <|image_pad|> is in Qwen2.5's vocabulary, so the embedding keeps its size.
QWEN = ChatFormat(
    template=(
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        + _CONTENT.replace("IMAGE", "<|image_pad|>")
        + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    image_token="<|image_pad|>",
    turn_start="<|im_start|>",
    turn_end="<|im_end|>",
    markers=("<|im_start|>", "<|im_end|>", "\n"),
)
LLAMA3 = ChatFormat(
    template=(
        "<|begin_of_text|>{% for message in messages %}"
        "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
        + _CONTENT.replace("IMAGE", "<|reserved_special_token_0|>")
        + "<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    image_token="<|reserved_special_token_0|>",
    turn_start="<|start_header_id|>",
    turn_end="<|eot_id|>",
    markers=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "\n\n"),
)
# Gemma knows only the roles user and model.
GEMMA = ChatFormat(
    template=(
        "<bos>{% for message in messages %}"
        "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n"
        + _CONTENT.replace("IMAGE", "<unused0>")
        + "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    image_token="<unused0>",
    turn_start="<start_of_turn>",
    turn_end="<end_of_turn>",
    markers=("<start_of_turn>", "<end_of_turn>", "\n"),
)


def chat_format(tokenizer: Any) -> ChatFormat:
    """Choose the format whose turn token the tokenizer has, or Qwen's, whose tokens can be added to any tokenizer."""
    vocabulary = tokenizer.get_vocab()
    return next((chat for chat in (QWEN, LLAMA3, GEMMA) if chat.turn_start in vocabulary), QWEN)


def chat_prompt(processor: ProcessorMixin | PreTrainedTokenizerBase, question: str, images: int = 1) -> str:
    """Format one question as a prompt, up to the place where the answer begins.

    Args:
        processor: Processor or tokenizer with a chat template.
        question: The user's question.
        images: Number of images in front of the question.
    """
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    turns: Any = [{"role": "user", "content": content}]
    return cast(str, processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def answer_end(processor: ProcessorMixin) -> str:
    """Return the text that ends an answer: what the chat template writes after it, or else the tokenizer's end."""
    words = "An answer."
    turns: Any = [
        {"role": "user", "content": [{"type": "text", "text": "A question?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": words}]},
    ]
    text = processor.apply_chat_template(turns, tokenize=False)
    return text.rpartition(words)[2].strip() or str(cast(Any, processor).tokenizer.eos_token)


def markers_of(tokenizer: Any) -> list[int]:
    """Ids of the tokens around the content of turns: turn tokens, and the newline as the format writes it."""
    texts = list(chat_format(tokenizer).markers)
    return [ids[0] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] if len(ids) == 1]
