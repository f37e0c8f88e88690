"""The MLLM: vision encoder, projector and language head, joined in transformers' own LLaVA classes.

Features enter the language head at hidden layer -2, all patch tokens and no CLS, through a 2-layer MLP with
GELU (paper, section 3). Which part trains, and at which rate, is decided here too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import nn
from torch.func import functional_call
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from pivot_hub.chat import ChatFormat, chat_format
from pivot_hub.encoder import PivotVisionConfig, PivotVisionModel
from pivot_hub.encoder.configuration_pivot import backbone_of, prefix_tokens
from pivot_hub.encoder.modeling_pivot import read_image_processor
from pivot_hub.encoder.repository import read_encoder
from pivot_hub.errors import CheckpointError


def build_mllm(
    vision: str,
    language: str,
    feature_layer: int = -2,
    vision_revision: str | None = None,
    language_revision: str | None = None,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Join a vision encoder and a causal language model with a fresh projector.

    Args:
        vision: folder or Hub name of the encoder; of a two-tower model the vision tower is taken.
        language: folder or Hub name of the causal language model.
        feature_layer: hidden state that enters the projector, -2 in the paper.
        seed: of the projector's weights, the only new ones.

    Returns:
        The model in float32 and its processor, chat template included.

    Raises:
        CheckpointError: a part is missing or some of its weights are.
    """
    encoder, image_processor = _load_encoder(vision, vision_revision)
    tower = encoder.backbone
    head = _load_whole(AutoModelForCausalLM, language, language_revision)
    tokenizer = _load_tokenizer(language, language_revision)
    chat = chat_format(tokenizer)
    _add_tokens(tokenizer, head, chat)
    prefix = encoder.config.pivot["prefix_tokens"]
    strategy: Literal["default", "full"] = "default" if prefix else "full"
    patches = (encoder.config.image_size // encoder.config.patch_size) ** 2
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=head.config,
        image_token_index=cast(int, tokenizer.convert_tokens_to_ids(chat.image_token)),
        projector_hidden_act="gelu",
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=strategy,
        # LLaVA's classes drop one prefix token, CLS; registers go on to the language head.
        image_seq_length=patches + max(prefix - 1, 0),
        tie_word_embeddings=head.config.tie_word_embeddings,
    )
    with torch.device("meta"):  # the parts bring their weights: none is drawn twice
        model = LlavaForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = LlavaMultiModalProjector(config)
    model.model.vision_tower = tower
    model.model.multi_modal_projector = projector
    model.model.language_model = head.model
    model.lm_head = head.lm_head
    model.tie_weights()
    stop = tokenizer.convert_tokens_to_ids(chat.turn_end)
    model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=tokenizer.pad_token_id)
    processor = _processor(cast(PivotVisionConfig, encoder.config), image_processor, tokenizer, chat)
    return model, processor


def read_processor(
    vision: str, language: str, vision_revision: str | None = None, language_revision: str | None = None
) -> LlavaProcessor:
    """The processor that `build_mllm` gives, without loading a weight.

    Raises:
        CheckpointError: a part's config, image processor or tokenizer cannot be read.
    """
    try:
        config = PivotVisionConfig.from_pretrained(vision, revision=vision_revision or "main")
        image_processor = read_image_processor(vision, config.backbone_config, revision=vision_revision)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0].removeprefix(f"{vision}: ").rstrip(".")
        hint = "" if Path(vision).exists() else "; give a folder, or a Hub name where the Hub or its cache is in reach"
        raise CheckpointError(f"{vision}: its configuration cannot be read: {reason}{hint}.") from error
    tokenizer = _load_tokenizer(language, language_revision)
    chat = chat_format(tokenizer)
    _add_tokens(tokenizer, None, chat)
    return _processor(config, image_processor, tokenizer, chat)


