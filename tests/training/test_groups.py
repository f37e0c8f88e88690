"""GRPO and RLOO: answers behind one prefix give TRL's losses and gradients, and killed runs resume as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from pivot_hub.config.recipe import RewardSpec, load_recipe
from pivot_hub.data.sampler import BlockSampler
from pivot_hub.errors import DataError, PivotError, TrainingError
from pivot_hub.mllm.families import FAMILIES as FAMILY_TABLE
from pivot_hub.mllm.load import load_mllm
from pivot_hub.mllm.trainable import parts_of
from pivot_hub.training.group_sampler import GroupSampler
from pivot_hub.training.grpo import PivotGRPOConfig, PivotGRPOTrainer, PivotRLOOConfig, PivotRLOOTrainer
from pivot_hub.training.stage import run_stage
from tests.mllm.tiny_mllms import make_mllm
from tests.mllm.tiny_processors import PROCESSORS, add_processor
from tests.training.test_checkpoints import stop_at
from tests.training.test_families import (
    NEEDS_TORCHVISION,
    SMALL,
    TALL,
    WIDE,
    WITH_EXPERTS,
    WITHOUT_TREES,
    assert_equal,
)
from tests.training.test_processes import finish, start

SOME = ("llava", "qwen2_5_vl", "internvl")
# TRL's own trainers do not take what LLaVA-OneVision's processor returns.
OTHERS = sorted(set(PROCESSORS) - {*SOME, *NEEDS_TORCHVISION, "llava_onevision"})
CLASSES: dict[str, tuple[tuple[Any, Any], tuple[Any, Any]]] = {
    "grpo": ((GRPOTrainer, GRPOConfig), (PivotGRPOTrainer, PivotGRPOConfig)),
    "rloo": ((RLOOTrainer, RLOOConfig), (PivotRLOOTrainer, PivotRLOOConfig)),
}
ANSWERS = 3


def row(images: list[Any], question: str) -> dict[str, Any]:
    content = [*[{"type": "image"}] * len(images), {"type": "text", "text": question}]
    return {"images": images, "prompt": [{"role": "user", "content": content}]}


# Two rows differ in the image alone, of the same size; one row has two images.
ROWS = [
    row([WIDE], "What is it?"),
    row([SMALL], "Where?"),
    row([SMALL.rotate(90)], "Where?"),
    row([TALL, SMALL], "Two?"),
]


def length(completions: list[Any], **columns: Any) -> list[float]:
    """Reward an answer by its length, which differs between the answers of a prompt."""
    return [float(len(completion[0]["content"])) for completion in completions]


Mllms = Callable[[str], tuple[PreTrainedModel, Any]]


@pytest.fixture(scope="module")
def mllms(tmp_path_factory: pytest.TempPathFactory) -> Mllms:
    """Function that returns a small MLLM of a family and its processor."""

    @cache
    def made(family: str) -> tuple[PreTrainedModel, Any]:
        folder = tmp_path_factory.mktemp(family)
        make_mllm(folder, family)
        add_processor(folder, family)
        return load_mllm(folder)

    return made


def trainer(classes: tuple[Any, Any], mllm: tuple[PreTrainedModel, Any], folder: Path, **args: Any) -> Any:
    """A trainer whose policy differs from its reference in every part."""
    dataset = Dataset.from_dict({"row": list(range(len(ROWS)))})
    dataset.set_transform(lambda batch: {c: [deepcopy(ROWS[r][c]) for r in batch["row"]] for c in ROWS[0]})
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": ANSWERS * len(ROWS),
        "num_generations": ANSWERS,
        "num_iterations": 2,  # so that log-probabilities of the old policy are computed
        "beta": 0.1,
        "max_completion_length": 12,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        **args,
    }
    trainer_class, config_class = classes
    processor = deepcopy(mllm[1])
    if classes in [theirs for theirs, _ in CLASSES.values()]:
        processor.tokenizer.padding_side = "left"  # which TRL asks for, and ours sets
    one = trainer_class(
        model=deepcopy(mllm[0]),
        reward_funcs=length,
        args=config_class(**settings),
        train_dataset=dataset,
        processing_class=processor,
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in one.model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.02)
    return one


def step(one: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """Loss, metrics and gradients of a batch whose answers differ in length; every other one is truncated."""
    generator = torch.Generator().manual_seed(1)
    lengths = [1 + 5 * i % 12 for i in range(ANSWERS * len(ROWS))]
    answers = [torch.randint(20, 200, (n,), generator=generator).tolist() for n in lengths]
    for answer in answers[::2]:
        answer[-1] = one._tokenizer.eos_token_id
    grpo = isinstance(one, GRPOTrainer)
    monkeypatch.setattr(one, "_generate_single_turn", lambda *a, **k: (answers, None) if grpo else answers)
    one.model.train()
    one.current_gradient_accumulation_steps = 1
    rows = [deepcopy(each) for each in ROWS for _ in range(ANSWERS)]
    loss = one.compute_loss(one.model, one._prepare_inputs(rows))
    loss.backward()
    metrics = {name: values[-1] for name, values in one._metrics["train"].items()}
    return loss.item(), metrics, {n: p.grad.clone() for n, p in one.model.named_parameters() if p.grad is not None}


FAMILIES = [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", sorted(CLASSES))
def test_answers_behind_one_prefix_give_trls_loss_metrics_and_gradients(
    stage: str,
    family: str,
    mllms: Mllms,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    theirs, ours = (trainer(classes, mllms(family), tmp_path) for classes in CLASSES[stage])
    shares = family not in WITHOUT_TREES | WITH_EXPERTS
    assert (ours._positions is not None) == shares
    assert ("share_prefix is off" in caplog.text) != shares
    expected = step(theirs, monkeypatch)
    assert_equal(step(ours, monkeypatch), expected, parts_of(ours.model))


def test_image_and_prompt_run_once_for_the_answers_of_a_prompt(
    mllms: Mllms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three answers of each of four rows, whose five images are encoded once each, not three times."""
    images: dict[bool, list[int]] = {}
    for shares in (True, False):
        one = trainer(CLASSES["grpo"][1], mllms("llava"), tmp_path, share_prefix=shares)
        seen = images[shares] = []
        one.model.model.vision_tower.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(len(kwargs.get("pixel_values", *args))),
            with_kwargs=True,
        )
        step(one, monkeypatch)
    assert images == {True: [5, 5], False: [15, 15]}  # old policy, policy; the reference has a tower of its own


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_generated_behind_one_prompt_are_those_of_prompts_repeated(
    family: str, mllms: Mllms, tmp_path: Path
) -> None:
    generated, read = {}, {}
    for shares in (True, False):
        one = trainer(CLASSES["grpo"][1], mllms(family), tmp_path, share_prefix=shares, num_iterations=1, beta=0.0)
        one.model.train()
        one.model.config.get_text_config().use_cache = False  # as in the config of a trained model
        tokens: list[int] = []
        one.model.get_input_embeddings().register_forward_hook(
            lambda module, args, output, tokens=tokens: tokens.append(output.shape[:-1].numel())
        )
        batch = one._prepare_inputs([deepcopy(each) for each in ROWS for _ in range(ANSWERS)])
        generated[shares], read[shares] = batch["completion_ids"], tokens
    assert torch.equal(generated[True], generated[False])
    assert len(set(map(tuple, generated[True].tolist()))) > ANSWERS * len(ROWS) // 2
    shared = family not in WITHOUT_TREES | WITH_EXPERTS
    assert read[False][0] == (ANSWERS if shared else 1) * read[True][0]
    assert set(read[False][1:]) == set(read[True][1:]) == {ANSWERS * len(ROWS)}


