"""The GRPO loss of a group of answers: it is TRL's, its map is its gradient, and without a gradient there is no map."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from trl import GRPOConfig, GRPOTrainer
from typer.testing import CliRunner

from pivot_hub.cli import app
from pivot_hub.errors import DataError, PivotError
from pivot_hub.explain.answer_group import MAX_TOKENS, AnswerGroup, completion_batch, draw_group, right_answer
from pivot_hub.explain.gradcam import (
    answer_batch,
    answer_log_probs,
    gradient_map,
    group_gradient_map,
    group_loss,
    token_log_probs,
)
from pivot_hub.mllm.inputs import process
from pivot_hub.mllm.load import load_mllm
from tests.encoder.originals import IMAGE_PX

QUESTION, RIGHT, WRONG = "What colour is the star?", "It is red.", "It is a large green star at the top left."


@pytest.fixture(scope="module")
def mllm(trained: Path) -> tuple[Any, Any]:
    model, processor = load_mllm(trained / "2-instruct")
    return model.eval(), processor


@pytest.fixture(scope="module")
def image() -> Image.Image:
    pixels = np.random.default_rng(0).normal(128, 60, (IMAGE_PX, IMAGE_PX)).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")


def length(texts: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in texts]


def test_loss_and_gradient_are_those_of_trls_trainer(
    mllm: tuple[Any, Any], image: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With TRL's defaults: the same completions, of different lengths, one of them cut off, and the same rewards."""
    model, processor = deepcopy(mllm)
    group = draw_group(model, processor, image, QUESTION, length, answers=4, max_tokens=9)
    ids = [row[: 3 + i] for i, row in enumerate(group.ids)]
    ids[0][-1] = processor.tokenizer.eos_token_id
    group = AnswerGroup(group.texts, ids, [0.0, 1.0, 0.25, 1.0])
    batch = completion_batch(processor, image, QUESTION, group.ids)
    loss = group_loss(token_log_probs(model, batch), batch, group)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    row = {"images": [image], "prompt": [{"role": "user", "content": content}]}
    dataset = Dataset.from_dict({"row": [0]})
    dataset.set_transform(lambda rows: {name: [deepcopy(value)] for name, value in row.items()})
    args = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        report_to="none",
    )
    processor.tokenizer.padding_side = "left"

    def rewards(completions: list[Any], **columns: Any) -> list[float | None]:
        return [*group.rewards]

    trainer: Any = GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=args,
        train_dataset=dataset,
        processing_class=processor,
    )
    monkeypatch.setattr(trainer, "_generate_single_turn", lambda *args, **kwargs: (group.ids, None))
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    inputs = trainer._prepare_inputs([deepcopy(row) for _ in range(4)])
    # TRL shuffles the answers.
    assert torch.allclose(inputs["advantages"].sort().values, group.advantages().sort().values, atol=1e-6)
    expected = trainer.compute_loss(trainer.model, inputs)
    expected.backward()
    assert abs(float(expected.detach())) > 0.01  # the answers differ in length
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    trls = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert trls.keys() == gradients.keys()
    for name, gradient in trls.items():
        scale = float(gradient.abs().max())
        assert torch.allclose(gradients[name], gradient, rtol=1e-3, atol=1e-4 * scale + 1e-9), name
    assert max(float(gradient.abs().max()) for gradient in trls.values()) > 1e-3


def test_map_equals_a_finite_difference(mllm: tuple[Any, Any], image: Image.Image) -> None:
    """Of two answers, the loss changes as the difference of their log-probabilities, by each channel of a token."""
    model, processor = deepcopy(mllm)
    model.double()
    group = AnswerGroup.of_texts(processor, [RIGHT, WRONG], [1.0, 0.0])
    maps = group_gradient_map(model, processor, image, QUESTION, group).maps
    batch = answer_batch(processor, image, QUESTION, [RIGHT, WRONG])
    advantage = 0.5 / (0.5**0.5 + 1e-4)
    token, change = 5, {"by": 0.0, "channel": 0}  # token 5 of a 4 x 4 grid is cell (1, 1)

    def move(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        moved = output.clone()
        moved[:, token, int(change["channel"])] += change["by"]
        return moved

    model.model.multi_modal_projector.register_forward_hook(move)
    total = 0.0
    for channel in range(32):
        values = []
        for by in (1e-2, -1e-2):
            change.update(by=by, channel=channel)
            with torch.no_grad():
                right, wrong = answer_log_probs(model, batch).tolist()
            values.append(advantage * (right - wrong) / int(batch["completion_mask"].sum()))
        total += abs(values[0] - values[1]) / 2e-2
    assert maps["gradient"][1, 1] == pytest.approx(total, rel=0.01)
    assert maps["gradient"].max() > 0


def test_grad_cam_shows_what_makes_the_rewarded_answer_more_probable(mllm: tuple[Any, Any], image: Image.Image) -> None:
    """Of two answers, the loss has the sign and, up to a factor, the gradient of the DPO loss of the parent itself."""
    texts = ["", " red"]
    groups = [AnswerGroup.of_texts(mllm[1], texts, rewards) for rewards in ([1.0, 0.0], [0.0, 1.0])]
    maps = [group_gradient_map(*mllm, image, QUESTION, group).maps["gradcam"] for group in groups]
    dpo = gradient_map(*mllm, image, QUESTION, texts[0], "dpo", texts[1], mllm[0]).maps["gradcam"]
    assert dpo.max() > 0
    assert np.allclose(maps[0] / maps[0].sum(), dpo / dpo.sum(), atol=1e-5)
    assert not np.allclose(maps[0], maps[1], atol=1e-3 * maps[0].max())


def test_answers_are_drawn_from_the_models_own_distribution(mllm: tuple[Any, Any], image: Image.Image) -> None:
    """Whatever the model's generation config says, and without the image's token."""
    model, processor = deepcopy(mllm)
    config = model.generation_config
    config.do_sample, config.temperature, config.top_k, config.repetition_penalty = True, 0.01, 1, 5.0
    batch = completion_batch(processor, image, QUESTION, [[]])
    favoured = torch.zeros(model.config.text_config.vocab_size)
    favoured[model.config.image_token_id] = 10.0  # it would be drawn nearly always
    favoured[batch["input_ids"][0, -1]] = 5.0  # a token of the prompt, whose repetition could be penalised
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + favoured)
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    logits[model.config.image_token_id] = -torch.inf
    expected = logits.softmax(-1)
    group = draw_group(model, processor, image, QUESTION, length, answers=400, max_tokens=1)
    counts = torch.bincount(torch.tensor(group.ids).flatten(), minlength=len(expected))
    top = expected.topk(5).indices
    deviation = (expected[top] * (1 - expected[top]) / 400).sqrt()
    assert ((counts[top] / 400 - expected[top]).abs() < 4 * deviation).all()
    assert 0.1 < expected[top[0]] < 0.9
    assert counts[model.config.image_token_id] == 0


