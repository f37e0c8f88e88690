"""Check a card: its metadata against what is allowed, its numbers against the repository's results."""

from __future__ import annotations

from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from pivot_hub.errors import CardError
from pivot_hub.publish.card_inputs import read_metadata
from pivot_hub.publish.card_render import result_tables
from pivot_hub.publish.eval_results import file_differences, index_differences


def card_problems(folder: str | Path) -> list[str]:
    """Hold the numbers of a published card against the repository's results.

    Returns:
        What differs, a sentence each; empty where every number of the card is one of the results, and the other way.
    """
    path = Path(folder)
    if not (path / "README.md").is_file():
        return ["README.md is missing: the repository has no card."]
    try:
        metadata = read_metadata(path)
        own = metadata.own_results()
        card = ModelCard((path / "README.md").read_text())
    except (CardError, ValueError, yaml.YAMLError) as error:
        return [f"README.md cannot be held against the results: {error}"]
    problems = index_differences(own, card.data.get("eval_results", []))
    names = {f".eval_results/{r.task.split('/')[0]}.yaml" for r in own}
    for name in sorted(names):
        if not (path / name).is_file():
            problems.append(f"{name} is missing.")
            continue
        problems += file_differences(own, name, (path / name).read_text())
    rows = {line.strip() for line in card.text.splitlines() if line.startswith("|")}
    for table in result_tables(metadata):
        for row in table["rows"]:
            if "| " + " | ".join(row) + " |" not in rows:
                problems.append(f"README.md has no row with the results of {row[0]} {row[1]}.")
    return problems
