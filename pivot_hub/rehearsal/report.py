"""The report of a rehearsal: what each path asked of the device, and what is wrong with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

COLUMNS = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class Demand:
    """A place that makes the program wait for the device, or copies to it.

    Args:
        place: File and line, or the backward pass.
        kind: What is read or copied.
        count: How often.
        allowed: The reason why it is allowed; None where it is not, or where nothing needs to be.
    """

    place: str
    kind: str
    count: int
    allowed: str | None = None


@dataclass(frozen=True)
class PathReport:
    """What one path asked of the device.

    Args:
        path: Name of the path.
        is_step: Whether it is a training step, in which each synchronisation has to be allowed.
        kernels: Kernels launched, views left out, by phase; `backward` has recomputed ones too, and `first update` has
            those of the optimizer's first step, which creates its state.
        operators: The most frequent operators, without the first update.
        attention: Attention calls by kind, recomputed ones too.
        syncs: Places that wait for the device.
        copies: Places that copy from the CPU to the device.
        problems: What is wrong, one message each. Counts are incomplete if the path was broken off.
    """

    path: str
    is_step: bool
    kernels: dict[str, int]
    operators: dict[str, int]
    attention: dict[str, int]
    syncs: list[Demand]
    copies: list[Demand]
    problems: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PathReport:
        """Read back what `to_dict` wrote."""
        demands = {name: [Demand(**demand) for demand in values[name]] for name in ("syncs", "copies")}
        return cls(**{**values, **demands})

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return asdict(self)


def table(reports: list[PathReport]) -> str:
    """Return the reports as text: a line for each path, then the places that wait or copy, then the problems."""
    width = max(len(report.path) for report in reports) + 2
    head = "".join(f"{name:>11}" for name in (*COLUMNS, "attention", "syncs", "copies"))
    lines = [f"{'kernels on fake CUDA tensors':<{width}}{head}"]
    for report in reports:
        counts = [report.kernels.get(name, 0) for name in COLUMNS]
        counts += [sum(report.attention.values()), *(sum(d.count for d in ds) for ds in (report.syncs, report.copies))]
        verdict = f"  {len(report.problems)} problem(s)" if report.problems else ""
        lines.append(f"{report.path:<{width}}" + "".join(f"{count:>11,}" for count in counts) + verdict)
    for report in reports:
        if report.is_step and (report.syncs or report.copies):
            lines += ["", f"{report.path} waits for the device, or copies to it, at:"]
            lines += [f"  {d.count:>4} {d.kind:<16} {d.place}: {d.allowed or '-'}" for d in report.syncs]
            lines += [f"  {d.count:>4} {'copy':<16} {d.place}: {d.allowed or '-'}" for d in report.copies]
    for report in reports:
        lines += ["", f"{report.path}:", *(f"  {problem}" for problem in report.problems)] if report.problems else []
    return "\n".join(lines)
