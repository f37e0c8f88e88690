"""The encoder benchmark: every form is run, and its record says under what conditions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pivot_hub.bench import encoder
from pivot_hub.bench.encoder import FORMS, bench_encoder
from pivot_hub.cli import FORMS as OFFERED
from pivot_hub.errors import ProbeError


def test_every_form_is_timed_against_native(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_peak_memory", lambda form, *rest: len(form))  # seven processes: see the next test
    lines: list[str] = []
    report = bench_encoder(str(parts / "vision"), batch=2, rounds=2, say=lines.append)
    assert tuple(report["forms"]) == FORMS == OFFERED
    assert len(lines) == len(FORMS)
    assert report["forms"]["native"]["ratio_to_native"] == 1
    for form in report["forms"].values():
        assert form["images_per_s"] == pytest.approx(2 / form["seconds_per_batch"], rel=0.05)
        assert len(form["ratios"]) == 2
    assert (report["image_px"], report["batch"], report["weights"]) == (32, 2, "the repository's")


def test_memory_is_that_of_a_process_of_its_own(parts: Path) -> None:
    ballast = bytearray(1_500_000_000)  # what this process holds must not be counted
    ballast[::4096] = b"x" * len(ballast[::4096])
    report = bench_encoder(str(parts / "vision"), batch=1, rounds=1, forms=("native",), say=lambda line: None)
    assert 100 < report["forms"]["native"]["peak_memory_mb"] < 1400


def test_an_unknown_form_is_refused(parts: Path) -> None:
    with pytest.raises(ProbeError, match="there is no form 'tpu'; give some of native, pivot"):
        bench_encoder(str(parts / "vision"), forms=("tpu",))


def test_the_readmes_speeds_are_those_of_the_records() -> None:
    root = Path(__file__).parents[1]
    names = ("base-patch16-224", "so400m-patch14-384")
    records = [json.loads((root / "recipes" / "bench" / f"encoder-siglip-{name}.json").read_text()) for name in names]
    readme = (root / "README.md").read_text()
    keys = ("images_per_s", "ratio_to_native", "peak_memory_mb")
    for form in FORMS:
        row = [form, *(str(record["forms"][form][key]) for record in records for key in keys)]
        assert f"| {' | '.join(row)} |" in readme
    assert all(record["forms"]["pivot"]["ratio_to_native"] < 1.02 for record in records)


def test_the_readmes_cost_of_int8_is_that_of_the_record() -> None:
    root = Path(__file__).parents[1]
    record = json.loads((root / "recipes" / "bench" / "export-shapes-base.json").read_text())
    readme = (root / "README.md").read_text()
    for form, results in record["probe"].items():
        row = next(line for line in readme.splitlines() if line.startswith(f"| {form} | "))
        shown = [r for r in results if r["metric"] in ("balanced_accuracy", "accuracy", "mean_iou")]
        assert row.endswith(" | ".join(["", *(f"{r['value']:.1f}" for r in shown)]) + " |"), row
