"""Two MLLMs to compare, with the parent that the DPO loss needs: the shipped pair, or any two by name.

The shipped pair is small because it holds its parent once, in 16 bits, and of the other two only what differs from it,
in 8: both branches then share the parent's rounding, which a comparison of them must not show.
Against the stages it was packed from, on 120 questions about held-out scenes, all 240 answers are the same, the maps
coincide by 99.99% (the worst by 99.68%), and no probability moves by more than 0.0002.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from pivot_hub.config.recipe import RECIPES
from pivot_hub.errors import CheckpointError
from pivot_hub.explain.gradcam import feature_layer
from pivot_hub.files import whole_folder, write_json
from pivot_hub.mllm.load import image_px, load_mllm
from pivot_hub.provenance import source_commit, versions, weights_sha256, write_manifest

SHIPPED = RECIPES / "shapes" / "pair"
STAGES = {"parent": "2-instruct", "sft": "3-sft", "dpo": "3-dpo"}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]  # never a pickle, never code
FEW_PARAMETERS = 50_000_000  # of an MLLM that computes faster on one thread
MOST_PARAMETERS = 3_000_000_000  # of an MLLM that a visitor may ask for


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: operations of microseconds, which waking a second one only delays.

    Beside other programs it delays them by thousands: a comparison by the shipped pair took 0.22 s on one thread and
    2.7 to 6.0 s on two, on two cores that others used too.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class BundleNames:
    """What to compare, by name: all empty for the pair that the app was started with."""

    first: str = ""
    second: str = ""
    parent: str = ""


@dataclass(frozen=True)
class Mllm:
    """One MLLM under the name it is shown by."""

    name: str
    model: LlavaForConditionalGeneration
    processor: LlavaProcessor


@dataclass(frozen=True)
class ModelBundle:
    """Two MLLMs, in evaluation mode, with the parent of both where there is one.

    Maps hang hooks into a model while they are computed: whoever uses one of these does it within `alone()`.
    """

    names: BundleNames
    first: Mllm
    second: Mllm
    parent: Mllm | None
    lock: Any = field(default_factory=threading.RLock, repr=False)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Use the models with nobody else in them, and small ones on one thread."""
        size = sum(p.numel() for p in self.first.model.parameters())
        with self.lock, _one_thread() if size < FEW_PARAMETERS else nullcontext():
            yield

    @property
    def image_px(self) -> int:
        """Side at which the built-in world is drawn: the larger of what the two encoders take."""
        return max(image_px(self.first.model), image_px(self.second.model))

    @property
    def layers(self) -> int:
        """Hidden states that Grad-CAM can look at in both encoders."""
        return min(feature_layer(self.first.model), feature_layer(self.second.model))


def pack_bundle(runs: Path, output: Path) -> Path:
    """Pack the SFT and the DPO MLLM of a quickstart with their parent, small enough to ship.

    Args:
        runs: folder of the stages 2-instruct, 3-sft and 3-dpo.
        output: folder of the pack; one that is there is replaced.

    Raises:
        CheckpointError: a stage is missing, or the branches are not of that parent.
    """
    folders = {role: runs / stage for role, stage in STAGES.items()}
    for folder in folders.values():
        if not (folder / "provenance.json").is_file():
            raise CheckpointError(f"{folder} is no finished stage: run `pivot quickstart` first.")
    made = {role: json.loads((folder / "provenance.json").read_text()) for role, folder in folders.items()}
    sha256 = weights_sha256(folders["parent"])
    for role in ("sft", "dpo"):
        if made[role]["parent"]["weights_sha256"] != sha256:
            raise CheckpointError(f"{folders[role]} was not trained from {folders['parent']}; give stages of one run.")
    weights = {role: load_mllm(folder)[0].state_dict() for role, folder in folders.items()}
    packed: dict[str, Tensor] = {}
    for key, weight in weights["parent"].items():
        packed[f"parent.{key}"], packed[f"parent.{key}:scale"] = _quantise(weight, torch.int16)
    for role in ("sft", "dpo"):
        for key, weight in weights[role].items():
            difference = weight - weights["parent"][key]
            if difference.any():  # what did not train is the parent's
                packed[f"{role}.{key}"], packed[f"{role}.{key}:scale"] = _quantise(difference, torch.int8)
    with whole_folder(output) as folder:
        save_file(packed, folder / "pair.safetensors")
        for file in sorted(folders["parent"].iterdir()):
            if file.suffix in (".json", ".jinja") and file.name not in ("provenance.json", "report.json"):
                shutil.copyfile(file, folder / file.name)
        config = json.loads((folder / "config.json").read_text())
        for part in (config, config["vision_config"], config["text_config"]):
            part.pop("_name_or_path", None)  # where the parts lay on the machine that trained them
        write_json(folder / "config.json", config)
        metadata = {"stages": made, "commit": source_commit(), "versions": versions()}
        write_manifest(folder, {"command": "pivot pair RUNS OUTPUT", **metadata})
    return output


