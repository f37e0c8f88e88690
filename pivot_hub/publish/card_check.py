"""Check that the numbers of a published card are those of the results beside it."""

from __future__ import annotations

from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from pivot_hub.errors import CardError
from pivot_hub.publish.card_inputs import read_metadata
from pivot_hub.publish.eval_results import index_differences


def card_problems(folder: str | Path) -> list[str]:
    """Compare the `model-index` of a published card with the results of the repository.

    Args:
        folder: Folder of the encoder repository.

    Returns:
        One message for each difference; empty where the card and the results agree.
    """
    path = Path(folder)
    if not (path / "README.md").is_file():
        return ["README.md is missing: the repository has no card."]
    try:
        own = read_metadata(path).own_results()
        card = ModelCard((path / "README.md").read_text())
    except (CardError, ValueError, yaml.YAMLError) as error:
        return [f"README.md cannot be compared with the results: {error}"]
    return index_differences(own, card.data.get("eval_results", []))
