"""Classification of images: five protocols on folders, archives and data sets; the reported part is read last."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from pivot_hub.config.data_section import OnBadRow
from pivot_hub.encoder.encode import encode_images
from pivot_hub.encoder.repository import read_encoder
from pivot_hub.errors import DataError, ProbeError
from pivot_hub.probes import features
from pivot_hub.probes.classification import protocols as classify
from pivot_hub.probes.classification.labelled_images import Labelled, Part, open_classes
from pivot_hub.probes.classification.logistic import resident
from pivot_hub.probes.classification.protocols import PROTOCOLS, Pools, classify_images
from pivot_hub.probes.features import EncodingOptions, cached_features
from pivot_hub.probes.grid import choose
from pivot_hub.probes.result import read_results
from pivot_hub.probes.run import probe_encoder

METADATA = {"encoder": "test", "encoder_sha256": "0"}
NAMES = ("base", "sft", "dpo", "random")  # names of the recorded encoders


def class_folder(folder: Path, per_class: int = 12, seed: int = 0) -> Path:
    """Write three classes that differ in brightness, in the image modes of real files."""
    modes, rng = ("RGB", "L", "P", "RGBA", "CMYK"), np.random.default_rng(seed)
    for label, level in (("dark", 20), ("grey", 120), ("light", 220)):
        (folder / label).mkdir(parents=True)
        for i in range(per_class):
            noise = rng.integers(-30, 30, (30, 40 + i, 3)) // 2 + level
            image, mode = Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)), modes[i % len(modes)]
            suffix = "jpg" if mode in ("RGB", "L", "CMYK") else "png"
            image.convert(mode).save(folder / label / f"{i}.{suffix}")
    return folder


class Recorded:
    """Three classes of images that record which part is read, and when."""

    name, classes, drawn = "recorded", ("dark", "grey", "light"), False

    def __init__(self, log: list[str], shuffled: bool = False, count: int = 60) -> None:
        self.log, rng = log, np.random.default_rng(0)
        self.truth = {part: rng.integers(3, size=count) for part in ("train", "test")}
        self.labels = {p: rng.permutation(t) if shuffled else t for p, t in self.truth.items()}

    def part(self, part: Part) -> Labelled:
        return Labelled(RecordedImages(self.log, part, self.truth[part]), self.labels[part])


class RecordedImages:
    def __init__(self, log: list[str], part: str, truth: np.ndarray) -> None:
        self.log, self._part, self.truth = log, part, truth
        self.names: Sequence[str] = [f"{part}/{i}" for i in range(len(truth))]

    def open(self, index: int) -> Image.Image:
        self.log.append(f"read {self._part}")
        return Image.new("RGB", (32, 32), (int(100 * self.truth[index]) + index % 20,) * 3)

    def digest(self, index: int) -> bytes:
        return hashlib.sha256(self.names[index].encode()).digest()

    def stamp(self) -> str:
        return f"{self._part} {self.truth.tolist()}"


@pytest.fixture(scope="module")
def encoder(parts: Path) -> tuple[Any, Any]:
    return read_encoder(parts / "vision")


def run(encoder: tuple[Any, Any], data: Any, cache: Path, **options: Any) -> dict[str, Any]:
    encoding = EncodingOptions(cache=cache, workers=0)
    results, _ = classify_images(*encoder, data, METADATA, encoding=encoding, **options)
    return {r.task.split("/")[-1]: r for r in results if r.metric == "accuracy"}


def test_neighbours_vote_alike_from_memory_and_from_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The features that vote are read and normalised once where memory holds them, else for each block of questions."""
    rng = np.random.default_rng(0)
    labels = np.arange(3000) % 7
    means = rng.normal(size=(7, 12))
    train, test = (
        features.Features((means[y] + rng.normal(size=(len(y), 12))).astype(np.float32), y, [])
        for y in (labels, labels[:2500])
    )
    read: list[int] = []
    inner = features.Pooled.__getitem__

    def count(self: features.Pooled, selection: slice) -> np.ndarray:
        rows = inner(self, selection)
        read.append(len(rows))
        return rows

    monkeypatch.setattr(features.Pooled, "__getitem__", count)
    predicted, rows = [], []
    for held in (resident, lambda x, device: x):
        monkeypatch.setattr(classify, "resident", held)
        fitted = classify.FITTERS["knn"](train, Pools.draw(labels, 0), 7, torch.device("cpu"))
        read.clear()
        predicted.append(fitted.predict(test))
        rows.append(sum(read))
    assert (predicted[0] == predicted[1]).all()
    assert (predicted[0] == test.labels).mean() > 0.5
    assert rows == [3000 + 2500, 3 * 3000 + 2500]  # 2500 questions come in three blocks