@_one_thread()
def shipped_bundle(folder: Path = SHIPPED) -> ModelBundle:
    """Load the packed pair.

    Raises:
        CheckpointError: it is not there, or incomplete.
    """
    if not (folder / "pair.safetensors").is_file():
        raise CheckpointError(f"{folder} holds no packed pair; make one with `pivot pair RUNS OUTPUT`.")
    config = AutoConfig.from_pretrained(folder)
    processor = cast(LlavaProcessor, AutoProcessor.from_pretrained(folder, backend="pil"))
    packed = load_file(folder / "pair.safetensors")
    parent = _unpack(packed, "parent")
    with torch.random.fork_rng(devices=[]):
        blank = LlavaForConditionalGeneration(config)
    members = {}
    for role, shown in (("parent", "parent"), ("sft", "SFT"), ("dpo", "DPO")):
        differences = _unpack(packed, role) if role != "parent" else {}
        model = copy.deepcopy(blank)
        model.load_state_dict({k: w + differences[k] if k in differences else w for k, w in parent.items()})
        members[role] = Mllm(shown, _ready(model), processor)
    return ModelBundle(BundleNames(), members["sft"], members["dpo"], members["parent"])


class BundleCache:
    """Pairs in memory, shared by all visitors: the one the app was started with, and the latest few of others."""

    def __init__(
        self, names: BundleNames = BundleNames(), runs: Path | None = None, keep: int = 2, most: int = MOST_PARAMETERS
    ) -> None:
        """Remember what may be read; nothing is loaded yet.

        Args:
            names: of the pair to start with, folders and Hub names; the shipped pair by default.
            runs: folder of checkpoints that visitors may name. Nothing else of this machine is read for them.
            keep: how many other pairs stay in memory.
            most: parameters of an MLLM that a visitor may ask for.
        """
        self.names, self.runs, self.keep, self.most = names, runs, keep, most
        self._start: ModelBundle | None = None
        self._others: OrderedDict[BundleNames, ModelBundle] = OrderedDict()
        self._lock = threading.Lock()

    def start(self) -> ModelBundle:
        """The pair the app was started with; loaded once."""
        with self._lock:
            if self._start is None:
                if self.names == BundleNames():
                    self._start = shipped_bundle()
                else:
                    self._start = _join(
                        BundleNames(), [(n, Path(n)) for n in astuple(self.names) if n], lambda *a: None
                    )
            return self._start

    def get(self, names: BundleNames, log: Callable[[float, str], None] = lambda share, what: None) -> ModelBundle:
        """The pair of these names, from memory or loaded now.

        Args:
            names: as a visitor gave them; empty for the start.
            say: called with how far it is, from 0 to 1, and what comes next.

        Raises:
            CheckpointError: a name is not allowed, not found, or not that of an MLLM; no local path is told.
        """
        if names == BundleNames():
            return self.start()
        if not names.first or not names.second:
            raise CheckpointError("Two MLLMs are compared: give both names, or neither for the built-in pair.")
        with self._lock:
            if names in self._others:
                self._others.move_to_end(names)
                return self._others[names]
        given = [n for n in astuple(names) if n]
        folders = []
        for number, name in enumerate(given):
            log(0.6 * number / len(given), f"finding {name}")
            folders.append((name, self._find(name)))
        pair = _join(names, folders, log)
        with self._lock:
            self._others[names] = pair
            while len(self._others) > self.keep:
                self._others.popitem(last=False)
        return pair

    def known(self) -> list[str]:
        """Names of the checkpoints that visitors may give without the Hub."""
        if self.runs is None:
            return []
        return sorted(str(f.parent.relative_to(self.runs)) for f in self.runs.rglob("config.json") if _is_llava(f))

    def _find(self, name: str) -> Path:
        """Bring a name a visitor gave to a folder: one below `runs`, or a download from the Hub."""
        if self.runs is not None and name in self.known():
            return self.runs / name
        if not HUB_NAME.fullmatch(name) or ".." in name:
            also = f", or one of {', '.join(self.known()[:9])}" if self.known() else ""
            raise CheckpointError(
                f"{name[:80]!r} names no MLLM: give a Hub repository as owner/name or owner/name@revision{also}."
            )
        repo, _, revision = name.partition("@")
        try:
            config = Path(hf_hub_download(repo, "config.json", revision=revision or None))
            self._check_size(name, config)
            return Path(snapshot_download(repo, revision=revision or None, allow_patterns=HUB_FILES))
        except (RepositoryNotFoundError, GatedRepoError, RevisionNotFoundError):
            raise CheckpointError(
                f"{name}: the Hub has no such public repository and revision; check the spelling."
            ) from None
        except CheckpointError:
            raise
        except Exception as error:  # no network, a proxy, a full disk: the library has a class for each
            raise CheckpointError(
                f"{name}: it could not be fetched; the Hub is out of reach or has no such repository. Check the "
                "spelling, or try again later."
            ) from error

    def _check_size(self, name: str, config_file: Path) -> None:
        if not _is_llava(config_file):
            raise CheckpointError(f"{name}: it is not an MLLM in transformers' LLaVA format.")
        config = AutoConfig.from_pretrained(config_file.parent)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in LlavaForConditionalGeneration(config).parameters())
        if parameters > self.most:
            raise CheckpointError(
                f"{name}: {parameters / 1e9:.1f} billion parameters are more than the {self.most / 1e9:g} billion that "
                "this app takes; run it yourself on a larger machine."
            )


