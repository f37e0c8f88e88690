"""Overfitting one preference pair: the parent is unchanged, the model learns, the maps change and are drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pivot_hub.cli import app
from pivot_hub.errors import DataError, PivotError, TrainingError
from pivot_hub.explain.answer_group import completion_batch, draw_group
from pivot_hub.explain.figure import draw_rows
from pivot_hub.explain.gradcam import answer_batch, answer_log_probs, gradient_map, group_gradient_map
from pivot_hub.explain.overfit_pair import (
    LOSSES,
    Groups,
    Loss,
    OverfitRun,
    PreferencePair,
    figure_rows,
    overfit_file,
    overfit_pair,
)
from pivot_hub.mllm.load import load_mllm
from pivot_hub.provenance import weights_sha256
from tests.encoder.originals import IMAGE_PX
from tests.mllm.tiny_mllms import make_mllm
from tests.mllm.tiny_processors import add_processor

TEXTS = ("What colour is the star?", "It is red.", "It is green.")
# Higher than the defaults, because a random model of a few thousand weights learns faster.
LEARNING_RATES: dict[Loss, float] = {"sft": 5e-3, "dpo": 5e-3, "grpo": 2e-2}


def plainness(texts: Sequence[str]) -> list[float]:
    """Reward an answer by its share of ASCII characters: a random model never gives the right one."""
    return [sum(map(str.isascii, text)) / max(len(text), 1) for text in texts]


# In 12 steps the mean reward of one of six seeds did not rise with groups of 8; with 16 all rose by 0.10 to 0.13.
GROUPS = Groups(reward=plainness, answers=16)


@pytest.fixture(scope="module")
def parent(trained: Path) -> tuple[Any, Any]:
    model, processor = load_mllm(trained / "2-instruct")
    return model.eval(), processor


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.effect_noise((IMAGE_PX, IMAGE_PX), 90).convert("RGB")


@pytest.fixture(scope="module")
def mask() -> np.ndarray:
    upper_half = np.zeros((IMAGE_PX, IMAGE_PX), bool)
    upper_half[: IMAGE_PX // 2] = True
    return upper_half


@pytest.fixture(scope="module")
def pair(image: Image.Image, mask: np.ndarray) -> PreferencePair:
    return PreferencePair(image, *TEXTS, mask)


@pytest.fixture(scope="module")
def runs(parent: tuple[Any, Any], pair: PreferencePair) -> dict[Loss, OverfitRun]:
    return {loss: overfit_pair(*parent, pair, loss, (0, 6, 12), LEARNING_RATES[loss], groups=GROUPS) for loss in LOSSES}


def test_losses_fall_and_rewards_rise_and_dpo_begins_at_log_two(runs: dict[Loss, OverfitRun]) -> None:
    for loss, run in runs.items():
        assert len(run.losses) == len(run.answer) == len(run.rejected) == 13
        assert len(run.rewards) == len(run.without_gradient) == (13 if loss == "grpo" else 0)
        assert loss == "grpo" or run.losses[12] < 0.7 * run.losses[0]
        assert [s.loss for s in run.snapshots] == pytest.approx([run.losses[k] for k in (0, 6, 12)], rel=1e-4, abs=1e-5)
    rewards = runs["grpo"].rewards
    assert sum(rewards[-4:]) > sum(rewards[:4]) + 0.2
    assert runs["dpo"].losses[0] == pytest.approx(math.log(2), abs=1e-6)
    gaps = {loss: (run.answer[0] - run.rejected[0], run.answer[12] - run.rejected[12]) for loss, run in runs.items()}
    assert gaps["dpo"][1] > gaps["dpo"][0] + 1
    assert runs["sft"].answer[12] > runs["sft"].answer[0]


def test_maps_change_and_start_as_the_parents(
    runs: dict[Loss, OverfitRun], parent: tuple[Any, Any], image: Image.Image
) -> None:
    for loss, run in runs.items():
        if loss == "grpo":
            group = draw_group(*parent, image, TEXTS[0], plainness, GROUPS.answers, seed=(0, 0, 0))
            assert run.snapshots[0].group == group
            first = group_gradient_map(*parent, image, TEXTS[0], group).maps
        else:
            first = gradient_map(*parent, image, TEXTS[0], TEXTS[1], loss, TEXTS[2], parent[0]).maps
        assert [s.step for s in run.snapshots] == [0, 6, 12]
        for method in ("gradcam", "gradient"):
            grids = [s.maps[method] for s in run.snapshots]
            assert np.allclose(grids[0], first[method])
            shares = [g / g.sum() for g in grids if g.sum() > 0]
            assert all(np.abs(a - b).max() > 1e-3 for a, b in pairwise(shares))
            assert all(g.min() >= 0 for g in grids)
        scores = run.snapshots[2].scores
        assert scores is not None
        gradient = run.snapshots[2].maps["gradient"]
        assert scores["gradient"]["energy_inside"] == pytest.approx(
            gradient[: len(gradient) // 2].sum() / gradient.sum(), abs=0.1
        )


def test_sft_run_is_a_plain_loop(trained: Path, image: Image.Image, runs: dict[Loss, OverfitRun]) -> None:
    """The run equals three steps written by hand, for a model that is given only the right answer."""
    model, processor = load_mllm(trained / "2-instruct")
    optimizer = torch.optim.AdamW(model.eval().parameters(), lr=LEARNING_RATES["sft"], weight_decay=0.0)
    batch = answer_batch(processor, image, TEXTS[0], [TEXTS[1]])
    losses = []
    for _ in range(4):
        loss = -answer_log_probs(model, batch)[0] / batch["completion_mask"].sum()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert runs["sft"].losses[:4] == pytest.approx(losses, rel=1e-4)


def test_grpo_run_draws_from_the_current_model_and_skips_steps_without_a_gradient(
    trained: Path, image: Image.Image, parent: tuple[Any, Any], pair: PreferencePair
) -> None:
    """The run equals four steps written by hand, of which the third has the same reward for all answers."""

    def equal_at_third_call(texts: Sequence[str]) -> list[float]:
        drawn.append(list(texts))
        return [1.0] * len(texts) if len(drawn) == 3 else plainness(texts)

    model, processor = load_mllm(trained / "2-instruct")
    optimizer = torch.optim.AdamW(model.eval().parameters(), lr=1e-2, weight_decay=0.0)
    pair_batch = answer_batch(processor, image, TEXTS[0], [TEXTS[1]])
    log_probs, losses = [], []
    drawn: list[list[str]] = []
    for step in range(5):
        log_probs.append(float(answer_log_probs(model, pair_batch)[0].detach()))
        group = draw_group(model, processor, image, TEXTS[0], equal_at_third_call, 4, seed=(7, step, 0))
        rewards = torch.tensor(group.rewards)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        batch = completion_batch(processor, image, TEXTS[0], group.ids)
        lengths = batch["completion_mask"].sum(1)
        loss = -(advantages * answer_log_probs(model, batch)).sum() / lengths.sum()
        losses.append(float(-(advantages * lengths).sum() / lengths.sum()))
        if step != 2:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    expected, drawn = drawn, []
    groups = Groups(equal_at_third_call, answers=4, seed=7)
    run = overfit_pair(*parent, pair, "grpo", (4,), 1e-2, groups=groups)
    assert drawn[:5] == expected
    assert run.without_gradient == [False, False, True, False, False]
    assert run.rewards[2] == 1.0
    assert run.answer == pytest.approx(log_probs, rel=1e-3)
    assert run.losses == pytest.approx(losses, rel=1e-3, abs=1e-5)
    assert run.answer[3] == run.answer[2] != run.answer[1]
    assert run.to_dict()["share_without_gradient"] == 0.25


def test_grpo_without_a_right_answer_says_so_and_its_map_comes_from_a_later_draw(
    parent: tuple[Any, Any], pair: PreferencePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pivot_hub.explain.overfit_pair.DRAWS", 3)
    never = overfit_pair(*parent, pair, "grpo", (0, 2), 1e-2, groups=Groups(answers=2))  # rewarded if right
    assert never.without_gradient == [True] * 3
    assert never.answer[0] == never.answer[2]
    assert never.to_dict()["share_without_gradient"] == 1
    assert [(s.maps, s.scores, s.draws) for s in never.snapshots] == [({}, None, 3)] * 2
    rows = figure_rows([never], pair.image, pair.mask)
    assert rows[0][3][0][0] == "step 0, mean reward 0\nno gradient in 3 draws"
    draw_rows(rows, tmp_path / "never.png", rows_per_scale=1)
    assert (tmp_path / "never.png").stat().st_size > 0

    calls = []

    def at_the_third_call(texts: Sequence[str]) -> list[float]:
        calls.append(texts)
        return plainness(texts) if len(calls) == 3 else [0.0] * len(texts)

    groups = Groups(at_the_third_call, answers=2)  # the step's own draw, then the same again for its map, and one more
    (later,) = overfit_pair(*parent, pair, "grpo", (0,), 1e-2, groups=groups).snapshots
    assert later.draws == 2
    assert later.group is not None
    assert later.group.texts == calls[2] != calls[1]
    assert later.maps["gradient"].max() > 0
    assert later.to_dict()["answers"] == calls[2]


def test_the_parent_is_not_changed(trained: Path, image: Image.Image) -> None:
    model, processor = load_mllm(trained / "2-instruct")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    requires_grad = {k: p.requires_grad for k, p in model.named_parameters()}
    pair = PreferencePair(image, *TEXTS)
    first, second = (overfit_pair(model, processor, pair, "dpo", (2,), 1e-3) for _ in range(2))
    assert first.losses == second.losses
    assert np.array_equal(first.snapshots[0].maps["gradcam"], second.snapshots[0].maps["gradcam"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {k: p.requires_grad for k, p in model.named_parameters()} == requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_that_explodes_is_reported(parent: tuple[Any, Any], pair: PreferencePair) -> None:
    for loss in LOSSES:
        with pytest.raises(TrainingError, match=rf"not finite after .* steps: lower the {loss} learning rate"):
            overfit_pair(*parent, pair, loss, (30,), 1e30, groups=GROUPS)


def test_the_command_writes_a_figure_and_its_values(
    trained: Path, tmp_path: Path, image: Image.Image, mask: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pivot_hub.explain.overfit_pair.DRAWS", 2)
    image.resize((60, 40)).save(tmp_path / "scene.png")
    Image.fromarray(mask).resize((60, 40)).save(tmp_path / "mask.png")
    folder, sha256 = trained / "2-instruct", weights_sha256(trained / "2-instruct")
    texts = ["--question", TEXTS[0], "--answer", TEXTS[1], "--rejected", TEXTS[2], "--overfit", "--steps", "1,2"]
    outputs = ["--output", str(tmp_path / "o.png"), "--json", str(tmp_path / "o.json"), "--mask"]
    command = ["gradcam", str(folder), str(tmp_path / "scene.png"), *texts, "--learning-rate", "sft=1e-3,dpo=2e-3"]
    command += ["--generations", "3", "--seed", "2"]
    result = CliRunner().invoke(app, ["--debug", *command, *outputs, str(tmp_path / "mask.png")])
    assert result.exit_code == 0, result.output
    assert "dpo loss 0.6931 -> " in result.output
    assert "grpo mean reward 0.0000 -> 0.0000 after 2 steps" in result.output
    assert "grpo: 100% of the steps had no gradient" in result.output
    results = json.loads((tmp_path / "o.json").read_text())
    assert results["parent"] == "tiny/2-instruct"
    assert [results[loss]["learning_rate"] for loss in LOSSES] == [1e-3, 2e-3, 3e-5]
    assert (results["generations"], results["seed"], results["grpo"]["rewards"]) == (3, 2, [0, 0, 0])
    assert results["target_area"] == pytest.approx(0.5, abs=0.05)
    assert [snapshot["step"] for snapshot in results["dpo"]["moments"]] == [1, 2]
    assert str(tmp_path) not in (tmp_path / "o.json").read_text()
    with Image.open(tmp_path / "o.png") as figure:
        assert figure.width > 3 * 2.4 * 130 * 0.9
    assert weights_sha256(folder) == sha256


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--steps", "few"], "--steps 'few': give numbers"),
        (["--learning-rate", "fast"], "--learning-rate 'fast': give numbers"),
        (["--learning-rate", "rl=1"], "'rl' is not a loss; give one of sft, dpo, grpo"),
        (["--rejected", "?", "--generations", "1"], "give two or more"),
        ([], "give --rejected"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(option: list[str], message: str) -> None:
    command = ["--debug", "gradcam", "a", "b", "--question", "?", "--answer", "!", "--overfit", *option]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, PivotError)
    assert message in str(result.exception)


def test_bad_input_is_refused_with_an_error_message(trained: Path, tmp_path: Path, image: Image.Image) -> None:
    image.save(tmp_path / "scene.png")
    Image.new("L", (9, 9)).save(tmp_path / "small.png")
    Image.new("L", image.size).save(tmp_path / "black.png")
    files = (trained / "2-instruct", tmp_path / "scene.png")
    with pytest.raises(DataError, match="give --rejected"):
        overfit_file(*files, TEXTS[0], TEXTS[1], None)
    with pytest.raises(DataError, match="give whole numbers from 0 on"):
        overfit_file(*files, *TEXTS, steps=[0])
    with pytest.raises(DataError, match="give positive ones"):
        overfit_file(*files, *TEXTS, learning_rates={"dpo": 0.0})
    with pytest.raises(DataError, match="give a mask of the image's size"):
        overfit_file(*files, *TEXTS, mask=tmp_path / "small.png")
    with pytest.raises(DataError, match="nothing of it is left"):
        overfit_file(*files, *TEXTS, mask=tmp_path / "black.png")


def test_a_tower_of_native_resolution_is_drawn_in_the_shape_of_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen2.5-VL on a wide image with a mask of its right half, by the command."""
    monkeypatch.setattr("pivot_hub.explain.overfit_pair.DRAWS", 2)
    make_mllm(tmp_path / "qwen", "qwen2_5_vl")
    add_processor(tmp_path / "qwen", "qwen2_5_vl")
    Image.effect_noise((140, 56), 90).convert("RGB").save(tmp_path / "wide.png")
    right = Image.new("L", (140, 56))
    right.paste(255, (70, 0, 140, 56))
    right.save(tmp_path / "mask.png")
    question, answer, rejected = TEXTS
    texts = ["--question", question, "--answer", answer, "--rejected", rejected]
    files = ["--output", str(tmp_path / "maps.png"), "--json", str(tmp_path / "maps.json")]
    command = ["gradcam", str(tmp_path / "qwen"), str(tmp_path / "wide.png"), *texts, *files]
    overfit = ["--overfit", "--steps", "0,2", "--learning-rate", "5e-3", "--mask", str(tmp_path / "mask.png")]
    result = CliRunner().invoke(app, [*command, *overfit])
    assert result.exit_code == 0, result.output
    values = json.loads((tmp_path / "maps.json").read_text())
    assert values["target_area"] == pytest.approx(0.5)
    for loss in ("sft", "dpo"):  # random weights never give GRPO's right answer
        assert values[loss]["losses"][-1] < values[loss]["losses"][0]
        maps = values[loss]["moments"][-1]["maps"]
        assert (np.shape(maps["gradcam"]), np.shape(maps["gradient"])) == ((4, 10), (2, 5))
    with Image.open(tmp_path / "maps.png") as figure:
        assert figure.width > 0
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert np.shape(json.loads((tmp_path / "maps.json").read_text())["maps"]["gradcam"]) == (4, 10)
