"""Every option of PivotDPOTrainer gives the losses, metrics, gradients and weights of TRL's DPOTrainer."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import DPOConfig, DPOTrainer

from pivot_hub.errors import DataError, TrainingError
from pivot_hub.mllm.build import build_mllm
from pivot_hub.training import tree_layout
from pivot_hub.training.dpo import SPEED_OPTIONS, PivotDPOConfig, PivotDPOTrainer
from pivot_hub.training.pair_collator import PairCollator, image_key
from pivot_hub.training.reference_cache import ReferenceCache, model_hash
from pivot_hub.training.tree_layout import Tree, TreeLayout, lower_right_mask, use_trees
from tests.conftest import make_language
from tests.encoder.originals import IMAGE_PX, make_vision

ALL_OFF = dict.fromkeys(SPEED_OPTIONS, False)
EVERY = [
    dict(zip(SPEED_OPTIONS, on, strict=True))
    for on in itertools.product((False, True), repeat=len(SPEED_OPTIONS))
    if any(on)
]
LOSSES = [
    ("sigmoid", {}),
    ("hinge", {}),
    ("ipo", {}),
    ("exo_pair", {"label_smoothing": 1e-3}),
    ("nca_pair", {}),
    ("robust", {"label_smoothing": 0.1}),
    ("bco_pair", {}),
    ("sppo_hard", {}),
    ("aot", {}),
    ("aot_unpaired", {}),
    ("apo_zero", {}),
    ("apo_down", {}),
    ("discopop", {}),
    ("sft", {}),
    ("sigmoid_norm", {}),
]
Models = tuple[PreTrainedModel, PreTrainedModel, Any]


def noise_image(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8, generator=generator).numpy())


def pair(seed: int, question: str, chosen: str, rejected: str) -> dict[str, Any]:
    def answer(text: str) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]

    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    answers = {"chosen": answer(chosen), "rejected": answer(rejected)}
    return {"images": [noise_image(seed)], "prompt": prompt, **answers}


# Prompts and answers of different lengths, images that several pairs share, an answer of one letter, equal answers.
ROWS = [
    pair(0, "What colour is it?", "red", "a small blue star in the middle of the left"),
    pair(1, "How many things are there, large and small?", "two", "three"),
    pair(0, "Where?", "on the left", "on the right, at the bottom"),
    pair(0, "What is at the top of the scene, in the middle?", "a large green square", "a"),
    pair(2, "Is there a star?", "yes", "yes"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A policy, a reference that differs from it in every part, and their processor."""
    folder = tmp_path_factory.mktemp("mllm")
    make_vision(folder / "vision", "clip")
    make_language(folder / "language")
    policy, processor = build_mllm(str(folder / "vision"), str(folder / "language"))
    reference = deepcopy(policy)
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    return policy, reference, processor


def trainer(
    models: Models, folder: Path, enabled: dict[str, bool] | None, rows: list[dict[str, Any]] = ROWS, **args: Any
) -> Any:
    """TRL's trainer if `enabled` is None, else ours with these options; both on copies of the same models."""
    policy, reference, processor = models
    settings: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 2,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,
        "remove_unused_columns": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **args,
    }
    classes: tuple[Any, Any] = (DPOTrainer, DPOConfig)
    if enabled is not None:
        classes = (PivotDPOTrainer, PivotDPOConfig)
        settings |= {**enabled, "reference_cache": str(folder / "references")}
    # A transform returns the rows as they are: a dataset would store the images in another encoding.
    dataset = Dataset.from_dict({"row": list(range(len(rows)))})
    columns = tuple(rows[0])
    dataset.set_transform(lambda batch: {c: [deepcopy(rows[r][c]) for r in batch["row"]] for c in columns})
    trainer_class, config_class = classes
    return trainer_class(
        model=deepcopy(policy),
        ref_model=deepcopy(reference).requires_grad_(False),
        args=config_class(**settings),
        train_dataset=dataset,
        processing_class=processor,
    )


