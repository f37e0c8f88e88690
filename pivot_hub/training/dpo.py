"""Stage dpo: TRL's DPOTrainer from the same parent and on the same rows as sft, without its repeated work."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from datasets import Dataset
from huggingface_hub.constants import HF_HOME
from pydantic import BeforeValidator
from transformers import LlavaForConditionalGeneration, LlavaProcessor, TrainerCallback
from trl import DPOConfig, DPOTrainer

from pivot_hub.config.recipe import LoadedRecipe
from pivot_hub.data.report import RowReport
from pivot_hub.errors import CheckpointError, DataError, TrainingError
from pivot_hub.mllm.load import load_mllm
from pivot_hub.mllm.lora import add_lora
from pivot_hub.mllm.trainable import freeze_parts
from pivot_hub.training.losses import check_loss_types, is_own_loss, load_loss, own_loss, validate_loss_types
from pivot_hub.training.part_trainer import PartTrainer
from pivot_hub.training.reference_cache import ReferenceCache, model_hash, processor_hash, row_key
from pivot_hub.training.row_check import rows_of
from pivot_hub.training.tree_layout import PairCollator, layout_difference, share_forward

# The options of PivotDPOConfig that leave out repeated work.
SPEED_OPTIONS = ("encode_once", "share_prefix", "cache_reference", "pack")
# Largest difference between the layouts that is rounding, in float32 and in 16 bits.
LAYOUT_TOLERANCE, LAYOUT_TOLERANCE_HALF = 1e-4, 0.05
logger = logging.getLogger(__name__)


@dataclass
class PivotDPOConfig(DPOConfig):
    """TRL's DPOConfig, with options that leave out repeated work. None of these options changes the loss.

    Args:
        loss_type: Names of TRL's losses, or functions as `module:function`, in any mixture; `loss_weights` weights
            them. A function gets the keyword arguments chosen_logps, rejected_logps, ref_chosen_logps and
            ref_rejected_logps, (B,) float32 each, and beta, and returns the loss of each pair, (B,). Checking the
            config imports the function's module, which runs its code: only take such a recipe from someone you trust.
        encode_once: Whether each distinct image of a batch is prepared and encoded once.
        share_prefix: Whether prompt and image run once for both answers.
        cache_reference: Whether reference log-probabilities are computed once and kept on disk, and the reference
            model is then dropped.
        pack: Whether preference pairs are laid out one after the other instead of being padded to the longest.
        pack_tokens: Largest number of tokens of one forward pass. The pairs of a step run in chunks of at most that
            many tokens, one after the other, and their losses are weighted so that the step is that of the whole
            batch. None runs all pairs together. It is for one process only.
        reference_cache: Folder of the cached log-probabilities; below HF_HOME by default.
    """

    loss_type: Annotated[list[str], BeforeValidator(validate_loss_types)] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "Names of TRL's losses, or functions as `module:function`."},
    )
    encode_once: bool = field(default=True, metadata={"help": "Encode each distinct image of a batch once."})
    share_prefix: bool = field(default=True, metadata={"help": "Run prompt and image once for both answers."})
    cache_reference: bool = field(default=True, metadata={"help": "Keep reference log-probabilities on disk."})
    pack: bool = field(default=True, metadata={"help": "Lay pairs out without padding."})
    pack_tokens: int | None = field(default=None, metadata={"help": "Tokens of one pass; a step may take several."})
    reference_cache: str | None = field(default=None, metadata={"help": "Folder of reference log-probabilities."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss_types(self.loss_type)
        if not any(is_own_loss(name) for name in self.loss_type):
            return
        changes_log_probabilities = {
            "use_weighting": self.use_weighting,
            "ld_alpha": self.ld_alpha is not None,
            "f_divergence_type": self.f_divergence_type != "reverse_kl",
        }
        for name, is_set in changes_log_probabilities.items():
            if is_set:
                raise TrainingError(f"{name} does not reach a loss function of your own; leave {name} out.")


class PivotDPOTrainer(PartTrainer, DPOTrainer):
    """TRL's DPOTrainer without its repeated work, and with a learning rate per part.

    The constructor takes what DPOTrainer takes. The options encode_once, share_prefix, cache_reference and pack of
    `PivotDPOConfig` are for LLaVA-style models; for other models they are turned off, and a warning is logged.

    Args:
        rates: Learning rate of each part of the MLLM (vision, projector, language). None trains every part at
            `args.learning_rate`.

    Raises:
        TrainingError: An option that is on cannot be combined with another setting, or would change what this model
            computes; the message names the option.
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
        enabled = _enabled_options(model, processing_class, args, train_dataset, options)
        needs_reference = ref_model is None and options.get("peft_config") is None and not args.precompute_ref_log_probs
        if needs_reference and isinstance(model, torch.nn.Module) and not _is_peft(model):
            # TRL would load the reference by the model's Hub name, but a model that was loaded from a folder or
            # built from a config has none.
            ref_model = deepcopy(model).eval().requires_grad_(False)
        cache = None
        if enabled["cache_reference"]:
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
        if any(enabled.values()):
            options["data_collator"] = PairCollator(
                processing_class,
                args.max_length,
                encode_once=enabled["encode_once"],
                share_prefix=enabled["share_prefix"],
                pack=enabled["pack"],
                max_tokens=args.pack_tokens if enabled["pack"] else None,
            )
            for each in (model, ref_model):
                share_forward(each)
            _check_layout(model, options["data_collator"], enabled)
            if ref_model.config.to_dict() != model.config.to_dict():
                _check_layout(ref_model, options["data_collator"], enabled)
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
        self._chunk_share = 1.0  # share of the batch's pairs in the chunk that is running
        self._take_own_losses()
        if cache is not None:
            self._fill(cache)
            cast(PairCollator, self.data_collator).references = cache.find
            self.ref_model, self.precompute_ref_logps = None, True

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run one batch forward and backward; with `pack_tokens`, chunk by chunk."""
        if "chunks" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        chunks = _with_shares(inputs["chunks"])
        metrics = self._metrics["train"]
        counts_before = {name: len(values) for name, values in metrics.items()}
        losses = []
        for self._chunk_share, chunk in chunks:
            losses.append(super().training_step(model, chunk, num_items_in_batch))
        self._chunk_share = 1.0
        for name, values in metrics.items():
            start = counts_before.get(name, 0)
            chunk_values = values[start:]
            if len(chunk_values) == len(chunks):  # one value per chunk becomes one value of the batch
                values[start:] = [sum(share * value for (share, _), value in zip(chunks, chunk_values, strict=True))]
        return torch.stack(losses).sum()

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "chunks" not in inputs:
            _check_answers(inputs, cast(PivotDPOConfig, self.args).max_length)
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss if self._chunk_share == 1 else loss * self._chunk_share
        # Only evaluation arrives here: a training step takes its chunks one by one.
        compute_chunk_loss = super().compute_loss
        losses = [share * compute_chunk_loss(model, chunk) for share, chunk in _with_shares(inputs["chunks"])]
        return torch.stack(losses).sum()

    def _take_own_losses(self) -> None:
        """Take the user's loss functions out of the list of losses that TRL will compute."""
        weighted = list(zip(self.loss_types, self.loss_weights, strict=True))
        self._own_losses = [(load_loss(name), weight) for name, weight in weighted if is_own_loss(name)]
        self.loss_types = [name for name, _ in weighted if not is_own_loss(name)]
        self.loss_weights = [weight for name, weight in weighted if not is_own_loss(name)]

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """Add the user's losses to TRL's. TRL's metrics, and the model's one forward pass, serve both."""
        if not self._own_losses:
            return super()._compute_loss(model, inputs, return_outputs)
        precomputed = self.precompute_ref_logps
        if not precomputed:
            reference = self.model if self.ref_model is None else self.ref_model
            ref_chosen, ref_rejected = self.compute_ref_log_probs(reference, inputs)
            inputs = {**inputs, "ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
        outputs: list[Any] = []

        def recording_model(*args: Any, **kwargs: Any) -> Any:
            outputs.append(model(*args, **kwargs))
            return outputs[-1]

        self.precompute_ref_logps = True  # TRL then reads the reference's values from the inputs
        try:
            result = super()._compute_loss(recording_model, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        answer_tokens = inputs["completion_mask"].shape[1] - 1
        logps = outputs[0].log_probs[:, -answer_tokens:].sum(dim=1)
        references = (inputs["ref_chosen_logps"], inputs["ref_rejected_logps"])
        own_losses = [
            weight * own_loss(function, logps.chunk(2), references, self.beta) for function, weight in self._own_losses
        ]
        if return_outputs:
            return result[0] + sum(own_losses), result[1]
        return result + sum(own_losses)

    def _fill(self, cache: ReferenceCache) -> None:
        """Compute what the cache lacks of every dataset, each process its share.

        A reference model whose weights are sharded runs in all processes at once: a process that has no rows left
        repeats an earlier batch.
        """
        cache.read()
        last_rows: dict[str, Any] = {}
        first = cast(Dataset, self.train_dataset)[0]
        for rows in self._lacking(cache):
            last_rows = rows
            self._any_process_has_more(True)
            self._compute_rows(cache, rows)
        while self._any_process_has_more(False):
            self._compute_rows(cache, last_rows or {row_key(first): first})
        self.accelerator.wait_for_everyone()
        cache.read()

    def _lacking(self, cache: ReferenceCache) -> Iterator[dict[str, Any]]:
        """Yield batches of this process's share of the rows that the cache lacks."""
        index, count = self.accelerator.process_index, self.accelerator.num_processes
        eval_datasets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        size = self.args.per_device_train_batch_size
        for dataset in (self.train_dataset, *eval_datasets.values()):
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

    def _any_process_has_more(self, more: bool) -> bool:
        """Whether any process has more rows. Only sharded processes ask each other: the others run alone."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return more
        count = torch.tensor(int(more), device=self.accelerator.device)
        return int(cast(torch.Tensor, self.accelerator.reduce(count))) > 0

    def _compute_rows(self, cache: ReferenceCache, rows: dict[str, Any]) -> None:
        inputs = self._prepare_inputs(self.data_collator(list(rows.values())))
        logps = [self.compute_ref_log_probs(self.ref_model, batch) for batch in inputs.get("chunks", [inputs])]
        chosen, rejected = (torch.cat(part).float().cpu().tolist() for part in zip(*logps, strict=True))
        cache.write(list(rows), chosen, rejected)
        cache.known |= dict(zip(rows, zip(chosen, rejected, strict=True), strict=True))


def _with_shares(chunks: list[dict[str, Any]]) -> list[tuple[float, dict[str, Any]]]:
    """Return the chunks of a batch, each with its share of the batch's pairs."""
    sizes = [len(chunk["completion_mask"]) for chunk in chunks]
    return [(size / sum(sizes), chunk) for size, chunk in zip(sizes, chunks, strict=True)]


def _enabled_options(
    model: Any, processor: Any, args: PivotDPOConfig, train_dataset: Any, trainer_options: dict[str, Any]
) -> dict[str, bool]:
    """Return which of SPEED_OPTIONS are on for this model and these settings.

    Raises:
        TrainingError: An option that is on cannot be combined with another setting.
    """
    enabled = {name: getattr(args, name) for name in SPEED_OPTIONS}
    if not any(enabled.values()):
        return enabled
    if not isinstance(model, LlavaForConditionalGeneration) and not _is_peft(model):
        kind = f"{model!r}, a name and not a model," if isinstance(model, str) else type(model).__name__
        logger.warning("%s is not a LlavaForConditionalGeneration: %s are off.", kind, ", ".join(SPEED_OPTIONS))
        return dict.fromkeys(SPEED_OPTIONS, False)
    if not isinstance(processor, LlavaProcessor):
        logger.warning("processing_class is not a LlavaProcessor: %s are off.", ", ".join(SPEED_OPTIONS))
        return dict.fromkeys(SPEED_OPTIONS, False)
    if not _has_images(train_dataset):
        logger.warning("train_dataset has no column image or images: %s are off.", ", ".join(SPEED_OPTIONS))
        return dict.fromkeys(SPEED_OPTIONS, False)
    if args.pack_tokens is not None:
        _check_pack_tokens(args, trainer_options)
    for applies, names, reason in _refusals(model, args, train_dataset, trainer_options):
        conflicting = [name for name in names if enabled[name]]
        if applies and conflicting:
            raise TrainingError(f"{reason}; set {', '.join(f'{name}=False' for name in conflicting)}.")
    return enabled


def _has_images(dataset: Any) -> bool:
    """Return whether rows have images, decided by the first row as TRL does. Nothing is known without a dataset."""
    first = None if dataset is None else next(iter(dataset), None)
    return first is None or "image" in first or "images" in first


def _check_answers(inputs: dict[str, Any], max_length: int | None) -> None:
    """Refuse a batch with a row whose answer `max_length` has cut off whole: its loss would be log 2 without end.

    Raises:
        DataError: A row has no answer token left.
    """
    answered = inputs["completion_mask"].any(1) if max_length is not None else None
    if answered is not None and not answered.all():
        raise DataError(
            f"{int((~answered).sum())} of {len(answered)} answers of a batch have no token left in max_length "
            f"{max_length}, which image and prompt fill; raise max_length."
        )


def _check_layout(model: Any, collator: PairCollator, enabled: dict[str, bool]) -> None:
    """Check that the model computes in the layout of the options what it computes in TRL's.

    Raises:
        TrainingError: It computes something else; the message names the options.
    """
    if any(weight.is_meta or not weight.numel() for weight in model.parameters()):  # elsewhere, as under ZeRO-3
        return
    language = model.model.language_model
    remedy = f"set {', '.join(f'{name}=False' for name in SPEED_OPTIONS if enabled[name])}"
    tolerance = LAYOUT_TOLERANCE if language.dtype == torch.float32 else LAYOUT_TOLERANCE_HALF
    difference = layout_difference(model, collator)
    if not difference <= tolerance:
        raise TrainingError(
            f"the language model, a {type(language).__name__}, computes other hidden states in the layout of these "
            f"options than in TRL's ({difference:.1e} apart, relative to their norm); {remedy}."
        )
    window = getattr(language.config, "sliding_window", None)
    exceeds = window is not None and (collator.max_length is None or collator.max_length > window)
    if exceeds and not layout_difference(model, collator, window=3) <= tolerance:
        raise TrainingError(
            f"the language model, a {type(language).__name__}, attends to a sliding window of {window} tokens, which "
            f"these options do not support; set max_length to at most {window}, or {remedy}."
        )


def _check_pack_tokens(args: PivotDPOConfig, trainer_options: dict[str, Any]) -> None:
    """Refuse settings that need a batch in one piece.

    Raises:
        TrainingError: A setting cannot be combined with `pack_tokens`.
    """
    whole_batch_losses = {"aot", "aot_unpaired", "sft"} & set(args.loss_type)
    if whole_batch_losses:
        raise TrainingError(f"loss_type {min(whole_batch_losses)!r} is not a mean over pairs; set pack_tokens=None.")
    if args.world_size > 1:
        raise TrainingError(
            "pack_tokens is for one process, because TRL gathers batches of one size; set pack_tokens=None and a "
            "smaller per_device_train_batch_size."
        )
    if trainer_options.get("compute_metrics") is not None:
        raise TrainingError("compute_metrics reads the outputs of whole batches; set pack_tokens=None.")
    if not args.pack:
        raise TrainingError("pack_tokens counts packed tokens; set pack=True or pack_tokens=None.")


def _refusals(
    model: Any, args: PivotDPOConfig, train_dataset: Any, trainer_options: dict[str, Any]
) -> list[tuple[bool, tuple[str, ...], str]]:
    """Return the conflicts of options with settings: whether one applies, the options that it concerns, the reason."""
    conflicts = [
        (
            trainer_options.get("peft_config") is not None or _is_peft(model),
            SPEED_OPTIONS,
            "PEFT wraps the model inside which these options work",
        ),
        (args.use_liger_kernel, SPEED_OPTIONS, "use_liger_kernel replaces the forward pass that these options run"),
        (args.sync_ref_model, ("cache_reference",), "sync_ref_model changes the reference as it trains"),
        (args.precompute_ref_log_probs, SPEED_OPTIONS, "precompute_ref_log_probs adds columns that they do not read"),
        (
            not isinstance(train_dataset, Dataset),
            ("cache_reference",),
            "only a datasets.Dataset can be read a second time",
        ),
    ]
    if isinstance(model, LlavaForConditionalGeneration):
        language: Any = model.model.language_model
        attention = language.config._attn_implementation
        sliding = "sliding_attention" in (getattr(language.config, "layer_types", None) or ())
        mixture = hasattr(language.config, "output_router_logits")
        conflicts += [
            (
                attention not in ("sdpa", "pivot_pairs"),
                SPEED_OPTIONS,
                f"these options are for sdpa attention, not {attention}",
            ),
            (sliding, SPEED_OPTIONS, "these options do not support sliding windows"),
            (mixture, SPEED_OPTIONS, "these options do not support mixtures of experts"),
        ]
    return conflicts


def _is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config")


def build_trainer(
    loaded: LoadedRecipe,
    args: PivotDPOConfig,
    parent: Path | None,
    report: RowReport,
    callbacks: list[TrainerCallback],
) -> PivotDPOTrainer:
    """Build the trainer of a dpo recipe. The frozen reference is the parent itself.

    Args:
        loaded: The recipe.
        args: Config of the trainer.
        parent: Checkpoint that policy and reference start from.
        report: Report that receives what was read and what was left out.
        callbacks: Callbacks of the trainer.

    Raises:
        CheckpointError: The parent is missing or cannot be used.
        DataError: A row cannot be used.
    """
    if parent is None:
        raise CheckpointError(f"{loaded.path}: dpo starts from a checkpoint; name its recipe as `parent`.")
    model, processor = load_mllm(parent)
    learning_rates = loaded.recipe.learning_rate.trained()
    freeze_parts(model, learning_rates)
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
        rates=learning_rates,
    )
    trainer.row_ids, trainer.blocks = rows.ids, rows.blocks()
    return trainer
