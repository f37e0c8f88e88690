"""Two MLLMs on one picture: what is compared is right, the shipped pair is whole, looks and uploads are judged."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pivot_hub.config.recipe import RECIPES
from pivot_hub.data.image import read_upload
from pivot_hub.data.synthetic import ShapesDataset
from pivot_hub.demo import model_bundle as mllm_pair
from pivot_hub.demo.comparison import Subject, compare, compare_patches, compare_tokens, fit_picture, scene_subject
from pivot_hub.demo.comparison_figure import draw_comparison
from pivot_hub.demo.model_bundle import SHIPPED, BundleCache, BundleNames, ModelBundle, pack_bundle, shipped_bundle
from pivot_hub.demo.view_state import ViewState, read_view_state
from pivot_hub.errors import CheckpointError, DataError
from pivot_hub.explain.gradcam import answer_batch, answer_log_probs, gradient_map
from pivot_hub.explain.heatmaps import colour, densities, overlap, stretch, translucent
from pivot_hub.explain.patch_features import patch_tokens, principal_colours, similarity
from pivot_hub.mllm.load import load_mllm
from pivot_hub.probes.localization.gradient_maps import score_map
from pivot_hub.provenance import file_sha256
from pivot_hub.publish.secret_scan import find_leaks
from tests.publish.hub_server import hub_server


@pytest.fixture(scope="module")
def pair() -> ModelBundle:
    return shipped_bundle()


@pytest.fixture(scope="module")
def scene(pair: ModelBundle) -> Subject:
    return scene_subject(ShapesDataset(image_px=pair.image_px), 17, "position")


# ---------------------------------------------------------------------- the shipped pair
def test_shipped_pair_is_small_sealed_and_from_our_recipes() -> None:
    files = [f for f in SHIPPED.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 8_000_000
    provenance = json.loads((SHIPPED / "provenance.json").read_text())
    assert provenance["files"] == {f.name: file_sha256(f) for f in sorted(files) if f.name != "provenance.json"}
    recipes = RECIPES / "shapes"
    for stage in ("2-instruct", "3-sft", "3-dpo"):
        said = json.loads(json.dumps(provenance["stages"]))
        assert f"shapes/{stage}" in {s["recipe"] for s in said.values()}
        assert (recipes / f"{stage}.yaml").is_file()
    assert find_leaks(SHIPPED) == []


def test_packing_keeps_what_the_branches_differ_by(trained: Path, tmp_path: Path) -> None:
    pack_bundle(trained, tmp_path / "pair")
    made = shipped_bundle(tmp_path / "pair")
    assert made.parent is not None
    parent = load_mllm(trained / "2-instruct")[0].state_dict()
    for mllm, stage in ((made.first, "3-sft"), (made.second, "3-dpo"), (made.parent, "2-instruct")):
        true = load_mllm(trained / stage)[0].state_dict()
        for key, weight in mllm.model.state_dict().items():
            change = true[key] - parent[key]
            rounding = parent[key].abs().max() / 60_000 + change.abs().max() / 250 + 1e-7
            assert (weight - true[key]).abs().max() <= rounding, key
            # The parent's rounding is in both: what a branch differs by is kept to a share of its largest change.
            kept = weight - made.parent.model.state_dict()[key]
            assert (kept - change).abs().max() <= change.abs().max() / 200 + 1e-7, key
    assert "_name_or_path" not in (tmp_path / "pair" / "config.json").read_text()


def test_packing_refuses_branches_of_another_parent(trained: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(trained, runs)
    provenance = json.loads((runs / "3-dpo" / "provenance.json").read_text())
    provenance["parent"]["weights_sha256"] = "0" * 64
    (runs / "3-dpo" / "provenance.json").write_text(json.dumps(provenance))
    with pytest.raises(CheckpointError, match="was not trained from"):
        pack_bundle(runs, tmp_path / "pair")
    assert not (tmp_path / "pair").exists()
    with pytest.raises(CheckpointError, match="is no finished stage"):
        pack_bundle(tmp_path, tmp_path / "pair")


def test_a_pack_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="make one with `pivot pair RUNS OUTPUT`"):
        shipped_bundle(tmp_path)


# ---------------------------------------------------------------------- any pair
def test_names_below_runs_are_read_and_no_other_path(trained: Path, tmp_path: Path) -> None:
    shelf = BundleCache(runs=trained)
    steps: list[str] = []
    made = shelf.get(BundleNames("3-sft", "3-dpo", "2-instruct"), lambda share, what: steps.append(what))
    assert [made.first.name, made.second.name] == ["3-sft", "3-dpo"]
    assert steps[-1] == "loading 2-instruct"
    assert shelf.get(BundleNames("3-sft", "3-dpo", "2-instruct")) is made
    for name in (str(trained / "3-sft"), "../tiny/3-sft", "3-sft/../3-dpo", "/etc", ".", "a/b@../../c", "x" * 300):
        with pytest.raises(CheckpointError, match="names no MLLM") as told:
            shelf.get(BundleNames(name, "3-dpo"))
        assert str(trained.parent) not in str(told.value).replace(name[:80], "")
    with pytest.raises(CheckpointError, match="give both names"):
        shelf.get(BundleNames("3-sft", ""))


def test_only_the_latest_pairs_stay(trained: Path) -> None:
    shelf = BundleCache(runs=trained, keep=1)
    first = shelf.get(BundleNames("3-sft", "3-dpo"))
    shelf.get(BundleNames("3-dpo", "3-sft"))
    assert shelf.get(BundleNames("3-sft", "3-dpo")) is not first
    assert shelf.start() is shelf.start()


def test_a_repository_of_the_hub(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched: the config first, then weights and no pickle or code; too large or no MLLM is refused."""
    asked: list[Any] = []

    def one(repo: str, file: str, revision: str | None) -> str:
        asked.append((repo, file, revision))
        return str(trained / repo.partition("/")[2] / file)

    def all_of(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, allow_patterns))
        return str(trained / repo.partition("/")[2])

    monkeypatch.setattr(mllm_pair, "hf_hub_download", one)
    monkeypatch.setattr(mllm_pair, "snapshot_download", all_of)
    made = BundleCache().get(BundleNames("owner/3-sft@v1", "owner/3-dpo"))
    assert made.second.name == "3-dpo"
    assert asked[0] == ("owner/3-sft", "config.json", "v1")
    assert not any(p.endswith((".bin", ".py", ".pt", ".pkl")) for p in asked[1][2])
    with pytest.raises(CheckpointError, match="billion parameters are more than"):
        BundleCache(most=1000).get(BundleNames("owner/3-sft", "owner/3-dpo"))
    (trained / "other").mkdir(exist_ok=True)
    (trained / "other" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="not an MLLM in transformers' LLaVA format"):
        BundleCache().get(BundleNames("owner/other", "owner/3-dpo"))
    shutil.rmtree(trained / "other")


