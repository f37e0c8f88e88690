"""Stages align, instruct and sft: TRL's SFTTrainer, the loss on the answer only."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from pivot_hub.config.recipe import LoadedRecipe
from pivot_hub.data.report import RowReport
from pivot_hub.mllm.build import build_mllm
from pivot_hub.mllm.load import load_mllm
from pivot_hub.mllm.lora import add_lora
from pivot_hub.mllm.trainable import freeze_parts
from pivot_hub.training.conversation import ConversationCollator
from pivot_hub.training.part_trainer import PartTrainer
from pivot_hub.training.row_check import columns_of, rows_of


class PivotSFTTrainer(PartTrainer, SFTTrainer):
    """TRL's SFTTrainer with a learning rate per part."""


def build_trainer(
    loaded: LoadedRecipe,
    args: SFTConfig,
    parent: Path | None,
    report: RowReport,
    callbacks: list[TrainerCallback],
) -> PivotSFTTrainer:
    """Make the trainer of an align, instruct or sft recipe.

    Args:
        args: an SFTConfig; `max_length` bounds prompt and answer together, image tokens included.
        parent: the checkpoint to start from; an align stage without one joins the recipe's parts.
        report: filled with what was read and left out.

    Raises:
        CheckpointError, DataError: a part or a row cannot be used.
    """
    recipe = loaded.recipe
    if parent is not None:
        model, processor = load_mllm(parent)
    else:
        assert recipe.model is not None
        spec = recipe.model
        model, processor = build_mllm(
            loaded.locate(spec.vision),
            loaded.locate(spec.language),
            spec.feature_layer,
            spec.vision_revision,
            spec.language_revision,
            recipe.seed,
        )
    rates = recipe.learning_rate.trained()
    freeze_parts(model, rates)
    if recipe.lora is not None:
        add_lora(model, recipe.lora, recipe.seed)
    rows = rows_of(loaded, processor, args.max_length)
    report.copy_from(rows.report)
    trainer = PivotSFTTrainer(
        model=model,
        args=args,
        data_collator=ConversationCollator(processor, args.max_length, recipe.labels),
        train_dataset=rows.as_dataset(columns_of(recipe.stage), processor.image_token),
        processing_class=processor,
        callbacks=callbacks,
    )
    trainer.row_ids, trainer.blocks = rows.ids, rows.blocks()
    trainer.rates = rates
    return trainer
