"""Probes: right on features that know the answer, at chance on noise, with intervals that cover; results on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pivot_hub.cli import app
from pivot_hub.data.synthetic import SPLITS, ShapesDataset, Split
from pivot_hub.errors import CheckpointError, DataError, ProbeError
from pivot_hub.metrics.energy_inside.energy_inside import energy_inside
from pivot_hub.metrics.paired_bootstrap.paired_bootstrap import bootstrap
from pivot_hub.metrics.pointing_accuracy.pointing_accuracy import points_at
from pivot_hub.mllm.extract import extract_encoder
from pivot_hub.probes.classification.protocols import classify_shapes, shapes_labels
from pivot_hub.probes.localization.gradient_maps import THRESHOLDS, overlaps
from pivot_hub.probes.result import SCHEMA_VERSION, ProbeResult, measure, read_results, results_text, write_results
from pivot_hub.probes.run import Sizes, probe_encoder
from pivot_hub.probes.segmentation.synthetic import CLASSES, class_masks, segment_patches

CONDITIONS: dict[str, Any] = {"feature_layer": -2, "encoder": "test", "encoder_sha256": "0"}
COUNTS: dict[Split, int] = {"train": 400, "validation": 150, "test": 300}
DATASET = ShapesDataset()
FIELDS = {
    *("task", "metric", "value", "unit", "n", "split", "seed", "protocol", "feature_layer", "encoder"),
    *("encoder_sha256", "partner", "ci95", "duration_s", "versions", "data_sha256", "schema_version"),
}


def _scenes() -> dict[str, list[Any]]:
    return {split: [DATASET.scene(split, i) for i in range(COUNTS[split])] for split in SPLITS}


def _by_task(results: list[ProbeResult]) -> dict[str, ProbeResult]:
    return {f"{r.task}/{r.metric}" if "segment" in r.task else r.task: r for r in results}


def test_features_that_know_the_answer_score_full_marks_and_noise_scores_chance() -> None:
    scenes, rng = _scenes(), np.random.default_rng(0)
    known: dict[str, np.ndarray] = {}
    noise: dict[str, np.ndarray] = {}
    for split, split_scenes in scenes.items():
        labels = shapes_labels(split_scenes)
        parts = [labels[t].astype(float) for t in ("colour", "shape", "position")]
        known[split] = np.concatenate([*parts, np.eye(10)[labels["count"]]], axis=1)
        noise[split] = rng.normal(size=(len(split_scenes), 40))
    full, chance = (_by_task(classify_shapes(f, scenes, CONDITIONS)) for f in (known, noise))
    for task in ("colour", "shape", "position", "count"):
        assert full[f"shapes/{task}"].value > 99
        expected = 50 if task != "count" else float(chance["shapes/count"].protocol.split("chance ")[1])
        low, high = chance[f"shapes/{task}"].ci95
        assert low - 4 < expected < high + 4
    assert set(full["shapes/colour"].to_dict()) == FIELDS


def test_settings_are_chosen_on_validation_not_on_test() -> None:
    """With reordered test labels the chosen C is the same, because the reported split takes no part in the choice."""
    scenes, rng = _scenes(), np.random.default_rng(0)
    features = {s: rng.normal(size=(len(v), 30)) + shapes_labels(v)["count"][:, None] for s, v in scenes.items()}
    straight = classify_shapes(features, scenes, CONDITIONS)
    shuffled = classify_shapes(features, {**scenes, "test": scenes["test"][::-1]}, CONDITIONS)
    assert [r.protocol.split("C ")[1].split(" ")[0] for r in straight] == [
        r.protocol.split("C ")[1].split(" ")[0] for r in shuffled
    ]
    assert straight[-1].value > shuffled[-1].value + 20


def test_tokens_that_know_their_class_segment_well_and_noise_does_not() -> None:
    counts: dict[Split, int] = {"train": 120, "validation": 40, "test": 60}
    rng = np.random.default_rng(0)
    tokens: dict[str, np.ndarray] = {}
    noise: dict[str, np.ndarray] = {}
    masks: dict[str, np.ndarray] = {}
    for split in SPLITS:
        scenes = [DATASET.scene(split, i) for i in range(counts[split])]
        masks[split] = class_masks(scenes, [s.render() for s in scenes])
        one_hot = np.eye(len(CLASSES))[masks[split]].reshape(-1, 8, 8, 8, 8, len(CLASSES))
        tokens[split] = one_hot.mean((2, 4)).reshape(-1, 64, len(CLASSES))
        noise[split] = rng.normal(size=tokens[split].shape)
    good, bad = (_by_task(segment_patches(t, masks, CONDITIONS)) for t in (tokens, noise))
    assert good["shapes/segmentation/mean_iou"].value > 50
    assert good["shapes/segmentation/mean_recall"].value > 60
    assert bad["shapes/segmentation/mean_iou"].value < 20
    assert bad["shapes/segmentation/mean_recall"].value == pytest.approx(100 / len(CLASSES), abs=3)


def test_class_masks_agree_with_the_scene() -> None:
    scene = DATASET.scene("train", 5)
    rendered = scene.render()
    ids = class_masks([scene], [rendered])[0]
    for scene_object, mask in zip(scene.objects, rendered.masks, strict=True):
        assert {CLASSES[i] for i in np.unique(ids[mask])} == {scene_object.shape}
    assert set(np.unique(ids[~rendered.masks.any(0)])) == {0}


def test_localisation_scores() -> None:
    mask = np.zeros((8, 8), bool)
    mask[2:4, 2:4] = True
    on, off = mask.astype(float), np.zeros((8, 8))
    off[6, 6] = 1
    half, nothing = on.copy(), np.zeros((8, 8))
    half[6, 6] = 4
    maps = [on, off, half, nothing]
    assert [points_at(m, mask) for m in maps] == [1, 0, 0, 0]
    assert [energy_inside(m, mask) for m in maps] == [1, 0, 0.5, 0]
    low = THRESHOLDS.tolist().index(0.2)
    assert [float(overlaps(m, mask)[low]) for m in maps] == [1, 0, 0.8, 0]
    corner = np.zeros((8, 8), bool)
    corner[0, 0] = True
    assert points_at(nothing, corner) == points_at(nothing + 1, corner) == 0  # a uniform map has no peak


def test_interval_covers_the_truth_about_as_often_as_stated() -> None:
    rng, covered = np.random.default_rng(0), 0
    for seed in range(200):
        hits = (rng.random((150, 1)) < 0.7).astype(float)
        value, (low, high) = bootstrap(hits, lambda sums: sums[:, 0] / 150, seed, draws=300)
        assert low <= value <= high
        covered += low <= 0.7 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_results_read_back(tmp_path: Path) -> None:
    results = classify_shapes(
        {s: np.random.default_rng(0).normal(size=(n, 4)) for s, n in COUNTS.items()}, _scenes(), CONDITIONS
    )
    write_results(tmp_path / "results.json", results)
    assert read_results(tmp_path / "results.json") == results


def _result() -> ProbeResult:
    conditions: dict[str, Any] = {**CONDITIONS, "partner": None, "ci95": (60.0, 80.0), "duration_s": 1.5}
    versions: dict[str, str | None] = {"torch": "2", "trl": None}
    fields: dict[str, Any] = {"unit": "percent", "n": 9, "split": "test", "seed": 0, "protocol": "p"}
    return ProbeResult("a/b", "accuracy", 70.0, **fields, **conditions, versions=versions)


def test_values_that_do_not_follow_from_the_scores_beside_them_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    hits = np.array([1.0, 0.0, 1.0, 1.0])
    conditions: dict[str, Any] = {**CONDITIONS, "protocol": "p", "seed": 0, "duration_s": 1}
    write_results(file, [measure("a/b", "accuracy", hits, **conditions)])
    whole = file.read_text()
    (stored,) = json.loads(whole)
    for change in ({"value": 90.0}, {"n": 5}, {"metric": "mean_iou"}):
        file.write_text(json.dumps([{**stored, **change}]))
        with pytest.raises(ProbeError, match=r"results\.json, result 0 \(a/b, .* give .* so measure again"):
            read_results(file)
    done = CliRunner().invoke(app, ["compare", str(file), str(file)])
    assert done.exit_code != 0
    file.write_text(whole)
    scores = file.with_suffix(".npz").read_bytes()
    file.with_suffix(".npz").write_bytes(scores[:-40])
    with pytest.raises(ProbeError, match=r"results\.npz is damaged .* write it again"):
        read_results(file)


def test_results_of_an_old_file_without_a_version_read_equal(tmp_path: Path) -> None:
    stored = _result().to_dict()
    assert stored.pop("schema_version") == SCHEMA_VERSION
    (tmp_path / "old.json").write_text(json.dumps([stored]))
    assert read_results(tmp_path / "old.json") == [_result()]


@pytest.mark.parametrize("version", [SCHEMA_VERSION, SCHEMA_VERSION + 1])
def test_results_of_a_newer_file_keep_the_fields_that_this_version_does_not_know(version: int, tmp_path: Path) -> None:
    stored = {**_result().to_dict(), "schema_version": version, "device": {"name": "gpu", "count": 2}}
    (tmp_path / "new.json").write_text(json.dumps([stored]))
    (result,) = read_results(tmp_path / "new.json")
    assert (result.value, result.ci95, result.schema_version) == (70.0, (60.0, 80.0), version)
    assert result.extra == {"device": {"name": "gpu", "count": 2}}
    assert json.loads(results_text([result])) == json.loads(json.dumps([stored]))
    assert replace(result, extra={}) == _result()  # the version of the file takes no part in the comparison


def test_results_that_lack_a_required_field_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    for field in ("ci95", "value"):
        file.write_text(json.dumps([{k: v for k, v in _result().to_dict().items() if k != field}]))
        with pytest.raises(ProbeError, match=f"holds no probe results .*{field}"):
            read_results(file)
    file.write_text(json.dumps([{**_result().to_dict(), "schema_version": "new"}]))
    with pytest.raises(ProbeError, match="schema_version is 'new', not an integer"):
        read_results(file)


def test_recorded_results_read() -> None:
    recorded = sorted((Path(__file__).parents[2] / "recipes" / "shapes" / "real").glob("*-dpo.json"))
    assert recorded
    for file in recorded:
        assert all(r.schema_version == SCHEMA_VERSION and not r.extra for r in read_results(file))


SMALL = Sizes(train=60, validation=30, test=40)


def test_probes_of_a_random_encoder_on_shapes(parts: Path) -> None:
    results, _ = probe_encoder(str(parts / "vision"), sizes=SMALL)
    assert [r.task.removeprefix("shapes/") for r in results] == ["colour", "shape", "position", "count"] + [
        "segmentation"
    ] * 3
    for result in results:
        assert result.ci95[0] <= result.value <= result.ci95[1]
        assert result.n == SMALL.test
        assert len(result.encoder_sha256) == 64


def test_an_encoder_that_is_not_what_was_published_is_refused(trained: Path, tmp_path: Path) -> None:
    extract_encoder(trained / "3-dpo", tmp_path / "encoder")
    weights = load_file(tmp_path / "encoder" / "model.safetensors")
    save_file({k: v * 1.5 for k, v in weights.items()}, tmp_path / "encoder" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="differ from the golden vectors by"):
        probe_encoder(str(tmp_path / "encoder"), sizes=SMALL)


def test_a_misspelt_policy_for_bad_rows_is_refused(parts: Path) -> None:
    with pytest.raises(DataError, match="on_bad_row is 'ignore'; give stop or skip"):
        probe_encoder(str(parts / "vision"), on_bad_row="ignore")
    for command in (["probe", "x"], ["localize", "x", "--data", "y"], ["segment", "x", "--data", "y"]):
        done = CliRunner().invoke(app, [*command, "--on-bad-row", "ignore"])
        assert done.exit_code == 2
        assert "ignore" in done.output