VISIT = """
import sys
from huggingface_hub import HfApi
from pivot_hub.errors import CheckpointError
from pivot_hub.demo.model_bundle import BundleNames, BundleCache
runs, shelf = sys.argv[1], PairShelf()
for stage in ("2-instruct", "3-sft", "3-dpo"):
    HfApi().create_repo(f"pivot/{stage}")
    HfApi().upload_folder(repo_id=f"pivot/{stage}", folder_path=f"{runs}/{stage}")
    HfApi().upload_file(repo_id=f"pivot/{stage}", path_or_fileobj=b"no weights", path_in_repo="pytorch_model.bin")
made = shelf.get(PairNames("pivot/3-sft@main", "pivot/3-dpo", "pivot/2-instruct"), lambda share, what: print(what))
print("pair:", made.first.name, made.second.name, made.parent.name)
for name in ("pivot/none", "pivot/3-sft@nowhere"):
    try:
        shelf.get(PairNames(name, "pivot/3-dpo"))
    except CheckpointError as error:
        print("told:", error)
"""


def test_repositories_of_a_real_hub(trained: Path, tmp_path: Path) -> None:
    """Through huggingface_hub and the hub's own protocol: pushed, named, fetched, compared; no pickle is fetched."""
    with hub_server(tmp_path / "hub") as server:
        command = [sys.executable, "-c", VISIT, str(trained)]
        environment = server.environment(tmp_path / "home")
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[:4] == ["finding pivot/3-sft@main", "finding pivot/3-dpo", "finding pivot/2-instruct", said[3]]
    assert "pair: 3-sft@main 3-dpo 2-instruct" in said
    told = [line for line in said if line.startswith("told:")]
    assert len(told) == 2
    assert all("no such public repository and revision; check the spelling" in line for line in told)
    asked = [path for method, path, _ in server.log if "/resolve/" in path]
    assert sum(path.endswith("/model.safetensors") for path in asked) == 3
    assert not any(path.endswith((".bin", ".py")) for path in asked)


def test_a_hub_out_of_reach_is_told_without_a_path() -> None:
    with pytest.raises(CheckpointError, match="could not be fetched") as told:
        BundleCache().get(BundleNames("no-such-owner/no-such-model", "a/b"))
    assert "/root" not in str(told.value)
    assert "cache" not in str(told.value)


def test_starting_with_folders(trained: Path) -> None:
    names = BundleNames(str(trained / "3-sft"), str(trained / "3-dpo"))
    made = BundleCache(names).start()
    assert (made.first.name, made.second.name, made.parent) == ("3-sft", "3-dpo", None)
    with pytest.raises(DataError, match="needs the parent"):
        compare(made, scene_subject(ShapesDataset(image_px=made.image_px), 1, "shape"), "dpo")


