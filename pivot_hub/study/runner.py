"""Run a study: every cell is an ordinary stage; several run at a time, and a study that was stopped resumes."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pivot_hub.config.data_section import ShapesData
from pivot_hub.config.recipe import LoadedRecipe
from pivot_hub.config.stages import stage_of
from pivot_hub.data.source import sources_of
from pivot_hub.encoder.repository import encoder_metadata
from pivot_hub.errors import PivotError, ProbeError, TrainingError
from pivot_hub.files import write_json
from pivot_hub.mllm.extract import extract_once
from pivot_hub.probes.result import read_results, write_results
from pivot_hub.provenance import machine, weights_sha256
from pivot_hub.study.design import WRONG_ANSWERS, Cell, Study, load_study
from pivot_hub.study.learning_rate import best_learning_rate, score_candidate
from pivot_hub.study.measures import measure_run
from pivot_hub.study.on_policy import write_wrong_answers
from pivot_hub.training.stage import part_hashes, run_stage

FORMAT = 2  # version of the measures of a cell: a change of it measures every cell again
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_study(
    path: str | Path,
    output: Path,
    jobs: int = 1,
    log: Callable[[str], None] = print,
    seeds: Sequence[int] | None = None,
) -> Study:
    """Train and measure every cell of a study; cells that are finished are left as they are.

    In `output` each cell has its files below `runs/` (checkpoints), `encoders/`, `results/` and `cells/` (metadata). A
    cell that fails is recorded as failed, and the cells that need it are not started; the others are run.

    Args:
        path: File of the study, as `load_study` takes it.
        output: Folder of the study's output.
        jobs: Number of cells that run at a time, each in a process of its own. Processes take the GPUs in turn, or
            share the CPU cores.
        log: Callback that receives progress, one line at a time.
        seeds: The study's seeds whose cells are run, besides those that all seeds share; all by default.

    Raises:
        RecipeError: The study's file is wrong, or a recipe with its overrides is; or the study has no such seed.
        TrainingError: Cells failed (the message names the first), or a process was killed.
    """
    study = load_study(path)
    cells = study.cells(seeds)
    context = multiprocessing.get_context("spawn")
    try:
        with (
            _share_of_cores(jobs),
            ProcessPoolExecutor(jobs, context, _set_up_process, (context.Value("i", 0),)) as pool,
        ):
            done = _run_cells(study, cells, output, pool, jobs, log)
    except BrokenProcessPool:
        raise TrainingError(
            "a process of the study was killed from outside, perhaps because memory ran out. What is finished is kept: "
            "run the same command again, with fewer --jobs if it happens once more."
        ) from None
    failed = [name for name, metadata in done.items() if metadata["status"] == "failed"]
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(done)} runs failed, {failed[0]} first: {done[failed[0]]['reason']} The table has "
            "them all; run the same command again to try them once more."
        )
    return study


def _run_cells(
    study: Study, cells: Sequence[Cell], output: Path, pool: ProcessPoolExecutor, jobs: int, log: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Give each cell to the pool as soon as those it needs are done, and return the metadata of all cells by name."""
    waiting = list(cells)
    progress = _Progress(len(waiting), log)
    done: dict[str, dict[str, Any]] = {}
    running: dict[Future[dict[str, Any]], Cell] = {}
    while waiting or running:
        for cell in list(waiting):
            if len(running) == jobs:
                break
            needed = [done.get(other.name) for other in study.needs(cell)]
            if None in needed:
                continue
            waiting.remove(cell)
            if any(metadata and metadata["status"] != "done" for metadata in needed):
                reason = "a run it starts from failed"
                done[cell.name] = _identity(cell) | {"status": "not started", "reason": reason}
                _write_metadata(output, cell, done[cell.name])
            else:
                running[pool.submit(run_cell, str(study.path), cell, output)] = cell
        for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
            cell = running.pop(future)
            done[cell.name] = future.result()
            was_kept = done[cell.name].pop("kept", False)
            progress.report(cell, done[cell.name], was_kept, len(done))
    return done


class _Progress:
    """Logs each finished cell, and how long the rest will take at the pace of the cells that were trained."""

    def __init__(self, total: int, log: Callable[[str], None]) -> None:
        self.total, self.log = total, log
        self.started, self.trained = time.monotonic(), 0

    def report(self, cell: Cell, metadata: dict[str, Any], was_kept: bool, finished: int) -> None:
        """Log one cell.

        Args:
            cell: Cell that has finished.
            metadata: Metadata of the cell.
            was_kept: Whether the cell was finished by an earlier run of the study.
            finished: Number of finished cells.
        """
        self.trained += not was_kept
        rest = self.total - finished
        left = ""
        if self.trained and rest:
            seconds_per_cell = (time.monotonic() - self.started) / self.trained
            left = f", about {rest * seconds_per_cell / 60:.0f} min left"
        status = metadata["status"] if metadata["status"] == "done" else f"{metadata['status']}: {metadata['reason']}"
        self.log(f"{finished}/{self.total} {cell.name}: {status}, {metadata.get('duration_s', 0):.0f} s{left}")


