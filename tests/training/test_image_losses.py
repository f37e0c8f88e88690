"""Losses that compare two images: equal to a plain implementation on TRL's own batches, whatever the options."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from pivot_hub.errors import DataError, TrainingError
from pivot_hub.training.dpo import PivotDPOConfig, PivotDPOTrainer
from pivot_hub.training.losses import NAMED_LOSSES, compares_images
from tests.training.test_tree_layout import (
    ALL_OFF,
    EVERY,
    ROWS,
    Models,
    assert_same,
    models,
    noise_image,
    step,
    trainer,
)

__all__ = ["models"]  # the fixture
BETA = 0.1
IMAGE_ROWS = [{**row, "rejected_images": [noise_image(10 + i)]} for i, row in enumerate(ROWS)]
MIXED: dict[str, Any] = {
    "loss_type": ["sigmoid", "image_sigmoid", "anchor", "image_symmetric"],
    "loss_weights": [1.0, 0.5, 2.0, 0.25],
}


def plain(name: str, r: dict[str, Tensor]) -> Tensor:
    """The losses once more, of the ratio of each answer (c, r) given each image (i, j)."""
    if name == "image_sigmoid":
        return -torch.log(1 / (1 + torch.exp(-BETA * (r["ci"] - r["cj"]))))
    if name == "anchor":
        return -torch.log(1 / (1 + torch.exp(-BETA * r["ci"])))
    own = torch.log(1 / (1 + torch.exp(-BETA * (r["ci"] - r["ri"]))))
    if name == "sigmoid":
        return -own
    return -0.5 * (own + torch.log(1 / (1 + torch.exp(-BETA * (r["rj"] - r["cj"])))))


def log_probs(model: Any, processor: Any, rows: list[dict[str, Any]]) -> tuple[Tensor, ...]:
    """Log-probabilities of chosen and rejected answers on TRL's own batch."""
    batch = DataCollatorForVisionPreference(processor)([{k: deepcopy(v) for k, v in row.items()} for row in rows])
    mask = batch.pop("completion_mask")[:, 1:]
    logits = model(**batch, use_cache=False).logits[:, :-1].log_softmax(-1)
    return tuple((logits.gather(2, batch["input_ids"][:, 1:, None])[..., 0] * mask).sum(1).chunk(2))


def expected_step(models: Models, rows: list[dict[str, Any]], weights: dict[str, float]) -> Any:
    """Loss and gradients of one batch."""
    policy, reference, processor = models
    model = deepcopy(policy).train()
    others = [{**row, "images": row["rejected_images"]} for row in rows]
    texts = [[{k: v for k, v in row.items() if k != "rejected_images"} for row in part] for part in (rows, others)]
    ratios = {}
    for image, part in zip("ij", texts, strict=True):
        with torch.no_grad():
            behind = log_probs(reference.eval(), processor, part)
        for answer, now, before in zip("cr", log_probs(model, processor, part), behind, strict=True):
            ratios[f"{answer}{image}"] = now - before
    loss = sum(weight * plain(name, ratios).mean() for name, weight in weights.items())
    assert isinstance(loss, Tensor)
    loss.backward()
    return loss.item(), {}, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def without_metrics(result: Any) -> Any:
    return result[0], {}, result[2]


