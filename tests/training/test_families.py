"""Every MLLM of the table trains with PivotDPOTrainer as with TRL's DPOTrainer, whichever options are on."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from datasets import Dataset
from PIL import Image
from trl import SFTConfig, SFTTrainer

from pivot_hub.mllm.blank_image import encode_blank_images
from pivot_hub.mllm.families import FAMILIES as FAMILIES_OF_THE_TABLE
from pivot_hub.mllm.load import load_mllm
from pivot_hub.mllm.trainable import freeze_parts, parts_of
from pivot_hub.training.pair_collator import PaddedPairCollator, PairCollator
from pivot_hub.training.sft import PivotSFTTrainer, collator_of
from pivot_hub.training.tree_layout import use_trees
from tests.mllm.tiny_mllms import make_mllm
from tests.mllm.tiny_processors import PROCESSORS, add_processor
from tests.training.test_tree_layout import Models, step, trainer

NEEDS_TORCHVISION = {"mistral3"}
# What the table says of them, the planner believes; here it is compared with what the trainer finds.
WITHOUT_TREES = {name for name in PROCESSORS if not FAMILIES_OF_THE_TABLE[name].shares_prompts}
# Their balance of experts is a loss over all tokens of a batch, prompts included.
WITH_EXPERTS = {"qwen3_vl_moe"}
FAMILIES = sorted(set(PROCESSORS) - NEEDS_TORCHVISION)


def noise(seed: int, width: int, height: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator).numpy())


def row(images: list[Image.Image], question: str, chosen: str, rejected: str) -> dict[str, Any]:
    content = [*[{"type": "image"}] * len(images), {"type": "text", "text": question}]
    answers = {
        side: [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
        for side, text in (("chosen", chosen), ("rejected", rejected))
    }
    return {"images": images, "prompt": [{"role": "user", "content": content}], **answers}


WIDE, TALL, SMALL = noise(0, 90, 40), noise(1, 40, 70), noise(2, 56, 56)
ROWS = [
    row([WIDE], "What is it?", "red", "a small blue star"),
    row([TALL], "How many?", "two, I think", "three"),
    row([WIDE], "Where?", "on the left", "at the bottom, on the right"),  # the image of the first row
    row([SMALL, TALL], "Which differs?", "the first", "b"),  # two images
    row([], "Is two more than one?", "yes", "no"),  # none
]


@pytest.fixture(scope="module")
def mllms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Models]:
    """Policy, a reference that differs from it in every part, and their processor, by family."""
    made: dict[str, Models] = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        make_mllm(folder, name)
        add_processor(folder, name)
        policy, processor = load_mllm(folder)
        reference = deepcopy(policy)
        torch.manual_seed(5)
        with torch.no_grad():
            for weight in policy.parameters():
                weight.add_(torch.randn_like(weight) * 0.02)
        made[name] = (policy, reference, processor)
    return made


def assert_equal(actual: Any, expected: Any, parts: dict[str, Any]) -> None:
    loss, metrics, gradients = actual
    expected_loss, expected_metrics, expected_gradients = expected
    assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert gradients.keys() == expected_gradients.keys()
    for part, parameters in parts.items():
        names = [n for n in parameters if n in expected_gradients]
        scale = max(expected_gradients[n].abs().max() for n in names)
        assert scale > 0, part
        for name in names:
            difference = float((gradients[name] - expected_gradients[name]).abs().max() / scale)
            assert difference < 1e-4, f"{name}: {difference:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_options_give_trls_loss_metrics_and_gradients(
    family: str, mllms: dict[str, Models], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = mllms[family]
    parts = parts_of(models[0])
    theirs = trainer(models, tmp_path / "trl", None, ROWS)
    ours = trainer(models, tmp_path, {}, ROWS)
    shares = family not in WITHOUT_TREES | WITH_EXPERTS
    assert isinstance(ours.data_collator, PairCollator if shares else PaddedPairCollator)
    assert ("share_prefix is off" in caplog.text) != shares
    expected = step(theirs, ROWS)
    assert_equal(step(ours, ROWS), expected, parts)
    assert_equal(step(trainer(models, tmp_path, {"share_prefix": False}, ROWS), ROWS), expected, parts)
    live = trainer(models, tmp_path, {"cache_reference": False}, ROWS)
    assert live.ref_model is not None
    assert_equal(step(live, ROWS), expected, parts)
    assert_equal(step(ours, ROWS[1:2]), step(theirs, ROWS[1:2]), parts)


@pytest.mark.parametrize("family", ["internvl", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
def test_losses_of_two_images_are_the_same_with_and_without_trees(
    family: str, mllms: dict[str, Models], tmp_path: Path
) -> None:
    """The rejected images have other shapes, and so other numbers of tokens."""
    shown = [([WIDE], [TALL]), ([TALL], [SMALL]), ([WIDE], [SMALL]), ([SMALL, TALL], [WIDE, TALL])]
    rows = [{**row, "images": i, "rejected_images": j} for row, (i, j) in zip(ROWS, shown, strict=False)]
    losses = {"loss_type": ["sigmoid", "image_sigmoid", "image_symmetric", "anchor"]}
    with_trees = trainer(mllms[family], tmp_path, {}, rows, **losses)
    without = trainer(
        mllms[family], tmp_path / "padded", {"share_prefix": False, "cache_reference": False}, rows, **losses
    )
    assert isinstance(with_trees.data_collator, PairCollator)
    assert_equal(step(with_trees, rows), step(without, rows), parts_of(mllms[family][0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trained_parameter_has_a_gradient_and_no_frozen_one(
    family: str, mllms: dict[str, Models], tmp_path: Path
) -> None:
    models = deepcopy(mllms[family])
    freeze_parts(models[0], {"vision": 1e-6, "projector": 1e-6})
    one = trainer(models, tmp_path, {"cache_reference": False}, ROWS)
    step(one, ROWS)
    trained = {n for n, p in one.model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in one.model.named_parameters() if p.grad is not None}
    assert {part for part in parts_of(one.model) if trained & set(parts_of(one.model)[part])} == {"vision", "projector"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_without_images_gives_the_tower_gradients_of_zero_in_several_processes(
    family: str, mllms: dict[str, Models]
) -> None:
    """Every process then has gradients of the same parameters, and the output is that of the text alone."""
    plain, _, processor = deepcopy(mllms[family])
    seeing = deepcopy(plain)
    if family not in WITHOUT_TREES:
        use_trees(seeing)
    encode_blank_images(seeing, processor)
    freeze_parts(seeing, {"vision": 1.0, "projector": 1.0, "language": 1.0})
    ids = torch.tensor([[20, 30, 40, 50]])
    kinds = {"token_type_ids": torch.zeros_like(ids)} if family == "gemma3" else {}
    expected, actual = plain.train()(input_ids=ids, **kinds), seeing.train()(input_ids=ids, **kinds)
    assert torch.equal(actual.logits, expected.logits)
    actual.logits.sum().backward()
    parts = parts_of(seeing)
    of_images = [*parts["vision"].values(), *parts["projector"].values()]
    assert all(p.requires_grad == (p.grad is not None) for p in of_images)
    assert not any(p.grad.any() for p in of_images if p.grad is not None)


def sft_step(models: Models, folder: Path, collator: Any, rows: list[dict[str, Any]]) -> Any:
    """Loss, metrics and gradients of one batch with TRL's SFTTrainer and its collator, or with ours."""
    dataset = Dataset.from_dict({"row": list(range(len(rows)))})
    dataset.set_transform(lambda batch: {c: [deepcopy(rows[r][c]) for r in batch["row"]] for c in rows[0]})
    args = SFTConfig(
        str(folder), bf16=False, gradient_checkpointing=False, max_length=None, report_to="none", use_cpu=True
    )
    kind = SFTTrainer if collator is None else PivotSFTTrainer
    args.remove_unused_columns = False
    one: Any = kind(
        model=models[0], args=args, train_dataset=dataset, processing_class=models[2], data_collator=collator
    )
    one.model.train()
    batch = one._prepare_inputs(one.data_collator([dataset[i] for i in range(len(rows))]))
    loss = one.compute_loss(one.model, batch)
    loss.backward()
    return loss.item(), {}, {n: p.grad for n, p in one.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_without_padding_give_trls_loss_and_gradients(
    family: str, mllms: dict[str, Models], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"images": r["images"], "prompt": r["prompt"], "completion": r["chosen"]} for r in ROWS]
    expected = sft_step(deepcopy(mllms[family]), tmp_path, None, rows)
    models = deepcopy(mllms[family])
    collator = collator_of(models[0], models[2], None)
    assert (collator.positions is not None) == (family not in WITHOUT_TREES)
    assert ("rows are padded to the longest" in caplog.text) == (family in WITHOUT_TREES)
    messages = [{"images": r["images"], "messages": r["prompt"] + r["chosen"]} for r in ROWS]
    actual = sft_step(models, tmp_path, collator, messages)
    assert_equal(actual, expected, parts_of(models[0]))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_loss_over_rows_is_the_mean_of_the_rows_own_losses(
    family: str, mllms: dict[str, Models], tmp_path: Path
) -> None:
    messages = [{"images": r["images"], "messages": r["prompt"] + r["chosen"]} for r in ROWS]
    own = []
    for row_messages in messages:
        models = deepcopy(mllms[family])
        own.append(sft_step(models, tmp_path, collator_of(models[0], models[2], None), [row_messages]))
    models = deepcopy(mllms[family])
    collator = collator_of(models[0], models[2], None, loss_over="rows")
    loss, _, gradients = sft_step(models, tmp_path, collator, messages)
    assert loss == pytest.approx(sum(one[0] for one in own) / len(own), rel=1e-5)
    for name, gradient in gradients.items():
        expected = sum(one[2][name] for one in own if name in one[2]) / len(own)
        assert torch.allclose(gradient, expected, atol=1e-5), name
    over_tokens = sft_step(deepcopy(mllms[family]), tmp_path, collator_of(models[0], models[2], None), messages)[0]
    assert abs(loss - over_tokens) > 1e-3  # answers differ in length


