"""Tables of results in cards, and the templates that they are put into."""

from __future__ import annotations

from typing import Any

import jinja2

from pivot_hub.config.encoder_names import CARDS
from pivot_hub.encoder.configuration_pivot import LAST
from pivot_hub.probes.result import ProbeResult
from pivot_hub.publish.card_inputs import LOSS_MAPS, EncoderMetadata

COLUMNS = ("base", "sft", "dpo")  # order of the encoders in a table of results


def result_tables(metadata: EncoderMetadata) -> list[dict[str, Any]]:
    """Lay out results as tables with one column for each encoder.

    Args:
        metadata: Metadata of the encoder repository.

    Returns:
        The table of the encoder alone, then that with its MLLM, each with `title`, `head` and `rows`; a table without
        rows is left out.
    """
    own_name = metadata.own_results()[0].encoder

    def column(result: ProbeResult) -> str:
        return f"{result.encoder}, `{LAST}`" if metadata.is_other_output(result) else result.encoder

    names = {column(r) for r in metadata.results}
    columns = [name for name in COLUMNS if name in names] + sorted(names - set(COLUMNS))
    measures: dict[tuple[str, str], dict[str, ProbeResult]] = {}
    for result in metadata.results:
        measures.setdefault((result.task, result.metric), {})[column(result)] = result
    tables = []
    for title, alone in (("The encoder alone, frozen", True), ("With the MLLM it was trained in", False)):
        rows = []
        for (task, metric), by_encoder in measures.items():
            own = by_encoder.get(own_name)
            if own is None or (own.partner is None) != alone or task.endswith(LOSS_MAPS):
                continue
            cells = [_cell(by_encoder[c]) if c in by_encoder else "-" for c in columns]
            partner = [] if alone else [own.partner or "-"]
            conditions = f"{own.protocol}; {own.split} split, seed {own.seed}"
            rows.append([task, metric, *cells, *partner, str(own.n), conditions])
        if rows:
            filled = [i for i, c in enumerate(columns) if any(row[2 + i] != "-" for row in rows)]
            rows = [[*row[:2], *(row[2 + i] for i in filled), *row[2 + len(columns) :]] for row in rows]
            headings = [f"**{c}** (this)" if c == own_name else c for c in (columns[i] for i in filled)]
            partner = [] if alone else ["partner"]
            head = ["probe", "metric", *headings, *partner, "n", "conditions"]
            tables.append({"title": title, "head": head, "rows": rows})
    return tables


def _cell(result: ProbeResult) -> str:
    low, high = result.ci95
    digits = 1 if result.unit == "percent" else 3
    return f"{result.value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def card_template(name: str) -> jinja2.Template:
    """Return a template of `model_cards`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(CARDS),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown
    )
    return environment.get_template(name)
