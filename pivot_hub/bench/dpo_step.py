"""The cost of a DPO step with TRL's trainer, with each option of PivotDPOTrainer alone, and with all options."""

from __future__ import annotations

import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin
from trl import DPOConfig, DPOTrainer

from pivot_hub.bench.sizes import FULL_EVERY, WINDOW_PATCHES, Size, random_policy, size_of
from pivot_hub.bench.utilisation import utilisation
from pivot_hub.mllm.chat_templates import QWEN
from pivot_hub.provenance import machine, versions
from pivot_hub.training import tree_layout
from pivot_hub.training.dpo import SPEED_OPTIONS, PivotDPOConfig, PivotDPOTrainer

LENGTH_SPREAD = 0.7  # standard deviation of the logarithm of answer lengths
BASELINE = "trl"
# The options of PivotDPOTrainer that each variant turns on; None is TRL's own trainer.
VARIANTS: dict[str, dict[str, bool] | None] = {
    BASELINE: None,
    **{option: {other: other == option for other in SPEED_OPTIONS} for option in SPEED_OPTIONS},
    "all": dict.fromkeys(SPEED_OPTIONS, True),
}
# On CUDA: all options, with attention one sequence after the other instead of all at once.
ONE_BY_ONE = "all_one_by_one"


@dataclass(frozen=True)
class Measurement:
    """What was measured of one variant.

    Args:
        step_s: Seconds of each forward and backward pass.
        collate_s: Seconds of each collation of the batch.
        saved_bytes: Bytes of activations kept for the backward pass.
        peak_bytes: CUDA's peak memory in bytes above what was allocated before the step; None without CUDA.
        setup_s: Seconds that building the trainer took, with the reference's log-probabilities where they are cached.
        kernels: Kernels that the GPU runs in a step; None without CUDA.
    """

    step_s: list[float]
    collate_s: list[float]
    saved_bytes: int
    peak_bytes: int | None
    setup_s: float
    kernels: int | None


