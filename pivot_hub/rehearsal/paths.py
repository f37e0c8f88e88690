"""The paths that are rehearsed, in a table: each is the project's own code on a narrow copy of a recipe's model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from pivot_hub.config.recipe import LoadedRecipe
from pivot_hub.config.stages import stage_of
from pivot_hub.data.report import RowReport
from pivot_hub.data.synthetic import Kind, ShapesDataset
from pivot_hub.demo import comparison
from pivot_hub.demo.model_bundle import BundleNames, Mllm, ModelBundle, Origin
from pivot_hub.encoder.modeling_pivot import prepare_images
from pivot_hub.encoder.repository import read_encoder
from pivot_hub.explain.gradcam import gradient_map, token_maps
from pivot_hub.mllm.load import load_mllm
from pivot_hub.probes.classification.attention_pooling import fit_attention, predict_attention
from pivot_hub.probes.classification.logistic import fit_logistic
from pivot_hub.probes.features import patch_features
from pivot_hub.probes.fixed_grid import FixedGrid, scene_px
from pivot_hub.probes.segmentation.heads import Setting, fit_heads, scale_of
from pivot_hub.rehearsal.fake_cuda import DEVICE, move_to_fake_cuda, to_fake_cuda
from pivot_hub.rehearsal.ledger import Ledger
from pivot_hub.rehearsal.narrow_model import PARENT, VISION, rehearsed_recipe, write_narrow_model
from pivot_hub.rehearsal.work import Work, gradient_problems
from pivot_hub.training.stage import trainer_arguments

IMAGES = 2  # images of the paths after training
ROWS, WIDTH, CLASSES, SIDE = 64, 16, 4, 4  # of random features, and patches along an edge
NEW_TOKENS = 2  # of an answer that is generated
FIRST_QUESTION: Kind = "colour"


@dataclass
class Models(Work):
    """A function of models that are moved to the device.

    Args:
        modules: The models.
        function: What runs them.
    """

    modules: tuple[Any, ...]
    function: Callable[[str], Any]

    def move(self) -> None:
        for module in self.modules:
            move_to_fake_cuda(module)

    def run(self, device: str, ledger: Ledger | None = None) -> None:
        self.function(device)


class TrainerStep(Work):
    """One optimizer step of a stage's trainer: its batch, forward and backward pass, clipping and optimizer."""

    is_step = True

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.batch = next(iter(trainer.get_train_dataloader()))
        if trainer.args.gradient_checkpointing:
            # Fake tensors have no random state to keep.
            options = {**(trainer.args.gradient_checkpointing_kwargs or {}), "preserve_rng_state": False}
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False, **options})

    @cached_property
    def models(self) -> list[torch.nn.Module]:
        """The model that trains, and the frozen reference if it is kept."""
        return [m for m in (self.trainer.model, getattr(self.trainer, "ref_model", None)) if m is not None]

    def move(self) -> None:
        for model in self.models:
            move_to_fake_cuda(model)
        self.batch = to_fake_cuda(self.batch)

    def run(self, device: str, ledger: Ledger | None = None) -> None:
        trainer = self.trainer
        if ledger is None:
            self.step(trainer.model, device)
            return
        with _on_cuda(trainer):
            # accelerate wraps the forward pass in autocast, as it does when training begins.
            self.step(trainer.accelerator.prepare_model(trainer.model), device)
            ledger.phase = "first update"  # which creates the optimizer's state, too
            trainer.create_optimizer()
            trainer.optimizer.step()
            ledger.phase = "optimizer"
            if trainer.args.max_grad_norm:
                trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
            trainer.optimizer.step()

    def step(self, model: Any, device: str) -> None:
        """Run forward and backward pass of the batch."""
        batches, items = self.trainer.get_batch_samples(iter([self.batch]), 1, torch.device(device))
        self.trainer.current_gradient_accumulation_steps = len(batches)
        self.trainer.training_step(model, dict(batches[0]), items)

    def problems(self) -> list[str]:
        return gradient_problems(self.models)