def step(one: Any, rows: list[dict[str, Any]]) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """Loss, metrics and gradients of one batch."""
    one.model.train()
    one.model.zero_grad()
    one._metrics["train"].clear()
    loss = one.compute_loss(one.model, one._prepare_inputs(one.data_collator([deepcopy(r) for r in rows])))
    loss.backward()
    metrics = {name: float(values[-1]) for name, values in one._metrics["train"].items()}
    metrics.pop("num_tokens")
    if any(row["chosen"] == row["rejected"] for row in rows):
        metrics.pop("rewards/accuracies")  # equal answers are a tie, which rounding decides
    return loss.item(), metrics, {n: p.grad.clone() for n, p in one.model.named_parameters() if p.grad is not None}


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Compare the results of two `step` calls."""
    loss, metrics, gradients = actual
    expected_loss, expected_metrics, expected_gradients = expected
    assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert gradients.keys() == expected_gradients.keys()
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        names = [n for n in expected_gradients if part in n]
        assert names, part
        scale = max(expected_gradients[n].abs().max() for n in names)
        for name in names:
            difference = ((gradients[name] - expected_gradients[name]).abs().max() / scale).item()
            assert difference < tolerance, f"{name}: {difference:.1e}"


@pytest.fixture(scope="module")
def trl_trainer(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trainer(models, tmp_path_factory.mktemp("trl"), None)


@pytest.mark.parametrize("enabled", EVERY, ids=lambda s: "+".join(n for n, on in s.items() if on))
def test_any_options_give_trls_loss_metrics_and_gradients(
    enabled: dict[str, bool], models: Models, trl_trainer: Any, tmp_path: Path
) -> None:
    ours = trainer(models, tmp_path, enabled)
    assert (ours.ref_model is None) == enabled["cache_reference"]
    for rows in (ROWS, ROWS[:1], ROWS[1:3]):
        assert_same(step(ours, rows), step(trl_trainer, rows))


@pytest.mark.parametrize(("loss", "options"), LOSSES, ids=[name for name, _ in LOSSES])
def test_every_loss_of_trl_is_equal(loss: str, options: dict[str, Any], models: Models, tmp_path: Path) -> None:
    args = {"loss_type": loss, **options}
    assert_same(
        step(trainer(models, tmp_path, {}, **args), ROWS), step(trainer(models, tmp_path / "trl", None, **args), ROWS)
    )


@pytest.mark.parametrize(
    "args",
    [
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"use_weighting": True},
        {"ld_alpha": 0.5},
        {"max_length": 66},
        {"gradient_checkpointing": True},
        {"f_divergence_type": "js_divergence"},
    ],
    ids=["paper's gamma", "weighting", "ld_alpha", "cut answers", "checkpointing", "divergence"],
)
def test_settings_of_trl_are_equal(args: dict[str, Any], models: Models, tmp_path: Path) -> None:
    ours, theirs = trainer(models, tmp_path, {}, **args), trainer(models, tmp_path / "trl", None, **args)
    assert_same(step(ours, ROWS), step(theirs, ROWS))


def test_text_only_pairs_are_equal(models: Models, tmp_path: Path) -> None:
    rows = deepcopy(ROWS)
    for row in rows:
        row["images"] = []
        row["prompt"][0]["content"] = row["prompt"][0]["content"][1:]
    ours, theirs = trainer(models, tmp_path, {}, rows), trainer(models, tmp_path / "trl", None, rows)
    assert step(ours, rows)[0] == pytest.approx(step(theirs, rows)[0], rel=1e-5)
    mixed = [ROWS[0], rows[1], ROWS[2]]
    ours = trainer(models, tmp_path, {}, mixed)
    assert step(ours, mixed)[0] == pytest.approx(sum(step(ours, [r])[0] for r in mixed) / 3, rel=1e-5)


@pytest.mark.parametrize(("epochs", "accumulated", "steps"), [(8, 1, 24), (10, 2, 20)])
def test_twenty_steps_end_at_the_same_weights(
    epochs: int, accumulated: int, steps: int, models: Models, tmp_path: Path
) -> None:
    """With 5 rows in batches of 2, the last batch of an epoch is smaller."""
    args: Any = {"num_train_epochs": epochs, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    args["gradient_accumulation_steps"] = accumulated
    trained = []
    settings: list[dict[str, bool] | None] = [None, {}]
    for enabled in settings:
        one = trainer(models, tmp_path / str(enabled is None), enabled, **args)
        one.train()
        assert one.state.global_step == steps
        trained.append({n: p.detach().clone() for n, p in one.model.named_parameters()})
    before = dict(models[0].named_parameters())
    for name in trained[0]:
        difference = (trained[0][name] - trained[1][name]).norm() / trained[0][name].norm()
        assert difference < 1e-3, f"{name}: {difference:.1e}"
    assert any((trained[0][n] - before[n]).norm() / before[n].norm() > 0.01 for n in before)


def test_evaluation_is_equal(models: Models, tmp_path: Path) -> None:
    ours, theirs = trainer(models, tmp_path, {}), trainer(models, tmp_path / "trl", None)
    actual, expected = (one.evaluate(one.train_dataset) for one in (ours, theirs))
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen", "eval_mean_token_accuracy"):
        assert actual[name] == pytest.approx(expected[name], abs=1e-5), name


def test_metrics_over_outputs_can_be_computed(models: Models, tmp_path: Path) -> None:
    """TRL then needs the logits in addition to the loss."""
    ours = trainer(models, tmp_path, {})
    ours.compute_metrics = lambda evaluation: {"rows": len(evaluation.predictions[0])}
    with pytest.warns(FutureWarning, match="return_outputs=True"):
        loss, outputs = ours.compute_loss(ours.model, ours.data_collator(deepcopy(ROWS)), return_outputs=True)
    assert loss.ndim == 0
    assert outputs.logits.shape[0] == 2 * len(ROWS)


def test_bfloat16_is_close(models: Models, tmp_path: Path) -> None:
    exact = step(trainer(models, tmp_path, {}), ROWS)[0]
    policy, reference, processor = deepcopy(models)
    for model in (policy, reference):
        cast(torch.nn.Module, model).to(torch.bfloat16)
    loss = step(trainer((policy, reference, processor), tmp_path, {}), ROWS)[0]
    assert loss == pytest.approx(exact, rel=0.05)
    assert loss != exact


def test_the_check_can_fail(models: Models, trl_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Branches that attend to each other, or positions that do not restart, give other gradients."""
    ours = trainer(models, tmp_path, {})
    expected = step(trl_trainer, ROWS)
    lay_out = ours.data_collator._laid_out

    def without_restart(*arguments: Any) -> dict[str, Any]:
        batch: dict[str, Any] = lay_out(*arguments)
        batch["tree_positions"] = torch.arange(batch["tree_ids"].shape[1])[None]
        return batch

    def without_branches(*arguments: Any) -> dict[str, Any]:
        batch: dict[str, Any] = lay_out(*arguments)
        trees = [Tree(t.start, t.prefix + sum(t.branches)) for t in batch["tree_layout"].trees]
        batch["tree_layout"] = TreeLayout.of(trees, batch["tree_layout"].image_index)
        return batch

    for wrong in (without_restart, without_branches):
        with monkeypatch.context() as patch:
            patch.setattr(ours.data_collator, "_laid_out", wrong)
            with pytest.raises(AssertionError):
                assert_same(step(ours, ROWS), expected)
    assert_same(step(ours, ROWS), expected)


