"""The YAML header of a card, which the Hub reads."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCardData

from pivot_hub.errors import CardError
from pivot_hub.publish.card_inputs import EncoderMetadata, Prose, data_sources, required_value
from pivot_hub.publish.eval_results import eval_results


def card_metadata(metadata: EncoderMetadata, prose: Prose, name: str, chain: list[dict[str, Any]]) -> ModelCardData:
    """Build the header of a card.

    Args:
        metadata: Metadata of the encoder repository.
        prose: Prose of the card.
        name: Name of the repository on the Hub.
        chain: Provenance of each training stage, the first stage first.

    Raises:
        CardError: A required value is missing; the message names it.
    """
    own = metadata.own_results()
    stage = required_value(metadata.config, "config", "pivot.stage")
    base = metadata.config["pivot"].get("base_model")
    if base is None and stage != "base":
        raise CardError("config.pivot.base_model is missing: extract the encoder again.")
    sources = data_sources([required_value(step, "provenance", "data") for step in chain], prose)
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
        tags=["pivot", "vision-encoder", stage, required_value(metadata.config, "config", "model_type"), *prose.tags],
        model_name=name,
        eval_results=eval_results(own, prose.benchmarks),
    )


def language_model_name(metadata: EncoderMetadata) -> str | None:
    """Return the recipe's name of the language model that the encoder was trained with; None for a base encoder."""
    if metadata.config["pivot"]["stage"] == "base":
        return None
    name: str = required_value(metadata.config, "config", "pivot.language_head")
    return name


def hub_name(name: str | None, prose: Prose) -> str | None:
    """Return the Hub name that the prose gives for a recipe's name, or the name itself."""
    return prose.names.get(name, name) if name else None
