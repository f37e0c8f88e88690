"""Stage vision: a small encoder of SigLIP's, InternVL's or Qwen2.5-VL's architecture, trained on captioned images.

It has the role of SigLIP2 in the paper. There are two losses on captions: each patch names the words of the object on
it (region captions, as in LocCa, Wan et al. 2024), and the mean patch names the words of the whole caption
(SuperClass, Huang et al. 2024). Both losses use linear heads, which are dropped after training.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    GotOcr2ImageProcessorPil,
    PreTrainedConfig,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pivot_hub.config.data_section import ShapesData
from pivot_hub.config.recipe import LoadedRecipe
from pivot_hub.config.yaml_loader import nearest
from pivot_hub.data.report import RowReport
from pivot_hub.data.source import ShapesSource
from pivot_hub.data.synthetic import COLOUR_NAMES, POSITIONS, SHAPES, SIZES, RenderedScene, Scene
from pivot_hub.encoder import PivotVisionConfig, PivotVisionModel
from pivot_hub.encoder.configuration_pivot import LAST, backbone_of
from pivot_hub.encoder.modeling_pivot import native_class, prepare_images
from pivot_hub.encoder.native_resolution import merge_side
from pivot_hub.encoder.repository import fill_repository
from pivot_hub.errors import RecipeError

NOTHING = "nothing"
WORDS = (NOTHING, *SIZES, *COLOUR_NAMES, *SHAPES, *POSITIONS)
SLOTS = ("size", "colour", "shape")  # a region caption has one word for each
COUNTS = 9  # largest number of objects that a caption can name
# Colour and position are learnt within a few steps, shape is not. The weights of the captions' words are chosen so
# that no attribute is at its ceiling while another is still at its floor.
SLOT_WEIGHTS = {"size": 0.4, "colour": 0.15, "shape": 3.0}
WORD_WEIGHTS = {**dict.fromkeys(COLOUR_NAMES, 0.1), **dict.fromkeys(POSITIONS, 0.1)}
COUNT_WEIGHT = 0.5
REGION_WEIGHT, CAPTION_WEIGHT = 3.0, 6.0
COVERED = 0.25  # share of a patch that an object must cover to be named there
SIGLIP = "siglip_vision_model"
MODEL_TYPES = (SIGLIP, "internvl_vision", "qwen2_5_vl_vision")
NORMALISED: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


class CaptionedEncoder(nn.Module):
    """An encoder with a region-caption head and a caption-word head."""

    word_weights: Tensor
    slot_weights: Tensor

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        model_class = native_class(config)
        tower = (model_class.from_config if model_class is AutoModel else model_class._from_config)(config)
        _set_sincos_positions(tower)
        self.encoder = PivotVisionModel(PivotVisionConfig(config, {"feature_layer": LAST}), tower)
        width = self.encoder.config.hidden_size
        self.region_head = nn.Linear(width, len(SLOTS) * len(WORDS))
        self.caption_head = nn.Linear(width, len(WORDS) - 1 + COUNTS)
        words = [WORD_WEIGHTS.get(w, 1.0) for w in WORDS[1:]] + [COUNT_WEIGHT] * COUNTS
        self.register_buffer("word_weights", torch.tensor(words), persistent=False)
        slots = torch.tensor([SLOT_WEIGHTS[s] for s in SLOTS])
        self.register_buffer("slot_weights", slots, persistent=False)

    def forward(
        self, pixel_values: Tensor, regions: Tensor, words: Tensor, image_grid_thw: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute the weighted sum of both losses.

        Args:
            pixel_values: Images, (B, 3, image_px, image_px); for a tower of native resolution, patches (B, H*W, N).
            regions: Ids into WORDS, (B, H*W, 3); `nothing` where a patch has no object.
            words: Words of the caption and then its number of objects, 0 or 1 each, (B, len(WORDS) - 1 + COUNTS).
            image_grid_thw: Of a tower of native resolution, 1, H and W of each image, (B, 3).
        """
        if image_grid_thw is None:
            tokens = self.encoder(pixel_values).last_hidden_state  # (B, H*W, D)
        else:
            maps = self.encoder(pixel_values.flatten(0, 1), image_grid_thw=image_grid_thw).last_hidden_state
            tokens = torch.stack(maps).flatten(1, 2)
        region_logits = self.region_head(tokens).unflatten(-1, (len(SLOTS), len(WORDS)))
        region = nn.functional.cross_entropy(region_logits.flatten(0, 2), regions.flatten(), reduction="none")
        region = (region.unflatten(0, (-1, len(SLOTS))) * self.slot_weights).mean()
        caption_logits = self.caption_head(tokens.mean(1))
        caption = nn.functional.binary_cross_entropy_with_logits(caption_logits, words, weight=self.word_weights)
        return {"loss": REGION_WEIGHT * region + CAPTION_WEIGHT * caption}


