"""Preference rows from labelled photographs: right in every format, balanced, split by pixels, refused where blind."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from pivot_hub.cli import app
from pivot_hub.data.pairs import PairOptions, write_pairs
from pivot_hub.data.pairs.counterfactuals import blurred_fill
from pivot_hub.data.pairs.words import count_question, plural, presence_question, with_article
from pivot_hub.data.row import read_records
from pivot_hub.errors import DataError, OutputError
from pivot_hub.training.row_check import check_data
from tests.data.test_rejected_images import parts, recipe_of

__all__ = ["parts"]

NAMES = ("cat", "dog", "bird")
COLOURS = {"cat": (220, 40, 40), "dog": (40, 200, 40), "bird": (40, 40, 220)}
WIDTH, HEIGHT, SIDE = 120, 80, 16
Drawn = dict[str, list[tuple[int, int]]]  # corners (x, y) of the objects of each class, by photograph


def draw_photos(folder: Path, count: int = 40, seed: int = 0) -> dict[str, Drawn]:
    """Draw photographs of squares on noise, at places that do not overlap, and return what they show."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    shown: dict[str, Drawn] = {}
    for i in range(count):
        noise = rng.integers(100, 140, (HEIGHT, WIDTH, 3)).astype(np.uint8)
        image = Image.fromarray(noise)
        draw, objects = ImageDraw.Draw(image), Drawn()
        places = [(x, y) for x in range(4, WIDTH - SIDE, 28) for y in range(4, HEIGHT - SIDE, 24)]
        for at in rng.permutation(len(places))[: int(rng.integers(2, 6))]:
            name, (x, y) = NAMES[int(rng.integers(3))], places[at]
            draw.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), fill=COLOURS[name])
            objects.setdefault(name, []).append((x, y))
        image.save(folder / f"{i}.png")
        shown[f"{i}.png"] = objects
    return shown


