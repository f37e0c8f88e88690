"""`pivot eval vqa` with a real lmms-eval: its own 16 tasks, questions of this package, and questions of BLINK."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pivot_hub.config.recipe import load_recipe
from pivot_hub.data.synthetic import ShapesDataset
from pivot_hub.mllm.load import image_px, load_llava
from pivot_hub.probes.run import probe_questions
from pivot_hub.probes.vqa.benchmarks import BENCHMARKS
from pivot_hub.probes.vqa.lmms_eval import evaluate_vqa, read_lmms
from pivot_hub.probes.vqa.synthetic import generate_answers
from pivot_hub.training.stage import run_stage
from tests.conformance.environment import ROOT, TORCHVISION, make_environment, run
from tests.probes.vqa.test_lmms_eval import RECORDED
from tests.test_real_files import REAL

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTED = "tests.conformance.vqa_tasks"
# The task file that the documentation shows as an example.
TASK = (ROOT / "docs" / "how-to" / "vqa.md").read_text().split("```yaml\ntask: signs\n")[1].split("```")[0]


@pytest.fixture(autouse=True)
def _this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval imports this checkout, where a user has the installed package."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture(scope="session")
def python() -> Path:
    """The Python of an environment with the packages that `pivot-hub[eval]` installs."""
    needed = [d for d in PROJECT["dependencies"] if not d.startswith("torch>")]
    return make_environment("lmms-eval", TORCHVISION, *needed, *PROJECT["optional-dependencies"]["eval"])


@pytest.fixture(scope="module")
def mllm(recipes: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MLLM that is trained long enough to answer; after less training, every answer would be empty."""
    folder = tmp_path_factory.mktemp("talking") / "mllm"
    learning_rates = ["learning_rate.language=1e-2", "learning_rate.vision=1e-3"]
    overrides = ["data.0.rows=16", "args.num_train_epochs=40", *learning_rates]
    loaded = load_recipe(str(recipes / "2-instruct.yaml"), overrides)
    return run_stage(loaded, folder.parent, folder, trained / "1-align", log=lambda line: None)


def write_task(
    folder: Path, name: str, rows: Sequence[dict[str, Any]], images: Sequence[Image.Image | Path], words: bool = False
) -> None:
    """Write a lmms-eval task whose data `datasets` reads without a network.

    Args:
        folder: Folder that the task file and the data are written to.
        name: Name of the task, of its file and of its data folder.
        rows: Rows of the data, which are written to `metadata.jsonl`.
        images: Images of the rows, or their files.
        words: Whether an answer is scored by its words, and not by the letter of an option.
    """
    data = folder / name
    data.mkdir(parents=True)
    lines = []
    for i, (row, image) in enumerate(zip(rows, images, strict=True)):
        if isinstance(image, Image.Image):
            file = data / f"{i:03}.png"
            image.save(file)
        else:
            file = data / f"{i:03}{image.suffix}"
            shutil.copyfile(image, file)
        lines.append(json.dumps({"file_name": file.name, **row}) + "\n")
    (data / "metadata.jsonl").write_text("".join(lines))
    text = TASK.replace("data_dir: signs", f"data_dir: {data}")
    if words:
        text = text.replace("score_choice", "score_words").replace("metric: accuracy", "metric: exact_match")
    (folder / f"{name}.yaml").write_text(f"task: {name}\n{text}")


@pytest.mark.conformance
def test_the_16_tasks_of_lmms_eval_are_read_as_recorded(python: Path, tmp_path: Path) -> None:
    """lmms-eval's own task files score tiny data with the names, splits and metrics of BENCHMARKS."""
    run(python, "-m", SCRIPTED, "write", tmp_path / "tasks", path=str(ROOT))
    names = [f"tiny_{name}" for name in (*BENCHMARKS, "mmbench_static")]
    options = ["--tasks", ",".join(names), "--include_path", str(tmp_path / "tasks"), "--log_samples"]
    run(python, "-m", SCRIPTED, "run", *options, "--output_path", tmp_path / "out", path=str(ROOT))
    run(python, "-m", SCRIPTED, "trim", tmp_path / "out", tmp_path / "lmms", path=str(ROOT))
    for name, benchmark in BENCHMARKS.items():
        figures, samples = read_lmms(tmp_path / "lmms", f"tiny_{name}")
        recorded_figures, recorded_samples = read_lmms(RECORDED, f"tiny_{name}")
        assert figures[benchmark.key] == recorded_figures[benchmark.key]
        assert samples == recorded_samples
    # Our MMBench task gives the score that lmms-eval's own rules give.
    own, _ = read_lmms(tmp_path / "lmms", "tiny_mmbench_en")
    static, _ = read_lmms(tmp_path / "lmms", "tiny_mmbench_static")
    assert static["gpt_eval_score"] == pytest.approx(100 * own["circular_accuracy"])


