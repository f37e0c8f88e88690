"""The protocol of a model that gives features: `PivotVisionModel`, or an export of one."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class FeatureModel(Protocol):
    """What a probe asks of an encoder."""

    @property
    def config(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
