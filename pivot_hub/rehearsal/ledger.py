"""What a run on fake CUDA tensors asks of the device: kernels, attention calls, synchronisations, copies.

Fake tensors hold no numbers, but code reads some: a loss, a count of tokens, the size of what a mask selects. So the
same code runs twice. On the CPU, with real numbers, `Readings` records what is read, and where. On fake CUDA tensors
the same place then gets the same number, so the code takes the same branches. Each reading of a CUDA tensor is a
synchronisation: the program waits there until the GPU has finished its work.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
# Operators that return a Python number, and operators whose output's shape depends on numbers of a tensor.
NUMBERS = {aten._local_scalar_dense.default: "number", aten.equal.default: "equal"}
SHAPES = {
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.bincount.default: "bincount",
    aten.repeat_interleave.Tensor: "repeat_interleave",
}
# Operators that read the size of what a mask selects inside their kernel; the shape of their output does not show it.
INSIDE = {"masked_scatter_backward": "masked_select", "index_put": "mask index", "index_put_": "mask index"}
# Operators that launch no kernel, besides views.
FREE = {
    "_reshape_alias", "_unsafe_view", "detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty",
    "new_empty_strided", "resize_", "set_", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "is_same_size",
}  # fmt: skip
OWN = __name__.rpartition(".")[0].replace(".", "/")  # folder of this package, whose frames are no place of a reading


@dataclass
class Readings:
    """Numbers and shapes that were read in the run on the CPU, by place and kind, in the order of reading."""

    values: defaultdict[tuple[str, str], deque[Any]] = field(default_factory=lambda: defaultdict(deque))

    def next_of(self, place: str, kind: str) -> Any:
        """Take the next value of a place.

        Raises:
            LookupError: The run on the CPU has read nothing more there.
        """
        queue = self.values[place, kind]
        if not queue:
            raise LookupError(f"{place} reads a {kind} that the same code did not read on the CPU")
        return queue.popleft()


class Recorder(TorchDispatchMode):
    """Records into `readings` what code reads from real tensors on the CPU."""

    def __init__(self, readings: Readings) -> None:
        super().__init__()
        self.readings = readings
        self.inside = False  # whether a method runs that is recorded as a whole

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        decomposed = _decomposed(self, func, args, kwargs or {})
        if decomposed is not NotImplemented:
            return decomposed
        result = func(*args, **(kwargs or {}))
        if func in NUMBERS:
            self.record(NUMBERS[func], result)
        elif kind := _shape_kind(func, args):
            self.record(kind, tree_map(lambda t: tuple(t.shape) if isinstance(t, Tensor) else t, result))
        return result

    def record(self, kind: str, value: Any) -> None:
        if not self.inside:
            self.readings.values[place_of_call(), kind].append(value)


class Ledger(TorchDispatchMode):
    """Counts what code asks of a CUDA device, and answers readings from `readings`.

    Attributes:
        kernels: Kernels launched, by phase and operator. An attention call is one kernel.
        attention: Attention calls of forward passes by kind, recomputed ones too.
        syncs: Synchronisations, by place and kind.
        copies: Copies from the CPU to the device, by place.
        phase: Phase of operators outside of a backward pass.
    """

    def __init__(self, readings: Readings) -> None:
        super().__init__()
        self.readings = readings
        self.kernels: Counter[tuple[str, str]] = Counter()
        self.attention: Counter[str] = Counter()
        self.syncs: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[str] = Counter()
        self.phase = "forward"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        decomposed = _decomposed(self, func, args, kwargs)
        if decomposed is not NotImplemented:
            return decomposed
        name = func.overloadpacket.__name__
        if func.namespace == "prim" or name in FREE or func.is_view:
            return func(*args, **kwargs)
        on_cuda = _on_cuda((args, kwargs))
        if func in NUMBERS:
            return self.read(NUMBERS[func], on_cuda)
        if kind := _shape_kind(func, args):
            shapes = self.read(kind, on_cuda)
            self.count(name)
            return _empty_outputs(args[0], name, shapes)
        if func.namespace == "torch_attn":
            self._attend(name, args)
        result = func(*args, **kwargs)
        to_cuda = _on_cuda(result)
        if (name in ("_to_copy", "copy_") and on_cuda != to_cuda) or (name == "copy_" and _mixed(args)):
            self._copy(to_cuda)
        elif on_cuda or to_cuda:
            self.count(name)
            self._count_hidden(name, args)
        return result

    def count(self, name: str) -> None:
        """Count one kernel."""
        backward = torch._C._current_graph_task_id() != -1  # autograd is running
        self.kernels["backward" if backward else self.phase, name] += 1

    def read(self, kind: str, on_cuda: bool) -> Any:
        """Answer a reading, and count it if it is from the device."""
        place = place_of_call()
        if on_cuda:
            self.syncs[place, kind] += 1
        elif kind == "number" and not self.readings.values[place, kind]:
            return 1  # a counter on the CPU, as of an optimizer's steps, which some of its kernels read more often
        return self.readings.next_of(place, kind)

    def _copy(self, to_cuda: bool) -> None:
        place = place_of_call()
        if to_cuda:
            self.copies[place] += 1
        else:
            self.syncs[place, "copy to the CPU"] += 1

    def _attend(self, name: str, args: Any) -> None:
        """Check what torch's variable-length attention gets: 16 bits, int32 offsets, and all of it on the device."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if any(not t.is_cuda for t in tensors):
            raise RuntimeError(
                f"{name}: arguments are on {sorted({str(t.device) for t in tensors})}, not on one device"
            )
        floating = [t for t in tensors[:3] if t.dtype not in (torch.float16, torch.bfloat16)]
        if floating:
            raise RuntimeError(f"{name}: queries, keys and values are {floating[0].dtype}; flash takes 16 bits only")
        if "backward" not in name:
            if any(t.dtype != torch.int32 for t in tensors[3:5]):
                raise RuntimeError(f"{name}: offsets are {[t.dtype for t in tensors[3:5]]}; flash takes int32")
            self.attention["variable length"] += 1

    def _count_hidden(self, name: str, args: Any) -> None:
        """Count what an operator reads inside: the size of a mask's selection, or an index that is on the CPU."""
        has_mask = name == "masked_scatter_backward" or any(_is_mask(t) for t in _indices(args))
        if name in INSIDE and has_mask:
            self.syncs[place_of_call(), INSIDE[name]] += 1
        if name in ("index", "index_put", "index_put_"):
            for index in _indices(args):
                if not index.is_cuda:
                    self.copies[place_of_call()] += 1


