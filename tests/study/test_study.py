"""Studies: their files, a miniature from the first run to the report, and studies that fail or are stopped."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from pivot_hub.cli import app
from pivot_hub.config.data_section import ShapesData
from pivot_hub.config.recipe import RECIPES
from pivot_hub.data.row import Row
from pivot_hub.data.source import ShapesSource
from pivot_hub.data.synthetic import ShapesDataset
from pivot_hub.demo.packed_bundle import shipped_bundle
from pivot_hub.encoder import PivotVisionModel
from pivot_hub.errors import ProbeError, RecipeError, TrainingError
from pivot_hub.probes import ranking
from pivot_hub.probes.ranking import rank_pairs
from pivot_hub.probes.result import read_results
from pivot_hub.probes.run import probe_pairs
from pivot_hub.provenance import weights_sha256
from pivot_hub.study import on_policy
from pivot_hub.study.comparisons import curve_points, factor_rows, frontier_points
from pivot_hub.study.counterfactuals import probe_counterfactuals, rank_counterfactuals, sensitivity
from pivot_hub.study.design import WRONG_ANSWERS, Cell, Study, load_study
from pivot_hub.study.movement import feature_drift, hidden_states
from pivot_hub.study.on_policy import write_wrong_answers
from pivot_hub.study.report import write_report
from pivot_hub.study.runner import _files, chosen_learning_rate, run_study
from pivot_hub.study.table import STEP, StudyTable, collect_table, read_table, write_table
from pivot_hub.study.word_gradients import _kinds_of_words, word_gradients

SHAPES = RECIPES / "shapes"
TINY = {
    "train": 40,
    "validation": 30,
    "test": 40,
    "questions": 20,
    "targets_validation": 4,
    "targets_test": 6,
    "harder": 10,
    "pairs": 8,
}


def miniature(folder: Path, runs: set[str] | None = None, source: Path = SHAPES, file: str = "study.yaml") -> Path:
    """Write a shipped study with two seeds, two candidates in each search, two steps a run, and few scenes.

    Args:
        folder: Folder that the study's file and its recipes are written to.
        runs: Runs that are kept, with those they need; all runs if None.
        source: Folder of the shipped study and its recipes.
        file: File of the shipped study.
    """
    spec: dict[str, Any] = yaml.safe_load((source / file).read_text())
    spec |= {"seeds": [0, 1], "sizes": TINY}
    needed = set(spec["runs"]) if runs is None else set(runs)
    for name in reversed(spec["runs"]):
        if name in needed:
            run = spec["runs"][name]
            needed |= {run[key] for key in ("parent", "vision", "language", "rate_of", "policy") if key in run}
    spec["runs"] = {name: run for name, run in spec["runs"].items() if name in needed}
    for run in spec["runs"].values():
        if run.get("rates"):
            run["rates"] = run["rates"][:2]
        if "recipe" in run:
            small = ["args.per_device_train_batch_size=4", "data.0.rows=8", "args.save_strategy='no'"]
            small.append("args.dataloader_num_workers=0")
            if run["recipe"] in ("3-grpo", "3-rloo"):
                small[0] = "args.per_device_train_batch_size=8"
            if run["recipe"] == "0-qwen-vision":
                small.append("architecture.depth=3")
            elif run["recipe"].startswith("0-"):
                small.append("architecture.num_hidden_layers=2")
            run["change"] = [*run.get("change", []), *small]
    for factor in spec["factors"]:
        factor["pairs"] = [pair for pair in factor["pairs"] if set(pair) <= needed]
        for line in factor.get("curve", {}).get("lines", {}).values():
            for position in [position for position, run in line.items() if run not in needed]:
                del line[position]
        for line in factor.get("frontier", {}).get("lines", {}).values():
            line[:] = [run for run in line if run in needed]
        if "levels" in factor:
            factor["levels"]["runs"] = [run for run in factor["levels"]["runs"] if run in needed]
    spec["factors"] = [factor for factor in spec["factors"] if factor["pairs"]]
    beside = folder / source.name
    beside.mkdir(parents=True)
    for recipe in source.glob("[0-9]-*.yaml"):
        shutil.copy2(recipe, beside)
    if (source / "base").is_dir():
        (beside / "base").symlink_to(source / "base")
    (beside / "study.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    return beside / "study.yaml"


def report_of(table: StudyTable, study: Path, folder: Path) -> str:
    write_report(load_study(study), table, folder / "STUDY.md")
    return (folder / "STUDY.md").read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished miniature: the study's file, and its output."""
    folder = tmp_path_factory.mktemp("study")
    study = miniature(folder, {"base", "sft", "dpo", "new-dpo", "dpo-fact", "dpo-frozen"})
    run_study(study, folder / "out", jobs=1, log=lambda line: None)
    return study, folder / "out"


