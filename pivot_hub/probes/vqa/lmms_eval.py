"""The 16 VQA benchmarks of an MLLM: run lmms-eval task by task in its own environment, read and average its results."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.table import Table
from safetensors import safe_open

from pivot_hub import __version__
from pivot_hub.encoder.encode import DTYPES
from pivot_hub.errors import ProbeError
from pivot_hub.files import write_json
from pivot_hub.mllm.families import family_of
from pivot_hub.mllm.load import mllm_config
from pivot_hub.outputs import OutputKind, whole_folder
from pivot_hub.probes.result import ProbeResult, measure, write_results
from pivot_hub.probes.vqa.benchmarks import BENCHMARKS, GROUPS, Benchmark, Sample, read_numbers
from pivot_hub.provenance import versions, weights_sha256

# Environment variable that tells the lmms-eval process to end when its standard input ends.
WATCHED = "PIVOT_WATCHED"
# Environment variable that names the Python interpreter with lmms-eval, if it is not the running one.
PYTHON = "PIVOT_LMMS_PYTHON"
OVERALL = "All 16"
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
_JOB = "job.json"  # in the folder of a finished task; describes what it was run on, and names its files
_TASK_FOLDER = OutputKind("a result of a task", _JOB, "pivot eval vqa")
_ASK_VERSIONS = (
    "import importlib.metadata as m, json, pivot_hub;"
    "names = ('lmms-eval', 'torch', 'transformers', 'datasets');"
    "versions = {n.replace('-', '_'): m.version(n) for n in names};"
    "print(json.dumps({**versions, 'pivot_hub': pivot_hub.__version__}))"
)


@dataclass(frozen=True)
class Evaluation:
    """Results of an MLLM on the benchmarks.

    Args:
        results: Results of the requested tasks.
        averages: Averages of every group, and of all 16, whose benchmarks are all finished.
        refused: One message for each other group of which a benchmark was run, and for all 16, that says why there is
            no average.
    """

    results: list[ProbeResult]
    averages: list[ProbeResult]
    refused: list[str]

    def table(self) -> Table:
        table = Table(title="VQA through lmms-eval, percent [95% interval]", title_justify="left", box=SIMPLE)
        for column in ("task", "group", "metric", "value", "items"):
            table.add_column(column, no_wrap=True)
        for r in [*self.results, *self.averages]:
            name = r.task.removeprefix("vqa/")
            group = BENCHMARKS[name].group if name in BENCHMARKS else ""
            value = f"{r.value:.1f} [{r.ci95[0]:.1f}, {r.ci95[1]:.1f}]"
            table.add_row(name, group, r.metric, value, str(r.n))
        return table

    def to_dict(self) -> dict[str, Any]:
        return {
            "results": [r.to_dict() for r in self.results],
            "averages": [r.to_dict() for r in self.averages],
            "refused": self.refused,
        }


def evaluate_vqa(
    mllm: str | Path,
    output: str | Path,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    batch: int = 8,
    dtype: str = "float32",
    include: Path | None = None,
    python: str | Path | None = None,
    log: Callable[[str], None] = print,
) -> Evaluation:
    """Run benchmarks through lmms-eval, one task at a time; tasks that are finished in the output are read instead.

    Args:
        mllm: Folder of a finished stage.
        output: Folder that receives one folder for each finished task, and `results.json` with the results of this
            call.
        tasks: Names from BENCHMARKS, or of other tasks of lmms-eval; the 16 benchmarks by default.
        limit: Number of questions of each task, for a trial. Such results are never averaged.
        batch: Number of questions in one forward pass.
        dtype: Type that the MLLM computes in.
        include: Folder with your own lmms-eval task files.
        python: Python interpreter that has lmms-eval; by default the one in $PIVOT_LMMS_PYTHON, else this one.
        log: Function that receives a line before each task.

    Raises:
        CheckpointError: The folder holds no MLLM.
        ProbeError: lmms-eval is not installed, a task fails, or the output holds results of another MLLM.
    """
    source, target = Path(mllm), Path(output)
    mllm_config(source)
    names = list(tasks or BENCHMARKS)
    _check_options(source, names, dtype, limit)
    program = Path(python or os.environ.get(PYTHON) or sys.executable)
    software = lmms_versions(program)
    base = {"mllm_sha256": weights_sha256(source), "dtype": dtype, "lmms_eval": software["lmms_eval"]}
    metadata = {**tower_metadata(source), "partner": source.resolve().name}
    by_task: dict[str, list[ProbeResult]] = {}
    for number, name in enumerate(names):
        job = {**base, "task": _task(name), "limit": limit, "files_sha256": _files_sha256(name, include)}
        folder = target / name
        if _is_finished(folder, job):
            log(f"{name}: finished before")
        else:
            log_file = target / f"{name}.log"
            log(f"{name}: task {number + 1} of {len(names)}, {limit or 'all'} questions; log: {log_file}")
            _run(program, source, folder, {**job, "versions": software}, batch, include, log_file)
        by_task[name] = read_task(folder, name, metadata)
    benchmarks = [name for name in BENCHMARKS if _job(target / name).items() >= base.items()]
    done = {name: (by_task.get(name) or read_task(target / name, name, metadata))[0] for name in benchmarks}
    limited = [name for name in benchmarks if _job(target / name)["limit"] is not None]
    averages, refused = _averages(done, limited)
    results = [result for task_results in by_task.values() for result in task_results]
    write_results(target / "results.json", [*results, *averages])
    return Evaluation(results, averages, refused)


def _check_options(mllm: Path, names: Sequence[str], dtype: str, limit: int | None) -> None:
    """Raise a ProbeError for options that cannot be used, before anything is run."""
    if dtype not in DTYPES:
        raise ProbeError(f"dtype {dtype!r} is not known; give one of {', '.join(DTYPES)}.")
    if limit is not None and limit < 1:
        raise ProbeError(f"a limit of {limit} questions leaves none; give 1 or more, or leave it out for all.")
    for name in names:
        if not _NAME.fullmatch(name):
            raise ProbeError(f"{name!r} is no task; give names as in --tasks gqa,mmvp.")
    if set(str(mllm.resolve())) & set(",="):
        raise ProbeError(f"{mllm}: lmms-eval splits its arguments at commas and equals signs; rename the folder.")


def _is_finished(folder: Path, job: Mapping[str, Any]) -> bool:
    """Return whether a folder holds the finished results of a job.

    Raises:
        ProbeError: The folder holds other files, or the result of another MLLM.
    """
    earlier = _job(folder)
    if folder.exists() and not earlier:
        raise ProbeError(f"{folder} exists and is no result of this command; choose another --output.")
    if earlier and earlier["mllm_sha256"] != job["mllm_sha256"]:
        raise ProbeError(f"{folder} holds the result of another MLLM; choose another --output.")
    return bool(earlier) and earlier.items() >= job.items()


def _averages(done: Mapping[str, ProbeResult], limited: Sequence[str]) -> tuple[list[ProbeResult], list[str]]:
    """Average each group of which a benchmark was run, and all 16; also return why there is no average of a group."""
    averages: list[ProbeResult] = []
    refused: list[str] = []
    for group in (*GROUPS, OVERALL) if done else ():
        if group == OVERALL or any(BENCHMARKS[name].group == group for name in done):
            try:
                averages.append(average(group, done, limited))
            except ProbeError as error:
                refused.append(str(error))
    return averages, refused


def lmms_versions(python: Path) -> dict[str, str]:
    """Ask a Python interpreter for its versions of lmms-eval and of the packages that lmms-eval computes with.

    Raises:
        ProbeError: Its environment has no lmms-eval, or another version of this package.
    """
    remedy = (
        "make one with `python -m venv .lmms && .lmms/bin/pip install 'pivot-hub[eval]'` ('.[eval]' in a checkout) and "
        f"set {PYTHON}=.lmms/bin/python, or give --python"
    )
    try:
        done = subprocess.run([str(python), "-c", _ASK_VERSIONS], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ProbeError(f"{python} cannot be run ({error.strerror}); {remedy}.") from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["it failed"])[-1]
        raise ProbeError(f"{python} has no environment with lmms-eval ({reason}); {remedy}.")
    installed: dict[str, str] = json.loads(done.stdout)
    if installed["pivot_hub"] != __version__:
        raise ProbeError(
            f"{python} has pivot_hub {installed['pivot_hub']}, this is {__version__}; install it there too."
        )
    return installed


def tower_metadata(mllm: Path) -> dict[str, Any]:
    """Describe the encoder inside an MLLM by its feature layer and the hash of its weights' names and contents."""
    config = mllm_config(mllm)
    family, digest = family_of(config), hashlib.sha256()
    tensors: dict[str, tuple[Path, str]] = {}
    for file in mllm.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            keys = (key for key in weights.keys() if f"{family.tower}." in key)  # noqa: SIM118
            tensors |= {key.partition(f"{family.tower}.")[2]: (file, key) for key in keys}
    for name, (file, key) in sorted(tensors.items()):
        with safe_open(file, framework="pt") as weights:
            tensor = weights.get_tensor(key).contiguous().view(-1).view(torch.uint8)  # numpy has no bfloat16
            digest.update(name.encode() + tensor.numpy().tobytes())
    name = f"{mllm.resolve().name}/{family.tower}"
    return {"feature_layer": family.feature_layer(config), "encoder": name, "encoder_sha256": digest.hexdigest()}


