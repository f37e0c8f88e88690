"""The processor of an MLLM: its image processor with the PIL backend, its tokenizer and its chat template.

transformers joins Qwen's, InternVL's and other processors from an image processor, a tokenizer and a video processor.
Video processors need torchvision, and rows of this package hold images only, so a processor is loaded without one where
torchvision is missing. The settings of its video processor stay with it and are saved again.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_torchvision_available

from pivot_hub.encoder.repository import LOADING_ERRORS, loading_problem
from pivot_hub.errors import CheckpointError

VIDEO, VIDEO_FILE = "video_processor", "video_preprocessor_config.json"


def load_processor(name: str | Path, revision: str | None = None) -> ProcessorMixin:
    """Load the processor of an MLLM.

    Args:
        name: Folder or Hub name of the MLLM.
        revision: Revision of the Hub repository.

    Raises:
        CheckpointError: The repository has no processor of images and text, or it cannot be loaded.
    """
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": False}
    try:
        processor_class: Any = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(name, **options)), None)
        parts = set() if processor_class is None else set(processor_class.get_attributes())
        without_videos = not is_torchvision_available() and parts == {"image_processor", "tokenizer", VIDEO}
        loader: Any = images_only(processor_class) if without_videos else AutoProcessor
        processor: Any = loader.from_pretrained(name, backend="pil", **options)
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{name}: its processor cannot be loaded: {loading_problem(name, error)}.") from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise CheckpointError(f"{name}: its {type(processor).__name__} does not read images and text.")
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


class _NoVideos:
    """Stands for a video processor, whose settings some processors read for every text. Each setting is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@cache
def images_only(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Return a class of processors without a video processor, which has the name of the class that it stands for."""

    class ImagesOnly(processor_class):  # type: ignore[misc, valid-type]
        # They are attributes of the class, because transformers reads the names of a processor's arguments from its
        # constructor, and what it saves from the instance.
        video_settings: dict[str, Any] | None = None
        video_processor = _NoVideos()

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [attribute for attribute in processor_class.get_attributes() if attribute != VIDEO]

        @classmethod
        def from_pretrained(cls, name: Any, **options: Any) -> Any:
            settings, further = cls.get_processor_dict(name, revision=options.get("revision"))
            video = settings.pop(VIDEO, None)
            file = cached_file(
                name, VIDEO_FILE, revision=options.get("revision"), _raise_exceptions_for_missing_entries=False
            )
            if video is None and file is not None:
                video = json.loads(Path(file).read_text())
            image_options = dict(options)
            options.pop("backend", None)
            parts = {
                "image_processor": AutoImageProcessor.from_pretrained(name, **image_options),
                "tokenizer": AutoTokenizer.from_pretrained(name, **options),
            }
            # The constructor asks for all parts by place, the video processor as the last one.
            processor = cls.from_args_and_dict(
                [*(parts[name] for name in cls.get_attributes()), None], settings, **further
            )
            processor.video_settings = video
            return processor

        def __reduce__(self) -> Any:
            return _restored, (processor_class, vars(self))

        def to_dict(self) -> dict[str, Any]:
            settings = super().to_dict()
            settings.pop("video_settings", None)
            return settings if self.video_settings is None else {**settings, VIDEO: self.video_settings}

    ImagesOnly.__name__ = ImagesOnly.__qualname__ = processor_class.__name__
    return ImagesOnly


def _restored(processor_class: type[ProcessorMixin], attributes: dict[str, Any]) -> ProcessorMixin:
    """Return a processor of `images_only` that was pickled for a worker of a data loader."""
    processor: ProcessorMixin = object.__new__(images_only(processor_class))  # type: ignore[arg-type]
    vars(processor).update(attributes)
    return processor
