"""The documentation's table of the MLLM families, from the table in `mllm/families.py` and the recorded results.

`python -m tests.conformance.towers_table` writes it into the page of backbones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from pivot_hub.encoder.configuration_pivot import BACKBONES, LAST
from pivot_hub.files import write_whole
from pivot_hub.mllm.families import FAMILIES
from tests.conformance.table import PAGE, replace_table
from tests.mllm.tiny_mllms import TINY

RESULTS = Path(__file__).with_name("towers.json")
BEGIN = "<!-- families: python -m tests.conformance.towers_table -->"
END = "<!-- end of families -->"


def render_towers(results: dict[str, Any]) -> tuple[str, str, str]:
    """Render one row for each family.

    Returns:
        The table as Markdown, and the markers that enclose it.
    """
    reports = {r["versions"]["transformers"]: r["results"] for r in results.values()}
    versions = sorted(reports, key=lambda version: [int(part) for part in version.split(".")])
    lines = [
        f"Tested in transformers {', '.join(versions)}:",
        "",
        "| MLLM | vision tower | enters the projector | patches of a token | AutoModel | PivotVisionModel |",
        "|---|---|---|---|---|---|",
    ]
    for name, recipe in TINY.items():
        family = FAMILIES[recipe.model_type]
        config: Any = CONFIG_MAPPING[recipe.model_type]
        config = config(vision_config=recipe.vision, text_config=recipe.text, **recipe.further)
        tower = config.vision_config.model_type
        layer = family.feature_layer(config)
        entered = f"`{LAST}`" if layer == LAST else f"`hidden_states[{layer}]`"
        if recipe.further.get("vision_feature_layer") is None and layer not in (LAST, -1):
            entered += " or as configured"
        side = family.merge(config)
        native = BACKBONES[tower].layout is not None
        tokens = "cross attention" if not family.image_tokens else f"{side} x {side}"
        title = {"llava": "LLaVA", "llava with pixtral": "Pixtral"}.get(name, family.title)
        cells = [
            f"{title} (`{recipe.model_type}`)",
            f"`{tower}`{', native resolution' if native else ''}",
            entered,
            tokens,
            *(_where(name, path, reports, versions) for path in ("native", "remote")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines), BEGIN, END


def _where(name: str, loading_path: str, reports: dict[str, Any], versions: list[str]) -> str:
    """Name the releases in which a loading path gives the features."""
    outcomes = {v: reports[v][name.replace(" ", "-")][loading_path] for v in versions}
    works = [v for v, o in outcomes.items() if o.get("difference", 1) < 1e-5]
    if len(works) == len(versions):
        return "all"
    return ", ".join(v.rpartition(".")[0] for v in works) or "no entry"


if __name__ == "__main__":
    write_whole(PAGE, replace_table(PAGE.read_text(), *render_towers(json.loads(RESULTS.read_text()))))
