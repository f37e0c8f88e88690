"""The planner against the real trainers: FLOPs that torch counts, bytes that torch allocates; and its arithmetic."""

from __future__ import annotations

import json
import math
import multiprocessing
import resource
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from trl import SFTConfig

from pivot_hub.config.recipe import load_recipe
from pivot_hub.errors import RecipeError
from pivot_hub.mllm.inputs import process
from pivot_hub.mllm.published_configs import meta_mllm, part_config
from pivot_hub.mllm.trainable import freeze_parts
from pivot_hub.planner.estimate import plan_stage
from pivot_hub.planner.fake_step import CPU_FORMULAS
from pivot_hub.planner.gpus import GIB, GPUS, RESERVE, Gpu
from pivot_hub.planner.report import Plan
from pivot_hub.training.dpo import SPEED_OPTIONS, PivotDPOConfig, PivotDPOTrainer
from pivot_hub.training.grpo import PivotGRPOConfig, PivotGRPOTrainer, PivotRLOOConfig, PivotRLOOTrainer
from pivot_hub.training.sft import PivotSFTTrainer, collator_of
from tests.mllm.tiny_mllms import make_mllm
from tests.mllm.tiny_processors import PROCESSORS, add_processor

IMAGE = "<|image_pad|>"
IMAGE_PX, PATCH_PX, VOCABULARY = 64, 8, 2000
PROMPT, ANSWER, ROWS = 20, 30, 4
VISION, LANGUAGE = (128, 6, 512), (128, 6, 512)  # width, layers, inner width
ANSWERS = 3  # of each prompt of grpo and rloo
EVERY_PART = ["vision", "projector", "language"]
RATES = {"align": ["projector"], **dict.fromkeys(("sft", "dpo", "grpo", "rloo"), EVERY_PART)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configs of two parts of meaningful size, without weights: the planner needs no more."""
    parts = tmp_path_factory.mktemp("small")
    width, layers, inner = VISION
    SiglipVisionConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=inner,
        image_size=IMAGE_PX,
        patch_size=PATCH_PX,
    ).save_pretrained(parts / "vision")
    width, layers, inner = LANGUAGE
    Qwen2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=inner,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    ).save_pretrained(parts / "language")
    return parts


def recipe_file(folder: Path, stage: str, args: dict[str, Any]) -> Path:
    source = {"align": "llava", "sft": "mmpr", "dpo": "mmpr", "grpo": "vqa", "rloo": "vqa"}[stage]
    rewards = "rewards: [{name: exact_match}]\n" if stage in ("grpo", "rloo") else ""
    settings = {"per_device_train_batch_size": ROWS, **({} if rewards else {"max_length": None}), **args}
    rows = f"expect: {{rows: 64, prompt_tokens: {PROMPT}, answer_tokens: {ANSWER}}}"
    model = "model: {vision: vision, language: language}\n"
    parent = "" if stage == "align" else "parent: parent.yaml\n"
    body = {
        "parent.yaml": f"stage: align\n{model}learning_rate: {{projector: 1.0e-3}}\n"
        f"data: [{{format: llava, path: x, images: y, {rows}}}]\n",
        f"{stage}.yaml": f"stage: {stage}\n{parent or model}{rewards}"
        f"learning_rate: {{{', '.join(f'{part}: 1.0e-3' for part in RATES[stage])}}}\n"
        f"data: [{{format: {source}, path: x, images: y, {rows}}}]\n"
        f"args: {json.dumps(settings)}\n",
    }
    for name, text in body.items():
        (folder / name).write_text(text)
    return folder / f"{stage}.yaml"


@dataclass
class Step:
    """A real trainer and one batch for it."""

    trainer: Any
    inputs: dict[str, Any]
    half: bool  # whether to use autocast, in which accelerate wraps the forward pass when training starts

    def run(self) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            loss = self.trainer.compute_loss(self.trainer.model, dict(self.inputs))
        loss.backward()


def words(count: int, seed: int) -> str:
    ids = torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(f"w{i}" for i in ids)


def processor() -> LlavaProcessor:
    """A processor whose words are one token each, so that rows have known lengths."""
    names = ["<pad>", "<|im_end|>", IMAGE, *(f"w{i}" for i in range(3, VOCABULARY))]
    model = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="w3"))
    model.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<|im_end|>", extra_special_tokens=[IMAGE]
    )
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": IMAGE_PX, "width": IMAGE_PX}),
        tokenizer=tokenizer,
        patch_size=PATCH_PX,
        vision_feature_select_strategy="full",
        image_token=IMAGE,
    )


def real_step(folder: Path, stage: str, checkpointing: bool, out: Path, **args: Any) -> Step:
    """The stage's trainer on random weights and ROWS rows of PROMPT and ANSWER words."""
    torch.manual_seed(0)
    config = meta_mllm(part_config(str(folder / "vision")), part_config(str(folder / "language")), -2).config
    config.image_token_id = 2
    rows = [
        {
            "images": [Image.new("RGB", (IMAGE_PX, IMAGE_PX), (40 * i, 90, 20))],
            "prompt": f"{IMAGE} {words(PROMPT, i)}",
            "chosen": words(ANSWER, 100 + i),
            "rejected": words(ANSWER, 200 + i),
        }
        for i in range(ROWS)
    ]
    if args.get("loss_type"):
        other = [Image.new("RGB", (IMAGE_PX, IMAGE_PX), (9, 9, 40 * i)) for i in range(ROWS)]
        rows = [{**r, "rejected_images": [image]} for r, image in zip(rows, other, strict=True)]
    if stage != "dpo":
        rows = [{"images": r["images"], "prompt": r["prompt"], "completion": f" {r['chosen']}"} for r in rows]
    return step_of(LlavaForConditionalGeneration(config), processor(), rows, stage, checkpointing, out, **args)


def step_of(
    model: Any, processing: Any, rows: list[dict[str, Any]], stage: str, checkpointing: bool, out: Path, **args: Any
) -> Step:
    """The stage's trainer, and one batch of all rows."""
    freeze_parts(model, dict.fromkeys(RATES[stage], 1e-3))
    dataset = Dataset.from_dict({"number": list(range(len(rows)))})
    dataset.set_transform(lambda batch: {c: [rows[n][c] for n in batch["number"]] for c in rows[0]})
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": len(rows),
        "gradient_checkpointing": checkpointing,
        "max_length": None,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        **{name: value for name, value in args.items() if name != "bf16"},
    }
    options: dict[str, Any] = {"model": model, "train_dataset": dataset, "processing_class": processing}
    trainer: Any
    if stage == "dpo":
        trainer = PivotDPOTrainer(args=PivotDPOConfig(**settings, reference_cache=str(out / "cache")), **options)
    else:
        collator = collator_of(model, processing, None)
        trainer = PivotSFTTrainer(args=SFTConfig(**settings), data_collator=collator, **options)
    trainer.model.train()
    if checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = trainer._prepare_inputs(trainer.data_collator([dataset[i] for i in range(len(rows))]))
    return Step(trainer, inputs, half=bool(args.get("bf16")))


