"""Loss functions of the user: as TRL's where they compute the same, and refused early where they do not exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid
from trl import DPOTrainer

from pivot_hub.config.recipe import load_recipe
from pivot_hub.errors import RecipeError, TrainingError
from pivot_hub.training.dpo import PivotDPOConfig
from pivot_hub.training.losses import trl_loss_types
from tests.training.test_tree_layout import ALL_OFF, LOSSES, ROWS, Models, assert_same, models, step, trainer

__all__ = ["models"]  # the fixture
HERE = "tests.training.test_losses"


def sigmoid(
    *,
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    ref_chosen_logps: torch.Tensor,
    ref_rejected_logps: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    assert chosen_logps.dtype == ref_rejected_logps.dtype == torch.float32
    margins = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    return -logsigmoid(beta * margins)


def mean(**logps: Any) -> torch.Tensor:
    return sigmoid(**logps).mean()


NOT_A_FUNCTION = 1


@pytest.mark.parametrize(
    "settings",
    [{}, {"cache_reference": False}, ALL_OFF],
    ids=["all options", "live reference", "no option"],
)
def test_a_function_that_computes_sigmoid_gives_trls_loss_and_gradients(
    settings: dict[str, Any], models: Models, tmp_path: Path
) -> None:
    expected = step(trainer(models, tmp_path / "trl", None), ROWS)
    ours = trainer(models, tmp_path, {}, loss_type=[f"{HERE}:sigmoid"], **settings)
    assert_same(step(ours, ROWS), expected)


def test_functions_mix_with_trls_losses_by_their_weights(models: Models, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"loss_weights": [0.5, 1.0, 2.0]}
    theirs = trainer(models, tmp_path / "trl", None, loss_type=["hinge", "sigmoid", "sft"], **settings)
    ours = trainer(models, tmp_path, {}, loss_type=["hinge", f"{HERE}:sigmoid", "sft"], **settings)
    assert_same(step(ours, ROWS), step(theirs, ROWS))
    loss, expected = (one.evaluate(one.train_dataset)["eval_loss"] for one in (ours, theirs))
    assert loss == pytest.approx(expected, rel=1e-5)


def test_a_function_without_a_loss_for_each_pair_is_refused(models: Models, tmp_path: Path) -> None:
    ours = trainer(models, tmp_path, {}, loss_type=[f"{HERE}:mean"])
    with pytest.raises(TrainingError, match=r"'mean' returned \(\) for 5 pairs; return one loss for each pair"):
        step(ours, ROWS)


def test_the_names_of_losses_are_those_that_trl_compares_with() -> None:
    assert set(trl_loss_types()) == {name for name, _ in LOSSES}
    assert len(trl_loss_types()) == len(LOSSES)
    assert callable(DPOTrainer._compute_loss)


BAD_LOSSES = [
    ("sigmoidd", "there is no loss_type 'sigmoidd' .did you mean `sigmoid`"),
    ("no_such_module:loss", "the module 'no_such_module' cannot be imported.*PYTHONPATH"),
    (f"{HERE}:sigmoyd", f"the module '{HERE}' has no function 'sigmoyd' .did you mean `sigmoid`"),
    (f"{HERE}:NOT_A_FUNCTION", "has no function 'NOT_A_FUNCTION'"),
]


@pytest.mark.parametrize(("name", "message"), BAD_LOSSES)
def test_an_unknown_loss_is_refused_with_the_recipe(name: str, message: str, recipes: Path) -> None:
    for value in (name, f"[sigmoid, {name!r}]"):
        with pytest.raises(RecipeError, match=f"loss_type.*{message}"):
            load_recipe(recipes / "3-dpo.yaml", [f"args.loss_type={value}"])
    with pytest.raises(TrainingError, match=message):
        PivotDPOConfig(loss_type=["sigmoid", name], bf16=False)


def test_a_recipe_takes_one_loss_or_a_list(recipes: Path) -> None:
    for value, names in (("hinge", ["hinge"]), (f"[sft, '{HERE}:sigmoid']", ["sft", f"{HERE}:sigmoid"])):
        loaded = load_recipe(recipes / "3-dpo.yaml", [f"args.loss_type={value}"])
        assert loaded.recipe.args["loss_type"] == names


@pytest.mark.parametrize(
    "settings", [{"ld_alpha": 0.5}, {"use_weighting": True}, {"f_divergence_type": "js_divergence"}]
)
def test_settings_that_do_not_reach_a_function_are_refused(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(TrainingError, match=f"{name} is for TRL.s losses alone; leave {name} or {HERE}:sigmoid out"):
        PivotDPOConfig(loss_type=[f"{HERE}:sigmoid"], bf16=False, **settings)
