"""Overfitting one preference pair: the parent is unchanged, both losses fall, the maps change and are drawn."""

from __future__ import annotations

import json
import math
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
from pivot_hub.explain.gradcam import answer_batch, answer_log_probs, gradient_map
from pivot_hub.explain.overfit_pair import LOSSES, Loss, OverfitRun, PreferencePair, overfit_file, overfit_pair
from pivot_hub.mllm.load import load_mllm
from pivot_hub.provenance import weights_sha256
from tests.encoder.originals import IMAGE_PX

TEXTS = ("What colour is the star?", "It is red.", "It is green.")
# Higher than the defaults, because a random model of a few thousand weights learns faster.
LEARNING_RATES: dict[Loss, float] = {"sft": 5e-3, "dpo": 5e-3}


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
    return {loss: overfit_pair(*parent, pair, loss, (0, 6, 12), LEARNING_RATES[loss]) for loss in LOSSES}


def test_both_losses_fall_and_dpo_begins_at_log_two(runs: dict[Loss, OverfitRun]) -> None:
    for run in runs.values():
        assert len(run.losses) == len(run.answer) == len(run.rejected) == 13
        assert run.losses[12] < 0.7 * run.losses[0]
        assert [s.loss for s in run.snapshots] == pytest.approx([run.losses[k] for k in (0, 6, 12)], rel=1e-4)
    assert runs["dpo"].losses[0] == pytest.approx(math.log(2), abs=1e-6)
    gaps = {loss: (run.answer[0] - run.rejected[0], run.answer[12] - run.rejected[12]) for loss, run in runs.items()}
    assert gaps["dpo"][1] > gaps["dpo"][0] + 1
    assert runs["sft"].answer[12] > runs["sft"].answer[0]


def test_maps_change_and_start_as_the_parents(
    runs: dict[Loss, OverfitRun], parent: tuple[Any, Any], image: Image.Image
) -> None:
    for loss, run in runs.items():
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
    with pytest.raises(TrainingError, match=r"loss is nan after .* steps: lower its learning rate"):
        overfit_pair(*parent, pair, "sft", (30,), 1e30)


def test_the_command_writes_a_figure_and_its_values(
    trained: Path, tmp_path: Path, image: Image.Image, mask: np.ndarray
) -> None:
    image.resize((60, 40)).save(tmp_path / "scene.png")
    Image.fromarray(mask).resize((60, 40)).save(tmp_path / "mask.png")
    folder, sha256 = trained / "2-instruct", weights_sha256(trained / "2-instruct")
    texts = ["--question", TEXTS[0], "--answer", TEXTS[1], "--rejected", TEXTS[2], "--overfit", "--steps", "1,2"]
    outputs = ["--output", str(tmp_path / "o.png"), "--json", str(tmp_path / "o.json"), "--mask"]
    command = ["gradcam", str(folder), str(tmp_path / "scene.png"), *texts, "--learning-rate", "sft=1e-3,dpo=2e-3"]
    result = CliRunner().invoke(app, ["--debug", *command, *outputs, str(tmp_path / "mask.png")])
    assert result.exit_code == 0, result.output
    assert "dpo loss 0.6931 -> " in result.output
    results = json.loads((tmp_path / "o.json").read_text())
    assert results["parent"] == "tiny/2-instruct"
    assert [results[loss]["learning_rate"] for loss in LOSSES] == [1e-3, 2e-3]
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
        (["--learning-rate", "rl=1"], "'rl' is not a loss; give one of sft, dpo"),
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
