"""Stages of training: what a recipe of each stage may say. A stage registers itself; a recipe knows no trainer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

if TYPE_CHECKING:
    from transformers import TrainingArguments

Content = Literal["captions", "instruct", "pairs", "questions"]


@dataclass(frozen=True)
class Stage:
    """A stage of training.

    Args:
        name: The value of `stage` in a recipe.
        module: Import name of the module whose `build_trainer` makes the stage's trainer.
        config: Import name of the trainer's config class, as `module:Class`. It is imported when the first recipe of
            the stage is checked, because importing TRL takes seconds.
        formats: Data formats that the stage reads.
        content: Content that the stage needs from the synthetic Shapes dataset; None where any content will do.
        base_part: Whether the stage makes an encoder or a language model, and not an MLLM.
        needs_parent: Whether the stage starts from the checkpoint of another recipe.
        takes_labels: Whether the loss is on labelled tokens, which the recipe's `labels` may change.
        takes_rewards: Whether the stage learns from the recipe's `rewards`, and so reads rows that these can score.
    """

    name: str
    module: str
    config: str
    formats: tuple[str, ...]
    content: Content | None = None
    base_part: bool = False
    needs_parent: bool = False
    takes_labels: bool = False
    takes_rewards: bool = False

    def config_class(self) -> type[TrainingArguments]:
        """Import the config class whose arguments a recipe of this stage passes under `args`."""
        module, _, name = self.config.partition(":")
        config: type[TrainingArguments] = getattr(import_module(module), name)
        return config


_STAGES: dict[str, Stage] = {}


def register_stages(stages: Iterable[Stage]) -> None:
    """Add stages, so that recipes may name them. A stage of the same name is replaced."""
    _STAGES.update({stage.name: stage for stage in stages})


def stage_names() -> list[str]:
    """The names of all stages, in the order in which they were registered."""
    return list(_STAGES)


def stage_of(name: str) -> Stage:
    """Return the stage of a name.

    Raises:
        KeyError: No stage of this name is registered.
    """
    return _STAGES[name]


@lru_cache
def argument_types(stage: Stage) -> dict[str, Any]:
    """Return the type of each argument that a recipe of a stage may pass under `args`."""
    config = stage.config_class()
    hints = get_type_hints(config, include_extras=True)
    return {f.name: hints[f.name] for f in fields(config) if f.init}


@lru_cache
def argument_defaults(stage: Stage) -> dict[str, Any]:
    """Return the default of each argument that a recipe of a stage may pass under `args`."""
    return {f.name: f.default for f in fields(stage.config_class())}
