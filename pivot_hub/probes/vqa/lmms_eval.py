"""The 16 VQA benchmarks for an MLLM: run lmms-eval task by task in its own environment, read, average."""

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
from pivot_hub.files import whole_folder, write_json
from pivot_hub.mllm.load import mllm_config
from pivot_hub.probes.result import ProbeResult, measure, write_results
from pivot_hub.probes.vqa.benchmarks import BENCHMARKS, GROUPS, Benchmark, Sample, read_numbers
from pivot_hub.provenance import versions, weights_sha256

# Tells the process of lmms-eval that its input is that of the process that waits for it.
WATCHED = "PIVOT_WATCHED"
# Names the Python that has lmms-eval, where it is not the one that runs.
PYTHON = "PIVOT_LMMS_PYTHON"
OVERALL = "All 16"
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
_JOB = "job.json"  # in a finished task's folder: what it was run on
_ASK_VERSIONS = (
    "import importlib.metadata as m, json, pivot_hub;"
    "found = {n.replace('-', '_'): m.version(n) for n in ('lmms-eval', 'torch', 'transformers', 'datasets')};"
    "print(json.dumps({**found, 'pivot_hub': pivot_hub.__version__}))"
)


@dataclass(frozen=True)
class Evaluation:
    """What is known of an MLLM on the benchmarks.

    Args:
        results: of the tasks that were asked for.
        averages: of each group, and of all, that is finished.
        refused: of each other of which a benchmark was run, and of all, a sentence that says why there is none.
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
            shown = f"{r.value:.1f} [{r.ci95[0]:.1f}, {r.ci95[1]:.1f}]"
            table.add_row(name, group, r.metric, shown, str(r.n))
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
    """Run benchmarks through lmms-eval, each alone; those that are finished in the output are read, not run again.

    Args:
        mllm: folder of a finished stage.
        output: folder with a folder for each finished task, and `results.json` over those of this call.
        tasks: names of BENCHMARKS, or of other tasks of lmms-eval; the 16 by default.
        limit: questions of each task, for a trial: such results are never averaged.
        batch: questions of one pass.
        dtype: the MLLM computes in.
        include: folder with lmms-eval task files of one's own.
        python: that has lmms-eval; by default that of $PIVOT_LMMS_PYTHON, else this one.
        say: called with a line before each task.

    Raises:
        CheckpointError: the folder holds no MLLM.
        ProbeError: there is no lmms-eval, a task fails, or the output is another MLLM's.
    """
    source, target = Path(mllm), Path(output)
    mllm_config(source)
    if dtype not in DTYPES:
        raise ProbeError(f"dtype {dtype!r} is not known; give one of {', '.join(DTYPES)}.")
    if limit is not None and limit < 1:
        raise ProbeError(f"a limit of {limit} questions leaves none; give 1 or more, or leave it out for all.")
    names = list(tasks or BENCHMARKS)
    for name in names:
        if not _NAME.fullmatch(name):
            raise ProbeError(f"{name!r} is no task; give names as in --tasks gqa,mmvp.")
    if set(str(source.resolve())) & set(",="):
        raise ProbeError(f"{source}: lmms-eval splits its arguments at commas and equals signs; rename the folder.")
    program = Path(python or os.environ.get(PYTHON) or sys.executable)
    software = lmms_versions(program)
    base = {"mllm_sha256": weights_sha256(source), "dtype": dtype, "lmms_eval": software["lmms_eval"]}
    metadata = {**tower_metadata(source), "partner": source.resolve().name}
    found: dict[str, list[ProbeResult]] = {}
    for number, name in enumerate(names):
        job = {**base, "task": _task(name), "limit": limit, "files_sha256": _files_sha256(name, include)}
        folder = target / name
        earlier = _job(folder)
        if folder.exists() and not earlier:
            raise ProbeError(f"{folder} is there and is no result of this command; choose another --output.")
        if earlier and earlier["mllm_sha256"] != job["mllm_sha256"]:
            raise ProbeError(f"{folder} holds the result of another MLLM; choose another --output.")
        if earlier and earlier.items() >= job.items():
            log(f"{name}: finished before")
        else:
            log_file = target / f"{name}.log"
            log(f"{name}: task {number + 1} of {len(names)}, {limit or 'all'} questions; log: {log_file}")
            _run(program, source, folder, {**job, "versions": software}, batch, include, log_file)
        found[name] = read_task(folder, name, metadata)
    run = [name for name in BENCHMARKS if _job(target / name).items() >= base.items()]
    done = {name: (found.get(name) or read_task(target / name, name, metadata))[0] for name in run}
    limited = [name for name in run if _job(target / name)["limit"] is not None]
    averages, refused = [], []
    for group in (*GROUPS, OVERALL) if run else ():
        if group == OVERALL or any(BENCHMARKS[name].group == group for name in run):
            try:
                averages.append(average(group, done, limited))
            except ProbeError as error:
                refused.append(str(error))
    results = [result for some in found.values() for result in some]
    write_results(target / "results.json", [*results, *averages])
    return Evaluation(results, averages, refused)


def lmms_versions(python: Path) -> dict[str, str]:
    """Versions of lmms-eval and of what it computes with, in the environment of a Python.

    Raises:
        ProbeError: it has no lmms-eval, or this package not in this version.
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
    found: dict[str, str] = json.loads(done.stdout)
    if found["pivot_hub"] != __version__:
        raise ProbeError(f"{python} has pivot_hub {found['pivot_hub']}, this is {__version__}; install it there too.")
    return found