def run_cell(path: str, cell: Cell, output: Path) -> dict[str, Any]:
    """Train, extract and measure one cell, in any process.

    Args:
        path: File of the study.
        cell: Cell that is run.
        output: Folder of the study's output.

    Returns:
        The metadata that is written to `cells/`. An error of this package is recorded there as the reason of a failed
        cell, and is not raised.
    """
    study = load_study(path)
    began = time.monotonic()
    recipe = study.spec.runs[cell.run].recipe
    metadata = _identity(cell)
    try:
        is_candidate = cell.learning_rate is not None
        learning_rate = cell.learning_rate if is_candidate else chosen_learning_rate(study, cell, output)
        loaded = None if recipe is None else study.load(cell, learning_rate, _files(study, cell, output))
        key = _key(study, cell, loaded, output)
        earlier = _read(output / "cells" / f"{cell.name}.json")
        results = output / "results" / f"{cell.name}.json"
        if earlier.get("key") == key and earlier["status"] == "done" and (results.is_file() or not earlier["measured"]):
            return {**earlier, "kept": True}
        metadata |= {"key": key, "rate": learning_rate}
        metadata |= _measure_encoder(study, cell, output) if loaded is None else _train(study, cell, loaded, output)
        metadata |= {"status": "done", "measured": results.is_file()}
    except PivotError as error:
        metadata |= {"status": "failed", "reason": str(error)}
    # If the training was finished by an earlier process, its own duration is the longer one.
    duration = max(time.monotonic() - began, metadata.get("training", {}).get("duration_s", 0))
    metadata |= {"duration_s": round(duration, 1), "machine": machine()}
    _write_metadata(output, cell, metadata)
    return metadata


def chosen_learning_rate(study: Study, cell: Cell, output: Path) -> float | None:
    """The learning rate of the candidate with the best validation score; None for a run that keeps its recipe's."""
    searched_run = study.spec.runs[cell.run].rate_of or cell.run
    scores: dict[float, float] = {}
    for candidate in study.candidates(searched_run):
        assert candidate.learning_rate is not None
        ranked = read_results(output / "results" / f"{candidate.name}.json")[0]
        scores[candidate.learning_rate] = ranked.value
    return best_learning_rate(scores) if scores else None


def _measure_encoder(study: Study, cell: Cell, output: Path) -> dict[str, Any]:
    """Measure an encoder that exists already, and return its part of the metadata."""
    spec = study.spec.runs[cell.run]
    assert spec.encoder is not None
    encoder = study.path.parent / spec.encoder
    results = measure_run(encoder, None, None, cell.run, spec.measure, study.dataset, study.harder, study.sizes)
    write_results(output / "results" / f"{cell.name}.json", results)
    return {"encoder_sha256": encoder_metadata(str(encoder))["encoder_sha256"]}


def _train(study: Study, cell: Cell, loaded: LoadedRecipe, output: Path) -> dict[str, Any]:
    """Train a cell unless its checkpoint is finished, extract and measure it, and return its part of the metadata."""
    spec, results_file = study.spec.runs[cell.run], output / "results" / f"{cell.name}.json"
    parent = None if spec.parent is None else output / "runs" / study.same_seed(spec.parent, cell).name
    if spec.policy is not None:
        source = loaded.recipe.data[0]
        assert isinstance(source, ShapesData)
        policy = output / "runs" / study.same_seed(spec.policy, cell).name
        write_wrong_answers(policy, source, output / "answers" / f"{cell.name}.json")
    if _is_stale(output / "runs" / cell.name, loaded, parent):
        shutil.rmtree(output / "runs" / cell.name)
    checkpoint = run_stage(loaded, output=output / "runs" / cell.name, parent=parent, log=lambda line: None)
    report = _read(checkpoint / "report.json")
    metadata = {
        "recipe": loaded.name,
        "recipe_sha256": loaded.recipe.sha256(),
        "stage": loaded.recipe.stage,
        "rows": report["data"]["rows"],
        "args": loaded.recipe.args,
        "training": {key: report[key] for key in ("steps", "duration_s", "peak_memory_mb", "train_loss")},
    }
    sizes = study.sizes
    if stage_of(loaded.recipe.stage).base_part:
        if spec.measure:
            results = measure_run(checkpoint, None, None, cell.run, spec.measure, study.dataset, study.harder, sizes)
            write_results(results_file, results)
            metadata["encoder_sha256"] = encoder_metadata(str(checkpoint))["encoder_sha256"]
        return metadata
    if cell.learning_rate is not None:
        scores = score_candidate(checkpoint, cell.run, sizes.pairs, sizes.questions, study.dataset)
        write_results(results_file, list(scores))
        return metadata
    encoder = output / "encoders" / cell.name
    extract_once(checkpoint, encoder)
    metadata["encoder_sha256"] = encoder_metadata(str(encoder))["encoder_sha256"]
    if spec.measure and cell.seed != study.spec.search_seed:
        results = measure_run(encoder, checkpoint, parent, cell.run, spec.measure, study.dataset, study.harder, sizes)
        write_results(results_file, results)
    return metadata