def test_masked_answers_have_no_branch_and_no_loss(
    mllms: Mllms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = (trainer(classes, mllms("llava"), tmp_path, mask_truncated_completions=True) for classes in CLASSES["grpo"])
    theirs, ours = ((step(one, monkeypatch), one) for one in both)
    assert_equal(ours[0], theirs[0], parts_of(ours[1].model))


SAVED: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,  # an epoch is one generation batch of four prompts, trained on for four steps
    "max_steps": 6,
    "save_steps": 1,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "max_completion_length": 6,
}


@pytest.mark.parametrize(("stage", "step"), [("grpo", 3), ("rloo", 5)])
def test_a_run_resumed_at_any_step_has_the_weights_and_logs_of_one_never_stopped(
    stage: str, step: int, mllms: Mllms, tmp_path: Path
) -> None:
    whole = trainer(CLASSES[stage][1], mllms("llava"), tmp_path, **SAVED)
    start = {name: weight.clone() for name, weight in whole.model.state_dict().items()}
    whole.train()
    resumed = trainer(CLASSES[stage][1], mllms("llava"), tmp_path, **SAVED)
    torch.manual_seed(99)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    expected = whole.model.state_dict()
    assert any(not torch.equal(weight, start[name]) for name, weight in expected.items())
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert resumed.state.log_history[step - 1 :][0].keys() == whole.state.log_history[step - 1].keys()
    rewards = [[log.get("reward") for log in one.state.log_history[:6]] for one in (whole, resumed)]
    assert rewards[0] == rewards[1]


