"""Profile of a training step on fake tensors: the FLOPs that it needs, and the bytes that it holds at its peak.

The step is the trainer's own: transformers' classes, their gradient checkpointing, autocast, and TRL's fused lm_head
run on fake CPU tensors, which have no storage, so nothing is computed and no weight is needed. A GPU uses a little less
memory than this profile gives: here grouped keys and values are repeated, and TRL's lm_head makes temporary copies of
its tiles, for which CUDA has kernels.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from trl.trainer.utils import add_fused_lm_head

from pivot_hub.mllm.families import family_of
from pivot_hub.planner.image_inputs import PlannedImage
from pivot_hub.training.tree_layout import Tree, TreeLayout, use_trees

Phase = Literal["forward", "backward", "recompute", "reference"]
aten = torch.ops.aten
# torch's FLOP counter has no formulas for the operators that only CPUs run.
CPU_FORMULAS: dict[Any, Callable[..., Any]] = {
    aten.addmm_: flop_registry[aten.addmm],
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
# The formulas of attention count the full square of queries and keys, causal or not.
FORMULAS = {**flop_registry, **CPU_FORMULAS}


@dataclass(frozen=True)
class Batch:
    """The batch that one process runs at a time, with rows of one length.

    Args:
        rows: Rows of the language model's input.
        width: Tokens of each row, image tokens included.
        images: Images that the vision tower encodes, one of each row or tree.
        scored: Positions that lm_head projects.
        answers: Answers whose hidden states are selected for the loss; 0 if the loss reads the hidden states in place.
        trees: Trees that share a row; None for rows of plain causal text.
    """

    rows: int
    width: int
    images: int
    scored: int
    answers: int = 0
    trees: tuple[Tree, ...] | None = None


@dataclass(frozen=True)
class StepProfile:
    """FLOPs of a step on one process, and the bytes that it holds in addition to weights and optimizer.

    Args:
        flops: FLOPs by part (vision, projector, language with lm_head) and phase.
        activations: Bytes of activations at the peak of all three kinds together.
        copies: Bytes of copies of weights in autocast's dtype, at the same peak.
        gradients: Bytes of gradients, at the same peak.
        activations_alone: Most bytes of activations at any time.
    """

    flops: dict[str, dict[Phase, int]]
    activations: int
    copies: int
    gradients: int
    activations_alone: int


class _Ledger(TorchDispatchMode):
    """Counts the FLOPs of every operator and the bytes of every live storage, without the weights'.

    Args:
        weights: Keys of the storages of weights, which are not counted.
    """

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.weights = weights
        self.part = "vision"
        self.phase: Phase = "forward"
        self.flops: Counter[tuple[str, Phase]] = Counter()
        self.kinds: dict[int, str] = {}  # activations, copies or gradients, for each live storage
        self.sizes: dict[int, int] = {}
        self.watched: dict[int, weakref.ref[Any]] = {}
        self.held: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.activations_alone = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.flops[self.part, self.phase] += formula(*args, **kwargs, out_val=result)
        is_copy = func is aten._to_copy.default and _key(args[0]) in self.weights
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor, "copies" if is_copy else "activations")
        return result

    def _hold(self, tensor: torch.Tensor, kind: str) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self.weights or key in self.kinds:
            return
        self.kinds[key], self.sizes[key] = kind, storage.nbytes()
        self.watched[key] = weakref.ref(storage, partial(self._release, key))
        self._change(kind, self.sizes[key])

    def _release(self, key: int, _: object) -> None:
        del self.watched[key]
        self._change(self.kinds.pop(key), -self.sizes.pop(key))

    def _change(self, kind: str, size: int) -> None:
        self.held[kind] += size
        if self.held.total() > self.peak.total():
            self.peak = self.held.copy()
        self.activations_alone = max(self.activations_alone, self.held["activations"])

    def count_as_gradient(self, tensor: torch.Tensor) -> None:
        """Move a tensor that the optimizer will read from its kind to the gradients."""
        key = _key(tensor)
        size, kind = self.sizes[key], self.kinds[key]
        self.kinds[key] = "gradients"
        self.held[kind] -= size
        self.held["gradients"] += size

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Count the FLOPs inside the block as recomputed."""
        previous, self.phase = self.phase, "recompute"
        try:
            yield
        finally:
            self.phase = previous

    def follow(self, model: PreTrainedModel) -> None:
        """Follow which part runs, by hooks on the modules of the projector and on the language model.

        The gradients of the projector's modules mark the same borders in the backward pass. Some modules lie inside the
        vision tower, which goes on after them.
        """

        def enter(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self.part = "projector"
            if args[0].requires_grad:
                args[0].register_hook(lambda gradient: setattr(self, "part", "vision"))

        def leave(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            self.part = "vision"
            if output.requires_grad:
                output.register_hook(lambda gradient: setattr(self, "part", "projector"))

        for projector in _projectors(model):
            projector.register_forward_pre_hook(enter)
            projector.register_forward_hook(leave)
        language: nn.Module = getattr(model.model, family_of(model.config).language)
        language.register_forward_pre_hook(lambda *inputs: setattr(self, "part", "language"))


def _projectors(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules that make up the projector."""
    family, inner = family_of(model.config), cast(Any, model.model)
    if family.projector is not None:
        return [getattr(inner, family.projector)]
    modules: list[nn.Module] = []
    for name in family.mergers:
        module = getattr(getattr(inner, family.tower), name, None)
        modules += module if isinstance(module, nn.ModuleList) else [module] if module is not None else []
    return modules


class _RealIntegers(TorchDispatchMode):
    """Computes integers and booleans really, on top of FakeTensorMode, so that only floats are fake.

    Towers of native resolution compute from the sizes of images how to split patches into images and windows, and
    models compute from token ids where the features of images go. The shapes of such results depend on values.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if FakeTensor not in types and _is_real(func, args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            args = (args[0], _without_masks(args[1]), *args[2:])
        return func(*args, **kwargs)


def _is_real(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operator without fake tensors reads tensors, or makes integers or booleans, as `arange` does."""
    if any(isinstance(each, torch.Tensor) for each in tree_leaves((args, kwargs))):
        return True
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return not dtype.is_floating_point
    values = {aten.arange: args, aten.full: args[1:2]}.get(func.overloadpacket, ())
    return bool(values) and all(isinstance(value, int) for value in values)


def _without_masks(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Replace boolean masks among the indices of a tensor by the places that they select."""
    places: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            with unset_fake_temporarily():
                places += index.nonzero().unbind(1)
        else:
            places.append(index)
    return places


def profile_step(
    model: PreTrainedModel,
    batch: Batch,
    image: PlannedImage,
    autocast: torch.dtype | None,
    checkpointing: bool = False,
    accumulating: bool = False,
    reference: bool = False,
    training: bool = True,
    weights: torch.dtype = torch.float32,
) -> StepProfile:
    """Run one batch forward and backward on fake tensors, without computing it.

    Args:
        model: A new model on the meta device, whose frozen weights need no gradients.
        batch: The batch.
        image: Each of its images.
        autocast: Data type of the forward pass; None leaves it in the data type of the weights.
        checkpointing: Whether layers keep their inputs only and run again in the backward pass.
        accumulating: Whether gradients of an earlier batch exist already.
        reference: Whether the reference model's forward pass follows the policy's.
        training: Whether there is a backward pass. Without it, the forward pass keeps nothing for one.
        weights: Data type of the weights as the forward pass finds them.
    """
    network = cast(nn.Module, model)
    with FakeTensorMode(allow_non_fake_inputs=True), _RealIntegers():
        network._apply(lambda t: torch.zeros(t.shape, dtype=weights if t.is_floating_point() else t.dtype))
        model.tie_weights()
        network.train()
        if not training:
            network.requires_grad_(False)  # as in the reference: autocast keeps no copies of frozen weights
        ledger = _Ledger({_key(t) for t in (*network.parameters(), *network.buffers())})
        ledger.follow(model)
        _prepare(model, batch, image, checkpointing, ledger)
        with ledger:
            trained = [p for p in network.parameters() if p.requires_grad] if training else []
            for weight in trained:
                if accumulating:
                    weight.grad = torch.zeros_like(weight)
                    ledger.count_as_gradient(weight.grad)
                else:
                    weight.register_post_accumulate_grad_hook(partial(_count_gradient, ledger))
            targets = torch.zeros(1, batch.scored, dtype=torch.long)
            with torch.autocast("cpu", autocast, enabled=autocast is not None), torch.set_grad_enabled(training):
                loss = network(fused_lm_head=True, shift_labels=targets).loss
                if reference:
                    ledger.part, ledger.phase = "vision", "reference"
                    with torch.no_grad():
                        network(fused_lm_head=True, shift_labels=targets)
            if training:
                ledger.part, ledger.phase = "language", "backward"
                loss.backward()
    flops: dict[str, dict[Phase, int]] = {part: {} for part in ("vision", "projector", "language")}
    for (part, phase), count in ledger.flops.items():
        flops[part][phase] = int(count)
    peak = {kind: ledger.peak[kind] for kind in ("activations", "copies", "gradients")}
    return StepProfile(flops, activations_alone=ledger.activations_alone, **peak)


def profile_forward(model: nn.Module, *inputs: tuple[int, ...]) -> tuple[int, int]:
    """Run a model's forward pass without gradients on fake tensors.

    Args:
        model: A new model on the meta device.
        *inputs: Shapes of its arguments, in float32.

    Returns:
        FLOPs, and the most bytes of inputs, activations and outputs that are held at once.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _RealIntegers(), torch.no_grad():
        model._apply(lambda t: torch.zeros(t.shape, dtype=t.dtype))
        ledger = _Ledger({_key(t) for t in (*model.parameters(), *model.buffers())})
        with ledger:
            model.eval()(*(torch.zeros(shape) for shape in inputs))
    return ledger.flops.total(), ledger.activations_alone


def _count_gradient(ledger: _Ledger, weight: torch.Tensor) -> None:
    assert weight.grad is not None
    ledger.count_as_gradient(weight.grad)


def _prepare(model: PreTrainedModel, batch: Batch, image: PlannedImage, checkpointing: bool, ledger: _Ledger) -> None:
    """Give the model TRL's fused lm_head, over a forward pass that creates its own batch."""
    inner: Any = model.model
    if batch.trees is not None:
        use_trees(model)
    if checkpointing:
        options = {
            "use_reentrant": False,
            "preserve_rng_state": False,  # fake tensors have no random state
            "context_fn": lambda: (nullcontext(), ledger.recomputing()),
        }
        with warnings.catch_warnings():
            # The oldest transformers that we support has this name only.
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(options)
    original = inner.forward

    def forward(use_cache: bool = False) -> BaseModelOutput:
        states = original(**_inputs(model, batch, image), use_cache=False).last_hidden_state
        return BaseModelOutput(last_hidden_state=_scored(states.flatten(0, 1), batch))

    inner.forward = forward
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))


def _inputs(model: PreTrainedModel, batch: Batch, image: PlannedImage) -> dict[str, Any]:
    """Return a batch as the stage's collator makes it: an image before the text of each row or tree."""
    family = family_of(model.config)
    ids = torch.zeros(batch.rows, batch.width, dtype=torch.long)
    starts = [0] if batch.trees is None else [tree.start for tree in batch.trees]
    for start in starts:
        ids[:, start : start + image.features] = family.image_token_id(model.config)
    inputs = {"input_ids": ids, **image.inputs(batch.images, cast(Any, model.model).dtype)}
    if batch.trees is not None:
        axes = (3, *ids.shape) if family.positions == "mrope" else ids.shape
        return inputs | {
            "tree_positions": torch.zeros(axes, dtype=torch.long),
            "tree_layout": TreeLayout.of(batch.trees),
        }
    is_image = (ids == family.image_token_id(model.config)).long()
    if family.positions == "mrope":
        inputs["mm_token_type_ids"] = is_image
    if not family.shares_prompts:
        inputs["token_type_ids"] = is_image
    if batch.rows > 1:  # real rows differ in length, so their batch has a mask
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, -1] = 0
    return inputs


def _scored(states: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the hidden states that lm_head projects, (1, scored, D), of those of all tokens, (tokens, D)."""
    if batch.answers:
        states = states[torch.zeros(batch.answers, 1 + batch.scored // batch.answers, dtype=torch.long)]
        return states[:, :-1].reshape(1, batch.scored, -1)
    return states[torch.zeros(batch.scored, dtype=torch.long)].unsqueeze(0)


def _key(tensor: Any) -> int:
    """Return a number that all views of the same bytes share."""
    return int(tensor.untyped_storage()._cdata)
