"""Stage dpo: TRL's DPOTrainer from the same parent and on the same rows as sft, without its repeated work."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from huggingface_hub.constants import HF_HOME
from transformers import LlavaForConditionalGeneration, LlavaProcessor, TrainerCallback
from trl import DPOConfig, DPOTrainer

from pivot_hub.config.recipe import LoadedRecipe
from pivot_hub.data.report import RowReport
from pivot_hub.errors import CheckpointError, TrainingError
from pivot_hub.mllm.load import load_mllm
from pivot_hub.mllm.lora import add_lora
from pivot_hub.mllm.trainable import freeze_parts
from pivot_hub.training.part_trainer import PartTrainer
from pivot_hub.training.reference_cache import ReferenceCache, model_hash, processor_hash, row_key
from pivot_hub.training.row_check import rows_of
from pivot_hub.training.tree_layout import PairCollator, share_forward

SWITCHES = ("encode_once", "share_prefix", "cache_reference", "pack")
logger = logging.getLogger(__name__)


@dataclass
class PivotDPOConfig(DPOConfig):
    """TRL's DPOConfig, and which repeated work is left out. None of the switches changes the loss.

    Args:
        encode_once: prepare and encode each distinct image of a batch once.
        share_prefix: run prompt and image once for both answers.
        cache_reference: compute reference log-probabilities once, keep them on disk, and let the reference model go.
        pack: lay pairs out one after the other instead of padding them to the longest.
        pack_tokens: run a step's pairs in chunks of at most so many tokens each, one after the other; their losses are
            weighted so that the step is that of the whole batch. None runs them together. For one process.
        reference_cache: folder of the cached values; below HF_HOME by default.
    """

    encode_once: bool = field(default=True, metadata={"help": "Encode each distinct image of a batch once."})
    share_prefix: bool = field(default=True, metadata={"help": "Run prompt and image once for both answers."})
    cache_reference: bool = field(default=True, metadata={"help": "Keep reference log-probabilities on disk."})
    pack: bool = field(default=True, metadata={"help": "Lay pairs out without padding."})
    pack_tokens: int | None = field(default=None, metadata={"help": "Tokens of one pass; a step may take several."})
    reference_cache: str | None = field(default=None, metadata={"help": "Folder of reference log-probabilities."})


class PivotDPOTrainer(PartTrainer, DPOTrainer):
    """TRL's DPOTrainer without its repeated work, and with a learning rate per part.

    Takes what DPOTrainer takes. The switches of `PivotDPOConfig` are for LLaVA-style models; for others they are
    turned off, which is logged. Where a setting does not go with a switch, the error names the switch.

    Args:
        rates: learning rate of each part of the MLLM (vision, projector, language); `args.learning_rate` for all
            where it is None.

    Raises:
        TrainingError: a switch that is on does not go with another setting.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: PivotDPOConfig | None = None,
        *,
        processing_class: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        rates: dict[str, float] | None = None,
        **options: Any,
    ) -> None:
        args = PivotDPOConfig() if args is None else args
        on = _switches(model, processing_class, args, train_dataset, options)
        asked = ref_model is None and options.get("peft_config") is None and not args.precompute_ref_log_probs
        if asked and isinstance(model, torch.nn.Module) and not _is_peft(model):
            # TRL would load it by the model's hub name, which a model of a folder or of a config does not have.
            ref_model = deepcopy(model).eval().requires_grad_(False)
        cache = None
        if on["cache_reference"]:
            cache = ReferenceCache(
                args.reference_cache or Path(HF_HOME) / "pivot_hub" / "reference",
                {
                    "model": model_hash(ref_model),
                    "processor": processor_hash(processing_class),
                    "max_length": args.max_length,
                    "ld_alpha": args.ld_alpha,
                    "autocast": "bf16" if args.bf16 else "fp16" if args.fp16 else None,
                },
            )
        if any(on.values()):
            layout = (on["encode_once"], on["share_prefix"], on["pack"], args.pack_tokens if on["pack"] else None)
            options["data_collator"] = PairCollator(processing_class, args.max_length, *layout)
            for each in (model, ref_model):
                share_forward(each)
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            processing_class=processing_class,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **options,
        )
        self.rates = rates
        self._share = 1.0  # of the chunk that is being run
        if cache is not None:
            self._fill(cache)
            cast(PairCollator, self.data_collator).references = cache.find
            self.ref_model, self.precompute_ref_logps = None, True

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One batch, forward and backward; with `pack_tokens`, chunk by chunk."""
        if "chunks" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        parts = _shares(inputs["chunks"])
        metrics = self._metrics["train"]
        before = {name: len(values) for name, values in metrics.items()}
        losses = []
        for self._share, chunk in parts:
            losses.append(super().training_step(model, chunk, num_items_in_batch))
        self._share = 1.0
        for name, values in metrics.items():
            new = values[before.get(name, 0) :]
            if len(new) == len(parts):  # one value a chunk becomes one of the batch
                total = sum(share * value for (share, _), value in zip(parts, new, strict=True))
                values[before.get(name, 0) :] = [total]
        return torch.stack(losses).sum()

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "chunks" not in inputs:
            computed = super().compute_loss(model, inputs, *args, **kwargs)
            return computed if self._share == 1 else computed * self._share
        # Evaluation: a training step takes its chunks one by one.
        losses = [share * super(PivotDPOTrainer, self).compute_loss(model, c) for share, c in _shares(inputs["chunks"])]
        return torch.stack(losses).sum()

    def _fill(self, cache: ReferenceCache) -> None:
        """Compute what the cache lacks of every data set, each process its share.

        A reference whose weights are sharded runs in all processes at once: one that has no rows left repeats some.
        """
        cache.read()
        repeated: dict[str, Any] = {}
        first = cast(Dataset, self.train_dataset)[0]
        for rows in self._lacking(cache):
            repeated = rows
            self._meet(True)
            self._compute_rows(cache, rows)
        while self._meet(False):
            self._compute_rows(cache, repeated or {row_key(first): first})
        self.accelerator.wait_for_everyone()
        cache.read()

    def _lacking(self, cache: ReferenceCache) -> Iterator[dict[str, Any]]:
        """Batches of this process's share of the rows that the cache lacks."""
        index, count = self.accelerator.process_index, self.accelerator.num_processes
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        size = self.args.per_device_train_batch_size
        for dataset in (self.train_dataset, *sets.values()):
            if dataset is None:
                continue
            rows: dict[str, Any] = {}
            for i in range(index, len(dataset), count):
                example = dataset[i]
                key = row_key(example)
                if key not in cache.known and key not in rows:
                    rows[key] = example
                if rows and (len(rows) == size or i + count >= len(dataset)):
                    yield rows
                    rows = {}

    def _meet(self, more: bool) -> bool:
        """Whether any process has more rows, where all must run together; elsewhere each runs alone."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return more
        told = torch.tensor(int(more), device=self.accelerator.device)
        return int(cast(torch.Tensor, self.accelerator.reduce(told))) > 0

    def _compute_rows(self, cache: ReferenceCache, rows: dict[str, Any]) -> None:
        inputs = self._prepare_inputs(self.data_collator(list(rows.values())))
        made = [self.compute_ref_log_probs(self.ref_model, batch) for batch in inputs.get("chunks", [inputs])]
        chosen, rejected = (torch.cat(part).float().cpu().tolist() for part in zip(*made, strict=True))
        cache.write(list(rows), chosen, rejected)
        cache.known |= dict(zip(rows, zip(chosen, rejected, strict=True), strict=True))


def _shares(chunks: list[dict[str, Any]]) -> list[tuple[float, dict[str, Any]]]:
    """Chunks of a batch, each with its share of the batch's pairs."""
    sizes = [len(chunk["completion_mask"]) for chunk in chunks]
    return [(size / sum(sizes), chunk) for size, chunk in zip(sizes, chunks, strict=True)]


