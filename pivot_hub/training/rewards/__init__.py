"""Rewards that a program verifies, for stages of reinforcement learning: plain functions of TRL's signature.

Each takes `completions` and, as keyword lists, columns of the rows and whatever else TRL hands over; it returns one
number a row, or None where it does not apply. The functions can be given to TRL's GRPOTrainer and RLOOTrainer as they
are; `load.load_rewards` turns a recipe's `rewards` into such functions.

| file | what it holds |
|---|---|
| `exact_match` | the right answer, word for word or as the option that it means |
| `count` | the right number, with partial credit for a near one |
| `words` | `colour`, `shape` and `position` of the synthetic Shapes dataset |
| `box_iou` | overlap of the answer's box with the right one |
| `pointing` | the answer's point inside a box or a mask |
| `format` | the completion matches a pattern |
| `length` | the completion is not too long |
| `completion` | text and answer of a completion |
| `coordinates` | numbers of points and boxes, and their scale |
| `load` | the rewards of a recipe, each checked when it is called |
"""

from pivot_hub.training.rewards.box_iou import box_iou
from pivot_hub.training.rewards.count import count
from pivot_hub.training.rewards.exact_match import exact_match
from pivot_hub.training.rewards.format import format
from pivot_hub.training.rewards.length import length
from pivot_hub.training.rewards.pointing import pointing
from pivot_hub.training.rewards.words import colour, position, shape

# Rewards that look at the form of a completion, whatever the row says is right; all others look at its content.
FORM = ("format", "length")

__all__ = ["box_iou", "colour", "count", "exact_match", "format", "length", "pointing", "position", "shape"]
