"""Run a path twice, with real numbers on the CPU and on fake CUDA tensors, and report what it asked of the device."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable

import torch
from torch._subclasses import FakeTensorMode

from pivot_hub.rehearsal.allowances import verdicts
from pivot_hub.rehearsal.fake_cuda import cuda_device, triton_kernels
from pivot_hub.rehearsal.ledger import Ledger, Readings, recording, replaying, short_name
from pivot_hub.rehearsal.report import COLUMNS, Demand, PathReport
from pivot_hub.rehearsal.work import Work

MOST_OPERATORS = 20


def rehearse(path: str, build: Callable[[], Work]) -> PathReport:
    """Rehearse one path.

    Args:
        path: Name of the path.
        build: Function that builds what runs, on the CPU and with real numbers.
    """
    readings = Readings()
    ledger = Ledger(readings)
    problems: list[str] = []
    work: Work | None = None
    with triton_kernels():
        try:
            work = build()
            with recording(readings):
                work.run("cpu")
            with cuda_device(ledger), FakeTensorMode(allow_non_fake_inputs=True):
                work.move()
                with replaying(ledger):
                    work.run("cuda", ledger)
            problems += work.problems()
        except Exception as error:
            problems.append(_described(error))
    is_step = work is not None and work.is_step
    sync_places: Counter[str] = Counter()
    for (place, _), count in ledger.syncs.items():
        sync_places[place] += count
    reasons: dict[str, str] = {}
    if is_step:
        for kind, counts in (("sync", sync_places), ("copy", ledger.copies)):
            allowed, excess = verdicts(kind, counts)  # type: ignore[arg-type]
            reasons |= {f"{kind} {place}": reason for place, reason in allowed.items()}
            problems += excess
    kernels: Counter[str] = Counter()
    operators: Counter[str] = Counter()
    for (phase, operator), count in ledger.kernels.items():
        kernels[phase] += count
        if phase in COLUMNS:
            operators[operator] += count
    return PathReport(
        path=path,
        is_step=is_step,
        kernels=dict(kernels),
        operators=dict(operators.most_common(MOST_OPERATORS)),
        attention=dict(ledger.attention),
        syncs=[Demand(p, kind, n, reasons.get(f"sync {p}")) for (p, kind), n in sorted(ledger.syncs.items())],
        copies=[Demand(p, "copy", n, reasons.get(f"copy {p}")) for p, n in sorted(ledger.copies.items())],
        problems=problems,
    )


def _described(error: Exception) -> str:
    """Describe an exception with the nearest place outside of torch and of this package."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    places = [f"{short_name(f.filename)}:{f.lineno}" for f in frames if "/pivot_hub/rehearsal/" not in f.filename]
    text = str(error).strip().splitlines()
    reason = text[0] if text else "no message"
    return f"{places[-1] if places else 'the path itself'}: {type(error).__name__}: {reason}"


def one_thread() -> None:
    """Compute on one thread: the narrow models are too small for more."""
    torch.set_num_threads(1)
