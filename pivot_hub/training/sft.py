"""Stages align, instruct and sft: TRL's SFTTrainer, with the loss on the answers only."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from trl import SFTConfig, SFTTrainer

from pivot_hub.config.recipe import LoadedRecipe
from pivot_hub.data.report import RowReport
from pivot_hub.errors import RecipeError
from pivot_hub.mllm.build import build_mllm
from pivot_hub.mllm.inputs import placeholder_of, positions_of
from pivot_hub.mllm.load import load_mllm
from pivot_hub.mllm.lora import add_lora
from pivot_hub.mllm.trainable import freeze_parts
from pivot_hub.training.conversation import ConversationCollator, Labels
from pivot_hub.training.part_trainer import PartTrainer
from pivot_hub.training.row_check import columns_of, rows_of
from pivot_hub.training.tree_check import language_attention, tree_problem
from pivot_hub.training.tree_layout import use_trees

logger = logging.getLogger(__name__)


class _RowMeanSFTTrainer(SFTTrainer):
    """TRL's SFTTrainer, whose loss is the mean over rows of each row's mean if batches have `label_weights`.

    TRL's loss is the mean over all labels of a step, so that a row counts by its length.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The loss is divided by the labels or rows of the whole step, also for models whose own loss is not. Without
        # this, transformers would divide it by the number of accumulated batches once more.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        weights = inputs.pop("label_weights", None)
        if weights is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs: list[Any] = []  # TRL returns those of another forward pass, without log_probs

        def recording_model(*args: Any, **kwargs: Any) -> Any:
            outputs.append(model(*args, **kwargs))
            return outputs[-1]

        computed = super().compute_loss(recording_model, inputs, return_outputs, num_items_in_batch)
        rows = weights.sum().round() if num_items_in_batch is None else num_items_in_batch
        loss = -(outputs[0].log_probs * weights[:, 1:]).sum() / rows
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages over processes, and the rows are those of all
        if self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs[0].aux_loss / steps
        return (loss, computed[1]) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Return the number of rows of a step with `label_weights`, and of labels otherwise."""
        if not batch_samples or "label_weights" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        rows = torch.stack([batch["label_weights"].sum() for batch in batch_samples]).sum().round().to(device)
        return self.accelerator.gather(rows).sum() if self.args.average_tokens_across_devices else rows


class PivotSFTTrainer(PartTrainer, _RowMeanSFTTrainer):
    """TRL's SFTTrainer with one learning rate per part, and a loss over rows where batches have `label_weights`."""


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
        parent: Checkpoint to start from. Without one, it is the recipe's MLLM, or align joins the recipe's parts.
        report: Report that receives what was read and what was left out.
        callbacks: Callbacks of the trainer.

    Raises:
        RecipeError: `loss_over` does not fit the trainer's loss.
        CheckpointError: The parent or a part cannot be used.
        DataError: A row cannot be used.
    """
    recipe = loaded.recipe
    if recipe.loss_over == "rows" and (args.loss_type != "nll" or args.label_smoothing_factor):
        raise RecipeError(
            f"{loaded.path}: `loss_over: rows` is for the plain loss; leave out `args.loss_type` and "
            "`args.label_smoothing_factor`, or `loss_over`."
        )
    if (start := loaded.start(parent)) is not None:
        model, processor = load_mllm(*start)
    else:
        spec = loaded.parts(f"stage {recipe.stage}")
        model, processor = build_mllm(
            loaded.locate(spec.vision),
            loaded.locate(spec.language),
            spec.feature_layer,
            spec.vision_revision,
            spec.language_revision,
            recipe.seed,
            spec.family,
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
        data_collator=collator_of(model, processor, args.max_length, recipe.labels, recipe.loss_over),
        train_dataset=rows.as_dataset(columns_of(recipe), placeholder_of(processor)),
        processing_class=processor,
        callbacks=callbacks,
    )
    trainer.row_ids, trainer.blocks = rows.ids, rows.blocks()
    trainer.rates = learning_rates
    return trainer


def collator_of(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    max_length: int | None,
    labels: Labels = None,
    loss_over: Literal["rows"] | None = None,
) -> ConversationCollator:
    """Return the collator of a model, which lays rows out without padding if the model can run them so.

    Args:
        model: The MLLM, which is made to take rows without padding, see `use_trees`.
        processor: Its processor.
        max_length: Largest number of tokens of a row.
        labels: The tokens that the loss is on, see `ConversationCollator`.
        loss_over: Whether the loss is a mean over rows; None for one over all labels.
    """
    problem = f"its attention is {language_attention(model)}, not sdpa"
    if language_attention(model) == "sdpa":
        use_trees(model)
        problem = tree_problem(model, processor, max_length) or ""
    if problem:
        logger.warning("rows are padded to the longest: %s.", problem)
    positions = None if problem else positions_of(model)
    return ConversationCollator(processor, max_length, labels, positions, weigh_rows=loss_over == "rows")
