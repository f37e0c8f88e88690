"""The families of MLLMs that are built from two parts: config, projector, language model and processor of each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import (
    InternVLConfig,
    InternVLProcessor,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
)
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from pivot_hub.config.recipe import JoinedFamily
from pivot_hub.encoder.configuration_pivot import backbone_of, check_feature_layer, prefix_tokens
from pivot_hub.encoder.image_shapes import require_squares
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.chat_templates import ChatFormat
from pivot_hub.mllm.load import SQUARES_ONLY
from pivot_hub.mllm.processor import images_only

MERGE = 2  # patches a side that InternVL joins to one token
# Settings of an image processor that the family's video processor has too. They are saved, because transformers' own
# classes of processors ask for them; this package reads no videos.
SHARED_WITH_VIDEOS = ("image_mean", "image_std")
QWEN_VIDEOS = "Qwen2VLVideoProcessor"


class Joined(ABC):
    """What a family of MLLMs makes of an encoder and a language model.

    Attributes:
        tower: Model type of the only encoders that the family takes; None if it takes others.
        language: Model type of the only language models that the family takes; None if it takes all.
        tokens: Further tokens that the family writes around an image, or in the place of one.
        attributes: Tokens that the family's processor reads from the tokenizer, by the tokenizer's attribute.
        ids: Tokens whose ids are in the config of the MLLM, by its keys.
    """

    tower: ClassVar[str | None] = None
    language: ClassVar[str | None] = None
    tokens: ClassVar[tuple[str, ...]] = ()
    attributes: ClassVar[dict[str, str]] = {}
    ids: ClassVar[dict[str, str]] = {}

    def check(self, name: str, vision: PreTrainedConfig, feature_layer: int) -> None:
        """Refuse an encoder that the family does not take.

        Args:
            name: Name of the encoder, for the message.
            vision: Native config of the encoder.
            feature_layer: Hidden state of the encoder that enters the projector.

        Raises:
            CheckpointError: The family does not take it; the message has the remedy.
        """
        if self.tower and vision.model_type != self.tower:
            raise CheckpointError(
                f"{name} is a {vision.model_type} encoder, and this family of MLLMs takes a {self.tower} one; make one "
                f"with a recipe of stage vision and `architecture.model_type: {self.tower}`, or leave out "
                "`model.family`."
            )

    def check_language(self, name: str, text: PreTrainedConfig) -> None:
        """Refuse a language model that the family does not take.

        Raises:
            CheckpointError: The family does not take it; the message has the remedy.
        """
        if self.language and text.model_type != self.language:
            raise CheckpointError(
                f"{name} is a {text.model_type} model, and this family of MLLMs takes a {self.language} one; give a "
                f"language model of architecture {self.language}, or leave out `model.family`."
            )

    @abstractmethod
    def config(
        self, vision: PreTrainedConfig, text: PreTrainedConfig, feature_layer: int, image_token: int
    ) -> PreTrainedConfig:
        """Return the config of the MLLM.

        Args:
            vision: Native config of the encoder.
            text: Config of the language model.
            feature_layer: Hidden state of the encoder that enters the projector.
            image_token: Id that stands for one token of an image.
        """

    def set_token_ids(self, config: Any, tokenizer: Any) -> None:
        """Write the ids of the family's further tokens into the config of the MLLM."""
        for key, token in self.ids.items():
            setattr(config, key, tokenizer.convert_tokens_to_ids(token))

    @abstractmethod
    def set_vision(self, inner: Any, tower: nn.Module, config: Any) -> None:
        """Put the encoder and a new projector into the inner module of an MLLM."""

    def set_language(self, inner: Any, language: Any, config: Any) -> None:
        """Put the language model, without its head, into the inner module of an MLLM."""
        inner.language_model = language

    @abstractmethod
    def processor(
        self, vision: PreTrainedConfig, image_processor: Any, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat
    ) -> ProcessorMixin:
        """Return the processor of the MLLM."""

    @abstractmethod
    def image_token(self, chat: ChatFormat) -> str:
        """Return the token that stands for one token of an image."""


