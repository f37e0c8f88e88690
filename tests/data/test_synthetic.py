"""The synthetic Shapes dataset: the same seed gives the same bytes, splits share no layout, sentences are true."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoTokenizer

from pivot_hub.config.data_section import ShapesData
from pivot_hub.config.recipe import RECIPES
from pivot_hub.data.row import Row
from pivot_hub.data.source import ShapesSource
from pivot_hub.data.synthetic import (
    COLOUR_NAMES,
    DESCRIBE_WITH_FACTS,
    ERROR_TYPES,
    KINDS,
    NUMBERS,
    POSITIONS,
    SHAPES,
    SPLITS,
    Combinations,
    Form,
    Kind,
    Scene,
    ShapesDataset,
    draw_counterfactual,
    draw_fact,
    is_unseen,
)
from pivot_hub.data.synthetic.scene import split_of

DATASET = ShapesDataset()
DIGEST = """
import hashlib
from pivot_hub.data.synthetic import ShapesDataset, KINDS
dataset, digest = ShapesDataset(), hashlib.sha256()
for i in range(20):
    scene = dataset.scene("train", i)
    rendered = scene.render()
    digest.update(rendered.image.tobytes() + rendered.masks.tobytes() + scene.caption().encode())
    digest.update(repr(scene.pair(KINDS[i % 5], "describe", dataset.scene_rng("train", i, 1))).encode())
