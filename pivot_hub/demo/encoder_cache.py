"""Encoders in memory, found by the names that visitors give: repositories of encoders, and MLLMs that contain one."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from transformers import AutoConfig

from pivot_hub.demo.bundle_cache import HUB_FILES, BundleCache, fetched, require_name
from pivot_hub.demo.encoder_set import FEWEST_ENCODERS, MOST_ENCODERS, EncoderNames, EncoderSet, NamedEncoder
from pivot_hub.demo.model_bundle import BundleNames, Origin, Progress, describe_failure, for_inference
from pivot_hub.encoder import PivotVisionConfig, PivotVisionModel
from pivot_hub.encoder.configuration_pivot import BACKBONES
from pivot_hub.encoder.modeling_pivot import refuse_config
from pivot_hub.encoder.repository import read_encoder
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.any_tower import read_tower
from pivot_hub.mllm.families import FAMILIES
from pivot_hub.mllm.load import mllm_config
from pivot_hub.provenance import hub_commit, tensors_sha256, weights_sha256


class EncoderCache:
    """Encoders shared by all visitors: those that the app was started with, and the most recent others."""

    def __init__(self, bundles: BundleCache, capacity: int = 2) -> None:
        """Store the settings; nothing is loaded yet.

        Args:
            bundles: Cache whose first bundle has the encoders to start with, and whose folder of checkpoints and limit
                of parameters hold for encoders too.
            capacity: Number of other sets of encoders that stay in memory.
        """
        self._bundles, self.capacity = bundles, capacity
        self._default: EncoderSet | None = None
        self._others: OrderedDict[EncoderNames, EncoderSet] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def trained_on_scenes(self) -> bool:
        """Whether the encoders to start with are the built-in ones, which know synthetic scenes only."""
        return self._bundles.names == BundleNames()

    def get(self, names: EncoderNames, progress: Progress | None = None) -> EncoderSet:
        """Return the encoders of these names, from memory or loaded now.

        Args:
            names: Names that a visitor gave; none for the encoders that the app was started with.
            progress: Callback that takes the finished share, from 0 to 1, and the next step.

        Raises:
            CheckpointError: A name is not allowed, does not exist, or is neither that of an encoder nor of an MLLM
                whose vision tower can be taken out. The message contains no local path.
        """
        if not names.names:
            return self._first_set()
        self.check_names(names)
        with self._lock:
            if names in self._others:
                self._others.move_to_end(names)
                return self._others[names]
        loaded: dict[str, NamedEncoder] = {}
        for number, name in enumerate(names.names):
            if progress is not None:
                progress(number / len(names.names), f"loading {name}")
            if name not in loaded:
                loaded[name] = self._load(name)
        encoders = EncoderSet(names, _distinct([loaded[name] for name in names.names], names.names))
        with self._lock:
            self._others[names] = encoders
            while len(self._others) > self.capacity:
                self._others.popitem(last=False)
        return encoders

    def check_names(self, names: EncoderNames) -> None:
        """Check number and form of the names that a visitor gave; nothing is read for them.

        Raises:
            CheckpointError: The number is wrong, or a name is neither that of a checkpoint below the folder that
                visitors may name nor a Hub name.
        """
        if not FEWEST_ENCODERS <= len(names.names) <= MOST_ENCODERS:
            raise CheckpointError(
                f"The number of encoders is {len(names.names)}: give {FEWEST_ENCODERS} to {MOST_ENCODERS} names, one a "
                "line, or none for the built-in encoders."
            )
        for name in names.names:
            require_name(name, self.local_names(), "encoder")

    def are_local(self, names: EncoderNames) -> bool:
        """Return whether no name is that of a Hub repository, whose content is a stranger's."""
        return set(names.names) <= set(self.local_names())

    def local_names(self) -> list[str]:
        """Return the names of the encoders and MLLMs that visitors may give without the Hub."""
        runs = self._bundles.runs
        if runs is None:
            return []
        return sorted(str(f.parent.relative_to(runs)) for f in runs.rglob("config.json") if _kind(f) is not None)

    def _first_set(self) -> EncoderSet:
        """Return the encoders of the two MLLMs that the app was started with, which are taken out once."""
        bundle = self._bundles.default()
        with self._lock:
            if self._default is None:
                given = (self._bundles.names.first, self._bundles.names.second)
                members = []
                for mllm, folder in zip((bundle.first, bundle.second), given, strict=True):
                    if folder:
                        model = read_tower(folder).encoder()
                    else:
                        model = PivotVisionModel.from_mllm(
                            mllm.model, image_processor=cast(Any, mllm.processor).image_processor
                        )
                    members.append(NamedEncoder(mllm.name, _for_inference(model), mllm.origin))
                self._default = EncoderSet(EncoderNames(), members)
            return self._default

    def _load(self, name: str) -> NamedEncoder:
        """Find and load one encoder.

        Raises:
            CheckpointError: It cannot be loaded; the message gives its name instead of the path.
        """
        runs = self._bundles.runs
        repo, _, revision = name.partition("@")
        folder = None if runs is None or name not in self.local_names() else runs / name
        config = fetched(
            name,
            lambda: (
                Path(hf_hub_download(repo, "config.json", revision=revision or None))
                if folder is None
                else folder / "config.json"
            ),
        )
        source = str(folder or repo)
        try:
            kind = self._check_config(name, config)
            if kind == "mllm":  # of which nothing but the tower is read
                tower = read_tower(source, revision or None)
                model = tower.encoder()
                origin = Origin(None if folder else repo, tower.revision, tensors_sha256(tower.tensors))
            else:
                files = folder or fetched(
                    name,
                    lambda: Path(snapshot_download(repo, revision=revision or None, allow_patterns=HUB_FILES)),
                )
                source = str(files)
                model = read_encoder(files)[0]
                origin = Origin(None if folder else repo, hub_commit(files), weights_sha256(files))
        except CheckpointError as error:
            raise CheckpointError(_without_path(str(error), source, name)) from error
        except MemoryError:
            raise
        except Exception as error:  # a broken config or processor raises whatever reading it leads to
            raise CheckpointError(f"{name}: its {describe_failure(error)}; give a repository that loads.") from error
        return NamedEncoder(name.rpartition("/")[2], _for_inference(model), origin)

    def _check_config(self, name: str, config_file: Path) -> Literal["mllm", "encoder"]:
        """Return what a repository holds, before its weights are fetched.

        Raises:
            CheckpointError: It is neither an MLLM nor an encoder, or too large.
        """
        kind = _kind(config_file)
        try:
            if kind == "mllm":
                config = mllm_config(config_file.parent).vision_config
            else:
                refuse_config(json.loads(config_file.read_text()), name)
                config = AutoConfig.from_pretrained(config_file.parent, trust_remote_code=False)
            vision = PivotVisionConfig(getattr(config, "vision_config", config))
            with torch.device("meta"):
                tower = PivotVisionModel(vision)
            parameters = sum(p.numel() for p in cast(Any, tower).parameters())
        except ValueError as error:
            message = _without_path(str(error), str(config_file.parent), name).removeprefix(f"{name}: ")
            raise CheckpointError(f"{name}: {message}") from error
        if parameters > self._bundles.most_parameters:
            raise CheckpointError(
                f"{name}: {parameters / 1e9:.1f} billion parameters are more than the "
                f"{self._bundles.most_parameters / 1e9:g} billion that this app accepts; run it yourself on a larger "
                "machine."
            )
        return kind or "encoder"


