"""Preference pairs: MMPR, RLAIF-V, mDPO's VLFeedback rows, and TRL's own columns."""

from __future__ import annotations

import re
from typing import Any

from pivot_hub.data.llava import turns_of
from pivot_hub.data.row import Row, image_name
from pivot_hub.errors import DataError

# mDPO wraps each question in Vicuna's chat format, which is its model's own and no part of the question.
VICUNA = re.compile(r"\AA chat between .*? USER: (.*?) ASSISTANT:\s*\Z", re.DOTALL)


def parse_question_pair(name: str, record: dict[str, Any]) -> Row | DataError:
    """A row of `image, question, chosen, rejected`, as MMPR and RLAIF-V have it."""
    return _pair(name, record, "question", "image")


def parse_vlfeedback_pair(name: str, record: dict[str, Any]) -> Row | DataError:
    """A row of `img_path, prompt, chosen, rejected`, the prompt in Vicuna's chat format."""
    prompt = record.get("prompt")
    if isinstance(prompt, str) and (inside := VICUNA.match(prompt)):
        record = {**record, "prompt": inside[1]}
    return _pair(name, record, "prompt", "img_path")


def parse_preference(name: str, record: dict[str, Any]) -> Row | DataError:
    """A row of TRL's columns `images` (or `image`), `prompt`, `chosen`, `rejected`: texts, or lists of messages."""
    sides: dict[str, Any] = {}
    earlier: list[tuple[str, str]] = []
    for key in ("prompt", "chosen", "rejected"):
        value = record.get(key)
        if isinstance(value, list):
            said = turns_of(name, value)
            if isinstance(said, DataError):
                return said
            wanted = "user" if key == "prompt" else "assistant"
            if not said or said[-1][0] != wanted or (key != "prompt" and len(said) > 1):
                return DataError(f"{name}: `{key}` as messages ends with one of the {wanted}, and answers have one")
            value = said[-1][1]
            earlier += said[:-1]
        sides[key] = value
    return _pair(name, {**record, **sides}, "prompt", "images", "image", earlier=tuple(earlier))


def _pair(
    name: str, record: dict[str, Any], question: str, *images: str, earlier: tuple[tuple[str, str], ...] = ()
) -> Row | DataError:
    missing = [k for k in (question, "chosen", "rejected") if not isinstance(record.get(k), str)]
    if missing:
        return DataError(f"{name}: `{missing[0]}` is missing or not text")
    image = image_name(record, name, *images)
    if isinstance(image, DataError):
        return image
    # LLaVA's code strips the question of a pair, and only there.
    return Row(name, image, record[question].strip(), record["chosen"], record["rejected"], earlier=earlier)
