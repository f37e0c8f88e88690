"""A narrow copy of a recipe's model: its layers, heads, image size and vocabulary, but 8 channels a head.

A step of it launches as many kernels as one of the whole model, because their number depends on layers, rows and
vocabulary and not on widths. It has few enough weights to run on a CPU with real numbers, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, SiglipImageProcessorPil

from pivot_hub.config.data_section import ShapesData
from pivot_hub.config.recipe import LoadedRecipe, MllmSpec, ModelSpec, RewardSpec
from pivot_hub.config.stages import stage_of
from pivot_hub.encoder.configuration_pivot import backbone_of
from pivot_hub.errors import RehearsalError
from pivot_hub.mllm.build import build_mllm
from pivot_hub.mllm.extract import extract_encoder
from pivot_hub.mllm.published_configs import part_config, whole_config
from pivot_hub.rehearsal.narrow_mllm import SHAPES_LANGUAGE, narrow_config, write_narrow_mllm
from pivot_hub.training.row_check import columns_of

IMAGE_PX = 336  # side of the images of a whole MLLM: 9 windows of Qwen2.5-VL
VISION, LANGUAGE, PARENT = "vision", "language", "parent"  # folders that `write_narrow_model` fills


def write_narrow_model(loaded: LoadedRecipe, folder: Path) -> None:
    """Write the narrow parts of a recipe's model, with random weights, and the checkpoint that joins them.

    The tokenizer is that of the shipped Shapes base parts. A whole MLLM is one checkpoint, whose encoder is extracted.

    Args:
        loaded: The recipe, of any stage but vision and language.
        folder: Folder that receives `vision`, `parent` and, for an MLLM of two parts, `language`.

    Raises:
        RehearsalError: The recipe starts from a whole MLLM whose processor cannot be put together, or joins parts to
            another MLLM than LLaVA's.
    """
    spec = loaded.recipe.model
    if isinstance(spec, ModelSpec) and spec.family is not None:
        raise RehearsalError(
            f"{loaded.path}: parts are rehearsed as a LLaVA model only; train the align stage, and give its folder as "
            "`model.mllm`."
        )
    if isinstance(spec, MllmSpec):
        write_narrow_mllm(whole_config(loaded.locate(spec.mllm), spec.revision), folder / PARENT)
        extract_encoder(folder / PARENT, folder / VISION, compare_with_base=False)
        return
    assert spec is not None
    torch.manual_seed(0)
    vision = narrow_config(part_config(loaded.locate(spec.vision), spec.vision_revision))
    side = backbone_of(vision).image_px(vision)
    cast(Any, AutoModel.from_config(vision)).save_pretrained(folder / VISION)
    SiglipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder / VISION)
    language = narrow_config(part_config(loaded.locate(spec.language), spec.language_revision))
    cast(Any, AutoModelForCausalLM.from_config(language)).save_pretrained(folder / LANGUAGE)
    AutoTokenizer.from_pretrained(SHAPES_LANGUAGE).save_pretrained(folder / LANGUAGE)
    model, processor = build_mllm(str(folder / VISION), str(folder / LANGUAGE), spec.feature_layer)
    model.save_pretrained(folder / PARENT)
    processor.save_pretrained(folder / PARENT)


def rehearsed_recipe(loaded: LoadedRecipe, folder: Path, changes: dict[str, Any] | None = None) -> LoadedRecipe:
    """Return a recipe of the narrow model: one batch of the synthetic Shapes dataset, in bfloat16, saving nothing.

    Args:
        loaded: The recipe. Its options that decide how a step runs are kept.
        folder: Folder that `write_narrow_model` has filled.
        changes: Further trainer arguments.
    """
    recipe = loaded.recipe
    args = {
        **recipe.args,
        "bf16": True,
        "fp16": False,
        "report_to": "none",
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        **(changes or {}),
    }
    args.pop("gradient_accumulation_steps", None)
    if recipe.stage == "dpo":
        args["reference_cache"] = str(folder / "references")
    stage = stage_of(recipe.stage)
    update: dict[str, Any] = {"args": args, "global_batch": None}
    shapes = next((spec for spec in recipe.data if isinstance(spec, ShapesData)), None)
    if shapes is None:
        shapes = ShapesData(format="shapes", content=stage.content or "instruct", rows=1)
        if isinstance(recipe.model, MllmSpec):  # it takes images of their own size
            shapes = shapes.model_copy(update={"world": shapes.world.model_copy(update={"image_px": IMAGE_PX})})
        if stage.takes_rewards:  # rewards read texts, not tensors, and these rows have a solution in words
            update["rewards"] = [RewardSpec(name="exact_match")]
    if columns_of(recipe) == "image_preference":
        shapes = shapes.model_copy(update={"counterfactual": True})
    update["data"] = [shapes.model_copy(update={"rows": int(args.get("per_device_train_batch_size", 8))})]
    if not stage.base_part:
        update["model"] = (
            MllmSpec(mllm=str(folder / PARENT))
            if isinstance(recipe.model, MllmSpec)
            else ModelSpec(
                vision=str(folder / VISION),
                language=str(folder / LANGUAGE),
                feature_layer=cast(ModelSpec, recipe.model).feature_layer,
            )
        )
    return loaded.model_copy(update={"recipe": recipe.model_copy(update=update)})
