"""Memory of one GPU: what a stage holds at the moments when it holds most."""

from __future__ import annotations

from dataclasses import dataclass

from pivot_hub.planner.fake_step import StepProfile
from pivot_hub.planner.report import MemoryPeak
from pivot_hub.planner.settings import RunSettings

FLOAT32 = 4  # bytes
# Bytes of optimizer state for each trained parameter, whose weight is float32.
OPTIMIZERS = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "adamw_bnb_8bit": 2.03,
    "adamw_8bit": 2.03,
    "lion_32bit": 4.0,
    "lion_8bit": 1.02,
    "sgd": 0.0,
}
ZERO_BUCKET = 500_000_000  # parameters; DeepSpeed's default size of the bucket to reduce and of the one to gather
ZERO3_LIVE = 1_000_000_000  # parameters; DeepSpeed's default number of gathered weights that it keeps for reuse
SHARES_OPTIMIZER = {"masters": "optimizer"}  # terms that are sharded where another is


@dataclass(frozen=True)
class MemoryModel:
    """Memory of a model in training, apart from its activations, which a `StepProfile` gives.

    Args:
        total: Parameters of the model.
        trained: Parameters that train.
        largest_block: Parameters of the largest block of the vision tower or the language model.
        outside_blocks: Parameters outside of all blocks.
        compute_bytes: Bytes of a weight as the forward pass reads it.
        weight_bytes: Bytes of a weight as the optimizer changes it, except with DeepSpeed, whose masters are float32.
        live_reference: Whether a reference model is in memory during training.
        cached_reference: Whether a reference model fills a cache before training.
    """

    total: int
    trained: int
    largest_block: int
    outside_blocks: int
    compute_bytes: int
    weight_bytes: int
    live_reference: bool
    cached_reference: bool

    def optimizer_state(self, optim: str) -> int:
        """Return the bytes of the whole optimizer state."""
        # torch's AdamW keeps its state in the weights' type; the other optimizers' bytes are their own.
        size = self.weight_bytes / FLOAT32 if optim.startswith("adamw_torch") else 1
        return int(OPTIMIZERS[optim] * size * self.trained)

    def _module_bytes(self, settings: RunSettings) -> int:
        """Return the bytes of a weight and of a gradient of the model itself, as the engine holds them."""
        return self.compute_bytes if settings.accelerate_config.deepspeed else self.weight_bytes

    def static(self, settings: RunSettings) -> dict[str, int]:
        """Return the bytes that are taken for the whole of training, by what takes them.

        DeepSpeed casts the whole model to half precision, frozen weights and the reference included, and keeps float32
        masters of the weights that train, which it shards as the optimizer's state.
        """
        config, module_bytes = settings.accelerate_config, self._module_bytes(settings)
        terms = {"weights": module_bytes * self.total, "gradients": module_bytes * self.trained}
        if config.deepspeed and module_bytes < FLOAT32:
            terms["masters"] = FLOAT32 * self.trained
        terms["optimizer"] = self.optimizer_state(settings.optim)
        if self.live_reference:
            terms["reference"] = module_bytes * self.total
        terms = {
            name: size // settings.processes if SHARES_OPTIMIZER.get(name, name) in config.shards else size
            for name, size in terms.items()
        }
        if config.distributed_type == "MULTI_GPU" and settings.processes > 1:
            terms["buckets"] = self.weight_bytes * self.trained
        if config.deepspeed:
            buckets = 1 if "weights" in config.shards else 2  # ZeRO-3 gathers weights one by one, without a bucket
            terms["buckets"] = buckets * self.compute_bytes * min(self.trained, ZERO_BUCKET)
        if "weights" in config.shards:
            terms["gathered"] = self._gathered(settings)
        return terms

    def _gathered(self, settings: RunSettings) -> int:
        """Return the bytes of the whole weights and gradients that a sharded step holds.

        With FSDP the weights are those of two blocks, because the next block is gathered ahead, and those outside of
        all blocks. The gradients are those of one block and of the weights outside of all blocks, before they are
        sharded. DeepSpeed keeps as many weights as its limit allows, and puts gradients into its bucket.
        """
        weights = 2 * self.largest_block + self.outside_blocks
        if settings.accelerate_config.deepspeed:
            return self.compute_bytes * max(weights, min(self.total, ZERO3_LIVE))
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
            # Autocast copies only whole float32 weights: gathered ones, and those of DeepSpeed, are in half precision.
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
            "reference": self._module_bytes(settings) * self.total,
            "activations": profile.activations,
            "copies": profile.copies,
        }
        if "weights" in shards:
            terms["reference"] //= settings.processes
            terms["gathered"] = self._gathered(settings)
        if not shards:  # a sharding engine gets the policy only when training starts
            terms["weights"] = self.weight_bytes * self.total
        return MemoryPeak("filling the reference cache", terms)

    def generating(self, settings: RunSettings, profile: StepProfile, cache: int, longest: bool) -> MemoryPeak:
        """Return the peak of generating answers, when there are no gradients.

        Args:
            settings: Settings of the run.
            profile: Profile of the prompts' forward pass.
            cache: Bytes of the keys and values of all answers that a process generates at once.
            longest: Whether these are the longest answers.
        """
        terms = self.static(settings) | {"gradients": 0, "activations": profile.activations, "copies": profile.copies}
        if "weights" in settings.accelerate_config.shards:  # TRL gathers the whole model for it
            terms["gathered"] = self.compute_bytes * self.total
        name = "generating, longest answers" if longest else "generating, mean length"
        return MemoryPeak(name, {**terms, "cache": cache})

    def loading(self, processes: int) -> int:
        """Return the bytes of CPU memory that processes take while each loads the models, before they go to the GPU.

        Args:
            processes: Processes of one machine. Each loads float32 weights of its own, and a reference beside them.
        """
        models = 2 if self.live_reference or self.cached_reference else 1
        return processes * models * FLOAT32 * self.total

    def disk(self, settings: RunSettings, only_model: bool, kept_checkpoints: int) -> dict[str, int]:
        """Return the bytes on disk of a checkpoint, of the final model, and of everything at its largest.

        A checkpoint of DeepSpeed has the half-precision weights twice, as the model and in the engine's own files, and
        the float32 masters.

        Args:
            settings: Settings of the run.
            only_model: Whether checkpoints are without the optimizer's state.
            kept_checkpoints: Number of checkpoints that are kept.
        """
        weights = self._module_bytes(settings) * self.total
        state = self.optimizer_state(settings.optim)
        if settings.accelerate_config.deepspeed:
            state += weights + (FLOAT32 * self.trained if self.compute_bytes < FLOAT32 else 0)
        checkpoint = weights + (0 if only_model else state)
        most = (kept_checkpoints + 1) * checkpoint if checkpoint > weights else kept_checkpoints * checkpoint + weights
        return {"checkpoint": checkpoint, "final": weights, "most": most}
