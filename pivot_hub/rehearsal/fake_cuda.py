"""A pretended CUDA device: an H100 that torch and the libraries over it find, whose kernels compute nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pivot_hub.rehearsal.ledger import Ledger, place_of_call

DEVICE = torch.device("cuda", 0)
MEMORY_BYTES = 80 * 2**30
CAPABILITY = (9, 0)  # an H100


@contextmanager
def triton_kernels() -> Iterator[None]:
    """Let TRL's fused head take its CUDA path on every device: on the CPU its tiles are folded by torch."""
    import trl.kernels.chunked_logprob as head
    import trl.trainer.utils

    changes: list[tuple[Any, str, Any]] = [
        (head, "_use_triton", _always),
        (trl.trainer.utils, "_use_triton", _always),
        (head, "_forward_kernel", _TritonKernel("forward tile", head._forward_tile)),
        (head, "_backward_kernel", _TritonKernel("backward tile", head._backward_tile)),
    ]
    with ExitStack() as stack:
        for module, name, value in changes:
            stack.enter_context(patch.object(module, name, value))
        if not hasattr(head, "triton"):
            stack.enter_context(
                patch.object(head, "triton", SimpleNamespace(cdiv=lambda a, b: -(-a // b)), create=True)
            )
        yield


@contextmanager
def cuda_device(ledger: Ledger) -> Iterator[None]:
    """Pretend a CUDA device, whose attention and Triton kernels count in the ledger."""
    import transformers.utils.import_utils

    properties = SimpleNamespace(name="NVIDIA H100 (pretended)", major=9, minor=0, total_memory=MEMORY_BYTES)
    values: dict[str, Any] = {
        "is_available": _always,
        "is_bf16_supported": _always,
        "is_current_stream_capturing": _never,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *args: CAPABILITY,
        "get_device_properties": lambda *args: properties,
        "get_device_name": lambda *args: properties.name,
        "mem_get_info": lambda *args: (MEMORY_BYTES, MEMORY_BYTES),
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda *args: torch.get_rng_state(),
        "set_rng_state": lambda *args: None,
        "synchronize": lambda *args: ledger.syncs.update([(place_of_call(), "synchronize")]),
    }
    attention = _fused_attention(ledger, torch.nn.functional.scaled_dot_product_attention)
    with ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor))  # only a driver pins
        stack.enter_context(patch.object(torch.nn.Module, "_apply", _apply))
        # The mode would initialise the device that it finds.
        stack.enter_context(patch.object(FakeTensorMode, "avoid_device_init", True))
        # As on a GPU, optimizers and clipping take many tensors in one kernel.
        for module in map(import_module, ("torch.utils._foreach_utils", "torch.optim.optimizer")):
            types = [*module._foreach_supported_types, FakeTensor]
            stack.enter_context(patch.object(module, "_foreach_supported_types", types))
        stack.enter_context(patch.object(torch.cuda.amp.common, "amp_definitely_not_available", _never))
        stack.enter_context(patch.object(torch.nn.functional, "scaled_dot_product_attention", attention))
        # transformers skips its readings of fake tensors, but a real CUDA tensor is read.
        stack.enter_context(patch.object(transformers.utils.import_utils, "is_fake_tensor", _never))
        _TritonKernel.ledger = ledger
        try:
            yield
        finally:
            _TritonKernel.ledger = None


def to_fake_cuda(values: Any) -> Any:
    """Return a batch with fake CUDA tensors, as accelerate's loader moves it. Call it in FakeTensorMode."""
    if isinstance(values, Mapping):
        return {key: to_fake_cuda(value) for key, value in values.items()}
    return values.to(DEVICE) if hasattr(values, "to") else values


def move_to_fake_cuda(module: torch.nn.Module) -> None:
    """Replace the weights and buffers of a module by fake CUDA tensors. Call it in FakeTensorMode."""
    module.zero_grad(set_to_none=True)
    _apply(module, lambda t: torch.empty(t.shape, dtype=t.dtype, device=DEVICE))


def _apply(module: torch.nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
    """Replace weights and buffers, as torch's own method does, but for fake tensors, which it cannot exchange.

    Weights that are tied stay tied.
    """
    replaced: dict[int, Any] = {}
    for part in module.modules() if recurse else [module]:
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in replaced:
                    with torch.no_grad():
                        new = function(tensor)
                    if new is not tensor and isinstance(tensor, torch.nn.Parameter):
                        new = torch.nn.Parameter(new, requires_grad=tensor.requires_grad)
                    replaced[id(tensor)] = new
                tensors[name] = replaced[id(tensor)]
    return module


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


def _never(*args: Any, **kwargs: Any) -> bool:
    return False


class _TritonKernel:
    """One of TRL's Triton kernels: on the CPU the function of torch that it equals, on CUDA a count."""

    ledger: Ledger | None = None

    def __init__(self, name: str, on_cpu: Any) -> None:
        self.name, self.on_cpu = name, on_cpu

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **options: Any) -> None:
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            if not any(t.is_cuda for t in tensors):
                self.on_cpu(*args, **options)
                return
            if any(not t.is_cuda for t in tensors):
                raise RuntimeError(f"Triton kernel {self.name}: arguments {[str(t.device) for t in tensors]}")
            assert self.ledger is not None
            self.ledger.count(f"triton {self.name}")

        return run


class _Attention(torch.autograd.Function):
    """One attention kernel forward and one backward, by shapes alone."""

    ledger: Ledger

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ledger: Ledger) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.ledger = ledger
        ledger.count("attention")
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.ledger.count("attention backward")
        return *(torch.empty_like(t) for t in ctx.saved_tensors), None


def _fused_attention(ledger: Ledger, original: Any) -> Any:
    """Return a function in place of torch's scaled_dot_product_attention, which checks and counts calls on CUDA."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not query.is_cuda:
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        given = [query, key, value, *([] if attn_mask is None else [attn_mask])]
        if any(t.device != query.device for t in given):
            raise RuntimeError(f"attention: arguments are on {[str(t.device) for t in given]}, not on one device")
        if query.shape[-3] != key.shape[-3] and not enable_gqa:
            raise RuntimeError(f"attention: {query.shape[-3]} query heads for {key.shape[-3]} key heads")
        if attn_mask is not None:
            torch.broadcast_shapes(attn_mask.shape, (*query.shape[:-1], key.shape[-2]))
        low = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
        query, key, value = (t.to(low) if t.dtype == torch.float32 else t for t in (query, key, value))
        if not query.dtype == key.dtype == value.dtype:
            raise RuntimeError(f"attention: arguments are {query.dtype}, {key.dtype} and {value.dtype}")
        kind = "causal" if is_causal else "without mask" if attn_mask is None else "with mask"
        if attn_mask is not None and enable_gqa:
            kind = "with mask and grouped heads, on CUDA by several kernels"
        ledger.attention[kind] += 1
        return _Attention.apply(query, key, value, ledger)

    return attention