def bench_dpo_step(
    size: str = "tiny",
    batch: int = 4,
    rounds: int = 5,
    checkpointing: bool = False,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Time the forward and backward pass of one batch of preference pairs in every variant.

    Variants take turns, so that a slow period of the machine affects all of them. Weights, images and words are random.
    There are two batches: one with answers of equal length, and one with lengths drawn from a lognormal distribution.
    Images are encoded up to the feature layer. Weights are float32, with bfloat16 autocast on CUDA, as in recipes.
    `step_flops` describes how FLOPs are counted; recomputed ones are not among them.

    Args:
        size: Name of an entry of `sizes.SIZES`.
        batch: Number of preference pairs in the batch.
        rounds: Timed steps of each variant, after one step of warm-up.
        checkpointing: Whether every variant uses gradient checkpointing.
        log: Callback that receives one line for each variant.

    Returns:
        For each batch and variant: step_s and collate_s (medians); speedup_over_trl (median over rounds of TRL's time
        over the variant's, so that more than 1 is faster) and speedups (of each round); saved_bytes (activations kept
        for the backward pass) and saved_bytes_over_trl; peak_bytes and kernels (on CUDA); tokens_per_s (tokens of
        TRL's layout without padding); flops; on a known GPU mfu (without recomputed FLOPs) and hfu (with them: one
        more forward pass under gradient checkpointing); cache_s (seconds of computing the reference's log-probabilities
        once).

    Raises:
        ProbeError: The size is unknown.
    """
    shape = size_of(size)
    torch.manual_seed(0)
    policy, processor = random_policy(shape, torch.float32)
    report: dict[str, Any] = {}
    for lengths in ("equal", "lognormal"):
        rows = _random_rows(shape, batch, lengths)
        measurements = _measure_variants(policy, processor, rows, rounds, checkpointing)
        report[lengths] = {
            name: _variant_record(name, measurements, shape, rows, checkpointing) for name in _variants()
        }
        for name, record in report[lengths].items():
            log(
                f"{lengths:10} {name:16} {record['step_s']:8.3f} s a step, speed-up over TRL "
                f"{record['speedup_over_trl']:5.2f}, saved activations {record['saved_bytes_over_trl']:.2f} of TRL's"
            )
    return {
        "benchmark": "dpo-step",
        "size": size,
        "batch": batch,
        "rounds": rounds,
        "gradient_checkpointing": checkpointing,
        "dtype": "bfloat16 autocast" if torch.cuda.is_available() else "float32",
        "variants": report,
        "machine": machine(),
        "versions": versions(),
    }


def _variants() -> dict[str, dict[str, bool] | None]:
    """Return the variants of this machine, by the options that each turns on."""
    if torch.cuda.is_available() and tree_layout.HAS_VARLEN:
        return {**VARIANTS, ONE_BY_ONE: VARIANTS["all"]}
    return VARIANTS


@contextmanager
def _attention_of(variant: str) -> Iterator[None]:
    """Let a variant compute attention in its own way."""
    has_varlen = tree_layout.HAS_VARLEN
    tree_layout.HAS_VARLEN = has_varlen and variant != ONE_BY_ONE
    try:
        yield
    finally:
        tree_layout.HAS_VARLEN = has_varlen


def step_flops(shape: Size, rows: list[dict[str, Any]], options: dict[str, bool] | None) -> int:
    """Count the FLOPs that one step of a variant needs, without recomputed activations.

    A weight takes 2 FLOPs for each token, and a query takes 4 D for each key that it attends to. The projection to the
    vocabulary is counted for answer tokens only. Forward and backward pass together are three times the forward pass;
    the reference model's forward pass is a fourth, unless it is cached.

    Args:
        shape: Shapes of the model.
        rows: Preference pairs of the batch.
        options: Options of PivotDPOTrainer that are on; None for TRL's trainer.
    """
    on = options or dict.fromkeys(SPEED_OPTIONS, False)
    prefix = shape.prefix_tokens
    longest = max(max(pair) for pair in _answer_lengths(rows))
    copies = 1 if on["share_prefix"] else 2
    forward = 0
    for chosen, rejected in _answer_lengths(rows):
        forward += copies * (_image_flops(shape) + _text_flops(shape, prefix, prefix * (prefix + 1) // 2))
        for answer in (chosen, rejected) if on["share_prefix"] else (longest, longest):
            forward += _text_flops(shape, answer, answer * prefix + answer * (answer + 1) // 2)
        forward += 2 * shape.language.hidden_size * shape.vocabulary * (chosen + rejected)
    return forward * (3 if on["cache_reference"] else 4)


def _image_flops(shape: Size) -> int:
    """FLOPs of encoding one image and of the projector: with LLaVA up to the feature layer, the last but one."""
    vision, patches, width = shape.vision, shape.patches, shape.language.hidden_size
    is_llava = shape.family == "llava"
    matrices = 2 if is_llava else 3
    weights = 4 * vision.hidden_size**2 + matrices * vision.hidden_size * vision.intermediate_size
    layers = vision.layers - 1 if is_llava else vision.layers
    whole = layers if is_llava else layers // FULL_EVERY
    attended = patches * (whole * patches + (layers - whole) * WINDOW_PATCHES)
    merged = vision.hidden_size * shape.merge**2
    projector = merged * width + width**2 if is_llava else merged**2 + merged * width
    return layers * 2 * patches * weights + 4 * vision.hidden_size * attended + 2 * shape.image_tokens * projector


def _text_flops(shape: Size, tokens: int, attended: int) -> int:
    """FLOPs of the language model's blocks for `tokens` tokens, whose queries attend to `attended` keys in total."""
    language = shape.language
    width = language.hidden_size
    key_value_width = width // language.heads * (language.key_value_heads or language.heads)
    weights = 2 * width**2 + 2 * width * key_value_width + 3 * width * language.intermediate_size
    return language.layers * (2 * tokens * weights + 4 * width * attended)


def _random_rows(shape: Size, batch: int, lengths: str) -> list[dict[str, Any]]:
    """Preference pairs with answers of equal or of lognormal lengths."""
    rng = np.random.default_rng(0)
    # LLaVA's processor makes a square of any image. Qwen's keeps the shape, so that images have the size that is meant.
    image_size = (480, 640) if shape.family == "llava" else (shape.image_px, shape.image_px)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(shape.vocabulary - 3, size=count))

    def answer() -> str:
        length = rng.lognormal(math.log(shape.answer_tokens) - LENGTH_SPREAD**2 / 2, LENGTH_SPREAD)
        drawn = int(min(max(length, 1), shape.max_answer_tokens))
        return words(shape.answer_tokens if lengths == "equal" else drawn)

    return [
        {
            "images": [Image.fromarray(rng.integers(0, 255, (*image_size, 3), np.uint8))],
            "prompt": f"{QWEN.image_token} {words(shape.prompt_tokens)}",
            "chosen": answer(),
            "rejected": answer(),
        }
        for _ in range(batch)
    ]


