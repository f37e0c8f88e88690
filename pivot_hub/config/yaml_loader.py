"""Load YAML files into pydantic models, and explain the first mistake with its line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pivot_hub.errors import PivotError, shown, shown_text

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
        raw, node = parse_yaml(path.read_bytes(), str(path), kind)
    except OSError as error:
        raise kind(f"{path}: cannot be read ({error.strerror}); give a YAML file.") from error
    if not isinstance(raw, dict):
        raise kind(f"{path}:1: {what}.")
    return raw, Where(path, _lines(node))


def parse_yaml(content: bytes | str, name: str, kind: type[PivotError]) -> tuple[Any, yaml.Node | None]:
    """Parse YAML in UTF-8 or UTF-16, with or without a byte order mark.

    Args:
        content: One YAML document.
        name: Name of the document in messages.
        kind: Class of the errors.

    Returns:
        The value, and the node that it was built from.

    Raises:
        PivotError: The content is not YAML, nested too deeply, or has a key twice in one mapping; the error is of class
            `kind` and names the line.
    """
    try:
        loader = yaml.SafeLoader(content)
        node = loader.get_single_node()
        if node is None:
            return None, None
        _refuse_duplicate_keys(node)
        return loader.construct_document(node), node
    except yaml.reader.ReaderError as error:
        before = content[: error.position]
        line = 1 + (before.count(b"\n") if isinstance(before, bytes) else before.count("\n"))
        form = "YAML" if error.encoding == "unicode" else "UTF-8"
        raise kind(f"{name}:{line}: not {form} ({error.reason}); save the file as UTF-8 text.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line_text = f"{mark.line + 1}" if mark else "?"
        problem = getattr(error, "problem", None) or error
        raise kind(f"{name}:{line_text}: not YAML: {problem}.") from error
    except RecursionError:
        raise kind(f"{name}: not YAML that can be read: it is nested too deeply.") from None
    except (ValueError, OverflowError) as error:  # a date such as 2026-13-01, a number of 5,000 digits
        raise kind(f"{name}: not YAML that can be read: {shown_text(str(error))}.") from error


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


def _refuse_duplicate_keys(root: yaml.Node) -> None:
    """Refuse a key that occurs twice in one mapping: of the two values, YAML's parsers silently take the last.

    Raises:
        ConstructorError: A key occurs twice; the error has the place of the second one.
    """
    waiting, visited = [root], {id(root)}
    while waiting:
        node = waiting.pop()
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            first_lines: dict[tuple[str, str], int] = {}
            for key, value in node.value:
                children += [key, value]
                name, line = (key.tag, str(key.value)), key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode) and name in first_lines:
                    problem = f"the key `{key.value}` is given again, first in line {first_lines[name]}; keep one"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                first_lines[name] = line
        waiting += [child for child in children if id(child) not in visited]
        visited |= {id(child) for child in children}


def _lines(root: yaml.Node | None) -> dict[Key, int | str]:
    """Return the line of each key and list item below a node; a node that aliases repeat is followed once."""
    lines: dict[Key, int | str] = {}
    waiting: list[tuple[Key, yaml.Node | None]] = [((), root)]
    visited: set[int] = set()
    while waiting:
        prefix, node = waiting.pop()
        if id(node) in visited:
            continue
        visited.add(id(node))
        items: list[tuple[str | int, yaml.Node, yaml.Node]] = []
        if isinstance(node, yaml.MappingNode):
            items = [(key.value, key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
        elif isinstance(node, yaml.SequenceNode):
            items = [(i, value, value) for i, value in enumerate(node.value)]
        for key, place, value in items:
            lines[(*prefix, key)] = place.start_mark.line + 1
            waiting.append(((*prefix, key), value))
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
        return f"{place}: `{key}.{field}` is {shown(tag)}{nearest(tag, tags.split(', '))}; give one of {tags}."
    return f"{where(*location)}: `{key}` is {shown(first['input'])}: {first['msg']}."


def _follow(model: type[BaseModel], location: Key) -> tuple[Key, list[str]]:
    """Return the path of a wrong key as the file has it, and the keys that are valid in its place.

    Pydantic's location has a discriminated union's tag between the union and the key, which is no key of the file:
    ('data', 0, 'shapes', 'rows'). The tag is a value of the model's discriminating key, or the model's name.
    """
    kept: list[str | int] = []
    at = beside = [model]
    for key in location:
        beside = at
        fields = [m.model_fields[str(key)] for m in at if key in m.model_fields]
        tagged = [
            m for m in at if m.__name__ == key or any(key in get_args(f.annotation) for f in m.model_fields.values())
        ]
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
