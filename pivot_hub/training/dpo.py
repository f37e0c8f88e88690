"""Stage dpo: TRL's DPOTrainer from the same parent and on the same rows as sft."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from pivot_hub.data.source import RowReport, as_dataset, read_rows
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm import IMAGE_TOKEN, freeze_parts, load_mllm
from pivot_hub.recipe import LoadedRecipe
from pivot_hub.training.part_trainer import PartTrainer
from pivot_hub.training.row_check import RowCheck


class PivotDPOTrainer(PartTrainer, DPOTrainer):
    """TRL's DPOTrainer with a learning rate per part."""


def build_trainer(
    loaded: LoadedRecipe,
    args: DPOConfig,
    parent: Path | None,
    report: RowReport,
    callbacks: list[TrainerCallback],
) -> PivotDPOTrainer:
    """Make the trainer of a dpo recipe; the frozen reference is the parent itself.

    Args:
        args: a DPOConfig.
        parent: the checkpoint that policy and reference start from.
        report: filled with what was read and left out.

    Raises:
        CheckpointError, DataError: the parent or a row cannot be used.
    """
    if parent is None:
        raise CheckpointError(f"{loaded.path}: dpo starts from a checkpoint; name its recipe as `parent`.")
    model, processor = load_mllm(parent)
    # TRL would load the reference by the model's hub name, which a checkpoint of a folder does not have.
    reference = deepcopy(model).eval().requires_grad_(False)
    rates = loaded.recipe.learning_rate.trained()
    freeze_parts(model, rates)
    check = RowCheck(processor, args.max_length, "preference", report, pairs=True)
    sources, rows = read_rows(loaded, check, report)
    trainer = PivotDPOTrainer(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=as_dataset(sources, rows, "preference", IMAGE_TOKEN),
        processing_class=processor,
        callbacks=callbacks,
    )
    trainer.rates = rates
    return trainer