def _measure_variants(
    policy: PreTrainedModel,
    processor: ProcessorMixin,
    rows: list[dict[str, Any]],
    rounds: int,
    checkpointing: bool,
) -> dict[str, Measurement]:
    """Build the trainer of every variant, and measure their steps on the same rows."""
    with tempfile.TemporaryDirectory() as folder:
        trainers, setup_s = {}, {}
        for name, options in _variants().items():
            began = time.perf_counter()
            trainers[name] = _build_trainer(policy, processor, rows, options, Path(folder) / name, checkpointing)
            setup_s[name] = time.perf_counter() - began
        step_s, collate_s = _time_steps(trainers, rows, rounds)
        measurements = {
            name: Measurement(
                step_s[name],
                collate_s[name],
                *_measure_memory(name, trainer, rows),
                setup_s[name],
                _count_kernels(name, trainer, rows),
            )
            for name, trainer in trainers.items()
        }
        del trainers
        gc.collect()
    return measurements


def _variant_record(
    name: str, measurements: dict[str, Measurement], shape: Size, rows: list[dict[str, Any]], checkpointing: bool
) -> dict[str, Any]:
    """What the report says of a variant, with its ratios to TRL."""
    own, trl, options = measurements[name], measurements[BASELINE], _variants()[name]
    step = statistics.median(own.step_s)
    speedups = [trl_s / own_s for trl_s, own_s in zip(trl.step_s, own.step_s, strict=True)]
    flops = step_flops(shape, rows, options)
    caches = options is not None and options["cache_reference"]
    return {
        "step_s": round(step, 4),
        "collate_s": round(statistics.median(own.collate_s), 4),
        "speedup_over_trl": round(statistics.median(speedups), 3),
        "speedups": [round(s, 3) for s in speedups],
        "saved_bytes": own.saved_bytes,
        "peak_bytes": own.peak_bytes,
        "kernels": own.kernels,
        "saved_bytes_over_trl": round(own.saved_bytes / trl.saved_bytes, 3),
        "tokens_per_s": round(_padless_tokens(shape, rows) / step, 1),
        "flops": flops,
        "mfu": utilisation(flops, step),
        "hfu": utilisation(flops + checkpointing * flops // (3 if caches else 4), step),
        "cache_s": round(own.setup_s - trl.setup_s, 4) if caches else None,
    }


def _build_trainer(
    policy: PreTrainedModel,
    processor: ProcessorMixin,
    rows: list[dict[str, Any]],
    options: dict[str, bool] | None,
    folder: Path,
    checkpointing: bool,
) -> Any:
    """Build a trainer on copies of the policy: PivotDPOTrainer with these options, or TRL's if they are None."""
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": len(rows),
        "bf16": torch.cuda.is_available(),
        "gradient_checkpointing": checkpointing,
        "max_length": None,
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    trainer_class: Any = DPOTrainer
    config_class: Any = DPOConfig
    if options is not None:
        trainer_class, config_class = PivotDPOTrainer, PivotDPOConfig
        arguments |= {**options, "reference_cache": str(folder)}
    dataset = Dataset.from_dict({"row": list(range(len(rows)))})
    dataset.set_transform(lambda batch: {column: [rows[r][column] for r in batch["row"]] for column in rows[0]})
    trainer = trainer_class(
        model=deepcopy(policy),
        ref_model=deepcopy(policy).eval().requires_grad_(False),
        args=config_class(**arguments),
        train_dataset=dataset,
        processing_class=processor,
    )
    trainer.model.to(trainer.accelerator.device).train()
    if checkpointing:
        trainer.model.gradient_checkpointing_enable()
    return trainer


def _step(name: str, trainer: Any, inputs: dict[str, Any]) -> None:
    """Run one forward and backward pass of a variant, and wait for the GPU."""
    trainer.model.zero_grad(set_to_none=True)
    with _attention_of(name):
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()  # which runs layers again under gradient checkpointing
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _collate(trainer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    inputs: dict[str, Any] = trainer._prepare_inputs(trainer.data_collator([dict(row) for row in rows]))
    return inputs


def _time_steps(
    trainers: dict[str, Any], rows: list[dict[str, Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each variant's steps and of its collations; the first round is warm-up and is left out."""
    step_s: dict[str, list[float]] = {name: [] for name in trainers}
    collate_s: dict[str, list[float]] = {name: [] for name in trainers}
    for turn in range(rounds + 1):
        # The order alternates, so that a drift of the machine's speed favours no variant.
        for name in list(trainers)[:: 1 if turn % 2 == 0 else -1]:
            began = time.perf_counter()
            inputs = _collate(trainers[name], rows)
            collated = time.perf_counter()
            _step(name, trainers[name], inputs)
            if turn > 0:
                step_s[name].append(time.perf_counter() - collated)
                collate_s[name].append(collated - began)
            trainers[name].model.zero_grad(set_to_none=True)
    return step_s, collate_s


def _count_kernels(name: str, trainer: Any, rows: list[dict[str, Any]]) -> int | None:
    """Count the kernels that the GPU runs in one step; None without CUDA."""
    if not torch.cuda.is_available():
        return None
    inputs = _collate(trainer, rows)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        _step(name, trainer, inputs)
    events = profile.events() or []
    # Copies and fills are events of the GPU too, which are no kernels.
    names = [event.name for event in events if "CUDA" in str(event.device_type)]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)


def _measure_memory(name: str, trainer: Any, rows: list[dict[str, Any]]) -> tuple[int, int | None]:
    """Measure the memory of one step of a variant.

    Returns:
        Bytes of activations kept for the backward pass, each storage counted once and weights left out; and CUDA's peak
        in bytes above what was allocated before, None without CUDA.
    """
    inputs = _collate(trainer, rows)
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    storage_bytes: dict[int, int] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storage_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    before = 0
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        _step(name, trainer, inputs)
    peak = torch.cuda.max_memory_allocated() - before if torch.cuda.is_available() else None
    trainer.model.zero_grad(set_to_none=True)
    return sum(storage_bytes.values()), peak


def _answer_lengths(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Tokens of the chosen and of the rejected answer of each pair."""
    return [(len(row["chosen"].split()), len(row["rejected"].split())) for row in rows]


def _padless_tokens(shape: Size, rows: list[dict[str, Any]]) -> int:
    """Tokens of the 2B sequences of TRL's layout for B pairs, without padding."""
    return sum(2 * shape.prefix_tokens + chosen + rejected for chosen, rejected in _answer_lengths(rows))
