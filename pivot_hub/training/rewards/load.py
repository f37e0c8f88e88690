"""The rewards of a recipe: shipped ones by name, the user's own as `module:function`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from pivot_hub.config.recipe import RewardSpec
from pivot_hub.config.yaml_loader import nearest
from pivot_hub.errors import TrainingError, shown, shown_text
from pivot_hub.training import rewards
from pivot_hub.training.own_function import import_function, is_own_function

NAMED = 5  # rows that an error message names


class CheckedReward:
    """A reward with its settings, whose values are checked whenever it is called.

    Attributes:
        name: Name of the reward in the recipe.
        scores_every_row: Whether it is not known which rows it applies to, as for a function of the user.
        of_form: Whether it looks at the form of a completion alone.

    Args:
        name: Name of the reward in the recipe.
        function: The reward.
        settings: Its keyword arguments beside the columns of the rows.
    """

    def __init__(self, name: str, function: Callable[..., Any], settings: dict[str, Any]) -> None:
        self.name, self.scores_every_row = name, is_own_function(name)
        self.of_form = name in rewards.FORM
        self._function, self._settings = function, settings
        self.__name__ = getattr(function, "__name__", type(function).__name__)  # the name in TRL's metrics

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Return the reward of each completion; None where the reward does not apply.

        Args:
            completions: The completions.
            columns: Columns of the rows, and what else TRL hands to rewards; `id` names the rows in errors.

        Raises:
            TrainingError: The reward raises an error, or returns something else than one finite number or None for
                each completion; the message names the reward and the rows.
        """
        ids = columns.get("id") or []
        try:
            values = list(self._function(completions=completions, **columns, **self._settings))
            numbers = [None if value is None else float(value) for value in values]
        except Exception as error:  # whatever the user's function raises
            reason = f"{type(error).__name__}: {shown_text(str(error))}"
            raise TrainingError(f"the reward {self.name!r} failed{_rows(ids)} ({reason}); fix the function.") from error
        if len(numbers) != len(completions):
            raise TrainingError(
                f"the reward {self.name!r} returned {len(numbers)} values for {len(completions)} "
                f"completions{_rows(ids)}; return one for each, or None where it does not apply."
            )
        wrong = [i for i, number in enumerate(numbers) if number is not None and not math.isfinite(number)]
        if wrong:
            rows = _rows([ids[i] for i in wrong] if ids else [])
            raise TrainingError(
                f"the reward {self.name!r} is {numbers[wrong[0]]}{rows}; return a finite number, or None where it does "
                "not apply."
            )
        return numbers


def load_rewards(specs: Sequence[RewardSpec]) -> tuple[list[CheckedReward], list[float]]:
    """Load the rewards of a recipe. A module is imported only where it is named; this runs its code.

    Args:
        specs: The recipe's `rewards`.

    Returns:
        The rewards, for a trainer's `reward_funcs`, and their weights, for its `reward_weights`.

    Raises:
        TrainingError: A reward does not exist, is listed twice, or does not take its settings; the message names it.
    """
    loaded: list[CheckedReward] = []
    for spec in specs:
        reward = _load(spec)
        if reward.__name__ in {other.__name__ for other in loaded}:
            raise TrainingError(
                f"the reward {spec.name!r} is listed twice, and its metrics would be mixed; list each name once."
            )
        loaded.append(reward)
    return loaded, [spec.weight for spec in specs]


def _load(spec: RewardSpec) -> CheckedReward:
    if is_own_function(spec.name):
        function = import_function(spec.name, f"the reward {spec.name!r}")
    elif spec.name in rewards.__all__:
        function = getattr(rewards, spec.name)
    else:
        known = rewards.__all__
        raise TrainingError(
            f"there is no reward {spec.name!r}{nearest(spec.name, known)}; give `module:function` or one of "
            f"{', '.join(known)}."
        )
    settings = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD) and name != "completions"
    }
    if unknown := next((key for key in spec.args if key not in settings), None):
        raise TrainingError(
            f"the reward {spec.name!r} has no setting {unknown!r}{nearest(unknown, settings)}; it takes "
            f"{', '.join(settings) or 'none'}."
        )
    if is_own_function(spec.name):  # what it needs may be a column of the rows
        return CheckedReward(spec.name, function, spec.args)
    missing = [key for key, parameter in settings.items() if parameter.default is parameter.empty]
    if absent := [key for key in missing if key not in spec.args]:
        raise TrainingError(f"the reward {spec.name!r} needs {', '.join(absent)}; give it under `args`.")
    try:
        function(completions=[""], **spec.args)
    except Exception as error:  # of whatever kind a wrong value raises
        raise TrainingError(f"the reward {spec.name!r} cannot use its args {shown(spec.args)}: {error}.") from error
    return CheckedReward(spec.name, function, spec.args)


def _rows(ids: Sequence[Any]) -> str:
    """Name rows for an error message; nothing where they have no ids."""
    names = list(dict.fromkeys(str(name) for name in ids))
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f" for the rows {', '.join(map(shown_text, names[:NAMED]))}{more}" if names else ""
