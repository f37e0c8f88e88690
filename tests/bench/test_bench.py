"""Benchmarks: every form and variant is run, and a record states its conditions."""

from __future__ import annotations

import json
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.flop_counter import FlopCounterMode

from pivot_hub.bench import dpo_step, encode, encoder, sizes
from pivot_hub.bench.dpo_step import bench_dpo_step
from pivot_hub.bench.encode import WAYS, bench_encode
from pivot_hub.bench.encoder import FORMS, bench_encoder
from pivot_hub.bench.grpo_step import bench_grpo_step
from pivot_hub.bench.loader import bench_loader
from pivot_hub.bench.sizes import Size, TransformerShape
from pivot_hub.bench.space import bench_space
from pivot_hub.bench.train_step import bench_train_step
from pivot_hub.bench.utilisation import utilisation
from pivot_hub.config.recipe import load_recipe
from pivot_hub.errors import DataError, PivotError, ProbeError
from pivot_hub.planner.gpus import peak_flops
from pivot_hub.training.dpo import SPEED_OPTIONS
from tests.mllm.tiny_mllms import make_mllm
from tests.mllm.tiny_processors import add_processor

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "docs" / "benchmarks.md"


@pytest.mark.slow
def test_every_form_is_timed_against_native(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_peak_memory", lambda form, *rest: len(form))  # seven processes
    lines: list[str] = []
    report = bench_encoder(str(parts / "vision"), batch=2, rounds=2, log=lines.append)
    assert tuple(report["forms"]) == FORMS
    assert len(lines) == len(FORMS)
    assert report["forms"]["native"]["ratio_to_native"] == 1
    for form in report["forms"].values():
        assert form["images_per_s"] == pytest.approx(2 / form["seconds_per_batch"], rel=0.05)
        assert len(form["ratios"]) == 2
    assert (report["image_px"], report["batch"], report["weights"]) == (32, 2, "the repository's")


def test_memory_is_measured_in_a_separate_process(parts: Path) -> None:
    ballast = bytearray(1_500_000_000)  # the memory of this process must not be counted
    ballast[::4096] = b"x" * len(ballast[::4096])
    report = bench_encoder(str(parts / "vision"), batch=1, rounds=1, forms=("native",), log=lambda line: None)
    assert 100 < report["forms"]["native"]["peak_memory_mb"] < 1400


def test_an_unknown_form_is_refused(parts: Path) -> None:
    with pytest.raises(ProbeError, match="there is no form 'tpu'; give some of native, pivot"):
        bench_encoder(str(parts / "vision"), forms=("tpu",))


def test_the_pages_speeds_are_those_of_the_records() -> None:
    names = ("base-patch16-224", "so400m-patch14-384")
    records = [json.loads((ROOT / "recipes" / "bench" / f"encoder-siglip-{name}.json").read_text()) for name in names]
    page = BENCHMARKS.read_text()
    keys = ("images_per_s", "ratio_to_native", "peak_memory_mb")
    for form in FORMS:
        row = [form, *(str(record["forms"][form][key]) for record in records for key in keys)]
        assert f"| {' | '.join(row)} |" in page
    assert all(record["forms"]["pivot"]["ratio_to_native"] < 1.02 for record in records)


def test_the_pages_cost_of_int8_is_that_of_the_record() -> None:
    record = json.loads((ROOT / "recipes" / "bench" / "export-shapes-base.json").read_text())
    page = BENCHMARKS.read_text()
    for form, results in record["probe"].items():
        row = next(line for line in page.splitlines() if line.startswith(f"| {form} | "))
        values = [r["value"] for r in results if r["metric"] in ("balanced_accuracy", "accuracy", "mean_iou")]
        assert row.endswith(" | ".join(["", *(f"{value:.1f}" for value in values)]) + " |"), row


SMALL = Size(
    vision=TransformerShape(32, 3, 2, 64),
    image_px=32,
    patch_px=8,
    language=TransformerShape(32, 2, 2, 64, key_value_heads=1),
    vocabulary=60,
    prompt_tokens=5,
    answer_tokens=8,
    max_answer_tokens=16,
)


def test_a_dpo_step_is_timed_in_every_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.SIZES, "small", SMALL)
    report = bench_dpo_step("small", batch=3, rounds=2, log=lambda line: None)
    for lengths in ("equal", "lognormal"):
        variants = report["variants"][lengths]
        assert list(variants) == ["trl", *SPEED_OPTIONS, "all"]
        assert variants["trl"]["speedup_over_trl"] == variants["trl"]["saved_bytes_over_trl"] == 1
        assert variants["all"]["flops"] < variants["share_prefix"]["flops"] < variants["trl"]["flops"]
        assert variants["all"]["flops"] < variants["cache_reference"]["flops"] < variants["trl"]["flops"]
        assert variants["share_prefix"]["saved_bytes"] < variants["trl"]["saved_bytes"]
        assert all(len(v["speedups"]) == 2 and v["step_s"] > 0 for v in variants.values())
    with pytest.raises(ProbeError, match="there is no size '7b'; give one of tiny, so400m"):
        bench_dpo_step("7b")