def _is_stale(checkpoint: Path, loaded: LoadedRecipe, parent: Path | None) -> bool:
    """Whether a finished checkpoint was trained from other weights, or on other wrong answers, than there are now."""
    provenance = _read(checkpoint / "provenance.json")
    if not provenance:
        return False
    if parent is None:
        return provenance["parts"] is not None and provenance["parts"] != part_hashes(loaded)
    answers = sources_of(loaded)[0].to_dict().get("wrong_answers_sha256")
    same_answers = provenance["data"][0].get("wrong_answers_sha256") == answers
    return not same_answers or provenance["parent"]["weights_sha256"] != weights_sha256(parent)


def _files(study: Study, cell: Cell, output: Path) -> dict[str, str]:
    """Files and folders of the output that a cell's recipe reads, by their keys in it.

    They are the encoder and language model that replace the base parts, in this cell or in one it starts from, and the
    wrong answers of a policy.
    """
    spec = study.spec.runs[cell.run]
    files = {} if spec.parent is None else _files(study, study.same_seed(spec.parent, cell), output)
    files.pop(WRONG_ANSWERS, None)
    if spec.vision:
        source = study.same_seed(spec.vision, cell)
        folder = "encoders" if study.trains_mllm(spec.vision) else "runs"
        files["model.vision"] = study.spec.runs[spec.vision].encoder or str(output / folder / source.name)
    if spec.language:
        files["model.language"] = str(output / "runs" / study.same_seed(spec.language, cell).name)
    if spec.policy:
        files[WRONG_ANSWERS] = str((output / "answers" / f"{cell.name}.json").resolve())
    return files


def _key(study: Study, cell: Cell, loaded: LoadedRecipe | None, output: Path) -> str:
    """Hash of everything that a cell's metadata and results follow from."""
    needed = [
        _read(output / "cells" / f"{other.name}.json").get("key")
        for other in study.needs(cell)
        if other.learning_rate is None
    ]
    measured: dict[str, Any] = {
        "measures": study.spec.runs[cell.run].measure,
        "worlds": [study.dataset.to_dict(), *(dataset.to_dict() for dataset in study.harder.values())],
        "sizes": asdict(study.sizes),
    }
    recipe = None
    if loaded is not None:  # without the paths of the output: what is there follows from the cells that are needed
        data = loaded.recipe.data
        if study.spec.runs[cell.run].policy:
            data = [data[0].model_copy(update={"wrong_answers": None}), *data[1:]]
        recipe = loaded.recipe.model_copy(update={"model": None, "data": data}).sha256()
    sources = [FORMAT, cell.name, recipe, needed, measured]
    return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()


@contextmanager
def _share_of_cores(jobs: int) -> Iterator[None]:
    """Limit the threads of processes that are started within to an equal share of the cores.

    Processes that each use all cores slow one another down many times over. Variables that the environment sets already
    are kept, and the environment is restored at the end.
    """
    share = str(max(1, (os.cpu_count() or 1) // jobs))
    unset = [name for name in THREADS if name not in os.environ]
    os.environ.update(dict.fromkeys(unset, share))
    try:
        yield
    finally:
        for name in unset:
            os.environ.pop(name, None)


def _set_up_process(next_number: Any) -> None:
    """Give a process of the pool its GPU and threads, and let it end with the study.

    Args:
        next_number: Shared integer with the number of the next process of the pool.
    """
    with next_number.get_lock():
        number, next_number.value = next_number.value, next_number.value + 1
    if torch.cuda.device_count() > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % torch.cuda.device_count())
    torch.set_num_threads(int(os.environ[THREADS[0]]))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the study is killed; otherwise it would train on, or wait for work indefinitely."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _identity(cell: Cell) -> dict[str, Any]:
    return {"run": cell.run, "seed": cell.seed, "candidate": cell.learning_rate}


def _write_metadata(output: Path, cell: Cell, metadata: dict[str, Any]) -> None:
    write_json(output / "cells" / f"{cell.name}.json", metadata)


def cell_metadata(study: Study, output: Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Yield each cell that was started with its metadata, in the study's order.

    A cell that was finished under another recipe, parent or measures is left out: it has to run again.
    """
    current = set()
    for cell in study.cells():
        metadata = _read(output / "cells" / f"{cell.name}.json")
        if not metadata:
            continue
        if metadata["status"] == "done":
            needed = all(other in current for other in study.needs(cell))
            if not needed or metadata["key"] != _current_key(study, cell, output):
                continue
            current.add(cell)
        yield cell, metadata


def _current_key(study: Study, cell: Cell, output: Path) -> str | None:
    """The key that a cell would have if it ran now; None where the search for its learning rate is not finished."""
    if study.spec.runs[cell.run].recipe is None:
        return _key(study, cell, None, output)
    try:
        rate = cell.learning_rate if cell.learning_rate is not None else chosen_learning_rate(study, cell, output)
    except ProbeError:
        return None
    return _key(study, cell, study.load(cell, rate, _files(study, cell, output)), output)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
