"""Segmentation of images with masks: layouts, bad files, scores equal to scikit-learn's, reported part read last."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score, recall_score
from torch.nn import functional
from typer.testing import CliRunner

from pivot_hub.cli import app
from pivot_hub.data.synthetic import SPLITS, Split
from pivot_hub.encoder.repository import read_encoder
from pivot_hub.errors import DataError, PivotError, ProbeError
from pivot_hub.metrics.mean_iou.mean_iou import mean_iou, mean_recall, pixel_accuracy
from pivot_hub.probes.features import patch_features
from pivot_hub.probes.result import ProbeResult, read_results
from pivot_hub.probes.segmentation.heads import Head, Scale, Setting, count_pixels, fit_heads, scale_of
from pivot_hub.probes.segmentation.labelled_masks import MaskData, MaskedImage, decode_ids, open_masks, read_names
from pivot_hub.probes.segmentation.protocols import (
    SegmentationOptions,
    at_size,
    cached_encode,
    per_class,
    segment_folder,
    segment_masks,
    token_dtype,
)

CONDITIONS: dict[str, Any] = {"feature_layer": -2, "encoder": "test", "encoder_sha256": "0"}
REAL = Path(os.environ.get("PIVOT_REAL_DATA", Path(__file__).parents[4] / "shared" / "data"))
PX, GRID, CLASSES, VOID = 32, 4, 4, 9  # image and patches per side of the test encoder; ids of the test masks


@dataclass(frozen=True)
class MemoryImage(MaskedImage):
    """A masked image in memory that records when it is read."""

    pixels: Image.Image
    ids: np.ndarray = field(repr=False)
    reads: list[str] = field(repr=False)

    def open_image(self) -> Image.Image:
        self.reads.append(self.name)
        return self.pixels

    def image_digest(self) -> bytes:
        return hashlib.sha256(self.pixels.tobytes()).digest()

    def open_ids(self) -> np.ndarray:
        self.reads.append(self.name)
        return self.ids


def make_data(counts: Sequence[int] = (24, 8, 10), seed: int = 0) -> tuple[MaskData, list[str]]:
    """Build masks larger than the encoder's image and not square; each patch has one class, a corner is void."""
    rng, reads = np.random.default_rng(seed), list[str]()
    parts: dict[Split, Sequence[MaskedImage]] = {}
    for split, count in zip(SPLITS, counts, strict=True):
        images: list[MaskedImage] = []
        for i in range(count):
            ids = np.kron(rng.integers(CLASSES, size=(GRID, GRID)), np.ones((12, 16), int)).astype(np.int32)
            ids[:2, :3] = VOID
            pixels = Image.fromarray(rng.integers(256, size=(*ids.shape, 3), dtype=np.uint8))
            images.append(MemoryImage(f"{split}/{i}", _Nowhere(), _Nowhere(), pixels, ids, reads))
        parts[split] = images
    return MaskData("tiny", parts, "val", frozenset({VOID})), reads


class _Nowhere:
    def open(self) -> Path:
        raise AssertionError("an image in memory has no file")

    def stamp(self) -> tuple[str, ...]:
        return ("in memory",)


def knowing(images: Sequence[MaskedImage], px: int) -> np.ndarray:
    """Return tokens that encode the class of their patch by a fixed linear map."""
    mix = np.random.default_rng(7).normal(size=(CLASSES, 12)).astype(np.float32)
    classes = np.stack([image.ids[6::12, 8::16] for image in images if isinstance(image, MemoryImage)])
    return mix[classes.reshape(len(images), -1)]