def _kind(config_file: Path) -> Literal["mllm", "encoder"] | None:
    """Return whether a config is of an MLLM whose tower can be taken out, of an encoder, or of neither."""
    try:
        values = json.loads(config_file.read_text())
        if values.get("model_type") in FAMILIES:
            return "mllm"
        vision = values.get("vision_config", values)
        return "encoder" if vision.get("model_type") in BACKBONES else None
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def _for_inference(model: PivotVisionModel) -> PivotVisionModel:
    """Move an encoder to the GPU if there is one, in float32, whose features golden vectors are computed in."""
    return cast(PivotVisionModel, for_inference(cast(Any, model).float()))


def _without_path(message: str, path: str, name: str) -> str:
    """Replace the path of an encoder in a message by the name that the visitor gave."""
    return message.replace(path, name) if Path(path).is_dir() else message


def _distinct(encoders: list[NamedEncoder], names: tuple[str, ...]) -> list[NamedEncoder]:
    """Give encoders of one displayed name their whole names, and number one that is given several times."""
    short = [encoder.name for encoder in encoders]
    whole = [name if short.count(s) > 1 else s for s, name in zip(short, names, strict=True)]
    shown = [f"{n} ({whole[: i + 1].count(n)})" if whole.count(n) > 1 else n for i, n in enumerate(whole)]
    return [NamedEncoder(n, e.model, e.origin) for n, e in zip(shown, encoders, strict=True)]