def test_every_protocol_tells_classes_apart(parts: Path, tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "data")
    encoding = EncodingOptions(cache=tmp_path / "cache", workers=0)
    results, skipped = probe_encoder(str(parts / "vision"), str(folder), protocols=PROTOCOLS, encoding=encoding)
    assert not skipped
    assert [r.task for r in results] == [f"data/{p}" for p in PROTOCOLS]
    for result in results:
        assert result.n == 6  # two of twelve in each class
        assert result.value > 80, result.task
        assert result.example_scores is not None
        assert "chance 33.3" in result.protocol


def test_the_reported_part_is_read_when_all_is_chosen(
    encoder: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    def recorded(name: str) -> Any:
        fit = classify.FITTERS[name]

        def fit_and_log(*args: Any) -> Any:
            classifier = fit(*args)
            log.append(f"chose {name}")
            return classifier

        return fit_and_log

    fitters = {name: recorded(name) for name in classify.FITTERS}
    monkeypatch.setattr(classify, "FITTERS", fitters)
    run(encoder, Recorded(log), tmp_path, protocols=PROTOCOLS[:-1])
    order = list(dict.fromkeys(log))
    assert order == ["read train", *(f"chose {p}" for p in PROTOCOLS[:-1]), "read test"]
    assert "read train" not in log[log.index("read test") :]


def test_settings_do_not_depend_on_the_reported_part(encoder: tuple[Any, Any], tmp_path: Path) -> None:
    """With rotated reported labels, every chosen setting is the same and the accuracy is not."""
    straight, rotated = Recorded([]), Recorded([])
    rotated.labels["test"] = (rotated.labels["test"] + 1) % 3
    one, other = (run(encoder, data, tmp_path, protocols=PROTOCOLS) for data in (straight, rotated))
    for protocol in PROTOCOLS:
        assert one[protocol].protocol.split("; chance")[0] == other[protocol].protocol.split("; chance")[0]
        assert one[protocol].value > 75 > 25 > other[protocol].value


def test_shuffled_labels_give_chance(encoder: tuple[Any, Any], tmp_path: Path) -> None:
    for protocol, result in run(encoder, Recorded([], shuffled=True, count=150), tmp_path, protocols=PROTOCOLS).items():
        assert 20 < result.value < 47, protocol


def test_pools_do_not_overlap_and_hold_every_class() -> None:
    labels = np.repeat([0, 1, 2], [300, 60, 4])
    pools = Pools.draw(labels, 0)
    assert not set(pools.held_out) & set(pools.rest)
    assert set(pools.few) <= set(pools.rest)
    assert np.bincount(labels[pools.held_out]).tolist() == [50, 12, 1]
    assert np.bincount(labels[pools.few]).tolist() == [50, 48, 3]
    assert np.array_equal(np.sort(np.concatenate([pools.held_out, pools.rest])), pools.all)


def _packed(folder: Path, kind: str, target: Path) -> str:
    """Pack a class folder in one of the supported forms."""
    if kind == "folder":
        return str(folder)
    if kind == "zip":
        with zipfile.ZipFile(target / "data.zip", "w") as archive:
            for file in sorted(folder.rglob("*.*")):
                archive.write(file, f"wrapped/{file.relative_to(folder)}")
        return str(target / "data.zip")
    if kind == "tar":
        with tarfile.open(target / "data.tar", "w") as archive_:
            archive_.add(folder, ".")
        return str(target / "data.tar")
    if kind == "parts":
        for part in ("train", "val"):
            shutil.copytree(folder, target / "parts" / part)
        return str(target / "parts")
    if kind == "tiny-imagenet":
        for label in ("dark", "grey", "light"):
            shutil.copytree(folder / label, target / "tiny" / "train" / label / "images")
        (target / "tiny" / "val" / "images").mkdir(parents=True)
        lines = []
        for i, file in enumerate(sorted(folder.rglob("*.*"))):
            shutil.copy(file, target / "tiny" / "val" / "images" / f"val_{i}{file.suffix}")
            lines.append(f"val_{i}{file.suffix}\t{file.parent.name}\t0\t0\t9\t9\n")
        (target / "tiny" / "val" / "val_annotations.txt").write_text("".join(lines))
        return str(target / "tiny")
    files = sorted(folder.rglob("*.*"))
    names = sorted({f.parent.name for f in files})
    columns = {
        "image": [{"bytes": f.read_bytes()} for f in files],
        "label": [names.index(f.parent.name) for f in files],
    }
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    table = datasets.Dataset.from_dict(columns, features=kinds)
    (target / "hub").mkdir()
    if kind == "saved":
        table.save_to_disk(target / "hub")
    elif kind == "pandas":
        pixels = [f.read_bytes() for f in files]
        frame = pandas.DataFrame({"image": pixels, "label": [f.parent.name for f in files]})
        frame.to_parquet(target / "hub" / "train.parquet")
    else:
        table.to_parquet(target / "hub" / "train-00000-of-00001.parquet")
    return str(target / "hub")


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "parts", "tiny-imagenet", "columns", "saved", "pandas"])
def test_data_in_every_form(kind: str, tmp_path: Path) -> None:
    data = open_classes(_packed(class_folder(tmp_path / "data"), kind, tmp_path))
    assert list(data.classes) == ["dark", "grey", "light"]
    train, test = data.part("train"), data.part("test")
    own_part = kind in ("parts", "tiny-imagenet")
    assert np.bincount(train.labels).tolist() == [12 if own_part else 10] * 3
    assert np.bincount(test.labels).tolist() == [12 if own_part else 2] * 3
    assert not set(train.images.names) & set(test.images.names)
    for i in (0, len(test.labels) - 1):
        brightness = np.asarray(test.images.open(i)).mean()
        assert abs(brightness - (20, 120, 220)[test.labels[i]]) < 30
    assert train.images.stamp() != test.images.stamp()


