"""Configuration of a PIVOT encoder: the native config of its backbone, and what was done to it.

This file travels with every published encoder: it imports transformers only.
"""

from dataclasses import dataclass

from transformers import AutoConfig, PretrainedConfig


@dataclass(frozen=True)
class Backbone:
    """What differs between vision architectures.

    Args:
        model_type: of the vision config.
        prefix_tokens: tokens before the first patch, as CLS: CLIP 1, SigLIP 0.
        key_prefix: put before every key transformers writes, to give the keys of the original Hub checkpoint.
            transformers 5 drops `vision_model.` from SigLIP and CLIP towers, and 4.57 then loads the file with
            random weights and only a warning; both read the canonical keys.
    """

    model_type: str
    prefix_tokens: int
    key_prefix: str = ""


BACKBONES = {
    backbone.model_type: backbone
    for backbone in (
        Backbone("siglip_vision_model", prefix_tokens=0, key_prefix="vision_model."),
        Backbone("clip_vision_model", prefix_tokens=1, key_prefix="vision_model."),
        Backbone("dinov2", prefix_tokens=1),
        Backbone("vit", prefix_tokens=1),
    )
}


def backbone_of(config: PretrainedConfig) -> Backbone:
    """Look up a vision config's architecture.

    Raises:
        ValueError: the architecture is not in the table; the message lists those that are.
    """
    if config.model_type not in BACKBONES:
        known = ", ".join(BACKBONES)
        raise ValueError(f"vision architecture {config.model_type!r} is not supported; give one of: {known}.")
    return BACKBONES[config.model_type]


class PivotVisionConfig(PretrainedConfig):
    """A backbone's native config with the facts of its PIVOT training.

    Args:
        backbone_config: the native config, or its dict; a small SigLIP by default.
        pivot: stage, base_model, base_revision, feature_layer, prefix_tokens, language_head, recipe_sha256,
            pivot_hub_version. Of an encoder this package did not train, stage is `base` and the rest is unset.
    """

    model_type = "pivot_vision"

    def __init__(self, backbone_config=None, pivot=None, **kwargs):
        if backbone_config is None:
            backbone_config = {"model_type": "siglip_vision_model"}
        if isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        backbone_config = getattr(backbone_config, "vision_config", backbone_config)
        self.backbone_config = backbone_config
        given = {"stage": "base", "feature_layer": -2, **(pivot or {})}
        given.setdefault("prefix_tokens", backbone_of(backbone_config).prefix_tokens)
        self.pivot = given
        self.hidden_size = backbone_config.hidden_size
        self.image_size = backbone_config.image_size
        self.patch_size = backbone_config.patch_size
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Read our own layout, or a native config.json with a `pivot` entry or without."""
        if config_dict.get("model_type") == cls.model_type:
            return super().from_dict(config_dict, **kwargs)
        native = {k: v for k, v in config_dict.items() if k not in ("pivot", "auto_map")}
        # AutoModel finds the remote class by the config's auto_map.
        ours = {k: config_dict[k] for k in ("pivot", "auto_map") if k in config_dict}
        return super().from_dict({"backbone_config": native, **ours}, **kwargs)

    def to_dict(self):
        made = super().to_dict()
        made["backbone_config"] = self.backbone_config.to_dict()
        return made
