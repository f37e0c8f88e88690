"""PIVOT vision encoders: make them, measure them, publish them, load them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The module of each public name. Names are imported on first use, because torch and TRL take seconds to import.
_MODULES = {
    "PivotVisionBackbone": "pivot_hub.encoder",
    "PivotVisionConfig": "pivot_hub.encoder",
    "PivotVisionModel": "pivot_hub.encoder",
    "extract_encoder": "pivot_hub.mllm.extract",
    "diff_towers": "pivot_hub.mllm.diff",
    "read_encoder": "pivot_hub.encoder.repository",
    "verify_repository": "pivot_hub.encoder.repository",
    "write_repository": "pivot_hub.encoder.repository",
    "encode_source": "pivot_hub.encoder.encode",
    "export_encoder": "pivot_hub.encoder.export",
    "build_mllm": "pivot_hub.mllm.build",
    "load_mllm": "pivot_hub.mllm.load",
    "PivotDPOConfig": "pivot_hub.training.dpo",
    "PivotDPOTrainer": "pivot_hub.training.dpo",
    "PivotGRPOConfig": "pivot_hub.training.grpo",
    "PivotGRPOTrainer": "pivot_hub.training.grpo",
    "PivotRLOOConfig": "pivot_hub.training.grpo",
    "PivotRLOOTrainer": "pivot_hub.training.grpo",
    "list_encoders": "pivot_hub.registry.encoders",
    "load_recipe": "pivot_hub.config.recipe",
    "run_stage": "pivot_hub.training.stage",
    "gradient_map": "pivot_hub.explain.gradcam",
}

__all__ = ["__version__", *_MODULES]

if TYPE_CHECKING:
    from pivot_hub.config.recipe import load_recipe as load_recipe
    from pivot_hub.encoder import PivotVisionBackbone as PivotVisionBackbone
    from pivot_hub.encoder import PivotVisionConfig as PivotVisionConfig
    from pivot_hub.encoder import PivotVisionModel as PivotVisionModel
    from pivot_hub.encoder.encode import encode_source as encode_source
    from pivot_hub.encoder.export import export_encoder as export_encoder
    from pivot_hub.encoder.repository import read_encoder as read_encoder
    from pivot_hub.encoder.repository import verify_repository as verify_repository
    from pivot_hub.encoder.repository import write_repository as write_repository
    from pivot_hub.explain.gradcam import gradient_map as gradient_map
    from pivot_hub.mllm.build import build_mllm as build_mllm
    from pivot_hub.mllm.diff import diff_towers as diff_towers
    from pivot_hub.mllm.extract import extract_encoder as extract_encoder
    from pivot_hub.mllm.load import load_mllm as load_mllm
    from pivot_hub.registry.encoders import list_encoders as list_encoders
    from pivot_hub.training.dpo import PivotDPOConfig as PivotDPOConfig
    from pivot_hub.training.dpo import PivotDPOTrainer as PivotDPOTrainer
    from pivot_hub.training.grpo import PivotGRPOConfig as PivotGRPOConfig
    from pivot_hub.training.grpo import PivotGRPOTrainer as PivotGRPOTrainer
    from pivot_hub.training.grpo import PivotRLOOConfig as PivotRLOOConfig
    from pivot_hub.training.grpo import PivotRLOOTrainer as PivotRLOOTrainer
    from pivot_hub.training.stage import run_stage as run_stage


import pivot_hub.training  # noqa: E402, F401  (registers the stages that recipes may name)


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'pivot_hub' has no attribute {name!r}")
