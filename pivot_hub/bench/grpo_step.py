"""The cost of a GRPO step with TRL's trainer, and with PivotGRPOTrainer on the same answers."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from trl import GRPOConfig, GRPOTrainer

from pivot_hub.bench.sizes import Size, random_policy, size_of
from pivot_hub.mllm.inputs import placeholder_of
from pivot_hub.provenance import machine, versions
from pivot_hub.training.grpo import PivotGRPOConfig, PivotGRPOTrainer

PREFIX_PER_ANSWER = 10  # tokens of image and prompt for each token of an answer
BASELINE, OURS = "trl", "share_prefix"


def bench_grpo_step(
    size: str = "tiny",
    prompts: int = 1,
    generations: int = 8,
    rounds: int = 5,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Time loss and backward pass of one batch of answers with TRL's trainer and with ours.

    The trainers take turns, so that a slow period of the machine affects both. Weights, images, words and advantages
    are random. Answers have equal length, which is the best case for TRL's padding. Generation is not part of the step.
    On a CPU, TRL's fused head also scores the tokens of prompts, which it leaves out on a GPU.

    Args:
        size: Name of an entry of `sizes.SIZES`.
        prompts: Number of prompts in the batch, with an image each.
        generations: Number of answers of each prompt.
        rounds: Timed steps of each trainer, after one step of warm-up.
        log: Callback that receives one line for each trainer.

    Returns:
        For each trainer: step_s (median) and loss; and speedup_over_trl (median over rounds of TRL's time over ours),
        speedups (of each round), and the conditions.

    Raises:
        ProbeError: The size is unknown.
    """
    shape = size_of(size)
    torch.manual_seed(0)
    policy, processor = random_policy(shape, torch.float32)
    batch = _random_batch(shape, processor, prompts, generations)
    step_s: dict[str, list[float]] = {BASELINE: [], OURS: []}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            BASELINE: _build_trainer(GRPOTrainer, GRPOConfig, policy, processor, prompts, generations, folder),
            OURS: _build_trainer(PivotGRPOTrainer, PivotGRPOConfig, policy, processor, prompts, generations, folder),
        }
        for turn in range(rounds + 1):
            for name in list(trainers)[:: 1 if turn % 2 == 0 else -1]:
                seconds, losses[name] = _step(trainers[name], batch)
                step_s[name] += [seconds] if turn > 0 else []
    speedups = [trl_s / own_s for trl_s, own_s in zip(step_s[BASELINE], step_s[OURS], strict=True)]
    variants = {name: {"step_s": round(statistics.median(step_s[name]), 4), "loss": losses[name]} for name in step_s}
    for name, record in variants.items():
        log(f"{name:14} {record['step_s']:8.3f} s a step, loss {record['loss']:.6f}")
    log(f"speed-up over TRL {statistics.median(speedups):.2f}")
    return {
        "benchmark": "grpo-step",
        "size": size,
        "prompts": prompts,
        "generations": generations,
        "prefix_tokens": shape.prefix_tokens,
        "answer_tokens": _answer_tokens(shape),
        "rounds": rounds,
        "dtype": "bfloat16 autocast" if torch.cuda.is_available() else "float32",
        "variants": variants,
        "speedup_over_trl": round(statistics.median(speedups), 3),
        "speedups": [round(s, 3) for s in speedups],
        "machine": machine(),
        "versions": versions(),
    }


def _answer_tokens(shape: Size) -> int:
    return max(1, shape.prefix_tokens // PREFIX_PER_ANSWER)


def _random_batch(shape: Size, processor: Any, prompts: int, generations: int) -> dict[str, Any]:
    """Return what both trainers take after generation: prompts with an image each, and their answers."""
    rng = np.random.default_rng(0)
    side = shape.image_px
    texts, images = [], []
    for _ in range(prompts):
        words = " ".join(f"w{i}" for i in rng.integers(shape.vocabulary - 3, size=shape.prompt_tokens))
        texts += [f"{placeholder_of(processor)} {words}"] * generations
        images += [[Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8))]] * generations
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    count, answer_tokens = len(texts), _answer_tokens(shape)
    answers = torch.from_numpy(rng.integers(3, shape.vocabulary, (count, answer_tokens)))
    batch: dict[str, Any] = {
        "prompt_ids": inputs.pop("input_ids"),
        "prompt_mask": inputs.pop("attention_mask"),
        "completion_ids": answers,
        "completion_mask": torch.ones_like(answers),
        "advantages": torch.from_numpy(rng.standard_normal(count)).float(),
        "num_items_in_batch": torch.tensor(answers.numel()),
        "num_images": [1] * count,
    }
    for name, value in inputs.items():
        if name.endswith("token_type_ids"):
            value = torch.nn.functional.pad(value, (0, answer_tokens))
        batch[name] = value
    return batch


def _build_trainer(
    trainer_class: Any,
    config_class: Any,
    policy: Any,
    processor: Any,
    prompts: int,
    generations: int,
    folder: str,
) -> Any:
    args = config_class(
        output_dir=str(Path(folder)),
        per_device_train_batch_size=prompts * generations,
        num_generations=generations,
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trainer_class(
        model=deepcopy(policy),
        reward_funcs=_no_reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["w0"]}),
        processing_class=deepcopy(processor),
    )
    trainer.model.to(trainer.accelerator.device).train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def _no_reward(completions: list[Any], **columns: Any) -> list[float]:
    """Reward nothing: the batch has its advantages already."""
    return [0.0] * len(completions)


def _step(trainer: Any, batch: dict[str, Any]) -> tuple[float, float]:
    """Return the seconds of one forward and backward pass, and the loss."""
    device = trainer.accelerator.device
    inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    trainer.model.zero_grad(set_to_none=True)
    began = time.perf_counter()
    with trainer.accelerator.autocast():  # as accelerate wraps the model's forward pass when training starts
        loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, loss.item()