def _switches(
    model: Any, processor: Any, args: PivotDPOConfig, train_dataset: Any, options: dict[str, Any]
) -> dict[str, bool]:
    """Which switches are on for this model and these settings.

    Raises:
        TrainingError: one that is on does not go with a setting.
    """
    on = {name: getattr(args, name) for name in SWITCHES}
    if not any(on.values()):
        return on
    if not isinstance(model, LlavaForConditionalGeneration) and not _is_peft(model):
        kind = f"{model!r}, a name and not a model," if isinstance(model, str) else type(model).__name__
        logger.warning("%s is not a LlavaForConditionalGeneration: %s are off.", kind, ", ".join(SWITCHES))
        return dict.fromkeys(SWITCHES, False)
    if not isinstance(processor, LlavaProcessor):
        logger.warning("processing_class is no LlavaProcessor: %s are off.", ", ".join(SWITCHES))
        return dict.fromkeys(SWITCHES, False)
    if args.pack_tokens is not None:
        whole = {"aot", "aot_unpaired", "sft"} & set(args.loss_type)
        if whole:
            raise TrainingError(f"loss_type {min(whole)!r} is not a mean over pairs; set pack_tokens=None.")
        if args.world_size > 1:
            raise TrainingError(
                "pack_tokens is for one process, TRL gathers batches of one size; set pack_tokens=None and a smaller "
                "per_device_train_batch_size."
            )
        if options.get("compute_metrics") is not None:
            raise TrainingError("compute_metrics reads the outputs of whole batches; set pack_tokens=None.")
        if not args.pack:
            raise TrainingError("pack_tokens counts packed tokens; set pack=True or pack_tokens=None.")
    refusals = [
        (
            options.get("peft_config") is not None or _is_peft(model),
            SWITCHES,
            "PEFT wraps the model these switches run inside",
        ),
        (args.use_liger_kernel, SWITCHES, "use_liger_kernel replaces the forward these switches run"),
        (args.sync_ref_model, ("cache_reference",), "sync_ref_model changes the reference as it trains"),
        (args.precompute_ref_log_probs, SWITCHES, "precompute_ref_log_probs adds columns that they do not read"),
        (
            not isinstance(train_dataset, Dataset),
            ("cache_reference",),
            "a data set that is no datasets.Dataset cannot be read twice",
        ),
    ]
    if isinstance(model, LlavaForConditionalGeneration):
        language: Any = model.model.language_model
        attention = language.config._attn_implementation
        sliding = "sliding_attention" in (getattr(language.config, "layer_types", None) or ())
        refusals += [
            (attention not in ("sdpa", "pivot_pairs"), SWITCHES, f"they are for sdpa attention, not {attention}"),
            (sliding, SWITCHES, "they do not know sliding windows"),
            (hasattr(language.config, "output_router_logits"), SWITCHES, "they do not know mixtures of experts"),
        ]
    for applies, names, reason in refusals:
        wrong = [name for name in names if on[name]]
        if applies and wrong:
            raise TrainingError(f"{reason}; set {', '.join(f'{name}=False' for name in wrong)}.")
    return on


