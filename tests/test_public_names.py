"""The names that `import pivot_hub` offers, and modules that users' files name."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import pivot_hub

NAMES = [
    "PivotDPOConfig",
    "PivotDPOTrainer",
    "PivotGRPOConfig",
    "PivotGRPOTrainer",
    "PivotRLOOConfig",
    "PivotRLOOTrainer",
    "PivotVisionBackbone",
    "PivotVisionConfig",
    "PivotVisionModel",
    "__version__",
    "build_mllm",
    "diff_towers",
    "encode_source",
    "export_encoder",
    "extract_encoder",
    "gradient_map",
    "list_encoders",
    "load_mllm",
    "load_recipe",
    "read_encoder",
    "run_stage",
    "verify_repository",
    "write_repository",
]


def test_these_names_are_public() -> None:
    assert sorted(pivot_hub.__all__) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_defined_where_it_is_looked_up(name: str) -> None:
    value = getattr(pivot_hub, name)
    if name != "__version__":
        assert getattr(importlib.import_module(value.__module__), name) is value
        assert value.__module__.startswith(pivot_hub._MODULES[name])


def test_task_files_find_choices() -> None:
    module = importlib.import_module("pivot_hub.probes.choices")
    assert all(hasattr(module, name) for name in ("show", "score_choice", "score_words"))


def test_importing_the_package_imports_neither_torch_nor_trl() -> None:
    code = "import sys, pivot_hub; print([m for m in ('torch', 'trl', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
