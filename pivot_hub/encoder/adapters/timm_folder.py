"""An encoder in timm's format: a folder that `timm.create_model` loads, whose output is the features of the encoder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from pivot_hub.config.encoder_names import resolve_encoder
from pivot_hub.encoder.repository import encoder_metadata, read_encoder
from pivot_hub.errors import ExportError
from pivot_hub.files import write_json
from pivot_hub.outputs import OutputKind, check_replaceable, whole_folder

TIMM = OutputKind("a timm model", "pivot.json", "pivot_hub.encoder.adapters.timm_folder.write_timm", mark="pivot.json")
# A model of timm's that has the norms and MLPs of an architecture, which JSON cannot hold, and further arguments.
# transformers' ViT has an epsilon of 1e-12 in its norms where timm has 1e-6: features of ViT and MAE differ slightly,
# by up to 3e-4 in small random encoders, and are equal once the norms' epsilon is set.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "siglip_vision_model": ("vit_base_patch16_siglip_gap_224", {"class_token": False}),
    "clip_vision_model": ("vit_base_patch16_clip_quickgelu_224", {}),
    "dinov2": ("vit_base_patch14_dinov2", {}),
    "dinov2_with_registers": ("vit_base_patch14_reg4_dinov2", {}),
    "vit": ("vit_base_patch16_224", {}),
    "aimv2_vision_model": ("aimv2_large_patch14_224", {"class_token": False}),
}
SWIGLU = {"dinov2": "vit_giant_patch14_dinov2", "dinov2_with_registers": "vit_giant_patch14_reg4_dinov2"}
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "silu": "silu"}
# transformers' names of weights, of all its releases, and timm's.
RENAMED = (
    (r"^vision_model\.", ""),
    (r"^(?:encoder\.)?layers?\.", "blocks."),
    (r"\.(?:layer_norm1|layernorm_before|rms_norm1)\.", ".norm1."),
    (r"\.(?:layer_norm2|layernorm_after|rms_norm2)\.", ".norm2."),
    (r"\.(?:attention\.output\.dense|(?:self_attn|attention)\.o(?:ut)?_proj)\.", ".attn.proj."),
    (r"\.(?:attention\.attention|self_attn|attention)\.(q|k|v)(?:uery|ey|alue|_proj)\.", r".attn.\1."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.ffn\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.ffn\.up_proj\.", ".mlp.fc1_x."),
    (r"\.(?:ffn\.down_proj|mlp\.weights_out)\.", ".mlp.fc2."),
    (r"\.(?:mlp\.weights_in|intermediate\.dense)\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^embeddings\.patch_embed(?:dings?\.projection|ding|)\.", "patch_embed.proj."),
    (r"^embeddings\.rms_norm\.", "patch_embed.norm."),
    (r"^embeddings\.position_embeddings?(?:\.weight)?$", "pos_embed"),
    (r"^embeddings\.(?:class_embedding|cls_token)$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(?:post_layernorm|layernorm|rms_norm)\.", "norm."),
)
LEFT_OUT = ("head.", "pooler.", "embeddings.mask_token", "embeddings.position_ids")


def write_timm(name: str | Path, output: str | Path, **options: Any) -> Path:
    """Write an encoder as a timm model: `timm.create_model("local-dir:OUTPUT", pretrained=True)`.

    Pushed to the Hub, the folder loads as `hf-hub:OWNER/NAME`. The model ends at the feature layer: `forward_features`
    gives its tokens, prefix tokens included, and the model itself the mean of the patch tokens. Blocks above the
    feature layer and the final norm behind them are left out. `timm.data.create_transform` gives the image processor's
    pixels.

    Args:
        name: Folder, Hub name or short name of the encoder.
        output: Folder to write; an earlier one is replaced.
        **options: Options of `read_encoder`, such as feature_layer.

    Returns:
        The output folder.

    Raises:
        CheckpointError: The encoder cannot be loaded.
        ExportError: timm has no class that computes the same features.
        OutputError: The output holds anything but such a model.
    """
    check_replaceable(Path(output), TIMM)
    source = resolve_encoder(name, revision=options.get("revision"))
    encoder, processor = read_encoder(source, **options)
    native: Any = encoder.config.backbone_config
    if native.model_type not in ARCHITECTURES:
        raise ExportError(
            f"{name}: timm's class for {native.model_type} does not give the features before the final norm, or "
            f"there is none; give an encoder of {', '.join(ARCHITECTURES)}."
        )
    layer, layers = encoder.config.pivot["feature_layer"], native.num_hidden_layers
    depth = layers if isinstance(layer, str) else layer % (layers + 1)
    has_norm = isinstance(layer, str) and native.model_type != "clip_vision_model"  # which norms its pooled CLS only
    weights = _weights(cast(Mapping[str, Tensor], encoder.backbone.state_dict()), depth, has_norm)
    architecture, arguments = ARCHITECTURES[native.model_type]
    if getattr(native, "use_swiglu_ffn", False):
        architecture = SWIGLU[native.model_type]
    else:
        arguments = arguments | {"act_layer": ACTIVATIONS[native.hidden_act]}
    hidden = next(tensor.shape[0] for key, tensor in weights.items() if key.startswith("blocks.0.mlp.fc1"))
    arguments = arguments | {
        "img_size": encoder.config.image_size,
        "patch_size": encoder.config.patch_size,
        "embed_dim": native.hidden_size,
        "depth": depth,
        "num_heads": native.num_attention_heads,
        "mlp_ratio": (hidden + 0.5) / native.hidden_size,  # timm rounds its product with the width down
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "global_pool": "avg",
        "fc_norm": False,
        "final_norm": has_norm,
    }
    if "reg_token" in weights:
        arguments["reg_tokens"] = weights["reg_token"].shape[1]
    with whole_folder(Path(output), TIMM) as folder:
        save_file(weights, folder / "model.safetensors")
        config = {
            "architecture": architecture,
            "num_classes": 0,
            "num_features": native.hidden_size,
            "global_pool": "avg",
            "model_args": arguments,
            "pretrained_cfg": _preprocessing(processor, encoder.config.image_size) | {"num_classes": 0},
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        files = ["config.json", "model.safetensors"]
        write_json(folder / "pivot.json", {**encoder_metadata(source), "feature_layer": layer, "files": files})
    return Path(output)


def _weights(native: Mapping[str, Tensor], depth: int, has_norm: bool) -> dict[str, Tensor]:
    """Rename the weights of a native class to timm's, join queries, keys and values, and cut what is above `depth`."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in native.items():
        if key.startswith(LEFT_OUT):
            continue
        for pattern, replacement in RENAMED:
            key = re.sub(pattern, replacement, key)
        block = re.match(r"blocks\.(\d+)\.", key)
        if (block is not None and int(block[1]) >= depth) or (key.startswith("norm.") and not has_norm):
            continue
        renamed[key] = tensor.detach().cpu()
    for key in [key for key in renamed if ".attn.q." in key]:
        parts = [renamed.pop(key.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        renamed[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    width = renamed["pos_embed"].shape[-1]
    renamed["pos_embed"] = renamed["pos_embed"].reshape(1, -1, width)
    if "cls_token" in renamed:
        renamed["cls_token"] = renamed["cls_token"].reshape(1, 1, width)
    if "reg_token" in renamed:  # timm's models with registers add no position to CLS, so it is added here
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:]
    return {key: tensor.contiguous().clone() for key, tensor in renamed.items()}


def _preprocessing(processor: Any, image_px: int) -> dict[str, Any]:
    """Describe an image processor as timm does, for `timm.data.create_transform`."""
    size = dict(processor.size)
    edge: Any = size.get("shortest_edge")
    cropped = edge is not None and bool(getattr(processor, "do_center_crop", None))
    return {
        "input_size": [3, image_px, image_px],
        "mean": list(processor.image_mean) if processor.do_normalize else [0.0] * 3,
        "std": list(processor.image_std) if processor.do_normalize else [1.0] * 3,
        "interpolation": Image.Resampling(int(processor.resample)).name.lower(),
        "crop_pct": image_px / edge if cropped else 1.0,
        "crop_mode": "center" if cropped else "squash",
    }
