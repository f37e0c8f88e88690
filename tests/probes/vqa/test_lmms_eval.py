"""`pivot eval vqa` on files that lmms-eval wrote (see tests/conformance/vqa_tasks.py), and the rules for answers."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pivot_hub import __version__
from pivot_hub.data.choices import chosen_letter, options_in, same_choice
from pivot_hub.data.synthetic import ShapesDataset
from pivot_hub.errors import CheckpointError, OutputError, ProbeError
from pivot_hub.mllm.load import load_mllm
from pivot_hub.probes.result import ProbeResult, read_results
from pivot_hub.probes.vqa import lmms_eval as lmms
from pivot_hub.probes.vqa.benchmarks import BENCHMARKS, GROUPS
from pivot_hub.probes.vqa.lmms_eval import OVERALL, average, evaluate_vqa, read_task, tower_metadata
from pivot_hub.probes.vqa.rule_judges import ask_mathvista, score_mathvista
from pivot_hub.probes.vqa.synthetic import generate_answers

RECORDED = Path(__file__).with_name("recorded")
# Twelve rows: two right answers, then a wrong one, and so on. Values that differ from 2 in 3 were computed by hand.
EXPECTED = dict.fromkeys(BENCHMARKS, (200 / 3, 12)) | {
    "mme": (75.0, 5),  # five images of three categories, 62.5, 62.5 and 100: a wrong "none" counts as no
    "mmbench_en": (100 / 3, 6),  # questions, each right only if both of its rotations are
    "mmbench_cn": (100 / 3, 6),
    "seed_bench": (200 / 3, 9),  # three of the twelve are videos
    "textvqa": (140 / 3, 12),
    "mmvp": (100 / 3, 6),  # pairs
    "cv_bench": (62.5, 12),  # 2D: 75 of ADE20K, 75 of COCO; 3D: 50
}
# Stands in for Python: `-c` asks for versions, and `-m` runs a task by copying what lmms-eval wrote for it.
PROGRAM = f"""#!{sys.executable}
import json, pathlib, shutil, sys, time
if sys.argv[1] == "-c":
    old = pathlib.Path(__file__).with_name("old").exists()
    ours = "0.0" if old else {__version__!r}
    print(json.dumps({{"lmms_eval": "0.7.3", "torch": "2", "transformers": "5", "datasets": "5", "pivot_hub": ours}}))
    sys.exit()
assert sys.argv[2] == "pivot_hub.probes.vqa.lmms_model"
rest = [a for a in sys.argv[3:] if a != "--log_samples"]
options = dict(zip(rest[::2], rest[1::2]))
task, target = options["--tasks"], pathlib.Path(options["--output_path"]) / "model"
with open(pathlib.Path(__file__).with_name("calls"), "a") as calls:
    calls.write(f"{{task}} {{options.get('--limit')}}\\n")
if task == "tiny_mmvp" and pathlib.Path(__file__).with_name("slow").exists():
    time.sleep(60)
if task == "tiny_none":
    sys.exit()
if task == "tiny_gqa" and pathlib.Path(__file__).with_name("broken").exists():
    sys.exit("ValueError: Tasks not found: tiny_gqa")