def test_features_are_computed_once_for_encoder_processor_data_and_layer(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []

    def counted(*args: Any, **options: Any) -> dict[str, Any]:
        runs.append(1)
        return encode_images(*args, **options)

    monkeypatch.setattr(features, "encode_images", counted)
    train = open_classes(str(class_folder(tmp_path / "data"))).part("train")
    model, processor = read_encoder(parts / "vision")

    def count(**changes: Any) -> int:
        arguments = {"model": model, "image_processor": processor, "data": train, "metadata": METADATA, **changes}
        cached_features(**arguments, options=EncodingOptions(cache=tmp_path / "cache", workers=0))
        return len(runs)

    assert (count(), count()) == (1, 1)
    assert count(metadata={"encoder": "test", "encoder_sha256": "1"}) == 2
    assert count(tokens=True) == 3
    darker = read_encoder(parts / "vision")[1]
    darker.image_mean = [0.1, 0.2, 0.3]
    assert count(image_processor=darker) == 4
    assert count(model=read_encoder(parts / "vision", feature_layer=-1)[0]) == 5
    (tmp_path / "data" / "dark" / "0.jpg").touch()
    (tmp_path / "data" / "grey" / "0.jpg").touch()
    (tmp_path / "data" / "light" / "0.jpg").touch()
    assert count() == 6
    assert count() == 6


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def test_a_damaged_feature_cache_is_computed_again(parts: Path, tmp_path: Path) -> None:
    train = open_classes(str(class_folder(tmp_path / "data", per_class=5))).part("train")
    options = EncodingOptions(cache=tmp_path / "cache", workers=0)

    def values() -> np.ndarray:
        model, processor = read_encoder(parts / "vision")
        return np.array(cached_features(model, processor, train, METADATA, options=options).values)

    whole, (file,) = values(), (tmp_path / "cache").glob("*.npy")
    _flip(file)
    assert np.array_equal(values(), whole)
    file.write_bytes(file.read_bytes()[:200])
    assert np.array_equal(values(), whole)
    file.with_name(f"{file.name}.json").unlink()  # as of an earlier version
    _flip(file)
    assert np.array_equal(values(), whole)
    digests = features.cached_digests(train.images, options)
    (digest_file,) = (tmp_path / "cache").glob("*.digests.npy")
    _flip(digest_file)
    assert np.array_equal(features.cached_digests(train.images, options), digests)


PARTS_FOUND = [
    ("Training", "Testing"),
    ("Train", "Test"),
    ("train", "Test"),
    ("train", "testing"),
    ("train", "eval"),
    ("training_set", "test_set"),
    ("TRAIN", "Val2017"),
]


@pytest.mark.parametrize(("train", "reported"), PARTS_FOUND)
def test_usual_names_of_parts_are_parts_in_any_case(train: str, reported: str, tmp_path: Path) -> None:
    class_folder(tmp_path / "data" / train, per_class=3)
    class_folder(tmp_path / "data" / reported, per_class=2)
    (tmp_path / "data" / "__MACOSX" / train).mkdir(parents=True)
    (tmp_path / "data" / "__MACOSX" / train / "._0.jpg").write_bytes(b"-")
    data = open_classes(str(tmp_path / "data"))
    assert list(data.classes) == ["dark", "grey", "light"]
    assert (len(data.part("train").labels), len(data.part("test").labels), data.drawn) == (9, 6, False)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train", "holdout"), "'train' is a part of the data, and 'holdout' beside it is none"),
        (("train", "Val", "valid"), "'Val' and 'valid' are both the val part"),
        (("Val", "Test"), "there is no train part, only Test, Val"),
        (("seg_train", "seg_test"), "look like parts of the data, not like classes"),
    ],
)
def test_ambiguous_names_of_parts_are_refused(folders: Sequence[str], message: str, tmp_path: Path) -> None:
    for folder in folders:
        class_folder(tmp_path / "data" / folder, per_class=3)
    with pytest.raises(ProbeError, match=message):
        open_classes(str(tmp_path / "data"))


