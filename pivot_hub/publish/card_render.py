"""Render model cards from metadata and prose; a missing value raises an error."""

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
    LOSS_MAPS,
    EncoderMetadata,
    Prose,
    data_sources,
    required_value,
    stage_chain,
)
from pivot_hub.publish.card_metadata import card_metadata, hub_name, language_model_name
from pivot_hub.publish.card_tables import card_template, result_tables
from pivot_hub.publish.eval_results import eval_files
from pivot_hub.publish.extracted_card import render_extracted

FIGURE = "sft-against-dpo.png"
NOT_TRAINED = "**Not trained yet: there are no weights and no results, only the plan.**"
# Errors of code that expects a number or a list where an edited file holds something else.
WRONG_TYPE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, jinja2.TemplateError)
Comparison = list[tuple[ProbeResult, ProbeResult]]


def render_card(metadata: EncoderMetadata, prose: Prose, repository: str | None = None) -> ModelCard:
    """Render the card of a trained encoder.

    Args:
        metadata: Metadata of the encoder repository.
        prose: Prose of the card.
        repository: Name on the Hub, where it differs from the prose's.

    Raises:
        CardError: A required value is missing; the message names it.
    """
    name = repository or prose.repository
    if metadata.is_extracted:
        return render_extracted(metadata, prose, name)
    chain = stage_chain(metadata.provenance)
    stages = [_stage_row(step, prose, metadata) for step in chain]
    header = card_metadata(metadata, prose, name, chain)
    language_model = hub_name(language_model_name(metadata), prose)
    comparison = _compared_results(metadata)
    text = card_template("encoder.md.jinja").render(
        trained=True,
        name=name,
        prose=prose,
        stage=required_value(metadata.config, "config", "pivot.stage"),
        base_model=header.base_model,
        language_model=language_model,
        shape=_shape(metadata.config),
        tables=result_tables(metadata),
        native_output=any(
            metadata.is_other_output(r) and r.encoder_sha256 == metadata.encoder_sha256 for r in metadata.results
        ),
        comparison=_describe_comparison(comparison),
        figure=FIGURE if comparison else None,
        results=metadata.own_results(),
        lineage=_lineage_tree(stages, name, header.get("base_model"), language_model, prose),
        sources=data_sources([required_value(step, "provenance", "data") for step in chain], prose),
        stages=stages,
        gpu_hours=_total([s["gpu_hours"] for s in stages]),
        energy_kwh=_total([s["energy_kwh"] for s in stages]),
        commands=_commands(metadata, prose),
        commit=required_value(chain[-1], "provenance", "commit", may_be_none=True),
        versions=required_value(chain[-1], "provenance", "versions"),
        exports=_export_rows(metadata.export),
    )
    return ModelCard(f"---\n{header.to_yaml()}\n---\n{text}")


def render_plan(prose: Prose) -> str:
    """Render the page of an encoder that is not trained yet, from prose and recipe; its first line says so.

    Args:
        prose: Prose of the card.

    Raises:
        CardError: A required value is missing; the message names it.
    """
    if prose.recipe is None:
        raise CardError(f"prose.recipe of {prose.repository} is missing: name the recipe that will train the encoder.")
    loaded = load_recipe(prose.recipe)
    parts = loaded.parts("the card of an encoder that is not trained yet")
    return f"{NOT_TRAINED}\n" + card_template("encoder.md.jinja").render(
        trained=False,
        name=prose.repository,
        prose=prose,
        stage=loaded.recipe.stage,
        base_model=hub_name(parts.vision, prose),
        language_model=hub_name(parts.language, prose),
        plan=[_plan_row(step) for step in loaded.lineage()],
        sources=data_sources([[d.model_dump(mode="json") for d in s.recipe.data] for s in loaded.lineage()], prose),
        commands=prose.commands or [f"pivot train {prose.recipe} --parents"],
    )