class GroupStep(TrainerStep):
    """One optimizer step of grpo or rloo on a batch of answers, which are generated on the CPU beforehand."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        trainer.model.train()
        self.rows = self.batch
        self.batch = trainer._generate_and_score_completions(self.rows)

    def step(self, model: Any, device: str) -> None:
        trainer = self.trainer
        trainer._step, trainer.current_gradient_accumulation_steps = 0, 1
        with patch.object(trainer, "_generate_and_score_completions", lambda rows: dict(self.batch)):
            trainer.training_step(model, self.rows, None)


class Generation(GroupStep):
    """What comes before the steps: answers of a few tokens, rewards, log-probabilities of old policy and reference."""

    is_step = False

    def run(self, device: str, ledger: Ledger | None = None) -> None:
        if ledger is None:
            self.trainer._generate_and_score_completions(self.rows)
            return
        with _on_cuda(self.trainer), torch.autocast("cuda", torch.bfloat16):
            self.trainer._generate_and_score_completions(self.rows)

    def problems(self) -> list[str]:
        return []


class ReferenceFill(TrainerStep):
    """The reference's log-probabilities of a batch, as they fill the cache."""

    is_step = False

    def step(self, model: Any, device: str) -> None:
        batch = self.trainer._prepare_inputs(dict(self.batch))
        chosen, rejected = self.trainer.compute_ref_log_probs(self.trainer.ref_model, batch)
        torch.cat((chosen, rejected)).float().cpu().tolist()

    def run(self, device: str, ledger: Ledger | None = None) -> None:
        if ledger is None:
            self.step(None, device)
            return
        with _on_cuda(self.trainer), torch.autocast("cuda", torch.bfloat16):
            self.step(None, device)

    def problems(self) -> list[str]:
        return []


@contextmanager
def _on_cuda(trainer: Any) -> Iterator[None]:
    """Let a trainer that was built on the CPU find itself on the CUDA device."""
    states = (PartialState(), trainer.accelerator.state)
    before = [state.device for state in states]
    for state in states:
        state.device = DEVICE
    try:
        with patch.object(type(trainer.args), "device", property(lambda self: DEVICE)):
            yield
    finally:
        for state, device in zip(states, before, strict=True):
            state.device = device


@dataclass(frozen=True)
class Narrow:
    """The narrow copy of a recipe's model on disk, from which every path starts.

    Args:
        loaded: The recipe.
        folder: Folder that `write_narrow_model` has filled.
    """

    loaded: LoadedRecipe
    folder: Path

    def trainer(self, **changes: Any) -> Any:
        """Build the recipe's trainer, as `pivot train` does."""
        recipe = rehearsed_recipe(self.loaded, self.folder, changes)
        stage = stage_of(recipe.recipe.stage)
        parent = None if stage.base_part or recipe.parent is None else self.folder / PARENT
        args = trainer_arguments(recipe, self.folder / "work")
        return import_module(stage.module).build_trainer(recipe, args, parent, RowReport(), [])

    def group_trainer(self, **changes: Any) -> Any:
        """Build the trainer of a grpo or rloo recipe, whose batches are one step each and whose answers are short."""
        steps = {"steps_per_generation": 1, "generation_batch_size": None, "max_completion_length": NEW_TOKENS}
        return self.trainer(**steps, **changes)

    def mllm(self) -> tuple[Any, Any]:
        """Load the narrow MLLM for inference."""
        model, processor = load_mllm(self.folder / PARENT)
        return model.eval().requires_grad_(False), processor

    def encoder(self) -> tuple[Any, Any]:
        """Load the narrow encoder for inference."""
        model, image_processor = read_encoder(self.folder / VISION)
        return model.eval().requires_grad_(False), image_processor


def _step(narrow: Narrow) -> Work:
    return TrainerStep(narrow.trainer())


def _other_layout(narrow: Narrow) -> Work:
    return TrainerStep(narrow.trainer(share_prefix=not narrow.loaded.recipe.args.get("share_prefix", True)))


def _reference_fill(narrow: Narrow) -> Work:
    return ReferenceFill(narrow.trainer(cache_reference=False))


def _encode(narrow: Narrow) -> Work:
    model, processor = narrow.encoder()

    @torch.no_grad()
    def encode(device: str) -> Any:
        return model(**prepare_images(processor, _images(), model.config, device))

    return Models((model,), encode)


def _features(narrow: Narrow) -> Work:
    model, processor = narrow.encoder()
    is_native = model.config.image_size is None

    def features(device: str) -> None:
        squares = FixedGrid(model, processor, scene_px(model.config)) if is_native else model
        patch_features(squares, processor, _images())

    return Models((model,), features)


def _logistic(narrow: Narrow) -> Work:
    features, labels = _random_tokens()
    pooled = np.ascontiguousarray(features[:, 0])

    def fit(device: str) -> None:
        fit_logistic(pooled, labels, (0.1, 1.0), device=device)[-1].predict(pooled)

    return Models((), fit)


