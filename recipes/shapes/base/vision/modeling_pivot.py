"""PivotVisionModel: one class over any backbone, whose output is what an MLLM sees of an image.

This file travels with every published encoder: it imports torch, transformers and its own configuration only.
"""

from copy import deepcopy

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_pivot import PivotVisionConfig


class PivotVisionModel(PreTrainedModel):
    """A vision encoder that returns patch tokens at its feature layer, prefix tokens dropped."""

    config_class = PivotVisionConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config, backbone=None):
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone_config) if backbone is None else backbone
        if backbone is None:
            self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """Load any native repository: one of ours, or an untouched original (then stage is `base`).

        Args:
            pretrained_model_name_or_path: folder or Hub name; of a two-tower model the vision tower is taken.
            config: a PivotVisionConfig to use instead of the repository's.
            **kwargs: as for transformers' own `from_pretrained`.

        Raises:
            ValueError: weights are missing, or the architecture is not supported.
        """
        # The Auto classes hand remote-code settings through; the backbone is always a native class.
        for name in ("trust_remote_code", "code_revision", "adapter_kwargs"):
            kwargs.pop(name, None)
        wanted = kwargs.pop("output_loading_info", False)
        where = {
            k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only", "subfolder") if k in kwargs
        }
        native = AutoConfig.from_pretrained(pretrained_model_name_or_path, **where)
        native = getattr(native, "vision_config", native)  # of two towers, the one that sees
        if not isinstance(config, PivotVisionConfig):
            found, _ = PivotVisionConfig.get_config_dict(pretrained_model_name_or_path, **where)
            config = PivotVisionConfig.from_dict(found)
        backbone, info = AutoModel.from_pretrained(
            pretrained_model_name_or_path, *args, config=native, output_loading_info=True, **kwargs
        )
        missing = sorted(info["missing_keys"])
        if missing or info["mismatched_keys"]:
            raise ValueError(
                f"{pretrained_model_name_or_path}: {len(missing) or 'some'} weights are missing or of another "
                f"shape ({', '.join(missing[:3])}); download it again, random weights are never used."
            )
        config.backbone_config = backbone.config
        model = cls(config, backbone).eval()
        return (model, info) if wanted else model

    @classmethod
    def from_mllm(cls, mllm, pivot=None):
        """Copy the encoder out of a LLaVA-style model, which is left as it is.

        Args:
            mllm: a LlavaForConditionalGeneration.
            pivot: facts of its training for the config; feature_layer is read from the model.
        """
        backbone = deepcopy(mllm.model.vision_tower)
        facts = {**(pivot or {}), "feature_layer": mllm.config.vision_feature_layer}
        return cls(PivotVisionConfig(backbone.config, facts), backbone).eval()

    def forward(
        self,
        pixel_values,
        output_hidden_states=None,
        output_attentions=None,
        interpolate_pos_encoding=False,
        return_dict=None,
    ):
        """Encode images.

        Args:
            pixel_values: (B, 3, height, width), as the repository's image processor makes them.
            interpolate_pos_encoding: take an image size the encoder was not trained on.

        Returns:
            last_hidden_state (B, H*W, D): patch tokens at the feature layer; pooler_output (B, D): their mean.
        """
        options = {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
        if output_attentions:
            options["output_attentions"] = True
        outputs = self.backbone(pixel_values, output_hidden_states=True, **options)
        tokens = outputs.hidden_states[self.config.pivot["feature_layer"]]
        tokens = tokens[:, self.config.pivot["prefix_tokens"] :]
        made = BaseModelOutputWithPooling(
            last_hidden_state=tokens,
            pooler_output=tokens.mean(dim=1),
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.attentions if output_attentions else None,
        )
        return made if return_dict is not False else made.to_tuple()

    def feature_map(self, pixel_values, interpolate_pos_encoding=False):
        """Patch tokens folded into the image grid: (B, D, H, W)."""
        tokens = self(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding).last_hidden_state
        height, width = (side // self.config.patch_size for side in pixel_values.shape[-2:])
        return to_grid(tokens, height, width)


def to_grid(tokens, height, width):
    """Fold patch tokens back into their image grid.

    Args:
        tokens: (B, height*width, D), prefix tokens already dropped.
        height: patches from top to bottom.
        width: patches from left to right.

    Returns:
        (B, D, height, width).

    Raises:
        ValueError: the patch count is another; the message names both counts.
    """
    if tokens.shape[1] != height * width:
        raise ValueError(f"{tokens.shape[1]} patch tokens do not fill a grid of {height} x {width}.")
    return torch.unflatten(tokens.transpose(1, 2), 2, (height, width))
