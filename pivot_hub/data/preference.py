"""Preference pairs: MMPR, RLAIF-V, mDPO's VLFeedback rows, and TRL's own columns.

A record of any of them may also have `rejected_image` (or `rejected_images`, a list of one): an image that the chosen
answer does not describe.
"""

from __future__ import annotations

import re
from typing import Any

from pivot_hub.data.llava import parse_turns
from pivot_hub.data.row import Row, image_name
from pivot_hub.errors import DataError

REJECTED_IMAGE_KEYS = ("rejected_image", "rejected_images")
# mDPO wraps each question in the chat format of its own model, Vicuna, which is no part of the question.
VICUNA = re.compile(r"\AA chat between .*? USER: (.*?) ASSISTANT:\s*\Z", re.DOTALL)


def parse_question_pair(name: str, record: dict[str, Any]) -> Row | DataError:
    """Parse a record of `image, question, chosen, rejected`, the columns of MMPR and RLAIF-V."""
    return _pair(name, record, "question", "image")


def parse_vlfeedback_pair(name: str, record: dict[str, Any]) -> Row | DataError:
    """Parse a record of `img_path, prompt, chosen, rejected`, whose prompt is in Vicuna's chat format."""
    prompt = record.get("prompt")
    wrapped = VICUNA.match(prompt) if isinstance(prompt, str) else None
    if wrapped:
        record = {**record, "prompt": wrapped[1]}
    return _pair(name, record, "prompt", "img_path")


def parse_preference(name: str, record: dict[str, Any]) -> Row | DataError:
    """Parse TRL's columns `images` (or `image`), `prompt`, `chosen`, `rejected`: texts, or lists of messages."""
    sides: dict[str, Any] = {}
    earlier: list[tuple[str, str]] = []
    for key in ("prompt", "chosen", "rejected"):
        value = record.get(key)
        if isinstance(value, list):
            turns = parse_turns(name, value)
            if isinstance(turns, DataError):
                return turns
            role = "user" if key == "prompt" else "assistant"
            if not turns or turns[-1][0] != role or (key != "prompt" and len(turns) > 1):
                return DataError(
                    f"{name}: the last message of `{key}` must be from the {role}, and an answer is one message"
                )
            value = turns[-1][1]
            earlier += turns[:-1]
        sides[key] = value
    return _pair(name, {**record, **sides}, "prompt", "images", "image", earlier=tuple(earlier))


def _pair(
    name: str, record: dict[str, Any], question: str, *images: str, earlier: tuple[tuple[str, str], ...] = ()
) -> Row | DataError:
    missing = [k for k in (question, "chosen", "rejected") if not isinstance(record.get(k), str)]
    if missing:
        return DataError(f"{name}: `{missing[0]}` is missing or not text")
    image = image_name(record, name, *images)
    rejected_image = image_name(record, name, *REJECTED_IMAGE_KEYS)
    if isinstance(image, DataError):
        return image
    if isinstance(rejected_image, DataError):
        return rejected_image
    # LLaVA's code strips the question of a preference pair, and no other.
    prompt = record[question].strip()
    return Row(name, image, prompt, record["chosen"], record["rejected"], earlier, rejected_image=rejected_image)
