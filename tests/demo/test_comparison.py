"""Two MLLMs on one image: the comparison, the shipped model bundle, and the validation of view states and uploads."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import parse_qsl

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from pivot_hub.config.recipe import RECIPES
from pivot_hub.data.image import read_upload
from pivot_hub.data.synthetic import ShapesDataset
from pivot_hub.demo import bundle_cache
from pivot_hub.demo.bundle_cache import BundleCache
from pivot_hub.demo.comparison import (
    Subject,
    compare,
    compare_patches,
    compare_tokens,
    scene_subject,
)
from pivot_hub.demo.comparison_figure import draw_comparison
from pivot_hub.demo.cropping import crop_for_encoders
from pivot_hub.demo.html import Panels
from pivot_hub.demo.launch import load_module
from pivot_hub.demo.model_bundle import BundleNames, ModelBundle
from pivot_hub.demo.packed_bundle import SHIPPED, pack_bundle, shipped_bundle
from pivot_hub.demo.swipe_animation import draw_swipe
from pivot_hub.demo.view_state import ViewState, read_view_state
from pivot_hub.errors import CheckpointError, DataError, OutputError
from pivot_hub.explain.gradcam import answer_batch, answer_log_probs, gradient_map
from pivot_hub.explain.heatmaps import colour, densities, overlap, stretch, translucent
from pivot_hub.explain.image_maps import image_family
from pivot_hub.explain.patch_features import patch_tokens, principal_colours, similarity
from pivot_hub.mllm.load import load_mllm
from pivot_hub.probes.localization.gradient_maps import score_map
from pivot_hub.provenance import file_sha256
from pivot_hub.publish.secret_scan import scan_for_secrets
from tests.mllm.tiny_mllms import make_mllm
from tests.mllm.tiny_processors import add_processor
from tests.publish.hub_server import hub_server


@pytest.fixture(scope="module")
def bundle() -> ModelBundle:
    return shipped_bundle()


@pytest.fixture(scope="module")
def scene(bundle: ModelBundle) -> Subject:
    return scene_subject(ShapesDataset(image_px=bundle.image_px), 17, "position")


# ---------------------------------------------------------------------- the shipped bundle
def test_shipped_bundle_is_small_and_matches_its_manifest_and_our_recipes() -> None:
    files = [f for f in SHIPPED.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 8_000_000
    provenance = json.loads((SHIPPED / "provenance.json").read_text())
    assert provenance["files"] == {f.name: file_sha256(f) for f in sorted(files) if f.name != "provenance.json"}
    recipes = RECIPES / "shapes"
    for stage in ("2-instruct", "3-sft", "3-dpo"):
        assert f"shapes/{stage}" in {s["recipe"] for s in provenance["stages"].values()}
        assert (recipes / f"{stage}.yaml").is_file()
    assert scan_for_secrets(SHIPPED) == []


def test_packing_keeps_the_differences_of_the_branches(trained: Path, tmp_path: Path) -> None:
    pack_bundle(trained, tmp_path / "pair")
    bundle = shipped_bundle(tmp_path / "pair")
    assert bundle.parent is not None
    parent = load_mllm(trained / "2-instruct")[0].state_dict()
    for mllm, stage in ((bundle.first, "3-sft"), (bundle.second, "3-dpo"), (bundle.parent, "2-instruct")):
        true = load_mllm(trained / stage)[0].state_dict()
        for key, weight in mllm.model.state_dict().items():
            change = true[key] - parent[key]
            rounding = parent[key].abs().max() / 60_000 + change.abs().max() / 250 + 1e-7
            assert (weight - true[key]).abs().max() <= rounding, key
            # Both share the parent's rounding, so the error of a difference depends on its own largest value only.
            kept = weight - bundle.parent.model.state_dict()[key]
            assert (kept - change).abs().max() <= change.abs().max() / 200 + 1e-7, key
    assert "_name_or_path" not in (tmp_path / "pair" / "config.json").read_text()
    pack_bundle(trained, tmp_path / "pair")  # an earlier bundle is replaced
    (tmp_path / "pair" / "thesis.tex").write_text("ten years")
    with pytest.raises(OutputError, match=r"holds thesis\.tex, which is not part of a packed bundle"):
        pack_bundle(trained, tmp_path / "pair")


def test_packing_refuses_branches_of_another_parent(trained: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(trained, runs)
    provenance = json.loads((runs / "3-dpo" / "provenance.json").read_text())
    provenance["parent"]["weights_sha256"] = "0" * 64
    (runs / "3-dpo" / "provenance.json").write_text(json.dumps(provenance))
    with pytest.raises(CheckpointError, match="was not trained from"):
        pack_bundle(runs, tmp_path / "pair")
    assert not (tmp_path / "pair").exists()
    with pytest.raises(CheckpointError, match="is not a finished stage"):
        pack_bundle(tmp_path, tmp_path / "pair")


def test_a_missing_bundle_is_an_error_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="make one with `pivot pair RUNS OUTPUT`"):
        shipped_bundle(tmp_path)


# ---------------------------------------------------------------------- other bundles
def test_names_below_runs_are_read_and_no_other_path(trained: Path, tmp_path: Path) -> None:
    bundles = BundleCache(runs=trained)
    steps: list[str] = []
    bundle = bundles.get(BundleNames("3-sft", "3-dpo", "2-instruct"), lambda share, step: steps.append(step))
    assert [bundle.first.name, bundle.second.name] == ["3-sft", "3-dpo"]
    assert steps[-1] == "loading 2-instruct"
    assert bundles.get(BundleNames("3-sft", "3-dpo", "2-instruct")) is bundle
    for name in (str(trained / "3-sft"), "../tiny/3-sft", "3-sft/../3-dpo", "/etc", ".", "a/b@../../c", "x" * 300):
        with pytest.raises(CheckpointError, match="names no MLLM") as raised:
            bundles.get(BundleNames(name, "3-dpo"))
        assert str(trained.parent) not in str(raised.value).replace(name[:80], "")
    with pytest.raises(CheckpointError, match="give both names"):
        bundles.get(BundleNames("3-sft", ""))


def test_only_the_most_recent_bundles_stay_in_memory(trained: Path) -> None:
    bundles = BundleCache(runs=trained, capacity=1)
    first = bundles.get(BundleNames("3-sft", "3-dpo"))
    bundles.get(BundleNames("3-dpo", "3-sft"))
    assert bundles.get(BundleNames("3-sft", "3-dpo")) is not first
    assert bundles.default() is bundles.default()


def test_a_repository_of_the_hub(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config is fetched first, then the weights, never a pickle or code; too large or no MLLM is refused."""
    requests: list[Any] = []

    def download_file(repo: str, file: str, revision: str | None) -> str:
        requests.append((repo, file, revision))
        return str(trained / repo.partition("/")[2] / file)

    def download_repository(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        requests.append((repo, revision, allow_patterns))
        return str(trained / repo.partition("/")[2])

    monkeypatch.setattr(bundle_cache, "hf_hub_download", download_file)
    monkeypatch.setattr(bundle_cache, "snapshot_download", download_repository)
    bundle = BundleCache().get(BundleNames("owner/3-sft@v1", "owner/3-dpo"))
    assert bundle.second.name == "3-dpo"
    assert requests[0] == ("owner/3-sft", "config.json", "v1")
    assert not any(p.endswith((".bin", ".py", ".pt", ".pkl")) for p in requests[1][2])
    with pytest.raises(CheckpointError, match="billion parameters are more than"):
        BundleCache(most_parameters=1000).get(BundleNames("owner/3-sft", "owner/3-dpo"))
    (trained / "other").mkdir(exist_ok=True)
    (trained / "other" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="is no MLLM that this app can explain; give one of these: LLaVA"):
        BundleCache().get(BundleNames("owner/other", "owner/3-dpo"))
    shutil.rmtree(trained / "other")


VISIT = """
import sys
from huggingface_hub import HfApi
from pivot_hub.errors import CheckpointError
from pivot_hub.demo.bundle_cache import BundleCache
from pivot_hub.demo.html import Panels
from pivot_hub.demo.launch import load_module
from pivot_hub.demo.model_bundle import BundleNames
runs, bundles = sys.argv[1], BundleCache()
for stage in ("2-instruct", "3-sft", "3-dpo"):
    HfApi().create_repo(f"pivot/{stage}")
    HfApi().upload_folder(repo_id=f"pivot/{stage}", folder_path=f"{runs}/{stage}")
    HfApi().upload_file(repo_id=f"pivot/{stage}", path_or_fileobj=b"no weights", path_in_repo="pytorch_model.bin")
names = BundleNames("pivot/3-sft@main", "pivot/3-dpo", "pivot/2-instruct")
bundle = bundles.get(names, lambda share, step: print(step))
print("bundle:", bundle.first.name, bundle.second.name, bundle.parent.name)
for name in ("pivot/none", "pivot/3-sft@nowhere"):
    try:
        bundles.get(BundleNames(name, "pivot/3-dpo"))
    except CheckpointError as error:
        print("error:", error)
"""


def test_repositories_of_a_real_hub(trained: Path, tmp_path: Path) -> None:
    """Repositories are pushed and fetched by huggingface_hub over the hub's own protocol; no pickle is fetched."""
    with hub_server(tmp_path / "hub") as server:
        command = [sys.executable, "-c", VISIT, str(trained)]
        environment = server.environment(tmp_path / "home")
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["finding pivot/3-sft@main", "finding pivot/3-dpo", "finding pivot/2-instruct"]
    assert "bundle: 3-sft@main 3-dpo 2-instruct" in lines
    errors = [line for line in lines if line.startswith("error:")]
    assert len(errors) == 2
    assert all("no such public repository and revision; check the spelling" in line for line in errors)
    requests = [path for method, path, _ in server.log if "/resolve/" in path]
    assert sum(path.endswith("/model.safetensors") for path in requests) == 3
    assert not any(path.endswith((".bin", ".py")) for path in requests)


def test_the_error_of_an_unreachable_hub_contains_no_path() -> None:
    with pytest.raises(CheckpointError, match="could not be fetched") as raised:
        BundleCache().get(BundleNames("no-such-owner/no-such-model", "a/b"))
    assert "/root" not in str(raised.value)
    assert "cache" not in str(raised.value)


def test_starting_with_folders(trained: Path) -> None:
    names = BundleNames(str(trained / "3-sft"), str(trained / "3-dpo"))
    bundle = BundleCache(names).default()
    assert (bundle.first.name, bundle.second.name, bundle.parent) == ("3-sft", "3-dpo", None)
    with pytest.raises(DataError, match="needs the parent"):
        compare(bundle, scene_subject(ShapesDataset(image_px=bundle.image_px), 1, "shape"), "dpo")


# ---------------------------------------------------------------------- comparison
def test_a_comparison_holds_the_maps_and_probabilities_of_each_model(bundle: ModelBundle, scene: Subject) -> None:
    comparison = compare(bundle, scene, "dpo", layer=2)
    assert bundle.parent is not None
    for mllm, result in zip((bundle.first, bundle.second), comparison.results, strict=True):
        maps = gradient_map(
            mllm.model,
            mllm.processor,
            scene.image,
            scene.question,
            scene.right_answer,
            "dpo",
            scene.wrong_answer,
            bundle.parent.model,
            layer=2,
        )
        for method, grid in maps.maps.items():
            assert np.allclose(grid, result.maps[method], rtol=1e-4, atol=1e-9)
        with torch.no_grad():
            batch = answer_batch(mllm.processor, scene.image, scene.question, [scene.right_answer, scene.wrong_answer])
            right, wrong = answer_log_probs(mllm.model, batch).tolist()
        assert result.preference == pytest.approx(np.exp(right) / (np.exp(right) + np.exp(wrong)), rel=1e-4)
        assert scene.mask is not None
        assert result.scores is not None
        assert result.scores["gradcam"] == score_map(result.maps["gradcam"], scene.mask)
    first, second = comparison.results
    assert first.maps["gradcam"].tolist() != second.maps["gradcam"].tolist()
    values = json.loads(json.dumps(comparison.to_dict()))
    assert [m["name"] for m in values["models"]] == ["SFT", "DPO"]
    assert np.allclose(values["models"][1]["maps"]["gradient"], second.maps["gradient"], atol=1e-6)


def test_without_a_right_answer_each_models_own_answer_is_explained(bundle: ModelBundle, scene: Subject) -> None:
    comparison = compare(bundle, replace(scene, right_answer="", wrong_answer="", mask=None))
    for result in comparison.results:
        assert result.explained == result.answer != ""
        assert (result.preference, result.scores, result.right_log_prob) == (None, None, None)
    with pytest.raises(DataError, match="give a right and a wrong one"):
        compare(bundle, replace(scene, wrong_answer=""), "dpo")
    with pytest.raises(DataError, match="There is no question"):
        compare(bundle, replace(scene, question="  "))
    with pytest.raises(DataError, match="10,000 characters; at most 500"):
        compare(bundle, replace(scene, question="why " * 2500))


def test_the_summary_describes_the_maps(bundle: ModelBundle, scene: Subject) -> None:
    comparison = compare(bundle, scene)
    mask = np.zeros((64, 64), bool)
    mask[:16, :16] = True
    on, off, empty = np.zeros((8, 8)), np.zeros((8, 8)), np.zeros((8, 8))
    on[0, 0] = off[7, 7] = 1

    def summary(*maps: np.ndarray) -> str:
        first, second = (
            replace(result, maps={"gradcam": m}, scores={"gradcam": score_map(m, mask)})
            for result, m in zip(comparison.results, maps, strict=True)
        )
        return replace(comparison, first=first, second=second).summary("gradcam")

    same = "The two models look at the same places (100% of their maps overlap), "
    assert summary(on, on) == same + "and both maps are brightest on the object of the question."
    assert "different places (0%" in summary(on, off)
    assert "The map of SFT is brightest on the object of the question, that of DPO is not" in summary(on, off)
    assert "The map of DPO is brightest on the object of the question, that of SFT is not" in summary(off, on)
    assert "neither map is brightest on the object" in summary(off, off)
    assert summary(empty, on).startswith("The map of SFT is empty")
    assert summary(empty, empty).startswith("Both maps are empty")


def test_scores_of_one_map() -> None:
    mask = np.zeros((8, 8), bool)
    mask[:4, :4] = True
    grid = np.zeros((8, 8))
    grid[1, 1], grid[6, 6] = 3, 1
    scores = score_map(grid, mask)
    assert scores.peak_inside
    assert scores.energy_inside == pytest.approx(0.75)
    assert scores.iou == pytest.approx(1 / 16)
    assert scores.area == pytest.approx(0.25)
    assert not score_map(np.zeros((8, 8)), mask).peak_inside


def test_tokens_and_patches_of_both_models(bundle: ModelBundle, scene: Subject) -> None:
    comparison = compare(bundle, scene)
    first, second = compare_tokens(bundle, comparison)
    assert [t.text for t in first] == [t.text for t in second]
    assert sum(t.log_prob for t in first) == pytest.approx(comparison.first.right_log_prob, abs=1e-4)
    features = compare_patches(bundle, scene.image)
    assert features[0].shape == features[1].shape == (8, 8, 96)
    assert np.abs(features[0] - features[1]).max() > 0


def test_patch_features_are_the_input_of_the_projector(bundle: ModelBundle, scene: Subject) -> None:
    caught: dict[str, torch.Tensor] = {}
    projector = bundle.first.model.model.multi_modal_projector
    hook = projector.register_forward_pre_hook(lambda module, inputs: caught.update(tokens=inputs[0]))
    with torch.no_grad():
        batch = answer_batch(bundle.first.processor, scene.image, scene.question, [scene.right_answer])
        answer_log_probs(bundle.first.model, batch)
    hook.remove()
    features = patch_tokens(bundle.first.model, bundle.first.processor, scene.image)
    assert np.allclose(features.reshape(64, 96), caught["tokens"][0].numpy(), atol=1e-5)


def test_similarity_and_principal_components() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(4, 4, 6))
    alike = similarity(tokens, 1, 2)
    assert alike[1, 2] == pytest.approx(1)
    a, b = tokens[1, 2], tokens[3, 0]
    assert alike[3, 0] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    planted = np.zeros((4, 4, 6))
    planted[:, :2, 0], planted[:2, :, 1], planted[::2, :, 2] = 5, 3, 2
    (one, other), share, joint = principal_colours([planted, planted + 1e-3 * tokens])
    assert joint
    assert share > 0.99
    assert len(np.unique(one.reshape(-1, 3), axis=0)) == 8, "eight kinds of patches, eight colours"
    assert np.abs(one.astype(int) - other).max() <= 3
    assert not principal_colours([tokens, rng.normal(size=(4, 4, 5))])[2]