def tower_metadata(mllm: Path) -> dict[str, Any]:
    """What a result says of the encoder inside an MLLM: its layer, and the hash of its weights by name and content."""
    digest = hashlib.sha256()
    tensors: dict[str, tuple[Path, str]] = {}
    for file in mllm.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            named = (key for key in weights.keys() if "vision_tower." in key)  # noqa: SIM118
            tensors |= {key.partition("vision_tower.")[2]: (file, key) for key in named}
    for name, (file, key) in sorted(tensors.items()):
        with safe_open(file, framework="pt") as weights:
            tensor = weights.get_tensor(key).contiguous().view(-1).view(torch.uint8)  # numpy knows no bfloat16
            digest.update(name.encode() + tensor.numpy().tobytes())
    layer = mllm_config(mllm).vision_feature_layer
    name = f"{mllm.resolve().name}/vision_tower"
    return {"feature_layer": layer, "encoder": name, "encoder_sha256": digest.hexdigest()}


def read_task(folder: Path, name: str, metadata: Mapping[str, Any]) -> list[ProbeResult]:
    """The results of a finished task: one of a benchmark, one for each metric of another task.

    Args:
        folder: of the task, as `evaluate_vqa` fills it.
        name: of BENCHMARKS, or the task's.
        facts: conditions of the results: encoder, encoder_sha256, feature_layer, partner.

    Raises:
        ProbeError: there is nothing to measure, or the samples do not make the figure that lmms-eval gives.
    """
    job = json.loads((folder / _JOB).read_text())
    figures, samples = read_lmms(folder, job["task"])
    benchmark = BENCHMARKS.get(name)
    read = [benchmark] if benchmark else _plain_metrics(name, job["split"], figures, samples)
    made = []
    for b in read:
        scored = b.read(samples, b.key)
        if b.key not in figures or not len(scored.example_scores):
            raise ProbeError(f"{name}: none of its questions counts for {b.metric}; give a larger --limit, or none.")
        if not np.isclose(scored.figure, figures[b.key], atol=1e-4):
            raise ProbeError(
                f"{name}: lmms-eval gives {b.key} {figures[b.key]}, and its samples {scored.figure:.5f}; delete "
                f"{folder}, and run it with the lmms-eval of pivot-hub[eval]."
            )
        limited = "" if job["limit"] is None else f", the first {job['limit']} questions only"
        made.append(
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
    return made


def read_lmms(folder: Path, task: str) -> tuple[dict[str, float], list[Sample]]:
    """What lmms-eval wrote of one task: its figures by metric, and its samples in the data's order.

    Raises:
        ProbeError: the files of exactly this task are not there.
    """
    results = list(folder.rglob("*_results.json"))
    logs = list(folder.rglob(f"*_samples_{task}.jsonl"))
    if len(results) != 1 or len(logs) != 1:
        raise ProbeError(f"{task}: lmms-eval wrote no result of it alone; name single tasks, not a group.")
    said = json.loads(results[0].read_text(encoding="utf-8"))["results"][task]
    figures = {key.split(",")[0]: v for key, v in said.items() if isinstance(v, int | float)}
    samples = [json.loads(line) for line in logs[0].read_text(encoding="utf-8").splitlines()]
    return figures, sorted(samples, key=lambda s: s["doc_id"])


def average(group: str, results: Mapping[str, ProbeResult], limited: Sequence[str] = ()) -> ProbeResult:
    """The mean of a group of benchmarks, or of all 16, each counting once.

    Args:
        group: of GROUPS, or OVERALL.
        results: of benchmarks, by name.
        limited: those that were not run on all of their questions.

    Raises:
        ProbeError: a benchmark is missing or limited; the message names it.
    """
    members = [name for name, b in BENCHMARKS.items() if group in (b.group, OVERALL)]
    missing = ", ".join(name for name in members if name not in results)
    short = ", ".join(name for name in members if name in limited)
    if missing or short:
        reasons = [f"missing {missing}"] * bool(missing) + [f"run with --limit {short}"] * bool(short)
        raise ProbeError(f"{group} is not averaged: {'; '.join(reasons)}.")
    of = [results[name] for name in members]
    value = float(np.mean([r.value for r in of]))
    # Benchmarks are independent samples: the half-widths of their intervals add up in squares.
    low, high = (float(np.sqrt(sum((r.ci95[i] - r.value) ** 2 for r in of))) / len(of) for i in (0, 1))
    return ProbeResult(
        task=f"vqa/{group}",
        metric="mean_of_benchmarks",
        value=value,
        unit="percent",
        n=sum(r.n for r in of),
        split="as its benchmarks",
        seed=0,
        protocol=f"mean of {', '.join(members)}",
        feature_layer=of[0].feature_layer,
        encoder=of[0].encoder,
        encoder_sha256=of[0].encoder_sha256,
        partner=of[0].partner,
        ci95=(value - low, value + high),
        duration_s=round(sum(r.duration_s for r in of), 2),
        versions=of[0].versions,
    )


def _run(
    python: Path, mllm: Path, folder: Path, job: dict[str, Any], batch: int, include: Path | None, log_file: Path
) -> None:
    """Run one task of lmms-eval into its folder, which appears when it is finished."""
    started = time.monotonic()
    command = [str(python), "-m", "pivot_hub.probes.vqa.lmms_model", "--model", "pivot", "--tasks", job["task"]]
    command += ["--model_args", f"pretrained={mllm.resolve()},dtype={job['dtype']}", "--batch_size", str(batch)]
    command += ["--log_samples", *(["--limit", str(job["limit"])] if job["limit"] else [])]
    command += ["--include_path", str(include.resolve())] if include else []
    with whole_folder(folder) as beside:
        with log_file.open("w") as file:
            command += ["--output_path", str(beside)]
            # It leaves when its input ends: a killed command must not go on computing.
            variables = {**os.environ, WATCHED: "1"}
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=variables) as child:
                failed = child.wait()
        if failed:
            lines = log_file.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            reason = lines[-1].strip()[:300].rstrip(".")
            raise ProbeError(f"{job['task']}: lmms-eval failed: {reason}; its log is {log_file}.")
        read_lmms(beside, job["task"])  # without a result it is not finished
        split = _split(beside, job["task"])
        write_json(beside / _JOB, {**job, "split": split, "duration_s": round(time.monotonic() - started, 2)})


