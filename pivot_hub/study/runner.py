"""Run a study: every cell an ordinary stage, several at a time, each finished or to be gone on with."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pivot_hub.config.recipe import LoadedRecipe
from pivot_hub.config.stages import stage_of
from pivot_hub.encoder.repository import encoder_metadata
from pivot_hub.errors import PivotError, TrainingError
from pivot_hub.files import write_json
from pivot_hub.mllm.extract import extract_once
from pivot_hub.mllm.load import load_mllm
from pivot_hub.probes.ranking import rank_pairs
from pivot_hub.probes.result import ProbeResult, read_results, write_results
from pivot_hub.probes.run import probe_pairs, probe_questions
from pivot_hub.probes.vqa.synthetic import answer_questions
from pivot_hub.provenance import machine, weights_sha256
from pivot_hub.study.design import Cell, Study, load_study
from pivot_hub.study.measures import device, measure_run
from pivot_hub.training.stage import run_stage

FORMAT = 1  # of a cell's facts: what is measured has changed where it differs
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_study(
    path: str | Path,
    output: Path,
    jobs: int = 1,
    log: Callable[[str], None] = print,
) -> Study:
    """Train and measure every cell of a study; those that are finished are left as they are.

    In `output` every cell has its place below `runs/` (checkpoints), `encoders/`, `results/` and `cells/` (facts of its
    making). A cell that fails is written down as failed, and those that need it are not started; the others go on.

    Args:
        path: see `load_study`.
        output: folder of the study.
        jobs: cells at a time, each in a process of its own: with the GPUs in turn, or a share of the CPU cores.
        say: gets progress, one line at a time.

    Raises:
        RecipeError: the study's file, or a recipe with its overrides, is wrong.
        TrainingError: cells failed (the sentence names the first), or a process was killed.
    """
    study = load_study(path)
    context = multiprocessing.get_context("spawn")
    try:
        with _share_of_cores(jobs), ProcessPoolExecutor(jobs, context, _set_up, (context.Value("i", 0),)) as pool:
            done = _run_cells(study, output, pool, jobs, log)
    except BrokenProcessPool:
        raise TrainingError(
            "a process of the study was killed from outside, for want of memory perhaps. What is finished is kept: run "
            "the same command again, with fewer --jobs if it happens once more."
        ) from None
    failed = [name for name, metadata in done.items() if metadata["status"] == "failed"]
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(done)} runs failed, {failed[0]} first: {done[failed[0]]['reason']} The table has "
            "them all; run the same command again to try them once more."
        )
    return study


def _run_cells(
    study: Study, output: Path, pool: ProcessPoolExecutor, jobs: int, log: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Give the pool every cell whose needs are done, and return the facts of all by name."""
    waiting = study.cells()
    number = len(waiting)
    done: dict[str, dict[str, Any]] = {}
    running: dict[Future[dict[str, Any]], Cell] = {}
    started, trained = time.monotonic(), 0
    while waiting or running:
        for cell in list(waiting):
            if len(running) == jobs:
                break
            needs = [done.get(n.name) for n in study.needs(cell)]
            if None in needs:
                continue
            waiting.remove(cell)
            if any(metadata and metadata["status"] != "done" for metadata in needs):
                metadata = _facts(cell) | {"status": "not started", "reason": "a run it starts from failed"}
                done[cell.name] = metadata
                _write_cell(output, cell, metadata)
                continue
            running[pool.submit(run_cell, str(study.path), cell, output)] = cell
        if not running:
            continue
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            cell = running.pop(future)
            metadata = done[cell.name] = future.result()
            trained += not metadata.pop("kept", False)
            rest = number - len(done)
            pace = (time.monotonic() - started) / trained if trained else 0
            left = f", about {rest * pace / 60:.0f} min left" if trained and rest else ""
            how = metadata["status"] if metadata["status"] == "done" else f"{metadata['status']}: {metadata['reason']}"
            log(f"{len(done)}/{number} {cell.name}: {how}, {metadata.get('duration_s', 0):.0f} s{left}")
    return done


def run_cell(path: str, cell: Cell, output: Path) -> dict[str, Any]:
    """Train, extract and measure one cell, in whichever process; return the facts that lie in `cells/`.

    What fails for a reason that has a sentence is returned as failed, with it.
    """
    study = load_study(path)
    began = time.monotonic()
    spec = study.spec.runs[cell.run]
    metadata = _facts(cell)
    try:
        rate = chosen_rate(study, cell, output) if cell.rate is None else cell.rate
        loaded = None if spec.recipe is None else study.load(cell, rate, _parts(study, cell, output))
        key = _key(study, cell, loaded, output)
        kept = _read(output / "cells" / f"{cell.name}.json")
        results = output / "results" / f"{cell.name}.json"
        if kept.get("key") == key and kept["status"] == "done" and (results.is_file() or not kept["measured"]):
            return {**kept, "kept": True}
        metadata |= {"key": key, "rate": rate}
        metadata |= _make(study, cell, loaded, output)
        metadata |= {"status": "done", "measured": results.is_file()}
    except PivotError as error:
        metadata |= {"status": "failed", "reason": str(error)}
    # Of a training that was finished before, its own time.
    spent = max(time.monotonic() - began, metadata.get("training", {}).get("duration_s", 0))
    metadata |= {"duration_s": round(spent, 1), "machine": machine()}
    _write_cell(output, cell, metadata)
    return metadata


