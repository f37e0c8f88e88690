"""Localisation in labelled images: regions as labelled, masks as the encoder sees them, errors for bad labels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from typer.testing import CliRunner

from pivot_hub.cli import app
from pivot_hub.data.boxes_and_masks import read_annotated_images
from pivot_hub.errors import DataError, ProbeError
from pivot_hub.explain.image_maps import seen_image, seen_mask
from pivot_hub.metrics.paired_bootstrap.paired_bootstrap import paired_difference
from pivot_hub.mllm.build import randomise_vision
from pivot_hub.mllm.load import load_mllm, mllm_config
from pivot_hub.probes.localization.gradient_maps import (
    LabelFiles,
    Target,
    Wording,
    image_targets,
    localize,
    localize_folder,
)
from pivot_hub.probes.result import ProbeResult, read_results, statistic_of
from tests.encoder.originals import IMAGE_PX
from tests.mllm.tiny_mllms import make_mllm
from tests.mllm.tiny_processors import add_processor

LABELS = {"a": "0 0.25 0.5 0.5 1.0\n", "b": "1 0.5 0.5 0.2 0.2\n0 0.9 0.1 0.2 0.2\n", "c": "1 0 0 1 0 0 1\n"}


def yolo_folder(folder: Path, copies: int = 2) -> Path:
    """Write images of 40 x 20 px in YOLO's layout: boxes, two classes in one image, a triangle."""
    (folder / "images" / "train").mkdir(parents=True)
    (folder / "labels" / "train").mkdir(parents=True)
    for stem, text in LABELS.items():
        for i in range(copies):
            Image.effect_noise((40, 20), 90).convert("RGB").save(folder / "images" / "train" / f"{stem}{i}.png")
            (folder / "labels" / "train" / f"{stem}{i}.txt").write_text(text)
    (folder / "data.yaml").write_text("names: [apple, cup]\n")
    return folder


def test_yolo_labels_are_regions(tmp_path: Path) -> None:
    images, left_out = read_annotated_images(yolo_folder(tmp_path, 1))
    assert left_out == []
    assert [p.name for p in images] == ["train/a0.png", "train/b0.png", "train/c0.png"]
    a, b, c = images
    left = np.zeros((20, 40), bool)
    left[:, :20] = True
    assert np.array_equal(a.regions["apple"](), left)
    assert set(b.regions) == {"apple", "cup"}
    assert np.array_equal(np.argwhere(b.regions["cup"]())[[0, -1]], [[8, 16], [11, 23]])
    assert b.regions["apple"]()[0, 39]
    triangle = c.regions["cup"]()
    assert triangle[2, 2]
    assert not triangle[18, 38]
    assert triangle.mean() == pytest.approx(0.5, abs=0.06)


def test_instances_of_a_class_are_one_region(tmp_path: Path) -> None:
    folder = yolo_folder(tmp_path, 1)
    (folder / "labels" / "train" / "a0.txt").write_text("0 0.1 0.5 0.2 1.0\n0 0.9 0.5 0.2 1.0\n")
    mask = read_annotated_images(folder)[0][0].regions["apple"]()
    assert mask[:, :8].all()
    assert mask[:, 32:].all()
    assert not mask[:, 8:32].any()


def _coco(folder: Path, **annotation: Any) -> Path:
    Image.new("RGB", (40, 30)).save(folder / "a.png")
    file = folder / "coco.json"
    annotations = [{"id": 1, "image_id": 7, "category_id": 3, **annotation}]
    images = [{"id": 7, "file_name": "a.png", "width": 40, "height": 30}]
    categories = [{"id": 3, "name": "cat"}]
    file.write_text(json.dumps({"annotations": annotations, "images": images, "categories": categories}))
    return file


def _square() -> np.ndarray:
    mask = np.zeros((30, 40), bool)
    mask[10:20, 5:25] = True
    return mask


