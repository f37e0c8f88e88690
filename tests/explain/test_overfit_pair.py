"""One pair overfitted: a plain loop from an untouched parent, both losses falling, maps that move, a figure of both."""

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
from pivot_hub.explain.overfit_pair import LOSSES, Loss, OverfitRun, overfit_file, overfit_pair
from pivot_hub.mllm.load import load_mllm
from pivot_hub.provenance import weights_sha256
from tests.encoder.originals import IMAGE_PX

PAIR = ("What colour is the star?", "It is red.", "It is green.")
RATES: dict[Loss, float] = {"sft": 5e-3, "dpo": 5e-3}  # a random model of a few thousand weights learns faster


@pytest.fixture(scope="module")
def parent(trained: Path) -> tuple[Any, Any]:
    model, processor = load_mllm(trained / "2-instruct")
    return model.eval(), processor


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.effect_noise((IMAGE_PX, IMAGE_PX), 90).convert("RGB")


@pytest.fixture(scope="module")
def mask() -> np.ndarray:
    made = np.zeros((IMAGE_PX, IMAGE_PX), bool)
    made[: IMAGE_PX // 2] = True
    return made


@pytest.fixture(scope="module")
def runs(parent: tuple[Any, Any], image: Image.Image, mask: np.ndarray) -> dict[Loss, OverfitRun]:
    return {loss: overfit_pair(*parent, image, *PAIR, loss, (0, 6, 12), RATES[loss], mask=mask) for loss in LOSSES}


def test_both_losses_fall_and_dpo_begins_at_log_two(runs: dict[Loss, OverfitRun]) -> None:
    for run in runs.values():
        assert len(run.losses) == len(run.answer) == len(run.rejected) == 13
        assert run.losses[12] < 0.7 * run.losses[0]
        assert [m.loss for m in run.moments] == pytest.approx([run.losses[k] for k in (0, 6, 12)], rel=1e-4)
    assert runs["dpo"].losses[0] == pytest.approx(math.log(2), abs=1e-6)
    gaps = {loss: (run.answer[0] - run.rejected[0], run.answer[12] - run.rejected[12]) for loss, run in runs.items()}
    assert gaps["dpo"][1] > gaps["dpo"][0] + 1
    assert runs["sft"].answer[12] > runs["sft"].answer[0]


def test_maps_move_and_begin_as_the_parents(
    runs: dict[Loss, OverfitRun], parent: tuple[Any, Any], image: Image.Image
) -> None:
    for loss, run in runs.items():
        first = gradient_map(*parent, image, PAIR[0], PAIR[1], loss, PAIR[2], parent[0]).maps
        assert [m.step for m in run.moments] == [0, 6, 12]
        for method in ("gradcam", "gradient"):
            grids = [m.maps[method] for m in run.moments]
            assert np.allclose(grids[0], first[method])
            shares = [g / g.sum() for g in grids if g.sum() > 0]
            assert all(np.abs(a - b).max() > 1e-3 for a, b in pairwise(shares))
            assert all(g.min() >= 0 for g in grids)
        scores = run.moments[2].scores
        assert scores is not None
        gradient = run.moments[2].maps["gradient"]
        assert scores["gradient"]["energy_inside"] == pytest.approx(
            gradient[: len(gradient) // 2].sum() / gradient.sum(), abs=0.1
        )


def test_sft_run_is_a_plain_loop(trained: Path, image: Image.Image, runs: dict[Loss, OverfitRun]) -> None:
    """Three steps written by hand, of a model that only ever sees the right answer."""
    model, processor = load_mllm(trained / "2-instruct")
    optimizer = torch.optim.AdamW(model.eval().parameters(), lr=RATES["sft"], weight_decay=0.0)
    batch = answer_batch(processor, image, PAIR[0], [PAIR[1]])
    losses = []
    for _ in range(4):
        loss = -answer_log_probs(model, batch)[0] / batch["completion_mask"].sum()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert runs["sft"].losses[:4] == pytest.approx(losses, rel=1e-4)


def test_the_parent_is_left_as_it_was(trained: Path, image: Image.Image) -> None:
    model, processor = load_mllm(trained / "2-instruct")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    asked = {k: p.requires_grad for k, p in model.named_parameters()}
    made = [overfit_pair(model, processor, image, *PAIR, "dpo", (2,), 1e-3) for _ in range(2)]
    assert made[0].losses == made[1].losses
    assert np.array_equal(made[0].moments[0].maps["gradcam"], made[1].moments[0].maps["gradcam"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {k: p.requires_grad for k, p in model.named_parameters()} == asked
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_that_explodes_is_said(parent: tuple[Any, Any], image: Image.Image) -> None:
    with pytest.raises(TrainingError, match=r"loss is nan after .* steps: lower its learning rate"):
        overfit_pair(*parent, image, *PAIR, "sft", (30,), 1e30)


def test_command(trained: Path, tmp_path: Path, image: Image.Image, mask: np.ndarray) -> None:
    image.resize((60, 40)).save(tmp_path / "scene.png")
    Image.fromarray(mask).resize((60, 40)).save(tmp_path / "mask.png")
    folder, sha256 = trained / "2-instruct", weights_sha256(trained / "2-instruct")
    texts = ["--question", PAIR[0], "--answer", PAIR[1], "--rejected", PAIR[2], "--overfit", "--steps", "1,2"]
    outputs = ["--output", str(tmp_path / "o.png"), "--json", str(tmp_path / "o.json"), "--mask"]
    command = ["gradcam", str(folder), str(tmp_path / "scene.png"), *texts, "--learning-rate", "sft=1e-3,dpo=2e-3"]
    done = CliRunner().invoke(app, ["--debug", *command, *outputs, str(tmp_path / "mask.png")])
    assert done.exit_code == 0, done.output
    assert "dpo loss 0.6931 -> " in done.output
    metadata = json.loads((tmp_path / "o.json").read_text())
    assert (metadata["parent"], metadata["sft"]["learning_rate"], metadata["dpo"]["learning_rate"]) == (
        "tiny/2-instruct",
        1e-3,
        2e-3,
    )
    assert metadata["target_area"] == pytest.approx(0.5, abs=0.05)
    assert [m["step"] for m in metadata["dpo"]["moments"]] == [1, 2]
    assert str(tmp_path) not in (tmp_path / "o.json").read_text()
    with Image.open(tmp_path / "o.png") as figure:
        assert figure.width > 3 * 2.4 * 130 * 0.9
    assert weights_sha256(folder) == sha256


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--steps", "few"], "--steps 'few': give numbers"),
        (["--learning-rate", "fast"], "--learning-rate 'fast': give numbers"),
        (["--learning-rate", "rl=1"], "'rl' is not a loss; give one of sft, dpo"),
        ([], "give --rejected"),
    ],
)
def test_bad_options_are_said_before_anything_is_loaded(option: list[str], said: str) -> None:
    asked = ["--debug", "gradcam", "a", "b", "--question", "?", "--answer", "!", "--overfit", *option]
    done = CliRunner().invoke(app, asked)
    assert isinstance(done.exception, PivotError)
    assert said in str(done.exception)


def test_bad_input_is_one_sentence(trained: Path, tmp_path: Path, image: Image.Image) -> None:
    image.save(tmp_path / "scene.png")
    Image.new("L", (9, 9)).save(tmp_path / "small.png")
    Image.new("L", image.size).save(tmp_path / "black.png")
    where = (trained / "2-instruct", tmp_path / "scene.png")
    with pytest.raises(DataError, match="give --rejected"):
        overfit_file(*where, PAIR[0], PAIR[1], None)
    with pytest.raises(DataError, match="give whole numbers from 0 on"):
        overfit_file(*where, *PAIR, steps=[0])
    with pytest.raises(DataError, match="give positive ones"):
        overfit_file(*where, *PAIR, rates={"dpo": 0.0})
    with pytest.raises(DataError, match="give a mask of the image's size"):
        overfit_file(*where, *PAIR, mask=tmp_path / "small.png")
    with pytest.raises(DataError, match="nothing of it is left"):
        overfit_file(*where, *PAIR, mask=tmp_path / "black.png")
