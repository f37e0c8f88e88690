"""A check of the first DPO step: policy and reference start as one model, so their rewards are zero."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pivot_hub.errors import TrainingError

# Largest mean difference of an answer's log-probability that is rounding: so many nats, and that share of its own size.
TOLERANCE, TOLERANCE_HALF = (1e-3, 1e-4), (0.1, 0.01)  # in float32, in 16 bits


class StartCheck(TrainerCallback):
    """Stops a run before its first update if the reference's log-probabilities are not those of the policy.

    Only add it where both start from the same weights. A policy with dropout is not checked. A difference means that
    the reference was computed in another way than the policy, as by another distribution of the weights, or that its
    cache belongs to another model; every later loss would be wrong without a sign of it.

    Args:
        trainer: TRL's DPOTrainer, whose metrics of the first step are read.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the rewards of the first step, before its update.

        Raises:
            TrainingError: Policy and reference differ by more than rounding.
        """
        metrics = self.trainer._metrics["train"]
        if state.global_step > 0 or not metrics["rewards/chosen"] or _has_dropout(self.trainer.model):
            return
        nats, share = TOLERANCE_HALF if args.bf16 or args.fp16 else TOLERANCE
        for side in ("chosen", "rejected"):
            difference = fmean(metrics[f"rewards/{side}"]) / self.trainer.beta  # in nats, a mean over answers
            if not abs(difference) <= nats + share * abs(fmean(metrics[f"logps/{side}"])):
                raise TrainingError(
                    f"the {side} answers' log-probabilities under policy and reference differ by {difference:.2g} on "
                    "average at the first step, though both start from the same weights; delete the folder of "
                    "args.reference_cache, or set args.cache_reference to false."
                )


def _has_dropout(model: nn.Module) -> bool:
    config: Any = getattr(model, "config", None)
    attention_dropout = getattr(getattr(config, "text_config", config), "attention_dropout", 0.0)
    return bool(attention_dropout) or any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
