"""The synthetic Shapes dataset: seeded scenes of coloured shapes whose every pixel and sentence is known.

A scene is a pure function of `(dataset, split, index)`. Captions, questions and preference pairs need only the layout
of a scene, so a language model can be trained on the text of scenes that are never rendered.

`objects` holds the vocabulary and the object of a scene, `text` the language, `drawing` the rendering, `scene` the
layout of scenes and the dataset that draws them, and `counterfactual` pairs of scenes that differ in one thing.
"""

from pivot_hub.data.synthetic.counterfactual import Counterfactual, draw_counterfactual
from pivot_hub.data.synthetic.drawing import RenderedScene
from pivot_hub.data.synthetic.objects import COLOUR_NAMES, COLOURS, POSITIONS, SHAPES, SIZES, SceneObject
from pivot_hub.data.synthetic.scene import SPLITS, Combinations, Scene, ShapesDataset, Split, is_unseen
from pivot_hub.data.synthetic.text import (
    DESCRIBE,
    DESCRIBE_WITH_FACTS,
    ERROR_TYPES,
    KINDS,
    NUMBERS,
    SCAN_SIDE,
    ErrorType,
    Fact,
    Form,
    Kind,
    Pair,
    Question,
    describe,
    draw_fact,
    put_between_facts,
)

__all__ = [
    "COLOURS",
    "COLOUR_NAMES",
    "DESCRIBE",
    "DESCRIBE_WITH_FACTS",
    "ERROR_TYPES",
    "KINDS",
    "NUMBERS",
    "POSITIONS",
    "SCAN_SIDE",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "Combinations",
    "Counterfactual",
    "ErrorType",
    "Fact",
    "Form",
    "Kind",
    "Pair",
    "Question",
    "RenderedScene",
    "Scene",
    "SceneObject",
    "ShapesDataset",
    "Split",
    "describe",
    "draw_counterfactual",
    "draw_fact",
    "is_unseen",
    "put_between_facts",
]