@pytest.mark.parametrize("stage", sorted(CLASSES))
def test_answers_move_to_what_is_rewarded(stage: str, mllms: Mllms, tmp_path: Path) -> None:
    args = {
        **SAVED,
        "save_strategy": "no",
        "max_steps": 16,
        "per_device_train_batch_size": 16,
        "steps_per_generation": 1,
        "num_iterations": 1,
        "num_generations": 4,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
    }
    one = trainer(CLASSES[stage][1], mllms("llava"), tmp_path, **args)
    one.reward_funcs = [
        lambda completion_ids, **columns: [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]
    ]
    one.train()
    rewards = [log["reward"] for log in one.state.log_history if "reward" in log]
    assert sum(rewards[-4:]) > sum(rewards[:4]) + 0.8, rewards


def test_a_run_whose_answers_all_get_the_same_reward_stops_with_the_reason(mllms: Mllms, tmp_path: Path) -> None:
    one = trainer(
        CLASSES["rloo"][1], mllms("llava"), tmp_path, **{**SAVED, "save_strategy": "no"}, stop_without_signal=4
    )
    one.reward_funcs = [lambda completions, **columns: [1.0] * len(completions)]
    with pytest.raises(
        TrainingError, match=r"the 2 answers of every prompt got the same reward for 4 steps.*temperature"
    ):
        one.train()
    assert one.state.global_step == 4


@pytest.mark.parametrize("args", [{"scale_rewards": "batch"}, {"multi_objective_aggregation": "normalize_then_sum"}])
def test_the_share_of_prompts_without_signal_is_of_prompts_whatever_rewards_are_divided_by(
    args: dict[str, Any], mllms: Mllms, tmp_path: Path
) -> None:
    one = trainer(
        CLASSES["grpo"][1], mllms("llava"), tmp_path, **{**SAVED, "max_steps": 1, "save_strategy": "no"}, **args
    )
    one.reward_funcs = [lambda completions, **columns: [0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 2.0, 2.0][: len(completions)]]
    one.train()
    assert one.state.log_history[0]["frac_reward_zero_std"] == 0.75


def test_settings_that_do_not_fit_are_one_message(mllms: Mllms, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"generation_batch_size \(4\) must be divisible by num_generations \(3\)"):
        trainer(CLASSES["grpo"][1], mllms("llava"), tmp_path, per_device_train_batch_size=4)
    one = trainer(CLASSES["grpo"][1], mllms("llava"), tmp_path, per_device_train_batch_size=15)
    with pytest.raises(DataError, match="4 rows do not fill a generation batch of 5 prompts with 3 answers each"):
        one.train()
    with pytest.raises(TrainingError, match="leave sync_ref_model out"):
        trainer(CLASSES["rloo"][1], mllms("llava"), tmp_path, sync_ref_model=True)


def test_each_epoch_has_whole_groups_in_an_order_of_its_own() -> None:
    sampler = GroupSampler(BlockSampler(np.arange(7), seed=3), prompts=2, answers=3, uses=2)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert epochs[0] == epochs[2] != epochs[1]
    assert len(epochs[0]) == len(sampler) == 3 * 2 * 3 * 2
    for batch in (epochs[0][i : i + 12] for i in range(0, 36, 12)):
        assert batch[:6] == batch[6:] == [batch[0]] * 3 + [batch[3]] * 3
        assert batch[0] != batch[3]


def variety(completions: list[Any], **columns: Any) -> list[float]:
    """Reward different letters, which the answers of random weights have more or fewer of."""
    return [float(len(set(completion[0]["content"]))) for completion in completions]


RECIPE = """
model: {mllm: mllm}
learning_rate: {vision: 1.0e-3, projector: 1.0e-3}
rewards: [{name: exact_match}, {name: "tests.training.test_groups:variety", weight: 0.1}]
data: [{format: shapes, content: questions, rows: 10, world: {image_px: 56}}]
args:
  num_train_epochs: 2
  per_device_train_batch_size: 4
  num_generations: 2
  steps_per_generation: 2
  max_completion_length: 4
  gradient_checkpointing: false
  logging_steps: 1
  save_steps: 1
"""


