"""What our SFT and DPO trainers share: a rate per part, several processes, and a stop when the loss goes astray."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from transformers import LlavaForConditionalGeneration, Trainer

from pivot_hub.data.sampler import BlockSampler
from pivot_hub.errors import TrainingError
from pivot_hub.files import write_json
from pivot_hub.mllm.blank_image import encode_blank_images
from pivot_hub.mllm.load import load_mllm
from pivot_hub.mllm.lora import has_lora
from pivot_hub.mllm.trainable import parameter_groups

SHARDS = MODEL_SHARDS, OPTIMIZER_SHARDS = "pytorch_model_fsdp_0", "optimizer_0"  # folders of accelerate's FSDP
# A loss explodes above both; medians of fewer steps than WARM say nothing.
HIGHEST, TIMES_MEDIAN, REMEMBERED, WARM = 20.0, 10.0, 50, 10


class PartTrainer(Trainer):
    """A Trainer whose optimizer has one group per trained part. Put it before a TRL trainer in the bases.

    Attributes:
        rates: learning rate of each part; None leaves the optimizer to transformers.
        row_ids: names rows by the numbers that batches carry as `row` (B,).
        blocks: of each row, the block it is read in; its rows are then shuffled so that a block is read once.
    """

    rates: dict[str, float] | None = None
    row_ids: Callable[[list[int]], list[str]] | None = None
    blocks: np.ndarray | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if has_lora(cast(torch.nn.Module, self.model)) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise TrainingError("`lora` is for single and ddp: leave it out, or choose recipes/accelerate/ddp.yaml.")
        self._losses: deque[tuple[int, float]] = deque()  # step and loss of the last batches
        for each in (self.model, getattr(self, "ref_model", None)):
            model = None if each is None else self.accelerator.unwrap_model(each)
            if not isinstance(model, LlavaForConditionalGeneration):
                continue
            if self.accelerator.num_processes > 1:
                encode_blank_images(model)
            # Its set also names blocks of towers that it does not have, at which FSDP stops.
            present = {type(module).__name__ for module in model.modules()}
            model._no_split_modules = set(model._no_split_modules or ()) & present

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.rates is not None and self.optimizer is None:
            mllm = cast(LlavaForConditionalGeneration, self.accelerator.unwrap_model(self.model))
            decayed = set(self.get_decay_parameter_names(mllm))
            groups = parameter_groups(mllm, self.rates, self.args.weight_decay, decayed)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, mllm)
            self.optimizer_cls_and_kwargs = kind, {**options, "params": groups}
        return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.blocks is None:
            return super()._get_train_sampler(train_dataset)
        return BlockSampler(self.blocks, self.args.seed)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        rows = inputs.pop("row", None)
        computed = super().compute_loss(model, inputs, *args, **kwargs)
        loss = computed[0] if isinstance(computed, tuple) else computed
        if model.training:
            # A loss that is divided by the tokens of the whole step is a share of it.
            shares = self.current_gradient_accumulation_steps if kwargs.get("num_items_in_batch") is not None else 1
            self._check_loss(float(loss.detach()) * shares, [] if rows is None else rows.tolist())
        return computed

    def _check_loss(self, loss: float, rows: list[int]) -> None:
        """Stop at a batch whose loss is not finite or explodes, and write down which rows it holds.

        Raises:
            TrainingError: it is or does; the sentence names the file.
        """
        step = self.state.global_step + 1
        while self._losses and self._losses[0][0] < step - REMEMBERED:
            self._losses.popleft()
        before = [value for of, value in self._losses if of < step]
        warm = len({of for of, _ in self._losses if of < step}) >= WARM
        self._losses.append((step, loss))
        if math.isfinite(loss) and not (warm and loss > max(HIGHEST, TIMES_MEDIAN * median(before))):
            return
        file = stopped_file(Path(cast(str, self.args.output_dir)))
        names: list[Any] = rows if self.row_ids is None else self.row_ids(rows)
        write_json(file, {"step": step, "loss": loss if math.isfinite(loss) else str(loss), "rows": names})
        raise TrainingError(
            f"the loss is {loss} at step {step}, of the rows in {file}: look at them, lower the learning rates or set "
            "`args.max_grad_norm`; the last checkpoint is kept and the run resumes from it."
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        model = cast(torch.nn.Module, self.model)
        if self.args.should_save and has_lora(model):  # under their own names, which from_pretrained does not know
            save_model(model, str(Path(str(output_dir or self.args.output_dir), "model.safetensors")))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load a checkpoint's weights, every one of them; shards of several processes too.

        transformers 5.23 saves LLaVA under the keys of older versions and resumes with a plain, non-strict
        `load_state_dict`, which then matches none of them: the run goes on from the parent's weights, silently.
        """
        shards = Path(resume_from_checkpoint) / MODEL_SHARDS
        if self.is_fsdp_enabled and not shards.is_dir():
            raise TrainingError(
                f"{resume_from_checkpoint} was written without FSDP, which cannot read it: go on without FSDP, or "
                "delete it to begin again."
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        target = cast(torch.nn.Module, self.model if model is None else model)
        if shards.is_dir():
            state = {"model": get_model_state_dict(target)}
            load_shards(state, checkpoint_id=shards)
            set_model_state_dict(target, state["model"])
            return
        if has_lora(target):
            load_model(target, str(Path(resume_from_checkpoint, "model.safetensors")))
            return
        saved, _ = load_mllm(resume_from_checkpoint)
        target.load_state_dict(saved.state_dict(), strict=True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both; shards of several processes too."""
        shards = None if checkpoint is None else Path(checkpoint) / OPTIMIZER_SHARDS
        if shards is None or not shards.is_dir() or self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        model, optimizer = cast(torch.nn.Module, self.model), cast(torch.optim.Optimizer, self.optimizer)
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        load_shards(state, checkpoint_id=shards)
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        assert self.lr_scheduler is not None
        self.lr_scheduler.load_state_dict(torch.load(shards.with_name("scheduler.pt"), weights_only=True))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: a card is made from measured facts, by `pivot card`."""


def stopped_file(work: Path) -> Path:
    """Where a run that works in this folder writes which rows stopped it: beside its output folder."""
    return work.with_name(f"{work.name.removesuffix('.partial')}.stopped.json")