class JoinedLlava(Joined):
    """An MLLM of LLaVA's classes: every patch of an encoder of squares becomes a token."""

    def check(self, name: str, vision: PreTrainedConfig, feature_layer: int) -> None:
        require_squares(vision, name, *SQUARES_ONLY)
        if backbone_of(vision).maps:
            raise CheckpointError(
                f"{name}: timm models give feature maps, which transformers' LLaVA does not take; give the same "
                "encoder in its transformers format, or use it as a feature extractor."
            )
        try:
            check_feature_layer(feature_layer, getattr(vision, "num_hidden_layers", None))
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from error

    def config(
        self, vision: PreTrainedConfig, text: PreTrainedConfig, feature_layer: int, image_token: int
    ) -> PreTrainedConfig:
        prefix = prefix_tokens(vision)
        return LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=image_token,
            projector_hidden_act="gelu",
            vision_feature_layer=feature_layer,
            vision_feature_select_strategy="default" if prefix else "full",
            image_seq_length=image_tokens(vision),
            tie_word_embeddings=cast(Any, text).tie_word_embeddings,
        )

    def set_vision(self, inner: Any, tower: nn.Module, config: Any) -> None:
        inner.vision_tower = tower
        inner.multi_modal_projector = LlavaMultiModalProjector(config)

    def processor(
        self, vision: PreTrainedConfig, image_processor: Any, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat
    ) -> ProcessorMixin:
        prefix = prefix_tokens(vision)
        return LlavaProcessor(
            image_processor=image_processor,
            tokenizer=tokenizer,
            patch_size=_patch_px(vision),
            vision_feature_select_strategy="default" if prefix else "full",
            num_additional_image_tokens=prefix,
            image_token=chat.image_token,
            chat_template=chat.template,
        )

    def image_token(self, chat: ChatFormat) -> str:
        return chat.image_token