@lru_cache
def planned(folder: Path, stage: str, checkpointing: bool, **args: Any) -> Plan:
    file = recipe_file(folder, stage, {"gradient_checkpointing": checkpointing, **args})
    return plan_stage(load_recipe(file), accelerate_config="single", processes=1, device="cpu")


def flops_of(plan: Plan) -> float:
    return sum(count for phases in plan.flops_per_step.values() for count in phases.values())


def counted_flops(step: Step) -> int:
    """Run a step, and count its FLOPs with torch's own counter."""
    own = {operator: cast(Any, formula).__wrapped__ for operator, formula in CPU_FORMULAS.items()}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        step.run()
    return counter.get_total_flops()


LIVE = {"cache_reference": False}
ALL_OFF = dict.fromkeys(SPEED_OPTIONS, False)
CASES = [
    pytest.param("sft", False, {}, id="sft"),
    pytest.param("sft", True, {}, id="sft-checkpointing"),
    pytest.param("align", False, {}, id="align"),
    pytest.param("align", True, {}, id="align-checkpointing"),
    pytest.param("dpo", False, {}, id="dpo"),
    pytest.param("dpo", True, {}, id="dpo-checkpointing"),
    pytest.param("dpo", False, LIVE, id="dpo-live-reference"),
    pytest.param("dpo", True, ALL_OFF, id="dpo-as-trl"),
    pytest.param("dpo", False, {"loss_type": "image_sigmoid"}, id="dpo-of-two-images"),
]


