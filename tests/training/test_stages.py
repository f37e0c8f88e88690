"""Stages: which weights each changes, killed runs that end with the same weights, and input that is refused."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE

from pivot_hub import PivotVisionModel
from pivot_hub.config.recipe import load_recipe
from pivot_hub.errors import CheckpointError, DataError, RecipeError, TrainingError
from pivot_hub.mllm.build import build_mllm
from pivot_hub.mllm.extract import extract_encoder
from pivot_hub.mllm.load import load_mllm
from pivot_hub.training.stage import run_stage

# The feature layer is -2 of three blocks: the projector reads blocks 0 and 1. Block 2, post-norm and pooling head are
# above it.
ABOVE = ("layers.2.", "post_layernorm", "vision_tower.head.")


def quiet(line: str) -> None:
    """Ignore progress lines."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_mllm(folder)[0].state_dict()


def moved(before: Path, after: Path) -> set[str]:
    a, b = weights(before), weights(after)
    assert a.keys() == b.keys()
    return {k for k in a if not torch.equal(a[k], b[k])}


def part(name: str) -> str:
    return "vision" if "vision_tower" in name else "projector" if "projector" in name else "language"


def test_align_moves_the_projector_only(trained: Path, parts: Path) -> None:
    start = build_mllm(str(parts / "vision"), str(parts / "language"))[0].state_dict()
    changed = {k for k, v in weights(trained / "1-align").items() if not torch.equal(v, start[k])}
    assert {part(k) for k in changed} == {"projector"}
    assert len(changed) == 4


@pytest.mark.parametrize(
    ("before", "after"), [("1-align", "2-instruct"), ("2-instruct", "3-sft"), ("2-instruct", "3-dpo")]
)
def test_later_stages_move_all_parts_but_not_above_the_feature_layer(trained: Path, before: str, after: str) -> None:
    changed = moved(trained / before, trained / after)
    assert {part(k) for k in changed} == {"vision", "projector", "language"}
    tower = {k for k in weights(trained / after) if part(k) == "vision"}
    above = {k for k in tower if any(a in k for a in ABOVE)}
    assert all(any(a in k for k in above) for a in ABOVE)
    assert not above & changed
    # A key's bias shifts all attention scores of a query equally, so its gradient is only rounding.
    assert tower - above - changed <= {k for k in tower if "k_proj.bias" in k}


def test_a_part_without_a_learning_rate_is_frozen(recipes: Path, trained: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipes / "3-dpo.yaml", ["learning_rate.vision=null"])
    folder = run_stage(loaded, trained.parent, tmp_path / "frozen", log=quiet)
    assert {part(k) for k in moved(trained / "2-instruct", folder)} == {"projector", "language"}


def test_a_loss_over_rows_does_not_depend_on_how_a_step_is_cut_into_batches(
    recipes: Path, trained: Path, tmp_path: Path
) -> None:
    ended = []
    for batch in (1, 4):
        changes = ["loss_over=rows", "global_batch=4", f"args.per_device_train_batch_size={batch}"]
        loaded = load_recipe(recipes / "3-sft.yaml", changes)
        folder = run_stage(loaded, trained.parent, tmp_path / str(batch), log=quiet)
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        ended.append((weights(folder), [line["loss"] for line in log if "loss" in line]))
    (small, small_losses), (large, large_losses) = ended
    assert small_losses == pytest.approx(large_losses, abs=1e-4)
    assert all(torch.allclose(small[name], large[name], atol=1e-4) for name in large)
    over_tokens = [json.loads(line) for line in (trained / "3-sft" / "metrics.jsonl").read_text().splitlines()]
    assert over_tokens[0]["loss"] != pytest.approx(large_losses[0], abs=1e-3)


def test_sft_and_dpo_see_the_same_rows_and_parent(trained: Path) -> None:
    sft, dpo = (json.loads((trained / s / "provenance.json").read_text()) for s in ("3-sft", "3-dpo"))
    assert sft["data"] == dpo["data"]
    assert sft["parent"]["weights_sha256"] == dpo["parent"]["weights_sha256"]
    assert sft["weights_sha256"] != dpo["weights_sha256"]