class JoinedInternvl(Joined):
    """An MLLM of InternVL's classes: 2x2 patches of InternViT become a token, and large images are tiled."""

    tower = "internvl_vision"
    attributes: ClassVar[dict[str, str]] = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokens = tuple(attributes.values())

    def check(self, name: str, vision: PreTrainedConfig, feature_layer: int) -> None:
        super().check(name, vision, feature_layer)
        if _patches(vision) % MERGE:
            raise CheckpointError(
                f"{name} has {_patches(vision)} patches a side, and InternVL joins {MERGE}x{MERGE} of them; give an "
                "encoder with an even number."
            )

    def config(
        self, vision: PreTrainedConfig, text: PreTrainedConfig, feature_layer: int, image_token: int
    ) -> PreTrainedConfig:
        return InternVLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=image_token,
            image_seq_length=(_patches(vision) // MERGE) ** 2,
            downsample_ratio=1 / MERGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",  # without CLS
            tie_word_embeddings=cast(Any, text).tie_word_embeddings,
        )

    def set_vision(self, inner: Any, tower: nn.Module, config: Any) -> None:
        inner.vision_tower = tower
        inner.multi_modal_projector = InternVLMultiModalProjector(config)

    def processor(
        self, vision: PreTrainedConfig, image_processor: Any, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat
    ) -> ProcessorMixin:
        template = chat.template.replace(chat.image_token, self.image_token(chat))
        own = image_processor.to_dict()
        videos = {"video_processor_type": "InternVLVideoProcessor", **{key: own[key] for key in SHARED_WITH_VIDEOS}}
        processor: Any = images_only(InternVLProcessor)(
            image_processor,
            tokenizer,
            None,
            image_seq_length=(_patches(vision) // MERGE) ** 2,
            chat_template=template,
        )
        processor.video_settings = videos | {"size": own["size"]}
        return cast(ProcessorMixin, processor)

    def image_token(self, chat: ChatFormat) -> str:
        return self.attributes["context_image_token"]


class JoinedQwen(Joined):
    """An MLLM of Qwen2.5-VL's classes: 2x2 patches of its own encoder become a token, and images keep their shape."""

    tower = "qwen2_5_vl_vision"
    language = "qwen2"
    ids: ClassVar[dict[str, str]] = {  # the first three in the order in which they stand for an image
        "vision_start_token_id": "<|vision_start|>",
        "image_token_id": "<|image_pad|>",
        "vision_end_token_id": "<|vision_end|>",
        "video_token_id": "<|video_pad|>",
    }
    tokens = tuple(ids.values())

    def check_language(self, name: str, text: PreTrainedConfig) -> None:
        super().check_language(name, text)
        config: Any = text
        width = config.hidden_size // config.num_attention_heads
        if (getattr(config, "head_dim", None) or width) != width:
            raise CheckpointError(
                f"{name} has attention heads of {config.head_dim} channels, and those of Qwen2.5-VL divide the "
                f"{config.hidden_size} of its hidden states; give another language model, or leave out `model.family`."
            )

    def config(
        self, vision: PreTrainedConfig, text: PreTrainedConfig, feature_layer: int, image_token: int
    ) -> PreTrainedConfig:
        values = text.to_dict()
        width = values["hidden_size"] // values["num_attention_heads"] // 2
        # Qwen2.5-VL's shares of a head's rotary frequencies: a quarter for time, the rest for row and column.
        spatial = width * 3 // 8
        rope = {**values.pop("rope_parameters"), "mrope_section": [width - 2 * spatial, spatial, spatial]}
        known = Qwen2_5_VLTextConfig().to_dict().keys() - {"model_type", "transformers_version", "architectures"}
        return Qwen2_5_VLConfig(
            vision_config={**vision.to_dict(), "out_hidden_size": values["hidden_size"]},
            text_config={**{key: values[key] for key in known & values.keys()}, "rope_parameters": rope},
            image_token_id=image_token,
            tie_word_embeddings=values["tie_word_embeddings"],
        )

    def set_vision(self, inner: Any, tower: nn.Module, config: Any) -> None:
        inner.visual = tower
        own = config.vision_config
        merger = type(cast(Any, tower).merger)
        inner.visual.merger = merger(own.out_hidden_size, own.hidden_size, own.spatial_merge_size)
        inner.visual.config.out_hidden_size = own.out_hidden_size

    def set_language(self, inner: Any, language: Any, config: Any) -> None:
        with torch.device("meta"):
            joined = cast(PreTrainedModel, Qwen2_5_VLTextModel._from_config(config.text_config))
        joined.load_state_dict(language.state_dict(), assign=True)
        rotary = cast(Any, joined).rotary_emb
        joined.rotary_emb = type(rotary)(config.text_config)  # its frequencies are no weights
        inner.language_model = joined

    def processor(
        self, vision: PreTrainedConfig, image_processor: Any, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat
    ) -> ProcessorMixin:
        template = chat.template.replace(chat.image_token, "".join(self.tokens[:3]))
        own = image_processor.to_dict()
        shared = (*SHARED_WITH_VIDEOS, "patch_size", "merge_size", "temporal_patch_size")
        processor: Any = images_only(Qwen2_5_VLProcessor)(image_processor, tokenizer, None, chat_template=template)
        processor.video_settings = {"video_processor_type": QWEN_VIDEOS, **{key: own[key] for key in shared}}
        return cast(ProcessorMixin, processor)

    def image_token(self, chat: ChatFormat) -> str:
        return self.ids["image_token_id"]


JOINED: dict[JoinedFamily | None, Joined] = {
    None: JoinedLlava(),
    "internvl": JoinedInternvl(),
    "qwen2_5_vl": JoinedQwen(),
}


def image_tokens(vision: PreTrainedConfig) -> int:
    """Number of tokens that an image takes in LLaVA's classes: patches and registers; they drop CLS."""
    return _patches(vision) ** 2 + max(prefix_tokens(vision) - 1, 0)


def _patches(vision: PreTrainedConfig) -> int:
    """Return the number of patches a side of an encoder of squares."""
    return backbone_of(vision).image_px(vision) // _patch_px(vision)


def _patch_px(vision: PreTrainedConfig) -> int:
    patch = cast(Any, vision).patch_size
    return int(patch if isinstance(patch, int) else patch[0])
