"""Conversations: LLaVA's rows of `id, image, conversations`, turns from `human` and `gpt`, and chat messages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pivot_hub.data.row import Row, image_name
from pivot_hub.errors import DataError, shown, shown_text

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def parse_conversation(name: str, record: dict[str, Any]) -> Row | DataError:
    """Parse a conversation to one row with all of its answers; turns after the last answer are dropped.

    Args:
        name: Name of the row, for the error message.
        record: Record with `conversations` or `messages`.
    """
    messages = record.get("conversations") or record.get("messages")
    if not isinstance(messages, list) or not messages:
        return DataError(f"{name}: `conversations` is missing or empty")
    turns = parse_turns(name, messages)
    if isinstance(turns, DataError):
        return turns
    # As in LLaVA, a conversation begins with the user: assistant turns before that are dropped.
    while turns and turns[0][0] == "assistant":
        turns = turns[1:]
    while turns and turns[-1][0] != "assistant":
        turns = turns[:-1]
    if len(turns) < 2:
        return DataError(f"{name}: a conversation needs a human turn and then a gpt turn")
    image = image_name(record, name, "image", "images")
    if isinstance(image, DataError):
        return image
    return Row(name, image, turns[-2][1], turns[-1][1], earlier=tuple(turns[:-2]))


def parse_questions(name: str, record: dict[str, Any], answer_words: int) -> list[Row] | DataError:
    """Parse a conversation to a row for each question with a short answer, which follows the turns before it.

    Args:
        name: Name of the row, for the error message.
        record: Record with `conversations` or `messages`.
        answer_words: Largest number of words of a short answer.

    Returns:
        The rows, named `name/1`, `name/2`, ... by their question; an error where no answer is short.
    """
    whole = parse_conversation(name, record)
    if isinstance(whole, DataError):
        return whole
    turns = [*whole.earlier, ("user", whole.prompt), ("assistant", whole.chosen)]
    rows = []
    for i in range(1, len(turns)):
        (asked_by, question), (answered_by, answer) = turns[i - 1 : i + 1]
        if (asked_by, answered_by) == ("user", "assistant") and len(answer.split()) <= answer_words:
            number = sum(role == "user" for role, _ in turns[:i])
            earlier = tuple(turns[: i - 1])
            rows.append(replace(whole, id=f"{name}/{number}", prompt=question, chosen=answer, earlier=earlier))
    return rows or DataError(f"{name}: no answer has at most {answer_words} words; raise `answer_words`")


def parse_turns(name: str, messages: list[Any]) -> list[tuple[str, str]] | DataError:
    """Parse messages to turns.

    Args:
        name: Name of the row, for the error message.
        messages: Messages with LLaVA's `from` and `value`, or with `role` and `content` as chat templates take them.

    Returns:
        The turns as (role, text), or an error where a message lacks a key or has an unknown role.
    """
    turns = []
    for message in messages:
        try:
            role = ROLES[message["from"] if "from" in message else message["role"]]
            turns.append((role, _text(message["value"] if "value" in message else message["content"])))
        except (KeyError, TypeError) as error:
            return DataError(
                f"{name}: a turn needs `from` (human or gpt) and `value`, not {shown_text(str(error), 100)}"
            )
    return turns


def _text(content: Any) -> str:
    """Return the text of a message's content: a string, or a list of parts, where an image becomes its tag."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise TypeError(shown(content))
    return "".join(part["text"] if part["type"] == "text" else "<image>\n" for part in content)
