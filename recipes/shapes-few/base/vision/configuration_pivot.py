"""Configuration of a PIVOT encoder: the native config of its backbone, and how it was trained.

This file is copied into every published encoder, so it imports transformers and its neighbour only.
"""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import AutoConfig, PretrainedConfig
from transformers import __version__ as version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .native_resolution import merge_side


@dataclass(frozen=True)
class Backbone:
    """Properties in which vision architectures differ.

    Args:
        model_type: Model type of the vision config.
        image_processor: transformers' image processor class, used if the repository names none or the class in
            `replaces`.
        prefix_tokens: Number of tokens before the first patch, such as CLS: 1 for CLIP, 0 for SigLIP. Registers,
            which the config counts, are added to it.
        feature_layer: Hidden state that enters an MLLM, -2 in the paper, or LAST.
        key_prefix: Prefix of every key in the original Hub checkpoint that transformers leaves out when it saves.
            transformers 5 drops `vision_model.` from SigLIP and CLIP towers, and 4.57 then loads the file with
            random weights and only a warning. Both versions read the original keys.
        interpolates: Whether `forward` has the option `interpolate_pos_encoding`. Without it, an architecture
            either takes every image size or refuses all but its own.
        native_type: Model type that the encoder is loaded and written as, if its own class is not a plain encoder.
        optional: Prefixes of keys that original checkpoints may lack and that no feature uses. Such weights are set
            to the identity or zero, never to random values.
        maps: Whether hidden states are maps (B, D, H, W) instead of tokens (B, N, D).
        replaces: Image processor class that needs torchvision and that `image_processor` replaces step by step.
        image_px: Function that returns the side of the square images that a config is for, in pixels.
        layout: How images of their own shapes enter a tower of native resolution, from `native_resolution.LAYOUTS`;
            None for an encoder of square images of one size.
        merge: Name of the config's entry that says how many patches a side the tower joins to one token at its end.
        last_size: Name of the config's entry that says how many channels LAST has.
        model_class: Name of transformers' class, where AutoModel has no entry for it in every release that has it.
    """

    model_type: str
    image_processor: str
    prefix_tokens: int = 0
    feature_layer: int | str = -2
    key_prefix: str = ""
    interpolates: bool = False
    native_type: str | None = None
    optional: tuple[str, ...] = ()
    maps: bool = False
    replaces: str | None = None
    image_px: Callable[[PretrainedConfig], int] = lambda config: _side(config.image_size)
    layout: str | None = None
    merge: str | None = None
    last_size: str = "hidden_size"
    model_class: str | None = None


# Features that are no hidden state: the output after the final norm, and the tokens that a tower of native resolution
# has merged from several patches, as its language model receives them.
LAST, MERGED = "last_hidden_state", "merged"
# Largest values of a config's sizes. A config beyond them is damaged or hostile: it would fill the memory, or hang.
MOST = {
    "image_size": 8192,
    "patch_size": 8192,
    "num_channels": 64,
    "num_hidden_layers": 1000,
    "depth": 1000,
    "num_heads": 4096,
    "embed_dim": 65_536,
    "out_hidden_size": 65_536,
    "temporal_patch_size": 64,
    "spatial_merge_size": 64,
    "num_position_embeddings": 16_777_216,
    "position_embedding_size": 1_048_576,
    "num_patches": 16_777_216,
    "num_attention_heads": 4096,
    "hidden_size": 65_536,
    "intermediate_size": 1_048_576,
    "vocab_size": 10_000_000,
}


def check_sizes(config: PretrainedConfig) -> None:
    """Refuse a config whose sizes are no numbers, below 1, or too large, before anything is allocated.

    Raises:
        ValueError: A size is wrong; the message names it.
    """
    for key, most in MOST.items():
        value = getattr(config, key, 1)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= most:
                raise ValueError(
                    f"{key} of {number!r} in config.json is not a number from 1 to {most}; restore the file."
                )
    registers = getattr(config, "num_register_tokens", 0)
    if not isinstance(registers, int) or not 0 <= registers <= 1024:
        raise ValueError(f"num_register_tokens of {registers!r} in config.json is not a number from 0 to 1024.")


def check_feature_layer(layer: int | str, layers: int | None, merges: bool = False) -> None:
    """Refuse a feature layer that an encoder does not have.

    Args:
        layer: Hidden state that enters an MLLM, `last_hidden_state`, or `merged`.
        layers: Number of the encoder's layers; None if it is not known.
        merges: Whether the encoder merges patches, so that it has `merged` tokens.

    Raises:
        ValueError: The layer is not one number or name, or out of range; the message names the range.
    """
    if layer == LAST or (merges and layer == MERGED):
        return
    if isinstance(layer, str):
        names = f"{LAST} or {MERGED}" if merges else LAST
        raise ValueError(f"feature layer {layer!r} is not known; give the number of a hidden state, or {names}.")
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ValueError(f"feature layer {layer!r}: features of several layers are not supported; give one number.")
    if layers is not None and not -layers - 1 <= layer <= layers:
        raise ValueError(f"feature layer {layer}: the encoder has {layers} layers; give {-layers - 1} to {layers}.")


