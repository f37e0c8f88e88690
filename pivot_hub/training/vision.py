"""Stage vision: a small SigLIP-architecture encoder, trained from images and what is said of them.

It plays the part that SigLIP2 plays in the paper. Two losses on captions: each patch names in words what lies on
it (region captions, as LocCa, Wan et al. 2024), and the mean patch names the words of the whole caption
(SuperClass, Huang et al. 2024). Both are linear heads, thrown away afterwards.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pivot_hub.config.data_section import ShapesData
from pivot_hub.config.recipe import LoadedRecipe
from pivot_hub.data.report import RowReport
from pivot_hub.data.source import ShapesSource
from pivot_hub.data.synthetic import COLOUR_NAMES, POSITIONS, SHAPES, SIZES, RenderedScene, Scene
from pivot_hub.encoder import PivotVisionModel
from pivot_hub.encoder.repository import fill_repository
from pivot_hub.errors import RecipeError

NOTHING = "nothing"
WORDS = (NOTHING, *SIZES, *COLOUR_NAMES, *SHAPES, *POSITIONS)
SLOTS = ("size", "colour", "shape")  # words of a region caption, one each
COUNTS = 9  # most things a caption's number can say
# Colour and place are learnt within a few steps, shape is not. What the base part's captions dwell on is chosen so
# that no attribute is at its ceiling while another is still at its floor.
SLOT_WEIGHTS = {"size": 0.4, "colour": 0.15, "shape": 3.0}
WORD_WEIGHTS = {**dict.fromkeys(COLOUR_NAMES, 0.1), **dict.fromkeys(POSITIONS, 0.1)}
COUNT_WEIGHT = 0.5
REGION_WEIGHT, CAPTION_WEIGHT = 3.0, 6.0
COVERED = 0.25  # share of a patch that a thing must cover to be named there


class CaptionedEncoder(nn.Module):
    """An encoder with a region-caption head and a caption-word head."""

    word_weights: Tensor
    slot_weights: Tensor

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.encoder = SiglipVisionModel(config)
        _set_sincos_positions(self.encoder)
        self.region_head = nn.Linear(config.hidden_size, len(SLOTS) * len(WORDS))
        self.caption_head = nn.Linear(config.hidden_size, len(WORDS) - 1 + COUNTS)
        words = [WORD_WEIGHTS.get(w, 1.0) for w in WORDS[1:]] + [COUNT_WEIGHT] * COUNTS
        self.register_buffer("word_weights", torch.tensor(words), persistent=False)
        slots = torch.tensor([SLOT_WEIGHTS[s] for s in SLOTS])
        self.register_buffer("slot_weights", slots, persistent=False)

    def forward(self, pixel_values: Tensor, regions: Tensor, words: Tensor) -> dict[str, Tensor]:
        """Loss of both heads.

        Args:
            pixel_values: (B, 3, image_px, image_px).
            regions: (B, H*W, 3) ids into WORDS, `nothing` where no thing lies.
            words: (B, len(WORDS) - 1 + COUNTS) 0 or 1: the words of the caption, then its number.
        """
        tokens = self.encoder(pixel_values).last_hidden_state  # (B, H*W, D)
        named = self.region_head(tokens).unflatten(-1, (len(SLOTS), len(WORDS)))
        region = nn.functional.cross_entropy(named.flatten(0, 2), regions.flatten(), reduction="none")
        region = (region.unflatten(0, (-1, len(SLOTS))) * self.slot_weights).mean()
        said = self.caption_head(tokens.mean(1))
        caption = nn.functional.binary_cross_entropy_with_logits(said, words, weight=self.word_weights)
        return {"loss": REGION_WEIGHT * region + CAPTION_WEIGHT * caption}


def build_trainer(
    loaded: LoadedRecipe,
    args: TrainingArguments,
    parent: Path | None,
    report: RowReport,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """Make the trainer of a vision recipe.

    Raises:
        RecipeError: the architecture names a setting that SiglipVisionConfig does not have, or sizes that do not fit.
    """
    recipe = loaded.recipe
    assert recipe.architecture is not None
    torch.manual_seed(recipe.seed)
    try:
        config = SiglipVisionConfig(**recipe.architecture, vision_use_head=False)
        model = CaptionedEncoder(config)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{loaded.path}: `architecture` does not make a SigLIP encoder: {error}") from error
    sources = [ShapesSource(spec) for spec in recipe.data if isinstance(spec, ShapesData)]
    if wrong := [s for s in sources if s.dataset.image_px != config.image_size]:
        raise RecipeError(
            f"{loaded.path}: images of {wrong[0].dataset.image_px} px for an encoder of {config.image_size}: "
            "set `architecture.image_size` and `data.world.image_px` alike."
        )
    side = cast(int, config.image_size) // cast(int, config.patch_size)
    where = [(s, i) for s, source in enumerate(sources) for i in range(source.spec.rows)]
    report.rows = len(where)

    def render(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        made = []
        for index in batch["row"]:
            source = sources[where[index][0]]
            scene = source.dataset.scene(source.spec.split, source.spec.start + where[index][1])
            made.append(labelled(scene, scene.render(), side))
        return {key: [m[key] for m in made] for key in made[0]}

    return Trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"row": list(range(len(where)))}).with_transform(render),
        callbacks=callbacks,
    )


def labelled(scene: Scene, picture: RenderedScene, side: int) -> dict[str, Tensor]:
    """Pixels and caption words of one scene; `side` patches along an edge."""
    pixels = np.asarray(picture.image, np.float32).transpose(2, 0, 1) / 127.5 - 1
    regions = np.zeros((side, side, len(SLOTS)), np.int64)
    words = np.zeros(len(WORDS) - 1 + COUNTS, np.float32)
    words[len(WORDS) - 2 + len(scene.objects)] = 1
    patch = picture.image.width // side
    for thing, mask in zip(scene.objects, picture.masks, strict=True):
        said = [WORDS.index(w) for w in (thing.size, thing.colour, thing.shape)]
        words[np.array([*said, WORDS.index(POSITIONS[thing.position])]) - 1] = 1
        regions[mask.reshape(side, patch, side, patch).mean((1, 3)) > COVERED] = said
    return {
        "pixel_values": torch.from_numpy(pixels),
        "regions": torch.from_numpy(regions.reshape(side * side, len(SLOTS))),
        "words": torch.from_numpy(words),
    }


def save(trainer: Trainer, folder: Path) -> None:
    """Keep the encoder alone, as a repository like any other."""
    assert isinstance(trainer.model, CaptionedEncoder)
    encoder = trainer.model.encoder.eval().cpu()
    config = encoder.config
    model = PivotVisionModel(PivotVisionModel.config_class(config), encoder)
    model.image_processor = SiglipImageProcessorPil(
        size={"height": config.image_size, "width": config.image_size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    fill_repository(folder, model)


def _set_sincos_positions(encoder: SiglipVisionModel) -> None:
    """Start position embeddings as 2-D sines and cosines (big_vision's posemb_sincos_2d).

    SigLIP's own start is normal noise a sixth as strong as the patches, from which a short run does not learn
    where a patch lies: after 250 steps 6% of position words were right, with sines 82%.
    """
    weight = encoder.embeddings.position_embedding.weight
    side, width = round(weight.shape[0] ** 0.5), weight.shape[1]
    if width % 4:
        raise ValueError(f"hidden_size {width} is not a multiple of 4")
    rates = 1 / 100 ** (np.arange(width // 4) / (width // 4 - 1))
    rows, columns = np.mgrid[:side, :side].reshape(2, -1, 1)
    waves = [wave(place * rates) for place, wave in itertools.product((columns, rows), (np.sin, np.cos))]
    with torch.no_grad():
        weight.copy_(torch.from_numpy(np.concatenate(waves, axis=1)))