def test_an_image_is_encoded_once_however_many_pairs_have_it(models: Models, tmp_path: Path) -> None:
    for enabled, images in ((ALL_OFF, 10), ({}, 3)):
        ours = trainer(models, tmp_path, enabled)
        assert ours.data_collator(deepcopy(ROWS))["pixel_values"].shape == (images, 3, IMAGE_PX, IMAGE_PX)


def test_trees_hold_no_padding_and_each_prompt_once(models: Models, tmp_path: Path) -> None:
    batch = trainer(models, tmp_path, {}).data_collator(deepcopy(ROWS))
    padded = trainer(models, tmp_path, ALL_OFF).data_collator(deepcopy(ROWS))
    trees = batch["tree_layout"].trees
    assert [tree.start for tree in trees] == [0, *(tree.end for tree in trees[:-1])]
    assert batch["tree_ids"].shape == (1, trees[-1].end)
    prompts = sum(tree.prefix for tree in trees)
    assert trees[-1].end == int(padded["attention_mask"].sum()) - prompts < padded["attention_mask"].numel()


def test_all_sequences_at_once_are_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for sequences of different lengths gets queries, keys and bounds that give the same attention."""
    layout = TreeLayout.of([Tree(0, 5, (3, 4)), Tree(12, 2, ()), Tree(14, 3, (1, 0, 2))])
    torch.manual_seed(0)
    query = torch.randn(1, 4, 20, 8)
    key, value = torch.randn(2, 1, 2, 20, 8)

    def varlen(
        q: Any, k: Any, v: Any, q_bounds: Any, k_bounds: Any, longest_q: int, longest_k: int, **args: Any
    ) -> Any:
        """torch's varlen_attn, which has no CPU kernel, sequence by sequence."""
        assert args["enable_gqa"]
        assert (longest_q, longest_k) == (int(q_bounds.diff().max()), int(k_bounds.diff().max()))
        window = args["window_size"][0] + 1
        outputs = []
        for (a, b), (c, d) in zip(
            itertools.pairwise(q_bounds.tolist()), itertools.pairwise(k_bounds.tolist()), strict=True
        ):
            scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d].repeat_interleave(2, 1)) * 8**-0.5
            seen = lower_right_mask(b - a, d - c, window or d - c, q.device)
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("hqk,khd->qhd", weights, v[c:d].repeat_interleave(2, 1)))
        return torch.cat(outputs)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    for window in (None, 4):
        expected = tree_layout._attend_one_by_one(query, key, value, layout, None, 0.0, window)
        actual = tree_layout._attend_at_once(query, key, value, layout, torch.float32, None, window)
        assert torch.allclose(actual, expected, atol=1e-6), window