def test_a_reported_part_without_classes_is_refused_and_a_drawn_one_is_said(
    encoder: tuple[Any, Any], tmp_path: Path
) -> None:
    class_folder(tmp_path / "data" / "train")
    (tmp_path / "data" / "test").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "data" / "test" / "0.png")
    with pytest.raises(ProbeError, match="no image of 'test' is in a folder"):
        open_classes(str(tmp_path / "data"))
    data = open_classes(str(tmp_path / "data" / "train"))
    result = run(encoder, data, tmp_path / "cache", protocols=("prototypes",))["prototypes"]
    assert "one image in five of each class is reported, drawn by the seed" in result.protocol


def test_the_hash_of_the_data_covers_the_images(encoder: tuple[Any, Any], tmp_path: Path) -> None:
    hashes = set()
    for name, seed in (("one", 0), ("two", 1), ("three", 0)):
        data = open_classes(str(class_folder(tmp_path / name / "data", per_class=5, seed=seed)))
        hashes.add(run(encoder, data, tmp_path / "cache", protocols=("prototypes",))["prototypes"].data_sha256)
    assert len(hashes) == 2


def test_copies_of_train_are_counted_and_classes_of_unequal_size_averaged(
    encoder: tuple[Any, Any], tmp_path: Path
) -> None:
    for part, seed in (("train", 0), ("val", 1)):
        class_folder(tmp_path / "data" / part, seed=seed)
    for i in range(4):
        shutil.copy(tmp_path / f"data/train/dark/{i}.{'png' if i in (2, 3) else 'jpg'}", tmp_path / f"{i}.png")
        shutil.move(tmp_path / f"{i}.png", tmp_path / f"data/val/grey/copy{i}.png")
    warnings: list[str] = []
    encoding = EncodingOptions(cache=tmp_path / "cache", workers=0)
    data = open_classes(str(tmp_path / "data"))
    results, _ = classify_images(*encoder, data, METADATA, ("knn",), encoding=encoding, warn=warnings.append)
    assert warnings == [
        "data: 4 of the 40 reported images are copies of images of train, which raises the accuracy; remove them."
    ]
    accuracy, balanced = results
    assert (accuracy.metric, balanced.metric) == ("accuracy", "mean_class_accuracy")
    assert "4 of the 40 reported images are copies" in accuracy.protocol
    assert accuracy.example_scores is not None
    hits, labels = accuracy.example_scores[:, 0], data.part("test").labels
    assert balanced.value == pytest.approx(100 * np.mean([hits[labels == label].mean() for label in range(3)]))
    assert balanced.value != pytest.approx(accuracy.value)
    assert "chance 40.0" in accuracy.protocol
    assert "mean over classes; chance 33.3" in balanced.protocol


def test_a_grid_is_continued_where_its_end_is_chosen() -> None:
    tried: list[float] = []

    def fit(values: Sequence[float]) -> Sequence[float]:
        tried.extend(values)
        return values

    inner = choose((1, 2, 3), fit, lambda value: -abs(value - 2))
    assert (str(inner), tried) == ("2", [1, 2, 3])
    larger = choose((0.1, 1.0), fit, lambda value: -abs(value - 100))
    assert str(larger) == "100"
    smaller = choose((0.1, 1.0), fit, lambda value: -value if value > 0.005 else -1)
    assert str(smaller) == "0.01"
    assert str(choose((0.1, 1.0), fit, lambda value: value)) == "1000 (the end of the grid)"
    assert str(choose((1, 2), fit, lambda value: 0)) == "1"


