"""Recipes that start from an MLLM: its rows are checked, it is trained, resumed and its encoder extracted."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image
from safetensors.torch import load_file

from pivot_hub import PivotVisionModel
from pivot_hub.cli import main
from pivot_hub.config.recipe import LoadedRecipe, load_recipe
from pivot_hub.encoder.repository import read_encoder
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.extract import extract_encoder
from pivot_hub.mllm.families import FAMILIES
from pivot_hub.mllm.load import load_mllm
from pivot_hub.mllm.vision_part import read_vision_part
from pivot_hub.probes.run import Sizes, probe_shapes
from pivot_hub.provenance import weights_sha256
from pivot_hub.training.part_trainer import PartTrainer
from pivot_hub.training.stage import run_stage
from tests.mllm.tiny_mllms import make_mllm
from tests.mllm.tiny_processors import add_processor

# One whose projector lies inside the tower of native resolution, and one of squares and tiles.
MLLMS = ("qwen2_5_vl", "internvl")
TRAINED = {"sft": {"vision", "language"}, "dpo": {"vision", "projector", "language"}}
TAIL = """
data:
  - {format: shapes, content: pairs, rows: 6}
  - {format: shapes, content: pairs, rows: 6, start: 6, world: {image_px: 112}}
args:
  num_train_epochs: 1
  per_device_train_batch_size: 4
  max_length: 512
  logging_steps: 1
  save_steps: 1
"""


def quiet(line: str) -> None:
    """Ignore progress lines."""


@pytest.fixture(scope="module", params=MLLMS)
def mllm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small MLLM, beside which its recipes lie: 1-sft, 1-dpo, and 2-dpo whose parent is 1-sft."""
    folder = tmp_path_factory.mktemp("recipes") / request.param
    make_mllm(folder, request.param)
    add_processor(folder, request.param)
    for name, start in (("1-sft", None), ("1-dpo", None), ("2-dpo", "1-sft.yaml")):
        stage = name.partition("-")[2]
        rates = ", ".join(f"{part}: 1.0e-3" for part in sorted(TRAINED[stage]))
        from_what = f"model: {{mllm: {request.param}}}" if start is None else f"parent: {start}"
        recipe = f"stage: {stage}\n{from_what}\nlearning_rate: {{{rates}}}{TAIL}"
        (folder.parent / f"{name}.yaml").write_text(recipe)
    return folder


@pytest.fixture(scope="module", params=sorted(TRAINED))
def loaded(mllm: Path, request: pytest.FixtureRequest) -> LoadedRecipe:
    return load_recipe(mllm.parent / f"1-{request.param}.yaml")


@pytest.fixture(scope="module")
def checkpoint(loaded: LoadedRecipe, mllm: Path) -> Path:
    return run_stage(loaded, mllm.parent / "runs", mllm.parent / "runs" / loaded.path.stem, log=quiet)


