"""The search for a learning rate: every candidate is run and recorded, and the best on validation is chosen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pivot_hub.errors import RecipeError
from pivot_hub.study.learning_rate import best_learning_rate, score_candidate, search_learning_rate


def test_every_candidate_is_recorded_and_the_best_chosen(recipes: Path, trained: Path, tmp_path: Path) -> None:
    record = search_learning_rate(
        str(recipes / "3-sft.yaml"),
        [1e-5, 1e-3],
        trained.parent,
        tmp_path / "search.json",
        pairs=20,
        questions=10,
        log=lambda line: None,
    )
    candidates = record["candidates"]
    assert json.loads((tmp_path / "search.json").read_text())["candidates"] == json.loads(json.dumps(candidates))
    assert [c["rate"] for c in candidates] == [1e-5, 1e-3]
    assert len({c["recipe_sha256"] for c in candidates}) == 2
    assert [(c["n"], c["answers_n"]) for c in candidates] == [(20, 10)] * 2
    assert record["chosen"] == max(candidates, key=lambda c: c["value_pct"])["rate"]
    assert record["parts"] == ["language", "projector", "vision"]
    assert "validation" in record["criterion"]


def test_candidates_are_compared_by_ranked_pairs_on_validation(trained: Path) -> None:
    ranked, answers = score_candidate(trained / "3-sft", "sft", pairs=20, questions=10)
    assert (ranked.metric, ranked.split, ranked.n) == ("ranked_right", "validation", 20)
    assert (answers.metric, answers.split, answers.n) == ("exact_match", "validation", 10)


def test_the_first_of_equal_candidates_is_chosen() -> None:
    assert best_learning_rate({1e-5: 50.0, 1e-4: 60.0, 1e-3: 60.0}) == 1e-4


def test_a_search_needs_two_candidates(recipes: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="at least two learning rates"):
        search_learning_rate(str(recipes / "3-sft.yaml"), [1e-5], tmp_path, tmp_path / "search.json")
