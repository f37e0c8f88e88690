"""Encoders: the class that exposes them, registered with the Auto classes, and the repositories that hold them."""

from transformers import AutoConfig, AutoModel

from pivot_hub.encoder.configuration_pivot import PivotVisionConfig
from pivot_hub.encoder.modeling_pivot import PivotVisionModel

AutoConfig.register("pivot_vision", PivotVisionConfig, exist_ok=True)
AutoModel.register(PivotVisionConfig, PivotVisionModel, exist_ok=True)

__all__ = ["PivotVisionConfig", "PivotVisionModel"]
