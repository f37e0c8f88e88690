"""LoRA adapters on the language model, while the encoder is trained in full."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from pivot_hub.config.recipe import LoraSpec
from pivot_hub.errors import RecipeError
from pivot_hub.mllm.families import family_of


def add_lora(model: PreTrainedModel, spec: LoraSpec, seed: int) -> None:
    """Put adapters on every linear layer of the language model and freeze its other parameters.

    The model keeps its class and is called as before. Adapters start at zero, so they change no output at first.

    Args:
        model: The MLLM.
        spec: Rank, alpha and dropout of the adapters.
        seed: Seed of the adapters' weights.

    Raises:
        RecipeError: The package peft is not installed.
    """
    if find_spec("peft") is None:
        raise RecipeError("`lora` needs peft; install it with `pip install 'pivot-hub[lora]'`, or leave `lora` out.")
    from peft import LoraConfig, inject_adapter_in_model

    language: Any = getattr(model.model, family_of(model.config).language)
    linear = {name for name, module in language.named_modules() if isinstance(module, nn.Linear)}
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=sorted(linear), bias="none"
    )
    on_meta = next(language.parameters()).is_meta
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, cast(Any, language), low_cpu_mem_usage=on_meta)
    for part in (language, cast(nn.Module, model.get_output_embeddings())):
        for name, parameter in part.named_parameters():
            parameter.requires_grad_("lora_" in name)


def merge_lora(model: PreTrainedModel) -> None:
    """Add the adapters to the weights that they adapt and remove them; a model without adapters is left as it is."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "lora_A"):
                layer: Any = child
                layer.merge(safe_merge=True)
                setattr(parent, name, layer.get_base_layer())


def has_lora(model: nn.Module) -> bool:
    """Tell whether the model has adapters."""
    return any(hasattr(module, "lora_A") for module in model.modules())
