"""Losses of a dpo stage: TRL's, by name, and the user's own functions, as `module:function`."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from pydantic_core import PydanticCustomError
from trl import DPOTrainer

from pivot_hub.config.yaml_loader import nearest
from pivot_hub.errors import TrainingError

LossFunction = Callable[..., torch.Tensor]


@lru_cache
def trl_loss_types() -> tuple[str, ...]:
    """Return the names that TRL's DPOTrainer compares `loss_type` with: it has no list of them."""
    return tuple(re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss)))


def is_own_loss(name: str) -> bool:
    """Whether a loss type names a function and not one of TRL's losses."""
    return ":" in name


def load_loss(name: str) -> LossFunction:
    """Import a loss function. This runs the code of its module: name only modules that you trust.

    Args:
        name: The function, as `module:function`.

    Raises:
        TrainingError: The module cannot be imported, or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise TrainingError(
            f"loss_type {name!r}: the module {module_name!r} cannot be imported ({error}); install it, or put its "
            "folder on PYTHONPATH."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise TrainingError(
            f"loss_type {name!r}: the module {module_name!r} has no function "
            f"{function_name!r}{nearest(function_name, vars(module))}; name a function that it defines."
        )
    return function


def check_loss_types(names: list[str]) -> None:
    """Check that each loss type is one of TRL's or a function that can be imported.

    Raises:
        TrainingError: A loss type is neither; the message names it.
    """
    known = trl_loss_types()
    for name in names:
        if is_own_loss(name):
            load_loss(name)
        elif known and name not in known:
            raise TrainingError(
                f"there is no loss_type {name!r}{nearest(name, known)}; give `module:function` or one of "
                f"{', '.join(known)}."
            )


def validate_loss_types(value: Any) -> Any:
    """Check the `loss_type` of a recipe, and turn a single one into a list.

    Raises:
        PydanticCustomError: A loss type is unknown.
    """
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        try:
            check_loss_types(names)
        except TrainingError as error:
            raise PydanticCustomError("loss_type", "{reason}", {"reason": str(error).removesuffix(".")}) from error
    return names


def own_loss(
    function: LossFunction,
    logps: tuple[torch.Tensor, torch.Tensor],
    reference_logps: tuple[torch.Tensor, torch.Tensor],
    beta: float,
) -> torch.Tensor:
    """Compute the mean loss of a batch by the user's function.

    Args:
        function: The loss function. It returns the loss of each of B pairs, (B,), each from that pair alone.
        logps: Log-probabilities of the chosen and of the rejected answers under the policy, (B,) each.
        reference_logps: The same under the reference model.
        beta: The trainer's `beta`.

    Raises:
        TrainingError: The function returns another shape.
    """
    chosen, rejected = (part.float() for part in logps)
    ref_chosen, ref_rejected = (part.float() for part in reference_logps)
    losses = function(
        chosen_logps=chosen,
        rejected_logps=rejected,
        ref_chosen_logps=ref_chosen,
        ref_rejected_logps=ref_rejected,
        beta=beta,
    )
    if losses.shape != chosen.shape:
        raise TrainingError(
            f"the loss function {getattr(function, '__name__', function)!r} returned {tuple(losses.shape)} for "
            f"{len(chosen)} pairs; return one loss for each pair."
        )
    return losses.mean()