def read_task(folder: Path, name: str, metadata: Mapping[str, Any]) -> list[ProbeResult]:
    """Read the results of a finished task: one for a benchmark, or one for each metric of another task.

    Args:
        folder: Folder of the task, as `evaluate_vqa` fills it.
        name: Name of a benchmark from BENCHMARKS, or of another task.
        metadata: Conditions of the results: encoder, encoder_sha256, feature_layer, partner.

    Raises:
        ProbeError: There is nothing to measure, or the samples do not give the number that lmms-eval reports.
    """
    job = json.loads((folder / _JOB).read_text())
    reported, samples = read_lmms(folder, job["task"])
    benchmark = BENCHMARKS.get(name)
    benchmarks = [benchmark] if benchmark else _plain_metrics(name, job["split"], reported, samples)
    results = []
    for b in benchmarks:
        scored = b.read(samples, b.key)
        if b.key not in reported or not len(scored.example_scores):
            raise ProbeError(f"{name}: none of its questions counts for {b.metric}; give a larger --limit, or none.")
        if not np.isclose(scored.expected, reported[b.key], atol=1e-4):
            raise ProbeError(
                f"{name}: lmms-eval gives {b.key} {reported[b.key]}, and its samples {scored.expected:.5f}; delete "
                f"{folder}, and run it with the lmms-eval of pivot-hub[eval]."
            )
        limited = "" if job["limit"] is None else f", the first {job['limit']} questions only"
        results.append(
            measure(
                f"vqa/{name}",
                b.metric,
                scored.example_scores,
                protocol=f"lmms-eval {job['lmms_eval']}, {job['task']}, {b.key}, greedy, {job['dtype']}{limited}",
                split=b.split,
                seed=0,
                duration_s=job["duration_s"],
                data_sha256=_questions_sha256(samples),
                versions={**versions(), **job["versions"]},
                **metadata,
            )
        )
    return results


