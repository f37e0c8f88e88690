"""The rewards of a recipe: by name or of the user, checked when they are loaded and whenever they are called."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from pivot_hub.config.recipe import RewardSpec
from pivot_hub.errors import TrainingError
from pivot_hub.training.rewards.load import load_rewards

HERE = "tests.training.rewards.test_load"


def spec(name: str, **args: Any) -> RewardSpec:
    return RewardSpec(name=name, args=args)


def always(completions: list[str], value: float = 1.0, **kwargs: Any) -> list[float | None]:
    return [value] * len(completions)


def raising(completions: list[str], solution: list[str], **kwargs: Any) -> list[float]:
    return [float(text) for text in solution]


def short(completions: list[str], **kwargs: Any) -> list[float]:
    return [1.0]


def unfinished(completions: list[str], **kwargs: Any) -> list[float | None]:
    return [1, None, math.nan, True, math.inf][: len(completions)]


async def late(completions: list[str], **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


NOT_A_FUNCTION = 1


def test_rewards_are_loaded_by_name_with_settings_and_weights() -> None:
    specs = [RewardSpec(name="count", weight=0.5, args={"within": 1}), spec(f"{HERE}:always", value=0.25)]
    rewards, weights = load_rewards(specs)
    assert weights == [0.5, 1.0]
    assert [reward.__name__ for reward in rewards] == ["count", "always"]
    assert [reward.scores_every_row for reward in rewards] == [False, True]
    assert rewards[0](completions=["3", "4"], solution=["3", "3"], prompts=["", ""]) == [1, 0]
    copy = pickle.loads(pickle.dumps(rewards[0]))  # as processes that check rows get it where there is no fork
    assert copy(completions=["3", "4"], solution=["3", "3"]) == [1, 0]
    assert rewards[1](completions=["3", "4"], solution=["3", "3"], id=["a", "b"]) == [0.25, 0.25]


BAD_SPECS: list[tuple[list[RewardSpec], str]] = [
    ([spec("exact_mach")], r"no reward 'exact_mach' \(did you mean `exact_match`\?\).*one of box_iou, colour"),
    ([spec("load")], "no reward 'load'"),
    ([spec("no_such_module:reward")], "the reward 'no_such_module:reward': the module 'no_such_module' cannot be"),
    ([spec(f"{HERE}:allways")], "has no function 'allways' .did you mean `always`"),
    ([spec(f"{HERE}:NOT_A_FUNCTION")], "has no function 'NOT_A_FUNCTION'"),
    ([spec("count", witin=2)], r"'count' has no setting 'witin' \(did you mean `within`\?\)"),
    ([spec(f"{HERE}:always", valu=2)], r"has no setting 'valu' \(did you mean `value`\?\)"),
    ([spec("count", within="many")], "'count' cannot use its args {'within': 'many'}"),
    ([spec("count", within=0)], "'count' cannot use its args .*`within` is 0"),
    ([spec("box_iou")], "'box_iou' needs coordinates; give it under `args`"),
    ([spec("box_iou", coordinates="percent")], "'box_iou' cannot use its args .*give one of pixels"),
    ([spec("length")], "'length' needs longest, zero_at"),
    ([spec("format", pattern="(")], "'format' cannot use its args"),
    ([spec("count"), spec("count", within=1)], "'count' is listed twice"),
]


@pytest.mark.parametrize(("specs", "message"), BAD_SPECS)
def test_a_reward_that_cannot_be_used_is_refused(specs: list[RewardSpec], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        load_rewards(specs)


@pytest.mark.parametrize("weight", ["much", math.nan, math.inf])
def test_a_weight_is_a_finite_number(weight: Any) -> None:
    with pytest.raises(ValidationError):
        RewardSpec(name="count", weight=weight)


FAULTS: list[tuple[str, str]] = [
    ("raising", r"'.*:raising' failed for the rows r0, r1 \(ValueError: could not convert .*'red'"),
    ("short", "'.*:short' returned 1 values for 4 completions for the rows r0, r1; return one for each"),
    ("unfinished", "'.*:unfinished' is nan for the rows r1; return a finite number, or None"),
    ("late", "'.*:late' failed .*TypeError"),
]


@pytest.mark.filterwarnings("ignore:coroutine 'late' was never awaited:RuntimeWarning")
@pytest.mark.parametrize(("name", "message"), FAULTS)
def test_a_reward_that_fails_is_named_with_its_rows(name: str, message: str) -> None:
    (reward,), _ = load_rewards([spec(f"{HERE}:{name}")])
    with pytest.raises(TrainingError, match=message):
        reward(completions=["red"] * 4, solution=["red"] * 4, id=["r0", "r0", "r1", "r1"])


def test_many_rows_are_counted_and_rows_without_ids_left_out() -> None:
    (reward,), _ = load_rewards([spec(f"{HERE}:raising")])
    with pytest.raises(TrainingError, match="for the rows r0, r1, r2, r3, r4 and 3 more "):
        reward(completions=["red"] * 8, solution=["red"] * 8, id=[f"r{i}" for i in range(8)])
    with pytest.raises(TrainingError, match=r":raising' failed \(ValueError"):
        reward(completions=["red"], solution=["red"])


def test_values_become_numbers() -> None:
    (reward,), _ = load_rewards([spec(f"{HERE}:unfinished")])
    values = reward(completions=["red"] * 2)
    assert values == [1.0, None]
    assert isinstance(values[0], float)


def test_loading_shipped_rewards_imports_no_trainer() -> None:
    code = (
        "import sys; from pivot_hub.config.recipe import RewardSpec; from pivot_hub.training.rewards.load import "
        "load_rewards; load_rewards([RewardSpec(name='count')]); print('trl' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_trl_names_a_loaded_reward_in_its_metrics() -> None:
    from trl.trainer.utils import get_callable_name, is_async_callable

    function: Callable[..., Any] = load_rewards([spec("box_iou", coordinates="pixels")])[0][0]
    assert get_callable_name(function) == "box_iou"
    assert not is_async_callable(function)
