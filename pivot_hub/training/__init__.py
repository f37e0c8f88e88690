"""Training: one module a trainer, `stage` runs any of them from a recipe to a finished checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from pivot_hub.recipe import Stage


def trainer_config(stage: Stage) -> type[TrainingArguments]:
    """The config class whose arguments a recipe of this stage passes under `args`."""
    if stage == "vision":
        from transformers import TrainingArguments

        return TrainingArguments
    if stage == "dpo":
        from pivot_hub.training.dpo import PivotDPOConfig

        return PivotDPOConfig
    from trl import SFTConfig

    return SFTConfig
