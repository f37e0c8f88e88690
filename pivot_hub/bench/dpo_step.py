"""What a DPO step costs with stock TRL, with each switch of PivotDPOTrainer alone, and with all of them."""

from __future__ import annotations

import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from trl import DPOConfig, DPOTrainer

from pivot_hub.errors import ProbeError
from pivot_hub.mllm.chat_templates import QWEN
from pivot_hub.provenance import machine, versions
from pivot_hub.training.dpo import SPEED_OPTIONS, PivotDPOConfig, PivotDPOTrainer

SPREAD = 0.7  # of the logarithm of answer lengths
PEAK_FLOPS = {"H200": 989.5e12, "H100": 989.5e12, "A100": 312e12}  # bfloat16, dense, by the vendor


@dataclass(frozen=True)
class Size:
    """Shapes of a model and of its pairs; `tiny` has the proportions of the real one.

    Args:
        vision: hidden_size, layers, heads, intermediate_size.
        image_px: side of the images; with patch_px it gives the image tokens.
        language: hidden_size, layers, heads, key-value heads, intermediate_size.
        vocabulary: tokens of the language head.
        prompt: tokens of a question.
        answer: mean tokens of an answer.
        longest: tokens of the longest.
    """

    vision: tuple[int, int, int, int]
    image_px: int
    patch_px: int
    language: tuple[int, int, int, int, int]
    vocabulary: int
    prompt: int
    answer: int
    longest: int

    @property
    def image_tokens(self) -> int:
        return (self.image_px // self.patch_px) ** 2


SIZES = {
    # Vision to language, vocabulary to layers and prefix to answer as below, in a quarter of the tokens.
    "tiny": Size((216, 6, 4, 808), 96, 8, (256, 8, 4, 1, 1493), 7300, 15, 38, 128),
    "so400m-1.5b": Size((1152, 27, 16, 4304), 384, 16, (1536, 28, 12, 2, 8960), 151936, 60, 150, 512),
}


def bench_dpo_step(
    size: str = "tiny",
    batch: int = 4,
    rounds: int = 5,
    checkpointing: bool = False,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Time forward and backward of one batch of pairs in every variant, in turns so that a slow spell hits all.

    Weights are random; images and words are too. Two sets of pairs: answers of equal length, and of lengths drawn
    from a lognormal. FLOPs are those of the work a variant asks for, recomputing left out: 2 for each weight and
    token, 4 D for each query and key that attend, three times the forward where gradients flow, and the head for
    answer tokens; MFU is these over the step's time and the device's peak in bfloat16 (not known for CPUs). Images
    are encoded through the feature layer.

    Args:
        size: of SIZES.
        batch: pairs.
        rounds: steps of each variant, after one to warm up.
        checkpointing: gradient checkpointing, in every variant.
        say: called with a line a variant.

    Returns:
        For each set of pairs and variant: step_s and collate_s (medians), ratio_to_stock (median over rounds, above 1
        is faster), saved_bytes (activations kept for the backward pass), peak_bytes (on CUDA, above what lay there
        before), tokens_per_s (of TRL's layout without padding), flops, mfu; cache_s, what computing the reference
        values of the batch once took.
    """
    if size not in SIZES:
        raise ProbeError(f"there is no size {size!r}; give one of {', '.join(SIZES)}.")
    shape = SIZES[size]
    cuda = torch.cuda.is_available()
    torch.manual_seed(0)
    processor = word_processor(shape.vocabulary, shape.image_px, shape.patch_px)
    policy = _model(shape, processor, torch.bfloat16 if cuda else torch.float32)
    off = dict.fromkeys(SPEED_OPTIONS, False)
    variants: dict[str, dict[str, bool] | None] = {"stock": None}
    variants |= {name: {**off, name: True} for name in SPEED_OPTIONS} | {"all": dict.fromkeys(SPEED_OPTIONS, True)}
    report: dict[str, Any] = {}
    for lengths in ("equal", "lognormal"):
        rows = _rows(shape, batch, lengths)
        with tempfile.TemporaryDirectory() as folder:
            trainers, cached = {}, {}
            for name, switches in variants.items():
                began = time.perf_counter()
                trainers[name] = _trainer(policy, processor, rows, switches, Path(folder) / name, checkpointing)
                cached[name] = time.perf_counter() - began
            seconds, collating = _time(trainers, rows, rounds)
            memory = {name: _memory(trainer, rows) for name, trainer in trainers.items()}
            del trainers
            gc.collect()
        report[lengths] = {}
        saved = {name: float(made["saved_bytes"] or 0) for name, made in memory.items()}
        for name, switches in variants.items():
            step = statistics.median(seconds[name])
            ratios = [stock / own for stock, own in zip(seconds["stock"], seconds[name], strict=True)]
            flops = _flops(shape, rows, switches)
            report[lengths][name] = {
                "step_s": round(step, 4),
                "collate_s": round(statistics.median(collating[name]), 4),
                "ratio_to_stock": round(statistics.median(ratios), 3),
                "ratios": [round(r, 3) for r in ratios],
                **memory[name],
                "saved_to_stock": round(saved[name] / saved["stock"], 3),
                "tokens_per_s": round(_tokens(shape, rows) / step, 1),
                "flops": flops,
                "mfu": _mfu(flops, step),
                "cache_s": round(cached[name] - cached["stock"], 4)
                if switches and switches["cache_reference"]
                else None,
            }
            made = report[lengths][name]
            log(
                f"{lengths:10} {name:16} {made['step_s']:8.3f} s a step, {made['ratio_to_stock']:5.2f} times stock, "
                f"saved activations {made['saved_to_stock']:.2f} of stock's"
            )
    return {
        "benchmark": "dpo-step",
        "size": size,
        "batch": batch,
        "rounds": rounds,
        "gradient_checkpointing": checkpointing,
        "dtype": "bfloat16" if cuda else "float32",
        "variants": report,
        "machine": machine(),
        "versions": versions(),
    }


def word_processor(vocabulary: int, image_px: int, patch_px: int, prefix_tokens: int = 0) -> LlavaProcessor:
    """A tokenizer whose words, `w0`, `w1`, ..., are one token each, so that rows have the lengths they are given."""
    special = ["<pad>", QWEN.turn_end, QWEN.image_token]
    known = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(vocabulary - 3))])}
    words = Tokenizer(WordLevel(known, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token=QWEN.turn_end, extra_special_tokens=[QWEN.image_token]
    )
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": image_px, "width": image_px}),
        tokenizer=tokenizer,
        patch_size=patch_px,
        vision_feature_select_strategy="default" if prefix_tokens else "full",
        num_additional_image_tokens=prefix_tokens,
        image_token=QWEN.image_token,
    )


def _model(shape: Size, processor: LlavaProcessor, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    hidden, layers, heads, intermediate = shape.vision
    vision = SiglipVisionConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        image_size=shape.image_px,
        patch_size=shape.patch_px,
        vision_use_head=False,
    )
    hidden, layers, heads, groups, intermediate = shape.language
    tokenizer: Any = processor.tokenizer
    language = Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=intermediate,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=processor.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        image_seq_length=shape.image_tokens,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    cast(nn.Module, model).to(dtype)
    return model


def _rows(shape: Size, batch: int, lengths: str) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(shape.vocabulary - 3, size=count))

    def answer() -> str:
        drawn = rng.lognormal(math.log(shape.answer) - SPREAD**2 / 2, SPREAD)
        return words(shape.answer if lengths == "equal" else int(min(max(drawn, 1), shape.longest)))

    return [
        {
            "images": [Image.fromarray(rng.integers(0, 255, (480, 640, 3), np.uint8))],
            "prompt": f"{QWEN.image_token} {words(shape.prompt)}",
            "chosen": answer(),
            "rejected": answer(),
        }
        for _ in range(batch)
    ]


def _trainer(
    policy: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    rows: list[dict[str, Any]],
    switches: dict[str, bool] | None,
    folder: Path,
    checkpointing: bool,
) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": len(rows),
        "bf16": torch.cuda.is_available(),
        "gradient_checkpointing": checkpointing,
        "max_length": None,
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    kind: tuple[Any, Any] = (DPOTrainer, DPOConfig)
    if switches is not None:
        kind = (PivotDPOTrainer, PivotDPOConfig)
        settings |= {**switches, "reference_cache": str(folder)}
    dataset = Dataset.from_dict({"row": list(range(len(rows)))})
    dataset.set_transform(lambda asked: {c: [rows[r][c] for r in asked["row"]] for c in rows[0]})
    made = kind[0](
        model=deepcopy(policy),
        ref_model=deepcopy(policy).eval().requires_grad_(False),
        args=kind[1](**settings),
        train_dataset=dataset,
        processing_class=processor,
    )
    made.model.to(made.accelerator.device).train()
    if checkpointing:
        made.model.gradient_checkpointing_enable()
    return made


def _step(trainer: Any, inputs: dict[str, Any]) -> None:
    trainer.model.zero_grad(set_to_none=True)
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _inputs(trainer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    inputs: dict[str, Any] = trainer._prepare_inputs(trainer.data_collator([dict(r) for r in rows]))
    return inputs


def _time(
    trainers: dict[str, Any], rows: list[dict[str, Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each variant's steps, and of its collating."""
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    collating: dict[str, list[float]] = {name: [] for name in trainers}
    for turn in range(rounds + 1):
        for name in list(trainers)[:: 1 if turn % 2 == 0 else -1]:
            began = time.perf_counter()
            inputs = _inputs(trainers[name], rows)
            ready = time.perf_counter()
            _step(trainers[name], inputs)
            if turn:
                seconds[name].append(time.perf_counter() - ready)
                collating[name].append(ready - began)
            trainers[name].model.zero_grad(set_to_none=True)
    return seconds, collating


def _memory(trainer: Any, rows: list[dict[str, Any]]) -> dict[str, int | None]:
    """Bytes of activations kept for the backward pass, each storage once and no weight; and CUDA's peak."""
    inputs = _inputs(trainer, rows)
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    kept: dict[int, int] = {}

    def keep(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    before = 0
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        _step(trainer, inputs)
    peak = torch.cuda.max_memory_allocated() - before if torch.cuda.is_available() else None
    trainer.model.zero_grad(set_to_none=True)
    return {"saved_bytes": sum(kept.values()), "peak_bytes": peak}


def _lengths(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(len(r["chosen"].split()), len(r["rejected"].split())) for r in rows]


def _tokens(shape: Size, rows: list[dict[str, Any]]) -> int:
    """Tokens of the 2B sequences of TRL's layout, without padding."""
    prefix = shape.image_tokens + shape.prompt
    return sum(2 * prefix + chosen + rejected for chosen, rejected in _lengths(rows))


def _flops(shape: Size, rows: list[dict[str, Any]], switches: dict[str, bool] | None) -> int:
    """Work of one step, as `bench_dpo_step` says."""
    on = switches or dict.fromkeys(SPEED_OPTIONS, False)
    hidden, layers, _, intermediate = shape.vision
    n = shape.image_tokens
    image = (layers - 1) * (2 * n * (4 * hidden**2 + 2 * hidden * intermediate) + 4 * n**2 * hidden)
    width, depth, heads, groups, inner = shape.language
    weights = 2 * width**2 + 2 * width * (width // heads * groups) + 3 * width * inner
    projector = 2 * n * (hidden * width + width**2)
    prefix = n + shape.prompt

    def text(count: int, seen: int) -> int:
        return depth * (2 * count * weights + 4 * width * seen)

    forward = 0
    longest = max(max(pair) for pair in _lengths(rows))
    for chosen, rejected in _lengths(rows):
        copies = 1 if on["encode_once"] or on["share_prefix"] else 2
        forward += copies * (image + projector)
        answers = (chosen, rejected) if on["pack"] or on["share_prefix"] else (longest, longest)
        after = sum(text(a, a * prefix + a * (a + 1) // 2) for a in answers)
        before = text(prefix, prefix * (prefix + 1) // 2)
        forward += after + (1 if on["share_prefix"] else 2) * before
        forward += 2 * width * shape.vocabulary * (chosen + rejected)
    return forward * (3 if on["cache_reference"] else 4)


def _mfu(flops: int, seconds: float) -> float | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    peak = next((peak for device, peak in PEAK_FLOPS.items() if device in name), None)
    return round(flops / seconds / peak, 4) if peak else None
