"""The towers of MLLMs, loaded by every loading path, and timm's own architectures on the same weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pivot_hub import PivotVisionModel, extract_encoder
from pivot_hub.encoder.configuration_pivot import BACKBONES
from pivot_hub.encoder.golden import FEATURES
from pivot_hub.encoder.modeling_pivot import select_features
from pivot_hub.encoder.native_resolution import LAYOUTS
from pivot_hub.mllm.families import FAMILIES
from tests.conformance.environment import ROOT, make_environment, run
from tests.conformance.table import PAGE, replace_table
from tests.conformance.test_loading_paths import TRANSFORMERS, WITH_PACKAGE
from tests.conformance.towers_table import RESULTS, render_towers
from tests.mllm.tiny_mllms import TINY, make_mllm

SCRIPT = Path(__file__).with_name("tower_paths.py")
SOFTWARE = (*TRANSFORMERS,)  # see the fixture `record`
# What transformers itself does otherwise in a release; the encoder's features there are those of its MLLM there.
OWN_POSITIONS = {("4.57.6", "idefics3"), ("4.57.6", "smolvlm")}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the encoder of every family, and beside each the native class's arguments and features."""
    work, folder = tmp_path_factory.mktemp("mllms"), tmp_path_factory.mktemp("towers")
    for name in TINY:
        target = folder / name.replace(" ", "-")
        make_mllm(work / target.name, name)
        encoder: Any = PivotVisionModel.from_pretrained(extract_encoder(work / target.name, target))
        golden = load_file(target / "golden.safetensors")
        arguments = {"pixel_values": golden["pixel_values"]}
        if encoder.config.image_size is None:
            layout = LAYOUTS[str(BACKBONES[encoder.config.backbone_config.model_type].layout)]
            arguments |= {a: golden[n] for n, a in zip(layout.inputs, layout.arguments, strict=True)}
        assert {k for k in golden if k not in FEATURES}
        named = {k: v for k, v in arguments.items() if k != "pixel_values"}
        with torch.no_grad():
            outputs = encoder.backbone(arguments["pixel_values"], output_hidden_states=True, **named)
        features = select_features(outputs, encoder.config.pivot["feature_layer"])
        stored = {f"argument.{k}": v.clone() for k, v in arguments.items()}
        save_file({"features": features.contiguous().clone(), **stored}, target.with_suffix(".safetensors"))
    return folder


@pytest.mark.conformance
@pytest.mark.parametrize("environment", TRANSFORMERS)
def test_every_tower_loads_where_transformers_has_its_class(
    environment: str, towers: Path, record: dict[str, Any], tmp_path: Path
) -> None:
    python = make_environment(environment, *TRANSFORMERS[environment])
    package = ["--package"] if environment in WITH_PACKAGE else []
    run(python, SCRIPT, towers, tmp_path / "towers.json", *package, path=str(ROOT) if package else "")
    report = json.loads((tmp_path / "towers.json").read_text())
    version = report["versions"]["transformers"]
    record[environment] = report
    assert set(report["results"]) == {name.replace(" ", "-") for name in TINY}
    for name in TINY:
        outcomes, family = report["results"][name.replace(" ", "-")], FAMILIES[TINY[name].model_type]
        if (version, name) in OWN_POSITIONS:
            assert outcomes["native"]["difference"] < 0.2
            for outcome in outcomes.values():
                outcome["reason"] = "transformers computes other positions"
            continue
        if family.native_from is not None and _number(version) >= _number(family.native_from):
            assert outcomes["native"].get("difference", 1) < 1e-5, (name, outcomes)
        else:
            assert "custom code" in outcomes["native"]["error"], (name, outcomes)
        for loading_path in outcomes.keys() - {"native"}:
            outcome = outcomes[loading_path]
            known = "has no class for" not in outcome.get("error", "")
            assert not known or outcome["difference"] < 1e-5, (name, outcomes)
            assert known or _number(version) < (5, 17)
    (tmp_path / "towers.json").unlink()


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


@pytest.mark.conformance
def test_timms_own_architectures_give_the_same_features(towers: Path, overlay: Path, tmp_path: Path) -> None:
    run(
        Path(sys.executable), "-m", "tests.conformance.timm_towers", towers, tmp_path / "timm.json",
        path=f"{overlay}:{ROOT}",
    )  # fmt: skip
    results = json.loads((tmp_path / "timm.json").read_text())
    assert set(results) == {"qwen3_vl", "qwen3_5", "gemma4"}
    for name, outcome in results.items():
        assert outcome["difference"] < 1e-5 * outcome["scale"], name


def test_the_pages_table_of_families_is_that_of_the_results() -> None:
    page = PAGE.read_text()
    assert replace_table(page, *render_towers(json.loads(RESULTS.read_text()))) == page
