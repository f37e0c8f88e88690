"""MLLMs of InternVL's and Qwen2.5-VL's classes from two parts: trained, extracted, and loaded by plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from pivot_hub import PivotVisionModel
from pivot_hub.config.recipe import load_recipe
from pivot_hub.data.synthetic import ShapesDataset
from pivot_hub.errors import CheckpointError, RecipeError
from pivot_hub.mllm.build import build_mllm, read_processor
from pivot_hub.mllm.extract import extract_encoder
from pivot_hub.mllm.families import family_of
from pivot_hub.mllm.image_tokens import ImageTokens
from pivot_hub.mllm.load import load_mllm
from pivot_hub.planner.estimate import plan_stage
from pivot_hub.probes.run import Sizes
from pivot_hub.study.measures import measure_run
from pivot_hub.study.movement import features, hidden_states
from pivot_hub.training.stage import run_stage

SIDE = 4  # tokens a side of an image of 64 px: patches of 8 px, 2x2 to a token
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "internvl": {
        "model_type": "internvl_vision",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
    },
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl_vision",
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 8,
        "window_size": 32,
        "fullatt_block_indexes": [2],
    },
}
SMALL = ["data.0.rows=8", "args.per_device_train_batch_size=4", "args.save_strategy='no'"]
MESSAGES: list[Any] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def runs(family: str, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage of a family, trained for two steps: vision, align, instruct, dpo."""
    folder = tmp_path_factory.mktemp(family)
    vision = load_recipe("shapes/0-vision", [*SMALL, f"architecture={ARCHITECTURES[family]}"])
    run_stage(vision, output=folder / "vision", log=lambda line: None)
    joined = [f"model.vision={folder / 'vision'}", f"model.language={parts / 'language'}", f"model.family={family}"]
    parent = None
    for stage, name in (("align", "1-align"), ("instruct", "2-instruct"), ("dpo", "3-dpo")):
        layer = ["model.feature_layer=-2"]  # the shipped recipe's, which is LLaVA's and this one's default
        loaded = load_recipe(f"shapes/{name}", [*SMALL, *joined, *layer])
        run_stage(loaded, output=folder / stage, parent=parent, log=lambda line: None)
        parent = folder / stage
    return folder


def question(processor: Any) -> Any:
    text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    return processor(text=[text], images=[scene_image()], return_tensors="pt")


def scene_image() -> Image.Image:
    return ShapesDataset().scene("test", 0).render().image


def test_plain_transformers_loads_the_encoder_of_stage_vision(family: str, runs: Path) -> None:
    model, info = AutoModel.from_pretrained(runs / "vision", output_loading_info=True)
    assert (info["missing_keys"], info["unexpected_keys"]) == (set(), set())
    assert model.config.model_type == ARCHITECTURES[family]["model_type"]
    tokens = PivotVisionModel.from_pretrained(runs / "vision").forward_features([scene_image()]).last_hidden_state
    grid = tokens[0].shape if family == "internvl" else tokens[0].flatten(0, 1).shape
    assert grid == (64, 32)


