"""Saliency maps: correct gradients of the right loss at the right tokens, and a model that is not changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pivot_hub.config.recipe import load_recipe
from pivot_hub.data.report import RowReport
from pivot_hub.explain.gradcam import (
    Explain,
    answer_batch,
    answer_log_probs,
    enlarge,
    gradient_map,
    inner_border,
    token_maps,
)
from pivot_hub.explain.image_maps import feature_layer
from pivot_hub.mllm.build import build_mllm
from pivot_hub.mllm.load import load_mllm
from pivot_hub.training.row_check import RowCheck
from tests.encoder.originals import IMAGE_PX, make_vision

QUESTION, RIGHT, WRONG = "What colour is the star?", "It is red.", "It is green."


@pytest.fixture(scope="module")
def mllm(trained: Path) -> tuple[Any, Any]:
    model, processor = load_mllm(trained / "3-dpo")
    return model.eval(), processor


@pytest.fixture(scope="module")
def reference(trained: Path) -> Any:
    return load_mllm(trained / "2-instruct")[0].eval()


@pytest.fixture(scope="module")
def image() -> Image.Image:
    pixels = np.random.default_rng(0).normal(128, 60, (IMAGE_PX, IMAGE_PX)).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")


def test_log_probs_are_those_of_the_model_alone(mllm: tuple[Any, Any], image: Image.Image) -> None:
    """Answers of different lengths share a batch; each log-probability equals that of the answer scored alone."""
    model, processor = mllm
    longer = "It is a large green star at the top left."
    with torch.no_grad():
        both = answer_log_probs(model, answer_batch(processor, image, QUESTION, [RIGHT, longer]))
        alone = [answer_log_probs(model, answer_batch(processor, image, QUESTION, [a]))[0] for a in (RIGHT, longer)]
    assert torch.allclose(both, torch.stack(alone), atol=1e-4)


def test_values_are_the_losses_of_trl(trained: Path, recipes: Path, mllm: tuple[Any, Any], reference: Any) -> None:
    """The SFT and DPO values equal the losses that TRL's trainers compute on the same row."""
    from pivot_hub.training import dpo, sft
    from pivot_hub.training.stage import trainer_arguments

    model, processor = mllm
    kinds: list[tuple[Any, Explain]] = [(sft, "sft"), (dpo, "dpo")]
    for module, explain in kinds:
        loaded = load_recipe(recipes / f"3-{explain}.yaml", ["data.0.rows=1"])
        args = trainer_arguments(loaded, trained / "unused")
        trainer = module.build_trainer(loaded, args, trained / "2-instruct", RowReport(), [])
        trainer.model.load_state_dict(model.state_dict())
        row = trainer.train_dataset[0]
        if "messages" in row:
            row |= {"prompt": row["messages"][:-1], "chosen": row["messages"][-1:]}
        text = {k: row[k][-1]["content"][-1]["text"] for k in ("prompt", "chosen", "rejected") if k in row}
        batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0]]))
        with torch.no_grad():
            loss = float(trainer.compute_loss(trainer.model.eval(), batch))
        explanation = gradient_map(
            model,
            processor,
            row["images"][0],
            text["prompt"],
            text["chosen"],
            explain,
            text.get("rejected"),
            reference,
        )
        # The trainer also scores Qwen's newline after the turn, which is not explained here.
        tolerance = 0.2 if explain == "sft" else 0.02
        assert explanation.value == pytest.approx(loss, rel=tolerance)


