"""Benchmarks: every form and variant is run, and a record says under what conditions."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pivot_hub.bench import dpo_step, encoder
from pivot_hub.bench.dpo_step import Size, bench_dpo_step
from pivot_hub.bench.encoder import FORMS, bench_encoder
from pivot_hub.bench.loader import bench_loader
from pivot_hub.bench.space import bench_space
from pivot_hub.bench.train_step import bench_train_step
from pivot_hub.config.recipe import load_recipe
from pivot_hub.errors import ProbeError
from pivot_hub.training.dpo import SPEED_OPTIONS


@pytest.mark.slow
def test_every_form_is_timed_against_native(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_peak_memory", lambda form, *rest: len(form))  # seven processes: see the next test
    lines: list[str] = []
    report = bench_encoder(str(parts / "vision"), batch=2, rounds=2, log=lines.append)
    assert tuple(report["forms"]) == FORMS
    assert len(lines) == len(FORMS)
    assert report["forms"]["native"]["ratio_to_native"] == 1
    for form in report["forms"].values():
        assert form["images_per_s"] == pytest.approx(2 / form["seconds_per_batch"], rel=0.05)
        assert len(form["ratios"]) == 2
    assert (report["image_px"], report["batch"], report["weights"]) == (32, 2, "the repository's")


def test_memory_is_that_of_a_process_of_its_own(parts: Path) -> None:
    ballast = bytearray(1_500_000_000)  # what this process holds must not be counted
    ballast[::4096] = b"x" * len(ballast[::4096])
    report = bench_encoder(str(parts / "vision"), batch=1, rounds=1, forms=("native",), log=lambda line: None)
    assert 100 < report["forms"]["native"]["peak_memory_mb"] < 1400


def test_an_unknown_form_is_refused(parts: Path) -> None:
    with pytest.raises(ProbeError, match="there is no form 'tpu'; give some of native, pivot"):
        bench_encoder(str(parts / "vision"), forms=("tpu",))


def test_the_readmes_speeds_are_those_of_the_records() -> None:
    root = Path(__file__).parents[2]
    names = ("base-patch16-224", "so400m-patch14-384")
    records = [json.loads((root / "recipes" / "bench" / f"encoder-siglip-{name}.json").read_text()) for name in names]
    readme = (root / "README.md").read_text()
    keys = ("images_per_s", "ratio_to_native", "peak_memory_mb")
    for form in FORMS:
        row = [form, *(str(record["forms"][form][key]) for record in records for key in keys)]
        assert f"| {' | '.join(row)} |" in readme
    assert all(record["forms"]["pivot"]["ratio_to_native"] < 1.02 for record in records)


def test_the_readmes_cost_of_int8_is_that_of_the_record() -> None:
    root = Path(__file__).parents[2]
    record = json.loads((root / "recipes" / "bench" / "export-shapes-base.json").read_text())
    readme = (root / "README.md").read_text()
    for form, results in record["probe"].items():
        row = next(line for line in readme.splitlines() if line.startswith(f"| {form} | "))
        shown = [r for r in results if r["metric"] in ("balanced_accuracy", "accuracy", "mean_iou")]
        assert row.endswith(" | ".join(["", *(f"{r['value']:.1f}" for r in shown)]) + " |"), row


SMALL = Size((32, 3, 2, 64), 32, 8, (32, 2, 2, 1, 64), 60, 5, 8, 16)


def test_a_dpo_step_is_timed_in_every_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dpo_step.SIZES, "small", SMALL)
    report = bench_dpo_step("small", batch=3, rounds=2, log=lambda line: None)
    for lengths in ("equal", "lognormal"):
        made = report["variants"][lengths]
        assert list(made) == ["stock", *SPEED_OPTIONS, "all"]
        assert made["stock"]["ratio_to_stock"] == made["stock"]["saved_to_stock"] == 1
        assert made["all"]["flops"] < made["share_prefix"]["flops"] < made["encode_once"]["flops"]
        assert made["encode_once"]["flops"] < made["stock"]["flops"]
        assert made["share_prefix"]["saved_bytes"] < made["stock"]["saved_bytes"]
        assert all(len(v["ratios"]) == 2 and v["step_s"] > 0 for v in made.values())
    assert report["variants"]["equal"]["pack"]["flops"] == report["variants"]["equal"]["stock"]["flops"]
    with pytest.raises(ProbeError, match="there is no size '7b'; give one of tiny, so400m"):
        bench_dpo_step("7b")


def test_the_flop_formula_agrees_with_a_counter() -> None:
    """torch counts the whole square of attention, and its forward the block above the feature layer: both are small."""
    shape = Size((64, 12, 2, 256), 32, 8, (128, 6, 2, 2, 512), 60, 12, 30, 40)
    rows = dpo_step._rows(shape, 2, "lognormal")
    processor = dpo_step.word_processor(shape.vocabulary, shape.image_px, shape.patch_px)
    policy = dpo_step._model(shape, processor, torch.float32)
    for switches in (None, dict.fromkeys(SPEED_OPTIONS, True)):
        with tempfile.TemporaryDirectory() as folder:
            trainer = dpo_step._trainer(policy, processor, rows, switches, Path(folder), False)
            inputs = dpo_step._inputs(trainer, rows)
            with FlopCounterMode(display=False) as counter:
                dpo_step._step(trainer, inputs)
        assert dpo_step._flops(shape, rows, switches) == pytest.approx(counter.get_total_flops(), rel=0.12)


def test_the_readmes_dpo_speeds_are_those_of_the_record() -> None:
    root = Path(__file__).parents[2]
    record = json.loads((root / "recipes" / "bench" / "dpo-step-tiny.json").read_text())["variants"]
    readme = (root / "README.md").read_text()
    for name in ("stock", *SPEED_OPTIONS, "all"):
        cells = [str(record[lengths][name][k]) for lengths in record for k in ("ratio_to_stock", "saved_to_stock")]
        assert f"| {name} | {' | '.join(cells)} |" in readme
    assert record["equal"]["all"]["ratio_to_stock"] >= 2.3
    assert record["lognormal"]["all"]["ratio_to_stock"] >= 3
    assert record["equal"]["all"]["saved_to_stock"] <= 0.6


@pytest.mark.parametrize("stage", ["2-instruct", "3-dpo"])
def test_a_recipes_step_is_timed_beside_its_plan(recipes: Path, stage: str) -> None:
    loaded = load_recipe(recipes / f"{stage}.yaml")
    lines: list[str] = []
    made = bench_train_step(loaded, steps=2, log=lines.append)
    assert (made["batch"], made["steps"], made["recipe"]) == (4, 2, f"tiny/{stage}")
    assert made["rows_per_s"] == pytest.approx(4 / made["step_s"], rel=0.01)
    assert made["planned_bytes"] > 0
    assert made["planned_flops"] > 0
    assert "s a step of 4 rows" in lines[0]


def test_an_align_stage_has_no_step_to_time(recipes: Path) -> None:
    with pytest.raises(ProbeError, match="give a recipe of instruct, sft or dpo"):
        bench_train_step(load_recipe(recipes / "1-align.yaml"))


def test_reading_is_timed_against_the_gpus_need(recipes: Path) -> None:
    made = bench_loader(str(recipes / "2-instruct.yaml"), rows=12, batch=4, rounds=2, log=lambda line: None)
    assert set(made["rows_per_s_per_core"]) == {"zip", "parquet"}
    slowest = min(made["rows_per_s_per_core"].values())
    for gpu in made["gpus"].values():
        assert gpu["cores"] == pytest.approx(gpu["rows_per_s"] / slowest, rel=0.01, abs=0.01)


def test_the_readmes_loader_speed_is_that_of_the_record() -> None:
    root = Path(__file__).parents[2]
    record = json.loads((root / "recipes" / "bench" / "loader.json").read_text())
    page = (root / "recipes" / "README.md").read_text()
    rates = record["rows_per_s_per_core"]
    assert f"{rates['zip']:.0f} rows/s from a zip archive and {rates['parquet']:.0f} from Parquet" in page
    assert f"an H200 needs {record['gpus']['H200 141GB']['rows_per_s']:.0f}" in page


@pytest.mark.slow
def test_space_serves_its_visitors() -> None:
    report = bench_space(visitors=4, clicks=2, log=lambda line: None)
    assert 0 < report["ready_cpu_s"] <= report["ready_s"] + 0.1
    assert len(report["click_s"]["all"]) == 2
    assert report["visitors"]["errors"] == []
    assert len(report["visitors"]["seconds"]) == 4


def test_readme_gives_what_was_measured_of_the_space() -> None:
    root = Path(__file__).parents[2]
    record = json.loads((root / "recipes" / "bench" / "space.json").read_text())
    crowd, readme = record["visitors"], " ".join((root / "README.md").read_text().split())
    assert record["ready_s"] <= 10
    assert record["browser_click_s"]["median"] <= 1
    assert (crowd["count"], crowd["errors"], len(record["browser_click_s"]["all"])) == (20, [], 20)
    assert f"ready in {record['ready_s']:.1f} s, of which {record['ready_cpu_s']:.1f} s computing" in readme
    assert f"{record['browser_click_s']['median']:.2f} s from a click" in readme
    assert f"the last after {max(crowd['seconds']):.1f} s" in readme