@pytest.mark.conformance
def test_an_mllm_answers_in_lmms_eval_as_it_does_here(python: Path, mllm: Path, tmp_path: Path) -> None:
    model, processor = load_llava(mllm)
    images, questions = probe_questions(ShapesDataset(image_px=image_px(model)), "test", 40)
    answers = generate_answers(model, processor, [q.text for q in questions], images, batch=8)
    assert len(set(answers)) > 5
    rows = [{"question": q.text, "answer": q.answer} for q in questions]
    rows[0]["answer"] = answers[0]  # at least one answer is right
    write_task(tmp_path / "tasks", "shapes", rows, images, words=True)
    options = ["--tasks", "shapes", "--include-path", "tasks", "--output", "out", "--python", str(python)]
    command = [sys.executable, "-m", "pivot_hub", "eval", "vqa", str(mllm), *options]
    with_json = [*command, "--json", "results.json"]
    first = subprocess.run(with_json, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "shapes: task 1 of 1, all questions" in first.stdout
    _, samples = read_lmms(tmp_path / "out" / "shapes", "shapes")
    assert [s["filtered_resps"] for s in samples] == answers
    result = json.loads((tmp_path / "results.json").read_text())["results"][0]
    right = [a.casefold() == row["answer"].casefold() for a, row in zip(answers, rows, strict=True)]
    assert (result["n"], result["metric"]) == (40, "exact_match")
    assert result["value"] == pytest.approx(100 * sum(right) / 40)
    assert result["value"] > 0
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "shapes: finished before" in second.stdout
    evaluation = evaluate_vqa(mllm, tmp_path / "out", ["shapes"], 6, 4, "bfloat16", tmp_path / "tasks", python)
    assert (evaluation.results[0].n, evaluation.averages) == (6, [])


@pytest.mark.conformance
@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("gqaa", "ValueError: Tasks not found: gqaa"),
        ("mmvp", "ConnectionError: Couldn't reach 'lmms-lab-eval/MMVP' on the Hub"),
        ("blink", "ValueError: lmms-eval has a task blink of its own; give the one in"),
    ],
)
def test_a_failure_is_one_error_message(task: str, message: str, python: Path, mllm: Path, tmp_path: Path) -> None:
    write_task(tmp_path / "tasks", "blink", [{"question": "?", "answer": "A"}], [Image.new("RGB", (8, 8))])
    options = ["--tasks", task, "--include-path", "tasks", "--output", "out", "--python", str(python)]
    command = [sys.executable, "-m", "pivot_hub", "eval", "vqa", str(mllm), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"pivot: {task}: lmms-eval failed: {message}")
    assert [p.name for p in (tmp_path / "out").iterdir()] == [f"{task}.log"]


@pytest.mark.conformance
def test_lmms_eval_exits_when_the_command_that_started_it_is_killed(python: Path) -> None:
    code = "import time; from pivot_hub.probes.vqa.lmms_model import leave_with_parent; leave_with_parent();"
    code += "print(1, flush=True); time.sleep(120)"
    command = [str(python), "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == b"1\n"
        assert child.poll() is None
        child.stdin.close()
        assert child.wait(timeout=30) == 1


@pytest.mark.conformance
@pytest.mark.skipif(not (REAL / "vqa").is_dir(), reason="BLINK's questions are missing (set PIVOT_REAL_DATA)")
def test_blinks_letters_are_recognised_in_every_form(python: Path, mllm: Path, tmp_path: Path) -> None:
    """lmms-eval scores answers to real questions about real images, each written in one of seven forms."""
    parts = [REAL / "vqa" / "blink_spatial", REAL / "vqa" / "blink_depth"]
    files = [file for part in parts for file in sorted(part.rglob("request.json"))]
    requests = [json.loads(file.read_text()) for file in files]
    assert len(requests) > 200
    forms = ("({})", "{}", "{}.", "({low})", "{}) {text}", "The answer is ({}).", "{text}")
    rows, images, right = [], [], []
    for i, (file, request) in enumerate(zip(files, requests, strict=True)):
        question = re.sub(r"<img src=[^>]*>\s*", "", request["query"])
        texts = dict(re.findall(r"^\(([A-Z])\) (.+)$", question, re.MULTILINE))
        wrong = i % 8 == 7
        letter = next(k for k in texts if (f"({k})" == request["answer"].upper()) != wrong)
        reply = forms[i % 7].format(letter, low=letter.lower(), text=texts[letter])
        rows.append({"question": question, "answer": request["answer"], "reply": reply})
        images.append(file.parent / Path(request["images"][0]).name)
        right.append(not wrong)
    write_task(tmp_path / "tasks", "own_blink", rows, images)
    options = ["--tasks", "own_blink", "--include_path", str(tmp_path / "tasks"), "--log_samples"]
    run(python, "-m", SCRIPTED, "run", *options, "--output_path", tmp_path / "out", path=str(ROOT))
    figures, samples = read_lmms(tmp_path / "out", "own_blink")
    assert [bool(s["accuracy"]) for s in samples] == right
    assert figures["accuracy"] == pytest.approx(sum(right) / len(right))
    evaluation = evaluate_vqa(mllm, tmp_path / "mllm", ["own_blink"], 12, include=tmp_path / "tasks", python=python)
    assert (evaluation.results[0].n, evaluation.results[0].split) == (12, "train")