def card_files(metadata: EncoderMetadata, prose: Prose, repository: str | None = None) -> dict[str, bytes]:
    """Render all files of a card: README.md, its figure and `.eval_results/*.yaml`.

    Args:
        metadata: Metadata of the encoder repository.
        prose: Prose of the card.
        repository: Name on the Hub, where it differs from the prose's.

    Returns:
        Content of each file by its name.

    Raises:
        CardError: A required value is missing, and the message names it; or a value has another type.
    """
    try:
        files = {"README.md": str(render_card(metadata, prose, repository)).encode()}
        if comparison := _compared_results(metadata):
            files[FIGURE] = _draw_comparison(comparison)
        evaluations = eval_files(metadata.own_results(), prose.benchmarks)
        return files | {name: text.encode() for name, text in evaluations.items()}
    except WRONG_TYPE as error:
        raise CardError(
            "config.json, provenance.json, report.json, export.json or a result holds a value of another type "
            f"({type(error).__name__}: {' '.join(str(error).split())}); extract or pull the repository again."
        ) from error


def _stage_row(step: dict[str, Any], prose: Prose, metadata: EncoderMetadata) -> dict[str, Any]:
    """A stage of the lineage with its cost; a cost that was not measured is None."""
    where = f"provenance of {required_value(step, 'provenance', 'recipe')}"
    machine = required_value(step, where, "machine")
    cost = step.get("cost")
    if cost is None and metadata.report is not None and metadata.report.get("recipe") == step["recipe"]:
        cost = {"duration_s": metadata.report["duration_s"], "processes": 1, "energy_kwh": None}
    if cost is None:
        raise CardError(f"{where}: cost is missing: train it with this version, which records it.")
    duration, processes = cost["duration_s"], cost["processes"]
    gpu = required_value(machine, where, "gpu", may_be_none=True)
    hours = None if duration is None else duration / 3600
    gpu_hours = None if hours is None else hours * processes
    return {
        "recipe": step["recipe"],
        "stage": required_value(step, where, "stage"),
        "data": "; ".join(_describe_amount(source) for source in required_value(step, where, "data")),
        "hours": hours,
        "on": f"{processes} x {gpu}" if gpu else f"{machine['cpu_cores']} CPU cores ({machine['processor']})",
        "gpu_hours": gpu_hours if gpu else 0.0,
        "energy_kwh": cost["energy_kwh"],
        "weights": required_value(step, where, "weights_sha256")[:12],
    }


def _plan_row(step: LoadedRecipe) -> dict[str, Any]:
    """A stage that is still to be trained."""
    counts = []
    for source in step.recipe.data:
        if isinstance(source, ShapesData):
            count: int | None = source.rows
        else:
            count = source.sample or (source.expect.rows if source.expect else None)
        counts.append("unknown" if count is None else f"{count:,}")
    return {
        "recipe": step.name,
        "stage": step.recipe.stage,
        "trains": ", ".join(step.recipe.learning_rate.trained()),
        "rows": " + ".join(counts),
    }


def _describe_amount(source: dict[str, Any]) -> str:
    name = "shapes" if source["format"] == "shapes" else source["path"]
    count = source.get("sample") or source.get("rows")
    return f"{count:,} rows of {name}" if count else name


def _lineage_tree(
    stages: list[dict[str, Any]], name: str, base: str | None, language_model: str | None, prose: Prose
) -> str:
    """The stages as a text tree, for a code block, which every Markdown viewer renders."""
    width = max(len(s["recipe"]) + 3 * (i + bool(base)) for i, s in enumerate(stages))
    lines = [f"{base} + {language_model}"] if base else []
    for depth, stage in enumerate(stages, start=len(lines)):
        indent = ("   " * (depth - 1) + "└─ ") if depth else ""
        lines.append(f"{indent + stage['recipe']:{width}}  {stage['stage']:8}  {stage['data']}")
    lines[-1] += f"  -> {name}"
    last_stage = stages[-1]["stage"]
    for branch, other in prose.pair.items():
        if branch != last_stage and last_stage in prose.pair:
            lines.append(f"{'':{width}}  compared with {other} ({branch.upper()})")
    return "\n".join(lines)