def test_a_finished_stage_holds_its_metadata_and_no_pickle(trained: Path) -> None:
    for stage in ("1-align", "2-instruct", "3-sft", "3-dpo"):
        folder = trained / stage
        report = json.loads((folder / "report.json").read_text())
        assert report["steps"] == 2
        assert report["data"]["rows"] == 8
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in log if "loss" in line] == [1, 2]
        assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
        assert not folder.with_name(f"{stage}.partial").exists()


def test_a_finished_stage_is_reused_and_another_recipe_refused(recipes: Path, trained: Path) -> None:
    before = (trained / "3-dpo" / "model.safetensors").stat().st_mtime_ns
    run_stage(load_recipe(recipes / "3-dpo.yaml"), trained.parent, log=quiet)
    assert (trained / "3-dpo" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(RecipeError, match="another version of this recipe"):
        run_stage(load_recipe(recipes / "3-dpo.yaml", ["seed=1"]), trained.parent, log=quiet)


# A kill may come at any time between checkpoints. Ctrl-C saves a checkpoint, so that run saves none before.
KILLED = [
    ("2-instruct", "2", signal.SIGKILL, "args.save_steps=1"),
    ("3-dpo", "3", signal.SIGINT, "args.save_steps=500"),
]


@pytest.mark.parametrize(("stage", "salt", "number", "saving"), KILLED)
def test_a_killed_run_ends_with_the_weights_of_one_never_killed(
    recipes: Path, trained: Path, tmp_path: Path, stage: str, salt: str, number: signal.Signals, saving: str
) -> None:
    overrides = ["data.0.rows=40", saving, "args.per_device_train_batch_size=2", f"seed={salt}"]
    whole = run_stage(load_recipe(recipes / f"{stage}.yaml", overrides), trained.parent, tmp_path / "whole", log=quiet)

    output = tmp_path / "killed"
    command = [sys.executable, "-m", "pivot_hub", "train", str(recipes / f"{stage}.yaml"), *overrides]
    command += ["--runs", str(trained.parent), "--output", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    partial = tmp_path / "killed.partial"
    log = partial / "metrics.jsonl"
    # Kill after one of the first eight of 20 steps, at a random time within the next two.
    after, within = (3, 0) if number == signal.SIGINT else (3 + os.urandom(1)[0] % 6, os.urandom(1)[0] / 255)
    deadline = time.monotonic() + 120
    while not log.is_file() or len(log.read_text().splitlines()) < after:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(within * 0.05)
    process.send_signal(number)
    _, errors = process.communicate()
    assert not output.exists()
    if number == signal.SIGINT:
        assert process.returncode == 3
        assert re.search(
            r"stopped by SIGINT \(Ctrl-C\) after step \d+ of 20, which is saved: run the same command", errors
        )
        assert len(list(partial.glob("checkpoint-*"))) == 1

    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"resuming from step [1-9]", done.stdout)
    assert not partial.exists()
    assert not moved(whole, output)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, 21))
    straight = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == [line["loss"] for line in straight if "loss" in line]


