"""LoRA on the language model: trained parameters, the written checkpoint, and a run that is stopped and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from pivot_hub.config.recipe import LoraSpec, load_recipe
from pivot_hub.errors import RecipeError
from pivot_hub.mllm.load import load_mllm
from pivot_hub.mllm.lora import add_lora, has_lora, merge_lora
from pivot_hub.mllm.published_configs import meta_mllm, part_config
from pivot_hub.mllm.trainable import freeze_parts
from pivot_hub.planner.estimate import plan_stage
from pivot_hub.training.part_trainer import PartTrainer
from pivot_hub.training.stage import run_stage
from tests.training.test_stages import moved, part, quiet

LORA = ["lora={rank: 4, alpha: 8}", "args.save_steps=2", "data.0.rows=24"]


def test_adapters_start_at_zero_and_merge_into_the_weights(trained: Path) -> None:
    model, _ = load_mllm(trained / "2-instruct")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = torch.arange(6)[None]
    plain = model(input_ids=ids).logits
    freeze_parts(model, {"vision": 1e-4, "projector": 1e-4, "language": 1e-4})
    add_lora(model, LoraSpec(rank=2, alpha=4), seed=0)
    assert has_lora(model)
    assert torch.equal(model(input_ids=ids).logits, plain)
    trained_names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained_names if part(n) == "language"} == {n for n in trained_names if "lora_" in n}
    assert {part(n) for n in trained_names} == {"vision", "projector", "language"}
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted = model(input_ids=ids).logits
    assert not torch.allclose(adapted, plain, atol=1e-3)
    merge_lora(model)
    assert not has_lora(model)
    assert model.state_dict().keys() == before.keys()
    assert torch.allclose(model(input_ids=ids).logits, adapted, atol=1e-5)


@pytest.mark.parametrize("stage", ["3-sft", "3-dpo"])
def test_a_stage_with_lora_trains_the_encoder_and_writes_a_plain_model(
    recipes: Path, trained: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_recipe(recipes / f"{stage}.yaml", LORA)
    folder = run_stage(loaded, trained.parent, tmp_path / "whole", log=quiet)
    changed = moved(trained / "2-instruct", folder)
    assert {part(name) for name in changed} == {"vision", "projector", "language"}
    language = {name for name in changed if part(name) == "language"}
    assert all(name.endswith("_proj.weight") for name in language)
    assert AutoConfig.from_pretrained(folder).model_type == "llava"

    compute_loss = PartTrainer.compute_loss

    def stop(self: PartTrainer, *args: object, **kwargs: object) -> object:
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(PartTrainer, "compute_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        run_stage(loaded, trained.parent, tmp_path / "cut", log=quiet)
    monkeypatch.undo()
    lines: list[str] = []
    assert not moved(folder, run_stage(loaded, trained.parent, tmp_path / "cut", log=lines.append))
    assert any("resuming from step 4" in line for line in lines)


def test_lora_needs_a_language_model_that_is_trained(recipes: Path) -> None:
    with pytest.raises(RecipeError, match=r"`lora` trains the language .*: give `learning_rate.language`"):
        load_recipe(recipes / "1-align.yaml", ["lora={rank: 4}"])
    with pytest.raises(RecipeError, match=r"unknown key `lora.ranks` \(did you mean `rank`\?\)"):
        load_recipe(recipes / "3-sft.yaml", ["lora={ranks: 4}"])


def test_the_planner_counts_adapters_as_the_trained_parameters_of_the_language_model(recipes: Path) -> None:
    plain, adapted = (
        plan_stage(load_recipe(recipes / "3-sft.yaml", overrides), "single", 1)
        for overrides in ([], ["lora={rank: 4, alpha: 8}"])
    )
    assert adapted.parameters["vision"] == plain.parameters["vision"]
    model = meta_mllm(part_config(str(recipes / "base/vision")), part_config(str(recipes / "base/language")), -2)
    linear = [m for m in model.model.language_model.modules() if isinstance(m, torch.nn.Linear)]
    assert adapted.parameters["language"]["trained"] == sum(4 * (m.in_features + m.out_features) for m in linear)
    assert adapted.parameters["language"]["frozen"] == plain.parameters["language"]["trained"]
    assert adapted.memory[0].terms["optimizer"] < plain.memory[0].terms["optimizer"]