def test_the_image_is_cropped_as_an_encoder_crops_it(bundle: ModelBundle) -> None:
    wide = Image.new("RGB", (100, 40))
    assert crop_for_encoders(bundle.info, wide).size == (100, 40)
    cropping: Any = SimpleNamespace(image_processor=CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=64))
    other = replace(bundle, second=replace(bundle.second, processor=cropping))
    assert crop_for_encoders(other.info, wide).size == (40, 40)


def test_maps_of_a_processor_that_crops_cover_the_whole_image(bundle: ModelBundle) -> None:
    """It resizes the shorter edge to 96 px and crops 64: without a margin, a sixth of each side would be unseen."""
    whole = bundle.first.processor
    own: Any = cast(Any, whole).image_processor
    crop = CLIPImageProcessorPil(
        size={"shortest_edge": 96},
        crop_size={"height": 64, "width": 64},
        **{name: getattr(own, name) for name in ("image_mean", "image_std", "rescale_factor", "resample")},
    )
    cropping = copy(whole)
    cropping.image_processor = crop
    other = replace(bundle, second=replace(bundle.first, processor=cropping))
    assert other.info.crops
    pixels = np.random.default_rng(0).normal(128, 40, (64, 64, 3)).clip(0, 255).astype(np.uint8)
    before = compare_patches(other, Image.fromarray(pixels), 1)
    assert before[1].shape == (8, 8, before[0].shape[2])
    for row, column in ((0, 0), (0, 7), (7, 3), (4, 4)):
        changed = pixels.copy()
        changed[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] ^= 255
        for earlier, later in zip(before, compare_patches(other, Image.fromarray(changed), 1), strict=True):
            difference = np.linalg.norm(later - earlier, axis=-1)
            assert np.unravel_index(difference.argmax(), difference.shape) == (row, column)
    # Answers, probabilities, maps and token maps are those of the whole image too.
    corner = np.zeros((64, 64), bool)
    corner[:8, :8] = True
    subject = Subject(Image.fromarray(pixels), "What shape is there?", "A star.", "A ring.", corner)
    comparison = compare(other, subject)
    first, second = comparison.results
    assert second.right_log_prob == pytest.approx(first.right_log_prob, abs=0.5)
    assert comparison.overlap("gradient") > 0.8
    tokens = compare_tokens(other, comparison)
    assert overlap(tokens[0][0].maps["gradient"], tokens[1][0].maps["gradient"]) > 0.8


