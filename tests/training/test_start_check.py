"""The first step of DPO: a reference that is not the policy stops the run, and caches know how their values round."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trl import DPOConfig

from pivot_hub.errors import TrainingError
from pivot_hub.mllm.build import build_mllm
from pivot_hub.training.reference_cache import rounding_of
from pivot_hub.training.start_check import StartCheck
from tests.training.test_tree_layout import trainer


@pytest.fixture(scope="module")
def models(parts: Path) -> tuple[Any, Any]:
    return build_mllm(str(parts / "vision"), str(parts / "language"))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("half", [False, True])
def test_a_reference_that_is_not_the_policy_stops_before_the_first_update(
    cached: bool, half: bool, models: tuple[Any, Any], tmp_path: Path
) -> None:
    policy, processor = models
    other = deepcopy(policy)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    args: dict[str, Any] = {"max_steps": 2, "use_cpu": True, "learning_rate": 1e-3, "bf16": half}
    for name, reference in (("same", policy), ("other", other)):
        one = trainer((policy, reference, processor), tmp_path / name, {"cache_reference": cached}, **args)
        one.add_callback(StartCheck(one))
        before = deepcopy(one.model.state_dict())
        if name == "same":
            one.train()
            assert one.state.global_step == 2
            continue
        with pytest.raises(TrainingError, match=r"the chosen answers' log-probabilities .* though both start from"):
            one.train()
        assert all(torch.equal(before[key], value) for key, value in one.model.state_dict().items())


def test_a_policy_with_dropout_is_not_checked(models: tuple[Any, Any], tmp_path: Path) -> None:
    policy, processor = models
    dropping = deepcopy(policy)
    dropping.lm_head = nn.Sequential(nn.Dropout(0.5), dropping.lm_head)
    one = trainer((policy, policy, processor), tmp_path, {})
    one.model = dropping
    one._metrics["train"] |= {"rewards/chosen": [9.0], "rewards/rejected": [9.0], "logps/chosen": [-50.0]}
    StartCheck(one).on_pre_optimizer_step(one.args, one.state, one.control)
    one.model = policy
    with pytest.raises(TrainingError, match="differ by 90 on average"):
        StartCheck(one).on_pre_optimizer_step(one.args, one.state, one.control)


def test_values_of_a_sharded_reference_are_not_those_of_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, whole = (DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=bf16) for bf16 in (True, False))
    assert rounding_of(half) == rounding_of(whole) == "any cpu"
    for engine in ("FSDP", "DEEPSPEED"):
        with monkeypatch.context() as environment:
            environment.setenv(f"ACCELERATE_USE_{engine}", "true")
            assert rounding_of(half) == f"{engine} cpu"
            assert rounding_of(whole) == "any cpu"  # in float32 all of them compute the same