def noise(images: Sequence[MaskedImage], px: int) -> np.ndarray:
    return np.random.default_rng(len(images)).normal(size=(len(images), GRID * GRID, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def encoder(parts: Path) -> tuple[Any, Any]:
    return read_encoder(parts / "vision")


def probe(
    encoder: tuple[Any, Any],
    data: MaskData,
    encode: Any = None,
    log: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> dict[str, ProbeResult]:
    settings = SegmentationOptions(**{"steps": 150, **options})
    results, skipped = segment_masks(*encoder, data, conditions=CONDITIONS, options=settings, encode=encode, log=log)
    assert not skipped
    return {f"{r.task.split('/', 2)[2]} {r.metric}": r for r in results}


def segment(
    encoder: tuple[Any, Any], data: Path, masks: Path | None = None, **options: Any
) -> tuple[list[ProbeResult], list[str]]:
    settings = SegmentationOptions(**options)
    return segment_folder(*encoder, data, masks=masks, conditions=CONDITIONS, options=settings)


def test_tokens_that_know_the_class_score_high_and_noise_scores_chance(encoder: tuple[Any, Any]) -> None:
    data, _ = make_data()
    good, bad = (probe(encoder, data, encode=e) for e in (knowing, noise))
    for kind in ("linear", "mlp"):
        assert good[f"{kind}/{PX}px mean_iou"].value > 85  # upsampling blurs the borders of patches
        assert good[f"{kind}/{PX}px pixel_accuracy"].value > 93
        assert bad[f"{kind}/{PX}px mean_recall"].value == pytest.approx(100 / CLASSES, abs=5)
        assert bad[f"{kind}/{PX}px mean_iou"].value < 20
    result = good[f"linear/{PX}px mean_iou"]
    assert (result.n, result.split, result.task) == (10, "val", f"segmentation/tiny/linear/{PX}px")
    assert "4 x 4 patch tokens, images resized to 32 x 32 px" in result.protocol
    assert "ids 9 ignored" in result.protocol


def test_shuffled_labels_give_chance(encoder: tuple[Any, Any]) -> None:
    data, _ = make_data()
    rng = np.random.default_rng(3)

    def shuffled(images: Sequence[MaskedImage], px: int) -> np.ndarray:
        tokens = knowing(images, px)
        return rng.permutation(tokens.reshape(-1, 12)).reshape(tokens.shape)

    results = probe(encoder, data, encode=shuffled)
    for kind in ("linear", "mlp"):
        assert results[f"{kind}/{PX}px mean_recall"].value == pytest.approx(100 / CLASSES, abs=5)


def test_reported_part_is_opened_after_everything_is_chosen(encoder: tuple[Any, Any]) -> None:
    data, reads = make_data((6, 2, 3))

    def log(line: str) -> None:
        if "chosen" in line:
            reads.append("chosen")

    probe(encoder, data, image_px=[PX, 2 * PX], steps=3, log=log)
    first = next(i for i, name in enumerate(reads) if name.startswith("test"))
    assert reads.count("chosen") == 2
    assert {name.split("/")[0] for name in reads[:first]} == {"train", "validation", "chosen"}
    assert {name.split("/")[0] for name in reads[first:]} == {"test"}


def test_reported_masks_change_no_setting(encoder: tuple[Any, Any]) -> None:
    data, _ = make_data()
    other, _ = make_data(seed=1)
    mixed = MaskData("tiny", {**data.parts, "test": other.parts["test"]}, "val", data.ignored)
    logs: list[list[str]] = [[], []]
    one, two = (probe(encoder, d, encode=noise, log=lines.append) for d, lines in zip((data, mixed), logs, strict=True))
    assert logs[0] == logs[1]
    key = f"mlp/{PX}px mean_iou"
    assert one[key].value != two[key].value
    assert one[key].data_sha256 != two[key].data_sha256


def test_same_seed_same_numbers(encoder: tuple[Any, Any]) -> None:
    data, _ = make_data((6, 2, 3))
    one, two, other = (probe(encoder, data, steps=20, seed=seed) for seed in (0, 0, 1))
    values, again, changed = ([(r.value, r.ci95) for r in results.values()] for results in (one, two, other))
    assert values == again
    assert values != changed


def test_each_size_has_its_own_tokens_and_results(encoder: tuple[Any, Any]) -> None:
    data, _ = make_data((6, 2, 3))
    results = probe(encoder, data, image_px=[PX, 64], steps=3, heads=["linear"])
    assert [k.split(" ")[0] for k in results] == [f"linear/{px}px" for px in (PX, 64) for _ in range(3)]
    assert "8 x 8 patch tokens, images resized to 64 x 64 px" in results["linear/64px mean_iou"].protocol
    image = data.parts["train"][0].open_image()
    assert [patch_features(*at_size(*encoder, px), [image]).shape[1] for px in (PX, 64)] == [16, 64]
    for px in (36, 0):
        with pytest.raises(ProbeError, match=rf"takes no images of {px} px .*its own size is 32"):
            probe(encoder, data, image_px=[px])


def test_pixels_equal_those_of_a_processor_that_resizes_to_a_square_too(encoder: tuple[Any, Any]) -> None:
    image = make_data((1, 1, 1))[0].parts["train"][0].open_image()
    assert image.size[0] != image.size[1]
    assert np.array_equal(patch_features(*at_size(*encoder, PX), [image]), patch_features(*encoder, [image]))


def test_scores_are_those_of_scikit_learn() -> None:
    rng, k = np.random.default_rng(0), 7
    truth = rng.integers(-1, k, size=(5, 30, 40))
    truth[truth == 3] = 2  # a class that never occurs
    predicted = np.where(rng.random(truth.shape) < 0.5, truth, rng.integers(0, 3, size=truth.shape)).clip(0)
    sums = np.stack([count_pixels(p, t, k) for p, t in zip(predicted, truth, strict=True)]).sum(0)
    t, p = truth[truth >= 0], predicted[truth >= 0]
    table = confusion_matrix(t, p, labels=range(k))
    assert np.array_equal(sums, [table.diagonal(), table.sum(0), table.sum(1)])
    seen = [i for i in range(k) if i != 3]
    assert mean_iou(sums[None])[0] == pytest.approx(jaccard_score(t, p, labels=seen, average="macro"))
    assert mean_recall(sums[None])[0] == pytest.approx(recall_score(t, p, labels=seen, average="macro"))
    assert pixel_accuracy(sums[None])[0] == pytest.approx((t == p).mean())


def test_scores_of_single_classes() -> None:
    example_scores = np.array([[[3, 0, 0, 0], [4, 0, 2, 0], [5, 1, 0, 0]]])  # correct, predicted, true
    assert per_class(example_scores, {0: "sky"}) == [
        {"id": 0, "name": "sky", "pixels": 5, "iou": 50.0, "recall": 60.0},
        {"id": 1, "name": "1", "pixels": 1, "iou": 0.0, "recall": 0.0},
        {"id": 2, "name": "2", "pixels": 0, "iou": 0.0, "recall": None},
    ]


def test_prediction_is_that_of_all_logits_upsampled_at_once() -> None:
    rng = np.random.default_rng(0)
    ids = np.arange(40) * 3
    head = Head("mlp", Scale(np.zeros(8), np.ones(8)), ids, seed=0)
    torch.nn.init.normal_(list(head.parameters())[-2])  # the last layer starts at zero
    tokens = rng.normal(size=(2, 16, 8)).astype(np.float32)
    with torch.no_grad():
        logits = functional.interpolate(head(torch.from_numpy(tokens)), size=(21, 13), mode="bilinear")
    assert np.array_equal(head.predict(tokens, (21, 13)), ids[logits.argmax(1).numpy()])


def test_tokens_take_half_the_disk_where_rounding_is_small_against_their_spread() -> None:
    """float16 has 11 bits: enough for a channel around zero, too few for one that varies little around a large mean."""
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(4, 16, 8)).astype(np.float32)
    assert token_dtype(tokens) == np.float16
    assert token_dtype(tokens + 10) == np.float16
    assert token_dtype(1e-9 * tokens) == np.float32  # below float16's smallest number
    for mean in (100, 1e5):  # rounded to 1/16, and beyond float16's largest number
        shifted = tokens.copy()
        shifted[..., 3] += mean
        assert token_dtype(shifted) == np.float32
    sums = [head_logits(tokens.astype(dtype)) for dtype in (np.float16, np.float32)]
    assert np.abs(sums[0] - sums[1]).max() < 0.01 * sums[1].std()


def head_logits(tokens: np.ndarray) -> np.ndarray:
    head = Head("mlp", scale_of(tokens, range(len(tokens))), np.arange(3), seed=0)
    torch.nn.init.normal_(list(head.parameters())[-2], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits: np.ndarray = head(torch.from_numpy(tokens)).numpy()
    return logits


def test_heads_fitted_from_disk_are_those_fitted_from_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = (5 + 1e-3 * rng.normal(size=(40, 16, 6))).astype(np.float32)  # a spread far below the mean
    labels = rng.integers(-1, 3, size=(40, 8, 8)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    rows = range(5, 40)
    scale = scale_of(mapped, rows)
    flat = tokens[5:].reshape(-1, 6).astype(np.float64)
    np.testing.assert_allclose(scale.mean, flat.mean(0))
    np.testing.assert_allclose(scale.spread, flat.std(0), rtol=1e-4)
    setting = [Setting("mlp", 1e-2, 1e-2)]
    one, two = (fit_heads(setting, t, labels, rows, scale, steps=5)[0].state_dict() for t in (mapped, tokens))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_heads_fitted_together_are_those_fitted_alone() -> None:
    """Candidates share only their batches; none may change the weights of another."""
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(20, 16, 6)).astype(np.float32)
    labels = rng.integers(0, 3, size=(20, 8, 8)).astype(np.int32)
    settings = [Setting("linear", 1e-2, 1.0), Setting("mlp", 1e-3, 1e-2)]
    scale = scale_of(tokens, range(20))
    together = fit_heads(settings, tokens, labels, range(20), scale, steps=5)
    for setting, head in zip(settings, together, strict=True):
        alone = fit_heads([setting], tokens, labels, range(20), scale, steps=5)[0].state_dict()
        assert all(torch.equal(v, alone[k]) for k, v in head.state_dict().items())
        assert head.predict(tokens[:1], (8, 8)).any()


def test_ignored_pixels_teach_nothing() -> None:
    tokens = np.eye(3, dtype=np.float32)[np.random.default_rng(0).integers(2, size=(12, 16))]
    labels = np.kron(tokens.argmax(2).reshape(12, 4, 4), np.ones((1, 2, 2), int)).astype(np.int32)
    tokens[6:], labels[6:] = np.eye(3, dtype=np.float32)[2], -1
    head = fit_heads(
        [Setting("linear", 1e-2, 1e-2)], tokens, labels, range(12), Scale(np.zeros(3), np.ones(3)), steps=9
    )
    weight = next(head[0].parameters())
    assert weight[:, :2].abs().min() > 0
    assert torch.equal(weight[:, 2], torch.zeros(2))


# Data sets on disk


def write_masked_image(folder: Path, image: str, mask: str, seed: int, ids: Sequence[int] = (0, 1, 2, 255)) -> None:
    """Write an image of 20 x 16 px and its mask, with ids in vertical stripes that the image's colours follow."""
    stripes = np.repeat(np.array(ids, np.uint8), 5)[None].repeat(16, 0)
    colours = (stripes[..., None] * np.array([60, 90, 120]) % 256 + seed % 7).astype(np.uint8)
    for name in (image, mask):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colours).save(folder / image)
    Image.fromarray(stripes).save(folder / mask)


def parted(image: str, mask: str, names: Sequence[str] = ("train", "val")) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        for part, count in zip(names, (10, 4), strict=True):
            for i in range(count):
                write_masked_image(folder, image.format(part=part, i=i), mask.format(part=part, i=i), i)
        return {"data": folder}

    return write


def scene_parse(folder: Path) -> dict[str, Any]:
    for part, count in (("training", 10), ("validation", 4)):
        for i in range(count):
            name = f"{part}/ADE_{i:08}"
            write_masked_image(folder, f"images/{name}.jpg", f"annotations/{name}.png", i, (0, 1, 2, 150))
    (folder / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t1\t1\t1\twall\n150\t0\t1\t1\t0\tflag\n"
    )
    (folder / "sceneCategories.txt").write_text("ADE_00000000 bathroom\n")
    return {"data": folder}


def flat(folder: Path) -> dict[str, Any]:
    for i in range(10):
        write_masked_image(folder, f"images/city{i % 2}/{i}.jpg", f"masks/city{i % 2}/{i}.png", i)
    return {"data": folder}


def apart(folder: Path) -> dict[str, Any]:
    parted("pixels/{part}/{i}.jpg", "labelled/{part}/{i}.png")(folder)
    return {"data": folder / "pixels", "masks": folder / "labelled"}


def unlabelled_test(folder: Path) -> dict[str, Any]:
    arguments = parted("images/{part}/{i}.jpg", "masks/{part}/{i}.png")(folder)
    (folder / "images" / "test").mkdir()
    shutil.copy(folder / "images" / "train" / "0.jpg", folder / "images" / "test" / "0.jpg")
    return arguments


def packed(kind: str) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        scene_parse(folder / "ADEChallengeData2016")
        archive = shutil.make_archive(str(folder / "ade"), kind, folder, "ADEChallengeData2016")
        return {"data": archive}

    return write


def parquet(folder: Path, saved: bool = False) -> dict[str, Any]:
    drawn = parted("images/{part}/{i}.jpg", "masks/{part}/{i}.png")(folder.with_name("drawn"))["data"]
    folder.mkdir(exist_ok=True)
    splits = {}
    for part, name in (("train", "train"), ("val", "validation")):
        files = sorted((drawn / "images" / part).iterdir())
        rows = {
            "image": [{"bytes": f.read_bytes()} for f in files],
            "annotation": [{"bytes": (drawn / f"masks/{part}/{f.stem}.png").read_bytes()} for f in files],
        }
        features = Features({"image": ImageFeature(), "annotation": ImageFeature()})
        splits[name] = Dataset.from_dict(rows, features=features)
        splits[name].to_parquet(folder / f"{name}-00000-of-00001.parquet")
    if saved:
        shutil.rmtree(folder)
        DatasetDict(splits).save_to_disk(folder)
    return {"data": folder}


LAYOUTS: dict[str, tuple[Callable[[Path], dict[str, Any]], tuple[int, int, int], str]] = {
    "scene-parse": (scene_parse, (8, 2, 4), "val"),
    "camvid": (parted("{part}/{i}.png", "{part}annot/{i}.png"), (8, 2, 4), "val"),
    "images-masks": (parted("images/{part}/{i}.jpg", "masks/{part}/{i}.png"), (8, 2, 4), "val"),
    "no-parts": (flat, (6, 2, 2), "test"),
    "apart": (apart, (8, 2, 4), "val"),
    "unlabelled-test": (unlabelled_test, (8, 2, 4), "val"),
    "zip": (packed("zip"), (8, 2, 4), "val"),
    "tar": (packed("tar"), (8, 2, 4), "val"),
    "parquet": (parquet, (8, 2, 4), "val"),
    "save_to_disk": (partial(parquet, saved=True), (8, 2, 4), "val"),
    "other names of parts": (
        parted("images/{part}/{i}.jpg", "masks/{part}/{i}.png", ("Training", "TEST")),
        (8, 2, 4),
        "test",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_found(layout: str, encoder: tuple[Any, Any], tmp_path: Path) -> None:
    write, counts, reported = LAYOUTS[layout]
    options = write(tmp_path / "set")
    opened = open_masks(**options)
    assert tuple(len(opened.parts[s]) for s in SPLITS) == counts
    assert len({image.name for part in opened.parts.values() for image in part}) == sum(counts)
    assert opened.reported == reported
    assert open_masks(**options, seed=1).parts["train"] != opened.parts["train"]
    for part in opened.parts.values():
        for image in part:
            assert image.open_image().size == image.open_ids().shape[::-1]
    results, skipped = segment(encoder, **options, steps=60, heads=["linear"])
    assert not skipped
    assert results[0].value > 40
    if layout in ("scene-parse", "zip", "tar"):
        assert (opened.classes, opened.ignored, dict(opened.names)) == (
            151,
            frozenset({0, 255}),
            {1: "wall", 150: "flag"},
        )
        assert [c["id"] for c in per_class(_example_scores(results[0]))] == [1, 2, 150]
    else:
        assert [c["id"] for c in per_class(_example_scores(results[0]))] == [0, 1, 2]


def _example_scores(result: ProbeResult) -> np.ndarray:
    assert result.example_scores is not None
    return result.example_scores


def test_packed_and_unpacked_data_are_one(tmp_path: Path, encoder: tuple[Any, Any]) -> None:
    packed("zip")(tmp_path)
    options: dict[str, Any] = {"steps": 5, "heads": ["linear"]}
    results = [segment(encoder, tmp_path / name, **options)[0][0] for name in ("ade.zip", "ADEChallengeData2016")]
    assert results[0].data_sha256 == results[1].data_sha256
    assert results[0].value == results[1].value


def test_palette_and_deep_masks_hold_ids(tmp_path: Path) -> None:
    ids = np.array([[0, 3], [7, 255]], np.uint8)
    palette = Image.fromarray(ids)
    palette.putpalette(list(range(255, -1, -1)) * 3)
    palette.save(tmp_path / "palette.png")
    deep = ids.astype(np.uint16) * 100
    Image.fromarray(deep).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "palette.png") as image:
        assert image.mode == "P"
    assert np.array_equal(decode_ids(_At(tmp_path / "palette.png")), ids)
    assert np.array_equal(decode_ids(_At(tmp_path / "deep.png")), deep)


@dataclass(frozen=True)
class _At:
    path: Path

    def stamp(self) -> tuple[str, ...]:
        return (str(self),)

    def open(self) -> Path:
        return self.path


def test_names_are_read(tmp_path: Path) -> None:
    texts = {
        "a.txt": "sky\nroad\n",
        "a.json": '["sky", "road"]',
        "b.json": '{"id2label": {"0": "sky", "1": "road"}}',
        "c.yaml": "train: {images: x}\nclasses:\n  0: sky\n  1: road\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert read_names(tmp_path / name) == {0: "sky", 1: "road"}
    (tmp_path / "bad.json").write_text('{"sky": 0}')
    for name in ("bad.json", "missing.txt"):
        with pytest.raises(ProbeError, match="no names of classes can be read"):
            read_names(tmp_path / name)


def _rgb(folder: Path) -> None:
    Image.open(folder / "masks/train/3.png").convert("RGB").save(folder / "masks/train/3.png")


def _jpeg(folder: Path) -> None:
    Image.open(folder / "masks/train/3.png").save(folder / "masks/train/3.jpg")
    (folder / "masks/train/3.png").unlink()


def _size(folder: Path) -> None:
    Image.new("L", (20, 15)).save(folder / "masks/train/3.png")


def _cut(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])

    return write


def _absent(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _twice(folder: Path) -> None:
    shutil.copy(folder / "images/train/3.jpg", folder / "images/train/3.png")


ROWS: dict[str, tuple[Callable[[Path], None], str]] = {
    "rgb": (_rgb, r"mask masks/train/3\.png is an image in colour \(RGB\), not class ids; write"),
    "jpeg": (_jpeg, r"mask masks/train/3\.jpg is a JPEG, which blurs ids; write masks as PNG"),
    "size": (_size, r"mask masks/train/3\.png is 20 x 15 px, its image 20 x 16; scale"),
    "corrupt mask": (_cut("masks/train/3.png"), r"mask masks/train/3\.png cannot be decoded .*replace the file"),
    "corrupt image": (_cut("images/train/3.jpg"), r"image images/train/3\.jpg cannot be decoded .*replace the file"),
    "corrupt test image": (_cut("images/val/3.jpg"), r"image images/val/3\.jpg cannot be decoded .*replace the file"),
    "no mask": (_absent("masks/train/3.png"), r"image images/train/3\.jpg has no mask; add what is missing, or"),
    "no image": (_absent("images/val/3.jpg"), r"mask masks/val/3\.png has no image; add what is missing, or"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path: Path = parted("images/{part}/{i}.jpg", "masks/{part}/{i}.png")(tmp_path / "set")["data"]
    return path


def test_folders_that_are_no_parts_beside_parts_are_refused(tmp_path: Path) -> None:
    parted("images/{part}/{i}.jpg", "masks/{part}/{i}.png", ("train", "holdout"))(tmp_path / "set")
    with pytest.raises(ProbeError, match="'train' is a part of the data, and 'holdout' beside it is none"):
        open_masks(tmp_path / "set")


def test_the_hash_covers_the_images_and_copies_are_counted(encoder: tuple[Any, Any], folder: Path) -> None:
    for i, file in enumerate(sorted((folder / "images" / "val").iterdir())):
        Image.new("RGB", (20, 16), (40 * i, 0, 0)).save(file)
    before, _ = segment(encoder, folder, heads=["linear"], steps=2)
    assert "copies" not in before[0].protocol
    shutil.copy(folder / "images" / "train" / "3.jpg", folder / "images" / "val" / "3.jpg")
    lines: list[str] = []
    settings = SegmentationOptions(heads=["linear"], steps=2)
    after, _ = segment_folder(*encoder, folder, conditions=CONDITIONS, options=settings, log=lines.append)
    assert before[0].data_sha256 != after[0].data_sha256
    assert "; 1 of the 4 reported images are copies of fitted images" in after[0].protocol
    assert any(line.startswith("warning: set: 1 of the 4 reported images are copies") for line in lines)


def test_the_floor_of_position_alone_is_given(encoder: tuple[Any, Any]) -> None:
    data, _ = make_data((8, 3, 4))
    for part in data.parts.values():
        for image in part:
            assert isinstance(image, MemoryImage)
            image.ids[:] = 1
            image.ids[: len(image.ids) // 2] = 0
    results = probe(encoder, data, encode=noise, steps=2, heads=["linear"])
    assert "the commonest class alone 25.0, position alone 100.0" in results[f"linear/{PX}px mean_iou"].protocol


def test_masks_of_0_and_255_are_told_how_to_count_255(encoder: tuple[Any, Any], folder: Path) -> None:
    for file in (folder / "masks").rglob("*.png"):
        Image.fromarray(np.where(np.arange(16)[:, None] < 8, np.zeros((16, 20)), 255).astype(np.uint8)).save(file)
    with pytest.raises(ProbeError, match=r'hold 0 besides the ignored 255; .* or give --ignore "" to count all'):
        segment(encoder, folder, steps=2)
    results, _ = segment(encoder, folder, steps=2, heads=["linear"], ignore_ids=())
    assert len(results) == 3


@pytest.mark.parametrize("kind", ROWS)
def test_bad_files_stop_the_probe_or_are_counted(kind: str, folder: Path, encoder: tuple[Any, Any]) -> None:
    spoil, message = ROWS[kind]
    spoil(folder)
    options: dict[str, Any] = {"steps": 3, "heads": ["linear"]}
    with pytest.raises(DataError, match=message):
        segment(encoder, folder, **options)
    results, skipped = segment(encoder, folder, **options, on_bad_row="skip")
    assert len(skipped) == 1
    assert str(folder) not in skipped[0]
    assert results[0].n == 4 - ("val" in skipped[0])


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _one_class(folder: Path) -> None:
    for file in (folder / "masks").rglob("*.png"):
        Image.new("L", (20, 16), 1).save(file)


def _all_void(folder: Path) -> None:
    for file in (folder / "masks" / "val").rglob("*.png"):
        Image.new("L", (20, 16), 255).save(file)


def _no_layout(folder: Path) -> None:
    (folder / "masks").rename(folder / "answers")


def _other_names(folder: Path) -> None:
    for file in (folder / "masks").rglob("*.png"):
        file.rename(file.with_name(f"mask-{file.name}"))


def _few(folder: Path) -> None:
    for part in ("images", "masks"):
        shutil.rmtree(folder / part / "train")
        for file in (folder / part / "val").iterdir():
            if int(file.stem) > 2:
                file.unlink()


def _high_id(part: str) -> Callable[[Path], None]:
    return lambda folder: Image.new("L", (20, 16), 7).save(folder / f"masks/{part}/3.png")


def _cut_zip(folder: Path) -> None:
    archive = Path(shutil.make_archive(str(folder.with_name("whole")), "zip", folder))
    shutil.rmtree(folder)
    folder.with_suffix(".zip").write_bytes(archive.read_bytes()[:-200])


WHOLES: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "empty": (_empty, {}, r"set is empty; give a folder"),
    "absent": (shutil.rmtree, {}, r"is no folder, \.zip or \.tar, and no name of a Hub data set"),
    "no layout": (_no_layout, {}, r"its layout of images and masks is unknown; name its folders"),
    "other names": (_other_names, {}, r"no image and mask have the same name"),
    "few": (_few, {}, r"3 images with masks to fit on; a probe needs at least 5"),
    "twice": (_twice, {}, r"3\.jpg and images/train/3\.png have the same name"),
    "one class": (_one_class, {}, r"hold only class 1; a probe needs at least two"),
    "one class is not ignored": (lambda f: None, {"ignore_ids": (0, 1, 255)}, r"hold 2 besides the ignored 0, 1"),
    "none is not ignored": (lambda f: None, {"ignore_ids": (0, 1, 2, 255)}, r"hold no id besides the ignored"),
    "beyond what was fitted": (_high_id("val"), {}, r"mask of val/3 holds id 7, but 3 classes .*--classes"),
    "beyond the given count": (_high_id("train"), {"classes": 5}, r"mask of train/3 holds id 7, but 5 classes"),
    "nothing to report": (_all_void, {}, r"no pixel of val counts; are its masks empty"),
    "unknown head": (lambda f: None, {"heads": ["conv"]}, r"head 'conv' is not known; give linear or mlp"),
    "on_bad_row": (lambda f: None, {"on_bad_row": "ignore"}, r"on_bad_row is 'ignore'"),
    "hub": (lambda f: None, {"data": "nobody/nothing"}, r"'nobody/nothing' cannot be loaded"),
}


@pytest.mark.parametrize("kind", WHOLES)
def test_data_that_cannot_be_measured_is_named(kind: str, folder: Path, encoder: tuple[Any, Any]) -> None:
    spoil, options, message = WHOLES[kind]
    spoil(folder)
    settings = {"data": folder, "steps": 3, **options}
    with pytest.raises(PivotError, match=message):
        segment(encoder, **settings)


def test_damaged_archive_is_named(folder: Path) -> None:
    _cut_zip(folder)
    with pytest.raises(DataError, match=r"set\.zip: not a whole archive"):
        open_masks(folder.with_suffix(".zip"))


def test_damaged_member_of_an_archive_is_named(folder: Path, encoder: tuple[Any, Any], tmp_path: Path) -> None:
    archive_file = tmp_path / "set.zip"
    with zipfile.ZipFile(archive_file, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(f for f in folder.rglob("*") if f.is_file()):
            archive.write(file, file.relative_to(folder))
        at = archive.getinfo("masks/train/3.png").header_offset + 60
    data = bytearray(archive_file.read_bytes())
    data[at : at + 20] = bytes(20)
    archive_file.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"masks/train/3\.png"):
        segment(encoder, archive_file, steps=3)


def test_features_that_are_not_finite_are_named(folder: Path, parts: Path) -> None:
    model, processor = read_encoder(parts / "vision")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ProbeError, match=r"features of train/\d are not finite; check its weights"):
        segment((model, processor), folder, steps=3)


def test_columns_of_tables_are_named(tmp_path: Path) -> None:
    folder: Path = parquet(tmp_path / "set")["data"]
    table = Dataset.from_parquet(str(folder / "train-00000-of-00001.parquet"))
    assert isinstance(table, Dataset)
    shutil.rmtree(folder)
    folder.mkdir()
    table.rename_column("annotation", "depth").to_parquet(folder / "train-00000-of-00001.parquet")
    with pytest.raises(ProbeError, match="its image columns are image, depth; a probe needs an image and one mask"):
        open_masks(folder)


@pytest.fixture
def command(folder: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("pivot_hub.probes.segmentation.heads.MIN_STEPS", 20)
    monkeypatch.setattr("pivot_hub.probes.segmentation.heads.EPOCHS", 1)

    def run(*arguments: str) -> Any:
        fixed = ["segment", str(parts / "vision"), "--data", str(folder), "--json", str(tmp_path / "out" / "r.json")]
        return CliRunner().invoke(app, [*fixed, *arguments])

    return run


def test_command_writes_results_scores_and_classes(command: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("sky\nroad\ntree\n")
    (folder / "masks/train/3.png").unlink()
    done = command("--image-px", "32,64", "--names", str(tmp_path / "names.txt"), "--on-bad-row", "skip")
    assert done.exit_code == 0, done.output
    results = read_results(tmp_path / "out" / "r.json")
    assert {r.task for r in results} == {f"segmentation/set/{h}/{px}px" for h in ("linear", "mlp") for px in (32, 64)}
    assert all(_example_scores(r).shape == (4, 3, 3) for r in results)
    extra = json.loads((tmp_path / "out" / "r.classes.json").read_text())
    assert extra["skipped"] == ["image images/train/3.jpg has no mask"]
    assert [c["name"] for c in extra["classes"]["segmentation/set/mlp/64px"]] == ["sky", "road", "tree"]
    mean = np.mean([c["iou"] for c in extra["classes"]["segmentation/set/mlp/64px"]])
    value = next(r.value for r in results if r.task.endswith("mlp/64px") and r.metric == "mean_iou")
    assert mean == pytest.approx(value, abs=0.01)
    assert not any(str(tmp_path) in f.read_text() for f in (tmp_path / "out").glob("*.json"))


def test_command_has_an_example() -> None:
    text = " ".join(CliRunner().invoke(app, ["segment", "--help"], env={"COLUMNS": "200"}).output.split())
    assert "Example: pivot segment hub/pivot/shapes-dpo --data ADEChallengeData2016" in text


def test_command_refuses_in_one_sentence_and_writes_nothing(command: Any, tmp_path: Path) -> None:
    for arguments, message in (
        (("--ignore", "void"), "--ignore 'void': give numbers"),
        (("--image-px", "33"), "takes no images of 33 px"),
        (("--classes", "2"), "but 2 classes have ids 0 to 1"),
    ):
        done = command(*arguments)
        assert isinstance(done.exception, PivotError)
        assert message in str(done.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not REAL.is_dir(), reason=f"real files are not here: {REAL.name} (set PIVOT_REAL_DATA)")
def test_camvid_and_coco_masks(encoder: tuple[Any, Any]) -> None:
    options: dict[str, Any] = {"steps": 20, "heads": ["linear"]}
    camvid, skipped = segment(encoder, REAL / "segmentation" / "camvid", ignore_ids=(11,), **options)
    assert not skipped
    assert (camvid[0].n, _example_scores(camvid[0]).shape) == (20, (20, 3, 11))
    coco = REAL / "coco128"
    names = read_names(coco / "semantic_segmentation" / "config.yaml")
    masks: dict[str, Any] = {"masks": coco / "semantic_segmentation" / "masks", "names": names, "ignore_ids": (0,)}
    masks |= {**options, "on_bad_row": "skip"}
    results, skipped = segment(encoder, coco / "images", **masks)
    assert results[0].task == "segmentation/coco128/linear/32px"
    assert (results[0].n, len(skipped)) == (20, 28)


def test_the_pages_table_is_that_of_the_records() -> None:
    root = Path(__file__).parents[3]
    page = (root / "pivot_hub" / "probes" / "README.md").read_text()
    rows = table_rows(root / "recipes" / "shapes" / "real")
    assert len(rows) == 6
    for row in rows:
        assert row in page


def table_rows(folder: Path) -> list[str]:
    """Build the rows of the page's table: one for each data set, size and head, with one column per encoder."""
    cells: dict[str, list[str]] = {}
    for data in ("camvid", "coco128"):
        hashes = set()
        for encoder in ("base", "sft", "dpo", "random"):
            by_key = {(r.task, r.metric): r for r in read_results(folder / f"segmentation-{data}-{encoder}.json")}
            for task in dict.fromkeys(task for task, _ in by_key):
                iou, accuracy, recall = (by_key[task, m] for m in ("mean_iou", "pixel_accuracy", "mean_recall"))
                low, high = iou.ci95
                text = f"{iou.value:.1f} [{low:.1f}, {high:.1f}], {accuracy.value:.1f}, {recall.value:.1f}"
                cells.setdefault(task, []).append(text)
                hashes.add(iou.data_sha256)
        assert len(hashes) == 1  # the same split and masks, so that encoders can be compared item by item
    return [f"| {' | '.join([*task.split('/')[1:], *texts])} |" for task, texts in cells.items()]


def test_what_the_page_says_about_encoders_holds_in_paired_comparisons() -> None:
    folder = Path(__file__).parents[3] / "recipes" / "shapes" / "real"
    recorded = {
        (data, encoder): [
            r for r in read_results(folder / f"segmentation-{data}-{encoder}.json") if r.metric == "mean_iou"
        ]
        for data in ("camvid", "coco128")
        for encoder in ("base", "sft", "dpo", "random")
    }
    counts = np.random.default_rng(0).multinomial(20, np.full(20, 1 / 20), size=2000)

    def drawn(result: ProbeResult) -> np.ndarray:
        return 100 * mean_iou(np.einsum("dn,nck->dck", counts, _example_scores(result)))

    for data, above in (("camvid", True), ("coco128", False)):
        for encoder in ("base", "sft", "dpo"):
            for trained, random in zip(recorded[data, encoder], recorded[data, "random"], strict=True):
                low, high = np.percentile(drawn(trained) - drawn(random), [2.5, 97.5])
                assert (low > 0) == above, (trained.task, encoder, low, high)
                assert not above or 6 <= round(trained.value - random.value) <= 14
    pairs = zip(recorded["camvid", "dpo"], recorded["camvid", "sft"], strict=True)
    assert [round(d.value - s.value, 1) for d, s in pairs] == [-0.3, -0.9, -0.5, 1.9]
    seeded = [read_results(folder / f"segmentation-camvid-{e}-seed1.json")[0] for e in ("sft", "dpo")]
    assert [(r.task.split("/", 2)[2], r.metric, r.seed, round(r.value, 1)) for r in seeded] == [
        ("mlp/128px", "mean_iou", 1, value) for value in (41.5, 40.9)
    ]


def test_tokens_on_disk_equal_computed_ones_and_are_computed_once(encoder: tuple[Any, Any], tmp_path: Path) -> None:
    data, _ = make_data()
    batches: list[int] = []
    metadata = {"encoder": "test", "encoder_sha256": "0"}

    def run() -> dict[str, ProbeResult]:
        encode = cached_encode(*encoder, metadata, tmp_path / "cache", lambda done, total, per_s: batches.append(done))
        return probe(encoder, data, encode=encode, image_px=[32, 64])

    plain, first = probe(encoder, data, image_px=[32, 64]), run()
    count = len(batches)
    assert count > 0
    again = run()
    assert len(batches) == count  # nothing was encoded again
    values = [[r.value for r in results.values()] for results in (plain, first, again)]
    assert values[1] == values[2]
    assert values[0] == pytest.approx(values[1], abs=0.3)  # in percent; those without a cache are in float16
