"""The inputs of a card: the metadata of an encoder repository, and prose that no run can know."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from pivot_hub.config.encoder_names import CARDS
from pivot_hub.config.yaml_loader import Strict, check_keys, read_yaml
from pivot_hub.encoder.configuration_pivot import LAST
from pivot_hub.errors import CardError, ProbeError
from pivot_hub.probes.result import ProbeResult, read_results

# Endings of tasks whose saliency maps explain a training loss and not an answer; cards leave these results out.
LOSS_MAPS = (" of sft", " of dpo")


class DataProse(Strict):
    """A source of training data: its Hub id, if it has one, and its licence as its page states it."""

    hub: str | None = None
    licence: str


class Prose(Strict):
    """The text of a card that no run can know: `model_cards/<encoder>.yaml`.

    Args:
        repository: Name of the encoder's repository on the Hub.
        version: Version of the published encoder, which is also the tag of its commit.
        recipe: Recipe that trains the encoder; None for one that was taken out of somebody else's MLLM.
        shipped: Folder below `recipes` that holds the encoder, where it ships with this package.
        about: Description of the encoder in a few sentences.
        intended_uses: Uses that the encoder is meant for; a general sentence is printed where the list is empty.
        license: Licence of the weights, by the Hub's identifier; license_name and license_link go with `other`.
        names: Hub names by the names that recipes use, such as a folder beside them.
        data: Sources of the lineage's data by the path that its recipes give.
        benchmarks: Hub ids of the data sets that the results are on.
        pair: Repositories of the SFT and the DPO encoder that are compared with each other.
        paper: Numbers that the paper reports, quoted as the paper's.
        limits: Limitations that a user should know.
        commands: Commands that reproduce the encoder, where the repository does not know them.
        tags: Further tags.
    """

    repository: str
    version: str
    recipe: str | None = None
    shipped: str | None = None
    about: str
    intended_uses: list[str] = Field([])
    license: str
    license_name: str | None = None
    license_link: str | None = None
    names: dict[str, str] = Field({})
    data: dict[str, DataProse] = Field({})
    benchmarks: dict[str, str] = Field({})
    pair: dict[Literal["sft", "dpo"], str] = Field({})
    paper: str | None = None
    limits: list[str] = Field([])
    commands: list[str] | None = None
    tags: list[str] = Field([])


@dataclass(frozen=True)
class EncoderMetadata:
    """Everything a card reports of an encoder: the contents of its repository's files."""

    config: dict[str, Any]
    provenance: dict[str, Any]
    recipe: dict[str, Any]
    results: list[ProbeResult]
    report: dict[str, Any] | None = None
    export: dict[str, Any] | None = None

    @property
    def encoder_sha256(self) -> str:
        """Hash of the weights as results name it: `provenance.weights_sha256` from the checksums in the manifest."""
        checksums = required_value(self.provenance, "provenance", "files")
        weights = sorted(name for name in checksums if name.endswith(".safetensors") and "/" not in name)
        return hashlib.sha256("".join(f"{name}{checksums[name]}" for name in weights).encode()).hexdigest()

    @property
    def is_extracted(self) -> bool:
        """Whether the encoder was taken out of somebody else's MLLM, so that this package did not train it."""
        pivot = self.config.get("pivot")
        return isinstance(pivot, dict) and pivot.get("stage") == "extracted"

    def own_results(self) -> list[ProbeResult]:
        """Select the results of these weights at the feature layer, without those of `LOSS_MAPS`.

        Raises:
            CardError: There are no results for these weights, and the encoder is not an extracted one, which may have
                none.
        """
        own = [r for r in self.results if r.encoder_sha256 == self.encoder_sha256]
        own = [r for r in own if not self.is_other_output(r) and not r.task.endswith(LOSS_MAPS)]
        if not own and not self.is_extracted:
            raise CardError(
                "results/*.json are missing for these weights: `pivot probe ENCODER --json dpo.json`, then "
                "`pivot card ENCODER --results dpo.json`."
            )
        return own

    def is_other_output(self, result: ProbeResult) -> bool:
        """Return whether a result is of the native class's own output where the feature layer is another."""
        return result.feature_layer == LAST and self.config.get("pivot", {}).get("feature_layer") != LAST

    def with_results(self, results: Sequence[ProbeResult]) -> EncoderMetadata:
        """Return the same metadata with other results."""
        return replace(self, results=list(results))


