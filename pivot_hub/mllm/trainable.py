"""Choose which parameters of an MLLM are trained, and at which learning rate."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from pivot_hub.config.recipe import PARTS
from pivot_hub.encoder.configuration_pivot import LAST
from pivot_hub.mllm.families import family_of

# Names of modules that no image token depends on: a tower's pooling head, and what Gemma 4 hears with.
UNUSED = {"head", "audio_tower", "embed_audio"}


def parts_of(model: PreTrainedModel) -> dict[str, dict[str, nn.Parameter]]:
    """Return the parameters of the three parts that a recipe sets learning rates for, by part and name.

    Raises:
        CheckpointError: The model is not an MLLM of the table.
    """
    family = family_of(model.config)
    parts: dict[str, dict[str, nn.Parameter]] = {part: {} for part in PARTS}
    for name, parameter in model.named_parameters():
        parts[family.part_of(name)][name] = parameter
    return parts


def freeze_parts(model: PreTrainedModel, trained: dict[str, float]) -> None:
    """Freeze all parameters except those of the trained parts that the model's output depends on.

    Blocks above the feature layer, the last norm and a pooling head are frozen in any case: they would never get a
    gradient, and DistributedDataParallel stops when it waits for one.

    Args:
        model: The MLLM.
        trained: Learning rate of each trained part; other parts are frozen.
    """
    for part, parameters in parts_of(model).items():
        for parameter in parameters.values():
            parameter.requires_grad_(part in trained)
    for parameter in _parameters_without_influence(model):
        parameter.requires_grad_(False)
    if "vision" not in trained:
        # With gradient checkpointing, transformers makes every embedding require a gradient, including the patch
        # embedding, so that a frozen tower would run backward for nothing. Only reentrant checkpointing needs this.
        cast(Any, model).enable_input_require_grads = _no_input_gradients


def _no_input_gradients() -> None:
    """Replace a model's `enable_input_require_grads` and do nothing."""


def _parameters_without_influence(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the parameters that the language model's input does not depend on: parts of a tower that end unused.

    Where the projector takes a hidden state, they are found by a gradient on the meta device. Where it takes the
    tower's output, they are those of a pooling head, and of towers for other inputs than images.
    """
    family = family_of(model.config)
    tower = cast(nn.Module, getattr(model.model, family.tower))
    layer = family.feature_layer(model.config)
    if layer == LAST:
        return [
            p for name, p in model.named_parameters() if {"head", "audio_tower", "embed_audio"} & set(name.split("."))
        ]
    config: Any = tower.config
    weights = {k: torch.empty_like(p, device="meta", requires_grad=True) for k, p in tower.named_parameters()}
    buffers = {k: b.to("meta") for k, b in tower.named_buffers()}
    pixels = torch.empty(1, config.num_channels, config.image_size, config.image_size, device="meta")
    outputs: Any = functional_call(tower, {**weights, **buffers}, (pixels,), {"output_hidden_states": True})
    features = outputs.hidden_states[layer].sum()
    gradients = torch.autograd.grad(features, list(weights.values()), allow_unused=True)
    return [tower.get_parameter(k) for k, gradient in zip(weights, gradients, strict=True) if gradient is None]


def parameter_groups(
    model: PreTrainedModel, rates: dict[str, float], weight_decay: float, decayed: set[str]
) -> list[dict[str, Any]]:
    """Make one optimizer group for each trained part, with and without weight decay.

    Args:
        model: The MLLM, whose frozen parameters already require no gradient.
        rates: Peak learning rate of each trained part.
        weight_decay: Weight decay of the parameters named in `decayed`; others (norms, biases) get none.
        decayed: Names of the parameters that get weight decay.

    Returns:
        Groups with the keys params, lr, weight_decay and part.
    """
    family = family_of(model.config)
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, decays = family.part_of(name), name in decayed
        group = groups.setdefault(
            (part, decays),
            {"params": [], "lr": rates[part], "weight_decay": weight_decay if decays else 0.0, "part": part},
        )
        group["params"].append(parameter)
    return list(groups.values())
