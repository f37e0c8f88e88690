"""The CUDA path without a GPU: the package's own code on fake CUDA tensors, and the faults that a rehearsal finds."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CONFIG_MAPPING
from typer.testing import CliRunner

from pivot_hub.cli import app
from pivot_hub.errors import RehearsalError
from pivot_hub.mllm.chat_templates import chat_prompt
from pivot_hub.mllm.families import family_of
from pivot_hub.mllm.inputs import process
from pivot_hub.mllm.load import load_mllm
from pivot_hub.mllm.published_configs import published_mllms, whole_config
from pivot_hub.rehearsal.allowances import ALLOWANCES
from pivot_hub.rehearsal.library import compiled_library
from pivot_hub.rehearsal.narrow_mllm import PARTS, narrow_mllm_config, write_narrow_mllm
from pivot_hub.rehearsal.narrow_model import IMAGE_PX
from pivot_hub.rehearsal.process import rehearse_recipes
from pivot_hub.rehearsal.report import Demand, PathReport
from tests.mllm.tiny_mllms import FLAT_TOWER, TINY, make_mllm

LAYERS = 2  # of the tiny language model
GROUP_STEPS = ("grpo step", "grpo step, other layout", "rloo step", "rloo step, other layout")
STEPS = ("dpo step", "dpo step, other layout", "sft step", "instruct step", "align step", *GROUP_STEPS)
AFTER = (
    "reference log-probabilities",
    "grpo generation",
    "rloo generation",
    "encode",
    "probe features",
    "logistic probe",
    "attention probe",
    "segmentation head",
    "gradcam",
    "Space comparison",
)
FAULTLESS = ("no fault", "attention in 16 bits")
# The problem that a rehearsal of each faulty path has to name.
FAULTS = {
    **dict.fromkeys(("item", "bool", "int", "float", "tolist", "format", "equal"), "synchronisations: 1, allowed 0"),
    **dict.fromkeys(("nonzero", "mask index", "mask assignment", "inference mode"), "synchronisations: 1, allowed 0"),
    "copy to the CPU": "synchronisations: 1, allowed 0",
    "copy from the CPU": "copies from the CPU: 1, allowed 0",
    "index on the CPU": "copies from the CPU: 1, allowed 0",
    "an error on the CPU": "ZeroDivisionError",
    "two devices": "at least two devices, cuda:0 and cpu",
    "reading on CUDA only": "reads a number that the same code did not read on the CPU",
    "trained without gradient": "2 of 2 trained parameters have no gradient: 0.weight",
    "frozen with gradient": "2 frozen parameters have a gradient: 1.weight",
    "attention in float32": "flash takes 16 bits only",
    "attention with bounds on the CPU": "not on one device",
}


# Paths of whole MLLMs that are rehearsed in seconds, and all of those with a model.
FEW_PATHS = {"qwen2_5_vl": ("grpo", "grpo step"), "internvl": ("dpo", "dpo step"), "smolvlm": ("sft", "sft step")}
OTHER_FAMILIES = ("qwen3_vl", "gemma3", "llava_onevision")


@pytest.fixture(scope="module")
def reports(recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, PathReport]:
    """Report of each path of the tiny MLLM, and of each faulty path, by name."""
    _skip_without_compiler()
    folder = tmp_path_factory.mktemp("groups") / "tiny"
    shutil.copytree(recipes, folder)
    for stage in ("grpo", "rloo"):
        text = (
            (folder / "3-dpo.yaml")
            .read_text()
            .replace("stage: dpo", f"stage: {stage}\nrewards: [{{name: exact_match}}]")
        )
        text = text.replace("content: pairs", "content: questions").replace("  max_length: 256\n", "")
        (folder / f"3-{stage}.yaml").write_text(f"{text}  num_generations: 2\n  beta: 0.04\n")
    names = [str(folder / f"{n}.yaml") for n in ("3-dpo", "3-sft", "2-instruct", "1-align", "3-grpo", "3-rloo")]
    return {report.path: report for report in rehearse_recipes(names, module="tests.rehearsal.faulty_paths")}


def mllm_recipe(folder: Path, family: str, stage: str, further: str = "") -> Path:
    """Write the config of a tiny MLLM, without weights or processor, and a recipe that starts from it."""
    entry = deepcopy(TINY[family])
    text = {**entry.text, "vocab_size": 600}
    vision = {**(FLAT_TOWER if entry.vision.get("model_type") == "siglip_vision_model" else {}), **entry.vision}
    config: Any = CONFIG_MAPPING[entry.model_type]
    config(vision_config=vision, text_config=text, **entry.further).save_pretrained(folder / family / "mllm")
    rewards = "rewards: [{name: exact_match}]\n" if stage == "grpo" else ""
    source = "{format: vqa, path: x, images: y}" if stage == "grpo" else "{format: mmpr, path: x, images: y}"
    further += ", num_generations: 2" if stage == "grpo" else ""
    recipe = folder / family / f"{stage}.yaml"
    recipe.write_text(
        f"stage: {stage}\nmodel: {{mllm: mllm}}\n{rewards}data: [{source}]\n"
        "learning_rate: {vision: 1e-3, projector: 1e-3, language: 1e-3}\n"
        f"args: {{per_device_train_batch_size: 2, gradient_checkpointing: true{further}}}\n"
    )
    return recipe


@pytest.fixture(scope="module")
def mllm_reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PathReport]:
    """Report of a step of tiny whole MLLMs, by family."""
    _skip_without_compiler()
    folder = tmp_path_factory.mktemp("mllms")
    two_images = {"dpo": ", loss_type: [sigmoid, image_sigmoid]"}
    recipes = [
        str(mllm_recipe(folder, family, stage, two_images.get(stage, ""))) for family, (stage, _) in FEW_PATHS.items()
    ]
    only = "only=" + ";".join(path for _, path in FEW_PATHS.values())
    return {r.path.split()[0]: r for r in rehearse_recipes(recipes, [only], module="tests.rehearsal.mllm_paths")}


def _skip_without_compiler() -> None:
    try:
        compiled_library()
    except RehearsalError as error:
        pytest.skip(str(error))


def test_every_path_runs_on_cuda_without_a_problem(reports: dict[str, PathReport]) -> None:
    assert set(reports) == {*STEPS, *AFTER, *FAULTLESS, *FAULTS}
    assert {name: reports[name].problems for name in (*STEPS, *AFTER) if reports[name].problems} == {}
    assert all(reports[name].kernels["forward"] > 0 for name in (*STEPS, *AFTER))
    assert all(reports[name].is_step and reports[name].kernels["backward"] > 0 for name in STEPS)


def test_a_step_reads_the_loss_once_and_copies_nothing_but_generated_answers(reports: dict[str, PathReport]) -> None:
    for name in STEPS:
        of_ours = [d for d in reports[name].syncs if "part_trainer" in d.place]
        assert [demand.count for demand in of_ours] == [1], name
        if name not in GROUP_STEPS:
            assert reports[name].copies == [], name
        in_backward = [d.count for d in reports[name].syncs if d.place == "the backward pass"]
        assert sum(in_backward) <= 3, name  # more are allowed for Qwen3-VL only
        assert all(demand.allowed for demand in (*reports[name].syncs, *reports[name].copies)), name


def test_two_answers_behind_one_prompt_take_one_attention_call_a_layer(reports: dict[str, PathReport]) -> None:
    assert reports["dpo step"].attention["variable length"] == LAYERS
    assert "variable length" not in reports["dpo step, other layout"].attention


def test_answers_of_a_group_are_compared_in_one_reading(reports: dict[str, PathReport]) -> None:
    """Tokens and their mask are read once each, and whether the images of neighbours are the same once for all."""
    demands = [d for d in reports["grpo step"].syncs if "group_layout" in d.place]
    assert sum(d.count for d in demands) == 3


def needed_files(reports: Iterable[PathReport]) -> set[str]:
    """Files of the list that these paths need."""
    places = [d.place.partition(":")[0] for report in reports for d in (*report.syncs, *report.copies)]
    return {a.file for a in ALLOWANCES if any(place.endswith(a.file) for place in places)}


def test_every_allowance_is_needed(reports: dict[str, PathReport], mllm_reports: dict[str, PathReport]) -> None:
    needed = needed_files([*(reports[name] for name in STEPS), *mllm_reports.values()])
    others = {a.file for a in ALLOWANCES if any(f"/modeling_{family}.py" in a.file for family in OTHER_FAMILIES)}
    assert needed == {allowance.file for allowance in ALLOWANCES} - others


def test_a_step_of_a_whole_mllm_runs_on_cuda_without_a_problem(mllm_reports: dict[str, PathReport]) -> None:
    assert {family: report.path for family, report in mllm_reports.items()} == {
        family: f"{family} {path}" for family, (_, path) in FEW_PATHS.items()
    }
    for report in mllm_reports.values():
        assert report.problems == []
        assert report.is_step
        assert report.kernels["backward"] > report.kernels["forward"] > 0
    layers = TINY["qwen2_5_vl"].vision["depth"]
    readings = [d.count for d in mllm_reports["qwen2_5_vl"].syncs if d.kind == "list" and "modeling_qwen2_5" in d.place]
    assert sum(readings) == 2 * 3 * layers + 1  # forward and recomputed; the last one divides features into images


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dpo", "grpo"])
@pytest.mark.parametrize("family", sorted(PARTS))
def test_every_path_of_a_whole_mllm_runs_on_cuda_without_a_problem(family: str, stage: str, tmp_path: Path) -> None:
    _skip_without_compiler()
    paths = rehearse_recipes([str(mllm_recipe(tmp_path, family, stage))])
    assert {report.path: report.problems for report in paths if report.problems} == {}
    assert {f"{stage} step", f"{stage} step, other layout", "encode", "probe features", "gradcam"} < {
        report.path for report in paths
    }
    if family in OTHER_FAMILIES:
        assert any(f"/modeling_{family}.py" in file for file in needed_files(r for r in paths if r.is_step))


@pytest.mark.parametrize("name", sorted(published_mllms()))
def test_the_narrow_copy_of_a_published_mllm_keeps_layers_heads_and_vocabulary(name: str, tmp_path: Path) -> None:
    """Its processor writes as many image tokens as the projector gives features."""
    config: Any = whole_config(name)
    narrow: Any = narrow_mllm_config(config)
    kept = ("num_hidden_layers", "depth", "num_attention_heads", "num_heads", "num_key_value_heads", "vocab_size")
    for part in ("vision_config", "text_config"):
        sizes, own = (vars(getattr(each, part)) for each in (config, narrow))
        assert {key: own[key] for key in kept if key in sizes} == {key: sizes[key] for key in kept if key in sizes}
        assert own["hidden_size"] <= 8 * 32 < sizes["hidden_size"]
    # Two layers give as many tokens as all of them.
    for part in (config.vision_config, config.text_config):
        setattr(part, "depth" if hasattr(part, "depth") else "num_hidden_layers", 2)
        if getattr(part, "layer_types", None):
            part.layer_types = part.layer_types[:2]
    if hasattr(config.vision_config, "deepstack_visual_indexes"):
        config.vision_config.deepstack_visual_indexes = [0]
    write_narrow_mllm(config, tmp_path)
    model, processor = load_mllm(tmp_path)
    prompt = chat_prompt(processor, "What is it?")
    text = process(processor, prompt, [Image.new("RGB", (IMAGE_PX, IMAGE_PX), (90, 20, 200))])
    assert max(text.ids) < narrow.text_config.vocab_size
    inner: Any = model.model
    accepted = inspect.signature(inner.get_image_features).parameters
    with torch.no_grad():
        features = inner.get_image_features(**{k: v for k, v in text.images.items() if k in accepted}).pooler_output
    count = sum(f.flatten(0, -2).shape[0] for f in features)
    assert text.ids.count(family_of(model.config).image_token_id(model.config)) == count > 0


def test_a_path_without_a_fault_has_no_problem(reports: dict[str, PathReport]) -> None:
    assert [reports[name].problems for name in FAULTLESS] == [[], []]
    assert reports["attention in 16 bits"].attention == {"variable length": 1}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(reports: dict[str, PathReport], fault: str) -> None:
    assert any(FAULTS[fault] in problem for problem in reports[fault].problems), reports[fault].problems


def test_the_command_prints_a_table_and_fails_with_the_problems(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = Demand("pivot_hub/x.py:1", "number", 3)
    report = PathReport("sft step", True, {"forward": 1200}, {"mm": 1200}, {"causal": 2}, [sync], [], ["too slow"])
    monkeypatch.setattr("pivot_hub.rehearsal.process.rehearse_recipes", lambda *args: [report])
    command = ["plan", str(recipes / "3-sft.yaml"), "--rehearse", "cuda", "--json", str(tmp_path / "rehearsal.json")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "1,200" in result.stdout
    assert "3 number           pivot_hub/x.py:1: -" in result.stdout
    assert "too slow" in result.stdout
    written = json.loads((tmp_path / "rehearsal.json").read_text())
    assert PathReport.from_dict(written["paths"][0]) == report


def test_a_machine_that_cannot_rehearse_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr("pivot_hub.rehearsal.library.shutil.which", lambda name: None)
    with pytest.raises(RehearsalError, match=r"needs a C\+\+ compiler.*install one"):
        compiled_library(tmp_path)
    monkeypatch.setattr("pivot_hub.rehearsal.library.shutil.which", lambda name: "false")
    with pytest.raises(RehearsalError, match=r"false cannot compile fake_cuda\.cpp"):
        compiled_library(tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(RehearsalError, match=r"is built for CUDA 12\.8: run the real step"):
        compiled_library(tmp_path)
    assert not list(tmp_path.glob("*.so"))


def test_a_rehearsal_that_is_killed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.CompletedProcess([], -9, "", "a warning that is not the reason")
    monkeypatch.setattr("pivot_hub.rehearsal.process.compiled_library", Path)
    monkeypatch.setattr("pivot_hub.rehearsal.process.subprocess.run", lambda *args, **options: killed)
    with pytest.raises(
        RehearsalError, match=r"ended by signal 9, .* rehearse with `args.per_device_train_batch_size=1`"
    ):
        rehearse_recipes(["shapes/3-dpo"])


def test_a_recipe_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    _skip_without_compiler()
    with pytest.raises(RehearsalError, match="there is no such recipe"):
        rehearse_recipes([str(tmp_path / "absent.yaml")])


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("idefics3", r"cannot put the processor of Idefics3 together.*; rehearse a recipe of Qwen2.5-VL, .*Gemma 3"),
        ("internvl", "a vocabulary of 320 tokens is smaller than the [0-9]+ of the tokenizer"),
    ],
)
def test_an_mllm_that_cannot_be_rehearsed_is_refused_with_the_reason(family: str, message: str, tmp_path: Path) -> None:
    make_mllm(tmp_path / "mllm", family)
    with pytest.raises(RehearsalError, match=message):
        write_narrow_mllm(whole_config(str(tmp_path / "mllm")), tmp_path / "narrow")


@pytest.mark.nightly
def test_a_step_at_the_size_of_the_paper_takes_one_attention_call_a_layer() -> None:
    """Qwen2.5-1.5B has 28 layers, each of which runs again in the backward pass."""
    _skip_without_compiler()
    step = {r.path: r for r in rehearse_recipes(["siglip2-so400m/3-dpo"])}["dpo step"]
    assert step.problems == []
    assert step.attention["variable length"] == 2 * 28
    assert 5_000 < step.kernels["forward"] + step.kernels["backward"] < 10_000