@pytest.mark.parametrize("name", NAMED_LOSSES)
def test_formulas_and_their_gradients(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = {"chosen": "ci", "rejected": "ri", "other_chosen": "cj", "other_rejected": "rj"}
    logps = {k: torch.randn(7, generator=generator, dtype=torch.float64) * 20 for k in keys}
    ref = {k: torch.randn(7, generator=generator, dtype=torch.float64) * 20 for k in keys}
    expected = plain(name, {short: logps[k] - ref[k] for k, short in keys.items()})

    def loss(*values: Tensor) -> Tensor:
        named = {f"{k}_logps": v for k, v in zip(keys, values, strict=True)}
        return NAMED_LOSSES[name](**named, **{f"ref_{k}_logps": v for k, v in ref.items()}, beta=BETA)

    assert loss(*logps.values()).tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    assert torch.autograd.gradcheck(loss, tuple(v.requires_grad_() for v in logps.values()))


@pytest.mark.parametrize(
    "enabled", [ALL_OFF, *EVERY], ids=lambda s: "+".join(n for n, on in s.items() if on) or "no option"
)
def test_a_mixture_is_equal_under_any_options(enabled: dict[str, bool], models: Models, tmp_path: Path) -> None:
    ours = trainer(models, tmp_path, enabled, IMAGE_ROWS, **MIXED)
    weights = dict(zip(MIXED["loss_type"], MIXED["loss_weights"], strict=True))
    for rows in (IMAGE_ROWS, IMAGE_ROWS[1:2]):
        assert_same(without_metrics(step(ours, rows)), expected_step(models, rows, weights))


@pytest.mark.parametrize("name", NAMED_LOSSES)
def test_each_loss_alone_is_equal(name: str, models: Models, tmp_path: Path) -> None:
    ours = trainer(models, tmp_path, {}, IMAGE_ROWS, loss_type=name)
    result = step(ours, IMAGE_ROWS)
    assert_same(without_metrics(result), expected_step(models, IMAGE_ROWS, {name: 1.0}))
    assert ("rewards/image_accuracies" in result[1]) == (name != "anchor")


def test_metrics_of_text_are_trls_and_those_of_images_follow_the_ratios(models: Models, tmp_path: Path) -> None:
    theirs = step(trainer(models, tmp_path / "trl", None), ROWS)
    ours = step(trainer(models, tmp_path, {}, IMAGE_ROWS, loss_type=["sigmoid", "image_sigmoid"]), IMAGE_ROWS)
    margin = ours[1].pop("rewards/image_margins")
    accuracy = ours[1].pop("rewards/image_accuracies")
    assert ours[1] == pytest.approx(theirs[1], rel=1e-4, abs=1e-5)
    policy, reference, processor = models
    ratios = []
    for images in ([row["images"] for row in IMAGE_ROWS], [row["rejected_images"] for row in IMAGE_ROWS]):
        rows = [{**row, "images": i} for row, i in zip(ROWS, images, strict=True)]
        with torch.no_grad():
            ratios.append(log_probs(policy, processor, rows)[0] - log_probs(reference, processor, rows)[0])
    margins = BETA * (ratios[0] - ratios[1])
    assert margin == pytest.approx(margins.mean().item(), rel=1e-3, abs=1e-5)
    assert accuracy == pytest.approx((margins > 0).float().mean().item())


def test_text_losses_do_not_read_rejected_images(models: Models, tmp_path: Path) -> None:
    broken = [{**row, "rejected_images": ["no such file.png"]} for row in ROWS]
    ours = trainer(models, tmp_path, {}, broken, loss_type=["sigmoid", "anchor"])
    theirs = trainer(models, tmp_path, {}, loss_type=["sigmoid", "anchor"])
    assert_same(step(ours, broken), step(theirs, ROWS))


def test_training_on_a_stored_dataset_with_the_defaults_of_transformers(models: Models, tmp_path: Path) -> None:
    """remove_unused_columns keeps the rejected images, and the loss goes down."""
    policy, _, processor = models
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 4,
        "learning_rate": 1e-3,
        "bf16": False,
    }
    ours = PivotDPOTrainer(
        model=deepcopy(policy),
        args=PivotDPOConfig(
            str(tmp_path / "run"), **MIXED, **settings, reference_cache=str(tmp_path / "references"), report_to="none"
        ),
        train_dataset=Dataset.from_list(IMAGE_ROWS),
        processing_class=processor,
    )
    ours.train()
    start = math.log(2) * sum(MIXED["loss_weights"])  # where policy and reference are equal
    assert ours.evaluate(Dataset.from_list(IMAGE_ROWS))["eval_loss"] < start - 0.05
    assert "eval_rewards/image_margins" in ours.state.log_history[-1]


def own_image_loss(*, other_rejected_logps: Tensor, ref_other_rejected_logps: Tensor, **_: Any) -> Tensor:
    return other_rejected_logps - ref_other_rejected_logps


def test_a_function_of_the_user_may_read_the_rejected_image(models: Models, tmp_path: Path) -> None:
    name = f"{__name__}:own_image_loss"
    assert compares_images(["sigmoid", name])
    result = step(trainer(models, tmp_path, {}, IMAGE_ROWS, loss_type=name), IMAGE_ROWS)
    policy, reference, processor = models
    rows = [{**row, "images": image_row["rejected_images"]} for row, image_row in zip(ROWS, IMAGE_ROWS, strict=True)]
    with torch.no_grad():
        ratio = log_probs(policy, processor, rows)[1] - log_probs(reference, processor, rows)[1]
    assert result[0] == pytest.approx(ratio.mean().item(), rel=1e-4)


def test_rows_without_an_image_to_compare_with_are_refused(models: Models, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="image_sigmoid compares two images, and the train dataset has no column"):
        trainer(models, tmp_path, {}, loss_type=["sigmoid", "image_sigmoid"])
    ours = trainer(models, tmp_path, {"cache_reference": False}, IMAGE_ROWS, loss_type="image_sigmoid")
    same = {**IMAGE_ROWS[0], "rejected_images": IMAGE_ROWS[0]["images"]}
    with pytest.raises(DataError, match="image and rejected image are the same; give one that the answer does not"):
        step(ours, [same])
    two = {**IMAGE_ROWS[0], "rejected_images": [noise_image(7), noise_image(8)]}
    with pytest.raises(DataError, match="1 images and 2 rejected ones; give each image its rejected one"):
        step(ours, [two])
    with pytest.raises(DataError, match=r"the row with the prompt .* has no rejected image"):
        step(ours, [IMAGE_ROWS[0], {**IMAGE_ROWS[1], "rejected_images": None}])


def test_settings_of_trls_losses_are_refused() -> None:
    with pytest.raises(TrainingError, match="ld_alpha is for TRL's losses alone; leave ld_alpha or anchor out"):
        PivotDPOConfig(loss_type=["sigmoid", "anchor"], ld_alpha=0.5, bf16=False)