def test_a_seed_gives_the_same_answers_and_leaves_other_random_numbers(
    mllm: tuple[Any, Any], image: Image.Image
) -> None:
    state = torch.get_rng_state()
    first, same, other = (draw_group(*mllm, image, QUESTION, length, answers=3, seed=seed) for seed in (4, 4, (4, 1)))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == same
    assert first.ids != other.ids
    assert first.rewards == length(first.texts)
    end = mllm[1].tokenizer.eos_token_id
    assert all((ids[-1] == end or len(ids) == MAX_TOKENS) and end not in ids[:-1] for ids in first.ids)


def test_answers_of_given_texts_end_as_the_template_ends_them(mllm: tuple[Any, Any]) -> None:
    group = AnswerGroup.of_texts(mllm[1], [RIGHT, WRONG], [1, 0])
    assert mllm[1].tokenizer.batch_decode(group.ids) == [f"{RIGHT}<|im_end|>", f"{WRONG}<|im_end|>"]
    assert group.ids[0] == process(mllm[1], f"{RIGHT}<|im_end|>").ids
    assert group.advantages().tolist() == pytest.approx([0.5 / (0.5**0.5 + 1e-4), -0.5 / (0.5**0.5 + 1e-4)])


def test_the_right_answer_is_rewarded(mllm: tuple[Any, Any]) -> None:
    reward = right_answer("Is it red?\nA. yes\nB. no", "B")
    assert list(reward(["no", "B.", "A", "yes"])) == [1, 1, 0, 0]
    assert list(right_answer(QUESTION, RIGHT)(["it is red", "It is green."])) == [1, 0]


def test_what_has_no_gradient_is_one_message(mllm: tuple[Any, Any], image: Image.Image) -> None:
    same = AnswerGroup.of_texts(mllm[1], [RIGHT, WRONG], [0.5, 0.5])
    with pytest.raises(DataError, match=r"all 2 answers have the reward 0.5 .*'It is red.'.*no gradient: draw others"):
        group_gradient_map(*mllm, image, QUESTION, same)
    with pytest.raises(DataError, match="2 answers have 1 rewards: give each its reward"):
        AnswerGroup.of_texts(mllm[1], [RIGHT, WRONG], [1.0])
    for answers in (0, 1):
        with pytest.raises(DataError, match=rf"{answers} answer\(s\).*give two or more"):
            draw_group(*mllm, image, QUESTION, length, answers=answers)
    with pytest.raises(DataError, match="give a reward that is a finite number for each answer"):
        draw_group(*mllm, image, QUESTION, right_answer(QUESTION, " "), answers=2)


def test_the_command_draws_answers_and_their_maps(
    trained: Path, mllm: tuple[Any, Any], image: Image.Image, tmp_path: Path
) -> None:
    image.save(tmp_path / "scene.png")
    texts = draw_group(*mllm, Image.open(tmp_path / "scene.png"), QUESTION, length, answers=3, seed=5).texts
    files = ["--output", str(tmp_path / "o.png"), "--json", str(tmp_path / "o.json")]
    command = ["--debug", "gradcam", str(trained / "2-instruct"), str(tmp_path / "scene.png"), "--question", QUESTION]
    command += ["--explain", "grpo", "--seed", "5", *files]
    result = CliRunner().invoke(app, [*command, "--generations", "3", "--answer", texts[1]])
    assert result.exit_code == 0, result.output
    assert "the mean reward is 0.3333" in result.output
    values = json.loads((tmp_path / "o.json").read_text())
    assert (values["answers"], values["rewards"], values["seed"]) == (texts, [0, 1, 0], 5)
    group = draw_group(*mllm, image, QUESTION, right_answer(QUESTION, texts[1]), answers=3, seed=5)
    assert np.allclose(
        values["maps"]["gradient"], group_gradient_map(*mllm, image, QUESTION, group).maps["gradient"], rtol=1e-4
    )
    assert (tmp_path / "o.png").stat().st_size > 0
    never = CliRunner().invoke(app, [*command, "--answer", "It is none of these."])
    assert isinstance(never.exception, DataError)
    assert "all 8 answers have the reward 0" in str(never.exception)


@pytest.mark.parametrize("option", [["--generations", "1"], ["--explain", "rloo"]])
def test_bad_options_are_refused_before_anything_is_loaded(option: list[str]) -> None:
    command = ["--debug", "gradcam", "a", "b", "--question", "?", "--answer", "!", "--explain", "grpo", *option]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, PivotError)
    assert any(text in str(result.exception) for text in ("give two or more", "it is one of answer, sft, dpo, grpo"))
