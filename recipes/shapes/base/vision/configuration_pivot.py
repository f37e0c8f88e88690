"""Configuration of a PIVOT encoder: the native config of its backbone, and what was done to it.

This file travels with every published encoder: it imports transformers only.
"""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import AutoConfig, PretrainedConfig


@dataclass(frozen=True)
class Backbone:
    """What differs between vision architectures.

    Args:
        model_type: of the vision config.
        image_processor: transformers' class for its images, where the repository names none or the one it replaces.
        replaces: a class that needs torchvision, whose steps image_processor does without.
        prefix_tokens: tokens before the first patch, as CLS: CLIP 1, SigLIP 0. Registers, which the config counts,
            are added.
        feature_layer: hidden state that an MLLM sees, -2 in the paper.
        key_prefix: put before every key transformers writes, to give the keys of the original Hub checkpoint.
            transformers 5 drops `vision_model.` from SigLIP and CLIP towers, and 4.57 then loads the file with
            random weights and only a warning; both read the canonical keys.
        interpolates: its `forward` takes `interpolate_pos_encoding`; others take other image sizes or refuse them.
        native_type: another model type whose class computes it as an encoder, and in which it is written.
        optional: beginnings of keys that original checkpoints may lack and no feature uses: never random, identity.
        maps: its hidden states are maps (B, D, H, W), not tokens (B, N, D).
        image_px: side of the square images its config is made for.
    """

    model_type: str
    image_processor: str
    prefix_tokens: int = 0
    feature_layer: int = -2
    key_prefix: str = ""
    interpolates: bool = False
    native_type: str | None = None
    optional: tuple[str, ...] = ()
    maps: bool = False
    replaces: str | None = None
    image_px: Callable[[PretrainedConfig], int] = lambda config: _side(config.image_size)


def _side(size):
    """One side of a square size, given as a number or a pair."""
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise ValueError(f"images or patches of {size} px are not square; give an encoder of one side length.")
    return size[0]


def _timm_side(config):
    """timm's model arguments come before the size that its weights were trained on."""
    given = (config.model_args or {}).get("img_size")
    return _side(given or getattr(config, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[1:])


BACKBONES = {
    backbone.model_type: backbone
    for backbone in (
        Backbone("siglip_vision_model", "SiglipImageProcessor", key_prefix="vision_model.", interpolates=True),
        Backbone("clip_vision_model", "CLIPImageProcessor", 1, key_prefix="vision_model.", interpolates=True),
        Backbone("dinov2", "BitImageProcessor", 1),
        Backbone("dinov2_with_registers", "BitImageProcessor", 1),
        Backbone("dinov3_vit", "ViTImageProcessor", 1, replaces="DINOv3ViTImageProcessor"),
        Backbone("vit", "ViTImageProcessor", 1, interpolates=True, optional=("pooler.",)),
        # ViTMAEModel masks three patches of four and shuffles the rest; ViTModel is the encoder itself.
        Backbone("vit_mae", "ViTImageProcessor", 1, interpolates=True, native_type="vit", optional=("pooler.",)),
        Backbone("aimv2_vision_model", "CLIPImageProcessor"),
        Backbone("timm_wrapper", "TimmWrapperImageProcessor", maps=True, image_px=_timm_side),
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


def prefix_tokens(config: PretrainedConfig) -> int:
    """Tokens before the first patch: CLS and registers."""
    return backbone_of(config).prefix_tokens + getattr(config, "num_register_tokens", 0)


def native_config(config: PretrainedConfig) -> PretrainedConfig:
    """The vision config of a model, in the type its encoder is written in.

    Args:
        config: of an encoder, or of a two-tower model or an MLLM, whose vision config is taken.
    """
    config = getattr(config, "vision_config", config)
    native_type = backbone_of(config).native_type
    if native_type is None:
        return config
    known = AutoConfig.for_model(native_type).to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    return AutoConfig.for_model(native_type, **{k: v for k, v in config.to_dict().items() if k in known})


class PivotVisionConfig(PretrainedConfig):
    """A backbone's native config with the facts of its PIVOT training.

    Args:
        backbone_config: the native config, or its dict; a small SigLIP by default.
        pivot: stage, base_model, base_revision, feature_layer, prefix_tokens, language_head, recipe_sha256,
            pivot_hub_version. Of an encoder this package did not train, stage is `base` and the rest is unset.
        out_indices: hidden states that `PivotVisionBackbone` gives as maps; the feature layer's by default.

    Attributes:
        image_size: side of the images in pixels; patch_size: of a patch; hidden_size: D. The last two are None for
            a timm model until it is built, because its config does not tell them.
    """

    model_type = "pivot_vision"

    def __init__(self, backbone_config=None, pivot=None, out_indices=None, **kwargs):
        if backbone_config is None:
            backbone_config = {"model_type": "siglip_vision_model"}
        if isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        self.backbone_config = backbone_config = native_config(backbone_config)
        backbone = backbone_of(backbone_config)
        self.pivot = {
            "stage": "base",
            "feature_layer": backbone.feature_layer,
            "prefix_tokens": prefix_tokens(backbone_config),
            **(pivot or {}),
        }
        self.image_size = backbone.image_px(backbone_config)
        self.patch_size = None if backbone.maps else _side(backbone_config.patch_size)
        self.hidden_size = None if backbone.maps else backbone_config.hidden_size
        self.num_hidden_layers = getattr(backbone_config, "num_hidden_layers", None)
        self.out_indices = out_indices
        super().__init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Read our own layout, or a native config.json with a `pivot` entry or without."""
        found, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if found.get("model_type") == cls.model_type:
            return found, unused
        native = {k: v for k, v in found.items() if k not in ("pivot", "auto_map")}
        # AutoModel finds the remote class by the config's auto_map.
        ours = {k: found[k] for k in ("pivot", "auto_map") if k in found}
        return {"model_type": cls.model_type, "backbone_config": native, **ours}, unused

    def to_dict(self):
        made = super().to_dict()
        made["backbone_config"] = self.backbone_config.to_dict()
        return made
