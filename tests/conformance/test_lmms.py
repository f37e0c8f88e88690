"""`pivot eval vqa` with a real lmms-eval: the 16 tasks as it has them, and questions of our own and of BLINK."""

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
from pivot_hub.mllm.load import image_px, load_mllm
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
# A task of one's own, as the README shows it.
TASK = (ROOT / "README.md").read_text().split("```yaml\ntask: signs\n")[1].split("```")[0]


@pytest.fixture(autouse=True)
def _this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside lmms-eval stands this checkout, where a user has the installed package."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture(scope="session")
def python() -> Path:
    """An environment with lmms-eval and what this package needs, as `pivot-hub[eval]` makes it."""
    needed = [d for d in PROJECT["dependencies"] if not d.startswith("torch>")]
    return make_environment("lmms-eval", TORCHVISION, *needed, *PROJECT["optional-dependencies"]["eval"])


@pytest.fixture(scope="module")
def mllm(recipes: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MLLM that has learnt to say something: without, every answer would be empty."""
    folder = tmp_path_factory.mktemp("talking") / "mllm"
    rates = ["learning_rate.language=1e-2", "learning_rate.vision=1e-3"]
    loaded = load_recipe(str(recipes / "2-instruct.yaml"), ["data.0.rows=16", "args.num_train_epochs=40", *rates])
    return run_stage(loaded, folder.parent, folder, trained / "1-align", log=lambda line: None)


def write_task(
    folder: Path, name: str, rows: Sequence[dict[str, Any]], images: Sequence[Image.Image | Path], words: bool = False
) -> None:
    """A task over a folder of images with `metadata.jsonl`, which `datasets` reads without a network."""
    data = folder / name
    data.mkdir(parents=True)
    lines = []
    for i, (row, image) in enumerate(zip(rows, images, strict=True)):
        file = data / (f"{i:03}.png" if isinstance(image, Image.Image) else f"{i:03}{image.suffix}")
        if isinstance(image, Image.Image):
            image.save(file)
        else:
            shutil.copyfile(image, file)
        lines.append(json.dumps({"file_name": file.name, **row}) + "\n")
    (data / "metadata.jsonl").write_text("".join(lines))
    text = TASK.replace("data_dir: signs", f"data_dir: {data}")
    if words:
        text = text.replace("score_choice", "score_words").replace("metric: accuracy", "metric: exact_match")
    (folder / f"{name}.yaml").write_text(f"task: {name}\n{text}")


@pytest.mark.conformance
def test_the_16_tasks_of_lmms_eval_are_read_as_recorded(python: Path, tmp_path: Path) -> None:
    """Its own task files and scoring on tiny data: names, splits and metrics are those of BENCHMARKS."""
    run(python, "-m", SCRIPTED, "write", tmp_path / "tasks", path=str(ROOT))
    names = [f"tiny_{name}" for name in (*BENCHMARKS, "mmbench_static")]
    options = ["--tasks", ",".join(names), "--include_path", str(tmp_path / "tasks"), "--log_samples"]
    run(python, "-m", SCRIPTED, "run", *options, "--output_path", tmp_path / "out", path=str(ROOT))
    run(python, "-m", SCRIPTED, "trim", tmp_path / "out", tmp_path / "lmms", path=str(ROOT))
    for name, benchmark in BENCHMARKS.items():
        figures, samples = read_lmms(tmp_path / "lmms", f"tiny_{name}")
        assert (figures[benchmark.key], samples) == (
            read_lmms(RECORDED, f"tiny_{name}")[0][benchmark.key],
            read_lmms(RECORDED, f"tiny_{name}")[1],
        )
    # Our MMBench task makes the figure that lmms-eval's own rules make.
    own, _ = read_lmms(tmp_path / "lmms", "tiny_mmbench_en")
    static, _ = read_lmms(tmp_path / "lmms", "tiny_mmbench_static")
    assert static["gpt_eval_score"] == pytest.approx(100 * own["circular_accuracy"])


@pytest.mark.conformance
def test_an_mllm_answers_in_lmms_eval_as_it_does_here(python: Path, mllm: Path, tmp_path: Path) -> None:
    model, processor = load_mllm(mllm)
    images, questions = probe_questions(ShapesDataset(image_px=image_px(model)), "test", 40)
    said = generate_answers(model, processor, [q.text for q in questions], images, batch=8)
    assert len(set(said)) > 5
    rows = [{"question": q.text, "answer": q.answer} for q in questions]
    rows[0]["answer"] = said[0]  # at least one is right
    write_task(tmp_path / "tasks", "world", rows, images, words=True)
    options = ["--tasks", "world", "--include-path", "tasks", "--output", "out", "--python", str(python)]
    command = [sys.executable, "-m", "pivot_hub", "eval", "vqa", str(mllm), *options]
    done = subprocess.run([*command, "--json", "found.json"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "world: task 1 of 1, all questions" in done.stdout
    _, samples = read_lmms(tmp_path / "out" / "world", "world")
    assert [s["filtered_resps"] for s in samples] == said
    result = json.loads((tmp_path / "found.json").read_text())["results"][0]
    right = [a.casefold() == row["answer"].casefold() for a, row in zip(said, rows, strict=True)]
    assert (result["n"], result["metric"]) == (40, "exact_match")
    assert result["value"] == pytest.approx(100 * sum(right) / 40)
    assert result["value"] > 0
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "world: finished before" in again.stdout
    made = evaluate_vqa(mllm, tmp_path / "out", ["world"], 6, 4, "bfloat16", tmp_path / "tasks", python)
    assert (made.results[0].n, made.averages) == (6, [])


@pytest.mark.conformance
@pytest.mark.parametrize(
    ("task", "says"),
    [
        ("gqaa", "ValueError: Tasks not found: gqaa"),
        ("mmvp", "ConnectionError: Couldn't reach 'lmms-lab-eval/MMVP' on the Hub"),
        ("blink", "ValueError: lmms-eval has a task blink of its own; give the one in"),
    ],
)
def test_what_fails_is_said_in_one_sentence(task: str, says: str, python: Path, mllm: Path, tmp_path: Path) -> None:
    write_task(tmp_path / "tasks", "blink", [{"question": "?", "answer": "A"}], [Image.new("RGB", (8, 8))])
    options = ["--tasks", task, "--include-path", "tasks", "--output", "out", "--python", str(python)]
    command = [sys.executable, "-m", "pivot_hub", "eval", "vqa", str(mllm), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"pivot: {task}: lmms-eval failed: {says}")
    assert [p.name for p in (tmp_path / "out").iterdir()] == [f"{task}.log"]


@pytest.mark.conformance
def test_lmms_eval_leaves_with_the_command_that_was_killed(python: Path) -> None:
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
@pytest.mark.skipif(not (REAL / "vqa").is_dir(), reason="BLINK's questions are not here (set PIVOT_REAL_DATA)")
def test_blinks_letters_are_recognised_in_every_form(python: Path, mllm: Path, tmp_path: Path) -> None:
    """Real questions and photographs; what is said goes through lmms-eval."""
    parts = [REAL / "vqa" / "blink_spatial", REAL / "vqa" / "blink_depth"]
    requests = [file for part in parts for file in sorted(part.rglob("request.json"))]
    asked = [json.loads(file.read_text()) for file in requests]
    assert len(asked) > 200
    forms = ("({})", "{}", "{}.", "({low})", "{}) {text}", "The answer is ({}).", "{text}")
    rows, images, right = [], [], []
    for i, (file, request) in enumerate(zip(requests, asked, strict=True)):
        question = re.sub(r"<img src=[^>]*>\s*", "", request["query"])
        texts = dict(re.findall(r"^\(([A-Z])\) (.+)$", question, re.MULTILINE))
        wrong = i % 8 == 7
        letter = next(k for k in texts if (f"({k})" == request["answer"].upper()) != wrong)
        said = forms[i % 7].format(letter, low=letter.lower(), text=texts[letter])
        rows.append({"question": question, "answer": request["answer"], "said": said})
        images.append(file.parent / Path(request["images"][0]).name)
        right.append(not wrong)
    write_task(tmp_path / "tasks", "own_blink", rows, images)
    options = ["--tasks", "own_blink", "--include_path", str(tmp_path / "tasks"), "--log_samples"]
    run(python, "-m", SCRIPTED, "run", *options, "--output_path", tmp_path / "out", path=str(ROOT))
    figures, samples = read_lmms(tmp_path / "out", "own_blink")
    assert [bool(s["accuracy"]) for s in samples] == right
    assert figures["accuracy"] == pytest.approx(sum(right) / len(right))
    made = evaluate_vqa(mllm, tmp_path / "mllm", ["own_blink"], 12, include=tmp_path / "tasks", python=python)
    assert (made.results[0].n, made.results[0].split) == (12, "train")