def _side(size):
    """Return the side of a square size that is given as a number or as a pair."""
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise ValueError(f"images or patches of {size} px are not square; give an encoder of one side length.")
    return size[0]


def _timm_side(config):
    """Return the image size of a timm config, whose model arguments override the size used in training."""
    overridden = (config.model_args or {}).get("img_size")
    return _side(overridden or getattr(config, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[1:])


BACKBONES = {
    backbone.model_type: backbone
    for backbone in (
        Backbone("siglip_vision_model", "SiglipImageProcessor", key_prefix="vision_model.", interpolates=True),
        Backbone("clip_vision_model", "CLIPImageProcessor", 1, key_prefix="vision_model.", interpolates=True),
        Backbone("dinov2", "BitImageProcessor", 1),
        Backbone("dinov2_with_registers", "BitImageProcessor", 1),
        Backbone("dinov3_vit", "ViTImageProcessor", 1, replaces="DINOv3ViTImageProcessor"),
        Backbone("vit", "ViTImageProcessor", 1, interpolates=True, optional=("pooler.",)),
        # ViTMAEModel masks three quarters of the patches and shuffles the rest; ViTModel is the plain encoder.
        Backbone("vit_mae", "ViTImageProcessor", 1, interpolates=True, native_type="vit", optional=("pooler.",)),
        Backbone("aimv2_vision_model", "CLIPImageProcessor"),
        Backbone("timm_wrapper", "TimmWrapperImageProcessor", maps=True, image_px=_timm_side),
        # Towers of MLLMs. Their projectors see the last hidden state, after the final norm where there is one.
        Backbone("idefics3_vision", "SiglipImageProcessor", feature_layer=LAST),
        Backbone("smolvlm_vision", "SiglipImageProcessor", feature_layer=LAST),
        Backbone("internvl_vision", "GotOcr2ImageProcessor", 1, feature_layer=LAST),
        Backbone("siglip2_vision_model", "Siglip2ImageProcessor", layout="spatial_shapes", key_prefix="vision_model."),
        Backbone("pixtral", "PixtralImageProcessor", feature_layer=-1, layout="image_sizes"),
        *(
            Backbone(
                f"{name}_vision",
                "Qwen2VLImageProcessor",
                feature_layer=LAST,
                merge="spatial_merge_size",
                **{"layout": "grid_thw in blocks", **entries},
            )
            for name, entries in (
                ("qwen2_vl", {"model_class": "Qwen2VisionTransformerPretrainedModel", "last_size": "embed_dim"}),
                (
                    "qwen2_5_vl",
                    {"model_class": "Qwen2_5_VisionTransformerPretrainedModel", "layout": "grid_thw in windows"},
                ),
                ("qwen3_vl", {}),
                ("qwen3_vl_moe", {}),
                ("qwen3_5", {}),
                ("qwen3_5_moe", {}),
            )
        ),
        *(
            Backbone(
                f"{name}_vision",
                "Glm4vImageProcessor",
                feature_layer=LAST,
                layout="grid_thw in blocks",
                merge="spatial_merge_size",
                last_size="out_hidden_size",
            )
            for name in ("glm4v", "glm4v_moe")
        ),
        Backbone(
            "kimi_k25_vision",
            "Kimi_K25ImageProcessor",
            feature_layer=LAST,
            layout="grid_thw",
            merge="merge_kernel_size",
        ),
        Backbone(
            "gemma4_vision",
            "Gemma4ImageProcessor",
            feature_layer=LAST,
            layout="position_ids",
            merge="pooling_kernel_size",
        ),
        Backbone(
            "mllama_vision_model",
            "MllamaImageProcessor",
            1,
            feature_layer=LAST,
            layout="tiles",
            last_size="vision_output_dim",
            model_class="MllamaVisionModel",
        ),
    )
}


def backbone_of(config: PretrainedConfig) -> Backbone:
    """Return the properties of a vision config's architecture.

    Raises:
        ValueError: The architecture is not supported; the message lists those that are.
    """
    if config.model_type not in BACKBONES:
        known = ", ".join(BACKBONES)
        raise ValueError(f"vision architecture {config.model_type!r} is not supported; give one of: {known}.")
    return BACKBONES[config.model_type]


def prefix_tokens(config: PretrainedConfig) -> int:
    """Return the number of tokens before the first patch: CLS and registers."""
    return backbone_of(config).prefix_tokens + getattr(config, "num_register_tokens", 0)


def feature_size(config: PretrainedConfig, layer: int | str) -> int:
    """Return the number of channels of a hidden state, of LAST, or of MERGED tokens."""
    backbone, own = backbone_of(config), getattr(config, "embed_dim", config.hidden_size)
    if layer == LAST:
        return getattr(config, backbone.last_size)
    if layer != MERGED or backbone.merge == "pooling_kernel_size":  # Gemma 4 merges in its last step
        return own
    # Kimi joins the channels of the patches; the others project them to the language model's.
    joined = (
        own * merge_side(config, backbone.merge) ** 2 if hasattr(config, "merge_kernel_size") else config.hidden_size
    )
    return getattr(config, "out_hidden_size", joined)


def native_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the vision config of a model, converted to the model type that its encoder is written as.

    Args:
        config: Config of an encoder, or of a two-tower model or an MLLM that contains one.
    """
    config = getattr(config, "vision_config", config)
    native_type = backbone_of(config).native_type
    check_sizes(config)
    if not backbone_of(config).maps and backbone_of(config).layout is None:
        image_px, patch = backbone_of(config).image_px(config), _side(config.patch_size)
        if patch > image_px:
            raise ValueError(f"patches of {patch} px in config.json are larger than images of {image_px} px.")
    if native_type is None:
        return config
    known = AutoConfig.for_model(native_type).to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    return AutoConfig.for_model(native_type, **{k: v for k, v in config.to_dict().items() if k in known})


class PivotVisionConfig(PretrainedConfig):
    """Native config of a backbone, with metadata of its PIVOT training.

    Args:
        backbone_config: Native config or its dictionary; a small SigLIP by default.
        pivot: Metadata with the keys stage, base_model, base_revision, feature_layer, prefix_tokens, language_head,
            recipe_sha256 and pivot_hub_version. For an encoder that this package did not train, stage is `base` and
            only feature_layer and prefix_tokens are set besides. A saved PivotVisionBackbone has out_indices too.
        out_indices: Hidden states that `PivotVisionBackbone` returns as maps; the feature layer by default.

    Attributes:
        image_size: Side of the square images in pixels; None for a tower of native resolution.
        patch_size: Side of a patch in pixels. None for a timm model until it is built, since its config has no such
            entry.
        hidden_size: Number of channels D of the features. None for a timm model until it is built.
    """

    model_type = "pivot_vision"

    def __init__(self, backbone_config=None, pivot=None, out_indices=None, **kwargs):
        if backbone_config is None:
            backbone_config = {"model_type": "siglip_vision_model"}
        if isinstance(backbone_config, dict):
            model_type = backbone_config.get("model_type")
            if model_type in BACKBONES and model_type not in CONFIG_MAPPING:
                raise ValueError(f"transformers {version} has no class for {model_type}; install a newer transformers.")
            backbone_config = AutoConfig.for_model(**backbone_config)
        self.backbone_config = backbone_config = native_config(backbone_config)
        backbone = backbone_of(backbone_config)
        pivot, prefix = dict(pivot or {}), prefix_tokens(backbone_config)
        saved_indices = pivot.pop("out_indices", None)
        out_indices = saved_indices if out_indices is None else out_indices
        self.pivot = {"stage": "base", "feature_layer": backbone.feature_layer, "prefix_tokens": prefix, **pivot}
        if self.pivot["prefix_tokens"] != prefix:
            raise ValueError(
                f"prefix_tokens of {self.pivot['prefix_tokens']!r} in config.json: {backbone_config.model_type} has "
                f"{prefix}; restore the file."
            )
        self.num_hidden_layers = getattr(backbone_config, "num_hidden_layers", getattr(backbone_config, "depth", None))
        check_feature_layer(self.pivot["feature_layer"], self.num_hidden_layers, backbone.merge is not None)
        self.image_size = None if backbone.layout else backbone.image_px(backbone_config)
        self.patch_size = None if backbone.maps else _side(backbone_config.patch_size)
        self.hidden_size = None if backbone.maps else feature_size(backbone_config, self.pivot["feature_layer"])
        self.out_indices = out_indices
        super().__init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Read a config.json in this class's own layout, or a native one with or without a `pivot` entry."""
        values, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not isinstance(values, dict):
            raise ValueError(f"{pretrained_model_name_or_path}: config.json is not a JSON object; restore the file.")
        if values.get("model_type") == cls.model_type:
            return values, unused
        native = {k: v for k, v in values.items() if k not in ("pivot", "auto_map")}
        # AutoModel looks up the remote class in the config's auto_map.
        own = {k: values[k] for k in ("pivot", "auto_map") if k in values}
        return {"model_type": cls.model_type, "backbone_config": native, **own}, unused

    def to_dict(self):
        values = super().to_dict()
        values["backbone_config"] = self.backbone_config.to_dict()
        return values
