"""Texts and the answers that continue them as one row of trees: token ids, kinds of tokens and positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pivot_hub.mllm.inputs import PositionsOf, ProcessedText
from pivot_hub.training.tree_layout import Tree, TreeLayout


@dataclass(frozen=True)
class TreeRow:
    """A row of trees.

    Args:
        inputs: Kinds of the tokens (1, tokens) and tree_positions (1, tokens) or (3, 1, tokens), which an MLLM takes
            after `use_trees`.
        ids: Token ids (1, tokens).
        trees: The trees, which fill the row.
        places: For each text and each of its answers, the places of the text's last token and of the answer's tokens.
    """

    inputs: dict[str, Tensor]
    ids: Tensor
    trees: tuple[Tree, ...]
    places: list[list[list[int]]]

    def layout(self, image_index: Tensor | None = None) -> TreeLayout:
        """Return the layout of the trees, see `TreeLayout`."""
        return TreeLayout.of(self.trees, image_index)


def tree_row(texts: Sequence[ProcessedText], answers: Sequence[Sequence[list[int]]], positions: PositionsOf) -> TreeRow:
    """Lay texts out one after the other, each followed by its answers.

    Args:
        texts: The texts, which may have images.
        answers: Token ids of the answers to each text. An answer without a token is no branch.
        positions: Function that returns the positions of a text's tokens, see `positions_of`. Those of each answer
            continue them.
    """
    row: list[int] = []
    kinds: dict[str, list[int]] = {name: [] for name in texts[0].kinds}
    axes: list[Tensor] = []  # positions (axes, tokens)
    trees: list[Tree] = []
    places: list[list[list[int]]] = []
    for text, branches in zip(texts, answers, strict=True):
        tree = Tree(len(row), len(text.ids), tuple(len(branch) for branch in branches if branch))
        trees.append(tree)
        text_positions = positions(text)
        axes.append(text_positions)
        row += text.ids
        text_end, next_position = len(row) - 1, int(text_positions.max()) + 1
        places.append([])
        for branch in branches:
            places[-1].append([text_end, *range(len(row), len(row) + len(branch))])
            row += branch
            branch_positions = torch.arange(next_position, next_position + len(branch))
            axes.append(branch_positions.expand(len(text_positions), -1))
        for name, values in kinds.items():
            values += text.kinds[name] + [0] * sum(tree.branches)
    joined = torch.cat(axes, 1)
    inputs = {name: torch.tensor([values]) for name, values in kinds.items()}
    inputs["tree_positions"] = joined if len(joined) == 1 else joined[:, None]
    return TreeRow(inputs, torch.tensor([row]), tuple(trees), places)