def coco(file: Path, shown: dict[str, Drawn], *more: dict[str, Any]) -> Path:
    """Write COCO's JSON: boxes of cats, polygons of dogs, RLE of birds; further annotations name their file."""
    images = [{"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT} for i, name in enumerate(shown)]
    annotations: list[dict[str, Any]] = []
    for i, objects in enumerate(shown.values()):
        for name, corners in objects.items():
            for x, y in corners:
                one: dict[str, Any] = {"image_id": i, "category_id": NAMES.index(name), "bbox": [x, y, SIDE, SIDE]}
                if name == "dog":
                    right, bottom = x + SIDE, y + SIDE
                    one["segmentation"] = [[x, y, right, y, right, bottom, x, bottom]]
                elif name == "bird":
                    mask = np.zeros((HEIGHT, WIDTH), int)
                    mask[y : y + SIDE, x : x + SIDE] = 1
                    changes = np.flatnonzero(np.diff(mask.T.ravel(), prepend=0))
                    runs = np.diff([0, *changes, WIDTH * HEIGHT]).tolist()
                    one["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": runs}
                annotations.append(one)
    numbers = {name: i for i, name in enumerate(shown)}
    annotations += [{**{k: v for k, v in one.items() if k != "file"}, "image_id": numbers[one["file"]]} for one in more]
    stored = {
        "images": images,
        "annotations": [{"id": i, **one} for i, one in enumerate(annotations)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(NAMES)],
    }
    file.write_text(json.dumps(stored))
    return file


def rows_of(output: Path, split: str = "train") -> list[dict[str, Any]]:
    file = output / f"{split}.jsonl"
    return [record for _, record in read_records(file) if isinstance(record, dict)] if file.exists() else []


def all_rows(output: Path) -> list[dict[str, Any]]:
    return rows_of(output) + rows_of(output, "validation")


def asked(row: dict[str, Any]) -> str:
    return str(row["question"]).removeprefix("<image>\n")


def answer_of(question: str, objects: Drawn) -> str:
    """The right answer, worked out from what was drawn, for all questions but those about boxes."""
    for name in NAMES:
        ask, yes, no = presence_question(name)
        if question == ask:
            return yes if name in objects else no
        if question == count_question(name):
            count = len(objects.get(name, []))
            return f"There is 1 {name}." if count == 1 else f"There are {count} {name}s."
    words = question.replace("?", "").split()
    assert "left" in words
    first, second = words[2], words[-1]
    side = "left" if objects[first][0][0] < objects[second][0][0] else "right"
    return f"The {first} is to the {side} of the {second}."


def write_yolo(folder: Path, shown: dict[str, Drawn]) -> None:
    folder.mkdir()
    (folder / "data.yaml").write_text("names: [cat, dog, bird]\n")
    for file, objects in shown.items():
        lines = [
            f"{NAMES.index(n)} {(x + SIDE / 2) / WIDTH} {(y + SIDE / 2) / HEIGHT} {SIDE / WIDTH} {SIDE / HEIGHT}"
            for n, corners in objects.items()
            for x, y in corners
        ]
        (folder / file).with_suffix(".txt").write_text("\n".join(lines))


def write_voc(folder: Path, shown: dict[str, Drawn]) -> None:
    folder.mkdir()
    for file, objects in shown.items():
        boxes = [
            f"<object><name>{n}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + SIDE}</xmax>"
            f"<ymax>{y + SIDE}</ymax></bndbox></object>"
            for n, corners in objects.items()
            for x, y in corners
        ]
        (folder / file).with_suffix(".xml").write_text(f"<annotation>{''.join(boxes)}</annotation>")


def write_masks(folder: Path, shown: dict[str, Drawn]) -> None:
    folder.mkdir()
    (folder / "data.yaml").write_text("names: [cat, dog, bird]\n")
    for file, objects in shown.items():
        ids = np.full((HEIGHT, WIDTH), 255, np.uint8)
        for n, corners in objects.items():
            for x, y in corners:
                ids[y : y + SIDE, x : x + SIDE] = NAMES.index(n)
        Image.fromarray(ids).save(folder / file)


@pytest.mark.parametrize("labels", ["coco", "yolo", "voc", "masks"])
def test_answers_are_right_and_balanced_in_every_format(labels: str, tmp_path: Path) -> None:
    shown = draw_photos(tmp_path / "photos")
    source = tmp_path / labels
    if labels == "coco":
        coco(source, shown).rename(tmp_path / "instances.json")
        options = PairOptions(boxes=tmp_path / "instances.json", validation=0.25)
    else:
        {"yolo": write_yolo, "voc": write_voc, "masks": write_masks}[labels](source, shown)
        masks = source if labels == "masks" else None
        options = PairOptions(boxes=None if masks else source, masks=masks, validation=0.25)
    report = write_pairs(tmp_path / "photos", tmp_path / "pairs", options)
    rows = all_rows(tmp_path / "pairs")
    kinds = {"presence"} if labels == "masks" else {"presence", "count", "position", "box"}
    assert {row["kind"] for row in rows} == kinds  # all objects have one size, so that none is larger
    for row in rows:
        objects = shown[row["image"].removeprefix("photos/")]
        if row["kind"] == "box":
            x, y = (int(side) for side in asked(row).split("[")[1].split(",")[:2])
            name = next(n for n, corners in objects.items() if (x, y) in corners)
            assert row["chosen"] == f"A {name}."
            assert row["rejected"].split()[1].strip(".") in objects.keys() - {name}
        else:
            assert row["chosen"] == answer_of(asked(row), objects) != row["rejected"], row
    for split in ("train", "validation"):
        of_split = [row for row in rows_of(tmp_path / "pairs", split) if row["kind"] in ("presence", "count")]
        chosen = Counter((row["question"], row["chosen"]) for row in of_split)
        assert chosen == Counter((row["question"], row["rejected"]) for row in of_split)
    answers = [row["chosen"].split()[-4] for row in rows if row["kind"] == "position"]
    assert answers.count("left") == answers.count("right")
    assert all(one.ci95 is None or one.ci95[0] <= 55 for one in report.blind)
    assert report.rows["presence"]["validation"] > 0


def visible(image: Image.Image) -> Counter[str]:
    """Number of pixels of each class that an image shows."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    near = {name: (np.abs(pixels - colour).max(-1) < 60).sum() for name, colour in COLOURS.items()}
    return Counter({name: int(count) for name, count in near.items() if count > 12})


def test_counterfactual_images_make_the_rejected_answer_right(tmp_path: Path) -> None:
    shown = draw_photos(tmp_path / "photos")
    boxes = coco(tmp_path / "instances.json", shown)
    options = PairOptions(boxes=boxes, counterfactuals=("erase", "crop", "mirror", "swap"))
    report = write_pairs(tmp_path / "photos", tmp_path / "pairs", options)
    rows = [row for row in all_rows(tmp_path / "pairs") if "rejected_image" in row]
    assert rows_of(tmp_path / "pairs", "train-rejected-image") == [r for r in rows_of(tmp_path / "pairs") if r in rows]
    seen: Counter[tuple[str, str]] = Counter()
    for row in rows:
        image, rejected = (Image.open(tmp_path / "pairs" / row[key]) for key in ("image", "rejected_image"))
        made = [origin for key in ("image", "rejected_image") if (origin := row[f"{key}_origin"]) != "photograph"]
        assert made, "an edited image is named as such"
        seen[row["kind"], "/".join(sorted({row["image_origin"], row["rejected_image_origin"]}))] += 1
        for shown_image, answer in ((image, row["chosen"]), (rejected, row["rejected"])):
            pixels = visible(shown_image)
            name = next((n for n in NAMES if f" {n}" in asked(row)), "")
            if row["kind"] == "presence":
                assert (pixels[name] > 0) == answer.startswith("Yes"), row
            elif row["kind"] == "count":
                assert round(pixels[name] / SIDE**2) == int(answer.split()[2]), row
            else:
                words = answer.strip(".").split()
                array = np.asarray(shown_image.convert("RGB")).astype(int)
                centres = [np.nonzero(np.abs(array - COLOURS[n]).max(-1) < 60)[1].mean() for n in (words[1], words[-1])]
                assert (centres[0] < centres[1]) == ("left" in words), row
    assert seen.keys() == {
        ("presence", "object erased (blur)/region beside the object filled (blur)"),
        ("presence", "crop with the object/crop without it"),
        ("count", "object erased (blur)/region beside the object filled (blur)"),
        ("position", "mirror image/photograph"),
        ("presence", "object replaced by one of another photograph/photograph"),
    }
    # Each pair is a row both ways, so that neither an answer nor a trace of the edit is always the right one.
    sides = Counter((row["kind"], row["image_origin"]) for row in rows)
    assert sides == Counter((row["kind"], row["rejected_image_origin"]) for row in rows)
    assert report.rows["presence, erase"]["train"] == 2 * (report.rows["presence, erase"]["train"] // 2) > 0


def test_a_swapped_image_has_each_answer_and_nothing_ambiguous_is_pasted(tmp_path: Path) -> None:
    shown = draw_photos(tmp_path / "photos")
    crowd = {"file": "3.png", "category_id": 0, "iscrowd": 1, "bbox": [0, 0, 9, 9]}
    shown["3.png"].pop("cat", None)  # whether and where there are cats is not certain
    options = PairOptions(
        boxes=coco(tmp_path / "instances.json", shown, crowd), kinds=("presence",), counterfactuals=("swap",)
    )
    write_pairs(tmp_path / "photos", tmp_path / "pairs", options)
    swapped: dict[str, list[tuple[str, str]]] = {}
    for row in all_rows(tmp_path / "pairs"):
        if "rejected_image" in row and row["image"].startswith("made/"):
            swapped.setdefault(row["image"], []).append((asked(row).split()[3], row["chosen"][:2]))
            assert row["rejected_image"].startswith("photos/")
    assert len(swapped) > 5
    for file, answers in swapped.items():
        objects = shown[file.split("/")[-1].removesuffix("-b.jpg")]
        assert sorted(answer for _, answer in answers) == ["No", "Ye"]
        for name, answer in answers:
            assert len(objects.get(name, ())) == (1 if answer == "No" else 0)
        assert not file.endswith("/3.png-b.jpg") or "cat" not in dict(answers)
    with pytest.raises(DataError, match="--limit 2: the presence, swap rows of a question are 4; raise the limit"):
        write_pairs(tmp_path / "photos", tmp_path / "pairs", replace(options, limit=2))


def test_photographs_of_one_class_lend_each_other_nothing(tmp_path: Path) -> None:
    shown = draw_photos(tmp_path / "photos", 6)
    boxes = coco(
        tmp_path / "instances.json",
        {name: {"cat": objects.get("cat", [(4, 4)])[:1]} for name, objects in shown.items()},
    )
    options = PairOptions(boxes=boxes, kinds=("presence",), counterfactuals=("swap",))
    with pytest.raises(DataError, match="presence, swap: no photograph lends an object of a class that is missing"):
        write_pairs(tmp_path / "photos", tmp_path / "pairs", options)


def test_crowds_empty_masks_and_classes_of_one_photograph_are_not_asked_about(tmp_path: Path) -> None:
    shown = draw_photos(tmp_path / "photos")
    few = ["0.png", "1.png"]
    for name in shown:
        if name != "2.png":
            shown[name].pop("bird", None)
    shown["2.png"]["bird"] = [(4, 4)]  # the only bird
    empty = {"file": "0.png", "category_id": 0, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [WIDTH * HEIGHT]}}
    crowd = {"file": "1.png", "category_id": 0, "iscrowd": 1, "bbox": [0, 0, 9, 9]}
    for name in few:
        shown[name].pop("cat", None)
        shown[name].setdefault("dog", [(4, 4)])
    boxes = coco(tmp_path / "instances.json", shown, empty, crowd)
    options = PairOptions(boxes=boxes, counterfactuals=("erase", "crop"), validation=0)
    report = write_pairs(tmp_path / "photos", tmp_path / "pairs", options)
    for row in all_rows(tmp_path / "pairs"):
        assert "bird" not in row["question"] or row["kind"] != "presence" or "rejected_image" in row
        if any(name in row["image"] for name in ("/0.png", "/1.png")) and " cat" in row["question"]:
            assert (row["kind"], row["image"], row["chosen"][:3]) == ("presence", "photos/1.png", "Yes"), row
    assert report.left_out["classes that one photograph shows"] == 1
    assert report.left_out["count: classes of a photograph with a crowd or an empty mask"] == 2


def test_equal_pixels_are_in_one_split_and_no_image_in_both(tmp_path: Path) -> None:
    shown = draw_photos(tmp_path / "photos", 30)
    for name in list(shown):
        (tmp_path / "photos" / f"copy-{name}").write_bytes((tmp_path / "photos" / name).read_bytes())
        shown[f"copy-{name}"] = shown[name]
    boxes = coco(tmp_path / "instances.json", shown)
    options = PairOptions(boxes=boxes, counterfactuals=("mirror",), validation=0.4)
    report = write_pairs(tmp_path / "photos", tmp_path / "pairs", options)
    pixels: dict[str, set[str]] = {"train": set(), "validation": set()}
    for split, found in pixels.items():
        for row in rows_of(tmp_path / "pairs", split):
            found.add(row["image"].split("/")[-1].removeprefix("copy-"))
    assert len(pixels["train"]) > 5 < len(pixels["validation"])
    assert not pixels["train"] & pixels["validation"]
    assert report.duplicates > 5


def test_images_with_the_same_pixels_are_left_out(tmp_path: Path) -> None:
    shown = {}
    (tmp_path / "photos").mkdir()
    for i in range(4):  # grey all over: nothing is drawn where the labels say that something is
        Image.new("RGB", (WIDTH, HEIGHT), (90, 90 + i, 90)).save(tmp_path / "photos" / f"{i}.png")
        shown[f"{i}.png"] = {"cat": [(4, 4)], "dog": [(60, 4)]} if i % 2 else {"dog": [(60, 4)]}
    options = PairOptions(
        boxes=coco(tmp_path / "instances.json", shown), counterfactuals=("erase", "mirror", "crop"), validation=0
    )
    report = write_pairs(tmp_path / "photos", tmp_path / "pairs", options)
    assert not any("rejected_image" in row for row in all_rows(tmp_path / "pairs"))
    for kind in ("presence, erase", "presence, crop", "position, mirror"):
        assert report.left_out[f"{kind}: both images have the same pixels"] > 0


def test_the_output_follows_from_inputs_and_seed_and_replaces_only_its_own(tmp_path: Path) -> None:
    boxes = coco(tmp_path / "instances.json", draw_photos(tmp_path / "photos"))
    arguments = ["data", "pairs", str(tmp_path / "photos"), "--boxes", str(boxes), "--counterfactual", "erase,mirror"]

    def written(seed: int) -> dict[str, bytes]:
        done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "pairs"), "--seed", str(seed)])
        assert done.exit_code == 0, done.output
        output = tmp_path / "pairs"
        files = {f.relative_to(output).as_posix(): f.read_bytes() for f in output.rglob("*") if f.is_file()}
        assert {*json.loads(files["report.json"])["files"], "report.json"} == files.keys()
        return files

    first, again, other = written(0), written(0), written(1)
    assert first == again
    assert first["train.jsonl"] != other["train.jsonl"]
    (tmp_path / "pairs" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds mine\.txt, which is not part of a folder of preference rows"):
        write_pairs(tmp_path / "photos", tmp_path / "pairs", PairOptions(boxes=boxes))


def test_a_limit_keeps_the_balance(tmp_path: Path) -> None:
    boxes = coco(tmp_path / "instances.json", draw_photos(tmp_path / "photos"))
    options = PairOptions(boxes=boxes, counterfactuals=("crop",), limit=7)
    report = write_pairs(tmp_path / "photos", tmp_path / "pairs", options)
    assert {sum(counts.values()) for counts in report.rows.values()} == {6}
    presence = [row["chosen"][:2] for row in all_rows(tmp_path / "pairs") if row["kind"] == "presence"]
    assert Counter(presence) == {"Ye": 6, "No": 6}


def test_rows_pass_the_check_of_recipes_with_text_and_image_losses(parts: Path, tmp_path: Path) -> None:
    boxes = coco(tmp_path / "instances.json", draw_photos(tmp_path / "photos", 16))
    options = PairOptions(boxes=boxes, counterfactuals=("erase", "crop", "mirror"), validation=0)
    report = write_pairs(tmp_path / "photos", tmp_path / "pairs", options)
    two = len(rows_of(tmp_path / "pairs", "train-rejected-image"))
    every = sum(counts["train"] for counts in report.rows.values())
    for file, loss, rows in (("train", "sigmoid", every), ("train-rejected-image", "[sigmoid, image_sigmoid]", two)):
        data = f"{{format: mmpr, path: pairs/{file}.jsonl, images: pairs}}"
        checked = check_data(recipe_of(parts, tmp_path, data, loss), folder=tmp_path / file, workers=1).report
        assert (checked.rows, checked.skipped_rows, checked.duplicates) == (rows, 0, 0)
    (tmp_path / "pairs" / "same.jsonl").write_text(
        json.dumps({"image": "photos/0.png", "rejected_image": "photos/0.png", "question": "Q", **_ANSWERS}) + "\n"
    )
    same = recipe_of(parts, tmp_path, "{format: mmpr, path: pairs/same.jsonl, images: pairs}")
    with pytest.raises(DataError, match="image and rejected image are the same"):
        check_data(same, folder=tmp_path / "same", workers=1)


_ANSWERS = {"chosen": "Yes.", "rejected": "No."}


def write_questions(file: Path, records: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_options_give_the_right_answer_against_each_wrong_one(tmp_path: Path) -> None:
    draw_photos(tmp_path / "photos", 3)
    records: list[dict[str, Any]] = [
        {"image": "0.png", "question": "Which?\n(A) red\n(B) green\n(C) blue", "answer": "b"},
        {"image": "1.png", "question": "Which?", "options": ["red", "green"], "answer": 1},
        {"image": "2.png", "question": "Which?", "choices": ["red", "green"], "answer": "red"},
    ]
    options = PairOptions(questions=write_questions(tmp_path / "vqa.jsonl", records), validation=0)
    write_pairs(tmp_path / "photos", tmp_path / "pairs", options)
    rows = rows_of(tmp_path / "pairs")
    assert [(row["chosen"], row["rejected"]) for row in rows[:2]] == [
        ("(B) green", "(A) red"),
        ("(B) green", "(C) blue"),
    ]
    for row, right in zip(rows[2:], ("green", "red"), strict=True):
        assert row["chosen"].endswith(right)
        assert {row["chosen"], row["rejected"]} == set(asked(row).splitlines()[1:])


def test_options_that_name_others_keep_their_order(tmp_path: Path) -> None:
    draw_photos(tmp_path / "photos", 1)
    options = ["cat", "dog", "both A and B"]
    records = [{"image": "0.png", "question": f"{i}?", "options": options, "answer": 2} for i in range(4)]
    records[1]["image"] = "./0.png"  # the same photograph
    file = write_questions(tmp_path / "vqa.jsonl", records)
    write_pairs(tmp_path / "photos", tmp_path / "pairs", PairOptions(questions=file, validation=0, allow_priors=True))
    rows = rows_of(tmp_path / "pairs")
    assert {row["chosen"] for row in rows} == {"(C) both A and B"}
    assert {row["image"] for row in rows} == {"photos/0.png"}


def test_words_of_classes() -> None:
    named = {"unicycle": "a unicycle", "umbrella": "an umbrella", "hour glass": "an hour glass", "horse": "a horse"}
    assert {name: with_article(name) for name in named} == named
    assert with_article("eyeglasses") == "a pair of eyeglasses"
    plurals = {"policeman": "policemen", "human": "humans", "eyeglasses": "pairs of eyeglasses", "knife": "knives"}
    assert {name: plural(name) for name in plurals} == plurals


def test_the_larger_object_has_more_pixels_and_not_the_larger_box(tmp_path: Path) -> None:
    """A thin L around much of the photograph has the largest box, and fewer pixels than the square in it."""
    photos, annotations = tmp_path / "photos", []
    photos.mkdir()
    for i, (thin, full) in enumerate([(0, 1), (1, 0)] * 2):
        Image.fromarray(np.full((100, 100, 3), 10 * i, np.uint8)).save(photos / f"{i}.png")
        outline = [0, 0, 100, 0, 100, 5, 5, 5, 5, 100, 0, 100]
        annotations.append({"image_id": i, "category_id": thin, "bbox": [0, 0, 100, 100], "segmentation": [outline]})
        square = [20, 20, 70, 20, 70, 70, 20, 70]
        annotations.append({"image_id": i, "category_id": full, "bbox": [20, 20, 50, 50], "segmentation": [square]})
    stored = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in range(4)],
        "annotations": [{"id": i, **one} for i, one in enumerate(annotations)],
        "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(stored))
    options = PairOptions(boxes=tmp_path / "instances.json", kinds=("size",), validation=0)
    write_pairs(photos, tmp_path / "pairs", options)
    rows = rows_of(tmp_path / "pairs")
    assert len(rows) == 4
    for row in rows:
        larger = "dog" if row["image"] in ("photos/0.png", "photos/2.png") else "cat"
        assert row["chosen"] == f"The {larger}."


def test_erased_regions_are_inpainted_by_opencv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown = draw_photos(tmp_path / "photos", 4)
    boxes = coco(tmp_path / "instances.json", shown)
    monkeypatch.setitem(sys.modules, "cv2", None)
    options = PairOptions(boxes=boxes, counterfactuals=("erase",), inpaint=True, allow_priors=True, validation=0)
    with pytest.raises(DataError, match="OpenCV"):
        write_pairs(tmp_path / "photos", tmp_path / "pairs", options)
    seen: list[tuple[Any, ...]] = []

    def inpaint(image: np.ndarray, mask: np.ndarray, radius: float, method: int) -> np.ndarray:
        seen.append((image.dtype, mask.dtype, mask.shape == image.shape[:2], bool(mask.any())))
        return np.where(mask[..., None] > 0, np.uint8(0), image)

    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(inpaint=inpaint, INPAINT_TELEA=1))
    write_pairs(tmp_path / "photos", tmp_path / "pairs", options)
    assert set(seen) == {(np.dtype(np.uint8), np.dtype(np.uint8), True, True)}
    origins = {row["image_origin"] for row in rows_of(tmp_path / "pairs") if "erased" in row.get("image_origin", "")}
    assert origins == {"object erased (inpainting)"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "--seed is -1; give a whole number"),
        ({"seed": 2**63}, "--seed is"),
        ({"margin_pct": float("nan")}, "--margin is nan; give points from 0 to 50"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        PairOptions(**changes).check()


def test_a_limit_below_the_rows_of_a_question_and_classes_of_the_same_words_are_refused(tmp_path: Path) -> None:
    shown = draw_photos(tmp_path / "photos", 6)
    question = {"image": "0.png", "question": "Which?\n(A) red\n(B) green\n(C) blue\n(D) grey", "answer": "B"}
    file = write_questions(tmp_path / "vqa.jsonl", [question])
    options = PairOptions(questions=file, validation=0, limit=2, allow_priors=True)
    with pytest.raises(DataError, match="--limit 2: the option rows of a question are 3; raise the limit"):
        write_pairs(tmp_path / "photos", tmp_path / "pairs", options)
    boxes = coco(tmp_path / "instances.json", shown)
    boxes.write_text(boxes.read_text().replace('"name": "dog"', '"name": "Cat"'))
    with pytest.raises(DataError, match="the classes 'Cat' and 'cat' are the same words; give them one name"):
        write_pairs(tmp_path / "photos", tmp_path / "pairs", PairOptions(boxes=boxes))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": "D"}, r"vqa\.jsonl:1: the answer 'D' is none of the options A, B"),
        ({"answer": None}, "`answer` is None; give the letter"),
        ({"options": ["red", "None"], "answer": None}, "`answer` is None"),
        ({"options": ["Yes", "No"], "answer": True}, "`answer` is True; give the letter, the words or the number"),
        ({"options": ["1", "2", "3"], "answer": 1}, "the answer 1 may be the number of '2' or the option '1'"),
        ({"question": "Which?\n(A) red\n(A) blue\n(B) green"}, "two options have the same letter"),
        ({"options": [f"o{i}" for i in range(27)], "answer": 26}, "has 27 options; give at most 26"),
        ({"options": ["red", " "], "answer": 0}, "give a list of texts"),
        ({"question": "Which\ud800?\n(A) red\n(B) green"}, "which is no character"),
        ({"question": "Which?"}, "has 0 options"),
        ({"options": ["red"]}, "has 1 options"),
        ({"options": ["red", "Red."]}, "two options are the same words"),
        ({"options": "red"}, "give a list of texts"),
        ({"image": None}, "`image` is missing"),
        ({"rejected_image": "0.png"}, r"vqa\.jsonl:1: has `rejected_image`, and a question has one image"),
        ({"image": "none.png"}, r"none\.png does not exist"),
        ({"image": "../0.png"}, "leaves the images folder"),
    ],
)
def test_bad_questions_are_named_or_skipped(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    draw_photos(tmp_path / "photos", 1)
    good = {"image": "0.png", "question": "Which?\n(A) red\n(B) green", "answer": "B"}
    file = write_questions(tmp_path / "vqa.jsonl", [{**good, **record}, good])
    with pytest.raises(DataError, match=message):
        write_pairs(tmp_path / "photos", tmp_path / "pairs", PairOptions(questions=file, validation=0))
    assert not (tmp_path / "pairs").exists()
    done = CliRunner().invoke(
        app,
        [
            *("data", "pairs", str(tmp_path / "photos"), "--questions", str(file), "--output", str(tmp_path / "pairs")),
            *("--validation", "0", "--on-bad-row", "skip"),
        ],
    )
    assert done.exit_code == 0, done.output
    assert "skipped: 1" in done.output
    assert len(rows_of(tmp_path / "pairs")) == 1


def test_answers_that_text_alone_tells_are_refused(tmp_path: Path) -> None:
    draw_photos(tmp_path / "photos", 1)
    # The right option is always the longest, with words that no other row has.
    records = [
        {"image": "0.png", "question": f"Q{i}", "options": [f"w{i}", f"the long, detailed and right r{i}"], "answer": 1}
        for i in range(60)
    ]
    questions = write_questions(tmp_path / "vqa.jsonl", records)
    options = PairOptions(questions=questions, validation=0)
    with pytest.raises(
        DataError, match=r"option: a probe that reads no image tells .* 100\.0% of 60 rows .*--allow-pri"
    ):
        write_pairs(tmp_path / "photos", tmp_path / "pairs", options)
    assert not (tmp_path / "pairs").exists()
    write_pairs(
        tmp_path / "photos", tmp_path / "pairs", PairOptions(questions=questions, validation=0, allow_priors=True)
    )
    stored = json.loads((tmp_path / "pairs" / "report.json").read_text())
    assert stored["blind"][0]["accuracy_pct"] == 100
    assert stored["beyond_margin"] == ["option"]


def test_frequent_answers_are_as_often_right_as_wrong(tmp_path: Path) -> None:
    draw_photos(tmp_path / "photos", 1)
    records = [
        {"image": "0.png", "question": f"Is it {i}?", "options": ["yes", "no"], "answer": "no" if i < 10 else "yes"}
        for i in range(60)
    ]
    options = PairOptions(questions=write_questions(tmp_path / "vqa.jsonl", records), validation=0)
    report = write_pairs(tmp_path / "photos", tmp_path / "pairs", options)
    counts = Counter(row["chosen"].split()[1] for row in rows_of(tmp_path / "pairs"))
    assert counts["no"] == 10
    assert abs(counts["yes"] - 10) <= 1
    assert report.left_out["option: rows whose answer is right more often than wrong"] == 50 - counts["yes"]


def test_a_fill_keeps_everything_outside_and_continues_its_surroundings() -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 100).astype(np.uint8)[None, :, None], (60, 100, 3)).copy()
    region = np.zeros((60, 100), bool)
    region[20:40, 40:60] = True
    spoiled = ramp.copy()
    spoiled[region] = (255, 0, 255)
    filled = blurred_fill(spoiled, region)
    assert np.array_equal(filled[~region], ramp[~region])
    assert np.abs(filled[region].astype(int) - ramp[region]).max() < 40  # the colour of the object is gone
    corner = np.zeros((60, 100), bool)
    corner[:25, :25] = True
    assert np.abs(blurred_fill(spoiled, corner)[corner].astype(int) - ramp[corner]).max() < 70


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": ("colour",)}, "--kinds 'colour' is unknown; give presence, count, position, size, box"),
        ({"counterfactuals": ("paint",)}, "--counterfactual 'paint' is unknown; give erase, crop, mirror, swap"),
        (
            {"counterfactuals": ("mirror",), "kinds": ("count",)},
            "mirror changes the answer of position: add it to --kinds",
        ),
        ({"validation": 1.0}, "--validation is 1.0"),
        ({"kinds": ("size",)}, "no preference row for training .*: no two photographs or objects balance"),
    ],
)
def test_options_that_give_nothing_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    boxes = coco(tmp_path / "instances.json", {"0.png": {"cat": [(4, 4)]}})
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "0.png")
    with pytest.raises(DataError, match=message):
        write_pairs(tmp_path, tmp_path / "pairs", PairOptions(boxes=boxes, **changes))
