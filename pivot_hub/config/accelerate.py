"""Accelerate configs: the files of recipes/accelerate, and what each of them shards among the processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pivot_hub.config.recipe import RECIPES
from pivot_hub.config.yaml_loader import nearest, read_yaml
from pivot_hub.errors import RecipeError

ACCELERATE_CONFIGS = RECIPES / "accelerate"

Shard = Literal["weights", "gradients", "optimizer", "reference"]
# DeepSpeed's ZeRO stages, each of which shards more than the one before.
ZERO_STAGES: tuple[frozenset[Shard], ...] = (
    frozenset(),
    frozenset({"optimizer"}),
    frozenset({"optimizer", "gradients"}),
    frozenset({"optimizer", "gradients", "weights", "reference"}),
)


@dataclass(frozen=True)
class AccelerateConfig:
    """A config file of `accelerate launch`.

    Args:
        name: The file's name without its suffix, as in `fsdp2`.
        path: The YAML file.
        distributed_type: Accelerate's name for how the processes work together, as in `MULTI_GPU`.
        shards: The parts of the training state that are divided among the processes. Every process holds the others
            whole.
    """

    name: str
    path: Path
    distributed_type: str
    shards: frozenset[Shard]

    @property
    def one_process(self) -> bool:
        """Whether the config is for a single process."""
        return self.distributed_type == "NO"

    @property
    def deepspeed(self) -> bool:
        """Whether the config needs DeepSpeed."""
        return self.distributed_type == "DEEPSPEED"


def accelerate_configs(folder: Path | None = None) -> dict[str, AccelerateConfig]:
    """Read the Accelerate configs of a folder, by name.

    Args:
        folder: Folder of the YAML files; recipes/accelerate by default.
    """
    files = sorted((folder or ACCELERATE_CONFIGS).glob("*.yaml"))
    return {file.stem: _read(file) for file in files}


def accelerate_config(name: str) -> AccelerateConfig:
    """Return the shipped Accelerate config of a name.

    Raises:
        RecipeError: There is no config of this name; the message gives the nearest one.
    """
    configs = accelerate_configs()
    if name not in configs:
        raise RecipeError(
            f"there is no Accelerate config {name!r}{nearest(name, configs)}; give one of {', '.join(configs)}."
        )
    return configs[name]


def _read(file: Path) -> AccelerateConfig:
    settings, _ = read_yaml(file, "an Accelerate config is a mapping of keys", RecipeError)
    distributed_type = str(settings.get("distributed_type", "NO"))
    return AccelerateConfig(file.stem, file, distributed_type, _shards(distributed_type, settings))


def _shards(distributed_type: str, settings: dict[str, Any]) -> frozenset[Shard]:
    if distributed_type == "DEEPSPEED":
        return ZERO_STAGES[int(settings.get("deepspeed_config", {}).get("zero_stage", 2))]  # 2 is accelerate's default
    if distributed_type == "FSDP":
        # FSDP that does not reshard after the forward pass keeps the weights whole in the backward pass, as ZeRO-2.
        reshards = settings.get("fsdp_config", {}).get("fsdp_reshard_after_forward", True)
        return ZERO_STAGES[3 if reshards in (True, "FULL_SHARD") else 2]
    return frozenset()