def _is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config")


def build_trainer(
    loaded: LoadedRecipe,
    args: PivotDPOConfig,
    parent: Path | None,
    report: RowReport,
    callbacks: list[TrainerCallback],
) -> PivotDPOTrainer:
    """Make the trainer of a dpo recipe; the frozen reference is the parent itself.

    Args:
        args: a PivotDPOConfig.
        parent: the checkpoint that policy and reference start from.
        report: filled with what was read and left out.

    Raises:
        CheckpointError, DataError: the parent or a row cannot be used.
    """
    if parent is None:
        raise CheckpointError(f"{loaded.path}: dpo starts from a checkpoint; name its recipe as `parent`.")
    model, processor = load_mllm(parent)
    rates = loaded.recipe.learning_rate.trained()
    freeze_parts(model, rates)
    if loaded.recipe.lora is not None:
        add_lora(model, loaded.recipe.lora, loaded.recipe.seed)
    rows = rows_of(loaded, processor, args.max_length)
    report.copy_from(rows.report)
    trainer = PivotDPOTrainer(
        model=model,
        args=args,
        train_dataset=rows.as_dataset("preference", processor.image_token),
        processing_class=processor,
        callbacks=callbacks,
        rates=rates,
    )
    trainer.row_ids, trainer.blocks = rows.ids, rows.blocks()
    return trainer
