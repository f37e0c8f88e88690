"""Choose which parameters of an MLLM are trained, and at which learning rate."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call
from transformers import LlavaForConditionalGeneration

from pivot_hub.mllm.load import image_px


def parts_of(model: LlavaForConditionalGeneration) -> dict[str, list[nn.Module]]:
    """Modules of the three parts that a recipe sets learning rates for."""
    inner = model.model
    return {
        "vision": [inner.vision_tower],
        "projector": [inner.multi_modal_projector],
        "language": [inner.language_model, model.lm_head],
    }


def freeze_parts(model: LlavaForConditionalGeneration, trained: dict[str, float]) -> None:
    """Freeze all parameters except those of the trained parts that the model's output depends on.

    Blocks above the feature layer, the last norm and a pooling head are frozen in any case: they would never get a
    gradient, and DistributedDataParallel stops when it waits for one.

    Args:
        model: The MLLM.
        trained: Learning rate of each trained part; other parts are frozen.
    """
    for part, modules in parts_of(model).items():
        for module in modules:
            module.requires_grad_(part in trained)
    for parameter in _parameters_without_influence(model):
        parameter.requires_grad_(False)
    if "vision" not in trained:
        # With gradient checkpointing, transformers makes every embedding require a gradient, including the patch
        # embedding, so that a frozen tower would run backward for nothing. Only reentrant checkpointing needs this.
        cast(Any, model).enable_input_require_grads = _no_input_gradients


def _no_input_gradients() -> None:
    """Replace a model's `enable_input_require_grads` and do nothing."""


def _parameters_without_influence(model: LlavaForConditionalGeneration) -> list[nn.Parameter]:
    """Parameters of the vision tower that its features do not depend on, determined on the meta device."""
    tower = model.model.vision_tower
    config: Any = tower.config
    weights = {k: torch.empty_like(p, device="meta", requires_grad=True) for k, p in tower.named_parameters()}
    buffers = {k: b.to("meta") for k, b in tower.named_buffers()}
    pixels = torch.empty(1, config.num_channels, image_px(model), image_px(model), device="meta")
    outputs: Any = functional_call(tower, {**weights, **buffers}, (pixels,), {"output_hidden_states": True})
    layer = model.config.vision_feature_layer
    layers = [layer] if isinstance(layer, int) else layer
    features = torch.stack([outputs.hidden_states[i].sum() for i in layers]).sum()
    gradients = torch.autograd.grad(features, list(weights.values()), allow_unused=True)
    return [tower.get_parameter(k) for k, gradient in zip(weights, gradients, strict=True) if gradient is None]


def parameter_groups(
    model: LlavaForConditionalGeneration, rates: dict[str, float], weight_decay: float, decayed: set[str]
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
    part_of = {id(p): part for part, modules in parts_of(model).items() for m in modules for p in m.parameters()}
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, decays = part_of[id(parameter)], name in decayed
        group = groups.setdefault(
            (part, decays),
            {"params": [], "lr": rates[part], "weight_decay": weight_decay if decays else 0.0, "part": part},
        )
        group["params"].append(parameter)
    return list(groups.values())
