"""Comparisons: paired on the same items, corrected over all tasks, and without a verdict if nothing is shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pivot_hub.errors import ProbeError
from pivot_hub.probes.result import ProbeResult, measure, write_results
from pivot_hub.probes.run import probe_all
from pivot_hub.probes.significance import (
    NONE_SHOWN,
    compare_results,
    compare_seeds,
    draw_comparisons,
    holm,
    read_seeds,
    seed_difference,
)

N = 600


def result(name: str, task: str, hits: np.ndarray, **changes: Any) -> ProbeResult:
    conditions = {"encoder": name, "encoder_sha256": "0", "feature_layer": -2, "data_sha256": "d", **changes}
    return measure(task, "accuracy", hits, protocol="p", seed=0, duration_s=0, **conditions)


def hits(accuracy: float, seed: int, n: int = N) -> np.ndarray:
    return (np.random.default_rng(seed).random(n) < accuracy).astype(float)


def test_a_clear_difference_is_called_and_noise_is_not() -> None:
    base = hits(0.6, 0)
    better = np.maximum(base, hits(0.3, 1))
    comparisons = compare_results(
        {
            "sft": [result("sft", "a", base), result("sft", "b", base)],
            "dpo": [result("dpo", "a", better), result("dpo", "b", np.roll(base, 1))],
        },
        draws=2000,
    )
    one, other = comparisons.rows
    assert (one.task, one.verdict) == ("a", "dpo better")
    assert one.ci95[0] > 0
    assert one.difference == pytest.approx(100 * (better - base).mean())
    assert one.ci95[0] < one.difference < one.ci95[1]
    assert (other.task, other.verdict) == ("b", NONE_SHOWN)
    assert other.ci95[0] < 0 < other.ci95[1]
    # Swapping the two encoders changes the sign and nothing else.
    swapped = compare_results({"dpo": [result("dpo", "a", better)], "sft": [result("sft", "a", base)]}, draws=2000)
    assert swapped.rows[0].difference == pytest.approx(-one.difference)
    assert swapped.rows[0].verdict == "dpo better"


def test_pairs_show_what_two_intervals_hide() -> None:
    """Two per cent of the items are fixed and none get worse: intervals overlap widely, the paired test is clear."""
    base = hits(0.6, 0)
    fixed = base.copy()
    fixed[np.flatnonzero(base == 0)[:12]] = 1
    first, second = result("sft", "a", base), result("dpo", "a", fixed)
    assert first.ci95[1] > second.ci95[0]
    assert compare_results({"sft": [first], "dpo": [second]}).rows[0].verdict == "dpo better"


def test_holm_is_the_textbooks() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1, 1]
    assert holm([0.2]) == [0.2]


@pytest.mark.slow
def test_few_families_of_equal_encoders_call_any_difference() -> None:
    called = 0
    for family in range(60):
        pairs = {
            name: [result(name, f"t{i}", hits(0.5, 1000 * family + 20 * i + k, n=150)) for i in range(8)]
            for k, name in enumerate(("sft", "dpo"))
        }
        called += any(r.verdict != NONE_SHOWN for r in compare_results(pairs, draws=1000).rows)
    assert called <= 8  # 3 expected of 60 at 5%; without the correction about 20


def test_every_encoder_is_compared_with_the_first() -> None:
    results = {name: [result(name, "a", hits(0.5, i))] for i, name in enumerate(("base", "sft", "dpo"))}
    comparisons = compare_results(results, draws=200)
    assert [(r.first, r.other) for r in comparisons.rows] == [("base", "sft"), ("base", "dpo")]


def test_results_that_cannot_be_paired_are_refused() -> None:
    one = result("sft", "a", hits(0.5, 0))
    with pytest.raises(ProbeError, match="needs two encoders"):
        compare_results({"sft": [one]})
    with pytest.raises(ProbeError, match="share no task"):
        compare_results({"sft": [one], "dpo": [result("dpo", "b", hits(0.5, 1))]})
    with pytest.raises(ProbeError, match="a: sft and dpo differ in data_sha256"):
        compare_results({"sft": [one], "dpo": [result("dpo", "a", hits(0.5, 1), data_sha256="e")]})
    with pytest.raises(ProbeError, match="differ in n"):
        compare_results({"sft": [one], "dpo": [result("dpo", "a", hits(0.5, 1)[1:])]})
    with pytest.raises(ProbeError, match="has no per-example scores"):
        compare_results({"sft": [one], "dpo": [replace(one, example_scores=None)]})


def test_results_of_files_make_table_markdown_json_and_figure(tmp_path: Path) -> None:
    for i, name in enumerate(("sft", "dpo")):
        write_results(tmp_path / f"{name}.json", [result(name, "a", hits(0.5 + 0.2 * i, i))])
    comparisons = compare_results(probe_all([str(tmp_path / "sft.json"), str(tmp_path / "dpo.json")]), draws=1000)
    assert comparisons.table().row_count == 1
    row = next(line for line in comparisons.markdown().splitlines() if line.startswith("| a |"))
    assert "| dpo better |" in row
    assert f"{comparisons.rows[0].difference:+.1f}" in row
    metadata = json.loads(json.dumps(comparisons.to_dict()))
    assert metadata["rows"][0]["p_holm"] < 0.05
    assert "1000 paired bootstrap draws" in metadata["method"]
    draw_comparisons(comparisons, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as figure:
        assert min(figure.size) > 100
    (tmp_path / "copy").mkdir()
    write_results(tmp_path / "copy" / "dpo.json", [result("dpo", "a", hits(0.5, 0))])
    with pytest.raises(ProbeError, match="two encoders are named 'dpo'"):
        probe_all([str(tmp_path / "dpo.json"), str(tmp_path / "copy" / "dpo.json")])
    (tmp_path / "no.json").write_text('{"results": 3}')
    with pytest.raises(ProbeError, match="holds no probe results"):
        probe_all([str(tmp_path / "no.json")])


def trainings(accuracy: float, spread: float, seed: int, lift: float = 0.0) -> dict[str, list[ProbeResult]]:
    """Simulate five trainings of an encoder: each seed shifts the chance of every item, and all share the items."""
    rng = np.random.default_rng(seed)
    hard = np.random.default_rng(99).normal(0, 0.1, N)  # difficulty of the items
    by_seed = {}
    for i in range(5):
        chance = np.clip(accuracy + lift + hard + rng.normal(0, spread), 0, 1)
        by_seed[f"seed-{i}"] = [result("e", "a", (rng.random(N) < chance).astype(float))]
    return by_seed


def test_a_difference_over_seeds_is_called_and_noise_between_seeds_is_not() -> None:
    comparisons = compare_seeds(
        {"sft": trainings(0.6, 0.005, 0), "dpo": trainings(0.6, 0.005, 1, lift=0.15)}, draws=300
    )
    (row,) = comparisons.rows
    assert (row.verdict, comparisons.seeds) == ("dpo better", 5)
    assert row.ci95[0] < 15 < row.ci95[1]
    assert "5 training seeds" in comparisons.method()
    # A difference between trainings that scatter far more: one seed alone would call it.
    scattered = {"sft": trainings(0.6, 0.2, 2), "dpo": trainings(0.6, 0.2, 5, lift=0.05)}
    assert compare_seeds(scattered, draws=300).rows[0].verdict == NONE_SHOWN
    alone = {name: by_seed["seed-0"] for name, by_seed in scattered.items()}
    assert compare_results(alone, draws=300).rows[0].p < 0.05


def test_intervals_over_seeds_contain_the_truth_as_often_as_stated() -> None:
    """With known variances of seeds, items and their interaction, 95% intervals contain the true difference of zero."""
    rng, held, runs, seeds, draws = np.random.default_rng(0), 0, 400, 5, 200
    for _ in range(runs):
        first, other = rng.normal(0, 1.0, seeds), rng.normal(0, 1.0, seeds)
        items = rng.normal(0, 0.7, 100)  # the difference on each item, shared by all seeds
        own = rng.normal(0, 2.0, (seeds, 100))
        gap = items + own
        counts = rng.multinomial(100, np.full(100, 0.01), draws)
        drawn = gap @ counts.T / 100
        difference = seed_difference(first, other + gap.mean(1), np.zeros((seeds, draws)), drawn)
        held += difference.ci95[0] <= 0 <= difference.ci95[1]
    assert 0.93 <= held / runs <= 0.99


def test_variance_over_items_counts_where_seeds_agree() -> None:
    first, drawn = np.full(5, 50.0), np.random.default_rng(0).normal(0, 2.0, 400)
    difference = seed_difference(first, first + 3, np.zeros((5, 400)), np.tile(drawn, (5, 1)))
    assert difference.ci95[1] - difference.ci95[0] == pytest.approx(2 * 1.97 * 2.0, rel=0.1)
    assert 0.05 < difference.p_value < 0.3
    equal = seed_difference(first, first, None, None)
    assert (equal.value, equal.ci95, equal.p_value) == (0.0, (0.0, 0.0), 1.0)
    assert seed_difference(first, first + 1, None, None).p_value == 0.0


def test_folders_of_seeds_are_read_by_name_or_refused(tmp_path: Path) -> None:
    for name in ("sft", "dpo", "other/sft"):
        for seed, results in trainings(0.6, 0.0, 0).items():
            write_results(tmp_path / name / f"{seed}.json", results)
    both = [str(tmp_path / name) for name in ("sft", "dpo")]
    seeds = read_seeds(both)
    assert seeds is not None
    assert list(seeds) == ["sft", "dpo"]
    assert list(seeds["sft"]) == [f"seed-{i}" for i in range(5)]
    assert read_seeds([str(tmp_path), "pivot/some-encoder"]) is None
    with pytest.raises(ProbeError, match="two folders have the same name"):
        read_seeds([both[0], str(tmp_path / "other" / "sft")])
    with pytest.raises(ProbeError, match=r"holds no seed-<n>\.json"):
        read_seeds([both[0], str(tmp_path)])
    shared = tmp_path / "parent" / "once.json"
    write_results(shared, trainings(0.6, 0.0, 0)["seed-0"])
    with_parent = read_seeds([str(shared.parent), *both])
    assert with_parent is not None
    assert list(with_parent["parent"]) == list(seeds["sft"])
    assert {results[0].value for results in with_parent["parent"].values()} == {seeds["sft"]["seed-0"][0].value}
    one = {"sft": seeds["sft"], "dpo": {"seed-0": seeds["dpo"]["seed-0"]}}
    with pytest.raises(ProbeError, match=r"share 1 seed\(s\)"):
        compare_seeds(one)
