"""Which parameters of an MLLM train, and at which learning rate."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call
from transformers import (
    AutoModel,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from pivot_hub.mllm.load import image_px


def randomise_vision(model: LlavaForConditionalGeneration, seed: int) -> None:
    """Give the vision tower the random weights it would begin its training with: the floor of what it can show."""
    tower = cast(PreTrainedModel, model.model.vision_tower)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = AutoModel.from_config(tower.config)
    tower.load_state_dict(fresh.state_dict())


def parts_of(model: LlavaForConditionalGeneration) -> dict[str, list[nn.Module]]:
    """The three parts a recipe gives rates to."""
    inner = model.model
    return {
        "vision": [inner.vision_tower],
        "projector": [inner.multi_modal_projector],
        "language": [inner.language_model, model.lm_head],
    }


def freeze_parts(model: LlavaForConditionalGeneration, trained: dict[str, float]) -> None:
    """Let only the parts with a rate train, and of the vision tower only what its features depend on.

    Blocks above the feature layer, the last norm and a pooling head would wait for gradients that never come, which
    stops DistributedDataParallel.
    """
    for part, modules in parts_of(model).items():
        for module in modules:
            module.requires_grad_(part in trained)
    for parameter in _without_influence(model):
        parameter.requires_grad_(False)
    if "vision" not in trained:
        # Under checkpointing transformers lets every embedding ask for a gradient, the patches' too: a frozen tower
        # would run backward for nothing. Checkpoints that are not reentrant do not need it.
        cast(Any, model).enable_input_require_grads = _ask_for_nothing


def _ask_for_nothing() -> None:
    """Take the place of a model's `enable_input_require_grads`."""


def _without_influence(model: LlavaForConditionalGeneration) -> list[nn.Parameter]:
    """Parameters of the vision tower that the features do not depend on, found without running a weight."""
    tower = model.model.vision_tower
    config: Any = tower.config
    weights = {k: torch.empty_like(p, device="meta", requires_grad=True) for k, p in tower.named_parameters()}
    buffers = {k: b.to("meta") for k, b in tower.named_buffers()}
    pixels = torch.empty(1, config.num_channels, image_px(model), image_px(model), device="meta")
    made: Any = functional_call(tower, {**weights, **buffers}, (pixels,), {"output_hidden_states": True})
    layer = model.config.vision_feature_layer
    layers = [layer] if isinstance(layer, int) else layer
    features = torch.stack([made.hidden_states[i].sum() for i in layers]).sum()
    gradients = torch.autograd.grad(features, list(weights.values()), allow_unused=True)
    return [tower.get_parameter(k) for k, gradient in zip(weights, gradients, strict=True) if gradient is None]


def see_blank(model: LlavaForConditionalGeneration) -> None:
    """Let batches without an image run the vision tower too, on a black image whose features count for nothing.

    Several processes exchange the same gradients, and shards of the same weights, in the same order: where one has
    images and another has none, they would fail or wait for each other. A step in which no process has an image gives
    the tower gradients of zero, where one process alone gives none: AdamW then moves it by its momentum.
    """
    inner: Any = model.model
    side, channels = image_px(model), cast(Any, inner.vision_tower.config).num_channels

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("pixel_values") is not None:
            return

        def add(embedding: nn.Module, ids: Any, embeds: torch.Tensor) -> torch.Tensor:
            added.remove()
            blank = torch.zeros(1, channels, side, side, dtype=embeds.dtype, device=embeds.device)
            features = torch.stack(list(module.get_image_features(blank, return_dict=True).pooler_output))
            return embeds + 0 * features.sum().to(embeds.dtype)

        # Behind the embedding, as with images: weights that are gathered in another order would not fit together.
        added = module.get_input_embeddings().register_forward_hook(add)

    inner.register_forward_pre_hook(before, with_kwargs=True)


def parameter_groups(
    model: LlavaForConditionalGeneration, rates: dict[str, float], weight_decay: float, decayed: set[str]
) -> list[dict[str, Any]]:
    """One optimizer group per trained part and decay, each with its part's rate.

    Args:
        model: the MLLM, frozen parts already without gradients.
        rates: peak learning rate of each trained part.
        weight_decay: for the parameters named in `decayed`; others (norms, biases) get none.
        decayed: names of parameters that decay.
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