def _split(folder: Path, task: str) -> str:
    said = json.loads(next(folder.rglob("*_results.json")).read_text(encoding="utf-8"))
    config = said["configs"].get(task, {})
    return str(config.get("test_split") or config.get("validation_split"))


def _task(name: str) -> str:
    return BENCHMARKS[name].task if name in BENCHMARKS else name


def _job(folder: Path) -> dict[str, Any]:
    """What a finished task was run on; empty for one that is not finished."""
    file = folder / _JOB
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def _files_sha256(name: str, include: Path | None) -> str | None:
    """Of the task files that a task of one's own may be in."""
    if include is None or name in BENCHMARKS:
        return None
    files = sorted(f for f in include.rglob("*") if f.suffix in (".yaml", ".py"))
    if not files:
        raise ProbeError(f"{include} holds no task file of lmms-eval; give --include-path a folder of .yaml files.")
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def _questions_sha256(samples: Sequence[Sample]) -> str:
    """Of the questions with their answers; lmms-eval's own `doc_hash` is that of an empty row, the same for all."""
    asked = [(s["doc_id"], s["input"], s["target"]) for s in samples]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _plain_metrics(name: str, split: str, figures: Mapping[str, float], samples: Sequence[Sample]) -> list[Benchmark]:
    """The metrics of a task that have a number for each question."""
    metrics = [k for k in figures if all(isinstance(s.get(k), int | float) for s in samples)]
    if not metrics:
        raise ProbeError(f"{name}: no metric of it has a number for each question; give it one in process_results.")
    return [Benchmark("", name, split, key, key, read_numbers) for key in metrics]
