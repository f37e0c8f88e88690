"""The tables of `results/` and the README's table of encoders, from cards, recipes, configs and recorded benchmarks.

`python -m pivot_hub.registry.tables` writes those that changed, in a source checkout.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, cast

import torch

from pivot_hub.config.encoder_names import RECIPES, base_encoder, shipped_encoder, short_names
from pivot_hub.config.recipe import load_recipe
from pivot_hub.encoder import PivotVisionConfig, PivotVisionModel
from pivot_hub.errors import CardError
from pivot_hub.files import PACKAGE, write_whole
from pivot_hub.mllm.published_configs import part_config
from pivot_hub.planner.fake_step import profile_forward
from pivot_hub.publish.card_collection import TRAINED, recorded_metadata
from pivot_hub.publish.card_inputs import Prose, read_prose
from pivot_hub.publish.card_metadata import hub_name, language_model_name
from pivot_hub.registry.encoders import (
    BENCHMARKS,
    ENCODERS,
    MEASUREMENTS,
    RESULTS,
    EncoderEntry,
    EncoderResult,
    EncoderShape,
    EncoderSpeed,
    Status,
    list_encoders,
)

BEGIN, END = "<!-- encoders: python -m pivot_hub.registry.tables -->", "<!-- end of encoders -->"


def render_tables() -> dict[str, str]:
    """Render every table of `results/` by the name of its file."""
    names = [*TRAINED, *(name for name in short_names() if name not in TRAINED)]
    return {ENCODERS: _csv([encoder_shape(name) for name in names])} | render_measured()


def render_measured() -> dict[str, str]:
    """Render the tables of results and of speeds by the name of their files."""
    tables: dict[str, list[Any]] = {}
    for result in [result for name in TRAINED for result in _results(name)]:
        tables.setdefault(MEASUREMENTS.replace("*", result.task.partition("/")[0]), []).append(result)
    for device, speed in _speeds():
        tables.setdefault(BENCHMARKS.replace("*", device), []).append(speed)
    return {name: _csv(rows) for name, rows in tables.items()}


def write_tables() -> list[str]:
    """Write the tables of `results/` that changed.

    Returns:
        Names of the files that changed.

    Raises:
        CardError: There is no source checkout.
    """
    if RESULTS.parent == PACKAGE:
        raise CardError("tables are written to results/ of a source checkout: clone the repository, and run it there.")
    changed = []
    for name, text in render_tables().items():
        if not (RESULTS / name).is_file() or (RESULTS / name).read_text() != text:
            write_whole(RESULTS / name, text)
            changed.append(name)
    return changed


def encoder_table(entries: Sequence[EncoderEntry] | None = None) -> str:
    """Render the README's table of encoders as Markdown, between the markers BEGIN and END there.

    Args:
        entries: Encoders of the table; all by default.
    """
    lines = [
        "| encoder | status | base | image, patch (px) | dim x layers | parameters | GMACs | licence |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in list_encoders() if entries is None else entries:
        licence = "other" if entry.licence.startswith("other") else entry.licence
        lines.append(
            f"| [{entry.name}](model_cards/{entry.name}.md) | {entry.status} | {entry.base or 'none'} | "
            f"{entry.image_px}, {entry.patch_px} | {entry.dim} x {entry.layers} | {entry.parameters / 1e6:,.1f} M | "
            f"{entry.gmacs:,.2f} | {licence} |"
        )
    return "\n".join(lines)


def encoder_shape(name: str) -> EncoderShape:
    """Read an encoder's metadata from its card and its recipe, and count the cost of its config without weights."""
    prose = read_prose(name)
    if name in TRAINED:
        metadata = recorded_metadata(name)
        native = {key: value for key, value in metadata.config.items() if key not in ("auto_map", "pivot")}
        pivot = metadata.config["pivot"]
        config: Any = PivotVisionConfig(native, pivot)
        base, language = hub_name(pivot.get("base_model"), prose), hub_name(language_model_name(metadata), prose)
        stage = pivot["stage"]
    else:
        recipe = load_recipe(str(prose.recipe))
        parts = recipe.parts(f"the encoder {name}")
        config = PivotVisionConfig(part_config(base_encoder(name)), {"feature_layer": parts.feature_layer})
        base, language, stage = hub_name(parts.vision, prose), hub_name(parts.language, prose), recipe.recipe.stage
    with torch.device("meta"):
        model = cast(torch.nn.Module, PivotVisionModel(config))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    side, patch = config.image_size, config.patch_size
    flops, activation_bytes = profile_forward(model, (1, 3, side, side))
    return EncoderShape(
        name=name,
        status=_status(name),
        stage=stage,
        base=_short(base or ""),
        language_model=language or "",
        architecture=config.backbone_config.model_type,
        image_px=side,
        patch_px=patch,
        tokens=(side // patch) ** 2,
        dim=config.hidden_size,
        layers=config.num_hidden_layers,
        feature_layer=str(config.pivot["feature_layer"]),
        parameters=parameters,
        gmacs=float(f"{flops / 2e9:.4g}"),
        activation_mb=round(activation_bytes / 1e6, 1),
        licence=_licence(prose),
        recipe=str(prose.recipe),
    )


def _status(name: str) -> Status:
    if shipped_encoder(name) is not None:
        return "shipped"
    return "trained" if name in TRAINED else "planned"


def _short(repository: str) -> str:
    """Return the short name of a repository of this package's table, and any other name as it is."""
    short = repository.rpartition("/")[2]
    return short if short in short_names() and read_prose(short).repository == repository else repository


def _licence(prose: Prose) -> str:
    return f"{prose.license} ({prose.license_name})" if prose.license_name else prose.license


def _results(name: str) -> list[EncoderResult]:
    """List the recorded results of an encoder's weights, those of the native class's own output too."""
    metadata = recorded_metadata(name)
    own = metadata.own_results()
    own += [r for r in metadata.results if metadata.is_other_output(r) and r.encoder_sha256 == own[0].encoder_sha256]
    return [
        EncoderResult(
            encoder=name,
            task=result.task,
            metric=result.metric,
            value=round(result.value, 2),
            ci95_low=round(result.ci95[0], 2),
            ci95_high=round(result.ci95[1], 2),
            unit=result.unit,
            n=result.n,
            split=result.split,
            seed=result.seed,
            feature_layer=str(result.feature_layer),
            partner=result.partner or "",
            protocol=result.protocol,
            encoder_sha256=result.encoder_sha256,
        )
        for result in own
    ]


def _speeds() -> list[tuple[str, EncoderSpeed]]:
    """List the recorded speeds of encoders in each form, each with `cpu` or the name of its GPU."""
    speeds = []
    for file in sorted((RECIPES / "bench").glob("*.json")):
        record = json.loads(file.read_text())
        if record.get("benchmark") != "encoder":
            continue
        gpu = record["machine"]["gpu"]
        device = "-".join(gpu.lower().split()) if gpu else "cpu"
        for form, measured in record["forms"].items():
            speed = EncoderSpeed(
                encoder=record["encoder"],
                weights=record["weights"],
                form=form,
                image_px=record["image_px"],
                batch=record["batch"],
                images_per_s=measured["images_per_s"],
                ratio_to_native=measured["ratio_to_native"],
                peak_memory_mb=measured["peak_memory_mb"],
                rounds=record["rounds"],
                device=gpu or f"{record['machine']['cpu_cores']} CPU cores",
                torch=record["versions"]["torch"],
                transformers=record["versions"]["transformers"],
                record=file.name,
            )
            speeds.append((device, speed))
    return speeds


def _csv(rows: Sequence[Any]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(rows[0])], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def write_readme_table() -> bool:
    """Write the table of encoders into the README, if it has the markers, and return whether it changed."""
    readme = RESULTS.parent / "README.md"
    text = readme.read_text()
    if BEGIN not in text:
        return False
    before, rest = text.split(BEGIN)
    changed = f"{before}{BEGIN}\n{encoder_table()}\n{END}{rest.split(END)[1]}"
    if changed != text:
        write_whole(readme, changed)
    return changed != text


if __name__ == "__main__":
    print(f"tables changed: {', '.join(write_tables() + ['README.md'] * write_readme_table()) or 'none'}")
