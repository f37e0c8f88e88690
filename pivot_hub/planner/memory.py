"""Memory of one GPU: what a stage holds at the moments when it holds most."""

from __future__ import annotations

from dataclasses import dataclass

from pivot_hub.planner.fake_step import StepProfile
from pivot_hub.planner.report import MemoryPeak
from pivot_hub.planner.settings import RunSettings

FLOAT32 = 4  # bytes
# Bytes of optimizer state for each trained parameter.
OPTIMIZERS = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "adamw_bnb_8bit": 2.03,
    "adamw_8bit": 2.03,
    "lion_32bit": 4.0,
    "lion_8bit": 1.02,
    "sgd": 0.0,
}
ZERO2_BUCKET = 500_000_000  # parameters; DeepSpeed's default size of the bucket to reduce and of the one to gather


@dataclass(frozen=True)
class MemoryModel:
    """Memory of a model in training, apart from its activations, which a `StepProfile` gives.

    Args:
        total: Parameters of the model.
        trained: Parameters that train.
        largest_block: Parameters of the largest block of the vision tower or the language model.
        outside_blocks: Parameters outside of all blocks.
        compute_bytes: Bytes of a weight as the forward pass reads it.
        live_reference: Whether a reference model is in memory during training.
        cached_reference: Whether a reference model fills a cache before training.
    """

    total: int
    trained: int
    largest_block: int
    outside_blocks: int
    compute_bytes: int
    live_reference: bool
    cached_reference: bool

    def optimizer_state(self, optim: str) -> int:
        """Return the bytes of the whole optimizer state."""
        return int(OPTIMIZERS[optim] * self.trained)

    def static(self, settings: RunSettings) -> dict[str, int]:
        """Return the bytes that are taken for the whole of training, by what takes them."""
        terms = {"weights": FLOAT32 * self.total, "gradients": FLOAT32 * self.trained}
        terms["optimizer"] = self.optimizer_state(settings.optim)
        if self.live_reference:
            terms["reference"] = FLOAT32 * self.total
        config = settings.accelerate_config
        terms = {name: size // settings.processes if name in config.shards else size for name, size in terms.items()}
        if config.distributed_type == "MULTI_GPU" and settings.processes > 1:
            terms["buckets"] = FLOAT32 * self.trained
        if config.deepspeed and "weights" not in config.shards:
            terms["buckets"] = 2 * self.compute_bytes * min(self.trained, ZERO2_BUCKET)
        if "weights" in config.shards:
            terms["gathered"] = self._gathered()
        return terms

    def _gathered(self) -> int:
        """Return the bytes of the whole weights and gradients that a sharded step holds.

        The weights are those of two blocks, because the next block is gathered ahead, and those outside of all blocks.
        The gradients are those of one block and of the weights outside of all blocks, before they are sharded.
        """
        weights = 2 * self.largest_block + self.outside_blocks
        gradients = self.largest_block + self.outside_blocks
        return self.compute_bytes * (weights + gradients)

    def training(self, settings: RunSettings, profile: StepProfile, name: str) -> MemoryPeak:
        """Return the peak of a training step.

        Args:
            settings: Settings of the run.
            profile: Profile of the step.
            name: Name of the peak.
        """
        terms = self.static(settings)
        shards = settings.accelerate_config.shards
        if "gradients" in shards:
            terms["activations"] = profile.activations_alone
            # Sharded weights are gathered in half precision already; autocast only copies whole weights.
            if "weights" not in shards:
                terms["copies"] = profile.copies
            return MemoryPeak(name, terms)
        optimizer_step = {**terms, "activations": 0, "copies": 0}
        backward_pass = {
            **terms,
            "gradients": profile.gradients,
            "activations": profile.activations,
            "copies": profile.copies,
        }
        # Gradients are complete in the optimizer's step only, which may therefore hold more than the backward pass.
        return MemoryPeak(name, max(backward_pass, optimizer_step, key=lambda peak: sum(peak.values())))

    def filling_cache(self, settings: RunSettings, profile: StepProfile) -> MemoryPeak:
        """Return the peak of the reference's pass over the rows, before there are gradients and an optimizer.

        Args:
            settings: Settings of the run.
            profile: Profile of the reference's forward pass.
        """
        shards = settings.accelerate_config.shards
        terms = {
            "reference": FLOAT32 * self.total,
            "activations": profile.activations,
            "copies": profile.copies,
        }
        if "weights" in shards:
            terms |= {
                "reference": FLOAT32 * self.total // settings.processes,
                "gathered": self._gathered(),
                "copies": 0,
            }
        if not shards:  # a sharding engine gets the policy only when training starts
            terms["weights"] = FLOAT32 * self.total
        return MemoryPeak("filling the reference cache", terms)

    def disk(self, optim: str, only_model: bool, kept_checkpoints: int) -> dict[str, int]:
        """Return the bytes on disk of a checkpoint, of the final model, and of everything at its largest.

        Args:
            optim: Name of the optimizer.
            only_model: Whether checkpoints are without the optimizer's state.
            kept_checkpoints: Number of checkpoints that are kept.
        """
        weights = FLOAT32 * self.total
        checkpoint = weights + (0 if only_model else self.optimizer_state(optim))
        most = (kept_checkpoints + 1) * checkpoint if checkpoint > weights else kept_checkpoints * checkpoint + weights
        return {"checkpoint": checkpoint, "final": weights, "most": most}