def test_the_model_still_answers_as_before(models: Models, tmp_path: Path) -> None:
    """Outside of training, the patched model gives the outputs, generations and files of the plain model."""
    policy, _, processor = models
    ours = trainer(models, tmp_path, {})
    text = processor.apply_chat_template(ROWS[0]["prompt"], add_generation_prompt=True)
    batch = processor(text=[text, text], images=[noise_image(1), noise_image(2)], padding=True, return_tensors="pt")
    batch["attention_mask"][0, :5] = 0
    with torch.no_grad():
        plain, patched = policy.eval()(**batch).logits, ours.model.eval()(**batch).logits
        assert torch.allclose(plain, patched, atol=1e-5)
        both: tuple[Any, Any] = (policy, ours.model)
        before, after = (m.generate(**batch, max_new_tokens=5, do_sample=False) for m in both)
    assert torch.equal(before, after)
    ours.save_model(str(tmp_path / "saved"))
    assert "pivot_trees" not in (tmp_path / "saved" / "config.json").read_text()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of rows of each computation of reference values."""
    row_counts: list[int] = []
    compute = PivotDPOTrainer._compute_rows

    def count(self: Any, cache: ReferenceCache, rows: dict[str, Any]) -> None:
        row_counts.append(len(rows))
        compute(self, cache, rows)

    monkeypatch.setattr(PivotDPOTrainer, "_compute_rows", count)
    return row_counts


def test_reference_values_are_computed_once_and_never_for_something_else(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row_counts = counted(monkeypatch)
    trainer(models, tmp_path, {})
    assert row_counts == [2, 2, 1]
    row_counts.clear()
    trainer(models, tmp_path, {}, seed=7, num_train_epochs=2, learning_rate=1e-5, beta=0.5)
    trainer(models, tmp_path, {}, list(reversed(ROWS)))
    assert row_counts == []  # another seed, learning rate, loss setting or order needs the same values

    other_answer, other_image = deepcopy(ROWS), deepcopy(ROWS)
    other_answer[1]["chosen"][0]["content"][0]["text"] = "four"
    other_image[2]["images"] = [noise_image(9)]
    for rows in (other_answer, other_image):
        trainer(models, tmp_path, {}, rows)
        assert row_counts == [1]
        row_counts.clear()
    policy, reference, processor = models
    other_model, other_processor = deepcopy(reference), deepcopy(processor)
    next(other_model.parameters()).data[0] += 1e-3
    other_processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    other_template = deepcopy(processor)
    other_template.chat_template = processor.chat_template.replace("You are", "You were")
    changed: list[tuple[Models, dict[str, Any]]] = [
        ((policy, other_model, processor), {}),
        ((policy, reference, other_processor), {}),
        ((policy, reference, other_template), {}),
        (models, {"max_length": 66}),
        (models, {"ld_alpha": 0.5}),
    ]
    for changed_models, args in changed:
        trainer(changed_models, tmp_path, {}, **args)
        assert sum(row_counts) == 5, args
        row_counts.clear()


def test_a_row_that_was_never_cached_is_refused(models: Models, tmp_path: Path) -> None:
    ours = trainer(models, tmp_path, {}, ROWS[:2])
    with pytest.raises(DataError, match="set cache_reference=False"):
        ours.data_collator(deepcopy(ROWS[2:3]))


@pytest.mark.parametrize(
    ("args", "enabled", "message"),
    [
        ({"sync_ref_model": True}, {}, "sync_ref_model changes the reference as it trains; set cache_reference=False"),
        ({"precompute_ref_log_probs": True}, {"cache_reference": False}, "do not read; set share_prefix=False"),
        ({"use_liger_kernel": True}, {}, "set share_prefix=False, cache_reference=False"),
    ],
)
def test_a_conflict_names_the_option(
    args: dict[str, Any], enabled: dict[str, bool], message: str, models: Models, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=message):
        trainer(models, tmp_path, enabled, **args)


def test_another_attention_is_refused(models: Models, tmp_path: Path) -> None:
    policy, reference, processor = models
    eager = deepcopy(policy)
    eager.set_attn_implementation("eager")
    with pytest.raises(TrainingError, match="it is for sdpa attention, not eager; set share_prefix=False"):
        trainer((eager, reference, processor), tmp_path, {})


def test_a_processor_of_another_model_is_refused(models: Models, tmp_path: Path) -> None:
    policy, reference, processor = models
    other = deepcopy(processor)
    other.patch_size //= 2
    with pytest.raises(TrainingError, match=r"model and processor do not belong together .*Image features and image"):
        trainer((policy, reference, other), tmp_path, {})


def in_two_processes(module: str, models: Models, folder: Path) -> None:
    """Save the models to a folder and run a script of the tests on them under torchrun."""
    policy, reference, processor = models
    for name, model in (("mllm", policy), ("reference", reference)):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", module, str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_fsdp2_gives_the_loss_and_gradients_of_one_process(models: Models, tmp_path: Path) -> None:
    in_two_processes("tests.training.fsdp2", models, tmp_path)
    result = json.loads((tmp_path / "fsdp2.json").read_text())
    assert result["parameter_types"] == ["DTensor"]
    assert result["sharded_loss"] == pytest.approx(result["loss"], rel=1e-5)
    assert result["gradient_difference"] < 1e-4


def test_two_processes_train_as_trls_do_and_share_the_references(models: Models, tmp_path: Path) -> None:
    in_two_processes("tests.training.two_processes", models, tmp_path)
    losses, weights = {}, {}
    for name in ("trl", "ours"):
        losses[name] = json.loads((tmp_path / f"{name}.json").read_text())
        weights[name] = load_file(tmp_path / f"{name}.safetensors")
    assert len(losses["trl"]) == 6  # 8 rows, two processes of two rows each, 3 epochs
    assert losses["ours"] == pytest.approx(losses["trl"], abs=1e-4)
    for name, weight in weights["trl"].items():
        assert (weights["ours"][name] - weight).norm() / weight.norm() < 1e-3, name
    computed = [json.loads((tmp_path / f"computed-{rank}.json").read_text()) for rank in (0, 1)]
    assert sum(computed) >= len(ROWS)  # a row that two processes meet at the same time is computed by both
    assert max(computed) <= 4


def test_other_models_fall_back_to_trls_own_way(parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model without vision trains as with DPOTrainer, and the log says that the options are off."""
    tokenizer = AutoTokenizer.from_pretrained(parts / "language")
    tokenizer.chat_template = None
    rows = {"prompt": ["the scene holds"] * 2, "chosen": [" a red star", " two"], "rejected": [" nothing", " three"]}
    losses = []
    kinds: list[tuple[Any, Any]] = [(DPOTrainer, DPOConfig), (PivotDPOTrainer, PivotDPOConfig)]
    for kind, config in kinds:
        one = kind(
            model=AutoModelForCausalLM.from_pretrained(parts / "language"),
            ref_model=AutoModelForCausalLM.from_pretrained(parts / "language"),
            args=config(output_dir=str(tmp_path), max_steps=2, bf16=False, report_to="none", logging_steps=1),
            train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer,
        )
        one.train()
        losses.append([h["loss"] for h in one.state.log_history if "loss" in h])
    assert losses[0] == losses[1]
    assert "Qwen2ForCausalLM is not an MLLM of pivot_hub's table: share_prefix, cache_reference are off" in caplog.text