@pytest.mark.slow
def test_the_table_holds_every_run_with_its_conditions(finished: tuple[Path, Path], tmp_path: Path) -> None:
    study = load_study(finished[0])
    write_table(collect_table(study, finished[1]), tmp_path / "study.parquet")
    table = read_table(tmp_path / "study.parquet")
    assert table.metadata["study_sha256"] == study.sha256
    in_table = {(r["run"], r["seed"], r["candidate"]) for r in table.rows}
    assert in_table == {(c.run, c.seed, c.learning_rate) for c in study.cells()}
    assert {r["status"] for r in table.rows} == {"done"}
    for row in table.rows:
        if row["task"]:
            assert row["low"] <= row["value"] + 1e-9
            assert row["n"] >= 1
            assert len(row["draws"]) == 200
    measured = [r for r in table.rows if r["run"] == "dpo" and r["seed"] == 1]
    tasks = {r["task"] for r in measured}
    assert {"shapes/colour", "shapes/crowded/shape", "shapes/unseen/segmentation", "shapes/noisy/vqa/all"} <= tasks
    assert {"shapes/pairs", "shapes/distance/vision", "shapes/localisation/gradcam of answer"} <= tasks
    assert all((r["rows"], r["stage"], r["recipe"]) == (8, "dpo", "shapes/3-dpo") for r in measured)
    # The resamples in the table give the interval that the per-example scores give.
    result = next(
        r for r in read_results(finished[1] / "results" / "dpo" / "seed-1.json") if r.task == "shapes/vqa/all"
    )
    row = next(r for r in measured if r["task"] == "shapes/vqa/all")
    assert result.example_scores is not None
    spread = np.std(np.array(row["draws"]) * STEP)
    assert spread == pytest.approx(
        100 * np.std(result.example_scores[:, 0]) / len(result.example_scores) ** 0.5, rel=0.25
    )


@pytest.mark.slow
def test_learning_rates_are_those_of_the_candidates_that_rank_best(finished: tuple[Path, Path]) -> None:
    study, out = load_study(finished[0]), finished[1]
    for run in ("sft", "dpo"):
        scored = {c.learning_rate: read_results(out / "results" / f"{c.name}.json")[0] for c in study.candidates(run)}
        assert {r.metric for r in scored.values()} == {"ranked_right"}
        assert {r.split for r in scored.values()} == {"validation"}
        best = chosen_learning_rate(study, Cell(run, 0), out)
        assert scored[best].value == max(r.value for r in scored.values())
        for seed in (0, 1):
            metadata = json.loads((out / "cells" / run / f"seed-{seed}.json").read_text())
            assert metadata["rate"] == best
    shared = json.loads((out / "cells" / "dpo-fact" / "seed-0.json").read_text())
    assert shared["rate"] == chosen_learning_rate(study, Cell("dpo", 0), out)
    assert chosen_learning_rate(study, Cell("instruct", 0), out) is None


@pytest.mark.slow
def test_seeds_share_parents_and_differ_in_rows(finished: tuple[Path, Path]) -> None:
    out = finished[1]
    provenance = {
        (run, seed): json.loads((out / "runs" / run / f"seed-{seed}" / "provenance.json").read_text())
        for run in ("instruct", "sft", "dpo", "dpo-fact")
        for seed in (0, 1)
    }
    for seed in (0, 1):
        for run in ("sft", "dpo", "dpo-fact"):
            assert provenance[run, seed]["parent"]["weights_sha256"] == provenance["instruct", seed]["weights_sha256"]
            assert provenance[run, seed]["data"][0]["world"]["combinations"] == "seen"
    assert provenance["sft", 0]["data"] == provenance["dpo", 0]["data"]
    assert provenance["sft", 0]["data"][0]["world"]["seed"] != provenance["sft", 1]["data"][0]["world"]["seed"]


@pytest.mark.slow
def test_encoders_are_those_of_the_runs_that_the_study_names(finished: tuple[Path, Path]) -> None:
    """A frozen encoder is the parent's, and that of a new MLLM is the one of the run that it names."""
    encoders = {
        run: load_file(finished[1] / "encoders" / run / "seed-0" / "model.safetensors")
        for run in ("instruct", "dpo", "dpo-frozen", "new-dpo")
    }

    def same(a: str, b: str) -> bool:
        return all((encoders[a][key] == value).all() for key, value in encoders[b].items())

    assert same("dpo-frozen", "instruct")
    assert same("new-dpo", "dpo")
    assert not same("dpo", "instruct")


