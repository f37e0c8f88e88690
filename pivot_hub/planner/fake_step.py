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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast
from trl.trainer.utils import add_fused_lm_head

from pivot_hub.encoder.configuration_pivot import backbone_of
from pivot_hub.training.tree_layout import ATTENTION, Layout, branch_mask

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
        images: Images that the vision tower encodes.
        image_occurrences: Images in the rows. An image that two answers share may be encoded once and occur twice.
        scored: Positions that lm_head projects.
        answers: Answers whose hidden states are selected for the loss; 0 if the loss reads the hidden states in place.
        layout: Trees of preference pairs that share a row; None for rows of plain causal text.
    """

    rows: int
    width: int
    images: int
    image_occurrences: int
    scored: int
    answers: int = 0
    layout: Layout | None = None


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

    def follow(self, projector: nn.Module) -> None:
        """Follow which part runs, by hooks on the projector, which runs between vision tower and language model.

        Its gradients mark the same borders in the backward pass.
        """

        def enter(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self.part = "projector"
            if args[0].requires_grad:
                args[0].register_hook(lambda gradient: setattr(self, "part", "vision"))

        def leave(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            self.part = "language"
            if output.requires_grad:
                output.register_hook(lambda gradient: setattr(self, "part", "projector"))

        projector.register_forward_pre_hook(enter)
        projector.register_forward_hook(leave)


def profile_step(
    model: LlavaForConditionalGeneration,
    batch: Batch,
    autocast: torch.dtype | None,
    checkpointing: bool = False,
    accumulating: bool = False,
    reference: bool = False,
    training: bool = True,
) -> StepProfile:
    """Run one batch forward and backward on fake tensors, without computing it.

    Args:
        model: A new model on the meta device, whose frozen weights need no gradients.
        batch: The batch.
        autocast: Data type of the forward pass; None leaves it in float32, the data type of the weights.
        checkpointing: Whether layers keep their inputs only and run again in the backward pass.
        accumulating: Whether gradients of an earlier batch exist already.
        reference: Whether the reference model's forward pass follows the policy's.
        training: Whether there is a backward pass. Without it, the forward pass keeps nothing for one.
    """
    network = cast(nn.Module, model)
    with FakeTensorMode():
        network._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
        model.tie_weights()
        network.train()
        if not training:
            network.requires_grad_(False)  # as in the reference: autocast keeps no copies of frozen weights
        ledger = _Ledger({_key(t) for t in (*network.parameters(), *network.buffers())})
        ledger.follow(cast(nn.Module, model.model.multi_modal_projector))
        _prepare(model, batch, checkpointing, ledger)
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


def _count_gradient(ledger: _Ledger, weight: torch.Tensor) -> None:
    assert weight.grad is not None
    ledger.count_as_gradient(weight.grad)


def _prepare(model: LlavaForConditionalGeneration, batch: Batch, checkpointing: bool, ledger: _Ledger) -> None:
    """Give the model TRL's fused lm_head, over a forward pass that creates its own batch."""
    inner: Any = model.model
    if batch.layout is not None:
        inner.language_model.set_attn_implementation(ATTENTION)
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

    def forward(use_cache: bool = False) -> LlavaModelOutputWithPast:
        return LlavaModelOutputWithPast(last_hidden_state=_hidden_states(model, batch))

    inner.forward = forward
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))


def _hidden_states(model: LlavaForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """Return the hidden states that lm_head projects, (1, scored, D), by the steps of LLaVA and `tree_layout`."""
    inner: Any = model.model
    config: Any = model.config.vision_config
    side = backbone_of(config).image_px(config)
    pixels = torch.zeros(batch.images, config.num_channels, side, side)
    features = torch.stack(list(inner.get_image_features(pixels, return_dict=True).pooler_output))
    image_embeds = features[torch.zeros(batch.image_occurrences, dtype=torch.long)].flatten(0, 1)
    ids = torch.zeros(batch.rows, batch.width, dtype=torch.long)
    embeds = inner.get_input_embeddings()(ids)
    is_image = (ids == model.config.image_token_id).unsqueeze(-1).expand_as(embeds)
    embeds = embeds.masked_scatter(is_image, image_embeds.to(embeds.dtype))
    options: dict[str, Any] = {"use_cache": False}
    if batch.layout is not None:
        masks = tuple(tuple(branch_mask(tree, embeds.device) for tree in trees) for trees in batch.layout)
        options |= {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool), "position_ids": ids}
        options |= {"pair_layout": batch.layout, "pair_masks": masks}
    elif batch.rows > 1:  # real rows differ in length, so their batch has a mask
        options["attention_mask"] = torch.ones_like(ids)
    states = inner.language_model(inputs_embeds=embeds, **options).last_hidden_state.flatten(0, 1)
    if batch.answers:
        states = states[torch.zeros(batch.answers, 1 + batch.scored // batch.answers, dtype=torch.long)]
        return states[:, :-1].reshape(1, batch.scored, -1)
    return states[torch.zeros(batch.scored, dtype=torch.long)].unsqueeze(0)


def _key(tensor: Any) -> int:
    """Return a number that all views of the same bytes share."""
    return int(tensor.untyped_storage()._cdata)