@contextmanager
def recording(readings: Readings) -> Iterator[None]:
    """Record what the block reads from real tensors."""
    recorder = Recorder(readings)

    def record(kind: str, original: Any) -> Any:
        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            inside, recorder.inside = recorder.inside, True
            try:
                value = original(self, *args, **kwargs)
            finally:
                recorder.inside = inside
            # A copy, because the array shares the tensor's memory.
            recorder.record(kind, value.copy() if kind == "array" else value)
            return value

        return method

    with _replaced_methods(record), recorder:
        yield


@contextmanager
def replaying(ledger: Ledger) -> Iterator[None]:
    """Count what the block asks of the device, and answer what it reads from fake tensors."""

    def answer(kind: str, original: Any) -> Any:
        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if kind == "array" and self.is_cuda:
                raise TypeError("a CUDA tensor is read as an array; copy it to the CPU first, with `.cpu()`")
            return ledger.read(kind, self.is_cuda)

        return method

    with _replaced_methods(answer), ledger:
        yield


@contextmanager
def _replaced_methods(replacement: Any) -> Iterator[None]:
    """Replace what reads a tensor's numbers without dispatching an operator."""
    kinds = {"tolist": "list", "numpy": "array", "__array__": "array", "__format__": "text"}
    with ExitStack() as stack:
        for name, kind in kinds.items():
            replaced = replacement(kind, getattr(Tensor, name))
            stack.enter_context(patch.object(Tensor, name, replaced))
            if name in vars(FakeTensor):
                stack.enter_context(patch.object(FakeTensor, name, replaced))
        stack.enter_context(patch.object(torch, "tensor", partial(_tensor_of_numbers, torch.tensor)))
        yield


def _tensor_of_numbers(original: Any, data: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Call `torch.tensor`, which reads each tensor of a list without an operator; here an operator reads it."""
    if isinstance(data, list | tuple):
        data = [each.item() if isinstance(each, Tensor) and each.ndim == 0 else each for each in data]
    return cast(Tensor, original(data, *args, **kwargs))


def place_of_call() -> str:
    """Return file and line of the nearest frame outside of torch and of this package, as `trl/trainer/x.py:12`."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        # The backward pass of CPU tensors runs below its caller, that of CUDA tensors in a thread of its own.
        if frame.f_code.co_name == "_engine_run_backward":
            break
        if "/torch/" not in file and f"/{OWN}/ledger" not in file and f"/{OWN}/fake_cuda" not in file:
            if frame.f_code.co_name == "_bootstrap_inner" or "threading" in file:
                break
            return f"{short_name(file)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "the backward pass"


def short_name(file: str) -> str:
    """Return a file's path from its package on."""
    for root in ("/site-packages/", "/lib/python3"):
        if root in file:
            return file.rpartition(root)[2]
    return file[file.rfind("/pivot_hub/") + 1 :] if "/pivot_hub/" in file else "/".join(Path(file).parts[-3:])


def _decomposed(mode: TorchDispatchMode, func: Any, args: Any, kwargs: Any) -> Any:
    """Run a composite operator by its parts: in inference mode it arrives whole. NotImplemented for other operators."""
    if not torch.is_inference_mode_enabled() or func.namespace == "prim":
        return NotImplemented
    with mode:
        return func.decompose(*args, **kwargs)


def _indices(args: Any) -> list[Tensor]:
    return [t for t in args[1] if isinstance(t, Tensor)] if len(args) > 1 and isinstance(args[1], list | tuple) else []


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _shape_kind(func: Any, args: Any) -> str | None:
    """Return the kind of reading of an operator whose output's shape depends on numbers; None for others."""
    if func is aten.index.Tensor:
        return "mask index" if any(map(_is_mask, _indices(args))) else None
    return SHAPES.get(func)


def _empty_outputs(source: Tensor, name: str, shapes: Any) -> Any:
    """Make fake outputs of recorded shapes; all but the values of `unique` are indices."""
    keeps_dtype = name in ("index", "masked_select")

    def empty(shape: tuple[int, ...], number: int) -> Tensor:
        dtype = source.dtype if keeps_dtype or (number == 0 and "unique" in name) else torch.long
        return torch.empty(shape, dtype=dtype, device=source.device)

    if shapes and isinstance(shapes[0], tuple):
        return tuple(empty(shape, number) for number, shape in enumerate(shapes))
    return empty(shapes, 0)


def _on_cuda(values: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in tree_leaves(values))


def _mixed(values: Any) -> bool:
    return len({leaf.is_cuda for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.dim()}) > 1