def test_a_parent_without_a_checkpoint_is_named(recipes: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run `pivot train tiny/2-instruct` first"):
        run_stage(load_recipe(recipes / "3-dpo.yaml"), tmp_path / "runs", log=quiet)
    assert not (tmp_path / "runs").exists()


def test_image_tokens_cut_by_max_length_are_refused(recipes: Path, trained: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipes / "3-dpo.yaml", ["args.max_length=20"])
    with pytest.raises(DataError, match=r"\(16 of the image\).*raise `args.max_length`"):
        run_stage(loaded, trained.parent, tmp_path / "out", log=quiet)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops_the_run(recipes: Path, trained: Path, tmp_path: Path) -> None:
    wild = [
        "learning_rate.language=1.0e+30",
        "learning_rate.vision=1.0e+30",
        "args.max_grad_norm=0",
        "args.save_steps=1",
    ]
    loaded = load_recipe(recipes / "3-sft.yaml", ["data.0.rows=24", *wild])
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf).*lower the learning rates"):
        run_stage(loaded, trained.parent, tmp_path / "out", log=quiet)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_keeps_the_last_checkpoint(
    recipes: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pivot_hub.training.sft import PivotSFTTrainer

    save, overrides = PivotSFTTrainer._save_checkpoint, ["data.0.rows=16", "args.save_steps=1"]

    def full(self: PivotSFTTrainer, *args: object) -> None:
        if self.state.global_step >= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, *args)

    monkeypatch.setattr(PivotSFTTrainer, "_save_checkpoint", full)
    loaded = load_recipe(recipes / "3-sft.yaml", overrides)
    with pytest.raises(TrainingError, match=r"the disk is full: free some space.*it resumes from"):
        run_stage(loaded, trained.parent, tmp_path / "out", log=quiet)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    lines: list[str] = []
    run_stage(loaded, trained.parent, tmp_path / "out", log=lines.append)
    assert any("resuming from step 2" in line for line in lines)


def test_base_parts_can_be_trained_again(tmp_path: Path) -> None:
    """Both base recipes run, in few steps, and give parts that an MLLM can be built from."""
    few = ["data.0.rows=8", "args.per_device_train_batch_size=4"]
    for name in ("vision", "language"):
        run_stage(load_recipe(f"shapes/0-{name}", few), output=tmp_path / name, log=quiet)
    model: Any = build_mllm(str(tmp_path / "vision"), str(tmp_path / "language"))[0]
    assert model.config.vision_config.model_type == "siglip_vision_model"
    assert model.config.text_config.model_type == "qwen2"


def test_one_process_trains_a_base_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pivot_hub.training import stage

    monkeypatch.setattr(stage, "_processes", lambda recipe: SimpleNamespace(num_processes=2, is_main_process=True))
    with pytest.raises(RecipeError, match="one process trains a base part: run `pivot train` without a launcher"):
        run_stage(load_recipe("shapes/0-vision"), output=tmp_path / "out", log=quiet)
    assert not list(tmp_path.iterdir())


def test_an_encoder_is_scored_frozen_in_a_new_mllm(recipes: Path, trained: Path, tmp_path: Path) -> None:
    """As in 4-frozen of the paper's recipes: the encoder is an override of every stage and stays unchanged."""
    repository = extract_encoder(trained / "3-dpo", tmp_path / "encoder")
    overrides = [f"model.vision={repository}"]
    align = load_recipe(recipes / "1-align.yaml", overrides)
    frozen = load_recipe(recipes / "2-instruct.yaml", [*overrides, "learning_rate.vision=null"])
    assert frozen.parent is not None
    assert frozen.parent.recipe == align.recipe
    with pytest.raises(CheckpointError, match="vision"):  # a parent of another encoder
        run_stage(frozen, trained.parent, tmp_path / "wrong", log=quiet)
    for loaded in (align, frozen):
        folder = run_stage(loaded, tmp_path / "runs", log=quiet)
    published = PivotVisionModel.from_pretrained(repository).backbone.state_dict()
    tower = cast(torch.nn.Module, load_mllm(folder)[0].model.vision_tower).state_dict()
    assert all(torch.equal(tower[name], value) for name, value in published.items())
    assert {part(n) for n in moved(tmp_path / "runs" / "tiny" / "1-align", folder)} == {"projector", "language"}


def test_parts_of_the_hub_are_recorded_by_their_commit(recipes: Path, parts: Path, tmp_path: Path) -> None:
    """Whatever revision a recipe names, the commit that was read is in provenance.json."""
    cache = Path(HF_HUB_CACHE)
    for part in ("vision", "language"):
        repo = cache / f"models--lab--{part}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(f"{part}commit")
        shutil.copytree(parts / part, repo / "snapshots" / f"{part}commit")
    loaded = load_recipe(recipes / "1-align.yaml", ["model.vision=lab/vision", "model.language=lab/language"])
    folder = run_stage(loaded, tmp_path / "runs", log=quiet)
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["parts"] == {"vision": "visioncommit", "language": "languagecommit"}
