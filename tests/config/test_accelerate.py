"""The files of recipes/accelerate are the one list of Accelerate configs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pivot_hub.config import accelerate
from pivot_hub.config.accelerate import ACCELERATE_CONFIGS, accelerate_config, accelerate_configs
from pivot_hub.errors import RecipeError

SHARDS = {
    "single": set(),
    "ddp": set(),
    "zero2": {"gradients", "optimizer"},
    "zero3": {"weights", "gradients", "optimizer", "reference"},
    "fsdp2": {"weights", "gradients", "optimizer", "reference"},
}


def test_every_file_is_a_config_that_says_what_it_shards() -> None:
    configs = accelerate_configs()
    assert {name: set(config.shards) for name, config in configs.items()} == SHARDS
    assert {config.path for config in configs.values()} == set(ACCELERATE_CONFIGS.iterdir())
    assert [name for name, config in configs.items() if config.one_process] == ["single"]
    assert [name for name, config in configs.items() if config.deepspeed] == ["zero2", "zero3"]


def test_a_new_file_is_a_new_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate, "ACCELERATE_CONFIGS", tmp_path)
    (tmp_path / "zero1.yaml").write_text("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 1}\n")
    (tmp_path / "half.yaml").write_text("distributed_type: FSDP\nfsdp_config: {fsdp_reshard_after_forward: false}\n")
    assert accelerate_config("zero1").shards == {"optimizer"}
    assert accelerate_config("half").shards == {"optimizer", "gradients"}
    with pytest.raises(RecipeError, match=r"no Accelerate config 'zero2' .did you mean `zero1`.*one of half, zero1"):
        accelerate_config("zero2")