def build_trainer(
    loaded: LoadedRecipe,
    args: TrainingArguments,
    parent: Path | None,
    report: RowReport,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """Build the trainer of a vision recipe.

    Args:
        loaded: The recipe.
        args: Config of the trainer.
        parent: None: a base part has no parent.
        report: Report that receives the number of rows.
        callbacks: Callbacks of the trainer.

    Raises:
        RecipeError: The architecture has a setting that its config does not know, or sizes that do not fit together.
    """
    recipe = loaded.recipe
    assert recipe.architecture is not None
    torch.manual_seed(recipe.seed)
    architecture = dict(recipe.architecture)
    model_type = architecture.pop("model_type", SIGLIP)
    if model_type not in MODEL_TYPES:
        raise RecipeError(
            f"{loaded.path}: `architecture.model_type` {model_type!r} is not trained from captions"
            f"{nearest(str(model_type), MODEL_TYPES)}; give one of {', '.join(MODEL_TYPES)}."
        )
    config_class: Any = CONFIG_MAPPING[model_type]
    known = {*config_class().to_dict(), *config_class.attribute_map}
    if unknown := set(architecture) - known:
        key = min(unknown)
        raise RecipeError(f"{loaded.path}: a {model_type} has no `architecture.{key}`{nearest(key, known)}.")
    try:
        further = {"vision_use_head": False} if model_type == SIGLIP else {}
        config = config_class(**architecture, **further)
        model = CaptionedEncoder(config)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise RecipeError(f"{loaded.path}: `architecture` does not give a {model_type} encoder: {error}") from error
    sources = [ShapesSource(spec) for spec in recipe.data if isinstance(spec, ShapesData)]
    image_px = sources[0].dataset.image_px
    own_px = model.encoder.config.image_size or image_px
    for source in sources:
        if source.dataset.image_px != own_px:
            raise RecipeError(
                f"{loaded.path}: images of {source.dataset.image_px} px for an encoder of {own_px} px: set "
                "`architecture.image_size` and `data.world.image_px` alike."
            )
    unit = model.encoder.config.patch_size * merge_side(config, backbone_of(config).merge)
    if image_px % unit:
        raise RecipeError(
            f"{loaded.path}: images of {image_px} px are not whole tokens of {unit} px: change `data.world.image_px`, "
            "or the patches of `architecture`."
        )
    model.encoder.image_processor = processor = _image_processor(config, image_px)
    try:
        with torch.no_grad():
            model.encoder(
                **prepare_images(processor, [Image.new("RGB", (image_px, image_px))], model.encoder.config, "cpu")
            )
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise RecipeError(f"{loaded.path}: `architecture` gives no {model_type} encoder that runs: {error}") from error
    side = image_px // model.encoder.config.patch_size
    rows = [(source, i) for source in sources for i in range(source.spec.rows)]
    report.rows = len(rows)
    layout = backbone_of(config).layout

    def render(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        examples = []
        for number in batch["row"]:
            source, i = rows[number]
            scene = source.dataset.scene(source.spec.split, source.spec.start + i)
            rendered = scene.render()
            example = labelled(scene, rendered, side)
            if layout is not None:  # one image's patches, and 1, H and W
                prepared = prepare_images(processor, [rendered.image], model.encoder.config, "cpu")
                example |= {"pixel_values": prepared["pixel_values"], "image_grid_thw": prepared["image_grid_thw"][0]}
            examples.append(example)
        return {key: [example[key] for example in examples] for key in examples[0]}

    return Trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"row": list(range(len(rows)))}).with_transform(render),
        callbacks=callbacks,
    )