def test_training_moves_every_part(runs: Path) -> None:
    model = load_mllm(runs / "dpo")[0]
    before, after = dict(load_mllm(runs / "instruct")[0].named_parameters()), dict(model.named_parameters())
    assert before.keys() == after.keys()
    family = family_of(model.config)
    moved = {family.part_of(name) for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert moved == {"vision", "projector", "language"}


def test_an_image_takes_a_token_for_four_patches(family: str, runs: Path) -> None:
    model, processor = load_mllm(runs / "align")
    assert model.config.model_type == family
    inputs = question(processor)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == SIDE**2
    if family == "qwen2_5_vl":
        start, end = (processor.tokenizer.convert_tokens_to_ids(f"<|vision_{side}|>") for side in ("start", "end"))
        assert (model.config.vision_start_token_id, model.config.vision_end_token_id) == (start, end)
        assert start in inputs["input_ids"]
    plain = AutoModelForImageTextToText.from_pretrained(runs / "align")
    with torch.no_grad():
        assert torch.equal(plain.eval()(**inputs).logits, model.eval()(**inputs).logits)


def test_the_processor_without_weights_is_that_of_the_mllm(family: str, runs: Path, parts: Path) -> None:
    alone: Any = read_processor(str(runs / "vision"), str(parts / "language"), family=family)  # type: ignore[arg-type]
    ours, theirs = question(alone), question(load_mllm(runs / "align")[1])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_features_of_the_extracted_encoder_are_those_inside_the_mllm(family: str, runs: Path, tmp_path: Path) -> None:
    extract_encoder(runs / "dpo", tmp_path / "encoder", compare_with_base=False)
    alone = PivotVisionModel.from_pretrained(tmp_path / "encoder").forward_features([scene_image()]).last_hidden_state
    model, processor = load_mllm(runs / "dpo")
    entered: list[torch.Tensor] = []
    inner: Any = model.model
    projector = inner.multi_modal_projector if family == "internvl" else inner.visual.merger
    projector.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    with torch.no_grad():
        model.eval()(**question(processor))
    inside = features(model, processor, [scene_image()])[0]
    expected = (alone[0] if family == "internvl" else alone[0].flatten(0, 1)).detach().numpy()
    assert np.allclose(inside, expected, atol=1e-6)
    # What enters is in blocks of four patches, so that its tokens are compared as a set.
    assert np.allclose(np.sort(entered[0].numpy().ravel()), np.sort(inside.ravel()), atol=1e-6)
    assert np.allclose(hidden_states(model, processor, [scene_image()])[-1][0], inside, atol=1e-6)


def test_a_study_measures_its_runs(runs: Path, tmp_path: Path) -> None:
    extract_encoder(runs / "dpo", tmp_path / "encoder", compare_with_base=False)
    sizes = Sizes(train=40, validation=30, test=40, questions=10, pairs=6, harder=10)
    measures: Any = ["encoder", "answers", "blind", "counterfactuals", "distance"]
    results = measure_run(
        tmp_path / "encoder", runs / "dpo", runs / "instruct", "dpo", measures, ShapesDataset(), {}, sizes
    )
    tasks = {result.task for result in results}
    assert {"shapes/shape", "shapes/vqa/all", "shapes/distance/vision", "shapes/drift/layer 1"} <= tasks
    assert {"shapes/counterfactuals/image", "shapes/sensitivity/object"} <= tasks
    assert all(np.isfinite(result.value) for result in results)


def test_the_planner_counts_the_weights_of_the_mllm(family: str, runs: Path, parts: Path) -> None:
    joined = [f"model.vision={runs / 'vision'}", f"model.language={parts / 'language'}", f"model.family={family}"]
    plan = plan_stage(load_recipe("shapes/2-instruct", joined))
    model, processor = load_mllm(runs / "instruct")
    added = len(processor.tokenizer) - AutoConfig.from_pretrained(parts / "language").vocab_size
    weights = sum(p.numel() for p in model.parameters()) - added * 32
    planned = sum(sum(counts.values()) for counts in plan.parameters.values())
    assert planned == weights
    assert plan.image_tokens == ImageTokens(processor).count(64, 64)
    facts = plan_stage(load_recipe("shapes/2-instruct", [*joined, "data.0.forms=[with_facts]"]))
    assert facts.answer_tokens > 3 * plan.answer_tokens


def test_an_encoder_of_another_architecture_is_refused(family: str, runs: Path, parts: Path) -> None:
    siglip, language = str(parts / "vision"), str(parts / "language")
    wanted = ARCHITECTURES[family]["model_type"]
    with pytest.raises(CheckpointError, match=f"is a siglip_vision_model encoder, .* takes a {wanted} one; make one"):
        build_mllm(siglip, language, family=family)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="reads the last hidden state; leave out `feature_layer`"):
        build_mllm(str(runs / "vision"), language, feature_layer=-3, family=family)  # type: ignore[arg-type]
    other: Any = next(name for name in ARCHITECTURES if name != family)
    with pytest.raises(CheckpointError, match=f"is a {wanted} encoder, .* takes a {other}_vision one"):
        read_processor(str(runs / "vision"), language, family=other)


def test_llava_takes_the_encoder_of_internvl_and_refuses_that_of_qwen(family: str, runs: Path, parts: Path) -> None:
    if family == "internvl":
        model, _ = build_mllm(str(runs / "vision"), str(parts / "language"))
        assert model.config.model_type == "llava"
    else:
        with pytest.raises(CheckpointError, match="tower of native resolution"):
            build_mllm(str(runs / "vision"), str(parts / "language"))


def test_a_processor_has_the_video_settings_that_transformers_asks_for(family: str, runs: Path) -> None:
    settings = json.loads((runs / "align" / "processor_config.json").read_text())["video_processor"]
    kind = "InternVLVideoProcessor" if family == "internvl" else "Qwen2VLVideoProcessor"
    assert (settings["video_processor_type"], settings["image_mean"]) == (kind, [0.5] * 3)


def test_an_architecture_that_is_not_trained_from_captions_is_refused(tmp_path: Path) -> None:
    loaded = load_recipe("shapes/0-vision", ["architecture={model_type: internvl_visoin}"])
    with pytest.raises(RecipeError, match=r"did you mean `internvl_vision`\?\); give one of siglip_vision_model, "):
        run_stage(loaded, output=tmp_path / "out", log=lambda line: None)
    loaded = load_recipe("shapes/0-vision", ["architecture={model_type: internvl_vision, image_size: 32}"])
    with pytest.raises(RecipeError, match="images of 64 px for an encoder of 32 px"):
        run_stage(loaded, output=tmp_path / "out2", log=lambda line: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 7}, "images of 64 px are not whole tokens of 14 px"),
        ({"window_size": 8}, "`architecture` gives no qwen2_5_vl_vision encoder that runs: "),
        ({"num_heads": 5}, "`architecture` gives no qwen2_5_vl_vision encoder that runs: "),
        ({"depth": "x"}, "`architecture` does not give a qwen2_5_vl_vision encoder: "),
        ({"image_size": 32}, "a qwen2_5_vl_vision has no `architecture.image_size`"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    loaded = load_recipe("shapes/0-vision", [f"architecture={ARCHITECTURES['qwen2_5_vl'] | change}"])
    with pytest.raises(RecipeError, match=message):
        run_stage(loaded, output=tmp_path / "out", log=lambda line: None)


def test_a_layer_besides_the_last_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the projector of internvl reads the last hidden state; remove"):
        load_recipe("shapes/1-align", ["model.family=internvl", "model.feature_layer=-3"])


def test_a_parent_of_another_family_is_refused(runs: Path, trained: Path, recipes: Path) -> None:
    loaded = load_recipe(recipes / "2-instruct.yaml", ["model.family=internvl"])
    with pytest.raises(CheckpointError, match="is a llava model, not internvl, which the recipe joins"):
        run_stage(loaded, output=runs / "other", parent=trained / "1-align", log=lambda line: None)
