"""Losses of a dpo stage: TRL's and our losses of two images, by name, and the user's own, as `module:function`.

A loss that is no loss of TRL is a function of log-probabilities of answers, (B,) float32 each, given by keyword:
chosen_logps and rejected_logps given the image, other_chosen_logps and other_rejected_logps given the rejected image,
each also with `ref_` before it, under the reference; and beta. It returns the loss of each pair, (B,). A function that
has a parameter of `other_` needs rows with a rejected image. Below, r(answer, image) is the log-probability of an
answer under the policy minus that under the reference, so that beta * r is DPO's implicit reward.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch.nn.functional as F
from pydantic_core import PydanticCustomError
from torch import Tensor
from trl import DPOTrainer

from pivot_hub.config.yaml_loader import nearest
from pivot_hub.errors import TrainingError
from pivot_hub.training.own_function import import_function, is_own_function

LossFunction = Callable[..., Tensor]


def image_sigmoid(
    chosen_logps: Tensor,
    other_chosen_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_other_chosen_logps: Tensor,
    beta: float,
    **_: Tensor,
) -> Tensor:
    """Prefer the image over the rejected image for the chosen answer: -log sigmoid(beta (r(c, image) - r(c, other))).

    This is the conditional preference of mDPO (Wang et al., 2024, arXiv 2406.11839).
    """
    ratio = chosen_logps - ref_chosen_logps
    other_ratio = other_chosen_logps - ref_other_chosen_logps
    return -F.logsigmoid(beta * (ratio - other_ratio))


def image_symmetric(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    other_chosen_logps: Tensor,
    other_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    ref_other_chosen_logps: Tensor,
    ref_other_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """Let each image prefer its own answer, where the rejected answer is the right one of the rejected image.

    The mean of -log sigmoid(beta (r(c, image) - r(r, image))) and -log sigmoid(beta (r(r, other) - r(c, other))). Both
    images and both answers are preferred once and rejected once, so that neither alone tells what is preferred. This
    symmetry is that of S-VCO (Wu et al., 2025, arXiv 2502.13928), whose loss compares each image with no image instead.
    """
    margin = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    other_margin = (other_rejected_logps - ref_other_rejected_logps) - (other_chosen_logps - ref_other_chosen_logps)
    return -(F.logsigmoid(beta * margin) + F.logsigmoid(beta * other_margin)) / 2


def anchor(chosen_logps: Tensor, ref_chosen_logps: Tensor, beta: float, **_: Tensor) -> Tensor:
    """Keep the chosen answer as probable as under the reference: -log sigmoid(beta r(c, image)).

    This is the anchored preference of mDPO (Wang et al., 2024, arXiv 2406.11839) with its anchor at 0. DPO's losses
    compare, and can make both answers less probable.
    """
    return -F.logsigmoid(beta * (chosen_logps - ref_chosen_logps))


NAMED_LOSSES: dict[str, LossFunction] = {
    "image_sigmoid": image_sigmoid,
    "image_symmetric": image_symmetric,
    "anchor": anchor,
}


@lru_cache
def trl_loss_types() -> tuple[str, ...]:
    """Return the names that TRL's DPOTrainer compares `loss_type` with: it has no list of them."""
    return tuple(re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss)))


def is_trl_loss(name: str) -> bool:
    """Return whether TRL computes a loss."""
    return name not in NAMED_LOSSES and not is_own_function(name)


def load_loss(name: str) -> LossFunction:
    """Return a loss function that is not TRL's; `module:function` is imported, see `import_function`."""
    return NAMED_LOSSES[name] if name in NAMED_LOSSES else import_function(name, f"loss_type {name!r}")


def compares_images(names: str | Iterable[str]) -> bool:
    """Return whether one of the losses reads rejected images.

    Args:
        names: The `loss_type` of a config or a recipe.
    """
    names = [names] if isinstance(names, str) else names
    return any(_reads_rejected_image(load_loss(name)) for name in names if not is_trl_loss(name))


def _reads_rejected_image(function: LossFunction) -> bool:
    return any(name.removeprefix("ref_").startswith("other_") for name in inspect.signature(function).parameters)


def check_loss_types(names: list[str]) -> None:
    """Check that each loss type is one of TRL's, one of ours, or a function that can be imported.

    Raises:
        TrainingError: A loss type is none of these; the message names it.
    """
    known = trl_loss_types()
    for name in names:
        if not is_trl_loss(name):
            load_loss(name)
        elif known and name not in known:
            names_known = (*known, *NAMED_LOSSES)
            raise TrainingError(
                f"there is no loss_type {name!r}{nearest(name, names_known)}; give `module:function` or one of "
                f"{', '.join(names_known)}."
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


def mean_loss(function: LossFunction, logps: Mapping[str, Tensor], beta: float) -> Tensor:
    """Compute the mean loss of a batch by a function that is not TRL's.

    Args:
        function: The loss function.
        logps: The log-probabilities, (B,) each, by the names of the function's arguments. Those given the rejected
            image only reach a function that reads them.
        beta: The trainer's `beta`.

    Raises:
        TrainingError: The function returns another shape.
    """
    if not _reads_rejected_image(function):
        logps = {name: values for name, values in logps.items() if "other_" not in name}
    losses = function(**{name: values.float() for name, values in logps.items()}, beta=beta)
    if losses.shape != (pairs := logps["chosen_logps"].shape):
        raise TrainingError(
            f"the loss function {getattr(function, '__name__', function)!r} returned {tuple(losses.shape)} for "
            f"{pairs[0]} pairs; return one loss for each pair."
        )
    return losses.mean()