def test_the_fast_trainers_example_can_be_built(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "concepts" / "fast-trainer.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "PivotDPOTrainer(" in block)
    assert "per_device_train_batch_size=4)" in code
    monkeypatch.chdir(tmp_path)
    code = code.replace("size=4)", "size=4, bf16=False, report_to='none', reference_cache='cache')")
    dataset = trainer(models, tmp_path, {}).train_dataset
    names: dict[str, Any] = {"model": deepcopy(models[0]), "processor": models[2], "dataset": dataset}
    exec(code, names)
    groups = names["trainer"].create_optimizer().param_groups
    assert {group["part"] for group in groups} == {"vision", "projector", "language"}
    assert {group["lr"] for group in groups} == {1e-6}


def with_language(models: Models, language: Any) -> Models:
    """The models with another language model of random weights in policy and reference."""
    replaced = deepcopy(models)
    for model in replaced[:2]:
        model.model.language_model = deepcopy(language)
        model.config.text_config = language.config
    return replaced


def language_model(kind: str, models: Models, **sizes: Any) -> Any:
    """A small random language model of a kind, of the sizes of the fixture's."""
    import transformers

    text: Any = models[0].config.text_config
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **sizes,
    )
    torch.manual_seed(1)
    return getattr(transformers, f"{kind}Model")._from_config(config, attn_implementation="sdpa")


LINEAR = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


@pytest.mark.parametrize(
    ("kind", "sizes", "reason"),
    [
        ("StableLm", {}, "StableLmModel computes other hidden states for two answers behind one prompt"),
        ("Qwen3_5Text", LINEAR, "Qwen3_5TextModel computes other hidden states for two answers behind one prompt"),
    ],
)
def test_a_language_model_that_trees_change_trains_as_trls(
    kind: str, sizes: dict[str, Any], reason: str, models: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the model computes decides, not its name. The cache of the reference stays."""
    others = with_language(models, language_model(kind, models, **sizes))
    ours = trainer(others, tmp_path, {})
    assert f"share_prefix is off: {reason}" in caplog.text
    assert ours.ref_model is None
    assert_same(step(ours, ROWS), step(trainer(others, tmp_path / "trl", None), ROWS))


@pytest.mark.parametrize(
    ("kind", "sizes", "args"),
    [
        ("Mistral", {"sliding_window": 80}, {"max_length": 80}),
        ("Mistral", {"sliding_window": 20}, {}),
        ("Mistral", {"sliding_window": None}, {}),
        ("Llama", {}, {}),
    ],
)
def test_a_language_model_that_trees_do_not_change_is_taken(
    kind: str, sizes: dict[str, Any], args: dict[str, Any], models: Models, tmp_path: Path
) -> None:
    others = with_language(models, language_model(kind, models, **sizes))
    one = trainer(others, tmp_path, {}, **args)
    assert isinstance(one.data_collator, PairCollator)
    ours = step(one, ROWS)
    assert_same(ours, step(trainer(others, tmp_path / "trl", None, **args), ROWS))


def test_arguments_of_a_rows_chat_template_reach_it(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, reference, processor = models
    processor = deepcopy(processor)
    processor.chat_template = "{% if tone is defined %}Be {{ tone }}. {% endif %}" + processor.chat_template
    rows = [{**deepcopy(row), "chat_template_kwargs": {"tone": tone}} for row, tone in zip(ROWS, "abcde", strict=True)]
    others = (policy, reference, processor)
    ours = trainer(others, tmp_path, {}, rows)
    assert_same(step(ours, rows), step(trainer(others, tmp_path / "trl", None, rows), rows))
    row_counts = counted(monkeypatch)
    trainer(others, tmp_path, {}, rows)
    assert row_counts == []
    rows[1]["chat_template_kwargs"] = {"tone": "kind"}
    trainer(others, tmp_path, {}, rows)
    assert row_counts == [1]


@pytest.mark.parametrize("enabled", [{}, ALL_OFF])
def test_a_row_without_room_for_an_answer_is_refused(enabled: dict[str, bool], models: Models, tmp_path: Path) -> None:
    def train() -> None:
        trainer(models, tmp_path, enabled, max_length=40).train()

    with pytest.raises(DataError, match=r"(leave no room for an|no token left).* max_length 40.*; raise max_length"):
        train()


def test_paths_and_arrays_are_images_too(models: Models, tmp_path: Path) -> None:
    """The same loss and the same cached values as with decoded images."""
    expected = step(trainer(models, tmp_path, {}), ROWS)
    rows = deepcopy(ROWS)
    for i, row in enumerate(rows):
        (image,) = row["images"]
        image.save(tmp_path / f"{i}.png")
        as_array = torch.from_numpy(np.array(image))
        row["images"] = [
            [str(tmp_path / f"{i}.png"), tmp_path / f"{i}.png", np.array(image), as_array.permute(2, 0, 1), image][i]
        ]
    assert_same(step(trainer(models, tmp_path, {}, rows), rows), expected)
    for wrong, message in (
        (np.zeros((4, 4, 3), np.float32), r"\(4, 4, 3\) of float32 is no image"),
        (b"x" * 999, "b'x.* is no image"),
    ):
        rows[0]["images"] = [wrong]
        with pytest.raises(DataError, match=message) as refusal:
            trainer(models, tmp_path, {}, rows)
        assert len(str(refusal.value)) < 500


def test_an_empty_prompt_is_refused(models: Models, tmp_path: Path) -> None:
    rows = [{"images": [], "prompt": "", "chosen": "a star", "rejected": "a circle"}]
    with pytest.raises(DataError, match=r"the prompt is empty.*give the row a prompt"):
        trainer(models, tmp_path, {}, rows)


def test_rows_without_an_image_column_train_as_trls(
    models: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy, reference, processor = models
    rows = {"prompt": ["the scene holds"] * 2, "chosen": [" a red star", " two"], "rejected": [" nothing", " three"]}
    losses = []
    kinds: list[tuple[Any, Any]] = [(DPOTrainer, DPOConfig), (PivotDPOTrainer, PivotDPOConfig)]
    for kind, config in kinds:
        one = kind(
            model=deepcopy(policy),
            ref_model=deepcopy(reference),
            args=config(output_dir=str(tmp_path), max_steps=1, bf16=False, report_to="none", logging_steps=1),
            train_dataset=Dataset.from_dict(rows),
            processing_class=processor,
        )
        one.train()
        losses.append([h["loss"] for h in one.state.log_history if "loss" in h])
    assert losses[0] == losses[1]
    assert "no column image or images: share_prefix" in caplog.text


def test_a_damaged_file_of_the_cache_is_made_again(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    row_counts = counted(monkeypatch)
    expected = trainer(models, tmp_path, {}).data_collator(deepcopy(ROWS))
    row_counts.clear()
    flipped, cut, *_ = sorted((tmp_path / "references").glob("*/*.npz"))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:100])
    (cut.parent / f"{'0' * 32}.npz").write_bytes(b"of an earlier version, without a hash")
    again = trainer(models, tmp_path, {}).data_collator(deepcopy(ROWS))
    assert sum(row_counts) in (3, 4)  # a file has one or two rows
    assert torch.equal(again["ref_chosen_logps"], expected["ref_chosen_logps"])
    assert caplog.text.count("is damaged; it is deleted") == 2


def test_a_copy_of_a_model_that_takes_trees_runs_its_own_weights(models: Models, tmp_path: Path) -> None:
    """As a second trainer of one model does, whose reference is a copy of it."""
    policy = deepcopy(models[0])
    use_trees(policy)
    use_trees(policy)  # once more changes nothing
    batch = trainer(models, tmp_path, {"cache_reference": False}).data_collator(deepcopy(ROWS))
    batch = {k: v for k, v in batch.items() if k not in ("completion_mask", "row")}
    other: Any = deepcopy(policy)
    inner: Any = policy.model
    with torch.no_grad():
        before = other.model(**batch).last_hidden_state
        for weight in policy.parameters():
            weight.zero_()
        assert torch.equal(other.model(**batch).last_hidden_state, before)
        assert not torch.equal(inner(**batch).last_hidden_state, before)


def test_images_are_told_apart_by_their_palette(tmp_path: Path) -> None:
    images = []
    for colour in (255, 0, 0), (0, 0, 255):
        image = Image.new("P", (4, 4))
        image.putpalette(colour)
        images.append(image)
    assert image_key(images[0]) != image_key(images[1])
    assert image_key(images[0]) == image_key(images[0].copy())


def test_a_model_with_a_scalar_buffer_has_a_hash() -> None:
    model = torch.nn.BatchNorm1d(2)  # which counts its batches in a buffer ()
    model.config = SimpleNamespace(to_json_string=lambda use_diff: "{}")  # type: ignore[assignment]
    first = model_hash(model)
    cast(Any, model.num_batches_tracked).add_(1)
    assert model_hash(model) != first