def read_metadata(folder: str | Path) -> EncoderMetadata:
    """Read the metadata of an encoder repository.

    Args:
        folder: Folder of the encoder repository.

    Raises:
        CardError: A file is missing or cannot be read.
    """
    path = Path(folder)
    config, provenance = _read_mapping(path / "config.json"), _read_mapping(path / "provenance.json")
    has_recipe = (path / "recipe.yaml").is_file() or "source" not in provenance
    results = [r for file in sorted((path / "results").glob("*.json")) for r in _read_results(file)]
    return EncoderMetadata(
        config=config,
        provenance=provenance,
        recipe=_read_mapping(path / "recipe.yaml") if has_recipe else {},
        results=results,
        report=_read_mapping(path / "report.json") if (path / "report.json").is_file() else None,
        export=_read_mapping(path / "export.json") if (path / "export.json").is_file() else None,
    )


def read_prose(path: str | Path) -> Prose:
    """Read the prose of a card.

    Args:
        path: A YAML file, or the name of an encoder that `model_cards` has prose for.

    Raises:
        CardError: There is no such prose, or its keys are not those of `Prose`.
    """
    file = Path(path) if Path(path).suffix == ".yaml" else CARDS / f"{path}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(f.stem for f in CARDS.glob("*.yaml")))
        raise CardError(f"{file.name}: there is no prose of this name; give a file with --prose, or one of {known}.")
    raw, where = read_yaml(file, "the prose of a card is a mapping of keys; start with `about:`", CardError)
    return check_keys(Prose, raw, where, CardError)


def stage_chain(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the provenance of each training stage, the first stage first."""
    step = provenance if "stage" in provenance else required_value(provenance, "provenance", "mllm")
    chain = []
    while step:
        chain.append(step)
        step = (step.get("parent") or {}).get("provenance")
    return chain[::-1]


def required_value(metadata: Mapping[str, Any], where: str, key: str, may_be_none: bool = False) -> Any:
    """Look up a dotted key.

    Args:
        metadata: Nested mapping.
        where: Name of the mapping in the error message.
        key: Keys of each level, joined by dots.
        may_be_none: Whether None is accepted as a value.

    Raises:
        CardError: The key is missing; the message names it.
    """
    value: Any = metadata
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value or (value[part] is None and not may_be_none):
            raise CardError(f"{where}.{key} is missing.")
        value = value[part]
    return value


def data_sources(stages: Sequence[Sequence[dict[str, Any]]], prose: Prose) -> list[dict[str, Any]]:
    """List each data source once, with its Hub id and licence from the prose.

    Args:
        stages: Data sources of each stage, as recipes describe them.
        prose: Prose of the card.

    Raises:
        CardError: The prose lacks one of the sources.
    """
    sources: dict[str, dict[str, Any]] = {}
    for source in [s for stage in stages for s in stage]:
        path = "shapes" if source["format"] == "shapes" else source["path"]
        # Provenance records only the last part of a folder's path.
        known = [key for key in prose.data if Path(key).name == Path(path).name]
        if not known:
            raise CardError(f"prose.data.{path} is missing: give the licence of this source, and its Hub id.")
        sources[known[0]] = {"name": known[0], **prose.data[known[0]].model_dump()}
    return list(sources.values())


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = (yaml.safe_load if path.suffix == ".yaml" else json.loads)(path.read_text())
    except OSError as error:
        raise CardError(f"{path.name} is missing: give the folder of an encoder repository.") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise CardError(f"{path.name} cannot be read: {reason}; extract or pull the repository again.") from error
    if not isinstance(content, dict):
        raise CardError(f"{path.name} is not a mapping of keys.")
    return content


def _read_results(path: Path) -> list[ProbeResult]:
    try:
        return read_results(path)
    except ProbeError as error:
        raise CardError(str(error)) from error