def load_mllm(folder: str | Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load a stage checkpoint in float32.

    Raises:
        CheckpointError: the folder holds no LLaVA model, or not all of its weights.
    """
    path = Path(folder)
    mllm_config(path)
    model = _load_whole(LlavaForConditionalGeneration, str(path), None)
    processor = AutoProcessor.from_pretrained(path, backend="pil")
    return cast(LlavaForConditionalGeneration, model), cast(LlavaProcessor, processor)


def mllm_config(path: Path) -> LlavaConfig:
    """The config of a stage checkpoint.

    Raises:
        CheckpointError: the folder holds no LLaVA model.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is not a checkpoint: it has no config.json; give a stage's output folder.")
    config = AutoConfig.from_pretrained(path)
    if config.model_type != "llava":
        raise CheckpointError(f"{path} holds a {config.model_type} model, not an MLLM; give a LLaVA checkpoint.")
    return cast(LlavaConfig, config)


def image_px(model: LlavaForConditionalGeneration) -> int:
    """Side of the square images the model's encoder takes."""
    return int(cast(PreTrainedModel, model.model.vision_tower).config.image_size)


def randomise_vision(model: LlavaForConditionalGeneration, seed: int) -> None:
    """Give the vision tower the random weights it would begin its training with: the floor of what it can show."""
    tower = cast(PreTrainedModel, model.model.vision_tower)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = AutoModel.from_config(tower.config)
    tower.load_state_dict(fresh.state_dict())


def register_tokens(model: LlavaForConditionalGeneration) -> int:
    """Tokens before the patches that enter the projector: LLaVA's classes drop CLS, and registers go on."""
    return max(prefix_tokens(cast(PreTrainedConfig, model.config.vision_config)) - 1, 0)


def chat_prompt(processor: LlavaProcessor | PreTrainedTokenizerBase, question: str, images: int = 1) -> str:
    """One question, on one image, several or none, in the chat format up to where the answer begins."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    turns: Any = [{"role": "user", "content": content}]
    return cast(str, processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def parts_of(model: LlavaForConditionalGeneration) -> dict[str, list[nn.Module]]:
    """The three parts a recipe gives rates to."""
    inner = model.model
    return {
        "vision": [inner.vision_tower],
        "projector": [inner.multi_modal_projector],
        "language": [inner.language_model, model.lm_head],
    }


def freeze_parts(model: LlavaForConditionalGeneration, trained: dict[str, float]) -> None:
    """Let only the parts with a rate train, and of the vision tower only what its features depend on.

    Blocks above the feature layer, the last norm and a pooling head would wait for gradients that never come, which
    stops DistributedDataParallel.
    """
    for part, modules in parts_of(model).items():
        for module in modules:
            module.requires_grad_(part in trained)
    for parameter in _without_influence(model):
        parameter.requires_grad_(False)
    if "vision" not in trained:
        # Under checkpointing transformers lets every embedding ask for a gradient, the patches' too: a frozen tower
        # would run backward for nothing. Checkpoints that are not reentrant do not need it.
        cast(Any, model).enable_input_require_grads = _ask_for_nothing


def _ask_for_nothing() -> None:
    """Take the place of a model's `enable_input_require_grads`."""


def _without_influence(model: LlavaForConditionalGeneration) -> list[nn.Parameter]:
    """Parameters of the vision tower that the features do not depend on, found without running a weight."""
    tower = model.model.vision_tower
    config: Any = tower.config
    weights = {k: torch.empty_like(p, device="meta", requires_grad=True) for k, p in tower.named_parameters()}
    buffers = {k: b.to("meta") for k, b in tower.named_buffers()}
    pixels = torch.empty(1, config.num_channels, image_px(model), image_px(model), device="meta")
    made: Any = functional_call(tower, {**weights, **buffers}, (pixels,), {"output_hidden_states": True})
    layer = model.config.vision_feature_layer
    layers = [layer] if isinstance(layer, int) else layer
    features = torch.stack([made.hidden_states[i].sum() for i in layers]).sum()
    gradients = torch.autograd.grad(features, list(weights.values()), allow_unused=True)
    return [tower.get_parameter(k) for k, gradient in zip(weights, gradients, strict=True) if gradient is None]


def see_blank(model: LlavaForConditionalGeneration) -> None:
    """Let batches without an image run the vision tower too, on a black image whose features count for nothing.

    Several processes exchange the same gradients, and shards of the same weights, in the same order: where one has
    images and another has none, they would fail or wait for each other. A step in which no process has an image gives
    the tower gradients of zero, where one process alone gives none: AdamW then moves it by its momentum.
    """
    inner: Any = model.model
    side, channels = image_px(model), cast(Any, inner.vision_tower.config).num_channels

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("pixel_values") is not None:
            return

        def add(embedding: nn.Module, ids: Any, embeds: torch.Tensor) -> torch.Tensor:
            added.remove()
            blank = torch.zeros(1, channels, side, side, dtype=embeds.dtype, device=embeds.device)
            features = torch.stack(list(module.get_image_features(blank, return_dict=True).pooler_output))
            return embeds + 0 * features.sum().to(embeds.dtype)

        # Behind the embedding, as with images: weights that are gathered in another order would not fit together.
        added = module.get_input_embeddings().register_forward_hook(add)

    inner.register_forward_pre_hook(before, with_kwargs=True)


def parameter_groups(
    model: LlavaForConditionalGeneration, rates: dict[str, float], weight_decay: float, decayed: set[str]
) -> list[dict[str, Any]]:
    """One optimizer group per trained part and decay, each with its part's rate.

    Args:
        model: the MLLM, frozen parts already without gradients.
        rates: peak learning rate of each trained part.
        weight_decay: for the parameters named in `decayed`; others (norms, biases) get none.
        decayed: names of parameters that decay.
    """
    part_of = {id(p): part for part, modules in parts_of(model).items() for m in modules for p in m.parameters()}
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, decays = part_of[id(parameter)], name in decayed
        group = groups.setdefault(
            (part, decays),
            {"params": [], "lr": rates[part], "weight_decay": weight_decay if decays else 0.0, "part": part},
        )
        group["params"].append(parameter)
    return list(groups.values())


def _processor(
    config: PivotVisionConfig, image_processor: Any, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat
) -> LlavaProcessor:
    prefix = config.pivot["prefix_tokens"]
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.patch_size,
        vision_feature_select_strategy="default" if prefix else "full",
        num_additional_image_tokens=prefix,
        image_token=chat.image_token,
        chat_template=chat.template,
    )


