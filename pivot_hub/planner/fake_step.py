"""A training step rehearsed on tensors without storage: the FLOPs it asks for, and the bytes it holds at its peak.

The step is the trainer's own: transformers' classes, their gradient checkpointing, autocast, and TRL's fused head run
on fake CPU tensors, so nothing is computed and no weight is needed. CUDA kernels differ where the work is the same:
grouped keys and values are repeated here, and TRL's head folds its tiles with temporary copies; both make the figure a
little larger than a GPU's.
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
# torch's counter has no formula for what only CPUs run.
CPU_FORMULAS: dict[Any, Callable[..., Any]] = {
    aten.addmm_: flop_registry[aten.addmm],
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
# Attention's are of the full square of queries and keys, causal or not.
FORMULAS = {**flop_registry, **CPU_FORMULAS}


@dataclass(frozen=True)
class Batch:
    """What one process runs at a time, all rows of one length.

    Args:
        rows: of the language model's input; width: tokens of each, image tokens included.
        images: that the vision tower encodes.
        shown: images in the rows; one that two answers share may be encoded once and shown twice.
        answers: hidden states that are picked for the loss, one row an answer; 0 where the loss reads them in place.
        scored: positions that the head projects.
        layout: trees of pairs that share a row; None for rows of plain causal text.
    """

    rows: int
    width: int
    images: int
    shown: int
    scored: int
    answers: int = 0
    layout: Layout | None = None


@dataclass(frozen=True)
class StepProfile:
    """FLOPs of a step on one process, and the bytes it holds beside weights and optimizer.

    Args:
        flops: of each part (vision, projector, language with its head) in each phase.
        activations, copies, gradients: at the moment when most is held; copies are of weights, in autocast's dtype.
        activations_alone: most that is held of activations, at any moment.
    """

    flops: dict[str, dict[Phase, int]]
    activations: int
    copies: int
    gradients: int
    activations_alone: int


class _Ledger(TorchDispatchMode):
    """Counts the FLOPs of every operator and the bytes of every storage that lives, weights left out."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.weights = weights
        self.part = "vision"
        self.phase: Phase = "forward"
        self.flops: Counter[tuple[str, Phase]] = Counter()
        self.kinds: dict[int, str] = {}  # of each storage that lives
        self.sizes: dict[int, int] = {}
        self.watched: dict[int, weakref.ref[Any]] = {}
        self.held: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.activations_alone = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.flops[self.part, self.phase] += formula(*args, **kwargs, out_val=made)
        is_copy = func is aten._to_copy.default and _key(args[0]) in self.weights
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor, "copies" if is_copy else "activations")
        return made

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

    def call_gradient(self, tensor: torch.Tensor) -> None:
        """Count a tensor that the optimizer will read among the gradients."""
        key = _key(tensor)
        size, kind = self.sizes[key], self.kinds[key]
        self.kinds[key] = "gradients"
        self.held[kind] -= size
        self.held["gradients"] += size

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        before, self.phase = self.phase, "recompute"
        try:
            yield
        finally:
            self.phase = before

    def follow(self, projector: nn.Module) -> None:
        """Tell the parts apart by the projector, which lies between them: forward and, by its gradients, backward."""

        def enter(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self.part = "projector"
            if args[0].requires_grad:
                args[0].register_hook(lambda gradient: setattr(self, "part", "vision"))

        def leave(module: nn.Module, args: Any, made: torch.Tensor) -> None:
            self.part = "language"
            if made.requires_grad:
                made.register_hook(lambda gradient: setattr(self, "part", "projector"))

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
    """Run one batch forward and backward without computing it.

    Args:
        model: on the meta device, fresh, its frozen weights without gradients.
        autocast: dtype of the forward pass; None leaves it in float32, the dtype of the weights.
        checkpointing: layers keep their input only and are run again in the backward pass.
        accumulating: gradients of an earlier batch are there already.
        reference: the policy's forward pass is followed by the reference model's.
        training: with a backward pass; else forward only and nothing kept for it.
    """
    network = cast(nn.Module, model)
    with FakeTensorMode():
        network._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
        model.tie_weights()
        network.train()
        if not training:
            network.requires_grad_(False)  # as the reference is, whose weights autocast does not keep copies of
        ledger = _Ledger({_key(t) for t in (*network.parameters(), *network.buffers())})
        ledger.follow(cast(nn.Module, model.model.multi_modal_projector))
        _prepare(model, batch, checkpointing, ledger)
        with ledger:
            trained = [p for p in network.parameters() if p.requires_grad] if training else []
            for weight in trained:
                if accumulating:
                    weight.grad = torch.zeros_like(weight)
                    ledger.call_gradient(weight.grad)
                else:
                    weight.register_post_accumulate_grad_hook(_told(ledger))
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


def _told(ledger: _Ledger) -> Callable[[torch.Tensor], None]:
    def tell(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        ledger.call_gradient(weight.grad)

    return tell


def _prepare(model: LlavaForConditionalGeneration, batch: Batch, checkpointing: bool, ledger: _Ledger) -> None:
    """Give the model TRL's head over a forward pass that makes its own batch."""
    inner: Any = model.model
    if batch.layout is not None:
        inner.language_model.set_attn_implementation(ATTENTION)
    if checkpointing:
        options = {
            "use_reentrant": False,
            "preserve_rng_state": False,  # there is no state to keep of tensors that hold nothing
            "context_fn": lambda: (nullcontext(), ledger.recomputing()),
        }
        with warnings.catch_warnings():
            # The name that our floor of transformers has.
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(options)

    def forward(use_cache: bool = False) -> LlavaModelOutputWithPast:
        return LlavaModelOutputWithPast(last_hidden_state=_hidden_states(model, batch))

    inner.forward = forward
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))


def _hidden_states(model: LlavaForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """What the head projects: (1, scored, D). The steps are those of LLaVA's forward and of `training.pairs`."""
    inner: Any = model.model
    config: Any = model.config.vision_config
    side = backbone_of(config).image_px(config)
    pixels = torch.zeros(batch.images, config.num_channels, side, side)
    features = torch.stack(list(inner.get_image_features(pixels, return_dict=True).pooler_output))
    shown = features[torch.zeros(batch.shown, dtype=torch.long)].flatten(0, 1)
    ids = torch.zeros(batch.rows, batch.width, dtype=torch.long)
    embeds = inner.get_input_embeddings()(ids)
    places = (ids == model.config.image_token_id).unsqueeze(-1).expand_as(embeds)
    embeds = embeds.masked_scatter(places, shown.to(embeds.dtype))
    options: dict[str, Any] = {"use_cache": False}
    if batch.layout is not None:
        masks = tuple(tuple(branch_mask(tree, embeds.device) for tree in trees) for trees in batch.layout)
        options |= {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool), "position_ids": ids}
        options |= {"pair_layout": batch.layout, "pair_masks": masks}
    elif batch.rows > 1:  # rows of a batch differ in length, so that it has a mask
        options["attention_mask"] = torch.ones_like(ids)
    states = inner.language_model(inputs_embeds=embeds, **options).last_hidden_state.flatten(0, 1)
    if batch.answers:
        states = states[torch.zeros(batch.answers, 1 + batch.scored // batch.answers, dtype=torch.long)]
        return states[:, :-1].reshape(1, batch.scored, -1)
    return states[torch.zeros(batch.scored, dtype=torch.long)].unsqueeze(0)


def _key(tensor: Any) -> int:
    """What two tensors share that are views of the same bytes."""
    return int(tensor.untyped_storage()._cdata)