@pytest.mark.parametrize(("stage", "checkpointing", "args"), CASES)
def test_flops_are_those_of_the_real_step(
    stage: str, checkpointing: bool, args: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    step = real_step(folder, stage, checkpointing, tmp_path, **args)
    ratio = flops_of(planned(folder, stage, checkpointing, **args)) / counted_flops(step)
    print(f"FLOPs, plan to real: {ratio:.4f}")
    assert ratio == pytest.approx(1, abs=0.02)


GROUP_CLASSES: dict[str, tuple[Any, Any]] = {
    "grpo": (PivotGRPOTrainer, PivotGRPOConfig),
    "rloo": (PivotRLOOTrainer, PivotRLOOConfig),
}
# Two prompts with three answers each, which are generated, scored and trained on.
GROUPS = {"per_device_train_batch_size": 2 * ANSWERS, "num_generations": ANSWERS, "max_completion_length": ANSWER}
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image_pad|>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


@dataclass
class GroupStep:
    """A real trainer of grpo or rloo, whose step begins with generating answers, and the rows of a generation."""

    trainer: Any
    rows: list[dict[str, Any]]

    def run(self) -> None:
        for step in range(self.trainer.num_iterations):
            self.trainer._step = step
            self.trainer.compute_loss(self.trainer.model, self.trainer._prepare_inputs(self.rows)).backward()


def real_group_step(folder: Path, stage: str, checkpointing: bool, out: Path, **args: Any) -> GroupStep:
    """The stage's trainer on random weights and two prompts of PROMPT words, whose answers have ANSWER tokens."""
    torch.manual_seed(0)
    config = meta_mllm(part_config(str(folder / "vision")), part_config(str(folder / "language")), -2).config
    config.image_token_id = 2
    processing: Any = processor()
    processing.chat_template = processing.tokenizer.chat_template = TEMPLATE
    rows = [
        {
            "images": [Image.new("RGB", (IMAGE_PX, IMAGE_PX), (40 * i, 90, 20))],
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words(PROMPT, i)}]}],
        }
        for i in range(2)
    ]
    trainer_class, config_class = GROUP_CLASSES[stage]
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "gradient_checkpointing": checkpointing,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "gradient_accumulation_steps": 1,
    }
    trainer: Any = trainer_class(
        model=LlavaForConditionalGeneration(config),
        reward_funcs=lambda completions, **columns: [float(len(c[0]["content"])) for c in completions],
        args=config_class(**{**settings, **GROUPS, **args}),
        train_dataset=Dataset.from_dict({"prompt": ["x"] * 2}),
        processing_class=processing,
    )
    trainer.generation_config.min_new_tokens = ANSWER
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    if checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    return GroupStep(trainer, [row for row in rows for _ in range(ANSWERS)])


