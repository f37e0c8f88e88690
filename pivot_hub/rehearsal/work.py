"""Code that is rehearsed: it runs on the CPU with real numbers, then on fake CUDA tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pivot_hub.rehearsal.ledger import Ledger


class Work:
    """Code that runs twice: on the CPU, then on fake CUDA tensors.

    Attributes:
        is_step: Whether it is a training step, in which each synchronisation has to be allowed.
    """

    is_step = False

    def move(self) -> None:
        """Replace what a real run has on the GPU by fake CUDA tensors. Called in FakeTensorMode."""

    def run(self, device: str, ledger: Ledger | None = None) -> None:
        """Run the code on a device; `ledger` is given on fake CUDA tensors."""
        raise NotImplementedError

    def problems(self) -> list[str]:
        """Return what is wrong after the run on fake CUDA tensors."""
        return []


def gradient_problems(models: Sequence[torch.nn.Module]) -> list[str]:
    """Say which trained parameters have no gradient on their device, and which frozen ones have one."""
    parameters = [parameter for model in models for parameter in model.named_parameters()]
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    missing = [name for name, p in trained if p.grad is None or p.grad.device != p.device]
    frozen = [name for name, p in parameters if not p.requires_grad and p.grad is not None]
    problems = [] if trained else ["no parameter trains"]
    if missing:
        problems.append(f"{len(missing)} of {len(trained)} trained parameters have no gradient: {missing[0]} first")
    if frozen:
        problems.append(f"{len(frozen)} frozen parameters have a gradient: {frozen[0]} first")
    return problems
