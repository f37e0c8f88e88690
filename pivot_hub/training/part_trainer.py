"""Base of our SFT and DPO trainers: a learning rate per part, several processes, and a stop when the loss diverges."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from types import MappingProxyType
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
from transformers import PreTrainedModel, ProcessorMixin, Trainer

from pivot_hub.data.sampler import BlockSampler
from pivot_hub.errors import TrainingError
from pivot_hub.files import write_json
from pivot_hub.mllm.blank_image import encode_blank_images
from pivot_hub.mllm.families import FAMILIES
from pivot_hub.mllm.load import load_mllm
from pivot_hub.mllm.lora import has_lora
from pivot_hub.mllm.trainable import parameter_groups

# Folders of a checkpoint that accelerate writes under FSDP.
MODEL_SHARDS, OPTIMIZER_SHARDS = "pytorch_model_fsdp_0", "optimizer_0"
SHARDS = (MODEL_SHARDS, OPTIMIZER_SHARDS)
# A loss has exploded if it is above both limits: an absolute one, and a multiple of the median of the last steps.
LARGEST_LOSS = 20.0
LARGEST_MULTIPLE_OF_MEDIAN = 10.0
MEDIAN_STEPS = 50
WARM_UP_STEPS = 10  # the median of fewer steps is no measure


class PartTrainer(Trainer):
    """A Trainer whose optimizer has one parameter group per trained part. Put it before a TRL trainer in the bases.

    Attributes:
        rates: Learning rate of each part; None leaves the optimizer to transformers.
        row_ids: Function that returns the ids of rows by the numbers that batches carry as `row`, B numbers that stay
            on the CPU.
        blocks: Number of the block that each row is read in, (rows,). Rows are then shuffled so that a block is read
            once. None leaves the order to transformers.
        streams: Options `streams` and `batch` of the `BlockSampler` that orders them.
    """

    rates: dict[str, float] | None = None
    row_ids: Callable[[list[int]], list[str]] | None = None
    blocks: np.ndarray | None = None
    streams: Mapping[str, int] = MappingProxyType({})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if has_lora(cast(torch.nn.Module, self.model)) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise TrainingError("`lora` is for single and ddp: leave it out, or choose recipes/accelerate/ddp.yaml.")
        self._recent_losses: deque[tuple[int, float]] = deque()  # step and loss of the last steps
        # Losses () of the batches of the running step, which stay on the device, and the numbers of their rows.
        self._step_losses: list[torch.Tensor] = []
        self._step_rows: list[int] = []
        for each in (self.model, getattr(self, "ref_model", None)):
            model = None if each is None else self.accelerator.unwrap_model(each)
            if model is None or model.config.model_type not in FAMILIES:
                continue
            if self.accelerator.num_processes > 1 and FAMILIES[model.config.model_type].image_tokens:
                encode_blank_images(model, cast(ProcessorMixin, self.processing_class))
            # The set also names blocks of towers that this model does not have; FSDP would fail on them.
            present = {type(module).__name__ for module in model.modules()}
            model._no_split_modules = set(model._no_split_modules or ()) & present

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.rates is not None and self.optimizer is None:
            mllm = cast(PreTrainedModel, self.accelerator.unwrap_model(self.model))
            decayed = set(self.get_decay_parameter_names(mllm))
            groups = parameter_groups(mllm, self.rates, self.args.weight_decay, decayed)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, mllm)
            self.optimizer_cls_and_kwargs = optimizer_class, {**options, "params": groups}
        return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.blocks is None:
            return super()._get_train_sampler(train_dataset)
        return BlockSampler(self.blocks, self.args.seed, **self.streams)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        rows = inputs.pop("row", None)
        computed = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            loss = computed[0] if isinstance(computed, tuple) else computed
            self._step_losses.append(loss.detach())
            self._step_rows += rows or []
            if self.accelerator.sync_gradients:
                # Reading a loss waits for the GPU, so a step reads one number, before the optimizer uses the gradients.
                step_loss = torch.stack(self._step_losses).sum()
                # If the loss is divided by the tokens of the whole step, a batch has only its share of the step's loss.
                shares = 1 if kwargs.get("num_items_in_batch") is not None else len(self._step_losses)
                step_rows = self._step_rows
                self._step_losses, self._step_rows = [], []
                self._check_loss(float(step_loss) / shares, step_rows)
        return computed

    def _check_loss(self, loss: float, rows: list[int]) -> None:
        """Stop at a step whose loss is not finite or has exploded, and write the ids of its rows to a file.

        Args:
            loss: Loss of the optimizer step.
            rows: Numbers of the rows that this process has read for the step.

        Raises:
            TrainingError: The loss is not finite or has exploded; the message names the file.
        """
        step = self.state.global_step + 1
        while self._recent_losses and self._recent_losses[0][0] < step - MEDIAN_STEPS:
            self._recent_losses.popleft()
        earlier = [(earlier_step, value) for earlier_step, value in self._recent_losses if earlier_step < step]
        self._recent_losses.append((step, loss))
        exploded = False
        if len({earlier_step for earlier_step, _ in earlier}) >= WARM_UP_STEPS:
            usual = median(value for _, value in earlier)
            exploded = loss > max(LARGEST_LOSS, LARGEST_MULTIPLE_OF_MEDIAN * usual)
        if math.isfinite(loss) and not exploded:
            return
        file = stopped_file(Path(cast(str, self.args.output_dir)))
        row_names: list[Any] = rows if self.row_ids is None else self.row_ids(rows)
        write_json(file, {"step": step, "loss": loss if math.isfinite(loss) else str(loss), "rows": row_names})
        raise TrainingError(
            f"the loss is {loss} at step {step}; {file} names the rows of the step. Check them, lower the learning "
            "rates or set `args.max_grad_norm`; the last checkpoint is kept and the run resumes from it."
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        model = cast(torch.nn.Module, self.model)
        if self.args.should_save and has_lora(model):  # keeps the adapters' own names, which from_pretrained drops
            save_model(model, str(Path(str(output_dir or self.args.output_dir), "model.safetensors")))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load all weights of a checkpoint, which may be sharded.

        transformers 5.23 saves LLaVA under the keys of older versions and resumes with a plain, non-strict
        `load_state_dict`, which then matches none of them: the run would silently resume from the parent's weights.
        """
        shards = Path(resume_from_checkpoint) / MODEL_SHARDS
        if self.is_fsdp_enabled and not shards.is_dir():
            raise TrainingError(
                f"{resume_from_checkpoint} was written without FSDP, which cannot read it: resume without FSDP, or "
                "delete it to start again."
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
        """Load the state of optimizer and scheduler, which may be sharded."""
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
        """Write no model card: `pivot card` writes it from measured results."""


def stopped_file(work: Path) -> Path:
    """Return the file, beside the output folder, that names the rows that stopped a run which works in `work`."""
    return work.with_name(f"{work.name.removesuffix('.partial')}.stopped.json")
