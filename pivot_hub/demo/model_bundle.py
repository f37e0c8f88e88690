"""A model bundle: two MLLMs that are compared, with the parent of both, which the DPO loss needs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from pivot_hub.demo.cropping import crop_scale, with_margin
from pivot_hub.encoder import PivotVisionConfig
from pivot_hub.encoder.device import compute_device
from pivot_hub.errors import CheckpointError
from pivot_hub.explain.image_maps import crops_image, feature_layer, image_family
from pivot_hub.mllm.load import load_mllm
from pivot_hub.probes.fixed_grid import scene_px
from pivot_hub.provenance import hub_commit, weights_sha256

STAGES = {"parent": "2-instruct", "sft": "3-sft", "dpo": "3-dpo"}
SINGLE_THREAD_BELOW = 50_000_000  # parameters of an MLLM that computes faster on one thread

Progress = Callable[[float, str], None]  # takes the finished share, from 0 to 1, and the next step


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread.

    The operations of a small model take microseconds, less than waking a second thread. Beside other programs the
    difference is large: a comparison by the shipped bundle took 0.22 s on one thread and 2.7 to 6.0 s on two, on two
    cores that other programs used too.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class BundleNames:
    """Names of the models to compare; all are empty for the bundle that the app was started with."""

    first: str = ""
    second: str = ""
    parent: str = ""


@dataclass(frozen=True)
class Origin:
    """Where the weights of an MLLM come from, so that saved numbers say what they were computed with.

    Args:
        repository: Hub repository, or the folder inside this package; None for a folder of this machine.
        revision: Commit of the repository; None for a folder of this machine.
        weights_sha256: One hash over all weight files.
    """

    repository: str | None
    revision: str | None
    weights_sha256: str


@dataclass(frozen=True)
class Mllm:
    """One MLLM with the name that the page shows."""

    name: str
    model: PreTrainedModel
    processor: ProcessorMixin
    origin: Origin

    def with_margin(self, image: Image.Image) -> Image.Image:
        """Add the margin that the image processor cuts off, so that the maps cover the whole image."""
        return with_margin(image, crop_scale(cast(Any, self.processor).image_processor))


@dataclass(frozen=True)
class BundleInfo:
    """What the page has to know of a bundle whose models may be in another process.

    Args:
        names: Displayed names of the first and the second MLLM.
        origins: Origins of the first MLLM, of the second, and of the parent if there is one.
        image_px: Side in px at which scenes are rendered: the larger input size of the two encoders, see `scene_px`.
        layers: Number of hidden states that Grad-CAM can explain in both encoders.
        crops: Whether an encoder crops an image to its middle square.
    """

    names: tuple[str, str]
    origins: tuple[Origin, ...]
    image_px: int
    layers: int
    crops: bool


@dataclass(frozen=True)
class ModelBundle:
    """Two MLLMs, in evaluation mode, with the parent of both if there is one.

    Computing a saliency map registers hooks on a model, so all computation takes place within `exclusive()`.
    """

    names: BundleNames
    first: Mllm
    second: Mllm
    parent: Mllm | None
    lock: Any = field(default_factory=threading.RLock, repr=False)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Lock the models for this thread, and compute on one thread if they are small."""
        parameters = sum(p.numel() for p in self.first.model.parameters())
        with self.lock, one_thread() if parameters < SINGLE_THREAD_BELOW else nullcontext():
            yield

    @property
    def image_px(self) -> int:
        """Side in px at which scenes are rendered: the larger input size of the two encoders, see `scene_px`."""
        return max(scene_px(PivotVisionConfig(mllm.model.config.vision_config)) for mllm in (self.first, self.second))

    @property
    def layers(self) -> int:
        """Number of hidden states that Grad-CAM can explain in both encoders."""
        return min(feature_layer(self.first.model), feature_layer(self.second.model))

    @cached_property
    def info(self) -> BundleInfo:
        """What the page has to know of this bundle."""
        members = [mllm for mllm in (self.first, self.second, self.parent) if mllm is not None]
        return BundleInfo(
            names=(self.first.name, self.second.name),
            origins=tuple(mllm.origin for mllm in members),
            image_px=self.image_px,
            layers=self.layers,
            crops=any(crops_image(mllm.model.config, mllm.processor) for mllm in members[:2]),
        )


def load_bundle(names: BundleNames, folders: Sequence[tuple[str, Path]], progress: Progress) -> ModelBundle:
    """Load two MLLMs and, if a third folder is given, their parent.

    Args:
        names: Names under which the bundle was requested.
        folders: Name and folder of the first MLLM, of the second, and of the parent if there is one.
        progress: Callback that takes the finished share, from 0.6 on, and the next step.

    Raises:
        CheckpointError: A folder holds no MLLM that can be loaded and has image tokens; the message gives its name
            instead of the path.
    """
    members = []
    for number, (name, folder) in enumerate(folders):
        progress(0.6 + 0.4 * number / len(folders), f"loading {name}")
        try:
            model, processor = load_mllm(folder)
            image_family(model.config)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(folder), name)) from error
        except MemoryError:
            raise
        except Exception as error:  # a broken config, processor or tokenizer raises whatever reading it leads to
            raise CheckpointError(f"{name}: its {describe_failure(error)}; give a repository that loads.") from error
        commit = hub_commit(folder)
        origin = Origin(name.partition("@")[0] if commit else None, commit, weights_sha256(folder))
        members.append(Mllm(name.rstrip("/").rpartition("/")[2], for_inference(model), processor, origin))
    if members[0].name == members[1].name:  # two owners or two revisions of one name: show the whole names
        members[:2] = [replace(m, name=name) for (name, _), m in zip(folders, members[:2], strict=False)]
    return ModelBundle(names, members[0], members[1], members[2] if len(members) == 3 else None)


def describe_failure(error: BaseException) -> str:
    """Describe an unexpected exception in one short phrase that contains no path of this machine."""
    lines = str(error).strip().splitlines()
    reason = f": {lines[0][:160]}" if lines and "/" not in lines[0] else ""
    return f"files or settings lead to an error ({type(error).__name__}{reason})"


def for_inference(model: PreTrainedModel) -> PreTrainedModel:
    """Move a model to the GPU if there is one, in evaluation mode and without gradients of its weights."""
    device = compute_device()
    return cast(PreTrainedModel, cast(Any, model).to(device).eval().requires_grad_(False))
