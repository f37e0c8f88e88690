"""Parts of the reference that are made from the code: keys of recipes, the command line, an example of a result."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import griffe
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typer.main import get_command

from docs.generate.links import ROOT
from pivot_hub.cli import app
from pivot_hub.config import data_section, recipe
from pivot_hub.data.synthetic import ShapesDataset

RECIPE_SECTIONS: tuple[type[BaseModel], ...] = (
    recipe.Recipe,
    recipe.ModelSpec,
    recipe.MllmSpec,
    recipe.LearningRates,
    recipe.LoraSpec,
    recipe.RewardSpec,
    data_section.ShapesData,
    data_section.ShapesSettings,
    data_section.FileData,
    data_section.Expected,
)
SECTION_TITLES = {
    "Recipe": "The recipe",
    "ModelSpec": "`model` of parts",
    "MllmSpec": "`model` of an MLLM",
    "LearningRates": "`learning_rate`",
    "LoraSpec": "`lora`",
    "RewardSpec": "`rewards`, each",
    "ShapesData": "`data` of format `shapes`",
    "ShapesSettings": "`world` of format `shapes`",
    "FileData": "`data` of files",
    "Expected": "`expect` of files",
}


def render(name: str) -> str:
    """Render a part by the name in its comment.

    Raises:
        KeyError: There is no such part.
    """
    return PARTS[name]()


def recipe_keys() -> str:
    """Render a table of keys for each section of a recipe, from its schema and its docstring."""
    blocks = []
    for section in RECIPE_SECTIONS:
        summary, meanings = _documented(section)
        lines = [f"### {SECTION_TITLES[section.__name__]}", summary, "", "| key | values | default | meaning |"]
        lines.append("|---|---|---|---|")
        for key, field in section.model_fields.items():
            meaning = meanings[key]
            default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
            values = _values(field.rebuild_annotation())
            lines.append(f"| `{key}` | {values} | {default} | {' '.join(meaning.split())} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _documented(section: type[BaseModel]) -> tuple[str, dict[str, str]]:
    """Return the text of a class's docstring, and what it says of each argument.

    Raises:
        KeyError: A field is not documented.
    """
    parsed = _parsed(section)
    texts = [str(part.value) for part in parsed if part.kind.value == "text"]
    meanings = {
        argument.name: argument.description
        for part in parsed
        if part.kind.value == "parameters"
        for argument in part.value
    }
    if section is data_section.ShapesSettings:  # keys and meanings are those of the dataset's class
        meanings = {
            a.name: a.description
            for part in _parsed(ShapesDataset)
            if part.kind.value == "parameters"
            for a in part.value
        }
    missing = section.model_fields.keys() - meanings.keys()
    if missing:
        raise KeyError(f"{section.__name__} does not document {', '.join(sorted(missing))}")
    return "\n\n".join(texts), meanings


def _parsed(documented: type) -> list[Any]:
    return griffe.Docstring(inspect.cleandoc(typing.cast(str, documented.__doc__))).parse(
        "google", warn_missing_types=False, warn_unknown_params=False
    )


def _default(value: Any) -> str:
    if value is None or value is PydanticUndefined:
        return "-"
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, BaseModel):
        return "its defaults"
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def _values(annotation: Any) -> str:
    """Name the values that a field takes, from its type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _values(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_values(a) for a in arguments if a is not type(None)))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"list of {_values(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)}: {_values(arguments[0])}"
    if origin is dict:
        return f"mapping to {_values(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f"`{member.value}`" for member in annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section"
    names = {str: "text", int: "integer", float: "number", bool: "`true`, `false`", Any: "any value"}
    return names[annotation]


def commands() -> str:
    """Render every command with its arguments and options, from the command line itself."""
    blocks: list[str] = []

    def add(command: Any, names: list[str]) -> None:
        if hasattr(command, "commands") and command.commands:
            for name, child in command.commands.items():
                add(child, [*names, name])
            return
        usage = " ".join([*names, *(_usage(p) for p in command.params if p.param_type_name == "argument"), "[OPTIONS]"])
        lines = [f"### {' '.join(names)}", "", f"`{usage}`", "", (command.help or "").strip(), ""]
        shown = [p for p in command.params if not getattr(p, "hidden", False) and p.name != "help"]
        if shown:
            lines += ["| | | default |", "|---|---|---|"]
        for parameter in shown:
            is_option = parameter.param_type_name == "option"
            name = " / ".join([*parameter.opts, *parameter.secondary_opts]) if is_option else _usage(parameter)
            help_text = " ".join((parameter.help or "").split()).replace("|", "\\|")
            default = parameter.default if not parameter.required else "required"
            default = (
                ""
                if default is None or default is False or callable(default) or "Sentinel" in repr(default)
                else default
            )
            default = getattr(default, "value", default)
            lines.append(f"| `{name}` | {help_text} | {f'`{default}`' if default != '' else ''} |")
        blocks.append("\n".join(lines))

    add(get_command(app), ["pivot"])
    return "\n\n".join(blocks)


def _usage(parameter: Any) -> str:
    name = parameter.metavar or (parameter.name or "").upper()
    many = "..." if parameter.nargs == -1 or getattr(parameter, "multiple", False) else ""
    return f"{name}{many}" if parameter.required else f"[{name.strip('[]')}{many}]"


def result_example() -> str:
    """Render the first result of a shipped encoder as the file has it."""
    results = json.loads((ROOT / "model_cards" / "facts" / "shapes-dpo" / "results" / "dpo.json").read_text())
    return f"```json\n{json.dumps(results[0], indent=2)}\n```"


PARTS: dict[str, Callable[[], str]] = {
    "recipe-keys": recipe_keys,
    "commands": commands,
    "result-example": result_example,
}
