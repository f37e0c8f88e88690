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
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from trl import DPOConfig, DPOTrainer

from pivot_hub.config.recipe import LoadedRecipe
from pivot_hub.data.preference import REJECTED_IMAGE_KEYS
from pivot_hub.data.report import RowReport
from pivot_hub.errors import CheckpointError, TrainingError
from pivot_hub.mllm.families import FAMILIES
from pivot_hub.mllm.inputs import placeholder_of, positions_of
from pivot_hub.mllm.load import load_mllm
from pivot_hub.mllm.lora import add_lora
from pivot_hub.mllm.trainable import freeze_parts
from pivot_hub.training.losses import (
    check_loss_types,
    compares_images,
    is_trl_loss,
    load_loss,
    mean_loss,
    validate_loss_types,
)
from pivot_hub.training.pair_collator import PaddedPairCollator, PairCollator, with_rejected_images
from pivot_hub.training.part_trainer import PartTrainer
from pivot_hub.training.reference_cache import ReferenceCache, model_hash, processor_hash, rounding_of, row_key
from pivot_hub.training.row_check import columns_of, rows_of
from pivot_hub.training.tree_check import language_attention, tree_problem
from pivot_hub.training.tree_layout import use_trees

# The options of PivotDPOConfig that leave out repeated work.
SPEED_OPTIONS = ("share_prefix", "cache_reference")
logger = logging.getLogger(__name__)


