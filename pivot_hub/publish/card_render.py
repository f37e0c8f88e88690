"""Render cards: facts and prose in, a model card out; a fact that is missing raises."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import jinja2
from huggingface_hub import ModelCard

from pivot_hub.config.data_section import ShapesData
from pivot_hub.config.recipe import LoadedRecipe, load_recipe
from pivot_hub.errors import CardError
from pivot_hub.probes.result import ProbeResult
from pivot_hub.publish.card_inputs import (
    CARDS,
    LOSS_MAPS,
    EncoderMetadata,
    Prose,
    data_sources,
    required_fact,
    stage_chain,
)
from pivot_hub.publish.card_metadata import card_metadata, check_metadata, hub_name, language_name
from pivot_hub.publish.eval_results import eval_files

FIGURE = "sft-against-dpo.png"
NOT_TRAINED = "**Not trained yet: there are no weights and no results, only the plan.**"
ORDER = ("base", "sft", "dpo")


def render_card(metadata: EncoderMetadata, prose: Prose, repository: str | None = None) -> ModelCard:
    """Render the card of a trained encoder.

    Args:
        facts: of its repository.
        prose: its text.
        repository: its name on the Hub, where it is not the prose's.

    Raises:
        CardError: a fact is missing; the message names it.
    """
    name = repository or prose.repository
    chain = stage_chain(metadata.provenance)
    stages = [_stage(step, prose, metadata) for step in chain]
    header = card_metadata(metadata, prose, name, chain)
    text = _template().render(
        trained=True,
        name=name,
        prose=prose,
        stage=required_fact(metadata.config, "config", "pivot.stage"),
        base_model=header.base_model,
        language=hub_name(language_name(metadata), prose),
        shape=_shape(metadata.config),
        tables=result_tables(metadata),
        apart=_apart(metadata),
        figure=FIGURE if _pair(metadata) else None,
        results=metadata.own_results(),
        lineage=_lineage(stages, name, header.get("base_model"), hub_name(language_name(metadata), prose), prose),
        sources=data_sources([required_fact(step, "provenance", "data") for step in chain], prose),
        stages=stages,
        gpu_hours=_sum([s["gpu_hours"] for s in stages]),
        energy_kwh=_sum([s["energy_kwh"] for s in stages]),
        commands=_commands(metadata, prose),
        commit=required_fact(chain[-1], "provenance", "commit", may_be_none=True),
        versions=required_fact(chain[-1], "provenance", "versions"),
        weights=metadata.encoder_sha256,
        exports=_exports(metadata.export),
    )
    return check_metadata(ModelCard(f"---\n{header.to_yaml()}\n---\n{text}"))


def render_plan(prose: Prose) -> str:
    """The page of an encoder that is not trained yet: prose and recipe, said so in its first line.

    Raises:
        CardError: a fact is missing; the message names it.
    """
    loaded = load_recipe(prose.recipe)
    assert loaded.recipe.model is not None
    return f"{NOT_TRAINED}\n" + _template().render(
        trained=False,
        name=prose.repository,
        prose=prose,
        stage=loaded.recipe.stage,
        base_model=hub_name(loaded.recipe.model.vision, prose),
        language=hub_name(loaded.recipe.model.language, prose),
        plan=[_planned(step) for step in loaded.lineage()],
        sources=data_sources([[d.model_dump(mode="json") for d in s.recipe.data] for s in loaded.lineage()], prose),
        commands=prose.commands or [f"pivot train {prose.recipe} --parents"],
    )


def card_files(metadata: EncoderMetadata, prose: Prose, repository: str | None = None) -> dict[str, bytes]:
    """What a card consists of, by file name: README.md, its figure and `.eval_results/*.yaml`.

    Raises:
        CardError: a fact is missing.
    """
    made = {"README.md": str(render_card(metadata, prose, repository)).encode()}
    if pair := _pair(metadata):
        made[FIGURE] = _draw(pair)
    return made | {n: t.encode() for n, t in eval_files(metadata.own_results(), prose.benchmarks).items()}


def _stage(step: dict[str, Any], prose: Prose, metadata: EncoderMetadata) -> dict[str, Any]:
    """A stage of the lineage with its cost; what was not measured is None."""
    where = f"provenance of {required_fact(step, 'provenance', 'recipe')}"
    machine = required_fact(step, where, "machine")
    cost = step.get("cost")
    if cost is None and metadata.report is not None and metadata.report.get("recipe") == step["recipe"]:
        cost = {"duration_s": metadata.report["duration_s"], "processes": 1, "energy_kwh": None}
    if cost is None:
        raise CardError(f"{where}: cost is missing: train it with this version, which records it.")
    duration, processes = cost["duration_s"], cost["processes"]
    gpu = required_fact(machine, where, "gpu", may_be_none=True)
    return {
        "recipe": step["recipe"],
        "stage": required_fact(step, where, "stage"),
        "data": "; ".join(_amount(source, prose) for source in required_fact(step, where, "data")),
        "hours": None if duration is None else duration / 3600,
        "on": f"{processes} x {gpu}" if gpu else f"{machine['cpu_cores']} CPU cores ({machine['processor']})",
        "gpu_hours": (None if duration is None else duration / 3600 * processes) if gpu else 0.0,
        "energy_kwh": cost["energy_kwh"],
        "weights": required_fact(step, where, "weights_sha256")[:12],
    }


def _planned(step: LoadedRecipe) -> dict[str, Any]:
    rates = step.recipe.learning_rate.trained()
    rows = []
    for source in step.recipe.data:
        if isinstance(source, ShapesData):
            drawn: int | None = source.rows
        else:
            drawn = source.sample or (source.expect.rows if source.expect else None)
        rows.append("unknown" if drawn is None else f"{drawn:,}")
    return {"recipe": step.name, "stage": step.recipe.stage, "trains": ", ".join(rates), "rows": " + ".join(rows)}


def _amount(source: dict[str, Any], prose: Prose) -> str:
    name = "shapes" if source["format"] == "shapes" else source["path"]
    drawn = source.get("sample") or source.get("rows")
    return f"{drawn:,} rows of {name}" if drawn else name


def _lineage(stages: list[dict[str, Any]], name: str, base: str | None, language: str | None, prose: Prose) -> str:
    """A tree of the stages, for a code block: it shows wherever Markdown does."""
    width = max(len(s["recipe"]) + 3 * (i + bool(base)) for i, s in enumerate(stages))
    lines = [f"{base} + {language}"] if base else []
    for depth, stage in enumerate(stages, start=len(lines)):
        lead = ("   " * (depth - 1) + "└─ ") if depth else ""
        lines.append(f"{lead + stage['recipe']:{width}}  {stage['stage']:8}  {stage['data']}")
    lines[-1] += f"  -> {name}"
    for kind, other in prose.pair.items():
        if kind != stages[-1]["stage"] and stages[-1]["stage"] in prose.pair:
            lines.append(f"{'':{width}}  held against {other} ({kind.upper()})")
    return "\n".join(lines)


def result_tables(metadata: EncoderMetadata) -> list[dict[str, Any]]:
    """Results as rows of text: of the encoder alone, then with its MLLM, encoders side by side."""
    own_name = metadata.own_results()[0].encoder
    names = {r.encoder for r in metadata.results}
    columns = [name for name in ORDER if name in names] + sorted(names - set(ORDER))
    cells: dict[tuple[str, str], dict[str, ProbeResult]] = {}
    for result in metadata.results:
        cells.setdefault((result.task, result.metric), {})[result.encoder] = result
    tables = []
    for title, alone in (("The encoder alone, frozen", True), ("With the MLLM it was trained in", False)):
        rows = []
        for (task, metric), found in cells.items():
            own = found.get(own_name)
            if own is None or (own.partner is None) != alone or task.endswith(LOSS_MAPS):
                continue
            shown = [_cell(found[c]) if c in found else "-" for c in columns]
            partner = [] if alone else [own.partner or "-"]
            rows.append(
                [task, metric, *shown, *partner, str(own.n), f"{own.protocol}; {own.split} split, seed {own.seed}"]
            )
        if rows:
            heads = [f"**{c}** (this)" if c == own_name else c for c in columns]
            partner = [] if alone else ["partner"]
            tables.append(
                {"title": title, "head": ["probe", "metric", *heads, *partner, "n", "conditions"], "rows": rows}
            )
    return tables


def _pair(metadata: EncoderMetadata) -> list[tuple[ProbeResult, ProbeResult]]:
    """SFT's and DPO's results on the same task, in order; empty for an encoder that is neither.

    Raises:
        CardError: the other one's results are missing.
    """
    if required_fact(metadata.config, "config", "pivot.stage") not in ("sft", "dpo"):
        return []
    by_name = {name: {(r.task, r.metric): r for r in metadata.results if r.encoder == name} for name in ("sft", "dpo")}
    for name, found in by_name.items():
        if not found:
            raise CardError(
                f"results of the {name} encoder are missing: the card holds SFT against DPO; put them in with "
                f"`pivot card ENCODER --results {name}.json`."
            )
    tasks = [k for k in by_name["sft"] if k in by_name["dpo"] and not k[0].endswith(LOSS_MAPS)]
    return [(by_name["sft"][k], by_name["dpo"][k]) for k in tasks]


def _apart(metadata: EncoderMetadata) -> str | None:
    """What the intervals of SFT and DPO show, in a sentence."""
    pair = _pair(metadata)
    if not pair:
        return None
    better: dict[str, list[str]] = {"DPO": [], "SFT": []}
    for sft, dpo in pair:
        if dpo.ci95[0] > sft.ci95[1]:
            better["DPO"].append(f"{dpo.task} ({dpo.metric})")
        elif sft.ci95[0] > dpo.ci95[1]:
            better["SFT"].append(f"{sft.task} ({sft.metric})")
    said = [f"{name} is higher on {', '.join(tasks)}" for name, tasks in better.items() if tasks]
    if not said:
        return f"On all {len(pair)} measures the intervals of SFT and DPO overlap: no difference is shown."
    rest = len(pair) - sum(map(len, better.values()))
    return f"Of {len(pair)} measures, {'; '.join(said)}; on {rest} the intervals overlap."


def _draw(pair: list[tuple[ProbeResult, ProbeResult]]) -> bytes:
    from pivot_hub.publish.card_figure import draw_intervals

    rows = [
        (f"{sft.task.partition('/')[2]}\n{sft.metric}", {"SFT": (sft.value, *sft.ci95), "DPO": (dpo.value, *dpo.ci95)})
        for sft, dpo in pair
    ]
    picture = io.BytesIO()
    draw_intervals(rows, picture, pair[0][0].unit)
    return picture.getvalue()


def _cell(result: ProbeResult) -> str:
    low, high = result.ci95
    digits = 1 if result.unit == "percent" else 3
    return f"{result.value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _shape(config: dict[str, Any]) -> dict[str, Any]:
    image_px, patch_px = required_fact(config, "config", "image_size"), required_fact(config, "config", "patch_size")
    return {
        "native": required_fact(config, "config", "architectures")[0],
        "image_px": image_px,
        "patch_px": patch_px,
        "tokens": (image_px // patch_px) ** 2,
        "width": required_fact(config, "config", "hidden_size"),
        "layers": required_fact(config, "config", "num_hidden_layers"),
        "feature_layer": required_fact(config, "config", "pivot.feature_layer"),
    }


def _exports(export: dict[str, Any] | None) -> list[dict[str, Any]]:
    files = {} if export is None else required_fact(export, "export", "files")
    return [
        {"name": name, "mb": metadata["bytes"] / 1e6, "error": max(metadata["relative_error"].values())}
        for name, metadata in files.items()
    ]


def _commands(metadata: EncoderMetadata, prose: Prose) -> list[str]:
    made: list[str] | None = metadata.provenance.get("commands") or prose.commands
    if not made:
        raise CardError("prose.commands is missing: its recipes are not all shipped ones; say what makes it again.")
    return made


def _sum(values: Sequence[float | None]) -> float | None:
    """A total, unknown where one part is."""
    return None if None in values else sum(v for v in values if v is not None)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(CARDS),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, of files that are ours
    )
    return environment.get_template("encoder.md.jinja")