def _join(names: BundleNames, given: list[tuple[str, Path]], log: Callable[[float, str], None]) -> ModelBundle:
    """Load two MLLMs and, as a third, their parent."""
    members = []
    for number, (name, folder) in enumerate(given):
        log(0.6 + 0.4 * number / len(given), f"loading {name}")
        try:
            model, processor = load_mllm(folder)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(folder), name)) from error
        members.append(Mllm(name.rstrip("/").rpartition("/")[2], _ready(model), processor))
    if members[0].name == members[1].name:  # of two owners, or two revisions
        members[:2] = [Mllm(n, m.model, m.processor) for (n, _), m in zip(given, members[:2], strict=False)]
    return ModelBundle(names, members[0], members[1], members[2] if len(members) == 3 else None)


def _ready(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return cast(LlavaForConditionalGeneration, cast(Any, model).to(device).eval().requires_grad_(False))


def _is_llava(config_file: Path) -> bool:
    try:
        return json.loads(config_file.read_text()).get("model_type") == "llava"
    except (OSError, ValueError, AttributeError):
        return False


def _quantise(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round a tensor to integers, each row (the last axes flattened) on a scale of its own: (R, ...), (R, 1)."""
    rows = weight.reshape(weight.shape[0], -1) if weight.ndim > 1 else weight[None]
    scale = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / torch.iinfo(dtype).max
    return torch.round(rows / scale).to(dtype).reshape(weight.shape), scale


def _restore(whole: Tensor, scale: Tensor) -> Tensor:
    rows = whole.reshape(scale.shape[0], -1).float() * scale
    return rows.reshape(whole.shape)


def _unpack(packed: dict[str, Tensor], role: str) -> dict[str, Tensor]:
    keys = [k for k in packed if k.startswith(f"{role}.") and not k.endswith(":scale")]
    return {k.removeprefix(f"{role}."): _restore(packed[k], packed[f"{k}:scale"]) for k in keys}
