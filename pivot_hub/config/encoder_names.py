"""Short names of encoders, such as `siglip2-so400m`, and what they stand for: a folder or a Hub repository.

The table is `model_cards`: an encoder's short name is the name of its file there. The Hub names in it are those of the
organisation `pivot`; the environment variable PIVOT_HUB_ORG names another one.
"""

from __future__ import annotations

import difflib
import os
from functools import wraps
from pathlib import Path
from typing import Any

import yaml

from pivot_hub.errors import CheckpointError
from pivot_hub.files import shipped_folder

CARDS = shipped_folder("model_cards")
RECIPES = shipped_folder("recipes")
ORGANISATION = "PIVOT_HUB_ORG"
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")  # of from_pretrained


def short_names() -> list[str]:
    """List the short names of all encoders, of planned ones too."""
    return sorted(file.stem for file in CARDS.glob("*.yaml"))


def is_short_name(name: str) -> bool:
    """Return whether a name is one of the table, and no file or folder of this name lies in the working directory."""
    return name in short_names() and not Path(name).exists()


def hub_repository(name: str) -> str:
    """Return the Hub name that a short name stands for; any other name is returned as it is."""
    if name not in short_names():
        return name
    repository: str = _entry(name)["repository"]
    organisation = os.environ.get(ORGANISATION)
    return f"{organisation}/{repository.partition('/')[2]}" if organisation else repository


def shipped_encoder(name: str) -> Path | None:
    """Return the folder of a short name's encoder where it ships with this package, and None elsewhere."""
    folder = _entry(name).get("shipped")
    return None if folder is None else RECIPES / folder


def making_commands(name: str) -> list[str]:
    """Return the commands that make the encoder of a short name."""
    entry = _entry(name)
    recipe = entry["recipe"]
    commands: list[str] | None = entry.get("commands")
    return commands or [f"pivot train {recipe} --parents", f"pivot extract runs/{recipe} {name}"]


def base_encoder(name: str) -> str:
    """Return the folder or the Hub name of the encoder that a short name's encoder is trained from.

    Its shape is that of its base. An encoder that is trained from scratch, and ships, is its own base.
    """
    from pivot_hub.config.recipe import load_recipe  # imports pydantic, and TRL when it reads a recipe

    if (folder := shipped_encoder(name)) is not None:
        return str(folder)
    loaded = load_recipe(_entry(name)["recipe"])
    return loaded.locate(loaded.parts(f"the encoder {name}").vision)


def resolve_encoder(name: str | Path, **hub_options: Any) -> str:
    """Turn a short name into the folder that ships with this package, or into the Hub name of a published encoder.

    A folder that exists and a Hub name `owner/name` are returned as they are, so a folder always wins.

    Args:
        name: Folder, Hub name or short name of an encoder. A `Path` is always a folder.
        **hub_options: Options of the Hub's client, such as revision and token.

    Raises:
        CheckpointError: There is no encoder of this short name, or it is not published. The message names the nearest
            name, or the commands that make the encoder.
    """
    text = str(name)
    if isinstance(name, Path) or "/" in text or Path(text).exists():
        return text
    if not is_short_name(text):
        near = difflib.get_close_matches(text, short_names(), n=3)
        nearest = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise CheckpointError(
            f"{text}: there is no folder and no encoder of this name{nearest}; `pivot list` shows the encoders that "
            "have a short name, and a Hub name is OWNER/NAME."
        )
    if (folder := shipped_encoder(text)) is not None:
        return str(folder)
    repository = hub_repository(text)
    _require_published(text, repository, hub_options)
    return repository


def accept_short_names(kind: type[Any]) -> None:
    """Let `from_pretrained` of a config or a model take short names too, see `resolve_encoder`."""
    by_name = kind.from_pretrained.__func__

    @wraps(by_name)
    def from_pretrained(cls: type[Any], pretrained_model_name_or_path: str | Path, *args: Any, **options: Any) -> Any:
        hub_options = {key: options[key] for key in HUB_OPTIONS if key in options}
        name = resolve_encoder(pretrained_model_name_or_path, **hub_options)
        return by_name(cls, name, *args, **options)

    setattr(kind, by_name.__name__, classmethod(from_pretrained))


def _require_published(name: str, repository: str, hub_options: dict[str, Any]) -> None:
    """Look for the config of a short name's repository in the Hub's cache and on the Hub.

    Raises:
        CheckpointError: It is in neither.
    """
    from transformers.utils.hub import cached_file  # seconds, which lists of names need not wait for

    try:
        cached_file(repository, "config.json", **hub_options)
    except OSError as error:
        commands = "; ".join(f"`{command}`" for command in making_commands(name))
        there = [other for other in short_names() if shipped_encoder(other) is not None]
        raise CheckpointError(
            f"{name}: {repository} is not on the Hub or cannot be reached, and is not in the Hub's cache; make the "
            f"encoder with {commands}, and the name stands for its folder. What ships with this package: "
            f"{', '.join(there)}; "
            f"`pivot list` shows all. {ORGANISATION} names another organisation than {repository.partition('/')[0]}."
        ) from error


def _entry(name: str) -> dict[str, Any]:
    """Read the entry of a short name in the table."""
    entry: dict[str, Any] = yaml.safe_load((CARDS / f"{name}.yaml").read_text())
    return entry
