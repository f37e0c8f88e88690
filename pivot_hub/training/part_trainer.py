"""What our SFT and DPO trainers share: a rate per part, and a stop at the first loss that is not finite."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import LlavaForConditionalGeneration, Trainer

from pivot_hub.errors import TrainingError
from pivot_hub.mllm import load_mllm, parameter_groups


class PartTrainer(Trainer):
    """A Trainer whose optimizer has one group per trained part. Put it before a TRL trainer in the bases."""

    rates: dict[str, float] | None = None  # of each part; None leaves the optimizer to transformers

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.rates is None:
            return super().create_optimizer()
        if self.optimizer is None:
            mllm = cast(LlavaForConditionalGeneration, self.accelerator.unwrap_model(self.model))
            decayed = set(self.get_decay_parameter_names(mllm))
            groups = parameter_groups(mllm, self.rates, self.args.weight_decay, decayed)
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, mllm)
            self.optimizer = optimizer(groups, **{k: v for k, v in options.items() if k != "lr"})
        return self.optimizer

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        computed = super().compute_loss(*args, **kwargs)
        loss = computed[0] if isinstance(computed, tuple) else computed
        if not torch.isfinite(loss).all():
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}: lower the learning rates or set "
                "`args.max_grad_norm`; the last checkpoint is kept and the run resumes from it."
            )
        return computed

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load a checkpoint's weights, every one of them.

        transformers 5.23 saves LLaVA under the keys of older versions and resumes with a plain, non-strict
        `load_state_dict`, which then matches none of them: the run goes on from the parent's weights, silently.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved, _ = load_mllm(resume_from_checkpoint)
        target = cast(torch.nn.Module, self.model if model is None else model)
        target.load_state_dict(saved.state_dict(), strict=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: a card is made from measured facts, by `pivot card`."""
