"""What a card is made of: the facts of an encoder repository, and prose that no run can know."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from pivot_hub.config.yaml_loader import Strict, check_keys, read_yaml
from pivot_hub.errors import CardError, ProbeError
from pivot_hub.files import shipped_folder
from pivot_hub.probes.result import ProbeResult, read_results

# A share or a score, as in 47%, 3.7 points: not a name, as in So400m/16 or Qwen2.5-1.5B.
NUMBER = re.compile(r"\d\s*(?:%|percent\b|points?\b)")
CARDS = shipped_folder("model_cards")


class DataProse(Strict):
    """A source of training data: its Hub id, if it has one, and its licence as its page states it."""

    hub: str | None = None
    licence: str


class Prose(Strict):
    """What a card says that no run can know: `model_cards/<encoder>.yaml`.

    Args:
        repository: where the encoder lies on the Hub.
        version: of the published encoder; the tag of its commit.
        recipe: that makes it.
        about: what it is, in a few sentences.
        license: of the weights, by the Hub's identifier; license_name and license_link go with `other`.
        names: what recipes name, as a folder beside them, and what it is called on the Hub.
        data: each source of the lineage, by the path its recipes give.
        benchmarks: Hub ids of the data sets that results are on.
        pair: repositories of the SFT and the DPO encoder that are held against each other.
        paper: what the paper reports, quoted as the paper's.
        limits: what to know before using it.
        commands: what makes it again, where the repository does not know.
        tags: further tags.
    """

    repository: str
    version: str
    recipe: str
    about: str
    license: str
    license_name: str | None = None
    license_link: str | None = None
    names: dict[str, str] = Field({})
    data: dict[str, DataProse]
    benchmarks: dict[str, str] = Field({})
    pair: dict[Literal["sft", "dpo"], str] = Field({})
    paper: str | None = None
    limits: list[str]
    commands: list[str] | None = None
    tags: list[str] = Field([])


@dataclass(frozen=True)
class EncoderMetadata:
    """What is known of an encoder: the contents of its repository's files."""

    config: dict[str, Any]
    provenance: dict[str, Any]
    recipe: dict[str, Any]
    results: list[ProbeResult]
    report: dict[str, Any] | None = None
    export: dict[str, Any] | None = None

    @property
    def encoder_sha256(self) -> str:
        """Hash of the weights, as results name it: `provenance.weights_sha256` from the sealed hashes of the files."""
        sealed = required_fact(self.provenance, "provenance", "files")
        weights = sorted(name for name in sealed if name.endswith(".safetensors") and "/" not in name)
        return hashlib.sha256("".join(f"{name}{sealed[name]}" for name in weights).encode()).hexdigest()

    def own_results(self) -> list[ProbeResult]:
        """Results measured on these weights; maps that explain a training loss and no answer stay in results/.

        Raises:
            CardError: there are none.
        """
        own = [r for r in self.results if r.encoder_sha256 == self.encoder_sha256]
        own = [r for r in own if not r.task.endswith(LOSS_MAPS)]
        if not own:
            raise CardError(
                "results/*.json are missing for these weights: `pivot probe ENCODER --json dpo.json`, then "
                "`pivot card ENCODER --results dpo.json`."
            )
        return own


def read_metadata(folder: str | Path) -> EncoderMetadata:
    """Read the facts of an encoder repository.

    Raises:
        CardError: a file is missing or cannot be read.
    """
    path = Path(folder)
    results = [r for file in sorted((path / "results").glob("*.json")) for r in _results(file)]
    return EncoderMetadata(
        config=_read(path / "config.json"),
        provenance=_read(path / "provenance.json"),
        recipe=_read(path / "recipe.yaml"),
        results=results,
        report=_read(path / "report.json") if (path / "report.json").is_file() else None,
        export=_read(path / "export.json") if (path / "export.json").is_file() else None,
    )


def read_prose(path: str | Path) -> Prose:
    """Read the prose of a card: a file, or the name of an encoder that `model_cards` has prose for.

    Raises:
        CardError: there is none, it is not as `Prose` says, or it holds a number that belongs to results.
    """
    file = Path(path) if Path(path).suffix == ".yaml" else CARDS / f"{path}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(f.stem for f in CARDS.glob("*.yaml")))
        raise CardError(f"{file.name}: there is no prose of this name; give a file with --prose, or one of {known}.")
    raw, where = read_yaml(file, "the prose of a card is a mapping of keys; start with `about:`", CardError)
    prose = check_keys(Prose, raw, where, CardError)
    for text in (prose.about, *prose.limits):
        if found := NUMBER.search(text):
            said = text[max(0, found.start() - 20) : found.end()]
            raise CardError(f"{file.name} says {said!r}: numbers come from results, or stand under `paper` as its own.")
    return prose


def stage_chain(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """The provenance of each stage, the first one first."""
    step = provenance if "stage" in provenance else required_fact(provenance, "provenance", "mllm")
    made = []
    while step:
        made.append(step)
        step = (step.get("parent") or {}).get("provenance")
    return made[::-1]


def required_fact(metadata: Mapping[str, Any], where: str, key: str, may_be_none: bool = False) -> Any:
    found: Any = metadata
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found or (found[part] is None and not may_be_none):
            raise CardError(f"{where}.{key} is missing.")
        found = found[part]
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        made = (yaml.safe_load if path.suffix == ".yaml" else json.loads)(path.read_text())
    except OSError as error:
        raise CardError(f"{path.name} is missing: give the folder of an encoder repository.") from error
    except (ValueError, yaml.YAMLError) as error:
        raise CardError(f"{path.name} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(made, dict):
        raise CardError(f"{path.name} is no mapping of facts.")
    return made


def _results(path: Path) -> list[ProbeResult]:
    try:
        return read_results(path)
    except ProbeError as error:
        raise CardError(str(error)) from error


def data_sources(stages: Sequence[Sequence[dict[str, Any]]], prose: Prose) -> list[dict[str, Any]]:
    """Each source once, with what the prose says of it.

    Raises:
        CardError: the prose says nothing of one.
    """
    made: dict[str, dict[str, Any]] = {}
    for source in [s for stage in stages for s in stage]:
        path = "shapes" if source["format"] == "shapes" else source["path"]
        # Provenance keeps of a folder its name alone.
        known = [key for key in prose.data if Path(key).name == Path(path).name]
        if not known:
            raise CardError(f"prose.data.{path} is missing: say the licence of this source, and its Hub id.")
        made[known[0]] = {"name": known[0], **prose.data[known[0]].model_dump()}
    return list(made.values())


LOSS_MAPS = (" of sft", " of dpo")