def read_lmms(folder: Path, task: str) -> tuple[dict[str, float], list[Sample]]:
    """Read what lmms-eval wrote for one task: its numbers by metric, and its samples in the order of the data.

    Raises:
        ProbeError: The files of exactly this task are not there.
    """
    result_files = list(folder.rglob("*_results.json"))
    sample_files = list(folder.rglob(f"*_samples_{task}.jsonl"))
    if len(result_files) != 1 or len(sample_files) != 1:
        raise ProbeError(f"{task}: lmms-eval wrote no result of this task alone; name single tasks, not a group.")
    task_results = json.loads(result_files[0].read_text(encoding="utf-8"))["results"][task]
    reported = {key.split(",")[0]: v for key, v in task_results.items() if isinstance(v, int | float)}
    samples = [json.loads(line) for line in sample_files[0].read_text(encoding="utf-8").splitlines()]
    return reported, sorted(samples, key=lambda s: s["doc_id"])


def average(group: str, results: Mapping[str, ProbeResult], limited: Sequence[str] = ()) -> ProbeResult:
    """Average a group of benchmarks, or all 16; each benchmark counts once.

    Args:
        group: Name from GROUPS, or OVERALL.
        results: Results of benchmarks by name.
        limited: Benchmarks that were not run on all of their questions.

    Raises:
        ProbeError: A benchmark is missing or limited; the message names it.
    """
    members = [name for name, b in BENCHMARKS.items() if group in (b.group, OVERALL)]
    missing = ", ".join(name for name in members if name not in results)
    short = ", ".join(name for name in members if name in limited)
    reasons = []
    if missing:
        reasons.append(f"missing {missing}")
    if short:
        reasons.append(f"run with --limit {short}")
    if reasons:
        raise ProbeError(f"{group} is not averaged: {'; '.join(reasons)}.")
    averaged = [results[name] for name in members]
    value = float(np.mean([r.value for r in averaged]))
    # Benchmarks are independent samples, so the squares of their intervals' half-widths add up.
    low, high = (float(np.sqrt(sum((r.ci95[i] - r.value) ** 2 for r in averaged))) / len(averaged) for i in (0, 1))
    return ProbeResult(
        task=f"vqa/{group}",
        metric="mean_of_benchmarks",
        value=value,
        unit="percent",
        n=sum(r.n for r in averaged),
        split="as its benchmarks",
        seed=0,
        protocol=f"mean of {', '.join(members)}",
        feature_layer=averaged[0].feature_layer,
        encoder=averaged[0].encoder,
        encoder_sha256=averaged[0].encoder_sha256,
        partner=averaged[0].partner,
        ci95=(value - low, value + high),
        duration_s=round(sum(r.duration_s for r in averaged), 2),
        versions=averaged[0].versions,
    )


