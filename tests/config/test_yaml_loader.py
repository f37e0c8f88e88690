"""One loader of YAML: duplicated keys, depth and encodings are one error message with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from pivot_hub.config.recipe import load_recipe
from pivot_hub.config.yaml_loader import parse_yaml, read_yaml
from pivot_hub.data.boxes_and_masks import read_annotated_images
from pivot_hub.errors import DataError, RecipeError
from pivot_hub.publish.card_inputs import read_prose
from pivot_hub.study.design import load_study


def read(path: Path) -> dict[str, object]:
    return read_yaml(path, "a mapping", RecipeError)[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"a.yaml:3: not YAML: the key `a` is given again, first in line 1; keep one"),
        ("x:\n  b: 1\n  c: {d: 1,\n   d: 1}\n", r"a.yaml:4: .*`d` is given again, first in line 3"),
        ("x: [{b: 1, 'b': 2}]\n", r"a.yaml:1: .*`b` is given again"),
        ("a: " + "[" * 100_000, r"a.yaml: .*nested too deeply"),
        ("a: " + "{a: " * 5_000, r"a.yaml: .*nested too deeply"),
        ("a: 2026-13-40\n", r"a.yaml: .*month must be in"),
        ("a: " + "9" * 5_000, r"a.yaml: .*4300"),
        ("a: 1\nb: caf\xe9\n".encode("latin-1"), r"a.yaml:2: not UTF-8 \(.+\); save the file as UTF-8"),
        ("a: \x01\n", r"a.yaml:1: not YAML \("),
        ("a: &b [*c]\n", r"a.yaml:1: .*undefined alias"),
    ],
    ids=["twice", "below", "in-list", "lists", "mappings", "date", "number", "latin-1", "control", "alias"],
)
def test_what_cannot_be_read_is_one_error(tmp_path: Path, content: str | bytes, message: str) -> None:
    (tmp_path / "a.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError, match=message) as caught:
        read(tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks_are_read(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.yaml").write_bytes("é: ü\n".encode(encoding))
    assert read(tmp_path / "a.yaml") == {"é": "ü"}


def test_aliases_and_merges_are_no_duplicates(tmp_path: Path) -> None:
    text = "base: &base {a: 1, b: 2}\nmore: {<<: *base, a: 3}\nsame: {<<: *base}\nloop: &loop [*loop]\n"
    value, _ = parse_yaml(text, "a", RecipeError)
    assert value["more"] == {"a": 3, "b": 2}
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    (tmp_path / "a.yaml").write_text(bomb)
    assert len(read(tmp_path / "a.yaml")) == 60  # 2 ** 60 items, each node of which is visited once


def test_recipes_studies_prose_overrides_and_class_names_share_the_loader(own_recipes: Path, tmp_path: Path) -> None:
    """N14."""
    recipe = own_recipes / "3-dpo.yaml"
    with pytest.raises(RecipeError, match=r"override args={beta: 1, beta: 2}:1: .*`beta` is given again"):
        load_recipe(recipe, ["args={beta: 1, beta: 2}"])
    recipe.write_text(recipe.read_text() + "seed: 1\nseed: 2\n")
    last = recipe.read_text().count("\n")
    with pytest.raises(RecipeError, match=rf"3-dpo.yaml:{last}: .*`seed` is given again, first in line {last - 1}"):
        load_recipe(recipe)
    twice = tmp_path / "twice.yaml"
    twice.write_text("title: a\ntitle: b\n")
    for reader in (load_study, read_prose):
        with pytest.raises(Exception, match=r"twice.yaml:2: .*`title` is given again"):
            reader(twice)
    (tmp_path / "labels").mkdir()
    (tmp_path / "data.yaml").write_text("names: {0: a, 0: b}\n")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"data.yaml:1: .*`0` is given again"):
        read_annotated_images(tmp_path)


def test_a_value_is_quoted_shortened(own_recipes: Path) -> None:
    recipe = own_recipes / "3-dpo.yaml"
    recipe.write_text(recipe.read_text() + "seed: " + "iVBORw0KGgo" * 1000)
    with pytest.raises(RecipeError, match=r"`seed` is 'iVBOR.*\.\.\.") as caught:
        load_recipe(recipe)
    assert len(str(caught.value)) < 600
