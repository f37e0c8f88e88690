"""The card of an encoder that was taken out of somebody else's MLLM: what the repository knows, and no claim beyond."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from pivot_hub.encoder import PivotVisionConfig
from pivot_hub.errors import CardError
from pivot_hub.publish.card_inputs import EncoderMetadata, Prose, read_metadata, read_prose, required_value
from pivot_hub.publish.card_tables import card_template, result_tables
from pivot_hub.publish.eval_results import eval_results


def choose_prose(encoder: str | Path, prose: str | None, repository: str | None = None) -> Prose:
    """Return the prose of a card: the one that is named, the one of the folder's name, or that of an extracted encoder.

    Args:
        encoder: Folder of the encoder repository.
        prose: A YAML file, or a name of `model_cards`.
        repository: Name on the Hub.

    Raises:
        CardError: There is no such prose, or the licence of an extracted encoder is not known.
    """
    path = Path(encoder)
    if prose is None and (path / "provenance.json").is_file() and (metadata := read_metadata(path)).is_extracted:
        return extracted_prose(metadata, repository or path.resolve().name)
    return read_prose(prose or path.resolve().name)


def extracted_prose(metadata: EncoderMetadata, repository: str) -> Prose:
    """Return prose that holds what the source's card says of its licence, and nothing else.

    Raises:
        CardError: The source's card states no licence.
    """
    source = required_value(metadata.provenance, "provenance", "source")
    if not isinstance(source.get("license"), str):
        raise CardError(
            f"the licence of {source['name']} is not known, because its card states none; give a file with --prose, "
            "whose keys are repository, version, about and license."
        )
    licence = {key: _plain(source.get(key)) for key in ("license", "license_name", "license_link")}
    return Prose(repository=repository, version="1.0.0", about="", benchmarks={"shapes": "pivot/shapes"}, **licence)


def render_extracted(metadata: EncoderMetadata, prose: Prose, name: str) -> ModelCard:
    """Render the card of an extracted encoder.

    Args:
        metadata: Metadata of the encoder repository.
        prose: Prose of the card.
        name: Name of the repository on the Hub.

    Raises:
        CardError: A required value is missing; the message names it.
    """
    source = {k: _plain(v) for k, v in required_value(metadata.provenance, "provenance", "source").items()}
    own = metadata.own_results()
    config: Any = PivotVisionConfig(
        {k: v for k, v in metadata.config.items() if k not in ("auto_map", "pivot")}, metadata.config["pivot"]
    )
    model_type = required_value(metadata.config, "config", "model_type")
    header = ModelCardData(
        license=prose.license,
        license_name=prose.license_name,
        license_link=prose.license_link,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        base_model=source["name"] if "/" in source["name"] else None,
        tags=["pivot", "vision-encoder", "extracted", model_type, *prose.tags],
        model_name=name if own else None,
        eval_results=eval_results(own, prose.benchmarks) if own else None,
    )
    text = card_template("extracted.md.jinja").render(
        name=name,
        prose=prose,
        source=source,
        versions=required_value(metadata.provenance, "provenance", "versions"),
        comparison=_compare(source),
        native=required_value(metadata.config, "config", "architectures")[0],
        image_px=config.image_size,
        patch_px=config.patch_size,
        width=config.hidden_size,
        prefix=config.pivot["prefix_tokens"],
        feature_layer=config.pivot["feature_layer"],
        results=own,
        tables=result_tables(metadata) if own else [],
        commands=metadata.provenance.get("commands") or prose.commands or ["pivot extract MODEL encoder"],
    )
    return ModelCard(f"---\n{header.to_yaml()}\n---\n{text}")


def _plain(value: Any) -> Any:
    """Return a text of somebody else's card as one line without Markdown's table and HTML's tag characters."""
    return " ".join(value.translate(str.maketrans("|<>`", "    ")).split()) if isinstance(value, str) else value


def _compare(source: dict[str, Any]) -> str:
    """Say whether the vision tower differs from that of the base model."""
    found = source.get("base_comparison")
    if found is None:
        reason = source.get("base_comparison_reason") or "it was not asked for"
        return f"Its weights were not compared with those of a base model: {reason}."
    base = found["base_model"]
    if found["frozen"]:
        return (
            f"The vision tower of {source['name']} is frozen: all {found['blocks']} blocks are equal to those of "
            f"{base}, so this is the encoder of {base}."
        )
    return (
        f"Compared with {base}, {found['changed_blocks']} of {found['blocks']} blocks differ; the relative change of "
        f"all weights is {found['relative_change']:.1e}."
    )