def test_a_grpo_step_is_timed_on_answers_with_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.SIZES, "small", SMALL)
    report = bench_grpo_step("small", prompts=2, generations=3, rounds=1, log=lambda line: None)
    trl, ours = (report["variants"][name] for name in ("trl", "share_prefix"))
    assert ours["loss"] == pytest.approx(trl["loss"], rel=1e-4)
    assert abs(trl["loss"]) > 1e-3
    assert ours["step_s"] > 0
    assert report["prefix_tokens"] // 10 == report["answer_tokens"]
    with pytest.raises(ProbeError, match="there is no size '7b'; give one of tiny, so400m"):
        bench_grpo_step("7b")


def test_the_flop_formula_agrees_with_a_counter() -> None:
    """torch counts the whole square of attention, and the block above the feature layer; both are small."""
    shape = Size(
        vision=TransformerShape(64, 12, 2, 256),
        image_px=32,
        patch_px=8,
        language=TransformerShape(128, 6, 2, 512),
        vocabulary=60,
        prompt_tokens=12,
        answer_tokens=30,
        max_answer_tokens=40,
    )
    rows = dpo_step._random_rows(shape, 2, "lognormal")
    policy, processor = sizes.random_policy(shape, torch.float32)
    for options in (None, dict.fromkeys(SPEED_OPTIONS, True)):
        with tempfile.TemporaryDirectory() as folder:
            trainer = dpo_step._build_trainer(policy, processor, rows, options, Path(folder), False)
            inputs = dpo_step._collate(trainer, rows)
            with FlopCounterMode(display=False) as counter:
                dpo_step._step("all", trainer, inputs)
        assert dpo_step.step_flops(shape, rows, options) == pytest.approx(counter.get_total_flops(), rel=0.12)


