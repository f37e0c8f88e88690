"""Encoders: their classes, registered with the Auto classes, and their repositories, exports and features."""

from transformers import AutoBackbone, AutoConfig, AutoModel

from pivot_hub.config.encoder_names import accept_short_names
from pivot_hub.encoder.configuration_pivot import PivotVisionConfig
from pivot_hub.encoder.modeling_pivot import PivotVisionBackbone, PivotVisionModel

# The classes' files travel with published encoders and know no short names.
accept_short_names(PivotVisionConfig)
accept_short_names(PivotVisionModel)  # and PivotVisionBackbone, which inherits it
AutoConfig.register("pivot_vision", PivotVisionConfig, exist_ok=True)
AutoModel.register(PivotVisionConfig, PivotVisionModel, exist_ok=True)
AutoBackbone.register(PivotVisionConfig, PivotVisionBackbone, exist_ok=True)

__all__ = ["PivotVisionBackbone", "PivotVisionConfig", "PivotVisionModel"]
