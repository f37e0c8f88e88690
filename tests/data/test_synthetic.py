"""The built-in world: the same seed gives the same bytes, splits never meet, sentences are true."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys

import numpy as np
import pytest

from pivot_hub.data.synthetic import (
    COLOUR_NAMES,
    KINDS,
    NUMBERS,
    POSITIONS,
    SHAPES,
    SLIPS,
    SPLITS,
    Scene,
    ShapesDataset,
    draw_fact,
    is_unseen,
)

WORLD = ShapesDataset()
DIGEST = """
import hashlib
from pivot_hub.data.synthetic import ShapesDataset, KINDS
dataset, digest = ShapesDataset(), hashlib.sha256()
for i in range(20):
    scene = dataset.scene("train", i)
    picture = scene.render()
    digest.update(picture.image.tobytes() + picture.masks.tobytes() + scene.caption().encode())
    digest.update(repr(scene.pair(KINDS[i % 5], "describe", dataset.scene_rng("train", i, 1))).encode())
print(digest.hexdigest())
"""


def test_same_seed_gives_same_bytes_in_another_process() -> None:
    runs = [subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True) for _ in "ab"]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout.strip()) == 64


def test_seed_and_index_change_the_scene() -> None:
    pictures = {
        hashlib.sha256(dataset.scene("train", i).render().image.tobytes()).hexdigest()
        for dataset in (ShapesDataset(seed=0), ShapesDataset(seed=1))
        for i in range(20)
    }
    assert len(pictures) == 40


def test_splits_share_no_layout() -> None:
    seen = {split: {WORLD.scene(split, i).signature() for i in range(400)} for split in SPLITS}
    assert all(len(layouts) > 200 for layouts in seen.values())
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_things_stay_visible_though_they_overlap() -> None:
    shares, overlaps = [], 0
    for i in range(150):
        scene = WORLD.scene("train", i)
        picture = scene.render()
        assert (picture.masks.sum(0) <= 1).all()  # a pixel shows one thing
        for k, thing in enumerate(scene.objects):
            alone = Scene(WORLD, (thing,), (0,), 0).render().masks[0]
            shares.append(picture.masks[k].sum() / alone.sum())
            overlaps += shares[-1] < 1
    assert min(shares) > 0.4
    assert overlaps > 10


def test_boxes_are_tight() -> None:
    picture = WORLD.scene("train", 3).render()
    for (x0, y0, x1, y1), mask in zip(picture.boxes, picture.masks, strict=True):
        assert mask[y0:y1, x0:x1].sum() == mask.sum()
        assert mask[y0:y1, x0].any()
        assert mask[y1 - 1, x0:x1].any()


def test_mask_covers_the_colour_it_names() -> None:
    plain = ShapesDataset(noise=0, jitter=0, tint=0)
    for i in range(20):
        scene = plain.scene("train", i)
        picture = scene.render()
        pixels = np.asarray(picture.image)
        for thing, mask in zip(scene.objects, picture.masks, strict=True):
            assert np.abs(np.median(pixels[mask], axis=0) - np.array(thing.rgb)).max() <= 2


def _parse(caption: str) -> tuple[str, list[tuple[str, str, str, str]]]:
    """A caption's number word and its (size, colour, shape, place) phrases."""
    number = re.match(r"There (?:is|are) (\w+) shapes?:", caption)
    assert number
    phrase = (
        rf"an? (small|large) ({'|'.join(COLOUR_NAMES)}) ({'|'.join(SHAPES)}) ((?:at|in) the [a-z ]+?)(?=,| and |\.)"
    )
    return number[1], re.findall(phrase, caption)


def test_captions_say_what_is_there() -> None:
    for i in range(100):
        scene = WORLD.scene("train", i)
        number, phrases = _parse(scene.caption())
        assert NUMBERS.index(number) == len(scene.objects) == len(phrases)
        assert phrases == [(t.size, t.colour, t.shape, t.place) for t in scene.objects]


@pytest.mark.parametrize("kind", KINDS)
def test_rejected_description_holds_one_error_of_its_kind(kind: str) -> None:
    for i in range(60):
        scene = WORLD.scene("train", i)
        pair = scene.pair(kind, "describe", WORLD.scene_rng("train", i, 9))  # type: ignore[arg-type]
        (right_number, right), (wrong_number, wrong) = _parse(pair.chosen), _parse(pair.rejected)
        if kind == "count":
            assert right == wrong
            assert abs(NUMBERS.index(right_number) - NUMBERS.index(wrong_number)) == 1
        elif kind == "presence":
            assert len(set(wrong) - set(right)) == 1
            assert not set(right) - set(wrong)
            assert NUMBERS.index(wrong_number) == len(right) + 1
        else:
            changed = [(a, b) for a, b in zip(right, wrong, strict=True) if a != b]
            assert len(changed) == 1
            field = ("size", "colour", "shape", "position").index(kind)
            differs = [k for k in range(4) if changed[0][0][k] != changed[0][1][k]]
            assert differs == [field]
            assert pair.target is not None


