"""Stages grpo and rloo: TRL's GRPOTrainer and RLOOTrainer, in which image and prompt run once for all answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from pivot_hub.config.recipe import LoadedRecipe
from pivot_hub.data.report import RowReport
from pivot_hub.errors import CheckpointError, TrainingError
from pivot_hub.mllm.inputs import placeholder_of
from pivot_hub.mllm.load import load_mllm
from pivot_hub.mllm.lora import add_lora
from pivot_hub.mllm.trainable import freeze_parts
from pivot_hub.training.group_trainer import GroupTrainer
from pivot_hub.training.rewards.load import load_rewards
from pivot_hub.training.row_check import columns_of, rows_of


@dataclass
class GroupOptions:
    """What our configs of GRPO and RLOO add to TRL's.

    Args:
        share_prefix: Whether prompt and image run once for all answers of a prompt. It does not change the loss.
        stop_without_signal: Number of steps after which a run stops if the answers of every prompt got the same
            reward, so that there was nothing to learn from; 0 for never.
        samples_every: Steps between two samples of answers, which `samples.html` beside the checkpoints shows; below 1,
            a share of all steps; 0 for none. At most `samples.MOST_STEPS` steps of a run are sampled.
    """

    share_prefix: bool = field(default=True, metadata={"help": "Run prompt and image once for all answers."})
    stop_without_signal: int = field(default=100, metadata={"help": "Steps without different rewards; 0 for any."})
    samples_every: float = field(default=0.05, metadata={"help": "Steps between two samples, or a share of all."})

    def __post_init__(self) -> None:
        for name in ("stop_without_signal", "samples_every"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:  # NaN is none of these
                raise TrainingError(f"{name} is {value}; give a number of steps, or 0 for none.")
        super().__post_init__()  # type: ignore[misc]  # TRL's, which follows in the bases


@dataclass
class PivotGRPOConfig(GroupOptions, GRPOConfig):
    """TRL's GRPOConfig with the options of `GroupOptions`."""


@dataclass
class PivotRLOOConfig(GroupOptions, RLOOConfig):
    """TRL's RLOOConfig with the options of `GroupOptions`."""


class PivotGRPOTrainer(GroupTrainer, GRPOTrainer):
    """TRL's GRPOTrainer without its repeated work, and with a learning rate per part; see `GroupTrainer`."""

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: PivotGRPOConfig | None = None, **options: Any
    ) -> None:
        super().__init__(model, reward_funcs=reward_funcs, args=args or PivotGRPOConfig(), **options)


class PivotRLOOTrainer(GroupTrainer, RLOOTrainer):
    """TRL's RLOOTrainer without its repeated work, and with a learning rate per part; see `GroupTrainer`."""

    def __init__(self, model: Any, reward_funcs: Any, args: PivotRLOOConfig | None = None, **options: Any) -> None:
        super().__init__(model, reward_funcs=reward_funcs, args=args or PivotRLOOConfig(), **options)


TRAINERS: dict[str, type[GroupTrainer]] = {"grpo": PivotGRPOTrainer, "rloo": PivotRLOOTrainer}


def build_trainer(
    loaded: LoadedRecipe,
    args: PivotGRPOConfig | PivotRLOOConfig,
    parent: Path | None,
    report: RowReport,
    callbacks: list[TrainerCallback],
) -> GroupTrainer:
    """Build the trainer of a grpo or rloo recipe. The reference, where beta is not 0, is the parent itself.

    Args:
        loaded: The recipe.
        args: Config of the trainer.
        parent: Checkpoint that the policy starts from; without one, it starts from the recipe's MLLM.
        report: Report that receives what was read and what was left out.
        callbacks: Callbacks of the trainer.

    Raises:
        CheckpointError: The parent is missing or cannot be used.
        DataError: A row cannot be used.
        TrainingError: A reward cannot be loaded, or an option cannot be used.
    """
    recipe = loaded.recipe
    if (start := loaded.start(parent)) is None:
        raise CheckpointError(f"{loaded.path}: {recipe.stage} starts from a checkpoint; name its recipe as `parent`.")
    functions, args.reward_weights = load_rewards(recipe.rewards or ())
    model, processor = load_mllm(*start)
    learning_rates = recipe.learning_rate.trained()
    freeze_parts(model, learning_rates)
    if recipe.lora is not None:
        add_lora(model, recipe.lora, recipe.seed)
    rows = rows_of(loaded, processor, None)
    report.copy_from(rows.report)
    trainer = TRAINERS[recipe.stage](
        model,
        reward_funcs=functions,
        args=args,
        train_dataset=rows.as_dataset(columns_of(recipe), placeholder_of(processor)),
        processing_class=processor,
        callbacks=callbacks,
        rates=learning_rates,
    )
    trainer.row_ids, trainer.blocks = rows.ids, rows.blocks()
    return trainer


def run_warnings(trainer: GroupTrainer) -> list[str]:
    """Return the warnings about a run's rewards, for its report."""
    return trainer.guards.warnings
