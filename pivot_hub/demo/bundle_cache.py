"""Model bundles in memory, found by the names that visitors give: folders of this machine or Hub repositories."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoModelForImageTextToText

from pivot_hub.demo.model_bundle import BundleNames, ModelBundle, Progress, describe_failure, load_bundle
from pivot_hub.demo.packed_bundle import shipped_bundle
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.families import FAMILIES
from pivot_hub.mllm.load import mllm_config

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]  # never a pickle, never code
MOST_PARAMETERS = 3_000_000_000  # of an MLLM that a visitor may request


class BundleCache:
    """Bundles shared by all visitors: the one that the app was started with, and the most recent others."""

    def __init__(
        self,
        names: BundleNames = BundleNames(),
        runs: Path | None = None,
        capacity: int = 2,
        most_parameters: int = MOST_PARAMETERS,
    ) -> None:
        """Store the settings; nothing is loaded yet.

        Args:
            names: Names of the bundle to start with, as folders; the shipped bundle by default.
            runs: Folder of checkpoints that visitors may name. No other folder of this machine is read for them.
            capacity: Number of other bundles that stay in memory.
            most_parameters: Largest number of parameters of an MLLM that a visitor may request.
        """
        self.names, self.runs = names, runs
        self.capacity, self.most_parameters = capacity, most_parameters
        self._default: ModelBundle | None = None
        self._others: OrderedDict[BundleNames, ModelBundle] = OrderedDict()
        self._lock = threading.Lock()

    def default(self) -> ModelBundle:
        """Return the bundle that the app was started with, which is loaded once.

        Raises:
            CheckpointError: The bundle cannot be loaded.
        """
        with self._lock:
            if self._default is None:
                if self.names == BundleNames():
                    self._default = shipped_bundle()
                elif not self.names.first or not self.names.second:
                    raise CheckpointError("Two MLLMs are compared: give --first and --second, or neither of them.")
                else:
                    folders = [(name, Path(name)) for name in astuple(self.names) if name]
                    self._default = load_bundle(BundleNames(), folders, _no_progress)
            return self._default

    def get(self, names: BundleNames, progress: Progress | None = None) -> ModelBundle:
        """Return the bundle of these names, from memory or loaded now.

        Args:
            names: Names that a visitor gave; empty for the bundle that the app was started with.
            progress: Callback that takes the finished share, from 0 to 1, and the next step.

        Raises:
            CheckpointError: A name is not allowed, does not exist, or is not that of an MLLM. The message contains
                no local path.
        """
        if progress is None:
            progress = _no_progress
        if names == BundleNames():
            return self.default()
        self.check_names(names)
        with self._lock:
            if names in self._others:
                self._others.move_to_end(names)
                return self._others[names]
        given_names = [name for name in astuple(names) if name]
        folders = []
        for number, name in enumerate(given_names):
            progress(0.6 * number / len(given_names), f"finding {name}")
            folders.append((name, self._find(name)))
        bundle = load_bundle(names, folders, progress)
        with self._lock:
            self._others[names] = bundle
            while len(self._others) > self.capacity:
                self._others.popitem(last=False)
        return bundle

    def check_names(self, names: BundleNames) -> None:
        """Check the form of names that a visitor gave; nothing is read for them.

        Raises:
            CheckpointError: A name is missing, or is neither that of a checkpoint below `runs` nor a Hub name.
        """
        if not names.first or not names.second:
            raise CheckpointError("Two MLLMs are compared: give both names, or neither for the built-in models.")
        for name in filter(None, astuple(names)):
            require_name(name, self.local_names(), "MLLM")

    def are_local(self, names: BundleNames) -> bool:
        """Return whether no name is that of a Hub repository, whose content is a stranger's."""
        return {name for name in astuple(names) if name} <= set(self.local_names())

    def local_names(self) -> list[str]:
        """Return the names of the checkpoints below `runs`, which visitors may give without the Hub."""
        if self.runs is None:
            return []
        return sorted(str(f.parent.relative_to(self.runs)) for f in self.runs.rglob("config.json") if _is_mllm(f))

    def _find(self, name: str) -> Path:
        """Return the folder of a name that a visitor gave: one below `runs`, or a download from the Hub."""
        if self.runs is not None and name in self.local_names():
            return self.runs / name
        repo, _, revision = name.partition("@")

        def fetch() -> Path:
            config = Path(hf_hub_download(repo, "config.json", revision=revision or None))
            self._check_config(name, config)
            return Path(snapshot_download(repo, revision=revision or None, allow_patterns=HUB_FILES))

        return fetched(name, fetch)

    def _check_config(self, name: str, config_file: Path) -> None:
        if not _is_mllm(config_file):
            titles = ", ".join(family.title for family in FAMILIES.values() if family.image_tokens)
            raise CheckpointError(f"{name}: it is no MLLM that this app can explain; give one of these: {titles}.")
        try:
            config = mllm_config(config_file.parent)
            with torch.device("meta"):
                model = AutoModelForImageTextToText.from_config(config)
            parameters = sum(p.numel() for p in model.parameters())
        except MemoryError:
            raise
        except Exception as error:  # a broken config raises whatever reading it leads to
            raise CheckpointError(f"{name}: its {describe_failure(error)}; give a repository that loads.") from error
        if parameters > self.most_parameters:
            raise CheckpointError(
                f"{name}: {parameters / 1e9:.1f} billion parameters are more than the "
                f"{self.most_parameters / 1e9:g} billion that this app accepts; run it yourself on a larger machine."
            )


def require_name(name: str, local_names: Sequence[str], kind: str) -> None:
    """Check the form of a name that a visitor gave.

    Args:
        name: Name of a model.
        local_names: Names of the checkpoints that visitors may give without the Hub.
        kind: Kind of the model, for the error message.

    Raises:
        CheckpointError: The name is neither one of these nor a Hub name.
    """
    if name not in local_names and (not HUB_NAME.fullmatch(name) or ".." in name):
        also = f", or one of {', '.join(local_names[:9])}" if local_names else ""
        raise CheckpointError(
            f"{name[:80]!r} names no {kind}: give a Hub repository as owner/name or owner/name@revision{also}."
        )


def fetched(name: str, fetch: Callable[[], Path]) -> Path:
    """Fetch files from the Hub.

    Args:
        name: Name that a visitor gave, for the error message.
        fetch: Function that fetches them.

    Raises:
        CheckpointError: There is no such repository, or the Hub cannot be reached.
    """
    try:
        return fetch()
    except (RepositoryNotFoundError, GatedRepoError, RevisionNotFoundError):
        raise CheckpointError(
            f"{name}: the Hub has no such public repository and revision; check the spelling."
        ) from None
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # no network, a proxy, a full disk: the library has a class for each
        raise CheckpointError(
            f"{name}: it could not be fetched; the Hub is out of reach or has no such repository. Check the "
            "spelling, or try again later."
        ) from error


def _no_progress(share: float, step: str) -> None:
    """Report nothing."""


def _is_mllm(config_file: Path) -> bool:
    """Return whether a config is of an MLLM whose language model gets tokens of the image."""
    try:
        model_type = json.loads(config_file.read_text()).get("model_type")
        return model_type in FAMILIES and FAMILIES[model_type].image_tokens
    except (OSError, ValueError, AttributeError, TypeError):
        return False
