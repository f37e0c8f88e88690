"""The list of encoders: what is known of each, filters, the page on one, and which of them fits an MLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from typer.testing import CliRunner

from pivot_hub import list_encoders
from pivot_hub.cli import app
from pivot_hub.config.encoder_names import short_names
from pivot_hub.encoder import PivotVisionModel
from pivot_hub.errors import CheckpointError, RecipeError
from pivot_hub.registry.encoders import describe_encoder
from pivot_hub.registry.fit import fit_encoders


def test_every_short_name_is_listed_with_its_status() -> None:
    entries = {entry.name: entry for entry in list_encoders()}
    assert sorted(entries) == short_names()
    assert {name for name, entry in entries.items() if entry.status != "planned"} == {
        "shapes-base",
        "shapes-sft",
        "shapes-dpo",
    }
    for entry in entries.values():
        assert bool(entry.results) == (entry.status != "planned")
        assert (entry.folder is not None) == (entry.status == "shipped")


def test_numbers_are_those_of_the_encoder_itself() -> None:
    (entry,) = list_encoders("shapes-base")[:1]
    model = PivotVisionModel.from_pretrained("shapes-base")
    assert entry.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert entry.weights_mb(4) == 4 * entry.parameters / 1e6
    assert (entry.image_px, entry.dim, entry.layers) == (64, 96, 6)
    features = model(torch.zeros(1, 3, 64, 64)).last_hidden_state
    assert tuple(features.shape) == (1, entry.tokens, entry.dim)


def test_filters_take_parts_of_names_bases_and_patterns() -> None:
    assert [entry.name for entry in list_encoders("so400m")] == ["siglip-so400m", "siglip2-so400m"]
    assert [entry.name for entry in list_encoders("facebook/")] == ["dinov2-large", "mae-large"]
    assert [entry.name for entry in list_encoders("*-sft")] == ["shapes-sft"]
    assert list_encoders("nothing") == []


def test_speeds_are_listed_where_the_architecture_was_measured() -> None:
    measured = {entry.name: entry.speeds for entry in list_encoders() if entry.speeds}
    assert set(measured) == {"siglip-so400m"}
    (entry,) = list_encoders("siglip-so400m")
    assert {speed.form for speed in entry.speeds} >= {"native", "pivot", "bfloat16"}
    assert "2 CPU cores, random weights" in describe_encoder(entry)


def test_listing_imports_no_torch() -> None:
    code = "import sys, pivot_hub; pivot_hub.list_encoders(); print([m for m in ('torch', 'trl') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_command_lists_describes_and_writes(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["list", "--json", str(tmp_path / "all.json")])
    assert listed.exit_code == 0, listed.output
    assert all(name in listed.output for name in short_names())
    rows = json.loads((tmp_path / "all.json").read_text())
    assert {row["name"]: row["status"] for row in rows}["siglip2-so400m"] == "planned"
    assert all(row["weights_float32_mb"] == pytest.approx(4 * row["parameters"] / 1e6, abs=0.1) for row in rows)
    page = CliRunner().invoke(app, ["list", "siglip2-so400m"]).output
    assert "planned, not trained yet" in page
    assert "pivot train siglip2-so400m/3-dpo --parents" in page
    assert "an estimate" in page
    with pytest.raises(RecipeError, match="no encoder's name or base contains"):
        CliRunner().invoke(app, ["list", "nothing"], catch_exceptions=False)


def test_the_same_tower_is_a_drop_in_and_another_needs_a_projector() -> None:
    fit = fit_encoders("llava-hf/llava-onevision-qwen2-7b-ov-hf")  # its tower has 26 of SigLIP's 27 blocks
    fits = {each.encoder: each for each in fit.encoders}
    assert (fit.encoders[0].encoder, fit.encoders[0].verdict) == ("siglip-so400m", "drop-in")
    assert [each.encoder for each in fit.encoders if each.verdict == "drop-in"] == ["siglip-so400m"]
    assert fits["siglip2-so400m"].differences == ("patches of 16 px instead of 14",)
    assert "1024 channels instead of 1152" in fits["clip-large-336"].differences
    assert "images of 384 px instead of 896" in {
        difference for each in fit_encoders("google/gemma-3-4b-it").encoders for difference in each.differences
    }


def test_a_drop_in_loads_into_the_tower_of_the_mllm(tmp_path: Path) -> None:
    encoder = PivotVisionModel.from_pretrained("shapes-base")
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "llava",
        vision_config=encoder.config.backbone_config.to_dict(),
        text_config={"model_type": "qwen2", **text, "num_key_value_heads": 2, "vocab_size": 99},
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
    )
    config.save_pretrained(tmp_path)
    fits = {each.encoder: each.verdict for each in fit_encoders(str(tmp_path)).encoders}
    assert {name for name, verdict in fits.items() if verdict == "drop-in"} == {
        "shapes-base",
        "shapes-sft",
        "shapes-dpo",
    }
    tower = AutoModelForImageTextToText.from_config(config).model.vision_tower
    tower.load_state_dict(encoder.backbone.state_dict())


def test_towers_of_native_resolution_take_no_encoder_of_squares() -> None:
    fit = fit_encoders("Qwen/Qwen2.5-VL-3B-Instruct")
    assert {each.verdict for each in fit.encoders} == {"no"}
    output = CliRunner().invoke(app, ["list", "--for", "Qwen/Qwen2.5-VL-3B-Instruct"]).output
    assert "pivot extract Qwen/Qwen2.5-VL-3B-Instruct" in output
    with pytest.raises(CheckpointError):
        fit_encoders("nobody/nothing")