print(digest.hexdigest())
"""


def test_same_seed_gives_same_bytes_in_another_process() -> None:
    runs = [subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True) for _ in "ab"]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout.strip()) == 64


def test_seed_and_index_change_the_scene() -> None:
    digests = {
        hashlib.sha256(dataset.scene("train", i).render().image.tobytes()).hexdigest()
        for dataset in (ShapesDataset(seed=0), ShapesDataset(seed=1))
        for i in range(20)
    }
    assert len(digests) == 40


def test_splits_share_no_layout() -> None:
    layouts = {split: {DATASET.scene(split, i).signature() for i in range(400)} for split in SPLITS}
    assert all(len(of_split) > 200 for of_split in layouts.values())
    assert not layouts["train"] & layouts["test"]
    assert not layouts["train"] & layouts["validation"]
    assert not layouts["validation"] & layouts["test"]


def test_objects_stay_visible_though_they_overlap() -> None:
    shares, overlaps = [], 0
    for i in range(150):
        scene = DATASET.scene("train", i)
        rendered = scene.render()
        assert (rendered.masks.sum(0) <= 1).all()  # a pixel shows at most one object
        for k, scene_object in enumerate(scene.objects):
            alone = Scene(DATASET, (scene_object,), (0,), 0).render().masks[0]
            shares.append(rendered.masks[k].sum() / alone.sum())
            overlaps += shares[-1] < 1
    assert min(shares) > 0.4
    assert overlaps > 10


def test_boxes_are_tight() -> None:
    rendered = DATASET.scene("train", 3).render()
    for (x0, y0, x1, y1), mask in zip(rendered.boxes, rendered.masks, strict=True):
        assert mask[y0:y1, x0:x1].sum() == mask.sum()
        assert mask[y0:y1, x0].any()
        assert mask[y1 - 1, x0:x1].any()


def test_mask_covers_the_colour_it_names() -> None:
    plain = ShapesDataset(noise=0, jitter=0, tint=0)
    for i in range(20):
        scene = plain.scene("train", i)
        rendered = scene.render()
        pixels = np.asarray(rendered.image)
        for scene_object, mask in zip(scene.objects, rendered.masks, strict=True):
            assert np.abs(np.median(pixels[mask], axis=0) - np.array(scene_object.rgb)).max() <= 2


def _parse(caption: str) -> tuple[str, list[tuple[str, str, str, str]]]:
    """Split a caption into its number word and its (size, colour, shape, place) phrases."""
    number = re.match(r"There (?:is|are) (\w+) shapes?:", caption)
    assert number
    phrase = (
        rf"an? (small|large) ({'|'.join(COLOUR_NAMES)}) ({'|'.join(SHAPES)}) ((?:at|in) the [a-z ]+?)(?=,| and |\.)"
    )
    return number[1], re.findall(phrase, caption)


def test_captions_name_every_object() -> None:
    for i in range(100):
        scene = DATASET.scene("train", i)
        number, phrases = _parse(scene.caption())
        assert NUMBERS.index(number) == len(scene.objects) == len(phrases)
        assert phrases == [(o.size, o.colour, o.shape, o.place) for o in scene.objects]


@pytest.mark.parametrize("kind", KINDS)
def test_rejected_description_holds_one_error_of_its_kind(kind: Kind) -> None:
    for i in range(60):
        scene = DATASET.scene("train", i)
        pair = scene.pair(kind, "describe", DATASET.scene_rng("train", i, 9))
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
    """Answer a question from the layout alone, independently of the code under test."""
    objects = scene.objects
    presence = re.fullmatch(r"Is there an? (\w+) (\w+)\?", text)
    if presence:
        return "yes" if any((o.colour, o.shape) == presence.groups() for o in objects) else "no"
    if re.fullmatch(r"How many (\w+ )?(\w+?)(?:es|s)? are there\?", text):
        words = text.removeprefix("How many ").removesuffix(" are there?").split()
        colour = words[0] if words[0] in COLOUR_NAMES else None
        shape = next((s for s in SHAPES if words[-1] in (f"{s}s", f"{s}es")), None)
        hits = [o for o in objects if colour in (None, o.colour) and shape in (None, o.shape)]
        return NUMBERS[len(hits)]
    place = next((f" {w} the {p}?" for p in POSITIONS for w in ("at", "in") if text.endswith(f" {w} the {p}?")), "?")
    noun = text.removesuffix(place).split("is the ")[1].split()
    fits = [
        o
        for o in objects
        if (noun[0] not in COLOUR_NAMES or o.colour == noun[0])
        and (noun[-1] not in SHAPES or o.shape == noun[-1])
        and (place == "?" or place == f" {o.place}?")
    ]
    assert len(fits) == 1, f"{text} fits {len(fits)} objects"
    return (
        fits[0].colour if text.startswith("What colour") else fits[0].shape if "shape" in text[:12] else fits[0].place
    )


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_true_and_wrong_ones_false(kind: Kind) -> None:
    for i in range(80):
        scene = DATASET.scene("validation", i)
        question = scene.question(kind, DATASET.scene_rng("validation", i, 7))
        truth = _answer(scene, question.text)
        assert re.search(rf"\b{truth}\b", question.answer, re.IGNORECASE)
        assert question.wrong != question.answer
        if kind == "presence":
            assert not question.wrong.lower().startswith(truth)
        else:
            assert not re.search(rf"\b{truth}\b(?! (?:left|right))", question.wrong) or kind == "position"


def test_every_number_of_objects_is_drawn() -> None:
    counts = {len(DATASET.scene("train", i).objects) for i in range(100)}
    assert counts == set(range(DATASET.things[0], DATASET.things[1] + 1))


def test_a_scan_names_what_lies_at_each_cell() -> None:
    for i in range(40):
        scene = DATASET.scene("train", i)
        words = scene.scan(8, DATASET.scene_rng("train", i, 5)).split()
        assert len(words) == 64
        masks = scene.render().masks
        for cell, word in enumerate(words):
            row, column = divmod(cell, 8)
            covering = masks[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].mean((1, 2))
            if word == "nothing":
                assert covering.max() < 0.8
            else:
                near = [o for o in scene.objects if word in (o.colour, o.shape, o.size)]
                assert near, f"{word} is not in the scene"
        assert {o.colour for o in scene.objects} & set(words) or {o.shape for o in scene.objects} & set(words)


def test_settings_left_at_none_change_no_metadata_and_no_scene() -> None:
    """Recorded hashes of data and recipes are computed from the settings of a dataset."""
    assert set(DATASET.to_dict()) == {"image_px", "things", "noise", "jitter", "tint", "tilt", "seed"}
    assert ShapesDataset(gap=0.74, scale=1.0).scene("train", 3).objects == DATASET.scene("train", 3).objects
    assert ShapesDataset(gap=0.45).to_dict()["gap"] == 0.45


def test_larger_objects_with_a_smaller_gap_hide_more_of_each_other() -> None:
    def visible_share(dataset: ShapesDataset) -> float:
        shares = []
        for i in range(60):
            scene = dataset.scene("train", i)
            masks = scene.render().masks
            shares += [
                masks[k].sum() / Scene(dataset, (scene_object,), (0,), 0).render().masks[0].sum()
                for k, scene_object in enumerate(scene.objects)
            ]
        return float(np.quantile(shares, 0.05))

    crowded = visible_share(ShapesDataset(things=(4, 5), gap=0.45, scale=1.3))
    assert crowded < visible_share(ShapesDataset(things=(4, 5))) - 0.2


def test_seen_and_unseen_combinations_share_none_and_miss_no_value() -> None:
    drawn: dict[str, set[tuple[str, str]]] = {}
    groups: tuple[Combinations, ...] = ("seen", "unseen")
    for group in groups:
        scenes = (ShapesDataset(combinations=group).scene("train", i) for i in range(400))
        drawn[group] = {(o.colour, o.shape) for scene in scenes for o in scene.objects}
    assert not drawn["seen"] & drawn["unseen"]
    assert all(is_unseen(*combination) for combination in drawn["unseen"])
    assert len(drawn["seen"]) == 2 * len(drawn["unseen"]) == 56
    for group in groups:
        assert {colour for colour, _ in drawn[group]} == set(COLOUR_NAMES)
        assert {shape for _, shape in drawn[group]} == set(SHAPES)


@pytest.mark.parametrize("kind", KINDS)
def test_error_types_share_the_chosen_answer_and_hold_one_error(kind: Kind) -> None:
    for i in range(60):
        scene = DATASET.scene("train", i)

        def stream(purpose: int, i: int = i) -> np.random.Generator:
            return DATASET.scene_rng("train", i, purpose)

        plain = scene.pair(kind, "question", stream(1))
        fact = draw_fact(stream(6))
        pairs = {
            error_type: scene.pair_with_fact(kind, "question", error_type, stream(1), stream(6))
            for error_type in ERROR_TYPES
        }
        assert {pair.chosen for pair in pairs.values()} == {f"{plain.chosen} {fact.true}"}
        assert pairs["visual"].rejected == f"{plain.rejected} {fact.true}"
        assert pairs["fact"].rejected == f"{plain.chosen} {fact.wrong}"
        differ = [a != b for a, b in zip(fact.true.split(), fact.wrong.split(), strict=True)]
        assert sum(differ) == 1
        chosen, rejected = pairs["format"].chosen, pairs["format"].rejected
        assert rejected != chosen
        chosen_words, rejected_words = ([w.strip(".").lower() for w in t.split()] for t in (chosen, rejected))
        without_one = [[*rejected_words[:k], *rejected_words[k + 1 :]] for k in range(len(rejected_words))]
        assert chosen_words in [rejected_words, *without_one]


@pytest.mark.parametrize("counterfactual", [None, True])
def test_both_long_answers_of_a_pair_have_the_same_facts_and_differ_in_the_description(
    counterfactual: bool | None,
) -> None:
    options: dict[str, Any] = {"format": "shapes", "content": "pairs", "rows": 40, "counterfactual": counterfactual}
    options["world"] = {"things": (1, 2)}
    plain = _rows(ShapesData(**options, forms=["describe"]))
    long = _rows(ShapesData(**options, forms=["with_facts"]))
    for short, row in zip(plain, long, strict=True):
        assert row.prompt == DESCRIBE_WITH_FACTS
        before, _, after = row.chosen.partition(short.chosen)
        assert row.rejected == f"{before}{short.rejected}{after}"
        assert before.count(".") == after.count(".") == 3
        assert (row.image, row.rejected_image) == (short.image, short.rejected_image)
    assert len({row.chosen.split(".")[0] for row in long}) > 10
    tokenizer = AutoTokenizer.from_pretrained(RECIPES / "shapes-few/base/language")
    tokens = [len(ids) for ids in tokenizer([row.chosen for row in long])["input_ids"]]
    assert 80 < np.mean(tokens) < 120


def test_long_answers_alternate_with_questions() -> None:
    source = ShapesData(format="shapes", content="instruct", rows=20, forms=["with_facts", "question"])
    prompts = [row.prompt == DESCRIBE_WITH_FACTS for row in _rows(source)]
    assert prompts == ([True] * 5 + [False] * 5) * 2


def _rows(spec: ShapesData) -> list[Row]:
    return [row for row in ShapesSource(spec).rows() if isinstance(row, Row)]


def test_every_fact_is_drawn() -> None:
    facts = {draw_fact(np.random.default_rng(i)).true for i in range(400)}
    assert len(facts) == len(SHAPES) + len(COLOUR_NAMES)
    assert {"A triangle has three corners.", "Navy is a dark colour.", "Yellow is a light colour."} <= facts


def answers_of(scene: Scene, question: str) -> str:
    """Answer a question about a scene from its objects alone."""
    objects = scene.objects
    if question == "Describe the image.":
        return scene.caption()
    if match := re.fullmatch(r"What (colour|shape) is the (\w+)(?: shape)?( (?:at|in) the [\w ]+)?\?", question):
        asked, named, place = match.groups()
        (found,) = (o for o in objects if named in (o.colour, o.shape) and place in (None, f" {o.place}"))
        return f"It is {found.colour}." if asked == "colour" else f"It is {_with_article(found.shape)}."
    if match := re.fullmatch(r"Where is the (\w+ \w+)\?", question):
        (found,) = (o for o in objects if o.name == match[1])
        return f"It is {found.place}."
    if match := re.fullmatch(r"How many ([\w ]+?) are there\?", question):
        plurals = {plural for o in objects for plural in (f"{o.colour} shapes", f"{o.shape}s", f"{o.shape}es")}
        count = sum(match[1] in ("shapes", f"{o.colour} shapes", f"{o.shape}s", f"{o.shape}es") for o in objects)
        assert count == 0 or match[1] == "shapes" or match[1] in plurals
        singular = match[1].removesuffix("s") if match[1] != "crosses" else "cross"
        return f"There is one {singular}." if count == 1 else f"There are {NUMBERS[count]} {match[1]}."
    match = re.fullmatch(r"Is there an? (\w+ \w+)\?", question)
    assert match is not None
    is_there = any(o.name == match[1] for o in objects)
    return f"Yes, there is {_with_article(match[1])}." if is_there else f"No, there is no {match[1]}."


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


@pytest.mark.parametrize("combinations", [None, "seen", "unseen"])
def test_a_counterfactual_differs_in_one_thing_and_swaps_the_answers(combinations: Combinations | None) -> None:
    dataset = ShapesDataset(combinations=combinations)
    forms: tuple[Form, Form] = ("describe", "question")
    yes = changed_kinds = drawn_first = 0
    for i in range(200):
        kind, form = KINDS[i % 5], forms[i // 5 % 2]
        one = draw_counterfactual(dataset, "train", i, kind, form)
        changed_kinds += kind != one.pair.kind
        kind = one.pair.kind
        assert one == draw_counterfactual(dataset, "train", i, KINDS[i % 5], form)
        assert dataset.scene("train", i) in (one.scene, one.other)
        drawn_first += one.scene == dataset.scene("train", i)
        assert answers_of(one.scene, one.pair.question) == one.pair.chosen
        assert answers_of(one.other, one.pair.question) == one.pair.rejected
        yes += one.pair.chosen.startswith("Yes")
        before, after = (set(scene.objects) for scene in (one.scene, one.other))
        gone, new = before - after, after - before
        sizes = {(0, 1), (1, 0)} if kind == "count" else {(1, 1)}
        assert (len(gone), len(new)) in sizes
        if kind != "count":
            (old,), (changed,) = gone, new
            differing = {
                name for name in ("shape", "colour", "size", "position") if getattr(old, name) != getattr(changed, name)
            }
            assert differing == {kind} or (kind == "presence" and differing in ({"colour"}, {"shape"}))
        assert all(combinations is None or is_unseen(o.colour, o.shape) == (combinations == "unseen") for o in after)
        assert 1 <= len(after) <= 5
        assert split_of(one.other.signature()) == "train"
    assert changed_kinds < 10
    assert 4 <= yes <= 16  # of 20 questions
    assert 80 <= drawn_first <= 120  # a coin decides which of the two scenes is shown


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_without_the_image_the_answers_of_counterfactuals_are_ranked_at_chance(kind: Kind) -> None:
    """By length, by the alphabet, and by a model that has read the words of as many other pairs."""
    forms: tuple[Form, Form] = ("describe", "question")
    pairs = [draw_counterfactual(DATASET, "train", i, kind, forms[i % 2]).pair for i in range(4000)]
    chosen, rejected = [p.chosen for p in pairs], [p.rejected for p in pairs]
    words = CountVectorizer(ngram_range=(1, 3)).fit([*chosen, *rejected])
    difference = words.transform(chosen) - words.transform(rejected)
    signs = np.where(np.arange(2000) % 2, 1, -1)
    model = LogisticRegression(C=0.1, max_iter=200, fit_intercept=False).fit(
        difference[:2000].multiply(signs[:, None]).tocsr(), signs
    )
    right = {
        "words": (model.decision_function(difference[2000:]) > 0).astype(float),
        "length": 0.5 + 0.5 * np.sign([len(c) - len(r) for c, r in zip(chosen, rejected, strict=True)]),
        "alphabet": np.array([c < r for c, r in zip(chosen, rejected, strict=True)], float),
    }
    assert {name: round(100 * float(scores.mean()), 1) for name, scores in right.items()} == pytest.approx(
        dict.fromkeys(right, 50), abs=3
    )


def test_the_difference_of_a_counterfactual_lies_on_the_changed_object() -> None:
    for i in range(40):
        one = draw_counterfactual(DATASET, "test", i, KINDS[i % 5], "question")
        difference = one.difference()
        assert difference.any()
        around = np.zeros_like(difference)
        for scene, others in ((one.scene, one.other.objects), (one.other, one.scene.objects)):
            for changed in (o for o in scene.objects if o not in others):
                y, x = np.mgrid[: DATASET.image_px, : DATASET.image_px] + 0.5
                reach = (changed.radius * 1.2) * DATASET.image_px + 2
                around |= np.hypot(x - changed.x * DATASET.image_px, y - changed.y * DATASET.image_px) < reach
        assert not (difference & ~around).any()