def labelled(scene: Scene, rendered: RenderedScene, side: int) -> dict[str, Tensor]:
    """Return pixels, region labels and caption words of one scene.

    Args:
        scene: The scene.
        rendered: The scene's image, with the mask of each object.
        side: Number of patches along an edge.
    """
    pixels = np.asarray(rendered.image, np.float32).transpose(2, 0, 1) / 127.5 - 1
    regions = np.zeros((side, side, len(SLOTS)), np.int64)
    words = np.zeros(len(WORDS) - 1 + COUNTS, np.float32)
    words[len(WORDS) - 2 + len(scene.objects)] = 1
    patch_px = rendered.image.width // side
    for scene_object, mask in zip(scene.objects, rendered.masks, strict=True):
        word_ids = [WORDS.index(w) for w in (scene_object.size, scene_object.colour, scene_object.shape)]
        words[np.array([*word_ids, WORDS.index(POSITIONS[scene_object.position])]) - 1] = 1
        covered = mask.reshape(side, patch_px, side, patch_px).mean((1, 3))
        regions[covered > COVERED] = word_ids
    return {
        "pixel_values": torch.from_numpy(pixels),
        "regions": torch.from_numpy(regions.reshape(side * side, len(SLOTS))),
        "words": torch.from_numpy(words),
    }


def save(trainer: Trainer, folder: Path) -> None:
    """Write the encoder, without the training heads, as an encoder repository."""
    assert isinstance(trainer.model, CaptionedEncoder)
    trained = trainer.model.encoder.eval().cpu()
    model = PivotVisionModel(PivotVisionConfig(trained.backbone.config), trained.backbone)
    model.image_processor = trained.image_processor
    fill_repository(folder, model)


def _image_processor(config: Any, image_px: int) -> Any:
    """Return the image processor of an encoder, which leaves images of `image_px` at their size."""
    size = {"height": image_px, "width": image_px}
    if config.model_type == SIGLIP:
        return SiglipImageProcessorPil(size=size, **NORMALISED)
    if backbone_of(config).layout is None:
        return GotOcr2ImageProcessorPil(size=size, **NORMALISED)
    return Qwen2VLImageProcessorPil(
        patch_size=config.patch_size,
        merge_size=config.spatial_merge_size,
        temporal_patch_size=config.temporal_patch_size,
        size={"shortest_edge": image_px**2, "longest_edge": 16_777_216},  # pixels of the image, as Qwen's
        **NORMALISED,
    )


def _set_sincos_positions(tower: Any) -> None:
    """Initialise position embeddings with 2-D sines and cosines (big_vision's posemb_sincos_2d).

    SigLIP initialises them with normal noise that is a sixth as strong as the patches. A short run does not learn
    positions from it: after 250 steps 6% of the position words were right, and with sines 82%. InternVL's are zeros,
    of which the first is that of CLS. Qwen2.5-VL's tower has rotary ones, which are no weights.
    """
    model_type = tower.config.model_type
    if model_type == SIGLIP:
        weight = tower.embeddings.position_embedding.weight
    elif model_type == "internvl_vision":
        weight = tower.embeddings.position_embeddings.detach()[0, 1:]
    else:
        return
    side, width = round(weight.shape[0] ** 0.5), weight.shape[1]
    if width % 4:
        raise ValueError(f"hidden_size {width} is not a multiple of 4")
    frequencies = 1 / 100 ** (np.arange(width // 4) / (width // 4 - 1))
    rows, columns = np.mgrid[:side, :side].reshape(2, -1, 1)
    waves = [wave(place * frequencies) for place, wave in itertools.product((columns, rows), (np.sin, np.cos))]
    with torch.no_grad():
        weight.copy_(torch.from_numpy(np.concatenate(waves, axis=1)))