# ---------------------------------------------------------------------- other families
@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create MLLMs of two families, one of them twice with other weights."""
    folder = tmp_path_factory.mktemp("families")
    for name, family, scale in (("sft", "qwen2_5_vl", 1.5), ("dpo", "qwen2_5_vl", 2.0), ("tiles", "smolvlm", 1.0)):
        make_mllm(folder / name, family, partial(scale_weights, scale))
        add_processor(folder / name, family)
    return folder


def scale_weights(scale: float, model: Any) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(scale)


def test_families_are_compared_on_the_image_in_its_own_shape(families: Path, tmp_path: Path) -> None:
    """Two of one family, whose maps have the image's shape, and two families, whose grids differ."""
    pixels = np.random.default_rng(0).integers(0, 255, (90, 180, 3), np.uint8)
    subject = Subject(Image.fromarray(pixels), "What is it?", "It is red.", "It is green.", np.eye(90, 180, dtype=bool))
    panels = Panels(load_module().HERE)
    for second, grid, projected in (("dpo", (6, 12), (3, 6)), ("tiles", (4, 4), (2, 2))):
        names = BundleNames(str(families / "sft"), str(families / second), str(families / "sft"))
        bundle = BundleCache(names).default()
        assert bundle.info.image_px == 8 * 2 * 14
        assert not bundle.info.crops
        comparison = compare(bundle, subject)
        maps = comparison.second.maps
        assert comparison.first.maps["gradient"].shape == (3, 6)
        assert (maps["gradcam"].shape, maps["gradient"].shape) == (grid, projected)
        assert 0 <= comparison.overlap("gradcam") <= 1
        assert comparison.second.scores is not None
        tokens, features = compare_tokens(bundle, comparison), compare_patches(bundle, subject.image, 1)
        assert [grid.shape[:2] for grid in features] == [(6, 12), grid]
        assert tokens[1][-1].maps["gradcam"].shape == grid
        assert "aspect-ratio: 180 / 90" in panels.comparison(comparison, "gradcam", "viridis")
        assert "Image in 6 by 12 patches" in panels.patches(comparison, features, (5, 11), "viridis")
        assert "(end)" in panels.tokens(comparison, tokens, "gradcam", "viridis")
        if second == "tiles":
            with pytest.raises(CheckpointError, match=r"a SmolVLM has no Qwen2\.5-VL for a parent"):
                compare(bundle, subject, "dpo")
        else:
            assert compare(bundle, subject, "dpo").first.value == pytest.approx(np.log(2), abs=1e-4)
            draw_comparison(comparison, tmp_path / "figure.png")