@pytest.mark.slow
def test_a_finished_study_trains_nothing_and_a_lost_result_is_measured_again(finished: tuple[Path, Path]) -> None:
    study, out = finished
    own = out / "encoders" / "dpo" / "seed-1"
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*.json") if own not in f.parents}
    lost = out / "results" / "dpo" / "seed-1.json"
    kept = [(r.task, r.metric, r.value) for r in read_results(lost)]
    lost.unlink()
    # An encoder of another checkpoint is replaced, although its folder has this run's name.
    weights = (own / "model.safetensors").read_bytes()
    shutil.rmtree(own)
    shutil.copytree(out / "encoders" / "sft" / "seed-1", own)
    run_study(study, out, jobs=1, log=lambda line: None)
    changed = {f for f, at in before.items() if f.stat().st_mtime_ns != at}
    assert changed == {lost, out / "cells" / "dpo" / "seed-1.json"}
    assert [(r.task, r.metric, r.value) for r in read_results(lost)] == kept
    assert (own / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_the_report_follows_from_the_table_to_the_byte(finished: tuple[Path, Path], tmp_path: Path) -> None:
    study, out = finished
    shutil.copytree(out / "results", tmp_path / "out" / "results")
    shutil.copytree(out / "cells", tmp_path / "out" / "cells")
    write_table(collect_table(load_study(study), out), tmp_path / "study.parquet")
    text = report_of(collect_table(load_study(study), out), study, tmp_path / "a")
    assert report_of(read_table(tmp_path / "study.parquet"), study, tmp_path / "b") == text
    for figure in (tmp_path / "a" / "study").iterdir():
        assert figure.read_bytes() == (tmp_path / "b" / "study" / figure.name).read_bytes()
    for factor in ("DPO against SFT", "The encoder frozen in stage 2", "Harder scenes"):
        assert f"## {factor}" in text
    assert str(tmp_path) not in text
    # A table in which DPO is far better, or far worse, in every seed is reported so.
    table = read_table(tmp_path / "study.parquet")
    for level, direction in ((70, "above"), (30, "below")):
        rows = [
            r | {"value": (level if r["run"] == "dpo" else 50) + 0.01 * (r["seed"] or 0), "draws": [5000] * 200}
            if r["task"] == "shapes/colour"
            else r
            for r in table.rows
        ]
        report = report_of(replace(table, rows=rows), study, tmp_path / direction)
        assert (
            f"Compared with SFT, DPO is {direction} it on colour; not shown to differ on 11 of 12 measures (2 seeds)."
            in report
        )
    changed = replace(table, metadata=table.metadata | {"study_sha256": "0"})
    assert "another version" in report_of(changed, study, tmp_path / "e")


@pytest.mark.slow
def test_the_command_reports_and_seeds_are_compared(finished: tuple[Path, Path], tmp_path: Path) -> None:
    study, out = finished
    run = CliRunner().invoke(app, ["study", str(study), "--output", str(out)])
    assert run.exit_code == 0, run.output
    text = (out / "STUDY.md").read_bytes()
    (out / "STUDY.md").unlink()
    run = CliRunner().invoke(app, ["study", str(study), "--report", "--output", str(out)])
    assert run.exit_code == 0, run.output
    assert (out / "STUDY.md").read_bytes() == text
    both = [str(out / "results" / name) for name in ("sft", "dpo")]
    run = CliRunner().invoke(app, ["compare", *both, "--draws", "200", "--json", str(tmp_path / "c.json")])
    assert run.exit_code == 0, run.output
    metadata = json.loads((tmp_path / "c.json").read_text())
    assert metadata["seeds"] == 2
    colour = next(r for r in metadata["rows"] if r["task"] == "shapes/colour")
    means = [np.mean([read_results(Path(b) / f"seed-{s}.json")[0].value for s in (0, 1)]) for b in both]
    assert colour["difference"] == pytest.approx(means[1] - means[0])
    run = CliRunner().invoke(app, ["compare", both[0], str(tmp_path)])
    assert isinstance(run.exception, ProbeError)
    assert "holds no seed-<n>.json" in str(run.exception)


@pytest.mark.slow
def test_seeds_of_two_machines_give_one_table(tmp_path: Path) -> None:
    """The second machine has the first one's table only, and trains its own parents."""
    study = miniature(tmp_path, {"instruct"})
    spec = yaml.safe_load(study.read_text())
    spec["factors"] = [{"title": "a", "question": "b", "pairs": [["align", "instruct"]], "measures": ["colour"]}]
    del spec["runs"]["instruct"]["measure"]
    study.write_text(yaml.safe_dump(spec, sort_keys=False))
    for machine, seed in (("a", "0"), ("b", "1")):
        (tmp_path / machine).mkdir()
        if machine == "b":
            shutil.copy2(tmp_path / "a" / "study.parquet", tmp_path / "b")
        run = CliRunner().invoke(app, ["study", str(study), "--seeds", seed, "--output", str(tmp_path / machine)])
        assert run.exit_code == 0, run.output
        trained = {folder.name for folder in (tmp_path / machine / "runs" / "instruct").glob("seed-?")}
        assert trained == {f"seed-{seed}"}
    first, both = (read_table(tmp_path / machine / "study.parquet").rows for machine in ("a", "b"))
    assert {(row["run"], row["seed"]) for row in both} == {(run, s) for run in ("align", "instruct") for s in (0, 1)}
    assert [row for row in both if row["seed"] == 0] == first
    # A run that failed here does not take the place of the other machine's result.
    cell = tmp_path / "b" / "cells" / "align" / "seed-0.json"
    cell.write_text(json.dumps({"run": "align", "seed": 0, "candidate": None, "status": "failed", "reason": "full"}))
    earlier = read_table(tmp_path / "b" / "study.parquet")
    assert earlier.metadata["earlier"] == []  # both ran here
    earlier.metadata["machine"] |= {"threads": 96}
    table = collect_table(load_study(study), tmp_path / "b", earlier)
    assert [row for row in table.rows if row["seed"] == 0] == first
    assert "; others with 96 thread(s) each" in report_of(table, study, tmp_path)
    cell.unlink()
    # Nothing is written where the seeds are wrong.
    modified = (tmp_path / "b" / "study.parquet").stat().st_mtime_ns
    for seeds in ("7", "x"):
        run = CliRunner().invoke(app, ["study", str(study), "--seeds", seeds, "--output", str(tmp_path / "b")])
        assert isinstance(run.exception, RecipeError)
    assert (tmp_path / "b" / "study.parquet").stat().st_mtime_ns == modified
    # Another recipe under the same plan, and a changed plan, would mix rows or lose the other machine's.
    recipe = study.parent / "2-instruct.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace("weight_decay: 0.0", "weight_decay: 0.1"))
    run = CliRunner().invoke(app, ["study", str(study), "--seeds", "1", "--output", str(tmp_path / "b")])
    assert isinstance(run.exception, ProbeError)
    recipe.write_text(text)
    study.write_text(yaml.safe_dump(spec | {"seeds": [0, 1, 2]}, sort_keys=False))
    run = CliRunner().invoke(app, ["study", str(study), "--output", str(tmp_path / "b")])
    assert isinstance(run.exception, ProbeError)
    assert "rows of another plan" in str(run.exception)
    assert "they are only there" in str(run.exception)
    assert read_table(tmp_path / "b" / "study.parquet").rows == both


def test_wrong_answers_are_kept_by_scene_and_asked_again_for_another_source(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each five answers one is right, one wrong, one is not complete, one empty, and one wrong."""
    spec = ShapesData(format="shapes", content="pairs", rows=10, start=50)
    questions = list(ShapesSource(spec.model_copy(update={"content": "questions"})).rows())
    right = {row.prompt + str(row.image): row.chosen for row in questions if isinstance(row, Row)}
    calls = []

    def answers(model: Any, processor: Any, prompts: list[str], images: Any, scenes: list[int], answers: int) -> Any:
        calls.append(scenes)
        given = {0: None, 1: "It is a moon.", 2: None, 3: "", 4: "Ten thousand."}
        return [
            [right[f"{prompt}train/{scene}"] if scene % 5 == 0 else given[scene % 5]]
            for prompt, scene in zip(prompts, scenes, strict=True)
        ]

    monkeypatch.setattr(on_policy, "sample_answers", answers)
    file = tmp_path / "answers.json"
    write_wrong_answers(trained / "2-instruct", spec, file)
    expected = {"51": "It is a moon.", "54": "Ten thousand.", "56": "It is a moon.", "59": "Ten thousand."}
    assert json.loads(file.read_text())["answers"] == expected
    write_wrong_answers(trained / "2-instruct", spec, file)
    assert calls == [list(range(50, 60))]
    write_wrong_answers(trained / "2-instruct", spec.model_copy(update={"rows": 5}), file)
    assert calls[1] == list(range(50, 55))
    write_wrong_answers(trained / "3-dpo", spec.model_copy(update={"rows": 5}), file)
    assert len(calls) == 3
    rows = list(ShapesSource(spec, {int(scene): answer for scene, answer in expected.items()}).rows())
    assert [(r.id, r.rejected) for r in rows if isinstance(r, Row)] == [(f"train/{s}", a) for s, a in expected.items()]
    assert all(right[f"{r.prompt}{r.image}"] == r.chosen for r in rows if isinstance(r, Row))


@pytest.mark.slow
def test_a_run_is_trained_on_the_wrong_answers_of_its_parent(tmp_path: Path) -> None:
    study = miniature(tmp_path, {"instruct", "dpo"})
    spec = yaml.safe_load(study.read_text())
    spec["runs"]["dpo"] |= {"policy": "instruct", "measure": []}
    del spec["runs"]["dpo"]["rates"]
    spec["runs"]["instruct"]["measure"] = []
    part = {"label": "part", "recipe": "0-vision", "measure": ["encoder"]}
    part["change"] = ["data.0.rows=8", "args.per_device_train_batch_size=4", "args.dataloader_num_workers=0"]
    spec["runs"] = {"part": part, **{name: spec["runs"][name] for name in ("align", "instruct", "dpo")}}
    spec["factors"] = [{"title": "a", "question": "b", "pairs": [["instruct", "dpo"]], "measures": ["colour"]}]
    study.write_text(yaml.safe_dump(spec, sort_keys=False))
    out = tmp_path / "out"
    run_study(study, out, seeds=[1], log=print)
    report = json.loads((out / "runs" / "dpo" / "seed-1" / "report.json").read_text())
    answers = json.loads((out / "answers" / "dpo" / "seed-1.json").read_text())["answers"]
    assert report["data"]["rows"] == len(answers) > 0
    # The parent is trained again with other weights: its answers are asked for again, and the run trained on them.
    shutil.rmtree(out / "runs" / "instruct")
    spec["runs"]["instruct"]["change"] += ["learning_rate.language=5.0e-3"]
    study.write_text(yaml.safe_dump(spec, sort_keys=False))
    before = collect_table(load_study(study), out)
    # The others are of another recipe, or of another parent. The encoder that the study trains is measured too.
    assert {row["run"] for row in before.rows} == {"part", "align"}
    assert "shapes/segmentation" in {row["task"] for row in before.rows if row["run"] == "part"}
    run_study(study, out, seeds=[1], log=print)
    checkpoint = out / "runs" / "dpo" / "seed-1"
    provenance = json.loads((checkpoint / "provenance.json").read_text())
    assert provenance["parent"]["weights_sha256"] == weights_sha256(out / "runs" / "instruct" / "seed-1")
    assert provenance["data"][0]["wrong_answers"] == "seed-1.json"
    again = json.loads((out / "answers" / "dpo" / "seed-1.json").read_text())
    assert again["weights_sha256"] == provenance["parent"]["weights_sha256"]
    assert json.loads((checkpoint / "report.json").read_text())["data"]["rows"] == len(again["answers"])
    spec["runs"]["dpo"]["recipe"] = "2-instruct"
    study.write_text(yaml.safe_dump(spec, sort_keys=False))
    with pytest.raises(RecipeError, match="`wrong_answers` is for content: pairs"):
        load_study(study)


def test_an_unknown_seed_is_an_error_message(tmp_path: Path) -> None:
    study = load_study(miniature(tmp_path, {"base", "sft"}))
    assert {cell.seed for cell in study.cells([1])} == {None, 100, 1}
    with pytest.raises(RecipeError, match=r"no seed 7; the study's seeds are 0, 1\."):
        study.cells([7])


def test_a_missing_table_is_an_error_message(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="`pivot study` writes one"):
        read_table(tmp_path / "study.parquet")


def test_a_killed_process_is_an_error_message_and_the_environment_is_restored(tmp_path: Path) -> None:
    """Processes that are started after a study get the same threads as before it."""

    def kill(line: str) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    before = dict(os.environ)
    study = miniature(tmp_path, {"base", "sft"})
    with pytest.raises(TrainingError, match=r"killed from outside.*run the same command again, with fewer --jobs"):
        run_study(study, tmp_path / "out", log=kill)
    assert dict(os.environ) == before


@pytest.mark.slow
def test_a_run_that_fails_is_reported_and_the_others_are_run(tmp_path: Path) -> None:
    study = miniature(tmp_path, {"sft", "dpo-frozen"})
    spec = yaml.safe_load(study.read_text())
    spec["runs"]["dpo"]["change"] += ["args.precompute_ref_log_probs=true"]
    study.write_text(yaml.safe_dump(spec, sort_keys=False))
    with pytest.raises(TrainingError, match=r"2 of \d+ runs failed, dpo@1e-05/seed-100 first: precompute_ref"):
        run_study(study, tmp_path / "out", log=lambda line: None)
    table = collect_table(load_study(study), tmp_path / "out")
    states = {(r["run"], r["seed"], r["candidate"]): (r["status"], r["reason"]) for r in table.rows}
    assert len(states) == len(load_study(study).cells())
    assert states["dpo", 100, 1e-5][0] == "failed"
    assert "precompute_ref_log_probs adds columns" in states["dpo", 100, 1e-5][1]
    assert states["dpo", 0, None][0] == states["dpo-frozen", 1, None][0] == "not started"
    assert states["sft", 0, None][0] == states["sft", 1, None][0] == "done"
    text = report_of(table, study, tmp_path)
    assert "done 10, failed 2, not started because of those 4" in text
    assert "dpo, seed 100: precompute_ref_log_probs adds" in text
    assert "Not run yet, or in fewer than two seeds: DPO against SFT" in text
    assert states["dpo", 100, 3e-5][0] == "failed"


def _with_base_part(
    recipe: str, policy_of: str | None = None, measure: Sequence[str] = ()
) -> Callable[[dict[str, Any]], None]:
    def change(spec: dict[str, Any]) -> None:
        part = {"label": "part", "recipe": recipe, "measure": list(measure)}
        spec["runs"] = {"part": part, **spec["runs"]}
        if policy_of is not None:
            spec["runs"][policy_of]["policy"] = "part"

    return change


def _without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda spec: spec.pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["seeds"].append(100), "`search_seed` 100 is one of `seeds`"),
        (lambda s: s["runs"]["dpo"].update(parent="instuct"), "did you mean `instruct`"),
        (lambda s: s["runs"]["dpo-frozen"].update(rate_of="instruct"), "has no `rates`"),
        (lambda s: s["factors"][0].update(measures=["color"]), "did you mean `colour`"),
        (lambda s: s["factors"][0].update(pairs=[["sft", "dpo2"]]), "which is not a run"),
        (lambda s: s["runs"]["dpo"].update(recipe=None), "needs either `recipe` or `encoder`"),
        (lambda s: s["runs"]["dpo"]["change"].append("args.betta=1"), "did you mean `beta`"),
        (lambda s: s["runs"]["dpo"].update(rats=[1e-5]), "unknown key `runs.dpo.rats` (did you mean `rates`?)"),
        (_with_base_part("0-vision", policy_of="dpo"), "`runs.dpo.policy` 'part' must be a run that trains an MLLM"),
        (_with_base_part("0-language", measure=["encoder"]), "only encoders are measured, as [encoder]"),
        (_with_base_part("0-vision", measure=["answers"]), "only encoders are measured, as [encoder]"),
        (lambda s: s["sizes"].update(scenes=4), "`sizes.scenes` is not known"),
        (_without("seeds"), "`seeds` is missing; add it"),
    ],
)
def test_a_mistake_in_the_file_is_named_before_anything_is_trained(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    study = miniature(tmp_path, {"sft", "dpo-frozen"})
    spec = yaml.safe_load(study.read_text())
    change(spec)
    study.write_text(yaml.safe_dump(spec, sort_keys=False))
    with pytest.raises(RecipeError) as error:
        load_study(study)
    assert message in str(error.value)
    assert str(study) in str(error.value) or "override" in str(error.value)


def test_remarks_are_not_part_of_the_plan(tmp_path: Path) -> None:
    study = miniature(tmp_path, {"sft", "instruct"})
    before = load_study(study).sha256
    spec = yaml.safe_load(study.read_text())
    study.write_text(yaml.safe_dump(spec | {"remarks": ["Seen afterwards."]}, sort_keys=False))
    assert load_study(study).sha256 == before
    study.write_text(yaml.safe_dump(spec | {"threats": []}, sort_keys=False))
    assert load_study(study).sha256 != before


def test_an_unknown_study_is_refused_with_the_names_of_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match="shapes/study"):
        load_study("shapes/studdy")


@pytest.mark.parametrize(
    ("name", "seeds"),
    [
        ("shapes/study", 5),
        ("shapes-224/study", 5),
        ("shapes/study-images", 3),
        ("shapes/study-grpo", 3),
        ("shapes-few/study", 5),
        ("shapes-few/study-factors", 5),
    ],
)
def test_shipped_studies_are_right(name: str, seeds: int) -> None:
    study = load_study(name)
    assert len(study.spec.seeds) >= seeds
    for factor in study.spec.factors:
        for pair in factor.pairs:
            # Runs that are compared were chosen from equally many candidates.
            tried = {len(study.candidates(study.spec.runs[run].rate_of or run)) for run in pair}
            assert len(tried - {0}) <= 1
    for cell in study.cells():
        own = _scenes(study, cell)
        for ancestor in _ancestors(study, cell):
            assert not own & _scenes(study, ancestor), f"{cell.name} trains on scenes of {ancestor.name}"


def _ancestors(study: Study, cell: Cell) -> list[Cell]:
    parent = study.spec.runs[cell.run].parent
    return [] if parent is None else [study.same_seed(parent, cell), *_ancestors(study, study.same_seed(parent, cell))]


def _scenes(study: Study, cell: Cell) -> set[int]:
    if study.spec.runs[cell.run].recipe is None:
        return set()
    files = {WRONG_ANSWERS: "answers"} if study.spec.runs[cell.run].policy else {}
    sources = cast(list[ShapesData], study.load(cell, None, files).recipe.data)
    return {i for source in sources for i in range(source.start, source.start + source.rows)}


@pytest.mark.parametrize("name", ["shapes/study", "shapes/study-images", "shapes/study-grpo", "shapes-few/study"])
def test_the_committed_report_is_that_of_the_committed_table(name: str, tmp_path: Path) -> None:
    study, committed = load_study(name), (RECIPES / name).parent
    file = RECIPES / f"{name}.parquet"
    table = read_table(file)
    assert table.metadata["study_sha256"] == study.sha256
    report = tmp_path / f"{study.path.stem.upper()}.md"
    write_report(study, table, report)
    assert report.read_text() == (committed / report.name).read_text()
    figures = RECIPES / name
    assert {f.name for f in (tmp_path / figures.name).iterdir()} == {f.name for f in figures.iterdir()}
    assert sum(f.stat().st_size for f in [file, *figures.iterdir()]) < 3_000_000


def test_words_that_differ_are_told_from_the_others() -> None:
    assert _kinds_of_words("It is red.", "It is blue.", "seen") == ["other", "other", "seen"]
    kinds = _kinds_of_words("Yes, there is a red star.", "No, there is no red star.", "seen")
    assert kinds[0] == "seen"
    assert kinds[-1] == "other"


def test_gradients_are_relative_to_the_mean_token() -> None:
    """Relative to the mean token, which is 100 over all kinds of words."""
    mllm = shipped_bundle().first
    conditions = {"feature_layer": -2, "encoder": "e", "encoder_sha256": "0", "partner": "p"}
    results = {r.task: r for r in word_gradients(mllm.model, mllm.processor, ShapesDataset(), 6, conditions)}
    assert set(results) == {
        *(f"shapes/gradient/{kind} words" for kind in ("seen", "known", "other")),
        *(f"shapes/gradient/{error_type} pairs" for error_type in ("fact", "format")),
    }
    assert all(np.isfinite(r.value) and r.value > 0 for r in results.values())
    tokens = {r.task: r.example_scores for r in results.values() if "words" in r.task}
    sums = sum(t.sum(0) for t in tokens.values() if t is not None)
    assert 100 * sums[0] / sums[1] == pytest.approx(100)


def test_swapping_the_answers_of_pairs_swaps_the_ranking() -> None:
    mllm, dataset = shipped_bundle().first, ShapesDataset()
    images, pairs = probe_pairs(dataset, "validation", 40)
    conditions = {"feature_layer": -2, "encoder": "e", "encoder_sha256": "0", "partner": "p"}
    original = rank_pairs(mllm.model, mllm.processor, pairs, images, conditions)
    swapped = [replace(p, chosen=p.rejected, rejected=p.chosen) for p in pairs]
    reversed_ = rank_pairs(mllm.model, mllm.processor, swapped, images, conditions)
    assert original.value + reversed_.value == pytest.approx(100)
    assert original.value > 55  # the shipped MLLM prefers true answers


def test_pairs_are_ranked_alike_one_by_one_and_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = shipped_bundle().first
    images, pairs = probe_pairs(ShapesDataset(), "validation", 21)
    conditions = {"feature_layer": -2, "encoder": "e", "encoder_sha256": "0", "partner": "p"}
    scores = []
    for batch in (1, 8):
        monkeypatch.setattr(ranking, "BATCH", batch)
        scores.append(rank_pairs(mllm.model, mllm.processor, pairs, images, conditions).example_scores)
    assert scores[0] is not None
    assert scores[0].tolist() == scores[1].tolist()  # type: ignore[union-attr]


CONDITIONS = {"feature_layer": -2, "encoder": "e", "encoder_sha256": "0", "partner": "p"}


def test_hidden_states_are_those_that_the_encoder_gives() -> None:
    mllm = shipped_bundle().first
    images, _ = probe_pairs(ShapesDataset(), "test", 3)
    encoder = PivotVisionModel.from_mllm(mllm.model)
    features = encoder(mllm.processor.image_processor(images=images, return_tensors="pt")["pixel_values"])
    states = hidden_states(mllm.model, mllm.processor, images)
    assert len(states) == 7  # the embeddings and six layers
    assert np.array_equal(states[-2], features.last_hidden_state.detach().numpy())


def test_drift_is_zero_below_the_layer_that_changed() -> None:
    mllm = shipped_bundle().first
    images, _ = probe_pairs(ShapesDataset(), "test", 4)
    changed = copy.deepcopy(mllm.model)
    with torch.no_grad():
        cast(Any, changed).model.vision_tower.get_submodule("encoder.layers.3").mlp.fc2.bias += 0.1
    drift = [r.value for r in feature_drift(changed, mllm.model, mllm.processor, images, CONDITIONS)]
    assert drift[:4] == [0, 0, 0, 0]
    assert min(drift[4:]) > 0.1
    assert [r.value for r in feature_drift(mllm.model, mllm.model, mllm.processor, images, CONDITIONS)] == [0] * 7


def test_features_change_more_where_two_scenes_differ() -> None:
    mllm = shipped_bundle().first
    counterfactuals = probe_counterfactuals(ShapesDataset(), "test", 20)
    values = {r.task: r for r in sensitivity(mllm.model, mllm.processor, counterfactuals, CONDITIONS)}
    assert values["shapes/sensitivity/object"].value > 2 * values["shapes/sensitivity/elsewhere"].value
    assert 50 < values["shapes/sensitivity/object share"].value < 100


def test_counterfactuals_are_ranked_by_the_image_and_not_by_the_text() -> None:
    mllm = shipped_bundle().first
    image, grey = rank_counterfactuals(
        mllm.model, mllm.processor, probe_counterfactuals(ShapesDataset(), "test", 100), CONDITIONS
    )
    assert (image.task, grey.task) == ("shapes/counterfactuals/image", "shapes/counterfactuals/grey image")
    assert image.value > grey.value
    assert abs(grey.value - 50) < 15  # three standard errors


def compared(folder: Path, **keys: Any) -> tuple[Study, StudyTable]:
    """A study of three runs with written values: colour 50 + 2 for each rate, shape 70 for all, moved 1, 10 and 100."""
    spec = yaml.safe_load((SHAPES / "study.yaml").read_text())
    measure = ["encoder", "distance"]
    rates = {"none": 0, "low": 1, "high": 2}
    spec |= {
        "runs": {name: {"label": name, "encoder": "base/vision", "measure": measure} for name in rates},
        "factors": [{"title": "T", "question": "Q?", "pairs": [["none", "high"]], "measures": ["seeing"], **keys}],
        "composites": {"seeing": ["colour", "shape"]},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(spec))
    rows = [
        {"run": run, "seed": seed, "candidate": None, "task": task, "metric": metric, "value": value}
        | {"draws": [round(value / STEP)] * 200, "status": "done", "duration_s": 1.0}
        for run, rate in rates.items()
        for seed in spec["seeds"]
        for task, metric, value in (
            ("shapes/colour", "balanced_accuracy", 50.0 + 2 * rate + 0.1 * seed * rate),
            ("shapes/shape", "balanced_accuracy", 70.0),
            ("shapes/distance/vision", "relative_distance", 10.0**rate),
        )
    ]
    return load_study(folder / "study.yaml"), StudyTable(rows, {})


def test_a_composite_is_the_mean_of_its_measures(tmp_path: Path) -> None:
    study, table = compared(tmp_path)
    (row,) = factor_rows(study, table, study.spec.factors[0])
    assert row.first_value == pytest.approx(60)
    assert row.difference == pytest.approx(np.mean([(4 + 0.2 * seed) / 2 for seed in study.spec.seeds]))
    assert row.verdict == "shown"


def test_a_frontier_has_the_gain_over_the_baseline_at_each_distance(tmp_path: Path) -> None:
    frontier = {"x": "vision moved", "y": "seeing", "baseline": "none", "lines": {"DPO": ["low", "high"]}}
    study, table = compared(tmp_path, frontier=frontier)
    plane = study.spec.factors[0].frontier
    assert plane is not None
    low, high = frontier_points(table, study, plane)["DPO"]
    assert [low.x, high.x] == pytest.approx([10, 100])
    assert low.y == pytest.approx(np.mean([(2 + 0.1 * seed) / 2 for seed in study.spec.seeds]))
    assert 0 < low.half < high.half
    table = StudyTable(
        table.rows,
        {"versions": dict.fromkeys(("torch", "transformers", "trl")), "machine": None, "study_sha256": study.sha256},
    )
    write_report(study, table, tmp_path / "REPORT.md")
    assert "t-frontier.png" in (tmp_path / "REPORT.md").read_text()
    assert (tmp_path / "study" / "t-frontier.png").is_file()
    # A brief report has the comparisons before the method, and the other figures behind it.
    spec = yaml.safe_load((tmp_path / "study.yaml").read_text())
    spec["factors"][0]["change_of_mind"] = "A larger difference."
    plain = load_study(tmp_path / "study.yaml").sha256
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(spec | {"brief": True}))
    brief = load_study(tmp_path / "study.yaml")
    assert brief.sha256 != plain
    write_report(brief, table, tmp_path / "REPORT.md")
    text = (tmp_path / "REPORT.md").read_text()
    parts = [
        "t-frontier.png",
        "**What would change our mind.** A larger difference.",
        "## Method",
        "## Details",
        "(study/t.png)",
    ]
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"composites": {"seeing": ["color"]}}, "names 'color', which is not a measure"),
        ({"composites": {"colour": ["shape"]}}, "has the name of a measure"),
    ],
)
def test_a_mistake_in_a_composite_is_named(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    compared(tmp_path)
    spec = yaml.safe_load((tmp_path / "study.yaml").read_text()) | keys
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(spec))
    with pytest.raises(RecipeError, match=message):
        load_study(tmp_path / "study.yaml")


def test_a_mistake_in_a_frontier_is_named(tmp_path: Path) -> None:
    frontier = {"x": "vision moved", "y": "seeing", "baseline": "none", "lines": {"DPO": ["lo"]}}
    with pytest.raises(RecipeError, match="names 'lo', which is not a run"):
        compared(tmp_path, frontier=frontier)


def test_seeds_start_from_one_checkpoint_of_a_shared_run(tmp_path: Path) -> None:
    file = miniature(tmp_path, {"sft"})
    plain = load_study(file)
    spec = yaml.safe_load(file.read_text())
    spec["runs"]["align"]["shared"] = spec["runs"]["instruct"]["shared"] = True
    spec["change"] = ["data.0.world.seed=1{seed}"]
    file.write_text(yaml.safe_dump(spec, sort_keys=False))
    study = load_study(file)
    assert study.sha256 != plain.sha256
    trained = [cell.name for cell in study.cells() if cell.learning_rate is None]
    assert trained == ["align/once", "instruct/once", "sft/seed-0", "sft/seed-1"]
    for seed in study.spec.seeds:
        assert Cell("instruct", None) in study.needs(Cell("sft", seed))
    worlds = [study.load(Cell(*cell)).recipe.data[0].world.seed for cell in (("instruct", None), ("sft", 1))]  # type: ignore[union-attr]
    assert worlds == [10, 11]
    # A new MLLM on the encoder of a shared run reads the one that was extracted once.
    spec["runs"]["new"] = {"label": "new", "recipe": "1-align", "vision": "instruct"}
    file.write_text(yaml.safe_dump(spec, sort_keys=False))
    files = _files(load_study(file), Cell("new", 1), tmp_path)
    assert files["model.vision"] == str(tmp_path / "encoders" / "instruct" / "once")


def test_a_shared_run_is_a_point_of_a_curve_without_an_interval(tmp_path: Path) -> None:
    curve = {"axis": "rate", "lines": {"DPO": {0: "none", 1: "low"}}}
    study, table = compared(tmp_path, curve=curve)
    factor = study.spec.factors[0]
    assert factor.curve is not None
    once = [row | {"seed": None} for row in table.rows if row["run"] == "none" and row["seed"] == 0]
    each = [row for row in table.rows if row["run"] == "low"]
    points = curve_points(StudyTable([*once, *each], {}), study, factor, factor.curve)["seeing"]["DPO"]
    assert points[0] == (0, 60.0, 0.0)
    assert len(points) == 2


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("instruct", "`runs.instruct` is shared by all seeds, and its `parent` 'align' is not; share that run too"),
        ("sft", "`runs.sft` is shared by all seeds and has `rates`; give it a learning rate by `change`"),
    ],
)
def test_a_shared_run_that_differs_by_seed_is_refused(tmp_path: Path, run: str, message: str) -> None:
    file = miniature(tmp_path, {"sft"})
    spec = yaml.safe_load(file.read_text())
    spec["runs"][run]["shared"] = True
    if run == "sft":
        spec["runs"]["align"]["shared"] = spec["runs"]["instruct"]["shared"] = True
    file.write_text(yaml.safe_dump(spec, sort_keys=False))
    with pytest.raises(RecipeError, match=message):
        load_study(file)


@pytest.mark.parametrize(
    ("parent", "message"),
    [
        ("alin", r"`runs.instruct.parent` 'alin' is not the name of an earlier run \(did you mean `align`\?\)"),
        ("align", "`runs.instruct.parent` 'align' stands below `instruct`, which needs it; move it up"),
        ("instruct", "`runs.instruct.parent` names the run itself; give an earlier run"),
    ],
)
def test_a_run_that_starts_from_none_above_it_is_named(tmp_path: Path, parent: str, message: str) -> None:
    compared(tmp_path)
    spec = yaml.safe_load((tmp_path / "study.yaml").read_text())
    align = {"label": "align", "recipe": str(SHAPES / "1-align.yaml")}
    spec["runs"] |= {"instruct": {"label": "instruct", "recipe": "2-instruct", "parent": parent}, "align": align}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    with pytest.raises(RecipeError, match=message):
        load_study(tmp_path / "study.yaml")


@pytest.mark.slow
def test_a_killed_study_leaves_no_process_and_resumes(tmp_path: Path) -> None:
    study, out = miniature(tmp_path, {"sft", "instruct"}), tmp_path / "out"
    command = [sys.executable, "-m", "pivot_hub", "study", str(study), "--output", str(out), "--jobs", "2"]
    first = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    _wait_for(lambda: any(out.glob("cells/instruct/*.json")), 240)
    first.kill()
    first.wait()

    def gone() -> bool:
        try:
            os.killpg(first.pid, 0)
        except ProcessLookupError:
            return True
        return False

    _wait_for(gone, 30)
    before = {f: f.stat().st_mtime_ns for f in out.glob("runs/*/*/model.safetensors")}
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f.stat().st_mtime_ns == at for f, at in before.items())
    assert {r["status"] for r in read_table(out / "study.parquet").rows} == {"done"}


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.2)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("shapes/study", None),
        ("shapes-224/study", {"sft-10", "dpo-10", "image", "grpo", "half-captions"}),
        ("shapes-few/study", None),
        ("shapes-few/study-factors", None),
    ],
)
def test_a_miniature_of_the_whole_study(name: str, runs: set[str] | None, tmp_path: Path) -> None:
    """All of the studies on CPU; of the study for a GPU the primary comparison and a control, with its base parts."""
    folder, file = name.split("/")
    study = miniature(tmp_path, runs, RECIPES / folder, f"{file}.yaml")
    run_study(study, tmp_path / "out", jobs=2, log=print)
    table = collect_table(load_study(study), tmp_path / "out")
    assert {r["status"] for r in table.rows} == {"done"}
    text = report_of(table, study, tmp_path)
    assert "Not run yet" not in text
    for factor in load_study(study).spec.factors:
        assert f"## {factor.title}" in text
