"""The folder for timm, as far as it can be checked without timm; `make conformance` runs all adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pivot_hub.encoder.adapters.timm_folder import write_timm
from pivot_hub.errors import ExportError, OutputError
from tests.encoder.originals import make_vision


def test_a_timm_folder_ends_at_the_feature_layer(tmp_path: Path) -> None:
    source = make_vision(tmp_path / "clip", "clip")
    folder = write_timm(source, tmp_path / "timm")
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    assert (config["model_args"]["depth"], config["model_args"]["final_norm"]) == (2, False)
    assert int(32 * config["model_args"]["mlp_ratio"]) == 64
    assert {key.split(".")[1] for key in weights if key.startswith("blocks.")} == {"0", "1"}
    assert not any(key.startswith("norm.") for key in weights)
    native = {k.removeprefix("vision_model."): v for k, v in load_file(source / "model.safetensors").items()}
    joined = [native[f"encoder.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(weights["blocks.1.attn.qkv.weight"], torch.cat(joined))
    write_timm(source, folder, feature_layer="last_hidden_state")  # replaces the earlier one
    assert json.loads((folder / "config.json").read_text())["model_args"]["depth"] == 3


def test_what_timm_cannot_compute_is_refused_and_other_files_are_kept(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="dinov3_vit"):
        write_timm(make_vision(tmp_path / "dinov3", "dinov3"), tmp_path / "timm")
    assert not (tmp_path / "timm").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(OutputError):
        write_timm("shapes-base", tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
