"""Protocol of a model that returns features: a `PivotVisionModel` or an export of one."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class FeatureModel(Protocol):
    """Interface that probes need from an encoder."""

    @property
    def config(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
