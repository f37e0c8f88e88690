"""A small random encoder with all metadata that a card needs; its results are invented for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from pivot_hub.encoder.repository import read_encoder, write_repository
from pivot_hub.files import write_whole
from pivot_hub.probes.result import ProbeResult, results_text
from pivot_hub.provenance import machine, versions, write_manifest
from pivot_hub.publish.card_inputs import Prose, read_metadata
from tests.encoder.originals import make_vision

PROSE: dict[str, Any] = {
    "repository": "pivot/tiny-dpo",
    "version": "0.1.0",
    "recipe": "tiny/3-dpo",
    "about": "A random encoder.",
    "license": "apache-2.0",
    "names": {"base/vision": "pivot/tiny-base", "base/language": "a random language model"},
    "data": {"shapes": {"licence": "Apache-2.0"}},
    "benchmarks": {"shapes": "pivot/shapes"},
    "pair": {"sft": "pivot/tiny-sft", "dpo": "pivot/tiny-dpo"},
    "limits": ["It is random."],
}


def make_prose(**changes: Any) -> Prose:
    return Prose.model_validate({**PROSE, **changes})


def make_publishable(folder: Path, seed: int = 0) -> Path:
    """An encoder repository with recipe, provenance and results of base, sft and dpo; it has no card yet."""
    torch.manual_seed(seed)
    original = make_vision(folder.with_name(f"{folder.name}-original"))
    model, _ = read_encoder(original)
    with torch.no_grad():
        model.backbone.get_parameter(next(n for n, p in model.backbone.named_parameters() if p.dim() > 1)).add_(seed)
    model.config.pivot.update(
        stage="dpo", base_model="base/vision", language_head="base/language", recipe_sha256="0" * 64
    )
    recipe = folder.with_name(f"{folder.name}-recipe.yaml")
    recipe.write_text(yaml.safe_dump({"stage": "dpo"}))
    data = [{"format": "shapes", "rows": 8}]
    cost = {"duration_s": 36.0, "processes": 1, "energy_kwh": None}
    step: dict[str, Any] = {"stage": "dpo", "recipe": "tiny/3-dpo", "data": data, "cost": cost, "parent": None}
    step |= {"machine": machine(), "weights_sha256": "1" * 64, "commit": None, "versions": versions()}
    metadata = {"mllm": step, "commands": ["pivot train tiny/3-dpo"]}
    write_repository(folder, model, metadata, files={"recipe.yaml": recipe})
    own = read_metadata(folder).encoder_sha256
    for number, (name, sha) in enumerate({"base": "b" * 64, "sft": "c" * 64, "dpo": own}.items()):
        write_whole(folder / "results" / f"{name}.json", results_text(make_results(name, sha, 50.0 + 10 * number)))
    write_manifest(folder, metadata)
    return folder


def make_results(encoder: str, sha: str, value: float) -> list[ProbeResult]:
    conditions: dict[str, Any] = {"unit": "percent", "n": 100, "split": "test", "seed": 0, "protocol": "invented"}
    conditions |= {"feature_layer": -2, "encoder": encoder, "encoder_sha256": sha, "duration_s": 1.0}
    alone, answers = (value - 2.5, value + 2.5), (value - 22, value - 18)
    return [
        ProbeResult("shapes/colour", "balanced_accuracy", value, partner=None, ci95=alone, **conditions),
        ProbeResult("shapes/vqa/all", "exact_match", value - 20, partner="tiny", ci95=answers, **conditions),
    ]