def _compared_results(metadata: EncoderMetadata) -> Comparison:
    """SFT's and DPO's results on the same task, in order; empty for an encoder that is neither.

    Raises:
        CardError: The results of one of the two encoders are missing.
    """
    if required_value(metadata.config, "config", "pivot.stage") not in ("sft", "dpo"):
        return []
    at_layer = [r for r in metadata.results if not metadata.is_other_output(r)]
    by_name = {name: {(r.task, r.metric): r for r in at_layer if r.encoder == name} for name in ("sft", "dpo")}
    for name, measures in by_name.items():
        if not measures:
            raise CardError(
                f"results of the {name} encoder are missing: the card compares SFT with DPO; put them in with "
                f"`pivot card ENCODER --results {name}.json`."
            )
    shared = [k for k in by_name["sft"] if k in by_name["dpo"] and not k[0].endswith(LOSS_MAPS)]
    return [(by_name["sft"][k], by_name["dpo"][k]) for k in shared]


def _describe_comparison(comparison: Comparison) -> str | None:
    """What the intervals of SFT and DPO show, in one sentence."""
    if not comparison:
        return None
    better: dict[str, list[str]] = {"DPO": [], "SFT": []}
    for sft, dpo in comparison:
        if dpo.ci95[0] > sft.ci95[1]:
            better["DPO"].append(f"{dpo.task} ({dpo.metric})")
        elif sft.ci95[0] > dpo.ci95[1]:
            better["SFT"].append(f"{sft.task} ({sft.metric})")
    differences = [f"{name} is higher on {', '.join(tasks)}" for name, tasks in better.items() if tasks]
    if not differences:
        return f"On all {len(comparison)} measures the intervals of SFT and DPO overlap: no difference is shown."
    rest = len(comparison) - sum(map(len, better.values()))
    return f"Of {len(comparison)} measures, {'; '.join(differences)}; on {rest} the intervals overlap."


def _draw_comparison(comparison: Comparison) -> bytes:
    from pivot_hub.publish.card_figure import draw_intervals

    rows = [
        (f"{sft.task.partition('/')[2]}\n{sft.metric}", {"SFT": (sft.value, *sft.ci95), "DPO": (dpo.value, *dpo.ci95)})
        for sft, dpo in comparison
    ]
    png = io.BytesIO()
    draw_intervals(rows, png, comparison[0][0].unit)
    return png.getvalue()


def _shape(config: dict[str, Any]) -> dict[str, Any]:
    image_px, patch_px = required_value(config, "config", "image_size"), required_value(config, "config", "patch_size")
    return {
        "native": required_value(config, "config", "architectures")[0],
        "image_px": image_px,
        "patch_px": patch_px,
        "tokens": (image_px // patch_px) ** 2,
        "width": required_value(config, "config", "hidden_size"),
        "layers": required_value(config, "config", "num_hidden_layers"),
        "feature_layer": required_value(config, "config", "pivot.feature_layer"),
    }


def _export_rows(export: dict[str, Any] | None) -> list[dict[str, Any]]:
    files = {} if export is None else required_value(export, "export", "files")
    return [
        {"name": name, "mb": entry["bytes"] / 1e6, "error": max(entry["relative_error"].values())}
        for name, entry in files.items()
    ]


def _commands(metadata: EncoderMetadata, prose: Prose) -> list[str]:
    commands: list[str] | None = metadata.provenance.get("commands") or prose.commands
    if not commands:
        raise CardError("prose.commands is missing: not all recipes are shipped ones; give commands that reproduce it.")
    return commands


def _total(values: Sequence[float | None]) -> float | None:
    """The sum; None where one of the values is unknown."""
    return None if None in values else sum(v for v in values if v is not None)