def _attention_probe(narrow: Narrow) -> Work:
    tokens, labels = _random_tokens()

    def fit(device: str) -> None:
        model = fit_attention(tokens, labels, np.arange(ROWS), CLASSES, 1e-3, device=device)
        predict_attention(model, tokens, np.arange(ROWS))

    return Models((), fit)


def _segmentation_head(narrow: Narrow) -> Work:
    tokens, _ = _random_tokens()
    masks = np.random.default_rng(0).integers(-1, CLASSES, (ROWS, 8, 8))
    rows = list(range(ROWS))
    settings = [Setting(kind, 3e-3, 1e-2) for kind in ("linear", "mlp")]

    def fit(device: str) -> None:
        heads = fit_heads(settings, tokens, masks, rows, scale_of(tokens, rows), device=device, steps=2)
        heads[0].predict(tokens[:2], (16, 16))

    return Models((), fit)


def _gradcam(narrow: Narrow) -> Work:
    model, processor = narrow.mllm()
    subject = _subject()

    def explain(device: str) -> None:
        texts = (subject.question, subject.right_answer)
        gradient_map(model, processor, subject.image, *texts)
        gradient_map(model, processor, subject.image, *texts, layer=1)
        token_maps(model, processor, subject.image, *texts, limit=2)

    return Models((model,), explain)


def _compare(narrow: Narrow) -> Work:
    members = [narrow.mllm() for _ in range(3)]
    origin = Origin(None, None, "")
    first, second, parent = (
        Mllm(name, *member, origin) for name, member in zip(("first", "second", "parent"), members, strict=True)
    )
    bundle = ModelBundle(BundleNames(), first, second, parent)

    def ask(device: str) -> None:
        with patch.object(comparison, "MOST_NEW_TOKENS", NEW_TOKENS):
            comparison.compare(bundle, _subject(), "dpo")

    return Models(tuple(model for model, _ in members), ask)


def _group_step(narrow: Narrow) -> Work:
    return GroupStep(narrow.group_trainer())


def _group_other_layout(narrow: Narrow) -> Work:
    return GroupStep(narrow.group_trainer(share_prefix=not narrow.loaded.recipe.args.get("share_prefix", True)))


def _generation(narrow: Narrow) -> Work:
    return Generation(narrow.group_trainer())


# The paths of each recipe, by what they need: a stage's step, DPO's own, those of rewards, and what follows training.
STEP: dict[str, Callable[[Narrow], Work]] = {"{stage} step": _step}
GROUPS: dict[str, Callable[[Narrow], Work]] = {
    "{stage} step": _group_step,
    "{stage} step, other layout": _group_other_layout,
    "{stage} generation": _generation,
}
DPO: dict[str, Callable[[Narrow], Work]] = {
    "dpo step, other layout": _other_layout,
    "reference log-probabilities": _reference_fill,
}
AFTER: dict[str, Callable[[Narrow], Work]] = {
    "encode": _encode,
    "probe features": _features,
    "logistic probe": _logistic,
    "attention probe": _attention_probe,
    "segmentation head": _segmentation_head,
    "gradcam": _gradcam,
    "Space comparison": _compare,
}


def paths_of(loaded: LoadedRecipe) -> dict[str, Callable[[Narrow], Work]]:
    """Return the paths that a recipe's stage and what follows it take, by name."""
    stage = loaded.recipe.stage
    steps = GROUPS if stage_of(stage).takes_rewards else STEP
    paths = {name.format(stage=stage): path for name, path in steps.items()}
    if stage == "dpo":
        paths |= DPO
    return paths if stage_of(stage).base_part else paths | AFTER


def narrow_copy(loaded: LoadedRecipe, folder: Path) -> Narrow:
    """Write the narrow copy of a recipe's model; base parts have none, because their recipe has their sizes."""
    if not stage_of(loaded.recipe.stage).base_part:
        write_narrow_model(loaded, folder)
    return Narrow(loaded, folder)


def _subject() -> comparison.Subject:
    return comparison.scene_subject(ShapesDataset(), 0, FIRST_QUESTION)


def _images() -> list[Image.Image]:
    dataset = ShapesDataset()
    return [dataset.scene("test", number).render().image for number in range(IMAGES)]


def _random_tokens() -> tuple[np.ndarray, np.ndarray]:
    """Random tokens (ROWS, SIDE * SIDE, WIDTH) and class numbers (ROWS,)."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(ROWS, SIDE**2, WIDTH)).astype(np.float32), np.arange(ROWS) % CLASSES
