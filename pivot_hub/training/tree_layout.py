"""Several texts as one row without padding, in which texts with the same beginning have it once.

A tree is a prefix, such as an image and a question, and branches that continue it, such as two answers. The trees of a
batch lie one after the other in one row of tokens, which goes through the model's own forward pass: image features,
deepstack and the projector stay the model's. Positions restart at each branch, and attention is computed for each
sequence of prefix and branch, so that no branch sees another. A conversation is a tree without branches.

Attention needs no mask. A prefix and its first branch are one causal sequence. A further branch has queries of its own
and the keys of prefix and branch, causal with both aligned at their ends. On CUDA one call of `varlen_attn` computes
all sequences of a layer.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pivot_hub.mllm.families import family_of

try:
    from torch.nn.attention import varlen

    # Earlier releases of torch have it without windows or grouped heads.
    HAS_VARLEN = {"window_size", "enable_gqa"} <= set(inspect.signature(varlen.varlen_attn).parameters)
except ImportError:
    HAS_VARLEN = False

ATTENTION = "pivot_trees"
HALF_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tree:
    """Consecutive tokens of a row: a prefix, then branches, each of which continues the prefix alone.

    Args:
        start: Position of the prefix's first token in the row.
        prefix: Number of tokens of the prefix.
        branches: Number of tokens of each branch.
    """

    start: int
    prefix: int
    branches: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """Position behind the tree's last token."""
        return self.start + self.prefix + sum(self.branches)


