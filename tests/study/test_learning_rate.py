"""The search for a learning rate: every candidate is run and recorded, the best on validation is chosen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pivot_hub.errors import RecipeError
from pivot_hub.study.learning_rate import search_rate


def test_every_candidate_is_recorded_and_the_best_chosen(recipes: Path, trained: Path, tmp_path: Path) -> None:
    record = search_rate(
        str(recipes / "3-sft.yaml"),
        [1e-5, 1e-3],
        trained.parent,
        tmp_path / "search.json",
        questions=10,
        log=lambda line: None,
    )
    assert json.loads((tmp_path / "search.json").read_text())["candidates"] == json.loads(
        json.dumps(record["candidates"])
    )
    assert [c["rate"] for c in record["candidates"]] == [1e-5, 1e-3]
    assert len({c["recipe_sha256"] for c in record["candidates"]}) == 2
    best = max(record["candidates"], key=lambda c: c["value_pct"])
    assert record["chosen"] == best["rate"]
    assert record["parts"] == ["language", "projector", "vision"]
    assert "validation" in record["criterion"]


def test_one_candidate_is_no_search(recipes: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="at least two rates"):
        search_rate(str(recipes / "3-sft.yaml"), [1e-5], tmp_path, tmp_path / "search.json")
