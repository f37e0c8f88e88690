"""The MLLM architectures that encoders are taken from: one entry each says where the parts lie and what enters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pivot_hub.encoder.configuration_pivot import LAST
from pivot_hub.errors import CheckpointError

Pixels = Literal["square", "tiles", "rows of tiles", "resolutions", "grid"]


@dataclass(frozen=True)
class Family:
    """Where an MLLM architecture keeps its parts, and how an image becomes tokens of the language model.

    Args:
        model_type: Model type of the MLLM's config.
        title: Name that people know it by.
        tower: Name of the vision tower in the model's inner module.
        projector: Name of the module between tower and language model; None where the tower contains it.
        mergers: Names of the modules of the tower that make up the projector, where the tower contains it; the first
            one takes what enters the projector.
        language: Name of the language model in the inner module.
        feature_layer: Function that returns what enters the projector, from the MLLM's config: the number of a hidden
            state, or LAST.
        merge: Function that returns how many patches a side become one token of the language model.
        tiles: How the MLLM cuts a large image into squares of the encoder's size: `none`, or the way. The encoder alone
            takes the whole image as one square.
        positions: Positions of image tokens in the language model: `1d`, as of text, or `mrope`, with row and column.
        image_tokens: Whether image tokens enter the sequence of the language model. Mllama's enter cross attention.
        pixels: How the image processor gives pixels: `square`, one square of the encoder's size; `tiles`, several
            squares; `rows of tiles`, those of each text in a row of its own; `resolutions`, the squares of the
            resolution among the config's that fits best; `grid`, patches with a grid. None where the planner does not
            run the MLLM, as with experts or linear attention.
        shares_prompts: Whether answers behind one prompt are computed as each behind its own. They are not where the
            tokens of an image attend to each other, or a state passes from token to token. Training finds it out
            itself, see `training.tree_check`; the planner does not run the model.
        native_from: First release of transformers whose plain AutoModel loads the tower; None if no release does.
    """

    model_type: str
    title: str
    tower: str = "vision_tower"
    projector: str | None = "multi_modal_projector"
    mergers: tuple[str, ...] = ()
    language: str = "language_model"
    feature_layer: Callable[[Any], int | str] = lambda config: LAST
    merge: Callable[[Any], int] = lambda config: 1
    tiles: str = "none"
    positions: str = "1d"
    image_tokens: bool = True
    pixels: Pixels | None = None
    shares_prompts: bool = True
    native_from: str | None = "4.57"

    def part_of(self, parameter: str) -> str:
        """Return the part, vision, projector or language, that a parameter of the MLLM belongs to, by its name."""
        _, _, name = parameter.partition(".")  # behind `model.`, or `lm_head.`
        if parameter.startswith("lm_head.") or name.startswith(f"{self.language}."):
            return "language"
        if not name.startswith(f"{self.tower}."):
            return "projector"
        return "projector" if name.split(".")[1] in self.mergers else "vision"

    @property
    def whole_view(self) -> int:
        """Index of the view that shows the whole image, among the views that the MLLM makes of it."""
        return -1 if self.tiles == "tiles and thumbnail" else 0

    def image_token_id(self, config: Any) -> int:
        """Return the id that stands for one token of an image in `input_ids`."""
        return int(config.image_token_id)


def _selected_layer(config: Any) -> int | str:
    """Return the hidden state that a config of LLaVA's kind selects.

    Raises:
        CheckpointError: It selects several.
    """
    layer = config.vision_feature_layer
    layers = [layer] if isinstance(layer, int) else list(layer)
    if len(layers) != 1:
        raise CheckpointError(
            f"its projector takes the features of several layers ({layers}), joined; an encoder repository has one "
            "feature layer. Save the tower with transformers, and join them in your own code."
        )
    return int(layers[0])


def _internvl_layer(config: Any) -> int | str:
    layer = _selected_layer(config)
    return LAST if layer == -1 else layer


def _spatial_merge(config: Any) -> int:
    return int(config.vision_config.spatial_merge_size)


def _gemma3_merge(config: Any) -> int:
    side = config.vision_config.image_size // config.vision_config.patch_size
    return int(side // round(config.mm_tokens_per_image**0.5))


def _qwen(model_type: str, title: str, native_from: str | None, **further: Any) -> Family:
    return Family(
        model_type,
        title,
        tower="visual",
        projector=None,
        mergers=("merger", "deepstack_merger_list"),
        merge=_spatial_merge,
        positions="mrope",
        native_from=native_from,
        **further,
    )


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llava", "LLaVA", feature_layer=_selected_layer, pixels="square"),
        Family(
            "llava_next",
            "LLaVA-NeXT",
            feature_layer=_selected_layer,
            tiles="best resolution",
            pixels="resolutions",
        ),
        Family(
            "llava_onevision",
            "LLaVA-OneVision",
            feature_layer=_selected_layer,
            tiles="best resolution",
            pixels="resolutions",
        ),
        Family("paligemma", "PaliGemma"),
        Family("gemma3", "Gemma 3", merge=_gemma3_merge, pixels="square", shares_prompts=False),
        Family(
            "idefics3",
            "Idefics3",
            tower="vision_model",
            projector="connector",
            language="text_model",
            merge=lambda config: int(config.scale_factor),
            tiles="tiles and thumbnail",
            pixels="rows of tiles",
        ),
        Family(
            "smolvlm",
            "SmolVLM",
            tower="vision_model",
            projector="connector",
            language="text_model",
            merge=lambda config: int(config.scale_factor),
            tiles="tiles and thumbnail",
            pixels="rows of tiles",
        ),
        Family(
            "internvl",
            "InternVL (-HF)",
            feature_layer=_internvl_layer,
            merge=lambda config: round(1 / config.downsample_ratio),
            tiles="tiles and thumbnail",
            pixels="tiles",
        ),
        _qwen("qwen2_vl", "Qwen2-VL", None, pixels="grid"),
        _qwen("qwen2_5_vl", "Qwen2.5-VL", "5.23", pixels="grid"),
        _qwen("qwen3_vl", "Qwen3-VL", "5.17", pixels="grid"),
        _qwen("qwen3_vl_moe", "Qwen3-VL-MoE", "5.17"),
        _qwen("qwen3_5", "Qwen3.5", "5.17", shares_prompts=False),
        _qwen("qwen3_5_moe", "Qwen3.5-MoE", "5.17", shares_prompts=False),
        Family(
            "glm4v",
            "GLM-4V",
            tower="visual",
            projector=None,
            mergers=("merger", "downsample"),
            merge=_spatial_merge,
            positions="mrope",
            pixels="grid",
            native_from="5.0",
        ),
        Family(
            "glm4v_moe",
            "GLM-4.5V",
            tower="visual",
            projector=None,
            mergers=("merger", "downsample"),
            merge=_spatial_merge,
            positions="mrope",
            native_from="5.0",
        ),
        Family(
            "mistral3",
            "Mistral 3",
            feature_layer=_selected_layer,
            merge=lambda config: int(config.spatial_merge_size),
        ),
        Family(
            "gemma4",
            "Gemma 4",
            projector="embed_vision",
            merge=lambda config: int(config.vision_config.pooling_kernel_size),
            native_from="5.17",
        ),
        Family(
            "lfm2_vl",
            "LFM2-VL",
            merge=lambda config: int(config.downsample_factor),
            tiles="tiles and thumbnail",
        ),
        Family(
            "kimi_k25",
            "Kimi K2.5",
            projector="mm_projector",
            merge=lambda config: int(config.vision_config.merge_kernel_size[0]),
            native_from="5.17",
        ),
        Family(
            "mllama",
            "Llama 3.2 Vision",
            tower="vision_model",
            tiles="tiles of one map",
            image_tokens=False,
            native_from=None,
        ),
    )
}

# Model types whose repositories bring code of their own, with the remedy.
REMOTE_CODE_FAMILIES = {
    "internvl_chat": "give the -hf repository of the same model, such as OpenGVLab/InternVL3-8B-hf",
    "llava_qwen": "give the -hf repository of the same model, such as llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "llava_llama": "give the -hf repository of the same model, such as llava-hf/llava-1.5-7b-hf",
}


def family_of(config: Any) -> Family:
    """Return the entry of an MLLM's config.

    Raises:
        CheckpointError: It is not an MLLM of the table; the message lists the table.
    """
    if config.model_type not in FAMILIES:
        known = ", ".join(family.title for family in FAMILIES.values())
        raise CheckpointError(f"is a {config.model_type} model, which is no MLLM of the table: {known}.")
    return FAMILIES[config.model_type]
