"""The end-to-end demo: train an SFT and a DPO encoder from one parent on the synthetic Shapes dataset, and compare.

Every step writes its result to disk and is skipped if the result exists, so a quickstart that was stopped resumes, and
a finished one is reused.
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
from pivot_hub.encoder import PivotVisionModel
from pivot_hub.encoder.configuration_pivot import LAST
from pivot_hub.encoder.device import compute_device
from pivot_hub.encoder.repository import read_encoder
from pivot_hub.explain.figure import draw_rows
from pivot_hub.explain.gradcam import Method, gradient_map
from pivot_hub.files import write_json, write_whole
from pivot_hub.mllm.extract import extract_once
from pivot_hub.mllm.load import image_px, load_llava
from pivot_hub.outputs import whole_folder
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
    """The measurements of a quickstart.

    Args:
        duration_s: Seconds over all calls that contributed to the output folder.
        peak_memory_mb: Peak memory of the process in MB.
        machine: Description of the machine.
        stages: Report of each stage by the name of its recipe.
        results: Results of the base, SFT and DPO encoders.
        comparisons: Paired comparisons of DPO with SFT.
    """

    duration_s: float
    peak_memory_mb: int
    machine: dict[str, Any]
    stages: dict[str, Any]
    results: list[ProbeResult]
    comparisons: Comparisons

    def rows(self) -> list[tuple[str, str, dict[str, ProbeResult], str]]:
        """Return task, metric, result of each encoder, and verdict on DPO against SFT, in the order measured."""
        by_task: dict[tuple[str, str], dict[str, ProbeResult]] = {}
        for result in self.results:
            by_task.setdefault((result.task, result.metric), {})[result.encoder] = result
        verdicts = {(c.task, c.metric): c.verdict for c in self.comparisons.rows}
        return [(task, metric, cells, verdicts[task, metric]) for (task, metric), cells in by_task.items()]

    def table(self) -> Table:
        """Return the rows as a table for the terminal; the gradient maps of the losses are in the report only."""
        title = "Synthetic Shapes dataset, held-out scenes, percent [95% interval]"
        table = Table(title=title, title_justify="left", box=SIMPLE)
        for column in ("probe", "metric", "base", "SFT", "DPO", "DPO against SFT"):
            table.add_column(column, no_wrap=True)
        for task, metric, cells, verdict in self.rows():
            if task.endswith(("of sft", "of dpo")):
                continue
            table.add_row(_short(task), metric, *(_cell(cells.get(e)) for e in ("base", "sft", "dpo")), verdict)
        return table

    def markdown(self) -> str:
        """Return the report as Markdown."""
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
        for task, metric, cells, verdict in self.rows():
            values = " | ".join(_cell(cells.get(e)) for e in ("base", "sft", "dpo"))
            lines.append(f"| {_short(task)} | {metric} | {values} | {verdict} |")
        return "\n".join([*lines, "", "![The same scenes under both encoders' maps](maps.png)", ""])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as it is written to `report.json`."""
        plain = {k: v for k, v in vars(self).items() if k not in ("results", "comparisons")}
        return {**plain, "results": [r.to_dict() for r in self.results], "comparison": self.comparisons.to_dict()}


def run_quickstart(
    output: Path,
    seed: int = 0,
    overrides: Sequence[str] = (),
    sizes: Sizes = Sizes(),
    log: Callable[[str], None] = print,
) -> QuickstartReport:
    """Run align, instruct, sft and dpo, extract both encoders, probe them and report.

    Args:
        output: Folder that receives runs/, hub/pivot/shapes-sft and shapes-dpo, results/, report.json, report.md and
            maps.png.
        seed: Seed of every stage.
        overrides: Overrides of every stage's recipe, such as `data.0.rows=64`.
        sizes: Sizes of the probes.
        log: Callback that receives progress, one line at a time.
    """
    started = time.monotonic()
    recipes = {name: load_recipe(f"shapes/{name}", [f"seed={seed}", *overrides]) for name in STAGES}
    folders = {name: run_stage(loaded, output / "runs", log=log) for name, loaded in recipes.items()}
    stages = {name: json.loads((folder / "report.json").read_text()) for name, folder in folders.items()}

    align = recipes["1-align"]
    encoders = {"base": Path(align.locate(align.parts("the quickstart").vision))}
    for branch, stage in BRANCHES.items():
        target = output / "hub" / "pivot" / f"shapes-{branch}"
        encoders[branch] = _extract_once(folders[stage], target, _command(seed, overrides), log)

    results: list[ProbeResult] = []
    parent = folders["2-instruct"]
    for name, encoder in encoders.items():
        results += _probe_once(name, encoder, folders.get(BRANCHES.get(name, "")), parent, output, sizes, seed, log)
    # Results of one task and metric come together, encoders in the order base, SFT, DPO.
    order = list(dict.fromkeys((r.task, r.metric) for r in results))
    results.sort(key=lambda r: order.index((r.task, r.metric)))
    by_encoder = {name: [r for r in results if r.encoder == name] for name in encoders}
    for branch in BRANCHES:
        native = read_results(output / "results" / f"{branch}-native.json")
        write_card(encoders[branch], read_prose(f"shapes-{branch}"), results=by_encoder | {f"{branch}-native": native})

    before = _read(output / "report.json")
    report = QuickstartReport(
        duration_s=round(time.monotonic() - started + before.get("duration_s", 0.0), 1),
        peak_memory_mb=max(peak_memory_mb(), before.get("peak_memory_mb", 0)),
        machine=machine(),
        stages=stages,
        results=results,
        comparisons=compare_results({branch: by_encoder[branch] for branch in BRANCHES}, seed=seed),
    )
    # Reused results keep their report, figure and duration. report.json is written last: it marks a complete report.
    if before.get("results") != json.loads(json.dumps([r.to_dict() for r in results])):
        _draw(folders, output / "maps.png")
        write_whole(output / "report.md", report.markdown())
        write_json(output / "report.json", report.to_dict())
    return report


