"""The plan of encoding: FLOPs by hand, time and cost from them, bytes as they are stored, and bad values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pivot_hub.cli import app
from pivot_hub.config.recipe import RECIPES
from pivot_hub.errors import CheckpointError, DataError
from pivot_hub.planner.encoding import plan_encoding
from pivot_hub.planner.gpus import GPUS

SO400M = "google/siglip2-so400m-patch16-384"


def test_flops_are_those_of_a_vision_transformer() -> None:
    """Products of weights and of attention, counted by hand; the pooling head adds about three percent."""
    tokens, width, hidden, layers, patch = 576, 1152, 4304, 27, 16
    block = 2 * tokens * (4 * width**2 + 2 * width * hidden) + 4 * tokens**2 * width
    by_hand = layers * block + 2 * tokens * 3 * patch**2 * width
    plan = plan_encoding(SO400M, 1e6)
    assert by_hand <= plan.flops_per_image < 1.05 * by_hand
    assert plan.parameters == pytest.approx(428e6, rel=0.01)


def test_time_cost_and_bytes_follow_from_them() -> None:
    plan = plan_encoding(SO400M, 1e6, processes=8, hfu=0.5, decode_ms=10, usd_per_hour=2)
    for estimate, gpu in zip(plan.gpus, GPUS, strict=True):
        assert estimate.images_per_s == pytest.approx(0.5 * gpu.half_flops / plan.flops_per_image)
        assert estimate.gpu_hours == pytest.approx(1e6 / estimate.images_per_s / 3600)
        assert estimate.wall_hours == pytest.approx(estimate.gpu_hours / 8)
        assert estimate.usd == pytest.approx(2 * estimate.gpu_hours)
        assert estimate.cores - 1 < estimate.images_per_s / 100 <= estimate.cores
    assert (plan.shape, plan.bytes_per_image, plan.bytes_written) == ((1152,), 2304, 2304_000_000)
    of_tokens = plan_encoding(SO400M, 10, tokens=True, store="int8", dtype="float32")
    assert of_tokens.shape == (576, 1152)
    assert of_tokens.bytes_per_image == 576 * 1152 + 4  # one scale an image
    assert of_tokens.gpus[0].images_per_s < plan.gpus[0].images_per_s / 8


def test_bad_values_are_refused() -> None:
    for options, message in (
        ({"images": 0}, "images 0: give a number above 0"),
        ({"images": 1.5}, "give a whole number"),
        ({"images": float("nan")}, "give a number above 0"),
        ({"hfu": 1.5}, "give a share from 0 to 1"),
        ({"dtype": "int8"}, "give one of float32, float16, bfloat16"),
        ({"store": "int4"}, "give one of float32"),
        ({"usd_per_hour": -1}, "price -1"),
    ):
        with pytest.raises(DataError, match=message):
            plan_encoding(SO400M, **{"images": 10, **options})  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="config"):
        plan_encoding("nobody/nothing", 10)


def test_command_prints_the_plan_and_writes_it(tmp_path: Path) -> None:
    encoder = str(RECIPES / "shapes" / "base" / "vision")
    result = CliRunner().invoke(app, ["plan-encode", encoder, "--images", "1e6", "--json", str(tmp_path / "plan.json")])
    assert result.exit_code == 0, result.output
    assert "1,000,000 images on 1 GPU(s) in bfloat16" in result.output
    assert "USD" not in result.output
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["bytes_written"] == 1_000_000 * 96 * 2
    assert [gpu["gpu"] for gpu in plan["gpus"]] == [gpu.name for gpu in GPUS]