def test_gradient_equals_a_finite_difference(mllm: tuple[Any, Any], image: Image.Image) -> None:
    """A small change of one token of the projector's output changes the answer by that token's gradient."""
    model, processor = mllm
    model = model.double()
    try:
        batch = answer_batch(processor, image, QUESTION, [RIGHT])
        batch["pixel_values"] = batch["pixel_values"].double()
        gradients = gradient_map(model, processor, image, QUESTION, RIGHT).maps["gradient"]
        token, change = 5, {"by": 0.0, "channel": 0}

        def move(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            moved = output.clone()
            moved[:, token, int(change["channel"])] += change["by"]
            return moved

        hook = model.model.multi_modal_projector.register_forward_hook(move)
        total = 0.0
        with torch.no_grad():
            for channel in range(32):
                values = []
                for by in (1e-2, -1e-2):
                    change.update(by=by, channel=channel)
                    values.append(float(answer_log_probs(model, batch)[0]))
                total += abs(values[0] - values[1]) / 2e-2
        hook.remove()
        assert gradients[1, 1] == pytest.approx(total, rel=0.01)  # token 5 of a 4 x 4 grid; norms stay in float32
    finally:
        model.float()


def test_an_inner_layer_is_explained_by_its_own_gradient(mllm: tuple[Any, Any], image: Image.Image) -> None:
    """The map equals one computed by hand from a block's output and its gradient in a plain backward pass."""
    model, processor = mllm
    kept: dict[str, torch.Tensor] = {}
    block = model.model.vision_tower.encoder.layers[0]

    def keep(module: Any, inputs: Any, output: Any) -> None:
        kept["state"] = output if isinstance(output, torch.Tensor) else output[0]
        kept["state"].retain_grad()

    hook = block.register_forward_hook(keep)
    batch = answer_batch(processor, image, QUESTION, [RIGHT])
    batch["pixel_values"] = batch["pixel_values"].clone().requires_grad_()
    answer_log_probs(model, batch)[0].backward()
    hook.remove()
    model.zero_grad()
    state, gradient = kept["state"][0], kept["state"].grad
    assert gradient is not None
    expected = (gradient[0].mean(0) * state).sum(-1).relu().reshape(4, 4).detach().numpy()
    assert expected.max() > 0
    grad_cam = gradient_map(model, processor, image, QUESTION, RIGHT, layer=1).maps["gradcam"]
    assert np.allclose(grad_cam, expected, rtol=1e-4, atol=1e-8)


def test_the_last_layer_is_the_feature_layer(mllm: tuple[Any, Any], image: Image.Image) -> None:
    model, processor = mllm
    last = feature_layer(model)
    assert last == model.config.vision_config.num_hidden_layers - 1  # hidden layer -2 of the paper
    plain = gradient_map(model, processor, image, QUESTION, RIGHT)
    named = gradient_map(model, processor, image, QUESTION, RIGHT, layer=last)
    assert np.array_equal(plain.maps["gradcam"], named.maps["gradcam"])
    for wrong in (0, last + 1):
        with pytest.raises(ValueError, match=f"layer {wrong} is not one of 1 to {last}"):
            gradient_map(model, processor, image, QUESTION, RIGHT, layer=wrong)


def test_tokens_together_explain_the_answer(mllm: tuple[Any, Any], image: Image.Image) -> None:
    """The tokens' log-probabilities add up to the answer's, and an answer of one token has that token's maps."""
    model, processor = mllm
    tokens = token_maps(model, processor, image, QUESTION, RIGHT)
    whole = gradient_map(model, processor, image, QUESTION, RIGHT)
    assert sum(t.log_prob for t in tokens) == pytest.approx(whole.value, abs=1e-4)
    assert "".join(t.text for t in tokens).startswith(RIGHT)
    assert len({t.maps["gradient"].tobytes() for t in tokens}) == len(tokens)
    empty = gradient_map(model, processor, image, QUESTION, "")  # only the token that ends the turn
    (end,) = token_maps(model, processor, image, QUESTION, "")
    for method in ("gradcam", "gradient"):
        assert np.allclose(end.maps[method], empty.maps[method], rtol=1e-5, atol=1e-9)
    assert len(token_maps(model, processor, image, QUESTION, RIGHT, limit=2)) == 2


def test_dpo_value_of_the_reference_itself_is_log_two(
    reference: Any, mllm: tuple[Any, Any], image: Image.Image
) -> None:
    explanation = gradient_map(reference, mllm[1], image, QUESTION, RIGHT, "dpo", WRONG, reference)
    assert explanation.value == pytest.approx(np.log(2), abs=1e-5)


def test_sft_map_is_the_answers_map_scaled(mllm: tuple[Any, Any], image: Image.Image) -> None:
    answer = gradient_map(*mllm, image, QUESTION, RIGHT, "answer").maps
    sft = gradient_map(*mllm, image, QUESTION, RIGHT, "sft").maps
    for method in ("gradcam", "gradient"):
        a, b = answer[method], sft[method]
        assert a.max() > 0
        assert np.allclose(a / a.sum(), b / b.sum(), atol=1e-5)


def test_identical_answers_have_no_dpo_gradient(mllm: tuple[Any, Any], reference: Any, image: Image.Image) -> None:
    explanation = gradient_map(*mllm, image, QUESTION, RIGHT, "dpo", RIGHT, reference)
    assert np.abs(explanation.maps["gradient"]).max() < 1e-6


def test_the_model_is_not_changed(mllm: tuple[Any, Any], image: Image.Image) -> None:
    model, processor = mllm
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    gradient_map(model, processor, image, QUESTION, RIGHT)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert not any(p.grad is not None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_border_is_replaced_by_inner_neighbours() -> None:
    grid = np.arange(16.0).reshape(4, 4)
    assert inner_border(grid).tolist() == [[5, 5, 6, 6], [5, 5, 6, 6], [9, 9, 10, 10], [9, 9, 10, 10]]
    assert inner_border(grid[:2, :2]).tolist() == grid[:2, :2].tolist()


def test_enlarging_keeps_places() -> None:
    grid = np.zeros((4, 4))
    grid[1, 2] = 1
    large = enlarge(grid, (32, 32))
    peak = np.unravel_index(large.argmax(), large.shape)
    assert [int(p) // 8 for p in peak] == [1, 2]


def test_dpo_needs_a_rejected_answer_and_a_reference(mllm: tuple[Any, Any], image: Image.Image) -> None:
    with pytest.raises(ValueError, match="give `rejected` and `reference`"):
        gradient_map(*mllm, image, QUESTION, RIGHT, "dpo", WRONG)


def test_registers_are_left_out_of_the_map_and_counted_as_tokens(
    parts: Path, tmp_path: Path, image: Image.Image
) -> None:
    """Registers of an encoder enter the language model, but they have no place on the image."""
    vision = make_vision(tmp_path / "vision", "dinov2-registers")
    processor: Any
    model, processor = build_mllm(str(vision), str(parts / "language"))
    explanation = gradient_map(model.eval(), processor, image, QUESTION, RIGHT)
    assert {grid.shape for grid in explanation.maps.values()} == {(4, 4)}
    batch = answer_batch(processor, image, QUESTION, [RIGHT])
    check = RowCheck(processor, None, "conversation", pairs=False)
    assert check.images.count(image.height, image.width) == (batch["input_ids"] == processor.image_token_id).sum() == 20
