"""The tables of results/: writing them again gives the same bytes, and they hold what the records hold."""

from __future__ import annotations

import csv
import json

import pytest

from pivot_hub import list_encoders
from pivot_hub.config.recipe import RECIPES
from pivot_hub.publish.card_collection import recorded_metadata
from pivot_hub.registry.encoders import RESULTS
from pivot_hub.registry.tables import BEGIN, END, encoder_shape, encoder_table, render_measured, render_tables

README = RECIPES.parent / "README.md"


@pytest.fixture(scope="module")
def tables() -> dict[str, str]:
    return render_measured()


def _require_written(tables: dict[str, str]) -> None:
    for name, text in tables.items():
        assert (RESULTS / name).read_bytes() == text.encode(), f"{name}: run python -m pivot_hub.registry.tables"


def test_tables_are_those_that_the_command_writes(tables: dict[str, str]) -> None:
    _require_written(tables)
    assert {*tables, "encoders.csv"} == {file.name for file in RESULTS.glob("*.csv")}


@pytest.mark.slow
def test_all_tables_are_those_that_the_command_writes() -> None:
    _require_written(render_tables())


@pytest.mark.parametrize("name", ["shapes-base", "shapes-dpo", "mae-large"])
def test_the_shape_of_an_encoder_is_that_of_its_row(name: str) -> None:
    entry = next(each for each in list_encoders() if each.name == name)
    shape = vars(encoder_shape(name))
    assert {key: vars(entry)[key] for key in shape} == shape


def test_results_are_the_recorded_ones(tables: dict[str, str]) -> None:
    rows = list(csv.DictReader(tables["results-shapes.csv"].splitlines()))
    for name in ("shapes-base", "shapes-sft", "shapes-dpo"):
        own = {(r.task, r.metric): round(r.value, 2) for r in recorded_metadata(name).own_results()}
        listed = {
            (r["task"], r["metric"]): float(r["value"])
            for r in rows
            if r["encoder"] == name and r["feature_layer"] == "-2"
        }
        assert listed == own


def test_speeds_are_the_recorded_ones(tables: dict[str, str]) -> None:
    rows = list(csv.DictReader(tables["benchmark-encoders-cpu.csv"].splitlines()))
    for row in rows:
        record = json.loads((RECIPES / "bench" / row["record"]).read_text())
        assert record["forms"][row["form"]]["images_per_s"] == float(row["images_per_s"])
    assert {row["record"] for row in rows} == {f.name for f in (RECIPES / "bench").glob("encoder-*.json")}


def test_the_table_of_encoders_has_a_row_for_each() -> None:
    lines = encoder_table().splitlines()
    assert len(lines) == 2 + len(list_encoders())
    assert (
        "| [siglip2-so400m](model_cards/siglip2-so400m.md) | planned | google/siglip2-so400m-patch16-384 |" in lines[-1]
    )


def test_the_readmes_table_is_that_of_the_registry() -> None:
    assert README.read_text().split(BEGIN)[1].split(END)[0].strip() == encoder_table()