# ---------------------------------------------------------------------- comparison
def test_a_comparison_holds_the_maps_and_probabilities_of_each_model(pair: ModelBundle, scene: Subject) -> None:
    made = compare(pair, scene, "dpo", layer=2)
    assert pair.parent is not None
    for mllm, view in ((pair.first, made.first), (pair.second, made.second)):
        maps = gradient_map(
            mllm.model,
            mllm.processor,
            scene.image,
            scene.question,
            scene.right,
            "dpo",
            scene.wrong,
            pair.parent.model,
            layer=2,
        )
        for method, grid in maps.maps.items():
            assert np.allclose(grid, view.maps[method], rtol=1e-4, atol=1e-9)
        with torch.no_grad():
            batch = answer_batch(mllm.processor, scene.image, scene.question, [scene.right, scene.wrong])
            right, wrong = answer_log_probs(mllm.model, batch).tolist()
        assert view.preference == pytest.approx(np.exp(right) / (np.exp(right) + np.exp(wrong)), rel=1e-4)
        assert scene.mask is not None
        assert view.scores is not None
        assert view.scores["gradcam"] == score_map(view.maps["gradcam"], scene.mask)
    assert made.first.maps["gradcam"].tolist() != made.second.maps["gradcam"].tolist()
    metadata = json.loads(json.dumps(made.to_dict()))
    assert [m["name"] for m in metadata["models"]] == ["SFT", "DPO"]
    assert np.allclose(metadata["models"][1]["maps"]["gradient"], made.second.maps["gradient"], atol=1e-6)


def test_without_a_right_answer_each_explains_its_own(pair: ModelBundle, scene: Subject) -> None:
    made = compare(pair, replace(scene, right="", wrong="", mask=None))
    for view in (made.first, made.second):
        assert view.explained == view.answer != ""
        assert (view.preference, view.scores, view.right_log_prob) == (None, None, None)
    with pytest.raises(DataError, match="give a right and a wrong one"):
        compare(pair, replace(scene, wrong=""), "dpo")
    with pytest.raises(DataError, match="There is no question"):
        compare(pair, replace(scene, question="  "))
    with pytest.raises(DataError, match="10,000 characters; at most 500"):
        compare(pair, replace(scene, question="why " * 2500))


def test_sentences_say_what_the_maps_show(pair: ModelBundle, scene: Subject) -> None:
    made = compare(pair, scene)
    mask = np.zeros((64, 64), bool)
    mask[:16, :16] = True
    on, off, none = np.zeros((8, 8)), np.zeros((8, 8)), np.zeros((8, 8))
    on[0, 0] = off[7, 7] = 1

    def said(first: np.ndarray, second: np.ndarray) -> str:
        views = [
            replace(v, maps={"gradcam": m}, scores={"gradcam": score_map(m, mask)})
            for v, m in ((made.first, first), (made.second, second))
        ]
        return replace(made, first=views[0], second=views[1]).sentence("gradcam")

    same = "The two look at the same places (100% of their maps coincide), "
    assert said(on, on) == same + "and both point at the thing that was asked about."
    assert "different places (0%" in said(on, off)
    assert "SFT points at the thing that was asked about, DPO does not" in said(on, off)
    assert "DPO points at the thing that was asked about, SFT does not" in said(off, on)
    assert "neither points at the thing" in said(off, off)
    assert said(none, on).startswith("The map of SFT is empty here")
    assert said(none, none).startswith("Neither map shows anything")


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


def test_tokens_and_patches_of_both(pair: ModelBundle, scene: Subject) -> None:
    made = compare(pair, scene)
    one, other = compare_tokens(pair, made)
    assert [t.text for t in one] == [t.text for t in other]
    assert sum(t.log_prob for t in one) == pytest.approx(made.first.right_log_prob, abs=1e-4)
    tokens = compare_patches(pair, scene.image)
    assert tokens[0].shape == tokens[1].shape == (8, 8, 96)
    assert np.abs(tokens[0] - tokens[1]).max() > 0


def test_patches_are_what_enters_the_projector(pair: ModelBundle, scene: Subject) -> None:
    caught: dict[str, torch.Tensor] = {}
    projector = pair.first.model.model.multi_modal_projector
    hook = projector.register_forward_pre_hook(lambda module, inputs: caught.update(tokens=inputs[0]))
    with torch.no_grad():
        batch = answer_batch(pair.first.processor, scene.image, scene.question, [scene.right])
        answer_log_probs(pair.first.model, batch)
    hook.remove()
    made = patch_tokens(pair.first.model, pair.first.processor, scene.image)
    assert np.allclose(made.reshape(64, 96), caught["tokens"][0].numpy(), atol=1e-5)