@dataclass
class PivotDPOConfig(DPOConfig):
    """TRL's DPOConfig, with options that leave out repeated work. None of these options changes the loss.

    Args:
        loss_type: Names of TRL's losses, of losses that compare two images (image_sigmoid, image_symmetric), `anchor`,
            or functions as `module:function`, in any mixture; `loss_weights` weights them. `training.losses` has the
            formulas and the arguments of a function. Losses that compare images read the column rejected_images (or
            rejected_image), and each pair then runs with both images. Checking the config imports a function's module,
            which runs its code: only take such a recipe from someone you trust.
        share_prefix: Whether prompt and image run once for both answers, and pairs are laid out one after the other
            instead of being padded to the longest. Images that several pairs show are encoded once.
        cache_reference: Whether reference log-probabilities are computed once and kept on disk, and the reference
            model is then dropped.
        reference_cache: Folder of the cached log-probabilities; below HF_HOME by default.
    """

    loss_type: Annotated[list[str], BeforeValidator(validate_loss_types)] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "Names of losses, or functions as `module:function`."},
    )
    share_prefix: bool = field(default=True, metadata={"help": "Run prompt and image once for both answers."})
    cache_reference: bool = field(default=True, metadata={"help": "Keep reference log-probabilities on disk."})
    reference_cache: str | None = field(default=None, metadata={"help": "Folder of reference log-probabilities."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss_types(self.loss_type)
        if all(is_trl_loss(name) for name in self.loss_type):
            return
        changes_log_probabilities = {
            "use_weighting": self.use_weighting,
            "ld_alpha": self.ld_alpha is not None,
            "f_divergence_type": self.f_divergence_type != "reverse_kl",
        }
        for name, is_set in changes_log_probabilities.items():
            if is_set:
                others = [loss for loss in self.loss_type if not is_trl_loss(loss)]
                raise TrainingError(f"{name} is for TRL's losses alone; leave {name} or {', '.join(others)} out.")


class PivotDPOTrainer(PartTrainer, DPOTrainer):
    """TRL's DPOTrainer without its repeated work, and with a learning rate per part.

    The constructor takes what DPOTrainer takes. The options share_prefix and cache_reference of `PivotDPOConfig` are
    for the MLLMs of `pivot_hub.mllm.families.FAMILIES`, and off for other models. Whether share_prefix changes what a
    model computes is found by running two small pairs both ways; if it would, it is off. A warning says so.

    Args:
        rates: Learning rate of each part of the MLLM (vision, projector, language). None trains every part at
            `args.learning_rate`.

    Raises:
        TrainingError: An option that is on cannot be combined with another setting; the message names the option.
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
        first_row = None if train_dataset is None else next(iter(train_dataset), None)
        self._compares_images = compares_images(args.loss_type)
        if self._compares_images:
            _check_rejected_images(args, processing_class, train_dataset, eval_dataset, options)
        enabled = _enabled_options(model, processing_class, args, train_dataset, first_row, options)
        needs_reference = ref_model is None and options.get("peft_config") is None and not args.precompute_ref_log_probs
        if needs_reference and isinstance(model, torch.nn.Module) and not _is_peft(model):
            # TRL would load the reference by the model's Hub name, but a model that was loaded from a folder or
            # built from a config has none.
            ref_model = deepcopy(model).eval().requires_grad_(False)
        collator: PairCollator | PaddedPairCollator | None = None
        if enabled["share_prefix"]:
            for each in (model, ref_model):
                use_trees(each)
            if (problem := _problem_of_trees(model, ref_model, processing_class, args)) is None:
                collator = PairCollator(
                    processing_class, positions_of(model), args.max_length, reads_rejected_images=self._compares_images
                )
            else:
                logger.warning("share_prefix is off: %s.", problem)
        reads_images = isinstance(processing_class, ProcessorMixin) and _has_images(first_row)
        if collator is None and reads_images and options.get("data_collator") is None:
            collator = PaddedPairCollator(
                processing_class, args.max_length, reads_rejected_images=self._compares_images
            )
        if collator is not None:
            options["data_collator"] = collator
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
                    "rounding": rounding_of(args),
                },
            )
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
        self._take_other_losses()
        if cache is not None:
            self._fill(cache)
            cast(PairCollator | PaddedPairCollator, self.data_collator).references = cache.find
            self.ref_model, self.precompute_ref_logps = None, True

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns  # type: ignore[assignment]
        self._signature_columns = list(dict.fromkeys([*columns, *REJECTED_IMAGE_KEYS]))  # type: ignore[assignment]

    def _take_other_losses(self) -> None:
        """Take the losses that are not TRL's out of the list of those that TRL will compute."""
        weighted = list(zip(self.loss_types, self.loss_weights, strict=True))
        self._other_losses = [(load_loss(name), weight) for name, weight in weighted if not is_trl_loss(name)]
        self.loss_types = [name for name, _ in weighted if is_trl_loss(name)]
        self.loss_weights = [weight for name, weight in weighted if is_trl_loss(name)]

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """Add other losses to TRL's. TRL's metrics, and the model's one forward pass, serve all."""
        if not self._other_losses:
            return super()._compute_loss(model, inputs, return_outputs)
        precomputed = self.precompute_ref_logps
        if not precomputed:
            reference = self.model if self.ref_model is None else self.ref_model
            ref_chosen, ref_rejected = self.compute_ref_log_probs(reference, inputs)
            inputs = {**inputs, "ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
        images = 2 if self._compares_images else 1
        mask = inputs["completion_mask"]
        whole = {"input_ids": inputs["input_ids"], "labels": inputs["input_ids"].masked_fill(mask == 0, -100)}
        outputs: list[Any] = []

        def recording_model(**kwargs: Any) -> Any:
            """Run all answers, and return TRL what concerns the image of each pair."""
            outputs.append(model(**{**kwargs, **{name: whole[name] for name in whole if name in kwargs}}))
            of_image = {
                name: _given_image(values, images)
                for name, values in outputs[-1].items()
                if isinstance(values, torch.Tensor) and values.ndim > 1 and len(values) == len(mask)
            }
            return type(outputs[-1])(**{**outputs[-1], **of_image})

        of_image = {name: _given_image(inputs[name], images) for name in ("input_ids", "completion_mask")}
        of_image |= {
            name: inputs[name][: len(mask) // (2 * images)] for name in ("ref_chosen_logps", "ref_rejected_logps")
        }
        self.precompute_ref_logps = True  # TRL then reads the reference's values from the inputs
        try:
            result = super()._compute_loss(recording_model, {**inputs, **of_image}, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        answer_tokens = mask.shape[1] - 1
        logps = outputs[0].log_probs[:, -answer_tokens:].sum(dim=1)
        references = torch.cat((inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]))
        names = [f"{other}{side}_logps" for side in ("chosen", "rejected") for other in ("", "other_")[:images]]
        by_name = dict(zip(names, logps.chunk(len(names)), strict=True))
        by_name |= {f"ref_{name}": part for name, part in zip(names, references.chunk(len(names)), strict=True)}
        if self._compares_images:
            self._log_images(by_name)
        loss = sum(weight * mean_loss(function, by_name, self.beta) for function, weight in self._other_losses)
        return (result[0] + loss, result[1]) if return_outputs else result + loss

    def _log_images(self, logps: dict[str, torch.Tensor]) -> None:
        """Log how often, and by how much, the chosen answer has a larger reward given the image than the other one."""
        ratio, other_ratio = (
            (logps[f"{other}chosen_logps"] - logps[f"ref_{other}chosen_logps"]).detach() for other in ("", "other_")
        )
        margins = self.beta * self.accelerator.gather(ratio - other_ratio)
        metrics = self._metrics["train" if cast(torch.nn.Module, self.model).training else "eval"]
        metrics["rewards/image_accuracies"].append((margins > 0).float().mean())
        metrics["rewards/image_margins"].append(margins.mean())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for metrics in self._metrics.values():
            for name in ("rewards/image_accuracies", "rewards/image_margins"):
                if name in metrics:  # they stay on the device until they are logged, because reading one waits for it
                    metrics[name] = [float(torch.stack(cast(Any, metrics[name])).mean())]
        super().log(logs, start_time)

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
        size = self.args.per_device_train_batch_size * (2 if self._compares_images else 1)
        for dataset in (self.train_dataset, *eval_datasets.values()):
            if dataset is None:
                continue
            rows: dict[str, Any] = {}
            for i in range(index, len(dataset), count):
                for pair in with_rejected_images([dataset[i]]) if self._compares_images else [dataset[i]]:
                    key = row_key(pair)
                    if key not in cache.known and key not in rows:
                        rows[key] = pair
                if rows and (len(rows) >= size or i + count >= len(dataset)):
                    yield rows
                    rows = {}

    def _any_process_has_more(self, more: bool) -> bool:
        """Whether any process has more rows. Only sharded processes ask each other: the others run alone."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return more
        count = torch.tensor(int(more), device=self.accelerator.device)
        return int(cast(torch.Tensor, self.accelerator.reduce(count))) > 0

    def _compute_rows(self, cache: ReferenceCache, rows: dict[str, Any]) -> None:
        collator = cast(PairCollator | PaddedPairCollator, self.data_collator)
        inputs = self._prepare_inputs(collator.collate(list(rows.values())))
        inputs.pop("row", None)
        logps = self.compute_ref_log_probs(self.ref_model, inputs)
        chosen, rejected = (part.float().cpu().tolist() for part in logps)
        cache.write(list(rows), chosen, rejected)
        cache.known |= dict(zip(rows, zip(chosen, rejected, strict=True), strict=True))


def _given_image(values: torch.Tensor, images: int) -> torch.Tensor:
    """Return the part of a batch that belongs to the first of the images of each pair.

    Args:
        values: Values (2 * images * B, ...) of answers, ordered by answer, then image, then pair.
        images: Number of images of each pair.
    """
    return values.unflatten(0, (2, images, -1))[:, 0].flatten(0, 1)


def _check_rejected_images(
    args: PivotDPOConfig, processor: Any, train_dataset: Any, eval_dataset: Any, trainer_options: dict[str, Any]
) -> None:
    """Check that the rejected images which a loss compares with can be read.

    Raises:
        TrainingError: A dataset has no such column, or another collator would have to read it.
    """
    losses = ", ".join(name for name in args.loss_type if compares_images(name))
    eval_datasets = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    for name, dataset in {"train": train_dataset, **eval_datasets}.items():
        row = None if dataset is None else next(iter(dataset), None)
        if row is not None and not any(row.get(key) for key in REJECTED_IMAGE_KEYS):
            raise TrainingError(
                f"{losses} compares two images, and the {name} dataset has no column rejected_images; add it, or leave "
                f"{losses} out."
            )
    if not isinstance(processor, ProcessorMixin) or trainer_options.get("data_collator") is not None:
        raise TrainingError(
            f"{losses} compares two images: give the MLLM's processor as processing_class, and no data_collator."
        )


def _enabled_options(
    model: Any,
    processor: Any,
    args: PivotDPOConfig,
    train_dataset: Any,
    first_row: dict[str, Any] | None,
    trainer_options: dict[str, Any],
) -> dict[str, bool]:
    """Return which of SPEED_OPTIONS are on for this model and these settings.

    Raises:
        TrainingError: An option that is on cannot be combined with another setting.
    """
    enabled = {name: getattr(args, name) for name in SPEED_OPTIONS}
    if not any(enabled.values()):
        return enabled
    problem = None
    if isinstance(model, str):
        problem = f"{model!r} is a name and not a model"
    elif not _is_peft(model) and model.config.model_type not in FAMILIES:
        problem = f"{type(model).__name__} is not an MLLM of pivot_hub's table"
    elif not isinstance(processor, ProcessorMixin):
        problem = "processing_class is not a processor of images and text"
    elif not _has_images(first_row):
        problem = "train_dataset has no column image or images"
    if problem is not None:
        logger.warning("%s: %s are off.", problem, ", ".join(SPEED_OPTIONS))
        return dict.fromkeys(SPEED_OPTIONS, False)
    for applies, names, reason in _refusals(model, args, train_dataset, trainer_options):
        conflicting = [name for name in names if enabled[name]]
        if applies and conflicting:
            raise TrainingError(f"{reason}; set {', '.join(f'{name}=False' for name in conflicting)}.")
    return enabled


def _has_images(first_row: dict[str, Any] | None) -> bool:
    """Return whether rows have images, decided by the first row as TRL does. Nothing is known without a dataset."""
    return first_row is None or bool({"image", "images"} & set(first_row))


def _problem_of_trees(
    model: PreTrainedModel, reference: PreTrainedModel, processor: ProcessorMixin, args: PivotDPOConfig
) -> str | None:
    """Return why policy or reference cannot run two answers behind one prompt, or None if both can."""
    text_config: Any = model.config.get_text_config()
    weight = args.router_aux_loss_coef
    if weight is None:
        weight = getattr(text_config, "router_aux_loss_coef", 0.0)
    if hasattr(text_config, "output_router_logits") and weight:
        return (
            f"the loss that balances the experts, weighted by {weight}, is over all tokens of a batch, and prompts "
            "would count once instead of twice; router_aux_loss_coef=0 turns it off"
        )
    max_length = args.max_length
    alike = reference.config.to_dict() == model.config.to_dict()
    problems = (tree_problem(each, processor, max_length) for each in ([model] if alike else [model, reference]))
    return next((problem for problem in problems if problem is not None), None)


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
        (
            trainer_options.get("data_collator") is not None,
            SPEED_OPTIONS,
            "data_collator would replace the batches that these options need",
        ),
        (args.precompute_ref_log_probs, SPEED_OPTIONS, "precompute_ref_log_probs adds columns that they do not read"),
        (
            not isinstance(train_dataset, Dataset),
            ("cache_reference",),
            "only a datasets.Dataset can be read a second time",
        ),
    ]
    if not _is_peft(model):
        attention = language_attention(model)
        conflicts.append((attention != "sdpa", ("share_prefix",), f"it is for sdpa attention, not {attention}"))
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
        parent: Checkpoint that policy and reference start from; without one, they start from the recipe's MLLM.
        report: Report that receives what was read and what was left out.
        callbacks: Callbacks of the trainer.

    Raises:
        CheckpointError: The parent is missing or cannot be used.
        DataError: A row cannot be used.
    """
    if (start := loaded.start(parent)) is None:
        raise CheckpointError(f"{loaded.path}: dpo starts from a checkpoint; name its recipe as `parent`.")
    model, processor = load_mllm(*start)
    learning_rates = loaded.recipe.learning_rate.trained()
    freeze_parts(model, learning_rates)
    if loaded.recipe.lora is not None:
        add_lora(model, loaded.recipe.lora, loaded.recipe.seed)
    rows = rows_of(loaded, processor, args.max_length)
    report.copy_from(rows.report)
    trainer = PivotDPOTrainer(
        model=model,
        args=args,
        train_dataset=rows.as_dataset(columns_of(loaded.recipe), placeholder_of(processor)),
        processing_class=processor,
        callbacks=callbacks,
        rates=learning_rates,
    )
    trainer.row_ids, trainer.blocks = rows.ids, rows.blocks()
    return trainer