def _answer(scene: Scene, text: str) -> str:
    """Answer a question from the layout alone, by rules of its own."""
    things = scene.objects
    if found := re.fullmatch(r"Is there an? (\w+) (\w+)\?", text):
        there = any((t.colour, t.shape) == found.groups() for t in things)
        return "yes" if there else "no"
    if found := re.fullmatch(r"How many (\w+ )?(\w+?)(?:es|s)? are there\?", text):
        words = (found[0].removeprefix("How many ").removesuffix(" are there?")).split()
        colour = words[0] if words[0] in COLOUR_NAMES else None
        shape = next((s for s in SHAPES if words[-1] in (f"{s}s", f"{s}es")), None)
        hits = [t for t in things if colour in (None, t.colour) and shape in (None, t.shape)]
        return NUMBERS[len(hits)]
    place = next((f" {w} the {p}?" for p in POSITIONS for w in ("at", "in") if text.endswith(f" {w} the {p}?")), "?")
    noun = text.removesuffix(place).split("is the ")[1].split()
    fits = [
        t
        for t in things
        if (noun[0] not in COLOUR_NAMES or t.colour == noun[0])
        and (noun[-1] not in SHAPES or t.shape == noun[-1])
        and (place == "?" or place == f" {t.place}?")
    ]
    assert len(fits) == 1, f"{text} fits {len(fits)} things"
    return (
        fits[0].colour if text.startswith("What colour") else fits[0].shape if "shape" in text[:12] else fits[0].place
    )


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_true_and_wrong_ones_false(kind: str) -> None:
    for i in range(80):
        scene = WORLD.scene("validation", i)
        asked = scene.question(kind, WORLD.scene_rng("validation", i, 7))  # type: ignore[arg-type]
        truth = _answer(scene, asked.text)
        assert re.search(rf"\b{truth}\b", asked.answer, re.IGNORECASE)
        assert asked.wrong != asked.answer
        if kind == "presence":
            assert not asked.wrong.lower().startswith(truth)
        else:
            assert not re.search(rf"\b{truth}\b(?! (?:left|right))", asked.wrong) or kind == "position"


def test_every_number_of_things_is_drawn() -> None:
    counts = {len(WORLD.scene("train", i).objects) for i in range(100)}
    assert counts == set(range(WORLD.things[0], WORLD.things[1] + 1))


def test_a_scan_names_what_lies_at_each_cell() -> None:
    for i in range(40):
        scene = WORLD.scene("train", i)
        words = scene.scan(8, WORLD.scene_rng("train", i, 5)).split()
        assert len(words) == 64
        masks = scene.render().masks
        for cell, word in enumerate(words):
            row, column = divmod(cell, 8)
            covering = masks[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].mean((1, 2))
            if word == "nothing":
                assert covering.max() < 0.8
            else:
                near = [t for t in scene.objects if word in (t.colour, t.shape, t.size)]
                assert near, f"{word} is not in the scene"
        assert {t.colour for t in scene.objects} & set(words) or {t.shape for t in scene.objects} & set(words)


def test_settings_left_open_change_no_fact_and_no_scene() -> None:
    """Hashes of data and recipes that are on record name a world by its facts."""
    assert set(WORLD.to_dict()) == {"image_px", "things", "noise", "jitter", "tint", "tilt", "seed"}
    assert ShapesDataset(gap=0.74, scale=1.0).scene("train", 3).objects == WORLD.scene("train", 3).objects
    assert ShapesDataset(gap=0.45).to_dict()["gap"] == 0.45


def test_larger_things_with_a_smaller_gap_hide_more_of_each_other() -> None:
    def shown(dataset: ShapesDataset) -> float:
        shares = []
        for i in range(60):
            scene = dataset.scene("train", i)
            masks = scene.render().masks
            shares += [
                masks[k].sum() / Scene(dataset, (thing,), (0,), 0).render().masks[0].sum()
                for k, thing in enumerate(scene.objects)
            ]
        return float(np.quantile(shares, 0.05))

    assert shown(ShapesDataset(things=(4, 5), gap=0.45, scale=1.3)) < shown(ShapesDataset(things=(4, 5))) - 0.2


def test_seen_and_unseen_combinations_share_none_and_miss_no_value() -> None:
    met = {
        which: {
            (t.colour, t.shape) for i in range(400) for t in ShapesDataset(combinations=which).scene("train", i).objects
        }
        for which in ("seen", "unseen")
    }
    assert not met["seen"] & met["unseen"]
    assert all(is_unseen(*pair) for pair in met["unseen"])
    assert len(met["seen"]) == 2 * len(met["unseen"]) == 56
    for some in met.values():
        assert {colour for colour, _ in some} == set(COLOUR_NAMES)
        assert {shape for _, shape in some} == set(SHAPES)


@pytest.mark.parametrize("kind", KINDS)
def test_slips_share_the_chosen_answer_and_are_wrong_in_one_thing(kind: str) -> None:
    for i in range(60):
        scene = WORLD.scene("train", i)

        def stream(purpose: int, i: int = i) -> np.random.Generator:
            return WORLD.scene_rng("train", i, purpose)

        plain = scene.pair(kind, "question", stream(1))  # type: ignore[arg-type]
        fact = draw_fact(stream(6))
        made = {s: scene.pair_with_fact(kind, "question", s, stream(1), stream(6)) for s in SLIPS}  # type: ignore[arg-type]
        assert {p.chosen for p in made.values()} == {f"{plain.chosen} {fact.true}"}
        assert made["visual"].rejected == f"{plain.rejected} {fact.true}"
        assert made["fact"].rejected == f"{plain.chosen} {fact.wrong}"
        differ = [a != b for a, b in zip(fact.true.split(), fact.wrong.split(), strict=True)]
        assert sum(differ) == 1
        said, slipped = made["format"].chosen, made["format"].rejected
        assert slipped != said
        words = [w.strip(".").lower() for w in slipped.split()]
        true = [w.strip(".").lower() for w in said.split()]
        assert words == true or any([*words[:k], *words[k + 1 :]] == true for k in range(len(words)))


def test_facts_are_true_of_the_world() -> None:
    told = {draw_fact(np.random.default_rng(i)).true for i in range(400)}
    assert len(told) == len(SHAPES) + len(COLOUR_NAMES)
    assert {"A triangle has three corners.", "Navy is a dark colour.", "Yellow is a light colour."} <= told
