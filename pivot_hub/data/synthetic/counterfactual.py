"""Two scenes that differ in one thing, with two answers of which each is right for one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pivot_hub.data.synthetic import text
from pivot_hub.data.synthetic.objects import SceneObject
from pivot_hub.data.synthetic.scene import Scene, ShapesDataset, Split, split_of

ATTEMPTS = 100  # changes of a kind that are drawn for a scene
PURPOSE = 10  # of the random numbers that draw a counterfactual of a scene


@dataclass(frozen=True)
class Counterfactual:
    """A scene and another one that differs in one thing; light, background and noise are the same.

    Args:
        scene: The scene.
        other: The scene with one object of another colour, shape or position, or with one object more or less.
        pair: Question and answers: `chosen` is right for the scene, and `rejected` for the other one.
    """

    scene: Scene
    other: Scene
    pair: text.Pair

    def difference(self) -> np.ndarray:
        """Return which pixels differ between the two images, (H, W) bool."""
        first, second = (np.asarray(scene.render().image) for scene in (self.scene, self.other))
        return (first != second).any(-1)


def draw_counterfactual(
    dataset: ShapesDataset, split: Split, index: int, kind: text.Kind, form: text.Form
) -> Counterfactual:
    """Draw the counterfactual of a scene, which depends on dataset, split, index, kind and form alone.

    Both scenes belong to the split, and both hold only combinations of colour and shape that the dataset has. A coin
    decides which of the two the scene is, so that either answer is as often the chosen one: without the image, every
    way to rank the two answers is right for half of the pairs.

    Args:
        dataset: The dataset.
        split: Split of the scene.
        index: Index of the scene.
        kind: What differs. Of `presence`, an object has another colour or shape; of `count`, there is one more or less.
            In the rare scene that allows no such change, the next kind of `text.KINDS` differs.
        form: Form of the pair: a question with its answers, or two descriptions.
    """
    scene, rng = dataset.scene(split, index), dataset.scene_rng(split, index, PURPOSE)
    while (found := _find_change(scene, split, kind, rng)) is None:
        kind = text.KINDS[(text.KINDS.index(kind) + 1) % len(text.KINDS)]
    target, changed, other = found
    before = None if target is None else scene.objects[target]
    swapped = bool(rng.integers(2))
    if swapped:
        scene, other = other, scene
        before, changed = changed, before
        target = None if before is None else scene.objects.index(before)
    if form == "describe":
        pair = text.Pair(kind, form, text.DESCRIBE, scene.caption(), other.caption(), target)
    else:
        question, chosen, rejected = text.ask_difference(scene.objects, other.objects, before, changed, kind, rng)
        pair = text.Pair(kind, form, question, chosen, rejected, target)
    return Counterfactual(scene, other, pair)


def _find_change(
    scene: Scene, split: Split, kind: text.Kind, rng: np.random.Generator
) -> tuple[int | None, SceneObject | None, Scene] | None:
    """Draw a change until it gives another scene of the split, and return it with that scene; None after ATTEMPTS."""
    for _ in range(ATTEMPTS):
        target, changed = _change(scene, kind, rng)
        if changed is not None and not scene.dataset.fits(
            changed, [o for i, o in enumerate(scene.objects) if i != target]
        ):
            continue
        other = _scene_with(scene, target, changed)
        if other.signature() != scene.signature() and split_of(other.signature()) == split:
            return target, changed, other
    return None


def _change(scene: Scene, kind: text.Kind, rng: np.random.Generator) -> tuple[int | None, SceneObject | None]:
    """Draw a change: the index of an object, None for a new one, and what takes its place, None for nothing."""
    dataset, objects = scene.dataset, scene.objects
    target, drawn = int(rng.integers(len(objects))), dataset.draw_object(rng)
    subject = objects[target]
    if kind == "count":
        fewest, most = dataset.things
        changes: list[tuple[int | None, SceneObject | None]] = [(None, None)]  # nothing, where the number is fixed
        if len(objects) < most:
            changes.append((None, drawn))
        if len(objects) > fewest:
            changes.append((target, None))
        return changes[int(rng.integers(len(changes)))]
    if kind == "presence":
        kind = ("colour", "shape")[int(rng.integers(2))]
    if kind == "colour":
        return target, replace(subject, colour=drawn.colour, rgb=drawn.rgb)
    if kind == "shape":
        return target, replace(subject, shape=drawn.shape)
    low, high = subject.radius + 0.01, 0.99 - subject.radius
    x, y = (min(max(centre, low), high) for centre in (drawn.x, drawn.y))
    return target, replace(subject, position=drawn.position, x=x, y=y)


def _scene_with(scene: Scene, target: int | None, changed: SceneObject | None) -> Scene:
    """Return the scene with another object in a place of its drawing order, or with one more in front, or one less."""
    behind_to_front: Sequence[SceneObject | None] = [changed if i == target else scene.objects[i] for i in scene.depth]
    if target is None:
        behind_to_front = [*behind_to_front, changed]
    ordered = [o for o in behind_to_front if o is not None]
    objects = sorted(ordered, key=lambda o: o.position)
    return replace(scene, objects=tuple(objects), depth=tuple(objects.index(o) for o in ordered))
