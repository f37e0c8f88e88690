"""Encoders: their classes, registered with the Auto classes, and their repositories, exports and features."""

from transformers import AutoBackbone, AutoConfig, AutoModel

from pivot_hub.encoder.configuration_pivot import PivotVisionConfig
from pivot_hub.encoder.modeling_pivot import PivotVisionBackbone, PivotVisionModel

AutoConfig.register("pivot_vision", PivotVisionConfig, exist_ok=True)
AutoModel.register(PivotVisionConfig, PivotVisionModel, exist_ok=True)
AutoBackbone.register(PivotVisionConfig, PivotVisionBackbone, exist_ok=True)

__all__ = ["PivotVisionBackbone", "PivotVisionConfig", "PivotVisionModel"]
