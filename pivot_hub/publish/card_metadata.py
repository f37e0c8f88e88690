"""The metadata of a card: the YAML header that the Hub reads."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from pivot_hub.errors import CardError
from pivot_hub.publish.card_inputs import EncoderMetadata, Prose, data_sources, required_fact
from pivot_hub.publish.eval_results import eval_results

# What a card's metadata may hold; another key is a mistake, not an extension.
METADATA_KEYS = frozenset(
    {
        "license",
        "license_name",
        "license_link",
        "library_name",
        "pipeline_tag",
        "base_model",
        "base_model_relation",
        "datasets",
        "metrics",
        "tags",
        "model-index",
    }
)


def card_metadata(metadata: EncoderMetadata, prose: Prose, name: str, chain: list[dict[str, Any]]) -> ModelCardData:
    own = metadata.own_results()
    stage = required_fact(metadata.config, "config", "pivot.stage")
    base = metadata.config["pivot"].get("base_model")
    if base is None and stage != "base":
        raise CardError("config.pivot.base_model is missing: extract the encoder again.")
    sources = data_sources([required_fact(step, "provenance", "data") for step in chain], prose)
    data = sorted({s["hub"] for s in sources if s["hub"]})
    return ModelCardData(
        license=prose.license,
        license_name=prose.license_name,
        license_link=prose.license_link,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        base_model=hub_name(base, prose) if base else None,
        base_model_relation="finetune" if base else None,
        datasets=data or None,
        metrics=sorted({r.metric for r in own}),
        tags=["pivot", "vision-encoder", stage, required_fact(metadata.config, "config", "model_type"), *prose.tags],
        model_name=name,
        eval_results=eval_results(own, prose.benchmarks),
    )


def language_name(metadata: EncoderMetadata) -> str | None:
    if metadata.config["pivot"]["stage"] == "base":
        return None
    language: str = required_fact(metadata.config, "config", "pivot.language_head")
    return language


def hub_name(name: str | None, prose: Prose) -> str | None:
    return prose.names.get(name, name) if name else None


def check_metadata(card: ModelCard) -> ModelCard:
    """A card whose metadata holds nothing but what is allowed, and reads back as it was written."""
    written = card.data.to_dict()
    if unknown := sorted(written.keys() - METADATA_KEYS):
        raise CardError(f"metadata key {unknown[0]!r} is not one of {', '.join(sorted(METADATA_KEYS))}.")
    if ModelCard(str(card)).data.to_dict() != written:
        raise CardError("the card's metadata does not read back as it was written.")
    return card
