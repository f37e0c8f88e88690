"""Chat formats of language heads: how a conversation becomes text, and which token stands for an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SYSTEM = "You are a helpful assistant."
# The parts of a message; an image is its token and a newline.
_CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
)


@dataclass(frozen=True)
class ChatFormat:
    """The format of one family of language heads.

    Args:
        template: Jinja, as transformers' tokenizers take it.
        image_token: a token that the family's vocabulary has and text never holds.
        turn_start: opens a turn; a vocabulary that has it is of this family.
        turn_end: closes a turn, and ends what the model says.
        markers: texts of one token each around what is said.
    """

    template: str
    image_token: str
    turn_start: str
    turn_end: str
    markers: tuple[str, ...]


# The paper's qwen_1_5. <|image_pad|> is a token of Qwen2.5's vocabulary, so its embedding keeps its size.
QWEN = ChatFormat(
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    + _CONTENT.replace("IMAGE", "<|image_pad|>")
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "<|image_pad|>",
    "<|im_start|>",
    "<|im_end|>",
    ("<|im_start|>", "<|im_end|>", "\n"),
)
LLAMA3 = ChatFormat(
    "<|begin_of_text|>{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    + _CONTENT.replace("IMAGE", "<|reserved_special_token_0|>")
    + "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "<|reserved_special_token_0|>",
    "<|start_header_id|>",
    "<|eot_id|>",
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "\n\n"),
)
# Gemma knows the roles user and model only.
GEMMA = ChatFormat(
    "<bos>{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n"
    + _CONTENT.replace("IMAGE", "<unused0>")
    + "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "<unused0>",
    "<start_of_turn>",
    "<end_of_turn>",
    ("<start_of_turn>", "<end_of_turn>", "\n"),
)


def chat_format(tokenizer: Any) -> ChatFormat:
    """The format whose turns a tokenizer knows; Qwen's, whose tokens can be added, where it knows none."""
    known = tokenizer.get_vocab()
    return next((f for f in (QWEN, LLAMA3, GEMMA) if f.turn_start in known), QWEN)


def markers_of(tokenizer: Any) -> list[int]:
    """Ids of the tokens around what is said: turn marks, and the newline as the format writes it."""
    texts = list(chat_format(tokenizer).markers)
    return [ids[0] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] if len(ids) == 1]