def test_an_mllm_without_image_tokens_is_refused(tmp_path: Path) -> None:
    model = make_mllm(tmp_path / "mllama", "mllama")
    with pytest.raises(CheckpointError, match=r"Llama 3\.2 Vision has no image tokens"):
        image_family(model.config)
    assert BundleCache(runs=tmp_path).local_names() == []


# ---------------------------------------------------------------------- colours
def test_overlap_and_densities() -> None:
    a, b = np.zeros((2, 2)), np.zeros((2, 2))
    a[0, 0] = b[1, 1] = 7
    assert overlap(a, a) == pytest.approx(1)
    assert overlap(a, b) == 0
    assert overlap(a, np.ones((2, 2))) == pytest.approx(0.25)
    assert densities([a])[0].max() == pytest.approx(4)
    assert densities([np.zeros((2, 2))])[0].max() == 0


def test_colours_and_opacity_follow_the_values() -> None:
    values = np.array([[0.0, 1.0], [2.0, 4.0]])
    plain = np.asarray(colour(values, "viridis", 0, 4))
    assert plain[0, 0].tolist() == [68, 1, 84]
    assert plain[1, 1].tolist() == [253, 231, 37]
    clear = np.asarray(translucent(values - 2, "PuOr", -2, 2, 0))
    assert clear[1, 0, 3] == clear[..., 3].min()
    assert clear[0, 0, 3] == clear[1, 1, 3] == 255
    assert stretch(values, (8, 4)).shape == (4, 8)


