"""Stages align, instruct and sft: TRL's SFTTrainer, with the loss on the answers only."""

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
    """TRL's SFTTrainer with one learning rate per part."""


def build_trainer(
    loaded: LoadedRecipe,
    args: SFTConfig,
    parent: Path | None,
    report: RowReport,
    callbacks: list[TrainerCallback],
) -> PivotSFTTrainer:
    """Build the trainer of an align, instruct or sft recipe.

    Args:
        loaded: The recipe.
        args: Config of the trainer; `max_length` limits prompt and answer together, image tokens included.
        parent: Checkpoint to start from. An align stage without one joins the recipe's parts.
        report: Report that receives what was read and what was left out.
        callbacks: Callbacks of the trainer.

    Raises:
        CheckpointError: The parent or a part cannot be used.
        DataError: A row cannot be used.
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
    learning_rates = recipe.learning_rate.trained()
    freeze_parts(model, learning_rates)
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
    trainer.rates = learning_rates
    return trainer