@pytest.mark.parametrize(
    ("stage", "checkpointing", "args"),
    [
        pytest.param("grpo", True, {"beta": 0.04}, id="grpo-reference-checkpointing"),
        pytest.param("grpo", False, {"num_iterations": 2}, id="grpo-old-policy"),
        pytest.param("grpo", False, {"share_prefix": False}, id="grpo-as-trl"),
        pytest.param("rloo", False, {}, id="rloo"),
    ],
)
def test_flops_with_generated_answers_are_those_of_the_real_step(
    stage: str, checkpointing: bool, args: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    step = real_group_step(folder, stage, checkpointing, tmp_path, **args)
    plan = planned(folder, stage, checkpointing, **GROUPS, **args)
    ratio = flops_of(plan) * step.trainer.num_iterations / counted_flops(cast(Any, step))
    print(f"FLOPs, plan to real: {ratio:.4f}")
    assert ratio == pytest.approx(1, abs=0.02)
    language = plan.flops_per_step["language"]
    assert (language["old policy"] > 0) == (stage == "rloo" or "num_iterations" in args)
    assert (language["reference"] > 0) == (stage == "rloo" or "beta" in args)
    assert min(language["prefill"], language["decoding"]) > 0


def test_memory_with_generated_answers_is_that_of_the_real_step(folder: Path, tmp_path: Path) -> None:
    """In this small model the step holds most; while it generates, the cache comes instead of activations."""
    real = peak_bytes(cast(Any, real_group_step(folder, "grpo", False, tmp_path, beta=0.04)))
    plan = planned(folder, "grpo", False, **GROUPS, beta=0.04)
    peak = plan.memory[0]
    print(f"memory, plan to real: {peak.total / real:.4f} of {real / 1e6:.1f} MB, {peak.terms}")
    assert peak.terms["reference"] == peak.terms["weights"]
    assert peak.total == pytest.approx(real, rel=0.15)
    assert max(other.total for other in plan.memory if "generating" in other.name) < peak.total


def test_hours_of_generated_answers_are_those_of_the_bandwidth(folder: Path) -> None:
    """By hand: each token but the first reads float32 weights and their copies, and the keys and values before it."""
    float32 = planned(folder, "grpo", False, **GROUPS)
    half = plan_stage(
        load_recipe(recipe_file(folder, "grpo", {**GROUPS, "gradient_checkpointing": False})), "single", 1
    )
    width, layers, inner = LANGUAGE
    weights = layers * (4 * width**2 + 3 * width * inner) + width * VOCABULARY
    before = (IMAGE_PX // PATCH_PX) ** 2 + PROMPT
    contexts = sum(before + i for i in range(1, ANSWER))
    read = (ANSWER - 1) * weights * 8 + 2 * ANSWERS * contexts * 2 * layers * width * 2
    h100 = next(gpu for gpu in GPUS if gpu.name.startswith("H100"))
    flops = sum(count for phase, count in half.flops.items() if phase != "decoding")
    seconds = half.steps * read / 3.35e12 + flops / (h100.half_flops * half.hfu)
    assert half.gpus[1].gpu_hours == pytest.approx(seconds / 3600)
    caches = {peak.name: peak.terms["cache"] for peak in float32.memory if "cache" in peak.terms}
    assert caches["generating, mean length"] == 2 * ANSWERS * (before + ANSWER) * 2 * layers * width * 4
    assert (float32.answers, float32.rows, float32.rows_per_step, float32.steps) == (ANSWERS, 64, 2 * ANSWERS, 3 * 32)
    assert float32.tokens_per_step == 2 * (before + ANSWERS * ANSWER)
    assert "64 x 3 epoch(s) x 3 answers" in float32.table()
    assert "assumed decoding at the memory's bandwidth" in float32.table()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"use_vllm": True}, "transformers generates batch by batch; plan without `args.use_vllm`"),
        ({"per_device_train_batch_size": 4}, "4 answers that all processes generate at once are not a multiple"),
        ({"per_device_train_batch_size": 300}, "64 rows do not fill a generation of 100 prompts"),
    ],
)
def test_answers_that_cannot_be_planned_are_refused(args: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        planned(folder, "grpo", False, **{**GROUPS, **args})


def test_advice_passes_over_batches_that_are_no_whole_groups(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one batch a generation, smaller batches than a prompt's answers cannot run, and others may fit."""
    recipe = recipe_file(
        folder, "grpo", {**GROUPS, "per_device_train_batch_size": 4 * ANSWERS, "steps_per_generation": 1}
    )
    plan = plan_stage(load_recipe(recipe), accelerate_config="single", processes=1)
    static = sum(value for name, value in plan.memory[0].terms.items() if name in ("weights", "gradients", "optimizer"))
    small = Gpu("small", RESERVE + int(static) + 1, 1e12, 1e12, 1e12)
    monkeypatch.setattr("pivot_hub.planner.estimate.GPUS", (small,))
    planned_again = plan_stage(load_recipe(recipe), accelerate_config="single", processes=1)
    assert not planned_again.gpus[0].fits
    advised = (planned_again.gpus[0].advice or {}).get("args.per_device_train_batch_size", ANSWERS)
    assert advised % ANSWERS == 0


def peak_bytes(step: Step) -> float:
    """Most bytes that the allocator holds in an optimizer step, including the weights and Adam's state."""
    trainer = step.trainer
    times = trainer.args.gradient_accumulation_steps
    trainer.create_optimizer()
    step.run()
    trainer.optimizer.step()  # allocates Adam's state
    trainer.optimizer.zero_grad()
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in trainer.model.parameters()}
    if trainer.__dict__.get("ref_model") is not None:
        weights |= {
            p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in trainer.ref_model.parameters()
        }
    states = [s for state in trainer.optimizer.state.values() for s in state.values() if isinstance(s, torch.Tensor)]
    before = sum(weights.values()) + sum(s.nbytes for s in states)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for _ in range(times):
            step.run()
        nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
    events = cast(Any, profile.profiler).kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return float(before + most)


MEMORY_CASES = [
    *CASES,
    pytest.param("sft", False, {"bf16": True}, id="sft-bf16"),
    pytest.param("sft", True, {"gradient_accumulation_steps": 2}, id="sft-accumulation"),
]


@pytest.mark.parametrize(("stage", "checkpointing", "args"), MEMORY_CASES)
def test_memory_is_that_of_the_real_step(
    stage: str, checkpointing: bool, args: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """Compare what torch's CPU allocator holds, which excludes scratch memory of kernels and Python's memory."""
    real = peak_bytes(real_step(folder, stage, checkpointing, tmp_path, **args))
    peak = planned(folder, stage, checkpointing, **args).memory[0]
    if peak.total > 1.15 * real:  # on a busy machine torch's profiler can lose allocations
        real = max(real, peak_bytes(real_step(folder, stage, checkpointing, tmp_path / "again", **args)))
    print(f"memory, plan to real: {peak.total / real:.4f} of {real / 1e6:.1f} MB, {peak.terms}")
    assert peak.terms["activations"] + peak.terms.get("copies", 0) > 0.2 * peak.total
    assert peak.total == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_an_mllm_is_planned_as_its_real_step_runs(name: str, stage: str, tmp_path: Path) -> None:
    """The trainer reads images through the MLLM's own processor; recipe or report state how many tokens that gives."""
    model = make_mllm(tmp_path / "mllm", name).train()
    processing: Any = add_processor(tmp_path / "mllm", name)
    prompt = f"{PROCESSORS[name].placeholder or PROCESSORS[name].image}{'q' * PROMPT}"
    rows: list[dict[str, Any]] = [
        {
            "images": [Image.new("RGB", (112, 84), (40 * i, 90, 20))],
            "prompt": prompt,
            "chosen": "a" * ANSWER,
            "rejected": "b" * ANSWER,
        }
        for i in range(ROWS)
    ]
    image_tokens = len(process(processing, prompt, rows[0]["images"]).ids) - PROMPT
    if stage != "dpo":
        rows = [{"images": r["images"], "prompt": r["prompt"], "completion": r["chosen"]} for r in rows]
    args = {"per_device_train_batch_size": ROWS, "gradient_checkpointing": True, "max_length": None}
    expected = {"rows": 64, "prompt_tokens": PROMPT, "answer_tokens": ANSWER, "image_tokens": image_tokens}
    stated = expected if stage == "sft" else {**expected, "image_tokens": None}
    (tmp_path / "recipe.yaml").write_text(
        f"stage: {stage}\nmodel: {{mllm: mllm}}\nlearning_rate: {{vision: 1e-3, projector: 1e-3, language: 1e-3}}\n"
        f"data: [{{format: mmpr, path: x, images: y, expect: {json.dumps(stated)}}}]\nargs: {json.dumps(args)}\n"
    )
    measured = None if stage == "sft" else expected
    plan = plan_stage(load_recipe(tmp_path / "recipe.yaml"), "single", 1, lengths=measured, device="cpu")
    assert plan.image_tokens == image_tokens
    step = step_of(model, processing, rows, stage, True, tmp_path)
    flops = flops_of(plan) / counted_flops(step)
    real = peak_bytes(step)
    print(f"plan to real: FLOPs {flops:.4f}, memory {plan.memory[0].total / real:.4f} of {real / 1e6:.1f} MB")
    assert flops == pytest.approx(1, abs=0.02)
    assert plan.memory[0].total == pytest.approx(real, rel=0.15)


def test_forward_flops_are_those_of_the_formula(folder: Path) -> None:
    """2 FLOPs per weight and token, and 4 D per query and key: a count that shares no code with the counter."""
    plan = planned(folder, "sft", False)
    tokens = (IMAGE_PX // PATCH_PX) ** 2
    width, layers, inner = VISION
    # The whole tower runs, including the block and the pooling head above the feature layer.
    block = 2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * tokens**2 * width
    patches = 2 * tokens * 3 * PATCH_PX**2 * width
    vision = layers * block + patches
    assert plan.flops_per_step["vision"]["forward"] / ROWS == pytest.approx(vision, rel=0.05)
    assert plan.flops_per_step["vision"]["forward"] / ROWS > vision
    length = tokens + PROMPT + ANSWER
    width, layers, inner = LANGUAGE
    block = 2 * length * (4 * width**2 + 3 * width * inner) + 4 * length**2 * width
    head = 2 * (length - 1) * width * VOCABULARY
    assert plan.flops_per_step["language"]["forward"] / ROWS == layers * block + head


def test_a_frozen_part_costs_less(folder: Path) -> None:
    align, sft = (planned(folder, stage, False).flops_per_step for stage in ("align", "sft"))
    assert align["vision"]["backward"] == 0
    assert align["vision"]["forward"] == sft["vision"]["forward"]
    # Through the frozen language model only inputs get gradients.
    assert align["language"]["backward"] < 0.75 * sft["language"]["backward"]


@pytest.mark.slow
def test_many_pairs_cost_what_few_do(folder: Path) -> None:
    """A large packed batch is extrapolated from small ones: each pair costs as much as in the largest measured one."""
    eight, twelve = (
        plan_stage(load_recipe(recipe_file(folder, "dpo", {"per_device_train_batch_size": n})), "single", 1)
        for n in (8, 12)
    )
    assert flops_of(twelve) == pytest.approx(1.5 * flops_of(eight), rel=1e-6)
    assert 1.3 < twelve.memory[0].terms["activations"] / eight.memory[0].terms["activations"] < 1.6


# The parts, rows and batch of the paper.
FULL = "model: {vision: google/siglip2-so400m-patch16-384, language: Qwen/Qwen2.5-7B-Instruct}\n"
EXPECT = "expect: {rows: 558128, prompt_tokens: 1, answer_tokens: 20}"


def full(folder: Path, stage: str = "align", args: str = "per_device_train_batch_size: 8") -> Path:
    (folder / "1-align.yaml").write_text(
        f"stage: align\n{FULL}learning_rate: {{projector: 1.0e-3}}\nglobal_batch: 256\n"
        f"data: [{{format: llava, path: x, images: y, {EXPECT}}}]\n"
        f"args: {{num_train_epochs: 1, max_length: 2048, {args}}}\n"
    )
    if stage == "dpo":
        (folder / "3-dpo.yaml").write_text(
            "stage: dpo\nparent: 1-align.yaml\nglobal_batch: 256\n"
            "learning_rate: {vision: 1.0e-6, projector: 1.0e-6, language: 1.0e-6}\n"
            "data: [{format: mmpr, path: x, images: y, sample: 20000, "
            "expect: {rows: 3000000, prompt_tokens: 60, answer_tokens: 150}}]\n"
            f"args: {{num_train_epochs: 3, max_length: 2048, {args}}}\n"
        )
        return folder / "3-dpo.yaml"
    return folder / "1-align.yaml"


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, int | float):
        yield value


def plan_and_peak_memory(recipe: Path) -> tuple[Plan, int]:
    """The plan, and the peak memory in KiB of this process, in which nothing else has run."""
    return plan_stage(load_recipe(recipe)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.slow
def test_the_full_scale_is_planned_without_weights(tmp_path: Path) -> None:
    recipe = full(tmp_path, "dpo", "per_device_train_batch_size: 4")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        plan, peak = processes.submit(plan_and_peak_memory, recipe).result()
    assert peak < 5e6  # KiB; the weights alone would be 32 GB
    values = list(numbers(json.loads(json.dumps(plan.to_dict()))))
    assert len(values) > 60
    assert all(math.isfinite(v) and v >= 0 for v in values)
    assert plan.parameters["language"] == {"trained": 7_615_616_512, "frozen": 0}
    assert plan.parameters["vision"]["frozen"] > 15e6  # the last block, the norm and the pooling head
    assert (plan.rows, plan.rows_per_step, plan.steps) == (20_000, 256, 3 * 79)
    assert plan.image_tokens == 576
    assert plan.tokens_per_step == 256 * (576 + 60 + 2 * 150)
    # The reference runs once per row and not once per epoch: a third of the policy's forward passes.
    assert plan.flops["reference"] == pytest.approx(plan.flops["forward"] / 3)
    fill = plan.memory[1]
    assert fill.terms["reference"] == plan.memory[0].terms["weights"] > 30e9
    assert "reference" not in plan.memory[0].terms
    assert plan.disk["checkpoint"] == pytest.approx(4 * 8.06e9 + 8 * 8.03e9, rel=0.01)
    table = plan.table()
    assert max(map(len, table.splitlines())) < 140
    assert len(table.splitlines()) < 40


@pytest.mark.slow
def test_advice_that_is_followed_fits(tmp_path: Path) -> None:
    """With all its state in every GPU, 7B does not fit into 80 GB; with the planner's advice it does."""
    file = full(tmp_path, "dpo", "per_device_train_batch_size: 2")
    loaded = load_recipe(file, ["args.max_length=null"])
    plan = plan_stage(loaded, accelerate_config="ddp", processes=8)
    estimate = plan.gpus[1]
    assert (estimate.gpu, estimate.fits) == ("H100 80GB", False)
    assert plan.memory[0].total > 100e9
    assert estimate.advice
    advice = dict(estimate.advice)
    config, processes = advice.pop("machine", "ddp"), advice.pop("processes", 8)
    followed = plan_stage(
        load_recipe(file, ["args.max_length=null", *(f"{k}={v}" for k, v in advice.items())]), config, processes
    )
    assert followed.gpus[1].fits
    assert all(peak.total <= GPUS[1].memory_bytes - RESERVE for peak in followed.memory)
    assert followed.rows_per_step == plan.rows_per_step
    assert "does not fit; fits with" in plan.table()


def test_settings_have_the_effect_they_are_for(folder: Path) -> None:
    plain, checkpointed = (planned(folder, "sft", on).memory[0].terms["activations"] for on in (False, True))
    assert checkpointed < 0.7 * plain
    file = recipe_file(folder, "sft", {"gradient_checkpointing": True})
    loaded = load_recipe(file)
    ddp, zero2, fsdp2 = (plan_stage(loaded, m, 8).memory[0].terms for m in ("ddp", "zero2", "fsdp2"))
    assert ddp["weights"] == 2 * zero2["weights"] == 8 * fsdp2["weights"]
    assert ddp["optimizer"] == 8 * zero2["optimizer"] == 8 * fsdp2["optimizer"]
    small = plan_stage(load_recipe(file, ["args.optim=adamw_bnb_8bit"]), "ddp", 8).memory[0].terms
    assert small["optimizer"] < 0.3 * ddp["optimizer"]


def test_deepspeed_holds_half_weights_and_shards_float32_masters(folder: Path) -> None:
    """Bytes of a weight, by hand: 2 whole; 4 of its master, 8 of Adam's state and 2 of its gradient divided by 8."""
    loaded = load_recipe(recipe_file(folder, "dpo", {"cache_reference": False, "gradient_checkpointing": True}))
    plans = {config: plan_stage(loaded, config, 8) for config in ("ddp", "zero2", "zero3")}
    counts = plans["ddp"].parameters.values()
    trained, total = (sum(count[kind] for count in counts) for kind in ("trained", "frozen"))
    total += trained
    zero2, zero3 = (plans[config].memory[0].terms for config in ("zero2", "zero3"))
    assert (zero2["weights"], zero2["reference"], zero2["copies"]) == (2 * total, 2 * total, 0)
    assert (zero2["masters"], zero2["optimizer"], zero2["gradients"]) == (trained // 2, trained, trained // 4)
    assert (zero3["weights"], zero3["reference"], zero3["masters"]) == (total // 4, total // 4, trained // 2)
    # Hidden states are in half precision too, where autocast keeps them in float32.
    assert zero2["activations"] < plans["ddp"].memory[0].terms["activations"]
    # Weights as the model and in the engine's files, masters and Adam's state.
    assert plans["zero2"].disk == {"checkpoint": 4 * total + 12 * trained, "final": 2 * total, "most": pytest.approx(
        3 * (4 * total + 12 * trained))}  # fmt: skip
    float32 = plan_stage(load_recipe(loaded.path, ["args.bf16=false"]), "zero2", 8).memory[0].terms
    assert float32["weights"] == 4 * total
    assert "masters" not in float32


def test_mfu_is_hfu_without_recomputation_and_each_process_loads_its_models(folder: Path) -> None:
    plain, checkpointed = (
        plan_stage(load_recipe(recipe_file(folder, "dpo", {"gradient_checkpointing": on})), "ddp", 16)
        for on in (False, True)
    )
    assert plain.mfu == plain.hfu == checkpointed.hfu
    useful = sum(flops for phase, flops in checkpointed.flops.items() if phase != "recompute")
    assert checkpointed.mfu == pytest.approx(checkpointed.hfu * useful / sum(checkpointed.flops.values()))
    assert checkpointed.mfu < 0.9 * checkpointed.hfu
    assert "35% HFU" in checkpointed.table()
    weights = plain.disk["final"]
    assert plain.loading_bytes == 8 * 2 * weights  # eight processes a machine, policy and reference
    assert planned(folder, "sft", False).loading_bytes == weights


def test_bfloat16_weights_are_planned_as_they_are_held_and_their_effect_is_said(folder: Path, tmp_path: Path) -> None:
    step = real_step(folder, "sft", False, tmp_path, bf16=True)
    for weight in step.trainer.model.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    file = recipe_file(folder, "sft", {"bf16": True, "gradient_checkpointing": False})
    float32, bfloat16 = (
        plan_stage(load_recipe(file, overrides), "single", 1, device="cpu") for overrides in ([], ["weights=bfloat16"])
    )
    assert bfloat16.memory[0].total == pytest.approx(peak_bytes(step), rel=0.15)
    assert bfloat16.disk["checkpoint"] == float32.disk["checkpoint"] / 2
    assert float32.warnings == ()
    assert "warning a bfloat16 weight does not move at updates below 1/512" in bfloat16.table()
    with pytest.raises(RecipeError, match="`weights` is for single and ddp; zero2 keeps float32 weights"):
        plan_stage(load_recipe(file, ["weights=bfloat16"]), "zero2", 8)


@pytest.mark.parametrize(
    ("args", "processes", "steps", "rows_per_step"),
    [
        ({"num_train_epochs": 1}, 1, 16, 4),
        ({"num_train_epochs": 2}, 8, 4, 32),
        ({"num_train_epochs": 1, "gradient_accumulation_steps": 3}, 1, 6, 12),
        ({"max_steps": 5}, 1, 5, 4),
        ({"num_train_epochs": 1, "per_device_train_batch_size": 5}, 1, 13, 5),
        ({"num_train_epochs": 1, "per_device_train_batch_size": 5, "dataloader_drop_last": True}, 1, 12, 5),
    ],
)
def test_steps_and_tokens(args: dict[str, Any], processes: int, steps: int, rows_per_step: int, folder: Path) -> None:
    plan = plan_stage(load_recipe(recipe_file(folder, "align", args)), processes=processes)
    assert (plan.steps, plan.rows_per_step) == (steps, rows_per_step)
    row = 64 + PROMPT + ANSWER
    assert plan.tokens_per_step == rows_per_step * row
    seen = steps * rows_per_step if "max_steps" in args else args["num_train_epochs"] * 64
    assert plan.tokens == seen * row
    assert plan.epochs == seen / 64


def test_measured_lengths_replace_expected_ones(folder: Path) -> None:
    loaded = load_recipe(recipe_file(folder, "align", {"max_length": 512}))
    plan = plan_stage(loaded, lengths={"rows": 10, "prompt_tokens": 3.5, "answer_tokens": 7.5})
    assert (plan.rows, plan.prompt_tokens, plan.answer_tokens) == (10, 3.5, 7.5)
    cut = plan_stage(loaded, lengths={"rows": 10, "prompt_tokens": 3, "answer_tokens": 9000})
    assert cut.answer_tokens == 512 - 64 - 3


def test_shapes_are_counted_from_their_recipe() -> None:
    plan = plan_stage(load_recipe("shapes/3-dpo"), "single", 1, device="cpu")
    assert (plan.rows, plan.steps, plan.precision) == (1536, 48, "float32")
    assert any("a row of shapes" in each for each in plan.assumptions)
    assert plan.memory[0].total < GIB * 10


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (("expect: {", "sample: 3, seed: 1} #"), {}, "data.0 does not say what it holds: add `expect`.*data check"),
        (("max_length: 2048", "max_length: 500"), {}, "577 tokens and leave no room.*raise `args.max_length`"),
        (("global_batch: 256", "global_batch: 100"), {}, "`global_batch` 100 is not a multiple of 64 rows"),
        (("max_length: 2048", "optim: lomo"), {}, "does not know the memory of `args.optim` lomo"),
        (None, {"accelerate_config": "fsdp"}, "no Accelerate config 'fsdp' \\(did you mean `fsdp2`"),
        (None, {"accelerate_config": "single"}, "config single does not run 8 processes"),
        (None, {"hfu": 1.5}, "hfu is 1.5: give the share of the peak"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_remedy(
    change: tuple[str, str] | None, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = full(tmp_path)
    if change:
        assert change[0] in file.read_text()
        text = file.read_text().replace(*change)
        file.write_text(text if "#" not in change[1] else text.replace(EXPECT.replace(*change), "sample: 3"))
    with pytest.raises(RecipeError, match=message):
        plan_stage(load_recipe(file), **options)


def test_base_parts_are_not_planned() -> None:
    with pytest.raises(RecipeError, match="stage vision makes a base part"):
        plan_stage(load_recipe("shapes/0-vision"))
