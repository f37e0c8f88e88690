"""Functions of the user that a recipe names as `module:function`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from pivot_hub.config.yaml_loader import nearest
from pivot_hub.errors import TrainingError


def is_own_function(name: str) -> bool:
    """Whether a name is that of a function of the user, and not one that is shipped."""
    return ":" in name


def import_function(name: str, place: str) -> Callable[..., Any]:
    """Import a function. This runs the code of its module: name only modules that you trust.

    Args:
        name: The function, as `module:function`.
        place: What names the function, for the error message.

    Raises:
        TrainingError: The module cannot be imported, or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise TrainingError(
            f"{place}: the module {module_name!r} cannot be imported ({error}); install it, or put its folder on "
            "PYTHONPATH."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise TrainingError(
            f"{place}: the module {module_name!r} has no function "
            f"{function_name!r}{nearest(function_name, vars(module))}; name a function that it defines."
        )
    return function
