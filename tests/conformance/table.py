"""The README's table of every backbone against every door, from the suite's own results.

`python -m tests.conformance.table` writes it into the README; a test of the default suite holds the two equal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pivot_hub.files import write_json, write_whole
from tests.conformance.environment import ROOT
from tests.encoder.originals import ORIGINALS

FILE = Path(__file__).with_name("results.json")
README = ROOT / "README.md"
BEGIN, END = "<!-- doors: python -m tests.conformance.table -->", "<!-- end of doors -->"
RESULTS = 6  # four transformers, optimum, Node
DOORS = {"native": "AutoModel", "remote": "remote code", "package": "package", "llava": "LLaVA"}


def write_results(found: dict[str, Any]) -> None:
    """Keep what a whole run of the suite found."""
    write_json(FILE, dict(sorted(found.items())))


def render(results: dict[str, Any]) -> str:
    """Markdown: a row a backbone, a column a door; in a cell, the versions it opens in or why it does not."""
    transformers = {name: metadata for name, metadata in results.items() if name.startswith("transformers-")}
    others = {name: metadata for name, metadata in results.items() if name not in transformers}
    versions = [metadata["versions"]["transformers"] for metadata in transformers.values()]
    versions.sort(key=lambda version: [int(part) for part in version.split(".")])
    head = ["backbone", *DOORS.values(), *(_title(metadata) for metadata in others.values())]
    lines = [
        f"In transformers {', '.join(versions)}, each in an environment of its own (largest difference of a feature "
        f"{_worst(transformers):.1g}):",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for kind in (*ORIGINALS, "timm"):
        cells = [_cell([metadata["results"][kind].get(door) for metadata in transformers.values()]) for door in DOORS]
        cells += [_cell([metadata["results"].get(kind)]) for metadata in others.values()]
        lines.append("| " + " | ".join([kind, *cells]) + " |")
    return "\n".join(lines)


def _title(metadata: dict[str, Any]) -> str:
    return " ".join(f"{name} {version}" for name, version in metadata["versions"].items())


def _worst(results: dict[str, Any]) -> float:
    return max(
        door["difference"]
        for metadata in results.values()
        for doors in metadata["results"].values()
        for door in doors.values()
        if "difference" in door
    )


def _cell(found: list[dict[str, Any] | None]) -> str:
    tried = [f for f in found if f is not None]
    if not tried:
        return "-"
    if reasons := {f["reason"] for f in tried if "reason" in f}:
        return f"no: {', '.join(sorted(reasons))}"
    opened = sum("difference" in f for f in tried)
    return "yes" if opened == len(tried) else f"{opened} of {len(tried)}"


def put(readme: str, table: str) -> str:
    """The README with the table between its marks."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    write_whole(README, put(README.read_text(), render(json.loads(FILE.read_text()))))