@pytest.mark.parametrize("family", sorted(WITH_EXPERTS))
def test_a_loss_over_rows_has_the_loss_that_balances_the_experts(
    family: str, mllms: dict[str, Models], tmp_path: Path
) -> None:
    messages = [{"images": r["images"], "messages": r["prompt"] + r["chosen"]} for r in ROWS[:1]]
    losses = []
    for loss_over in (None, "rows"):
        models = deepcopy(mllms[family])
        cast(Any, models[0].config.get_text_config()).router_aux_loss_coef = 1.0
        collator = collator_of(models[0], models[2], None, loss_over=cast(Any, loss_over))
        losses.append(sft_step(models, tmp_path, collator, messages)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # of one row, both means are the same


@pytest.mark.parametrize("family", sorted(WITH_EXPERTS))
def test_experts_share_prompts_without_the_loss_that_balances_them(
    family: str, mllms: dict[str, Models], tmp_path: Path
) -> None:
    models = mllms[family]
    ours = trainer(models, tmp_path, {}, ROWS, router_aux_loss_coef=0.0)
    theirs = trainer(models, tmp_path / "trl", None, ROWS, router_aux_loss_coef=0.0)
    assert isinstance(ours.data_collator, PairCollator)
    assert_equal(step(ours, ROWS), step(theirs, ROWS), parts_of(models[0]))