def push_quickstart(output: Path, log: Callable[[str], None] = print) -> dict[str, dict[str, str]]:
    """Publish the base encoder and those of a finished quickstart to a hub on this machine, and load them by name.

    Args:
        output: Folder that `run_quickstart` wrote to. It receives `local-hub/`, and the base encoder with its card.
        log: Callback that receives progress, one line at a time.

    Returns:
        For each repository, what was loaded from it.
    """
    from pivot_hub.publish.push_local import push_local

    encoders = output / "hub" / "pivot"
    base = encoders / "shapes-base"
    align = load_recipe("shapes/1-align")
    source = Path(align.locate(align.parts("the quickstart").vision))
    results = [r for r in read_results(encoders / "shapes-dpo" / "results" / "base.json") if r.partner is None]
    if not base.is_dir():
        with whole_folder(base) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)
            write_card(folder, read_prose("shapes-base"), results={"base": results})
    names = ("shapes-base", "shapes-sft", "shapes-dpo")
    return push_local(
        {name: encoders / name for name in names}, output / "local-hub", "PIVOT synthetic Shapes dataset", log
    )


def _command(seed: int, overrides: Sequence[str]) -> str:
    """The command that reproduces the encoders of a quickstart."""
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
    """Probe an encoder and the MLLM it came from, or read the results if these weights were probed before.

    The `last_hidden_state` of the native class of an encoder that came from an MLLM is probed too, for its card.

    Args:
        name: Name of the encoder in the results.
        encoder: Folder of the encoder.
        checkpoint: Folder of the MLLM that the encoder came from; None if it came from none.
        parent: Folder of the MLLM that the checkpoint started from.
        output: Folder of the quickstart.
        sizes: Sizes of the probes.
        seed: Seed of the probes.
        log: Callback that receives progress.
    """
    file = output / "results" / f"{name}.json"
    key_file = file.with_name(f"{name}.key.json")  # written last
    sha256 = weights_sha256(encoder)
    key = {"encoder": sha256, "sizes": asdict(sizes), "seed": seed, "native_output": checkpoint is not None}
    if _read(key_file) != key or not (file.is_file() and file.with_suffix(".npz").is_file()):
        log(f"probing the {name} encoder")
        model, image_processor = read_encoder(encoder)
        model.to(compute_device())  # type: ignore[arg-type]
        results = probe_shapes(model, image_processor, name, sha256, sizes, seed)
        if checkpoint is not None:
            mllm, processor = load_llava(checkpoint)
            reference = load_llava(parent)[0].eval()
            for each in (mllm, reference):
                each.to(compute_device())  # type: ignore[arg-type]
            partner = f"shapes/{checkpoint.name}"
            results += probe_mllm(mllm, processor, reference, name, sha256, partner, sizes, seed)
            native = PivotVisionModel.from_pretrained(str(encoder), feature_layer=LAST)
            native.to(compute_device())
            native_results = probe_shapes(native, image_processor, name, sha256, sizes, seed)
            write_results(file.with_name(f"{name}-native.json"), native_results)
        write_results(file, results)
        write_json(key_file, key)
    return read_results(file)


def _draw(folders: dict[str, Path], path: Path) -> None:
    """Draw the gradient maps of both MLLMs on the same scenes and answers."""
    mllms = {branch: load_llava(folders[stage]) for branch, stage in BRANCHES.items()}
    dataset = ShapesDataset(image_px=image_px(mllms["sft"][0]))
    rows = []
    for target in probe_targets(dataset, "test", FIGURE_SCENES):
        pair, image = target.pair, target.rendered.image
        maps_of = {
            branch: gradient_map(model.eval(), processor, image, pair.question, pair.chosen).maps
            for branch, (model, processor) in mllms.items()
        }
        methods: dict[Method, str] = {"gradcam": "Grad-CAM", "gradient": "gradient"}
        maps = [
            (f"{branch.upper()}, {title}", maps_of[branch][method])
            for method, title in methods.items()
            for branch in BRANCHES
        ]
        rows.append((f"{pair.question}\n{pair.chosen}", image, target.mask, maps))
    draw_rows(rows, path)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _short(task: str) -> str:
    return task.removeprefix("shapes/")


def _cell(result: ProbeResult | None) -> str:
    return "-" if result is None else f"{result.value:.1f} [{result.ci95[0]:.1f}, {result.ci95[1]:.1f}]"
