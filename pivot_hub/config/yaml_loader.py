"""Load YAML files into pydantic models, and explain the first mistake with its line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pivot_hub.errors import PivotError

Key = tuple[str | int, ...]
M = TypeVar("M", bound="Strict")


class Strict(BaseModel):
    """Base class of a section of a file: unknown keys raise, and values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Where:
    """The places of a file's keys, as they are named in messages: file and line, or the override that set the key."""

    def __init__(self, path: Path, lines: dict[Key, int | str]) -> None:
        self.path, self.lines = path, lines

    def __call__(self, *key: str | int) -> str:
        while key and key not in self.lines:
            key = key[:-1]
        line = self.lines.get(key, 1)
        return line if isinstance(line, str) else f"{self.path}:{line}"


def read_yaml(path: Path, what: str, kind: type[PivotError]) -> tuple[dict[str, Any], Where]:
    """Read a mapping of keys, and the line of each key.

    Args:
        path: Path of the file.
        what: Message for a file that is no mapping: what the file should be and how it starts.
        kind: Class of the errors.

    Raises:
        PivotError: The file is not YAML or no mapping; the error is of class `kind` and names the line.
    """
    try:
        node = yaml.compose(path.read_text())
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{mark.line + 1}" if mark else "?"
        problem = getattr(error, "problem", None) or error
        raise kind(f"{path}:{line}: not YAML: {problem}.") from error
    if not isinstance(raw, dict):
        raise kind(f"{path}:1: {what}.")
    return raw, Where(path, _lines(node))


def check_keys(model: type[M], raw: dict[str, Any], where: Where, kind: type[PivotError]) -> M:
    """Validate the keys of a file against a model.

    Raises:
        PivotError: A key or a value is wrong. The error is of class `kind` and names the first mistake: its line, the
            key, and the nearest valid key.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise kind(_explain(error, model, where)) from error


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean ...?)` with the known word nearest to a word, or an empty text if none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""


def _lines(node: yaml.Node | None, prefix: Key = ()) -> dict[Key, int | str]:
    """Return the line of each key and list item below a node."""
    lines: dict[Key, int | str] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[(*prefix, key.value)] = key.start_mark.line + 1
            lines |= _lines(value, (*prefix, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*prefix, i)] = value.start_mark.line + 1
            lines |= _lines(value, (*prefix, i))
    return lines


def _explain(error: ValidationError, model: type[BaseModel], where: Where) -> str:
    # A mistyped key is both unknown and missing: the message names the unknown one, which is in the file.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    location, known = _follow(model, first["loc"])
    key = ".".join(map(str, location))
    if first["type"] == "extra_forbidden":
        return f"{where(*location)}: unknown key `{key}`{nearest(str(location[-1]), known)}."
    if first["type"] == "missing":
        return f"{where(*location)}: `{key}` is missing; add it."
    if first["type"] == "union_tag_invalid":
        field, tag, tags = (first["ctx"][name] for name in ("discriminator", "tag", "expected_tags"))
        field, tags = field.strip("'"), tags.replace("'", "")
        place = where(*location, field)
        return f"{place}: `{key}.{field}` is {tag!r}{nearest(tag, tags.split(', '))}; give one of {tags}."
    return f"{where(*location)}: `{key}` is {first['input']!r}: {first['msg']}."


def _follow(model: type[BaseModel], location: Key) -> tuple[Key, list[str]]:
    """Return the path of a wrong key as the file has it, and the keys that are valid in its place.

    Pydantic's location has a discriminated union's tag between the union and the key, which is no key of the file:
    ('data', 0, 'shapes', 'rows').
    """
    kept: list[str | int] = []
    at = beside = [model]
    for key in location:
        beside = at
        fields = [m.model_fields[str(key)] for m in at if key in m.model_fields]
        tagged = [m for m in at if any(key in get_args(f.annotation) for f in m.model_fields.values())]
        if tagged and not fields and len(at) > 1:
            at = tagged
            continue
        kept.append(key)
        at = [m for field in fields for m in _models(field.annotation)] if fields else at
    return tuple(kept), [name for m in beside for name in m.model_fields]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """List the models in a type, such as a list of a union of two models."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]