def chosen_rate(study: Study, cell: Cell, output: Path) -> float | None:
    """The candidate that ranks most validation pairs right; None for a run that has its recipe's rate."""
    of = study.spec.runs[cell.run].rate_of or cell.run
    scored = {c.rate: read_results(output / "results" / f"{c.name}.json")[0].value for c in study.candidates(of)}
    return max(scored, key=lambda rate: scored[rate]) if scored else None


def _make(study: Study, cell: Cell, loaded: LoadedRecipe | None, output: Path) -> dict[str, Any]:
    """Train what is not trained, extract, measure; return what there is to know of it."""
    spec, place = study.spec.runs[cell.run], output / "runs" / cell.name
    results = output / "results" / f"{cell.name}.json"
    if loaded is None:
        assert spec.encoder is not None
        encoder = study.path.parent / spec.encoder
        found = measure_run(encoder, None, None, cell.run, spec.measure, study.dataset, study.harder, study.sizes)
        write_results(results, found)
        return {"encoder_sha256": encoder_metadata(str(encoder))["encoder_sha256"]}
    above = None if spec.parent is None else output / "runs" / study.same_seed(spec.parent, cell).name
    folder = run_stage(loaded, output=place, parent=above, log=_say_nothing)
    report = _read(folder / "report.json")
    metadata = {
        "recipe": loaded.name,
        "recipe_sha256": loaded.recipe.sha256(),
        "stage": loaded.recipe.stage,
        "rows": report["data"]["rows"],
        "args": loaded.recipe.args,
        "training": {k: report[k] for k in ("steps", "duration_s", "peak_memory_mb", "train_loss")},
    }
    if stage_of(loaded.recipe.stage).base_part:
        return metadata
    if cell.rate is not None:
        write_results(results, _validation(study, folder, cell))
        return metadata
    encoder = output / "encoders" / cell.name
    extract_once(folder, encoder)
    metadata["encoder_sha256"] = encoder_metadata(str(encoder))["encoder_sha256"]
    if spec.measure and cell.seed in study.spec.seeds:
        found = measure_run(encoder, folder, above, cell.run, spec.measure, study.dataset, study.harder, study.sizes)
        write_results(results, found)
    return metadata


def _validation(study: Study, folder: Path, cell: Cell) -> list[ProbeResult]:
    """A candidate on validation: pairs ranked right, by which rates are chosen, and answers, to be seen beside them."""
    model, processor = load_mllm(folder)
    model.to(device())  # type: ignore[arg-type]
    conditions: dict[str, Any] = {"feature_layer": model.config.vision_feature_layer, "encoder": cell.run}
    conditions |= {"encoder_sha256": weights_sha256(folder), "partner": cell.run}
    images, pairs = probe_pairs(study.dataset, "validation", study.sizes.pairs)
    ranked = rank_pairs(model, processor, pairs, images, conditions, split="validation")
    images, questions = probe_questions(study.dataset, "validation", study.sizes.questions)
    return [ranked, answer_questions(model, processor, questions, images, conditions, split="validation")[0]]


def _parts(study: Study, cell: Cell, output: Path) -> dict[str, str]:
    """Encoder and language head of a cell that are other runs': its own, or those of what it starts from."""
    spec = study.spec.runs[cell.run]
    parts = {} if spec.parent is None else _parts(study, study.same_seed(spec.parent, cell), output)
    if spec.vision:
        made = study.same_seed(spec.vision, cell)
        folder = "runs" if made.seed is None else "encoders"
        parts["vision"] = str(output / folder / made.name)
        if study.spec.runs[spec.vision].encoder:
            parts["vision"] = str(study.spec.runs[spec.vision].encoder)
    if spec.language:
        parts["language"] = str(output / "runs" / study.same_seed(spec.language, cell).name)
    return parts


def _key(study: Study, cell: Cell, loaded: LoadedRecipe | None, output: Path) -> str:
    """Of all that a cell's facts and results follow from."""
    needed = [_read(output / "cells" / f"{n.name}.json").get("key") for n in study.needs(cell) if n.rate is None]
    measured: dict[str, Any] = {
        "measures": study.spec.runs[cell.run].measure,
        "worlds": [study.dataset.to_dict(), *(w.to_dict() for w in study.harder.values())],
        "sizes": asdict(study.sizes),
    }
    recipe = None if loaded is None else loaded.recipe.model_copy(update={"model": None}).sha256()
    made = [FORMAT, cell.name, recipe, needed, measured]
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()


@contextmanager
def _share_of_cores(jobs: int) -> Iterator[None]:
    """Processes started within take their share of the cores: those that want all of them slow each other many times.

    What the environment says already holds, and it is as before afterwards.
    """
    share = str(max(1, (os.cpu_count() or 1) // jobs))
    ours = [name for name in THREADS if name not in os.environ]
    os.environ.update(dict.fromkeys(ours, share))
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _set_up(number: Any) -> None:
    """Give a process its share of the machine."""
    with number.get_lock():
        place, number.value = number.value, number.value + 1
    if torch.cuda.device_count() > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(place % torch.cuda.device_count())
    torch.set_num_threads(int(os.environ[THREADS[0]]))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process whose study was killed would go on, or wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _facts(cell: Cell) -> dict[str, Any]:
    return {"run": cell.run, "seed": cell.seed, "candidate": cell.rate}


def _write_cell(output: Path, cell: Cell, metadata: dict[str, Any]) -> None:
    write_json(output / "cells" / f"{cell.name}.json", metadata)


def cell_metadata(study: Study, output: Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """What is known of every cell that was started, in the study's order."""
    for cell in study.cells():
        if metadata := _read(output / "cells" / f"{cell.name}.json"):
            yield cell, metadata


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _say_nothing(line: str) -> None:
    """Be one of many: the study says what is finished."""