def test_the_figure_shows_both_on_one_scale(bundle: ModelBundle, scene: Subject, tmp_path: Path) -> None:
    draw_comparison(compare(bundle, scene), tmp_path / "a.png", "gradcam", "cividis")
    without_mask = replace(scene, question="$\\frac{", mask=None)  # matplotlib must not parse it as mathematics
    draw_comparison(compare(bundle, without_mask), tmp_path / "b.png", "gradient")
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as figure:
            assert figure.width > 1000


def test_the_swipe_moves_from_one_map_to_the_other(bundle: ModelBundle, scene: Subject) -> None:
    comparison = compare(bundle, scene)
    opened: Any = Image.open(io.BytesIO(draw_swipe(comparison)))
    with opened as swipe:
        assert swipe.n_frames > 20
        assert swipe.info["loop"] == 0
        frames = []
        for number in (0, swipe.n_frames // 2):
            swipe.seek(number)
            frames.append(np.asarray(swipe.convert("RGB"), float))
    # First the second map everywhere, in the middle the first one.
    grids = densities([result.maps["gradcam"] for result in comparison.results])
    highest = max(float(grid.max()) for grid in grids)
    for frame, grid in zip(frames, reversed(grids), strict=True):
        heat = translucent(stretch(grid, (320, 320)), "viridis", 0, highest, 0)
        heat.putalpha(heat.getchannel("A").point(lambda alpha: round(alpha * 0.85)))
        plain = Image.alpha_composite(scene.image.convert("L").resize((320, 320)).convert("RGBA"), heat)
        outside = stretch(np.asarray(scene.mask, float), (320, 320)) == 0
        difference = np.abs(frame[:320] - np.asarray(plain.convert("RGB"), float)).mean(axis=2)
        assert difference[outside].mean() < 6


# ---------------------------------------------------------------------- view states
def test_a_link_restores_its_view_state() -> None:
    assert ViewState().query() == "scene=1&kind=position"
    state = ViewState(scene=5, kind="count", question="a & b?", explain="sft", layer=2, colours="magma")
    state = replace(state, first="a/b", second="c/d")
    query = dict(parse_qsl(state.query()))
    assert set(query) == {"scene", "kind", "question", "explain", "layer", "colours", "first", "second"}
    assert read_view_state(query | {"__theme": "dark"}) == state


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"kind": "taste"}, "kind is 'taste': it must be one of colour, shape"),
        ({"scene": "-1"}, "scene is '-1', which is not a whole number"),
        ({"scene": "9" * 30}, "which is not a whole number"),
        ({"opacity": "x"}, "opacity is 'x'"),
        ({"colours": "<script>"}, "it must be one of viridis"),
    ],
)
def test_an_invalid_link_is_an_error(query: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_view_state(query)


def test_view_states_of_programs_are_validated_too() -> None:
    with pytest.raises(DataError, match="scene is -3: it must be between 0"):
        ViewState(scene=-3)
    with pytest.raises(DataError, match="question is '5': it must be a text"):
        ViewState(question=5)  # type: ignore[arg-type]


def test_an_image_fits_into_a_link() -> None:
    noise = Image.effect_noise((1200, 800), 90).convert("RGB")
    state = ViewState().with_image(noise)
    assert len(state.query()) < 7000
    restored = state.load_image()
    assert restored is not None
    assert restored.width / restored.height == pytest.approx(1.5, rel=0.02)
    with pytest.raises(DataError):
        replace(state, image=state.image[:200]).load_image()
    with pytest.raises(DataError):
        ViewState(image="not base64!").load_image()


# ---------------------------------------------------------------------- uploads
def test_uploads(tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 40), (200, 30, 30))
    image.paste((30, 30, 200), (0, 0, 30, 40))
    exif = Image.Exif()
    exif[274] = 6
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    turned = read_upload(tmp_path / "turned.jpg")
    assert turned.size == (40, 60)
    assert turned.getpixel((20, 5))[2] > 150, "the left half is at the top after the rotation"  # type: ignore[index]
    large = image.resize((2400, 1600), Image.Resampling.NEAREST)
    large.save(tmp_path / "large.jpg", exif=exif, quality=95)
    assert read_upload(tmp_path / "large.jpg").size == (1600, 2400)
    part = read_upload(tmp_path / "large.jpg", side_px=500)  # decoded at half its size, not at a quarter
    assert part.size == (800, 1200)
    assert part.getpixel((400, 100))[2] > 150  # type: ignore[index]
    image.convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    printed = read_upload(tmp_path / "print.jpg")
    assert printed.mode == "RGB"
    assert printed.getpixel((50, 20))[0] > 150  # type: ignore[index]
    image.save(tmp_path / "moving.gif", save_all=True, append_images=[image.rotate(180)])
    assert read_upload(tmp_path / "moving.gif").getpixel((5, 20))[2] > 150  # type: ignore[index]
    image.save(tmp_path / "whole.png")
    assert read_upload(io.BytesIO((tmp_path / "whole.png").read_bytes())).size == (60, 40)


def test_errors_of_bad_uploads_contain_no_file_name(tmp_path: Path) -> None:
    noise = Image.effect_noise((300, 200), 90).convert("RGB")
    noise.save(tmp_path / "whole.jpg")
    (tmp_path / "short.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:4000])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "vector.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")
    for name, message in (
        ("short.jpg", "damaged or cut short"),
        ("text.png", "is not an image"),
        ("empty.png", "is not an image"),
        ("vector.svg", "is not an image"),
        ("program.eps", "is not an image"),
        ("huge.png", "more than 64 million pixels"),
    ):
        with pytest.raises(DataError, match=message) as raised:
            read_upload(tmp_path / name)
        assert name not in str(raised.value)
        assert str(tmp_path) not in str(raised.value)