def test_rows_are_checked_without_weights_and_training_reuses_their_index(
    mllm: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("1-sft.yaml", "1-dpo.yaml"):
        shutil.copy(mllm.parent / name, tmp_path)
    shutil.copytree(mllm, tmp_path / mllm.name, ignore=shutil.ignore_patterns("*.safetensors"))
    stage = json.loads((checkpoint / "provenance.json").read_text())["stage"]
    command = ["data", "check", str(tmp_path / f"1-{stage}.yaml"), "--json", str(tmp_path / "check.json")]
    monkeypatch.setattr(sys, "argv", ["pivot", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    checked = json.loads((tmp_path / "check.json").read_text())
    report = json.loads((checkpoint / "report.json").read_text())["data"]
    assert report == {key: checked[key] for key in report}
    assert (report["rows"], report["skipped_rows"], report["answers_cut"]) == (12, 0, 0)


def test_the_parts_with_a_learning_rate_move_and_no_other(mllm: Path, checkpoint: Path) -> None:
    family = FAMILIES[json.loads((mllm / "config.json").read_text())["model_type"]]
    before, after = (dict(load_mllm(folder)[0].named_parameters()) for folder in (mllm, checkpoint))
    assert before.keys() == after.keys()
    moved = {family.part_of(name) for name in before if not torch.equal(before[name], after[name])}
    provenance = json.loads((checkpoint / "provenance.json").read_text())
    assert moved == TRAINED[provenance["stage"]]
    assert provenance["model"] == {"mllm": mllm.name}
    assert provenance["parts"] == {"mllm": weights_sha256(mllm)}
    assert provenance["parent"] is None


def test_a_killed_run_resumes_to_the_weights_of_one_that_was_not(
    loaded: LoadedRecipe, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = PartTrainer.compute_loss

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            raise OSError("the node is gone")
        return compute(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PartTrainer, "compute_loss", failing)
        with pytest.raises(OSError, match="the node is gone"):
            run_stage(loaded, tmp_path, tmp_path / "out", log=quiet)
    lines: list[str] = []
    resumed = run_stage(loaded, tmp_path, tmp_path / "out", log=lines.append)
    assert any("resuming from step 2" in line for line in lines)
    expected, actual = (load_file(folder / "model.safetensors") for folder in (checkpoint, resumed))
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


@pytest.mark.parametrize("loss_over", ["tokens", "rows"])
def test_a_step_does_not_depend_on_how_it_is_cut_into_batches(mllm: Path, loss_over: str, tmp_path: Path) -> None:
    """Also for the classes of transformers whose own loss does not take the labels of a whole step, such as Qwen's."""
    ended = []
    for batch in (1, 4):
        changes = [f"loss_over={loss_over}", "global_batch=4", f"args.per_device_train_batch_size={batch}"]
        loaded = load_recipe(mllm.parent / "1-sft.yaml", [*changes, "args.max_steps=2"])
        folder = run_stage(loaded, tmp_path, tmp_path / str(batch), log=quiet)
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        ended.append([(line["loss"], line["grad_norm"]) for line in log if "loss" in line])
    small, large = ended
    for step, expected in zip(small, large, strict=True):
        assert step == pytest.approx(expected, rel=1e-3)


def test_the_encoder_is_extracted_with_what_it_was_trained_from(mllm: Path, checkpoint: Path, tmp_path: Path) -> None:
    encoder = PivotVisionModel.from_pretrained(extract_encoder(checkpoint, tmp_path / "encoder"))
    expected = read_vision_part(checkpoint).tower.state_dict()
    actual = encoder.backbone.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[key], actual[key]) for key in expected)
    start = read_vision_part(mllm).tower.state_dict()
    assert any(not torch.equal(start[key], actual[key]) for key in actual)
    pivot = encoder.config.pivot
    stage = json.loads((checkpoint / "provenance.json").read_text())["stage"]
    assert (pivot["stage"], pivot["base_model"], pivot["base_revision"]) == (stage, mllm.name, None)


def test_the_trained_mllm_is_probed_and_explained(
    mllm: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, image_processor = read_encoder(extract_encoder(checkpoint, tmp_path / "encoder"))
    sizes = Sizes(train=12, validation=4, test=6)
    results = probe_shapes(model, image_processor, "tiny", "0" * 64, sizes)
    assert {result.n for result in results} >= {6}
    image = tmp_path / "image.png"
    Image.new("RGB", (100, 60), (200, 30, 30)).save(image)
    answers = ["--answer", "red", "--explain", "dpo", "--rejected", "blue", "--reference", str(mllm)]
    command = ["gradcam", str(checkpoint), str(image), "--question", "Which colour?", *answers]
    monkeypatch.setattr(sys, "argv", ["pivot", *command, "--output", str(tmp_path / "maps.png")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert Image.open(tmp_path / "maps.png").size > (100, 100)


def test_the_readmes_recipe_is_one(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    text = next(block for block in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL) if "mllm:" in block)
    (tmp_path / "1-dpo.yaml").write_text(text)
    loaded = load_recipe(tmp_path / "1-dpo.yaml")
    assert loaded.start(None) == ("Qwen/Qwen2.5-VL-3B-Instruct", None)
    assert set(loaded.recipe.learning_rate.trained()) == {"vision", "projector", "language"}


def test_a_later_stage_starts_from_its_parent_and_not_from_another_mllm(mllm: Path, tmp_path: Path) -> None:
    later = load_recipe(mllm.parent / "2-dpo.yaml")
    assert later.parent is not None
    parent = run_stage(later.parent, mllm.parent / "runs", mllm.parent / "runs" / "1-sft", log=quiet)
    folder = run_stage(later, tmp_path, tmp_path / "out", parent, log=quiet)
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["model"] == {"mllm": mllm.name}
    assert (provenance["parts"], provenance["parent"]["weights_sha256"]) == (None, weights_sha256(parent))
    (tmp_path / "1-sft.yaml").write_text(later.parent.path.read_text().replace(mllm.name, "other"))
    shutil.copy(later.path, tmp_path)
    with pytest.raises(CheckpointError, match=rf"`model.mllm` {mllm.name}, not other; give the checkpoint of this"):
        run_stage(load_recipe(tmp_path / "2-dpo.yaml"), tmp_path, tmp_path / "refused", parent, log=quiet)


def test_an_mllm_of_the_hub_is_recorded_by_its_commit(mllm: Path, tmp_path: Path) -> None:
    repo = Path(HF_HUB_CACHE) / f"models--lab--{mllm.name}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "v1").write_text("commitofv1")
    shutil.copytree(mllm, repo / "snapshots" / "commitofv1")
    of_hub = [f"model.mllm=lab/{mllm.name}", "model.revision=v1", "args.max_steps=1"]
    folder = run_stage(load_recipe(mllm.parent / "1-sft.yaml", of_hub), tmp_path, tmp_path / "out", log=quiet)
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["model"] == {"mllm": f"lab/{mllm.name}", "revision": "v1"}
    assert provenance["parts"] == {"mllm": "commitofv1"}