def test_c_is_chosen_beyond_the_grid(encoder: tuple[Any, Any]) -> None:
    """Classes that differ in a small share of the features need a weak penalty."""
    rng = np.random.default_rng(0)
    labels = rng.integers(5, size=600)
    values = rng.normal(size=(600, 20)) * 0.02
    values[:, 0] = 1
    values[np.arange(600), 1 + labels] += 0.05
    train = features.Features(values.astype(np.float32), labels, [])
    chosen = classify.FITTERS["full"](train, Pools.draw(labels, 0), 5, encoder[0].device).protocol
    c = float(chosen.split(" C ")[1].split(" ")[0])
    assert c > classify.CS[-1]


def test_corrupt_images_stop_the_probe_or_are_listed(parts: Path, tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "data")
    for file in ("0.jpg", "5.jpg"):
        whole = (folder / "dark" / file).read_bytes()
        (folder / "dark" / file).write_bytes(whole[: len(whole) // 3])
    encoding = EncodingOptions(cache=tmp_path / "cache", workers=0)
    options: dict[str, Any] = {"encoding": encoding, "protocols": ("prototypes",)}
    with pytest.raises(DataError, match=r"dark/\d\.jpg cannot be decoded"):
        probe_encoder(str(parts / "vision"), str(folder), **options)
    results, skipped = probe_encoder(str(parts / "vision"), str(folder), on_bad_row=OnBadRow.SKIP, **options)
    assert len(skipped) == 2
    assert len(results) == 1


def test_features_that_are_not_finite_are_named(encoder: tuple[Any, Any], tmp_path: Path) -> None:
    class Broken:
        def __init__(self, model: Any) -> None:
            self.config, self.device, self.dtype, self.model = model.config, model.device, model.dtype, model

        def __call__(self, pixel_values: Any) -> Any:
            output = self.model(pixel_values)
            output.pooler_output[3] = float("nan")
            return output

    with pytest.raises(ProbeError, match=r"features of train/3 are not finite"):
        run((Broken(encoder[0]), encoder[1]), Recorded([]), tmp_path, protocols=("prototypes",))


def test_bad_data_is_named(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ProbeError, match="holds no image"):
        open_classes(str(tmp_path / "empty"))
    one = class_folder(tmp_path / "one")
    for label in ("grey", "light"):
        shutil.rmtree(one / label)
    with pytest.raises(ProbeError, match="at least two"):
        open_classes(str(one))
    split = tmp_path / "split"
    for part in ("train", "val"):
        class_folder(split / part)
    (split / "val" / "light").rename(split / "val" / "bright")
    with pytest.raises(ProbeError, match="'bright' is not in both train and val"):
        open_classes(str(split))
    few = class_folder(tmp_path / "few", per_class=2)
    with pytest.raises(ProbeError, match="'dark' has fewer than 3 images"):
        open_classes(str(few))
    with pytest.raises(ProbeError, match=r"is no folder, \.zip, \.tar or Hub data set"):
        open_classes("imagenet")
    with pytest.raises(DataError, match=r"'nobody/nothing' cannot be loaded .* give a folder"):
        open_classes("nobody/nothing")
    (tmp_path / "cut.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="not a whole archive"):
        open_classes(str(tmp_path / "cut.zip"))
    with pytest.raises(ProbeError, match="no protocol 'slow'; give some of prototypes"):
        probe_encoder(str(parts / "vision"), str(class_folder(tmp_path / "good")), protocols=("slow",))
    assert not (tmp_path / "cache").exists()


def test_the_pages_table_is_that_of_the_records() -> None:
    root = Path(__file__).parents[3]
    page = (root / "pivot_hub" / "probes" / "README.md").read_text()
    for data in ("tinyimagenet", "caltech101"):
        files = [root / "recipes" / "shapes" / "real" / f"classification-{data}-{n}.json" for n in NAMES]
        encoders = [{r.task.split("/")[1]: r for r in read_results(file)} for file in files]
        assert len({r.data_sha256 for by_protocol in encoders for r in by_protocol.values()}) == 1
        for protocol in PROTOCOLS:
            results = [by_protocol[protocol] for by_protocol in encoders]
            cells = " | ".join(f"{r.value:.1f} [{r.ci95[0]:.1f}, {r.ci95[1]:.1f}]" for r in results)
            assert f"| {data} | {protocol} | {cells} |" in page
