"""Checkpoints: damaged ones are passed over by name, cut-off ones are cleared, totals outlive a resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pivot_hub.config.recipe import load_recipe
from pivot_hub.errors import CheckpointError, OutputError, TrainingError
from pivot_hub.outputs import lock_output
from pivot_hub.training.checkpoints import last_checkpoint, write_checksums
from pivot_hub.training.part_trainer import PartTrainer
from pivot_hub.training.stage import run_stage


def quiet(line: str) -> None:
    """Ignore progress lines."""


def checkpoint(work: Path, step: int) -> Path:
    folder = work / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "optimizer.pt").write_bytes(bytes(100))
    (folder / "trainer_state.json").write_text("{}")
    write_checksums(folder)
    return folder


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_checkpoint_cut_off_while_written_is_cleared(tmp_path: Path) -> None:
    for step, state in ((2, '{"global_step": 2}'), (4, '{"global_st'), (6, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    lines: list[str] = []
    assert last_checkpoint(tmp_path, lines.append) == tmp_path / "checkpoint-2"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    assert "without a check of its files" in lines[0]  # written by an earlier version


@pytest.mark.parametrize("file", ["optimizer.pt", "trainer_state.json", "checksums.json"])
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path: Path, file: str) -> None:
    folders = [checkpoint(tmp_path, step) for step in (2, 10)]
    if file == "optimizer.pt":
        flip_bit(folders[1] / file)
    else:
        (folders[1] / file).write_text("[]")
    lines: list[str] = []
    assert last_checkpoint(tmp_path, lines.append) == folders[0]
    assert f"checkpoint-10 is damaged: {file} is not as it was written" in lines[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "damaged-10"]


def test_the_only_checkpoint_is_damaged(tmp_path: Path) -> None:
    (checkpoint(tmp_path, 2) / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer.pt is not as it was written.*to train from the start"):
        last_checkpoint(tmp_path, quiet)
    assert last_checkpoint(tmp_path, quiet) is None
    assert (tmp_path / "damaged-2").is_dir()


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let a run fail in the step after `step`."""
    compute = PartTrainer.compute_loss

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise OSError("the node is gone")
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(PartTrainer, "compute_loss", failing)


def test_a_run_resumed_from_the_checkpoint_before_a_damaged_one_has_the_logs_of_a_run_never_stopped(
    recipes: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps a log and three a checkpoint: what was summed since the last log is in the checkpoint, too."""
    loaded = load_recipe(
        recipes / "3-dpo.yaml",
        ["data.0.rows=28", "args.logging_steps=2", "args.save_steps=3", "args.save_total_limit=3"],
    )
    whole = run_stage(loaded, trained.parent, tmp_path / "whole", log=quiet)
    stop_at(monkeypatch, 6)
    with pytest.raises(OSError, match="the node is gone"):
        run_stage(loaded, trained.parent, tmp_path / "out", log=quiet)
    monkeypatch.undo()
    flip_bit(tmp_path / "out.partial" / "checkpoint-6" / "optimizer.pt")
    lines: list[str] = []
    resumed = run_stage(loaded, trained.parent, tmp_path / "out", log=lines.append)
    assert any("resuming from step 3" in line for line in lines)
    expected, actual = (
        [
            {k: v for k, v in json.loads(line).items() if "runtime" not in k and "per_second" not in k}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (whole, resumed)
    )
    assert expected[-1]["train_loss"] == pytest.approx(actual[-1]["train_loss"], rel=1e-12)
    assert actual[:-1] == expected[:-1]
    assert expected[-2]["num_tokens"] > expected[0]["num_tokens"]
    reports = [json.loads((folder / "report.json").read_text()) for folder in (whole, resumed)]
    assert reports[1]["train_loss"] == pytest.approx(reports[0]["train_loss"], rel=1e-12)


def test_a_second_run_is_refused_and_touches_nothing(recipes: Path, trained: Path, tmp_path: Path) -> None:
    output, work = tmp_path / "out", tmp_path / "out.partial"
    work.mkdir()
    (work / "of-the-first").touch()
    shutil.copy(trained / "3-sft" / "recipe.yaml", work / "recipe.yaml")
    loaded = load_recipe(recipes / "3-sft.yaml")
    with lock_output(output), pytest.raises(OutputError, match=r"process \d+ on .* \(since 20"):
        run_stage(loaded, trained.parent, output, log=quiet)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["of-the-first", "out.partial", "recipe.yaml"]


@pytest.mark.parametrize("inner", ["notes", "file"])
def test_an_output_with_other_files_is_refused_and_not_touched(
    recipes: Path, trained: Path, tmp_path: Path, inner: str
) -> None:
    output = tmp_path / "out"
    if inner == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "notes.txt").write_text("mine")
    with pytest.raises(Exception, match="another --output") as refusal:
        run_stage(load_recipe(recipes / "3-sft.yaml"), trained.parent, output, log=quiet)
    assert getattr(refusal.value, "exit_code", None) == 2
    assert (output if inner == "file" else output / "notes.txt").read_text() == "mine"


def test_the_current_folder_can_be_the_output(
    recipes: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "here"
    output.mkdir()
    monkeypatch.chdir(output)
    run_stage(load_recipe(recipes / "1-align.yaml"), trained.parent, ".", log=quiet)
    assert (output / "report.json").is_file()
    with pytest.raises(OutputError, match="give another --output"):
        run_stage(load_recipe(recipes / "1-align.yaml"), trained.parent, "/", log=quiet)


def test_weights_that_are_not_finite_are_never_a_finished_run(recipes: Path, trained: Path, tmp_path: Path) -> None:
    """The loss of the last step is finite: it is computed before the weights are changed."""
    wild = ["learning_rate.language=1.0e+38", "args.max_steps=1", "args.lr_scheduler_type=constant"]
    with pytest.raises(TrainingError, match=r"of \d+ trained tensors are not finite.*Lower the learning rates"):
        run_stage(load_recipe(recipes / "3-sft.yaml", wild), trained.parent, tmp_path / "out", log=quiet)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial" / "whole").exists()
