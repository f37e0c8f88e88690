"""The documentation's table of every backbone and every loading path, rendered from the suite's recorded results.

`python -m tests.conformance.table` writes the table into the page of backbones. A test of the default suite
checks that the page's table is that of the results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pivot_hub.files import write_whole
from tests.conformance.environment import ROOT
from tests.encoder.originals import ORIGINALS

RESULTS = Path(__file__).with_name("results.json")
PAGE = ROOT / "docs" / "reference" / "backbones.md"
BEGIN, END = "<!-- loading paths: python -m tests.conformance.table -->", "<!-- end of loading paths -->"
LOADING_PATHS = {"native": "AutoModel", "remote": "remote code", "package": "package", "llava": "LLaVA"}


def render(results: dict[str, Any]) -> str:
    """Render the results as Markdown.

    Each row is a backbone and each column a loading path or an exporter. A cell says whether every version loads the
    backbone's repository, how many versions do, or why none does.
    """
    transformers = {name: metadata for name, metadata in results.items() if name.startswith("transformers-")}
    others = {name: metadata for name, metadata in results.items() if name not in transformers}
    versions = [metadata["versions"]["transformers"] for metadata in transformers.values()]
    versions.sort(key=lambda version: [int(part) for part in version.split(".")])
    titles = ["backbone", *LOADING_PATHS.values(), *(_title(metadata) for metadata in others.values())]
    lines = [
        f"In transformers {', '.join(versions)}, each in an environment of its own (largest difference of a feature "
        f"{_largest_difference(transformers):.1g}):",
        "",
        "| " + " | ".join(titles) + " |",
        "|---" * len(titles) + "|",
    ]
    for kind in (*ORIGINALS, "timm"):
        cells = [
            _cell([metadata["results"][kind].get(loading_path) for metadata in transformers.values()])
            for loading_path in LOADING_PATHS
        ]
        cells += [_cell([metadata["results"].get(kind)]) for metadata in others.values()]
        lines.append("| " + " | ".join([kind, *cells]) + " |")
    return "\n".join(lines)


def _title(metadata: dict[str, Any]) -> str:
    return " ".join(f"{name} {version}" for name, version in metadata["versions"].items())


def _largest_difference(results: dict[str, Any]) -> float:
    return max(
        outcome["difference"]
        for metadata in results.values()
        for outcomes in metadata["results"].values()
        for outcome in outcomes.values()
        if "difference" in outcome
    )


def _cell(outcomes: list[dict[str, Any] | None]) -> str:
    """Summarise one backbone's outcomes, one for each version; None where the loading path was not tried."""
    tried = [outcome for outcome in outcomes if outcome is not None]
    if not tried:
        return "-"
    reasons = {outcome["reason"] for outcome in tried if "reason" in outcome}
    if reasons:
        return f"no: {', '.join(sorted(reasons))}"
    loaded = sum("difference" in outcome for outcome in tried)
    return "yes" if loaded == len(tried) else f"{loaded} of {len(tried)}"


def replace_table(page: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """Return the page's text with the table between its markers."""
    before, rest = page.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    write_whole(PAGE, replace_table(PAGE.read_text(), render(json.loads(RESULTS.read_text()))))