def _rle(compressed: bool) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(_square().astype(np.uint8)))
    if compressed:
        return {"size": [30, 40], "counts": encoded["counts"].decode()}
    runs = np.flatnonzero(np.diff(_square().T.ravel().astype(int), prepend=0, append=2 - 1)).tolist()
    return {"size": [30, 40], "counts": np.diff([0, *runs]).tolist()}


SEGMENTATIONS = {
    "polygon": [[5, 10, 24, 10, 24, 19, 5, 19]],
    "two polygons": [[5, 10, 14, 10, 14, 19, 5, 19], [15, 10, 24, 10, 24, 19, 15, 19]],
    "compressed RLE": _rle(True),
    "RLE": _rle(False),
}


@pytest.mark.parametrize("kind", SEGMENTATIONS)
def test_coco_polygons_and_rle_are_drawn(kind: str, tmp_path: Path) -> None:
    file = _coco(tmp_path, bbox=[0, 0, 40, 30], segmentation=SEGMENTATIONS[kind])
    (image,), _ = read_annotated_images(tmp_path, boxes=file)
    assert np.array_equal(image.regions["cat"](), _square())


def test_coco_crowds_are_left_out_and_bad_segmentations_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.png: has no labels"):
        read_annotated_images(tmp_path, boxes=_coco(tmp_path, segmentation=_rle(False), iscrowd=1))
    for segmentation in (
        {"size": [30, 40], "counts": [10, 20]},
        {"size": [30, 40], "counts": "x"},
        {"size": [30, 40], "counts": "oooo0"},
        {"size": [30, 40], "counts": "0`"},
        [[1, 2, 3, 4]],
        [["a"]],
    ):
        with pytest.raises(DataError, match=r"coco\.json, annotation 1: has no polygons, RLE or bbox"):
            read_annotated_images(tmp_path, boxes=_coco(tmp_path, segmentation=segmentation))
    with pytest.raises(DataError, match="its RLE is 41 x 30, its image 40 x 30"):
        read_annotated_images(tmp_path, boxes=_coco(tmp_path, segmentation={"size": [30, 41], "counts": [1230]}))