def test_the_benchmark_of_a_dpo_step_runs_what_recipes_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast on CUDA over float32 weights; and MFU without, HFU with the recomputed forward pass."""
    policy, _ = sizes.random_policy(SMALL, torch.float32)
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}
    dtypes: list[torch.dtype] = []

    def compute_loss(model: torch.nn.Module, inputs: Any) -> torch.Tensor:
        output = model(inputs)
        dtypes.append(output.dtype)
        return cast(torch.Tensor, output.sum())

    AcceleratorState._reset_state(reset_partial_state=True)  # tests before this one trained in float32
    trainer = SimpleNamespace(
        model=torch.nn.Linear(2, 2),
        accelerator=Accelerator(mixed_precision="bf16", cpu=True),
        compute_loss=compute_loss,
        compute_loss_context_manager=nullcontext,
    )
    dpo_step._step("all", trainer, torch.ones(1, 2))  # type: ignore[arg-type]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert dtypes == [torch.bfloat16]
    assert trainer.model.weight.grad.dtype == torch.float32
    monkeypatch.setattr(dpo_step, "utilisation", lambda flops, seconds: flops)
    rows = dpo_step._random_rows(SMALL, 2, "equal")
    measured = dict.fromkeys(("trl", "all"), dpo_step.Measurement([1.0], [1.0], 1, None, 1.0, None))
    for name, forward_passes in (("trl", 4), ("all", 3)):  # the policy's and twice as much backward; the reference's
        off, on = (dpo_step._variant_record(name, measured, SMALL, rows, again) for again in (False, True))
        assert off["mfu"] == off["hfu"] == on["mfu"] == off["flops"]
        assert on["hfu"] / on["mfu"] == pytest.approx((forward_passes + 1) / forward_passes)


def test_forms_of_attention_are_compared_where_there_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    from pivot_hub.training import tree_layout

    assert dpo_step.ONE_BY_ONE not in dpo_step._variants()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tree_layout, "HAS_VARLEN", True)
    assert dpo_step._variants()[dpo_step.ONE_BY_ONE] == dpo_step.VARIANTS["all"]
    for variant, at_once in (("all", True), (dpo_step.ONE_BY_ONE, False)):
        with dpo_step._attention_of(variant):
            assert tree_layout.HAS_VARLEN is at_once
    assert tree_layout.HAS_VARLEN


def test_the_record_of_dpo_steps_has_the_flops_that_are_counted() -> None:
    record = json.loads((ROOT / "recipes" / "bench" / "dpo-step-tiny.json").read_text())
    shape = sizes.SIZES[record["size"]]
    for lengths, variants in record["variants"].items():
        rows = dpo_step._random_rows(shape, record["batch"], lengths)
        for name, options in dpo_step.VARIANTS.items():
            assert variants[name]["flops"] == dpo_step.step_flops(shape, rows, options)


def test_utilisation_is_a_share_of_a_known_gpus_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.5e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA GeForce RTX 4090") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert utilisation(1e12, 1) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert utilisation(989.5e12, 4) == 0.25


def test_the_pages_dpo_speeds_are_those_of_the_record() -> None:
    record = json.loads((ROOT / "recipes" / "bench" / "dpo-step-tiny.json").read_text())["variants"]
    page = BENCHMARKS.read_text()
    keys = ("speedup_over_trl", "saved_bytes_over_trl")
    for name in ("trl", *SPEED_OPTIONS, "all"):
        cells = [str(record[lengths][name][key]) for lengths in record for key in keys]
        assert f"| {name} | {' | '.join(cells)} |" in page
    assert record["equal"]["all"]["speedup_over_trl"] >= 2.3
    assert record["lognormal"]["all"]["speedup_over_trl"] >= 3
    assert record["equal"]["all"]["saved_bytes_over_trl"] <= 0.65
    record = json.loads((ROOT / "recipes" / "bench" / "dpo-step-tiny-qwen2.5-vl.json").read_text())["variants"]
    speedups = [record[lengths]["all"]["speedup_over_trl"] for lengths in ("equal", "lognormal")]
    assert f"both options make {speedups[0]} and {speedups[1]} times TRL's speed" in page
    assert min(speedups) >= 2.5


def test_the_pages_grpo_speed_is_that_of_the_record() -> None:
    record = json.loads((ROOT / "recipes" / "bench" / "grpo-step-tiny.json").read_text())
    assert f"{record['speedup_over_trl']} times TRL's speed with eight answers" in BENCHMARKS.read_text()
    assert record["speedup_over_trl"] >= 2
    assert record["generations"] == 8
    losses = [variant["loss"] for variant in record["variants"].values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("stage", ["2-instruct", "3-dpo"])
def test_a_recipes_step_is_timed_and_compared_with_its_plan(recipes: Path, stage: str) -> None:
    loaded = load_recipe(recipes / f"{stage}.yaml")
    lines: list[str] = []
    record = bench_train_step(loaded, steps=2, log=lines.append)
    assert (record["batch"], record["steps"], record["recipe"]) == (4, 2, f"tiny/{stage}")
    assert record["rows_per_s"] == pytest.approx(4 / record["step_s"], rel=0.01)
    assert record["planned_bytes"] > 0
    assert record["planned_flops"] > 0
    assert "s a step of 4 rows" in lines[0]


def test_the_step_of_a_recipe_that_starts_from_an_mllm_is_timed(tmp_path: Path) -> None:
    make_mllm(tmp_path / "mllm", "qwen2_5_vl")
    add_processor(tmp_path / "mllm", "qwen2_5_vl")
    (tmp_path / "recipe.yaml").write_text(
        "stage: dpo\nmodel: {mllm: mllm}\nlearning_rate: {vision: 1e-3}\ndata: [{format: mmpr, path: x, "
        "images: y, expect: {rows: 8, prompt_tokens: 9, answer_tokens: 9, image_tokens: 24}}]\n"
        "args: {per_device_train_batch_size: 2}\n"
    )
    record = bench_train_step(load_recipe(tmp_path / "recipe.yaml"), steps=2, log=lambda line: None)
    assert record["rows_per_s"] == pytest.approx(2 / record["step_s"], rel=0.01)
    assert record["planned_flops"] > 0


def test_an_align_stage_has_no_step_to_time(recipes: Path) -> None:
    with pytest.raises(ProbeError, match="give a recipe of instruct, sft or dpo"):
        bench_train_step(load_recipe(recipes / "1-align.yaml"))


def test_the_speed_of_reading_is_compared_with_what_gpus_need(recipes: Path) -> None:
    record = bench_loader(str(recipes / "2-instruct.yaml"), rows=12, batch=4, rounds=2, log=lambda line: None)
    assert set(record["rows_per_s_per_core"]) == {"zip", "parquet"}
    slowest = min(record["rows_per_s_per_core"].values())
    for gpu in record["gpus"].values():
        assert gpu["cores"] == pytest.approx(gpu["rows_per_s"] / slowest, rel=0.01, abs=0.01)


def test_the_pages_loader_speed_is_that_of_the_record() -> None:
    record = json.loads((ROOT / "recipes" / "bench" / "loader.json").read_text())
    page = BENCHMARKS.read_text()
    speeds = record["rows_per_s_per_core"]
    assert f"{speeds['zip']:.0f} rows/s from a zip archive and {speeds['parquet']:.0f} from Parquet" in page
    assert f"an H200 needs {record['gpus']['H200 141GB']['rows_per_s']:.0f}" in page


def test_encoding_is_timed_against_bare_passes_and_a_plain_loop(parts: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    report = bench_encode(str(parts / "vision"), images=6, batch=4, workers=1, rounds=2, log=lines.append)
    assert tuple(report["ways"]) == WAYS
    assert len(lines) == len(WAYS)
    assert report["ways"]["bare"]["ratio_to_bare"] == 1
    for way in report["ways"].values():
        assert way["images_per_s"] > 0
        assert len(way["ratios"]) == 2
    assert (report["photos"], report["images"], report["weights"]) == ("noise", 6, "the repository's")
    with pytest.raises(DataError, match="holds 0 images; give a folder of 6"):
        bench_encode(str(parts / "vision"), tmp_path, images=6)
    with pytest.raises(DataError, match="give 1 or more"):
        bench_encode(str(parts / "vision"), images=0)


def test_the_pages_speed_of_encoding_is_that_of_the_record() -> None:
    record = json.loads((ROOT / "recipes" / "bench" / "encode-siglip-base-patch16-224.json").read_text())
    page, ways = " ".join(BENCHMARKS.read_text().split()), record["ways"]
    low, *_, high = (round(100 * ratio) for ratio in sorted(ways["pivot"]["ratios"]))
    assert ways["pivot"]["ratio_to_bare"] >= 0.9
    assert f"reaches {100 * ways['pivot']['ratio_to_bare']:.0f}% of the images a second of bare forward passes" in page
    assert f"({low} to {high}% in three rounds), and a plain loop over a DataLoader" in page
    assert f"DataLoader {100 * ways['loop']['ratio_to_bare']:.0f}% (" in page


def test_features_that_differ_are_not_compared(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = encode._loop

    def other_features(*args: Any) -> float:
        speed = loop(*args)
        np.save(args[-1], np.load(args[-1]) + 1)
        return speed

    monkeypatch.setattr(encode, "_loop", other_features)
    with pytest.raises(PivotError, match="gave different features"):
        bench_encode(str(parts / "vision"), images=4, batch=4, workers=1, rounds=1, log=lambda line: None)


@pytest.mark.slow
def test_space_serves_its_visitors() -> None:
    report = bench_space(visitors=4, clicks=2, looks=3, log=lambda line: None)
    assert 0 < report["ready_cpu_s"] <= report["ready_s"] + 0.1
    assert len(report["click_s"]["all"]) == 2
    assert report["visitors"]["errors"] == []
    assert len(report["visitors"]["seconds"]) == 4
    assert report["looks"] == 3
    assert 300 < report["memory_mb"][0] <= report["memory_mb"][1] + 100


def test_the_pages_figures_of_the_space_are_those_of_the_record() -> None:
    record = json.loads((ROOT / "recipes" / "bench" / "space.json").read_text())
    crowd, page = record["visitors"], " ".join(BENCHMARKS.read_text().split())
    assert record["ready_s"] <= 10
    assert record["browser_click_s"]["median"] <= 1
    assert (crowd["count"], crowd["errors"], len(record["browser_click_s"]["all"])) == (20, [], 20)
    assert f"ready in {record['ready_s']:.1f} s, of which {record['ready_cpu_s']:.1f} s computing" in page
    assert f"{record['browser_click_s']['median']:.2f} s from a click" in page
    assert crowd["p95_s"] < 6
    assert f"95% of them within {crowd['p95_s']:.1f} s and the last after {max(crowd['seconds']):.1f} s" in page
    others = record["encoder_visitors"]
    assert (others["count"], others["errors"]) == (20, [])
    assert f"20 visitors of `/encoders`, no error, 95% within {others['p95_s']:.1f} s" in page
    before, after = record["memory_mb"]
    assert f"memory {before:.0f} MB before, {after:.0f} MB after {record['looks']} further looks" in page
