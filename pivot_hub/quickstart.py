"""The paper in a box: train an SFT and a DPO encoder from one parent on the built-in world, and compare them.

Every step leaves its result on disk and is skipped when that result is there: run it again to go on or to reuse.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from pivot_hub.config.recipe import load_recipe
from pivot_hub.data.synthetic import ShapesDataset
from pivot_hub.encoder.repository import read_encoder
from pivot_hub.explain.figure import draw_rows
from pivot_hub.explain.gradcam import gradient_map
from pivot_hub.files import whole_folder, write_json, write_whole
from pivot_hub.mllm.extract import extract_once
from pivot_hub.mllm.load import image_px, load_mllm
from pivot_hub.probes.result import ProbeResult, read_results, write_results
from pivot_hub.probes.run import Sizes, probe_mllm, probe_shapes, probe_targets
from pivot_hub.probes.significance import Comparisons, compare_results
from pivot_hub.provenance import machine, peak_memory_mb, weights_sha256
from pivot_hub.publish.card_inputs import read_prose
from pivot_hub.publish.staging import write_card
from pivot_hub.training.stage import run_stage

STAGES = ("1-align", "2-instruct", "3-sft", "3-dpo")
BRANCHES = {"sft": "3-sft", "dpo": "3-dpo"}
FIGURE_SCENES = 4


@dataclass(frozen=True)
class QuickstartReport:
    """What a quickstart measured."""

    duration_s: float
    peak_memory_mb: int
    machine: dict[str, Any]
    stages: dict[str, Any]
    results: list[ProbeResult]
    comparisons: Comparisons

    def rows(self) -> list[tuple[str, str, dict[str, ProbeResult], str]]:
        """(task, metric, result of each encoder, DPO against SFT) in the order measured."""
        found: dict[tuple[str, str], dict[str, ProbeResult]] = {}
        for result in self.results:
            found.setdefault((result.task, result.metric), {})[result.encoder] = result
        said = {(c.task, c.metric): c.verdict for c in self.comparisons.rows}
        return [(task, metric, cells, said[task, metric]) for (task, metric), cells in found.items()]

    def table(self) -> Table:
        """The rows for a screen: maps of the losses are left to the report."""
        table = Table(title="Built-in world, held-out scenes, percent [95% interval]", title_justify="left", box=SIMPLE)
        for column in ("probe", "metric", "base", "SFT", "DPO", "DPO against SFT"):
            table.add_column(column, no_wrap=True)
        for task, metric, cells, said in self.rows():
            if task.endswith(("of sft", "of dpo")):
                continue
            table.add_row(_short(task), metric, *(_cell(cells.get(e)) for e in ("base", "sft", "dpo")), said)
        return table

    def markdown(self) -> str:
        lines = [
            "# Quickstart report",
            "",
            f"{self.duration_s:.0f} s, peak memory {self.peak_memory_mb} MB, {self.machine['cpu_cores']} CPU cores, "
            f"GPU {self.machine['gpu'] or 'none'}. Percent with 95% bootstrap intervals over held-out test scenes.",
            "Base is the encoder before any MLLM; localisation and VQA need an MLLM, so it has none.",
            f"DPO against SFT: {self.comparisons.method()}",
            "",
            "| probe | metric | base | SFT | DPO | DPO against SFT |",
            "|---|---|---|---|---|---|",
        ]
        for task, metric, cells, said in self.rows():
            shown = " | ".join(_cell(cells.get(e)) for e in ("base", "sft", "dpo"))
            lines.append(f"| {_short(task)} | {metric} | {shown} | {said} |")
        return "\n".join([*lines, "", "![The same scenes under both encoders' maps](maps.png)", ""])

    def to_dict(self) -> dict[str, Any]:
        kept = {k: v for k, v in vars(self).items() if k not in ("results", "comparisons")}
        return {**kept, "results": [r.to_dict() for r in self.results], "comparison": self.comparisons.to_dict()}


def run_quickstart(
    output: Path,
    seed: int = 0,
    overrides: Sequence[str] = (),
    sizes: Sizes = Sizes(),
    log: Callable[[str], None] = print,
) -> QuickstartReport:
    """Run align, instruct, sft and dpo, extract both encoders, probe them and report.

    Args:
        output: gets runs/, hub/pivot/shapes-sft and shapes-dpo, results/, report.json, report.md, maps.png.
        seed: of every stage.
        overrides: of every stage's recipe, as `data.0.rows=64`.
        sizes: of the probes.
        say: gets progress, one line at a time.
    """
    started = time.monotonic()
    recipes = {name: load_recipe(f"shapes/{name}", [f"seed={seed}", *overrides]) for name in STAGES}
    folders = {name: run_stage(loaded, output / "runs", log=log) for name, loaded in recipes.items()}
    stages = {name: json.loads((folder / "report.json").read_text()) for name, folder in folders.items()}

    align = recipes["1-align"]
    assert align.recipe.model is not None
    encoders = {"base": Path(align.locate(align.recipe.model.vision))}
    for branch, stage in BRANCHES.items():
        target = output / "hub" / "pivot" / f"shapes-{branch}"
        encoders[branch] = _extract_once(folders[stage], target, _command(seed, overrides), log)

    results: list[ProbeResult] = []
    parent = folders["2-instruct"]
    for name, encoder in encoders.items():
        results += _probe_once(name, encoder, folders.get(BRANCHES.get(name, "")), parent, output, sizes, seed, log)
    # Tasks in one block each, encoders side by side within it.
    order = list(dict.fromkeys((r.task, r.metric) for r in results))
    results.sort(key=lambda r: order.index((r.task, r.metric)))
    measured = {name: [r for r in results if r.encoder == name] for name in encoders}
    for branch in BRANCHES:
        write_card(encoders[branch], read_prose(f"shapes-{branch}"), results=measured)

    before = _read(output / "report.json")
    report = QuickstartReport(
        duration_s=round(time.monotonic() - started + before.get("duration_s", 0.0), 1),
        peak_memory_mb=max(peak_memory_mb(), before.get("peak_memory_mb", 0)),
        machine=machine(),
        stages=stages,
        results=results,
        comparisons=compare_results({e: [r for r in results if r.encoder == e] for e in BRANCHES}, seed=seed),
    )
    # Reused results keep their report, figure and duration; report.json comes last and says that all is there.
    if [ProbeResult.from_dict(stored) for stored in before.get("results", [])] != results:
        _draw(folders, output / "maps.png")
        write_whole(output / "report.md", report.markdown())
        write_json(output / "report.json", report.to_dict())
    return report


def push_quickstart(output: Path, log: Callable[[str], None] = print) -> dict[str, dict[str, str]]:
    """Publish what a finished quickstart made, and the base encoder, to a hub on this machine; load it back by name.

    Args:
        output: of `run_quickstart`; gets `local-hub/`, and the base encoder with its card beside the other two.
        say: gets progress.
    """
    from pivot_hub.publish.push_local import push_local

    encoders = output / "hub" / "pivot"
    base = encoders / "shapes-base"
    align = load_recipe("shapes/1-align")
    assert align.recipe.model is not None
    source = Path(align.locate(align.recipe.model.vision))
    results = [r for r in read_results(encoders / "shapes-dpo" / "results" / "base.json") if r.partner is None]
    if not base.is_dir():
        with whole_folder(base) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)
            write_card(folder, read_prose("shapes-base"), results={"base": results})
    names = ("shapes-base", "shapes-sft", "shapes-dpo")
    return push_local({name: encoders / name for name in names}, output / "local-hub", "PIVOT built-in world", log)


def _command(seed: int, overrides: Sequence[str]) -> str:
    """What makes these encoders again."""
    if overrides:
        call = f'run_quickstart(Path("quickstart"), {seed}, {json.dumps(list(overrides))})'
        return f"python -c 'from pathlib import Path; from pivot_hub.quickstart import run_quickstart; {call}'"
    return "pivot quickstart" + (f" --seed {seed}" if seed else "")


def _extract_once(checkpoint: Path, target: Path, command: str, log: Callable[[str], None]) -> Path:
    if extract_once(checkpoint, target, command):
        log(f"encoder: {target}")
    return target


def _probe_once(
    name: str,
    encoder: Path,
    checkpoint: Path | None,
    parent: Path,
    output: Path,
    sizes: Sizes,
    seed: int,
    log: Callable[[str], None],
) -> list[ProbeResult]:
    """Probe an encoder, and the MLLM it came from if it has one, or read what was measured of these weights."""
    file = output / "results" / f"{name}.json"
    made_of = file.with_name(f"{name}.key.json")  # written last
    sha256 = weights_sha256(encoder)
    key = {"encoder": sha256, "sizes": asdict(sizes), "seed": seed}
    if _read(made_of) != key or not (file.is_file() and file.with_suffix(".npz").is_file()):
        log(f"probing the {name} encoder")
        model, image_processor = read_encoder(encoder)
        results = probe_shapes(model, image_processor, name, sha256, sizes, seed)
        if checkpoint is not None:
            mllm, processor = load_mllm(checkpoint)
            reference = load_mllm(parent)[0].eval()
            partner = f"shapes/{checkpoint.name}"
            results += probe_mllm(mllm, processor, reference, name, sha256, partner, sizes, seed)
        write_results(file, results)
        write_json(made_of, key)
    return read_results(file)


def _draw(folders: dict[str, Path], path: Path) -> None:
    """The same scenes and answers under the maps of both MLLMs."""
    mllms = {branch: load_mllm(folders[stage]) for branch, stage in BRANCHES.items()}
    dataset = ShapesDataset(image_px=image_px(mllms["sft"][0]))
    rows = []
    for target in probe_targets(dataset, "test", FIGURE_SCENES):
        pair, image = target.pair, target.rendered.image
        made = {
            branch: gradient_map(model.eval(), processor, image, pair.question, pair.chosen).maps
            for branch, (model, processor) in mllms.items()
        }
        titles = {"gradcam": "Grad-CAM", "gradient": "gradient"}
        maps = [(f"{b.upper()}, {t}", m[k]) for k, t in titles.items() for b, m in made.items()]  # type: ignore[index]
        rows.append((f"{pair.question}\n{pair.chosen}", image, target.mask, maps))
    draw_rows(rows, path)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _short(task: str) -> str:
    return task.removeprefix("shapes/")


def _cell(result: ProbeResult | None) -> str:
    return "-" if result is None else f"{result.value:.1f} [{result.ci95[0]:.1f}, {result.ci95[1]:.1f}]"