def _run(
    python: Path, mllm: Path, folder: Path, job: dict[str, Any], batch: int, include: Path | None, log_file: Path
) -> None:
    """Run one task of lmms-eval; its folder appears when the task is finished."""
    started = time.monotonic()
    command = [str(python), "-m", "pivot_hub.probes.vqa.lmms_model", "--model", "pivot", "--tasks", job["task"]]
    command += ["--model_args", f"pretrained={mllm.resolve()},dtype={job['dtype']}", "--batch_size", str(batch)]
    command += ["--log_samples", *(["--limit", str(job["limit"])] if job["limit"] else [])]
    command += ["--include_path", str(include.resolve())] if include else []
    with whole_folder(folder, _TASK_FOLDER) as beside:
        with log_file.open("w") as file:
            command += ["--output_path", str(beside)]
            # The process ends when its input ends, so that it does not keep running after this command is killed.
            variables = {**os.environ, WATCHED: "1"}
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=variables) as child:
                failed = child.wait()
        if failed:
            lines = log_file.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
            reason = lines[-1].strip()[:300].rstrip(".")
            raise ProbeError(f"{job['task']}: lmms-eval failed: {reason}; its log is {log_file}.")
        read_lmms(beside, job["task"])  # raises if there is no result
        split = _split(beside, job["task"])
        files = sorted(f.relative_to(beside).as_posix() for f in beside.rglob("*") if f.is_file())
        duration_s = round(time.monotonic() - started, 2)
        write_json(beside / _JOB, {**job, "split": split, "duration_s": duration_s, "files": files})


def _split(folder: Path, task: str) -> str:
    lmms_results = json.loads(next(folder.rglob("*_results.json")).read_text(encoding="utf-8"))
    config = lmms_results["configs"].get(task, {})
    return str(config.get("test_split") or config.get("validation_split"))


def _task(name: str) -> str:
    return BENCHMARKS[name].task if name in BENCHMARKS else name


def _job(folder: Path) -> dict[str, Any]:
    """Read what a finished task was run on; empty if the task is not finished."""
    file = folder / _JOB
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def _files_sha256(name: str, include: Path | None) -> str | None:
    """Hash the user's own task files, one of which may define the task; None for a benchmark."""
    if include is None or name in BENCHMARKS:
        return None
    files = sorted(f for f in include.rglob("*") if f.suffix in (".yaml", ".py"))
    if not files:
        raise ProbeError(f"{include} holds no task file of lmms-eval; give --include-path a folder of .yaml files.")
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def _questions_sha256(samples: Sequence[Sample]) -> str:
    """Hash the questions and answers; lmms-eval's own `doc_hash` is of an empty row and the same for all."""
    questions = [(s["doc_id"], s["input"], s["target"]) for s in samples]
    return hashlib.sha256(json.dumps(questions).encode()).hexdigest()


def _plain_metrics(name: str, split: str, reported: Mapping[str, float], samples: Sequence[Sample]) -> list[Benchmark]:
    """Describe the metrics of a task that have a number for each question as benchmarks."""
    metrics = [k for k in reported if all(isinstance(s.get(k), int | float) for s in samples)]
    if not metrics:
        raise ProbeError(f"{name}: no metric of this task has a number for each question; add one in process_results.")
    return [Benchmark("", name, split, key, key, read_numbers) for key in metrics]