def test_voc_files_give_their_boxes_and_other_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "Annotations").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "a.png")
    box = "<bndbox><xmin>6</xmin><ymin>11</ymin><xmax>25</xmax><ymax>20</ymax></bndbox>"
    size = "<size><width>40</width><height>30</height><depth>3</depth></size>"
    file = tmp_path / "Annotations" / "a.xml"
    file.write_text(f"<annotation>{size}<object><name>cat</name>{box}</object></annotation>")
    (image,), _ = read_annotated_images(tmp_path, boxes=tmp_path / "Annotations")
    assert np.array_equal(image.regions["cat"](), _square())
    for content, message in (
        ("<annotation>", r"a\.xml: is not VOC's XML"),
        (f"<a>{size}<object><name>cat</name></object></a>", r"a\.xml: is not VOC's XML"),
        (f"<a>{size}<object>{box}</object></a>", r"a\.xml, object 1: has no name"),
        (f"<a>{size.replace('40', '44')}</a>", r"a\.xml is for 44 x 30 px, its image is 40 x 30"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=message):
            read_annotated_images(tmp_path, boxes=tmp_path / "Annotations")
    file.rename(file.with_suffix(".json"))  # as LabelMe writes
    for boxes in (tmp_path / "Annotations", tmp_path / "names.csv"):
        (tmp_path / "names.csv").write_text("a.png,cat\n")
        with pytest.raises(DataError, match=r"give YOLO's label files, COCO's JSON .* VOC's XML"):
            read_annotated_images(tmp_path, boxes=boxes)


def test_classes_txt_names_the_ids_of_yolo_labels(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "a.png")
    (tmp_path / "labels" / "a.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    (tmp_path / "labels" / "classes.txt").write_text("dog\ncat\n")
    (image,), _ = read_annotated_images(tmp_path)
    assert list(image.regions) == ["cat"]


def test_coco_boxes_and_id_masks_give_the_same_regions(tmp_path: Path) -> None:
    folder = yolo_folder(tmp_path, 1)
    stored: dict[str, Any] = {
        "images": [{"id": 7, "file_name": "a0.png", "width": 40, "height": 20}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [0, 0, 20, 20]}],
        "categories": [{"id": 3, "name": "apple"}],
    }
    (folder / "boxes.json").write_text(json.dumps(stored))
    images, left_out = read_annotated_images(folder, boxes=folder / "boxes.json")
    assert len(left_out) == 2
    ids = np.full((20, 40), 255, np.uint8)
    ids[:, :20] = 0
    (folder / "masks" / "train").mkdir(parents=True)
    Image.fromarray(ids).save(folder / "masks" / "train" / "a0.png")
    (masked,), _ = read_annotated_images(folder, masks=folder / "masks")
    assert set(masked.regions) == {"apple"}
    assert np.array_equal(images[0].regions["apple"](), masked.regions["apple"]())

    stored["images"][0]["width"] = 80
    (folder / "boxes.json").write_text(json.dumps(stored))
    with pytest.raises(DataError, match=r"a0.png is 40 x 20 and 80 x 20 in .*boxes.json"):
        read_annotated_images(folder, boxes=folder / "boxes.json")
    stored["images"][0]["width"] = 40
    stored["annotations"][0]["category_id"] = 4
    (folder / "boxes.json").write_text(json.dumps(stored))
    with pytest.raises(DataError, match=r"boxes.json, annotation 1: class id 4 has no name"):
        read_annotated_images(folder, boxes=folder / "boxes.json")
    (folder / "boxes.json").write_text("[]")
    with pytest.raises(DataError, match="is not COCO's JSON"):
        read_annotated_images(folder, boxes=folder / "boxes.json")

    with pytest.raises(DataError, match=r"a0.png: class id 255 has no name in .*data.yaml"):
        read_annotated_images(folder, masks=folder / "masks", ignore=())
    Image.fromarray(ids[:10]).save(folder / "masks" / "train" / "a0.png")
    with pytest.raises(DataError, match=r"masks.*a0.png is 40 x 10 and its image 40 x 20"):
        read_annotated_images(folder, masks=folder / "masks")
    Image.fromarray(ids).convert("RGB").save(folder / "masks" / "train" / "a0.png")
    with pytest.raises(DataError, match="is a RGB image, not ids"):
        read_annotated_images(folder, masks=folder / "masks")


BAD_LABELS = [
    ("0 0.5 0.5 1.2 1.0", r"b0.txt, line 2: reaches from \(-4, 0\) to \(44, 20\), outside of the image's 40 x 20"),
    ("0 0.5 0.5 0.0 1.0", "b0.txt, line 2: has no width or no height"),
    ("0 0.5 0.5 1.0", "b0.txt, line 2: has 4 numbers; a box is `class cx cy w h`"),
    ("cup 0.5 0.5 1.0 1.0", "b0.txt, line 2: 'cup 0.5 0.5 1.0 1.0' is not all numbers"),
    ("0 nan 0.5 1.0 1.0", "b0.txt, line 2: reaches from"),
    ("2 0.5 0.5 1.0 1.0", r"b0.txt, line 2: class id 2 has no name in .*data.yaml"),
    ("0.5 0.5 0.5 1.0 1.0", "b0.txt, line 2: class id 0.5 has no name"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LABELS)
def test_bad_labels_are_named_with_their_line(line: str, message: str, tmp_path: Path) -> None:
    folder = yolo_folder(tmp_path, 1)
    (folder / "labels" / "train" / "b0.txt").write_text(f"1 0.5 0.5 0.2 0.2\n{line}\n")
    with pytest.raises(DataError, match=message):
        read_annotated_images(folder)
    images, left_out = read_annotated_images(folder, on_bad_row="skip")
    assert [p.name for p in images] == ["train/a0.png", "train/c0.png"]
    assert len(left_out) == 1


def test_bad_folders_are_named(tmp_path: Path) -> None:
    folder = yolo_folder(tmp_path / "data", 1)
    (folder / "labels" / "train" / "a0.txt").write_text("\n")
    with pytest.raises(DataError, match=r"a0.txt is empty"):
        read_annotated_images(folder)
    (folder / "labels" / "train" / "a0.txt").unlink()
    assert read_annotated_images(folder)[1] == ["train/a0.png: has no labels."]
    (folder / "images" / "train" / "b0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"b0.png cannot be decoded"):
        read_annotated_images(folder)
    (folder / "data.yaml").write_text("names: 3\n")
    with pytest.raises(DataError, match="has no names"):
        read_annotated_images(folder)
    (folder / "data.yaml").unlink()
    with pytest.raises(DataError, match="says what its ids mean; give --names"):
        read_annotated_images(folder)
    shutil.rmtree(folder / "labels")
    with pytest.raises(DataError, match="has no labels folder: give --boxes or --masks"):
        read_annotated_images(folder)
    with pytest.raises(DataError, match="give one of them"):
        read_annotated_images(folder, boxes=folder, masks=folder)
    (folder / "other").mkdir()
    (folder / "data.yaml").write_text("names: {0: apple}\n")
    with pytest.raises(DataError, match=r"no image of .*images has labels in .*other"):
        read_annotated_images(folder, boxes=folder / "other", on_bad_row="skip")


class _Cropping:
    """A processor that resizes the shorter side and crops the middle, as CLIP's does."""

    def __init__(self) -> None:
        from transformers import CLIPImageProcessorPil

        square = {"height": IMAGE_PX, "width": IMAGE_PX}
        self.image_processor = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_PX}, crop_size=square)


def test_a_mask_is_processed_like_its_image(trained: Path) -> None:
    """Resized or cropped, the mask of a white area covers the white pixels that the encoder sees."""
    white = np.zeros((20, 60), bool)
    white[5:15, 10:35] = True
    image = Image.fromarray(white).convert("RGB")
    model, processor = load_mllm(trained / "3-sft")
    for used, share in ((processor, white.mean()), (_Cropping(), white[:, 20:40].mean())):
        mask = seen_mask(model.config, used, white)  # type: ignore[arg-type]
        seen = np.asarray(seen_image(model.config, used, image))[..., 0]  # type: ignore[arg-type]
        assert mask.shape == (IMAGE_PX, IMAGE_PX)
        assert np.array_equal(mask, seen >= 128)
        assert mask.mean() == pytest.approx(share, abs=0.06)


def test_targets_that_the_crop_cuts_off_are_left_out_with_a_message(trained: Path, tmp_path: Path) -> None:
    folder = yolo_folder(tmp_path, 1)
    (folder / "labels" / "train" / "a0.txt").write_text("0 0.05 0.5 0.1 1.0\n1 0.5 0.5 0.5 1.0\n")
    images, left_out = read_annotated_images(folder)
    config = mllm_config(trained / "3-sft")
    targets = list(image_targets(images[:1], config, _Cropping(), Wording(), left_out))  # type: ignore[arg-type]
    assert [t.pair.question for t in targets] == ["Is there a cup?"]
    assert left_out == ["train/a0.png: apple is smaller than a pixel of what the encoder sees, or outside."]


def test_wording() -> None:
    pair = Wording().pair("apple")
    assert (pair.question, pair.chosen, pair.rejected) == (
        "Is there an apple?",
        "Yes, there is an apple.",
        "No, there is no apple.",
    )
    with pytest.raises(ProbeError, match=r"use \{name\}, \{article\}"):
        Wording(question="Is there {colour} {name}?").pair("apple")


def test_localisation_of_a_folder(trained: Path, tmp_path: Path) -> None:
    folder = yolo_folder(tmp_path / "fruit", 4)
    results, left_out = localize_folder(trained / "3-sft", folder, explains=["answer"])
    assert left_out == []
    assert [r.task for r in results] == [f"fruit/localisation/{m} of answer" for m in ("gradcam", "gradient")
                                         for _ in range(3)]  # fmt: skip
    assert {r.n for r in results} == {9}  # twelve images, a quarter for validation
    assert {r.partner for r in results} == {"tiny/3-sft"}
    assert all(r.ci95[0] <= r.value <= r.ci95[1] for r in results)
    assert results[0].example_scores is not None
    targets = int(results[0].example_scores[:, 1].sum())
    assert f"; {targets} targets, boxes, 'Is there {{article}} {{name}}?', 3 images" in results[0].protocol
    again, _ = localize_folder(trained / "3-sft", folder, explains=["answer"])
    assert [r.value for r in again] == [r.value for r in results]
    assert {r.data_sha256 for r in again} == {results[0].data_sha256}
    random, _ = localize_folder(trained / "3-sft", folder, explains=["answer"], random_vision=True)
    assert random[0].data_sha256 == results[0].data_sha256  # the same items, so they can be compared item by item
    assert random[0].encoder_sha256 != results[0].encoder_sha256
    assert [r.value for r in random] != [r.value for r in results]
    (folder / "labels" / "train" / "a0.txt").write_text("0 0.25 0.5 0.4 1.0\n")
    moved, _ = localize_folder(trained / "3-sft", folder, explains=["answer"])
    assert moved[0].data_sha256 != results[0].data_sha256
    image = min(file for file in (folder / "images").rglob("*") if file.is_file())
    Image.new("RGB", Image.open(image).size, "red").save(image)
    repainted, _ = localize_folder(trained / "3-sft", folder, explains=["answer"])
    assert repainted[0].data_sha256 != moved[0].data_sha256


def test_values_are_means_over_targets_and_intervals_over_images(trained: Path) -> None:
    """Two targets per image give one row of scores per image, and the mean is over all targets."""
    from pivot_hub.data.synthetic import ShapesDataset
    from pivot_hub.probes.run import probe_targets

    model, processor = load_mllm(trained / "3-sft")
    targets = probe_targets(ShapesDataset(image_px=IMAGE_PX), "test", 6)
    metadata = {"encoder": "x", "encoder_sha256": "0", "feature_layer": -2}
    alone = localize(
        model.eval(), processor, None, {"validation": targets[:2], "test": targets}, metadata, explains=["answer"]
    )
    paired = [Target(t.pair, t.rendered, str(i // 2)) for i, t in enumerate(targets)]
    joined = localize(
        model.eval(), processor, None, {"validation": targets[:2], "test": paired}, metadata, explains=["answer"]
    )
    assert [r.value for r in joined] == pytest.approx([r.value for r in alone])
    assert ({r.n for r in alone}, {r.n for r in joined}) == ({6}, {3})


def test_random_vision_changes_the_tower_alone(trained: Path) -> None:
    model, _ = load_mllm(trained / "3-sft")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    randomise_vision(model, 3)
    assert torch.equal(state, torch.get_rng_state())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all("vision_tower" in k for k in changed)
    other, _ = load_mllm(trained / "3-sft")
    randomise_vision(other, 3)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


def test_what_cannot_be_localised_is_refused(trained: Path, tmp_path: Path) -> None:
    folder = yolo_folder(tmp_path, 1)
    with pytest.raises(ProbeError, match="give at least 4"):
        localize_folder(trained / "3-sft", folder)
    with pytest.raises(ProbeError, match="give --reference"):
        localize_folder(trained / "3-sft", folder, explains=["dpo"])
    with pytest.raises(ProbeError, match="give one or more of answer, sft, dpo"):
        localize_folder(trained / "3-sft", folder, explains=["loss"])
    with pytest.raises(DataError, match="give one of them"):
        localize_folder(trained / "3-sft", folder, LabelFiles(boxes=folder, masks=folder))


def test_command_writes_results_and_nothing_after_an_error(trained: Path, tmp_path: Path) -> None:
    folder = yolo_folder(tmp_path / "fruit")
    command = ["localize", str(trained / "3-dpo"), "--data", str(folder)]
    command += ["--explain", "answer,dpo", "--reference", str(trained / "2-instruct")]
    done = CliRunner().invoke(app, ["--debug", *command, "--json", str(tmp_path / "r.json")])
    assert done.exit_code == 0, done.output
    results = read_results(tmp_path / "r.json")
    assert len(results) == 12
    assert all(r.example_scores is not None for r in results)
    assert "fruit/localisation/gradient of dpo" in done.output
    assert str(tmp_path) not in (tmp_path / "r.json").read_text()
    (folder / "labels" / "train" / "a0.txt").write_text("5 0.5 0.5 1 1\n")
    bad = CliRunner().invoke(app, ["--debug", *command, "--json", str(tmp_path / "s.json")])
    assert isinstance(bad.exception, DataError)
    assert "a0.txt, line 1: class id 5 has no name" in str(bad.exception)
    assert not (tmp_path / "s.json").exists()


def test_the_page_shows_the_recorded_results() -> None:
    """Every number of the table is in the records, and all records have the same targets."""
    root = Path(__file__).parents[3]
    recorded = {
        name: read_results(root / "recipes" / "shapes" / "real" / f"localisation-coco128-{name}.json")
        for name in ("base", "sft", "dpo", "random")
    }
    assert len({r.data_sha256 for results in recorded.values() for r in results}) == 1
    assert len({results[0].encoder_sha256 for results in recorded.values()}) == 4
    page = (root / "pivot_hub" / "probes" / "README.md").read_text()
    for row in zip(*recorded.values(), strict=True):
        cells = [f"{r.value:.1f} [{r.ci95[0]:.1f}, {r.ci95[1]:.1f}]" for r in row]
        assert f"| {' | '.join([row[0].task.split('/')[-1], row[0].metric, *cells])} |" in page
        assert f"{row[0].n} images" in page
        assert all(r.example_scores is not None and len(r.example_scores) == r.n for r in row)
        assert all(r.ci95[0] < 18.2 for r in row)
    p_values = {
        other: [_p_value(a, b) for a, b in zip(recorded["dpo"], recorded[other], strict=True)]
        for other in ("sft", "random")
    }
    assert round(min(p_values["sft"]), 2) == 0.04
    assert round(min(p_values["random"]), 4) == 0.0001


def _p_value(first: ProbeResult, second: ProbeResult) -> float:
    assert first.example_scores is not None
    assert second.example_scores is not None
    return paired_difference(first.example_scores, second.example_scores, statistic_of(first.metric), seed=0).p_value


def test_towers_of_native_resolution_and_tiles_are_scored_in_the_shape_that_they_see(tmp_path: Path) -> None:
    """Random weights of the tower change the maps, and the merger, which belongs to the projector, stays."""
    folder = yolo_folder(tmp_path / "data")
    for name in ("qwen2_5_vl", "llava_onevision"):
        make_mllm(tmp_path / name, name)
        add_processor(tmp_path / name, name)
        results, left_out = localize_folder(tmp_path / name, folder, explains=["answer"])
        assert left_out == []
        assert {r.metric for r in results} == {"pointing_accuracy", "energy_inside", "iou"}
        assert all(0 <= r.value <= 100 for r in results)
        random, _ = localize_folder(tmp_path / name, folder, explains=["answer"], random_vision=True)
        assert random[0].encoder_sha256 != results[0].encoder_sha256
    model, _ = load_mllm(tmp_path / "qwen2_5_vl")
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    randomise_vision(model, seed=1)
    changed = {key for key, weight in model.state_dict().items() if not torch.equal(weight, before[key])}
    assert "model.visual.blocks.0.attn.qkv.weight" in changed
    assert not any("merger" in key or "language_model" in key for key in changed)