@dataclass(frozen=True)
class TreeLayout:
    """The trees of a row as sequences of queries and keys.

    Args:
        trees: The trees, which fill the row.
        keys: Position in the row of the keys of each sequence, one sequence after the other, (keys,).
        query_bounds: Numbers of queries before each sequence, and of all, (sequences + 1,) int32.
        key_bounds: Numbers of keys before each sequence, and of all, (sequences + 1,) int32.
        longest_query: Queries of the longest sequence.
        longest_key: Keys of the longest sequence.
        image_index: For each image token of the row, the number of its feature, (image tokens,), where texts share
            images; None where every image belongs to one text.
    """

    trees: tuple[Tree, ...]
    keys: Tensor
    query_bounds: Tensor
    key_bounds: Tensor
    longest_query: int
    longest_key: int
    image_index: Tensor | None = None

    @classmethod
    def of(cls, trees: Sequence[Tree], image_index: Tensor | None = None) -> TreeLayout:
        """Return the layout of trees that follow one another without a gap."""
        queries: list[int] = []
        keys: list[Tensor] = []
        for tree in trees:
            for branch in _branches(tree):
                queries.append(branch.stop - branch.start)
                own = torch.arange(branch.start, branch.stop)
                is_first = branch.start == tree.start
                keys.append(own if is_first else torch.cat((torch.arange(tree.start, tree.start + tree.prefix), own)))
        key_counts = [len(k) for k in keys]
        query_bounds, key_bounds = (
            torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32) for counts in (queries, key_counts)
        )
        longest = max(queries), max(key_counts)
        return cls(tuple(trees), torch.cat(keys), query_bounds, key_bounds, *longest, image_index)

    def to(self, *args: Any, **kwargs: Any) -> TreeLayout:
        """Move the tensors to a device; the arguments are those of `torch.Tensor.to`."""
        return self._each(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> TreeLayout:
        """Copy the tensors to memory from which a GPU copies without waiting."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, function: Any) -> TreeLayout:
        return replace(
            self,
            keys=function(self.keys),
            query_bounds=function(self.query_bounds),
            key_bounds=function(self.key_bounds),
            image_index=None if self.image_index is None else function(self.image_index),
        )


def _branches(tree: Tree) -> list[slice]:
    """Return the queries of each sequence of a tree, as places of the row: the prefix belongs to the first."""
    ends = list(itertools.accumulate(tree.branches or (0,), initial=tree.start + tree.prefix))[1:]
    return [slice(start, end) for start, end in zip([tree.start, *ends], ends, strict=False)]


def use_trees(model: PreTrainedModel) -> None:
    """Make an MLLM run rows of trees, given as `tree_layout`; other batches run as before.

    With a layout, the model's inner forward takes `tree_ids` (1, tokens), or the row as `input_ids`; `tree_positions`
    (1, tokens) or (3, 1, tokens); and `tree_take` (rows, tokens of a row), the places of the row whose hidden states
    are returned in the shape of `tree_take`; without it all are.

    Args:
        model: An MLLM of the table whose language model uses sdpa attention.
    """
    inner: Any = model.model
    getattr(inner, family_of(model.config).language).set_attn_implementation(ATTENTION)
    forward = _forward_of(type(inner))  # type: ignore[arg-type]
    own = vars(inner).get("forward")
    if getattr(own, "__func__", None) is forward:
        return
    if own is not None:  # such as accelerate's, for a model on several devices
        inner.forward_without_trees = own
    # Bound methods on the instance are copied with it by deepcopy, and a copy then runs its own weights.
    inner.forward = types.MethodType(forward, inner)


@functools.cache
def _forward_of(inner_class: Any) -> Any:
    """Return the forward of a class of inner models that takes trees too."""

    @functools.wraps(inner_class.forward)
    def forward(self: Any, *args: Any, tree_layout: TreeLayout | None = None, **kwargs: Any) -> Any:
        original = vars(self).get("forward_without_trees") or types.MethodType(inner_class.forward, self)
        if tree_layout is None:
            return original(*args, **kwargs)
        return _run_trees(self, original, tree_layout, **kwargs)

    return forward


def _run_trees(
    inner: Any,
    original: Any,
    layout: TreeLayout,
    input_ids: Tensor,
    tree_positions: Tensor,
    tree_ids: Tensor | None = None,
    tree_take: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    row = input_ids if tree_ids is None else tree_ids
    layout = layout.to(row.device)
    # transformers passes a 4-D mask on unchanged; `attend` reads the layout and not the mask.
    kwargs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=row.device)
    kwargs["position_ids"] = tree_positions
    with _shared_images(inner, layout.image_index):
        outputs = original(input_ids=row, tree_layout=layout, **kwargs)
    if tree_take is not None:
        outputs.last_hidden_state = outputs.last_hidden_state.flatten(0, 1)[tree_take]
    return outputs


@contextmanager
def _shared_images(inner: Any, image_index: Tensor | None) -> Iterator[None]:
    """Let the model's forward take the features of each image at every place that shows it."""
    if image_index is None:
        yield
        return
    encode = inner.get_image_features

    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        outputs = encode(*args, **kwargs)
        outputs.pooler_output = _gathered(outputs.pooler_output, image_index)
        if (levels := getattr(outputs, "deepstack_features", None)) is not None:
            outputs.deepstack_features = [_gathered(level, image_index) for level in levels]
        return outputs

    inner.get_image_features = get_image_features
    try:
        yield
    finally:
        del inner.get_image_features


def _gathered(features: Any, image_index: Tensor) -> Any:
    """Return the features (tokens, D) at an index, as a sequence of one where they come as a sequence of images."""
    if isinstance(features, Tensor):
        return features.flatten(0, -2)[image_index]
    return [torch.cat([feature.flatten(0, -2) for feature in features])[image_index]]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree_layout: TreeLayout | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention in trees: a prefix attends to itself, a branch to its prefix and itself, both causally.

    Args:
        module: The attention layer.
        query: Queries, (1, heads, tokens, d).
        key: Keys, which may have fewer heads.
        value: Values, with as many heads as the keys.
        attention_mask: Mask of sdpa, which is only read without a layout.
        scaling: Factor of the scores; None for sdpa's default.
        dropout: Probability of dropping an attention weight.
        tree_layout: The trees; without them this function is sdpa.
        sliding_window: Number of keys that a query attends to at most, its own included.
        kwargs: Further arguments of sdpa.

    Returns:
        The output, (1, tokens, heads, d), and None, for no attention weights.
    """
    if tree_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    alike = query.shape[-1] == value.shape[-1] and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    if HAS_VARLEN and query.is_cuda and half in HALF_PRECISION and alike and not dropout:
        return _attend_at_once(query, key, value, tree_layout, half, scaling, sliding_window), None
    return _attend_one_by_one(query, key, value, tree_layout, scaling, dropout, sliding_window), None


def _attend_at_once(
    query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, dtype: torch.dtype, scale: float | None, window: Any
) -> Tensor:
    """Compute all sequences by one kernel for sequences of different lengths."""
    # Views and one gathering of keys and values together: each operator that writes is a kernel to launch.
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1).to(dtype) for tensor in (query, key, value))  # (tokens, heads, d)
    keys, values = torch.cat((k, v), 1).index_select(0, layout.keys).chunk(2, 1)
    output: Any = varlen.varlen_attn(
        q,
        keys,
        values,
        layout.query_bounds,
        layout.key_bounds,
        layout.longest_query,
        layout.longest_key,
        scale=scale,
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast(Tensor, output[None])


def _attend_one_by_one(
    query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float | None, dropout: float, window: Any
) -> Tensor:
    """Compute one sequence after the other, where there is no kernel for all: on a CPU, or in float32."""
    groups = query.shape[1] // key.shape[1]
    sequences = [(tree, b.start == tree.start, b.stop - b.start) for tree in layout.trees for b in _branches(tree)]
    # One split, whose backward pass is one concatenation: that of a slice writes the whole row.
    lengths = [length for _, _, length in sequences]
    pieces = zip(*(t.split(lengths, 2) for t in (query, repeat_kv(key, groups), repeat_kv(value, groups))), strict=True)
    outputs = []
    stem_key, stem_value = key, value
    for (tree, is_first, _), (q, k, v) in zip(sequences, pieces, strict=True):
        if is_first:
            stem_key, stem_value = k, v
        else:
            k = torch.cat((stem_key[:, :, : tree.prefix], k), 2)
            v = torch.cat((stem_value[:, :, : tree.prefix], v), 2)
        queries, keys = q.shape[2], k.shape[2]
        causal = queries == keys and not (window and keys > window)
        mask = None if causal else lower_right_mask(queries, keys, window or keys, q.device)
        output = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, 1)


def lower_right_mask(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Return what the last `queries` tokens of `keys` attend to: their own window of the past, (queries, keys)."""
    past = keys - queries
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(past).triu(past - window + 1)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
