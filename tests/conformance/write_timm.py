"""Write the repository of a timm model: `python write_timm.py FOLDER`, in an environment that has timm."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.conformance import loading_paths  # noqa: F401  (its import makes torchvision importable)
from tests.conformance.repositories import write_one
from tests.encoder.originals import TIMM

if __name__ == "__main__":
    from transformers import TimmWrapperConfig, TimmWrapperModel

    torch.manual_seed(0)
    target = Path(sys.argv[1])
    original = target.with_name("timm-original")
    TimmWrapperModel(TimmWrapperConfig.from_dict(dict(TIMM))).save_pretrained(original)
    write_one(original, target)