def _load_encoder(name: str, revision: str | None) -> tuple[PivotVisionModel, Any]:
    """Load an encoder with its image processor; one whose hidden states are maps does not fit LLaVA's classes."""
    encoder, image_processor = read_encoder(name, revision=revision)
    if backbone_of(encoder.config.backbone_config).maps:
        raise CheckpointError(
            f"{name}: timm models give feature maps, which transformers' LLaVA does not take; give the same encoder "
            "in its transformers format, or use it as a feature extractor."
        )
    return encoder, image_processor


def _load_whole(loader: Any, name: str, revision: str | None, **options: Any) -> Any:
    """Load a model in float32 and refuse one with weights missing: random weights must never pass for trained."""
    try:
        model, info = loader.from_pretrained(
            name, revision=revision, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{name}: cannot be loaded: {reason}") from error
    missing = sorted(info["missing_keys"])
    if missing or info["mismatched_keys"]:
        named = missing or [str(k[0]) for k in info["mismatched_keys"]]
        raise CheckpointError(
            f"{name}: {len(named)} weights are missing or of another shape, {named[0]} first; "
            "download the checkpoint again or give its config.json the sizes of its weights."
        )
    return model


def _load_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{name}: its tokenizer cannot be loaded: {reason}") from error


def _add_tokens(tokenizer: PreTrainedTokenizerBase, head: PreTrainedModel | None, chat: ChatFormat) -> None:
    """Give the tokenizer the image and turn tokens where it lacks them, and the embedding room for them."""
    known = tokenizer.get_vocab()
    new = [t for t in (chat.image_token, chat.turn_start, chat.turn_end) if t not in known]
    if new:
        tokenizer.add_special_tokens({"extra_special_tokens": new})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if head is not None and len(tokenizer) > cast(nn.Embedding, head.get_input_embeddings()).num_embeddings:
        head.resize_token_embeddings(len(tokenizer), mean_resizing=False)