def test_similarity_and_main_axes() -> None:
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


def test_a_cropping_encoder_is_shown_what_it_sees(pair: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Image.new("RGB", (100, 40))
    assert fit_picture(pair, wide).size == (100, 40)
    monkeypatch.setattr(pair.second.processor.image_processor, "do_center_crop", True, raising=False)
    assert fit_picture(pair, wide).size == (40, 40)


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


def test_the_figure_shows_both_on_one_scale(pair: ModelBundle, scene: Subject, tmp_path: Path) -> None:
    draw_comparison(compare(pair, scene), tmp_path / "a.png", "gradcam", "cividis")
    draw_comparison(compare(pair, replace(scene, question="$\\frac{", mask=None)), tmp_path / "b.png", "gradient")
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as figure:
            assert figure.width > 1000


# ---------------------------------------------------------------------- looks
def test_a_look_and_its_link_are_one() -> None:
    assert ViewState().query() == "scene=27&ask=colour"
    view_state = ViewState(scene=5, ask="count", question="a & b?", explain="sft", layer=2, colours="magma")
    view_state = replace(view_state, first="a/b", second="c/d")

    query = dict(p.split("=") for p in view_state.query().split("&"))
    assert set(query) == {"scene", "ask", "question", "explain", "layer", "colours", "first", "second"}
    from urllib.parse import parse_qsl

    assert read_view_state(dict(parse_qsl(view_state.query())) | {"__theme": "dark"}) == view_state


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"ask": "taste"}, "ask is 'taste': it is one of colour, shape"),
        ({"scene": "-1"}, "scene is '-1', which is no whole number"),
        ({"scene": "9" * 30}, "which is no whole number"),
        ({"opacity": "x"}, "opacity is 'x'"),
        ({"colours": "<script>"}, "it is one of viridis"),
    ],
)
def test_a_link_that_says_nonsense_is_told(query: dict[str, str], said: str) -> None:
    with pytest.raises(DataError, match=said.replace("(", r"\(")):
        read_view_state(query)


def test_looks_of_programs_are_judged_too() -> None:
    with pytest.raises(DataError, match="scene is -3: it lies between 0"):
        ViewState(scene=-3)
    with pytest.raises(DataError, match="question is '5': it has to be a text"):
        ViewState(question=5)  # type: ignore[arg-type]


def test_a_picture_fits_into_a_link() -> None:
    noise = Image.effect_noise((1200, 800), 90).convert("RGB")
    view_state = ViewState().with_picture(noise)
    assert len(view_state.query()) < 7000
    back = view_state.image()
    assert back is not None
    assert back.width / back.height == pytest.approx(1.5, rel=0.02)
    with pytest.raises(DataError):
        replace(view_state, picture=view_state.picture[:200]).image()
    with pytest.raises(DataError):
        ViewState(picture="not base64!").image()


# ---------------------------------------------------------------------- uploads
def test_uploads(tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 40), (200, 30, 30))
    image.paste((30, 30, 200), (0, 0, 30, 40))
    exif = Image.Exif()
    exif[274] = 6
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    turned = read_upload(tmp_path / "turned.jpg")
    assert turned.size == (40, 60)
    assert turned.getpixel((20, 5))[2] > 150, "the left half lies on top after the turn"  # type: ignore[index]
    image.convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    printed = read_upload(tmp_path / "print.jpg")
    assert printed.mode == "RGB"
    assert printed.getpixel((50, 20))[0] > 150  # type: ignore[index]
    image.save(tmp_path / "moving.gif", save_all=True, append_images=[image.rotate(180)])
    assert read_upload(tmp_path / "moving.gif").getpixel((5, 20))[2] > 150  # type: ignore[index]
    image.save(tmp_path / "whole.png")
    assert read_upload(io.BytesIO((tmp_path / "whole.png").read_bytes())).size == (60, 40)


def test_bad_uploads_are_told_without_a_name(tmp_path: Path) -> None:
    noise = Image.effect_noise((300, 200), 90).convert("RGB")
    noise.save(tmp_path / "whole.jpg")
    (tmp_path / "short.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:4000])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "vector.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")
    for name, said in (
        ("short.jpg", "damaged or cut short"),
        ("text.png", "is not an image"),
        ("empty.png", "is not an image"),
        ("vector.svg", "is not an image"),
        ("program.eps", "is not an image"),
        ("huge.png", "more than 64 million pixels"),
    ):
        with pytest.raises(DataError, match=said) as told:
            read_upload(tmp_path / name)
        assert name not in str(told.value)
        assert str(tmp_path) not in str(told.value)
