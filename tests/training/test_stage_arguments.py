"""What a stage sets for the machine that it runs on: GPUs of one process, pinned memory, checkpoints by time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from safetensors import safe_open
from transformers import TrainerControl, TrainerState, TrainingArguments

from pivot_hub.config.recipe import load_recipe
from pivot_hub.data.sampler import BlockSampler
from pivot_hub.errors import RecipeError
from pivot_hub.mllm.load import load_mllm
from pivot_hub.training import stage
from pivot_hub.training.checkpoints import CheckpointFiles
from pivot_hub.training.stage import run_stage, trainer_arguments, unused_gpus_hint
from pivot_hub.training.timed_checkpoints import TimedCheckpoints


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that says it has eight GPUs, on which nothing is computed."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    PartialState._shared_state.update(PartialState(cpu=True)._shared_state, device=torch.device("cuda", 0))
    yield
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)


def test_one_process_uses_one_of_eight_gpus_and_says_so(eight_gpus: None, recipes: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipes / "3-dpo.yaml", ["args.bf16=false"])
    plain = TrainingArguments(output_dir=str(tmp_path), bf16=False)
    assert (plain.n_gpu, plain.train_batch_size) == (8, 64)  # transformers' own: DataParallel over all of them
    args = trainer_arguments(loaded, tmp_path)
    assert (args.n_gpu, args.train_batch_size) == (1, 4)
    assert args.device.type == "cuda"
    hint = unused_gpus_hint(loaded)
    assert hint is not None
    assert hint.startswith("8 GPUs are here, one is used: run `accelerate launch --config_file ")
    assert "ddp.yaml --num_processes 8 -m pivot_hub train" in hint
    assert unused_gpus_hint(load_recipe("shapes/0-vision")) is None  # one process trains a base part


@pytest.mark.parametrize("magnitude", [1e-4, 0.02, 1.0])
def test_a_small_update_moves_a_float32_weight_and_no_bfloat16_weight(magnitude: float) -> None:
    """An update of a millionth of a weight is above float32's rounding and far below bfloat16's."""
    start = magnitude * (1 + torch.rand(1000, generator=torch.Generator().manual_seed(0)))
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.nn.Parameter(start.to(dtype))
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        # Adam's first update of a weight is its learning rate.
        torch.optim.AdamW([weight], lr=1e-6 * magnitude, weight_decay=0.0).step()
        moved[dtype] = int((weight.detach() != before).sum())
    assert moved == {torch.float32: 1000, torch.bfloat16: 0}


def test_weights_are_bfloat16_only_where_the_recipe_says_so(recipes: Path, trained: Path, tmp_path: Path) -> None:
    """At a learning rate that moves float32 weights, bfloat16 ones of the same run stay as they were rounded."""
    rates = [f"learning_rate.{part}=1.0e-8" for part in ("vision", "projector", "language")]
    start = load_mllm(trained / "2-instruct")[0].state_dict()
    moved = {}
    for weights in ("null", "bfloat16"):
        loaded = load_recipe(recipes / "3-sft.yaml", [*rates, f"weights={weights}"])
        folder = run_stage(loaded, trained.parent, tmp_path / weights, log=lambda line: None)
        dtype = torch.float32 if weights == "null" else torch.bfloat16
        with safe_open(folder / "model.safetensors", framework="pt") as tensors:
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {dtype}  # noqa: SIM118
        end = load_mllm(folder)[0].state_dict()
        changed = [(start[name].to(dtype).float() != end[name]).double().mean().item() for name in start]
        moved[weights] = sum(changed) / len(changed)
    assert moved["null"] > 0.3
    assert moved["bfloat16"] < 0.01


def test_bfloat16_weights_are_refused_for_dpo(recipes: Path) -> None:
    with pytest.raises(RecipeError, match="updates of dpo are smaller than bfloat16's rounding; remove it"):
        load_recipe(recipes / "3-dpo.yaml", ["weights=bfloat16"])


def test_a_run_keeps_the_order_of_rows_that_it_started_with(recipes: Path, tmp_path: Path) -> None:
    """The streams of rows follow the loader workers, but not those of a run that is resumed elsewhere."""
    eight, two = (
        load_recipe(recipes / "3-sft.yaml", [f"args.dataloader_num_workers={count}"]).recipe for count in (8, 2)
    )
    expected = {"streams": 8, "batch": 4}
    assert stage._row_streams(eight, tmp_path, None) == expected
    assert stage._row_streams(two, tmp_path, tmp_path / "checkpoint-1") == expected
    (tmp_path / "earlier").mkdir()
    without = stage._row_streams(two, tmp_path / "earlier", tmp_path / "checkpoint-1")
    assert without["streams"] == 1  # checkpoints of earlier versions were made in this order
    assert list(BlockSampler(np.arange(50) // 5, 0, streams=1, batch=4)) == list(BlockSampler(np.arange(50) // 5, 0))


def test_batches_are_pinned_for_a_gpu_only(recipes: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    loaded = load_recipe(recipes / "3-sft.yaml", ["args.bf16=false"])
    assert trainer_arguments(loaded, tmp_path).dataloader_pin_memory is torch.cuda.is_available()
    request.getfixturevalue("eight_gpus")
    assert trainer_arguments(loaded, tmp_path).dataloader_pin_memory is True


@pytest.mark.parametrize(
    ("overrides", "every_s", "expected"),
    [
        ([], 1e9, [2, 4, 6]),  # a quarter of six steps, rounded up
        ([], 0, [1, 2, 3, 4, 5, 6]),
        (["args.save_steps=3"], 0, [3, 6]),  # the recipe's own choice
    ],
)
def test_a_checkpoint_is_saved_each_quarter_and_when_the_last_is_old(
    overrides: list[str], every_s: float, expected: list[int], recipes: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    saved: list[int] = []
    complete = CheckpointFiles.on_save

    def record(self: Any, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        saved.append(state.global_step)
        complete(self, args, state, control, **kwargs)

    monkeypatch.setattr(CheckpointFiles, "on_save", record)
    monkeypatch.setattr(stage, "TimedCheckpoints", lambda: TimedCheckpoints(every_s))
    loaded = load_recipe(recipes / "1-align.yaml", ["data.0.rows=24", *overrides])
    run_stage(loaded, tmp_path, log=lambda line: None)
    assert saved == expected