@pytest.fixture(scope="module")
def recipe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small MLLM of squares and tiles, and a recipe of each stage that starts from it."""
    folder = tmp_path_factory.mktemp("recipes")
    make_mllm(folder / "mllm", "internvl")
    add_processor(folder / "mllm", "internvl")
    for stage in CLASSES:
        (folder / f"{stage}.yaml").write_text(f"stage: {stage}{RECIPE}")
    return folder


@pytest.mark.parametrize("stage", ["grpo", pytest.param("rloo", marks=pytest.mark.slow)])
def test_a_recipe_moves_its_parts_alone_and_a_killed_run_ends_with_the_same_weights(
    stage: str, recipe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two steps on one generation batch, in the second of two epochs of two such batches."""
    loaded = load_recipe(recipe_folder / f"{stage}.yaml")
    whole = run_stage(loaded, tmp_path, tmp_path / "whole", log=lambda line: None)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(OSError, match="the node is gone"):
            run_stage(loaded, tmp_path, tmp_path / "out", log=lambda line: None)
    lines: list[str] = []
    resumed = run_stage(loaded, tmp_path, tmp_path / "out", log=lines.append)
    assert any("resuming from step 5" in line for line in lines)
    expected, actual = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    timed = ("runtime", "per_second", "step_time")
    logs = [
        [
            {key: value for key, value in json.loads(line).items() if not any(word in key for word in timed)}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (whole, resumed)
    ]
    assert logs[0][:-1] == logs[1][:-1]
    assert len(logs[0]) == 9
    pages = [(folder / "samples.html").read_text() for folder in (whole, resumed)]
    assert pages[0] == pages[1]
    assert pages[0].count("<summary>Step ") == 4  # one for each generation batch
    assert all(f"rewards/{name}/mean" in logs[0][0] for name in ("exact_match", "variety"))
    before, after = (load_mllm(folder)[0].state_dict() for folder in (recipe_folder / "mllm", whole))
    family = FAMILY_TABLE["internvl"]
    moved = {family.part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"vision", "projector"}
    assert json.loads((whole / "provenance.json").read_text())["stage"] == stage


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("args.num_generations=3", r"grpo.yaml: `args` do not fit together: generation_batch_size \(8\) must be divis"),
        ("args.num_generation=2", "unknown argument `num_generation`.*num_generations"),
        ("args.sync_ref_model=true", "`sync_ref_model` is not set here"),
        ("rewards=null", "stage grpo learns from rewards: list them as `rewards`"),
        ("data.0.content=pairs", "stage grpo reads content: questions"),
        ("data.0.rows=3", "3 rows do not fill a generation batch of 4 prompts with 2 answers each"),
        ("rewards.0.name=exact", "there is no reward 'exact'"),
    ],
)
def test_a_recipe_that_cannot_work_is_one_message(
    override: str, message: str, recipe_folder: Path, tmp_path: Path
) -> None:
    def run() -> None:
        loaded = load_recipe(recipe_folder / "grpo.yaml", [override])
        run_stage(loaded, tmp_path, tmp_path / "out", log=lambda line: None)

    with pytest.raises(PivotError, match=message) as error:
        run()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_shipped_recipes_check_and_start_from_the_same_parent() -> None:
    names = ("3-dpo", "3-grpo", "3-rloo")
    dpo, *others = (load_recipe(f"shapes/{name}") for name in names)
    for loaded in others:
        assert [each.name for each in loaded.lineage()[:-1]] == [each.name for each in dpo.lineage()[:-1]]
        assert loaded.recipe.rewards == [RewardSpec(name="exact_match")]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_a_prompts_answers_can_be_those_of_two_processes(how: str, recipe_folder: Path, tmp_path: Path) -> None:
    """Four answers of a prompt, two in each process: rewards are compared over both, and both take the same steps."""
    args = ["per_device_train_batch_size=2", "num_generations=4", "steps_per_generation=1", "beta=0.05"]
    overrides = [*(f"args.{each}" for each in args), "learning_rate.language=1.0e-3", "args.num_train_epochs=1"]
    output = tmp_path / how
    finish(start(how, str(recipe_folder / "grpo.yaml"), *overrides, "--output", str(output)))
    assert json.loads((output / "report.json").read_text())["processes"] == 2
    logs = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][:-1]
    assert len(logs) == 10
    assert any(log["grad_norm"] > 0 for log in logs)
    page = (output / "samples.html").read_text()
    assert page.count('<td class="text">') == 4 * page.count('<div class="prompt">') == 4 * 10
    assert all(log["rewards/variety/mean"] * 4 == pytest.approx(round(log["rewards/variety/mean"] * 4)) for log in logs)