target.mkdir(parents=True)
recorded = pathlib.Path({str(RECORDED)!r})
shutil.copy(recorded / f"recorded_samples_{{task}}.jsonl", target / f"now_samples_{{task}}.jsonl")
whole = json.loads((recorded / "recorded_results.json").read_text())
whole["configs"] = {{task: {{"test_split": "test"}}}}
(target / "now_results.json").write_text(json.dumps(whole))
"""


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the benchmarks the names that they were recorded with."""
    for name, benchmark in BENCHMARKS.items():
        monkeypatch.setitem(BENCHMARKS, name, dataclasses.replace(benchmark, task=f"tiny_{name}"))


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Write a stand-in for a Python with lmms-eval; the file `calls` beside it lists the tasks that it ran."""
    file = tmp_path / "program" / "python"
    file.parent.mkdir()
    file.write_text(PROGRAM)
    file.chmod(0o755)
    return file


@pytest.fixture(scope="module")
def mllm(trained: Path) -> Path:
    return trained / "3-dpo"


def calls(program: Path) -> list[str]:
    file = program.with_name("calls")
    return file.read_text().splitlines() if file.exists() else []


def silent(line: str) -> None:
    pass


def test_benchmarks_are_those_of_the_paper() -> None:
    assert Counter(b.group for b in BENCHMARKS.values()) == dict(zip(GROUPS, (5, 4, 4, 3), strict=True))
    assert len({b.task for b in BENCHMARKS.values()}) == 16


@pytest.mark.usefixtures("tiny")
def test_every_benchmark_is_read_and_groups_are_averaged(mllm: Path, program: Path, tmp_path: Path) -> None:
    evaluation = evaluate_vqa(mllm, tmp_path / "out", python=program, log=silent)
    by_name = {r.task.removeprefix("vqa/"): r for r in evaluation.results}
    assert {name: (round(r.value, 6), r.n) for name, r in by_name.items()} == {
        name: (round(value, 6), n) for name, (value, n) in EXPECTED.items()
    }
    assert len(calls(program)) == 16
    assert evaluation.refused == []
    values = {name: value for name, (value, _) in EXPECTED.items()}
    for group in (*GROUPS, OVERALL):
        expected = np.mean([v for name, v in values.items() if group in (BENCHMARKS[name].group, OVERALL)])
        mean = next(r for r in evaluation.averages if r.task == f"vqa/{group}")
        assert mean.value == pytest.approx(expected)
        assert mean.ci95[0] < mean.value < mean.ci95[1]
    mme = by_name["mme"]
    assert (mme.split, mme.metric, mme.unit) == ("test", "perception_score", "percent")
    assert mme.protocol == "lmms-eval 0.7.3, tiny_mme, mme_perception_score, greedy, float32"
    assert (mme.partner, mme.feature_layer, mme.versions["lmms_eval"]) == ("3-dpo", -2, "0.7.3")
    assert mme.encoder_sha256 == tower_metadata(mllm)["encoder_sha256"]
    assert len({r.data_sha256 for r in evaluation.results}) == 16
    stored = read_results(tmp_path / "out" / "results.json")
    assert stored == [*evaluation.results, *evaluation.averages]
    assert stored[0].example_scores is not None
    assert stored[0].example_scores.shape == (5, 10, 2)


@pytest.mark.usefixtures("tiny")
def test_finished_tasks_are_not_run_again(mllm: Path, trained: Path, program: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = evaluate_vqa(mllm, out, ["gqa", "mmvp"], python=program, log=silent)
    assert calls(program) == ["tiny_gqa None", "tiny_mmvp None"]
    again = evaluate_vqa(mllm, out, ["mmvp", "cv_bench", "realworldqa", "gqa"], python=program, log=silent)
    assert calls(program)[2:] == ["tiny_cv_bench None", "tiny_realworldqa None"]
    assert {r.task: r for r in first.results}.items() <= {r.task: r for r in again.results}.items()
    assert [r.task for r in again.averages] == ["vqa/Vision-centric"]
    evaluate_vqa(mllm, out, ["gqa"], limit=4, python=program, log=silent)
    evaluate_vqa(mllm, out, ["gqa"], limit=4, dtype="bfloat16", python=program, log=silent)
    assert calls(program)[4:] == ["tiny_gqa 4", "tiny_gqa 4"]
    (out / "gqa" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"gqa holds notes\.txt, which is not part of a result of a task"):
        evaluate_vqa(mllm, out, ["gqa"], python=program, log=silent)
    with pytest.raises(ProbeError, match=r"gqa holds the result of another MLLM; choose another --output"):
        evaluate_vqa(trained / "3-sft", out, ["gqa"], python=program, log=silent)


@pytest.mark.usefixtures("tiny")
def test_no_average_over_missing_or_limited_tasks(mllm: Path, program: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate_vqa(mllm, out, ["mmvp", "realworldqa"], python=program, log=silent)
    evaluation = evaluate_vqa(mllm, out, ["cv_bench"], limit=8, python=program, log=silent)
    assert evaluation.results[0].protocol.endswith(", the first 8 questions only")
    assert evaluation.averages == []
    assert evaluation.refused[0] == "Vision-centric is not averaged: run with --limit cv_bench."
    assert evaluation.refused[1].startswith("All 16 is not averaged: missing mme, mmbench_en,")
    assert evaluation.refused[1].endswith("docvqa; run with --limit cv_bench.")
    assert len(evaluation.refused) == 2  # no benchmark of the other groups was run
    with pytest.raises(ProbeError, match="Knowledge is not averaged: missing scienceqa, mmmu, mathvista, ai2d"):
        average("Knowledge", {})


@pytest.mark.usefixtures("tiny")
def test_a_failed_task_leaves_nothing_and_the_next_run_resumes(mllm: Path, program: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program.with_name("broken").touch()
    with pytest.raises(ProbeError, match=r"tiny_gqa: lmms-eval failed: ValueError: Tasks not found: tiny_gqa; its log"):
        evaluate_vqa(mllm, out, ["mmvp", "gqa"], python=program, log=silent)
    assert sorted(p.name for p in out.iterdir()) == ["gqa.log", "mmvp", "mmvp.log"]
    program.with_name("broken").unlink()
    assert len(evaluate_vqa(mllm, out, ["mmvp", "gqa"], python=program, log=silent).results) == 2
    assert calls(program) == ["tiny_mmvp None", "tiny_gqa None", "tiny_gqa None"]


@pytest.mark.slow
def test_a_killed_command_resumes(mllm: Path, program: Path, tmp_path: Path) -> None:
    """Run through the command line, on tasks that are no benchmarks."""
    program.with_name("slow").touch()
    options = ["--output", "out", "--python", str(program), "--tasks", "tiny_gqa,tiny_mmvp"]
    command = [sys.executable, "-m", "pivot_hub", "eval", "vqa", str(mllm), *options]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(calls(program)) < 2 and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert (tmp_path / "out" / "tiny_gqa").is_dir()
    assert not (tmp_path / "out" / "tiny_mmvp").exists()
    program.with_name("slow").unlink()
    command[-1] = "tiny_gqa"
    done = subprocess.run(
        [*command, "--json", "results.json"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "tiny_gqa: finished before" in done.stdout
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["averages"] == stored["refused"] == []
    assert [(r["task"], r["metric"]) for r in stored["results"]] == [("vqa/tiny_gqa", "exact_match")]
    assert stored["results"][0]["value"] == pytest.approx(200 / 3)


@pytest.mark.usefixtures("tiny")
def test_numbers_that_do_not_follow_from_the_samples_are_refused(mllm: Path, program: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate_vqa(mllm, out, ["gqa"], python=program, log=silent)
    metadata = {"encoder": "tower", "encoder_sha256": "0", "feature_layer": -2}
    file = next((out / "gqa").rglob("*_results.json"))
    assert read_task(out / "gqa", "gqa", metadata)[0].value == pytest.approx(200 / 3)
    file.write_text(file.read_text().replace("0.6666666666666666", "0.7"))
    with pytest.raises(ProbeError, match=r"gqa: lmms-eval gives exact_match 0\.7, and its samples 0\.66667; delete"):
        read_task(out / "gqa", "gqa", metadata)
    log = next((out / "gqa").rglob("*.jsonl"))
    log.write_text("")
    with pytest.raises(ProbeError, match="gqa: none of its questions counts for exact_match; give a larger"):
        read_task(out / "gqa", "gqa", metadata)


def test_bad_input_is_refused(
    mllm: Path, parts: Path, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    options: dict[str, Any]
    for options, message in (
        ({"dtype": "int8"}, "give one of float32, float16, bfloat16"),
        ({"limit": 0}, "a limit of 0 questions leaves none"),
        ({"tasks": [""]}, "'' is no task; give names as in --tasks gqa,mmvp"),
        ({"tasks": ["../gqa"]}, "is no task"),
        ({"tasks": ["own"], "include": tmp_path / "none"}, "holds no task file of lmms-eval"),
        ({"tasks": ["tiny_none"]}, "tiny_none: lmms-eval wrote no result of this task alone; name single tasks"),
        ({"tasks": ["tiny_mmvp", "tiny_mme"]}, "tiny_mmvp: no metric of this task has a number for each question"),
    ):
        with pytest.raises(ProbeError, match=message):
            evaluate_vqa(mllm, out, python=program, log=silent, **options)
    (tmp_path / "images" / "mme").mkdir(parents=True)
    with pytest.raises(ProbeError, match="mme exists and is no result of this command; choose another --output"):
        evaluate_vqa(mllm, tmp_path / "images", python=program, log=silent)
    with pytest.raises(CheckpointError, match="is no MLLM of the table"):
        evaluate_vqa(parts / "language", out, python=program)
    shutil.copytree(mllm, tmp_path / "a,b")
    with pytest.raises(ProbeError, match="commas and equals signs; rename the folder"):
        evaluate_vqa(tmp_path / "a,b", out, python=program)
    program.with_name("old").touch()
    with pytest.raises(ProbeError, match=r"has pivot_hub 0\.0, this is .*; install it there too"):
        evaluate_vqa(mllm, out, ["gqa"], python=program)
    monkeypatch.delenv(lmms.PYTHON, raising=False)
    remedy = re.escape("make one with `python -m venv .lmms && .lmms/bin/pip install 'pivot-hub[eval]'`")
    with pytest.raises(ProbeError, match=f"no environment with lmms-eval .*lmms-eval.*; {remedy}"):
        evaluate_vqa(mllm, out, ["gqa"])
    monkeypatch.setenv(lmms.PYTHON, str(tmp_path / "absent"))
    with pytest.raises(ProbeError, match=f"absent cannot be run .*; {remedy}"):
        evaluate_vqa(mllm, out, ["gqa"])


def test_the_towers_hash_is_of_the_tower_alone(trained: Path, tmp_path: Path) -> None:
    one, two = (tower_metadata(trained / stage)["encoder_sha256"] for stage in ("2-instruct", "3-dpo"))
    assert one != two
    copy = tmp_path / "copy"
    shutil.copytree(trained / "3-dpo", copy)
    weights = load_file(copy / "model.safetensors")
    head = next(k for k in weights if "vision_tower" not in k)
    save_file(weights | {head: weights[head] + 1}, copy / "model.safetensors", {"format": "pt"})
    assert tower_metadata(copy)["encoder_sha256"] == two
    tower = next(k for k in weights if "vision_tower" in k)
    save_file(weights | {tower: weights[tower].bfloat16()}, copy / "model.safetensors", {"format": "pt"})
    assert tower_metadata(copy)["encoder_sha256"] not in (one, two)


@pytest.mark.parametrize(
    "answer", ["(A)", "A", "A.", "(a)", "a", "A) yes", "A: yes", "(A) yes.", "yes", "Yes.", "A yes"]
)
def test_an_option_is_recognised_in_every_form(answer: str) -> None:
    question = "Is the car beneath the cat?\nSelect from the following choices.\n(A) yes\n(B) no"
    assert same_choice(answer, "(A)", question)
    assert not same_choice(answer, "(B)", question)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The answer is B.", "B"),
        ("The answer is (b).", "B"),
        ("The answer is a cat", None),
        ("A cat is above it", None),
        ("(A) or (B)", None),
        ("C", None),
        ("(C) maybe", None),
        ("", None),
        ("nothing", None),
        ("Option A", "A"),
        ("B is closer", "B"),
        ("b is closer.", "B"),
    ],
)
def test_other_answers_mean_an_option_or_none(answer: str, letter: str | None) -> None:
    assert chosen_letter(answer, {"A": "A is closer", "B": "B is closer"}) == letter


def test_options_are_read_from_the_question() -> None:
    assert options_in("Which?\n(A) A is closer\n(B) B is closer") == {"A": "A is closer", "B": "B is closer"}
    assert options_in("Which?\nA. red\nb) two words \nC: 3") == {"A": "red", "B": "two words", "C": "3"}
    assert options_in("Look at (A) and at B. Which?") == {}


def test_mathvista_is_judged_by_rules() -> None:
    text = {"question": "Which?", "question_type": "multi_choice", "answer_type": "text", "answer": "9", "unit": None}
    row = text | {"choices": ["7", "9"], "precision": None}
    assert ask_mathvista(row) == "Which?\nA. 7\nB. 9\nAnswer with the option's letter from the given choices directly."
    free = {"question": "How far?", "question_type": "free_form", "choices": None, "unit": "m"}
    whole = free | {"answer_type": "integer", "answer": "1200", "precision": None}
    decimal = free | {"answer_type": "float", "answer": "1.5", "precision": 1.0}
    several = free | {"answer_type": "list", "answer": "[1, 2]", "precision": None}
    assert ask_mathvista(decimal).splitlines() == [
        "How far? (Unit: m)",
        "Answer the question using a single floating-point number with one decimal place.",
    ]
    for question, answer, right in (
        (row, "B", 1),
        (row, "(b)", 1),
        (row, "9", 1),
        (row, "A", 0),
        (row, "7 or 9", 0),
        (whole, "1,200", 1),
        (whole, "3 times 400 is 1200.", 1),
        (whole, "1200.5", 0),
        (whole, "-1200", 0),
        (whole, "many", 0),
        (decimal, "1.52", 1),
        (decimal, "about 1.6", 0),
        (several, "[1,2]", 1),
        (several, "[2, 1]", 0),
    ):
        assert score_mathvista(question, [answer]) == {"accuracy": right}, answer


def test_results_of_two_mllms_can_be_paired(tiny: None, trained: Path, program: Path, tmp_path: Path) -> None:
    results: list[ProbeResult] = []
    for stage in ("3-sft", "3-dpo"):
        results += evaluate_vqa(trained / stage, tmp_path / stage, ["gqa"], python=program, log=silent).results
    assert results[0].data_sha256 == results[1].data_sha256
    assert results[0].encoder_sha256 != results[1].encoder_sha256


def test_questions_of_several_images_and_of_none_share_a_pass(mllm: Path) -> None:
    model, processor = load_mllm(mllm)
    assert model.generation_config is not None
    model.generation_config.suppress_tokens = processor.tokenizer.all_special_ids
    with torch.no_grad():  # the tiny model gives the same answer to all inputs, unless its weights are large
        for weight in model.parameters():
            weight.mul_(3)
    one, two = (ShapesDataset().scene("test", i).render().image for i in range(2))
    question, image_lists = "Which is larger?", [[one], [one, two], [two, one], []]
    together = generate_answers(model, processor, [question] * 4, image_lists)
    alone = [generate_answers(model, processor, [question], [images])[0] for images in image_lists]
    assert together == alone
    assert len(set(together)) == 4
    assert together[:1] == generate_answers(model, processor, [question], [one])
    assert together[3:] == generate_answers(model, processor, [question])
