"""The process that rehearses, with more paths: each has one fault, which a rehearsal has to find."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pivot_hub.rehearsal.__main__ import run

if __name__ == "__main__":
    run(sys.argv[1:])  # loads the library, before torch is imported

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from pivot_hub.files import write_json
from pivot_hub.rehearsal.fake_cuda import move_to_fake_cuda
from pivot_hub.rehearsal.run import rehearse
from pivot_hub.rehearsal.work import Work, gradient_problems

TOKENS, HEADS, CHANNELS = 6, 2, 8


class Step(Work):
    """A step of a small model whose second layer is frozen, with a fault between forward and backward pass."""

    is_step = True

    def __init__(self, fault: Callable[[Tensor], Any], detach: bool = False, thaw: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
        self.fault, self.detach, self.thaw = fault, detach, thaw

    def move(self) -> None:
        move_to_fake_cuda(self.model)

    def run(self, device: str, ledger: Any = None) -> None:
        self.model[1].requires_grad_(self.thaw)
        hidden = self.model[0](torch.ones(2, 3, device=device))
        output = self.model[1](hidden.detach().requires_grad_() if self.detach else hidden)
        self.fault(output.detach())
        output.sum().backward()
        self.model[1].requires_grad_(False)

    def problems(self) -> list[str]:
        return gradient_problems([self.model])


def attend(dtype: torch.dtype, bounds_device: str) -> Callable[[Tensor], Any]:
    """Return a call of torch's attention for sequences of different lengths; it runs on CUDA only."""

    def call(output: Tensor) -> None:
        if output.is_cuda:
            tokens = torch.ones(TOKENS, HEADS, CHANNELS, dtype=dtype, device=output.device)
            bounds = torch.zeros(3, dtype=torch.int32, device=bounds_device)
            varlen_attn(tokens, tokens, tokens, bounds, bounds, 4, 4)

    return call


def nothing(output: Tensor) -> None:
    """Be no fault."""


STEPS: dict[str, Callable[[], Work]] = {
    "no fault": lambda: Step(nothing),
    "item": lambda: Step(lambda output: output.sum().item()),
    "bool": lambda: Step(lambda output: bool((output > 1e6).any())),
    "int": lambda: Step(lambda output: int(output.sum())),
    "float": lambda: Step(lambda output: float(output.sum())),
    "tolist": lambda: Step(lambda output: output.tolist()),
    "format": lambda: Step(lambda output: f"{output.sum()}"),
    "nonzero": lambda: Step(lambda output: output.nonzero()),
    "mask index": lambda: Step(lambda output: output[output > 0] + 1),
    "mask assignment": lambda: Step(lambda output: output.clone().__setitem__(output > 0, 1.0)),
    "equal": lambda: Step(lambda output: torch.equal(output, output)),
    "inference mode": lambda: Step(torch.inference_mode()(lambda output: bool((output > 1e6).any()))),
    "copy to the CPU": lambda: Step(lambda output: output.cpu()),
    "copy from the CPU": lambda: Step(lambda output: torch.tensor([1.0, 2.0], device=output.device)),
    "index on the CPU": lambda: Step(lambda output: output[torch.tensor([0, 1])]),
    "an error on the CPU": lambda: Step(lambda output: output.sum().item() / 0),
    "two devices": lambda: Step(lambda output: output + torch.ones(2, 5)),
    "reading on CUDA only": lambda: Step(lambda output: output.sum().item() if output.is_cuda else 0),
    "trained without gradient": lambda: Step(nothing, detach=True),
    "frozen with gradient": lambda: Step(nothing, thaw=True),
    "attention in 16 bits": lambda: Step(attend(torch.bfloat16, "cuda")),
    "attention in float32": lambda: Step(attend(torch.float32, "cuda")),
    "attention with bounds on the CPU": lambda: Step(attend(torch.bfloat16, "cpu")),
}

if __name__ == "__main__":
    file = Path(sys.argv[2])
    faulty = [rehearse(name, build).to_dict() for name, build in STEPS.items()]
    write_json(file, [*json.loads(file.read_text()), *faulty])
