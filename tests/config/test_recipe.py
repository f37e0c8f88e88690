"""Recipes: every mistake is one error message with file, line and the nearest valid key."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pivot_hub.config.recipe import (
    RECIPES,
    MllmSpec,
    Recipe,
    is_recorded_recipe,
    load_recipe,
    recipe_files,
    write_recipe,
)
from pivot_hub.errors import RecipeError

SHIPPED = recipe_files()


def test_shipped_recipes_are_found() -> None:
    names = [str(p.relative_to(RECIPES)) for p in SHIPPED]
    # The synthetic Shapes dataset with one to five shapes, with one or two, and at 224 px; eight encoders in five
    # stages, eight MLLMs in two, two of grpo and two of losses of two images: tests/test_full_scale.py.
    assert len(names) == 10 + 12 + 10 + 8 * 5 + 8 * 2 + 2 + 2
    assert [name for name in names if name.startswith("shapes/")] == [
        "shapes/0-language.yaml",
        "shapes/0-vision.yaml",
        "shapes/1-align.yaml",
        "shapes/2-instruct.yaml",
        "shapes/3-dpo.yaml",
        "shapes/3-grpo.yaml",
        "shapes/3-image-dpo.yaml",
        "shapes/3-rloo.yaml",
        "shapes/3-sft.yaml",
        "shapes/4-frozen.yaml",
    ]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipes_load_and_open_with_their_metadata(path: Path) -> None:
    loaded = load_recipe(path)
    assert loaded.lineage()[-1] is loaded
    head = path.read_text().split("stage:")[0].lower()
    for pattern in (r"pivot(_hub)? train", "hardware", "hours", "expected"):
        assert re.search(pattern, head), f"{path.name} does not say its {pattern} in its first lines"


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


def test_sft_and_dpo_differ_only_in_stage_rates_and_loss() -> None:
    pairs = [(p, p.with_name(p.name.replace("-sft", "-dpo"))) for p in SHIPPED if p.stem.endswith("-sft")]
    assert pairs
    for sft, dpo in pairs:
        a, b = _flat(load_recipe(sft).recipe.resolved()), _flat(load_recipe(dpo).recipe.resolved())
        differing = {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)}
        # On which tokens the loss is: in dpo, those that both answers share cancel, and its mean is over pairs.
        loss = {"args.beta", "args.loss_type", "args.loss_weights", "labels", "loss_over"}
        assert differing - loss <= {"stage", *(f"learning_rate.{p}" for p in ("vision", "projector", "language"))}


def _edit(folder: Path, name: str, old: str, new: str) -> Path:
    path = folder / f"{name}.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


MISTAKES = [
    ("3-dpo", "learning_rate:", "learnin_rate:", ["3-dpo.yaml:3", "did you mean `learning_rate`"]),
    ("3-dpo", "vision: 1.0e-3", "visoin: 1.0e-3", ["3-dpo.yaml:3", "did you mean `vision`"]),
    ("3-dpo", "vision: 1.0e-3", "vision: -1.0e-3", ["3-dpo.yaml:3", "leave it out to freeze"]),
    ("3-dpo", "vision: 1.0e-3", "vision: fast", ["3-dpo.yaml:3", "'fast'"]),
    ("3-dpo", "logging_steps: 1", "loging_steps: 1", ["3-dpo.yaml:11", "did you mean `logging_steps`"]),
    ("3-dpo", "logging_steps: 1", "logging_steps: often", ["3-dpo.yaml:11", "'often'"]),
    ("3-dpo", "logging_steps: 1", "learning_rate: 1.0e-4", ["3-dpo.yaml:11", "one learning rate per part"]),
    ("3-sft", "logging_steps: 1", "torch_compile: true", ["3-sft.yaml:11", "torch compiles again and again"]),
    ("3-dpo", "num_train_epochs: 1", "num_train_epochs: -1", ["3-dpo.yaml:7", "must be positive"]),
    ("3-dpo", "parent: 2-instruct.yaml", "parent: 2-instuct.yaml", ["3-dpo.yaml:2", "did you mean `2-instruct.yaml`"]),
    ("3-dpo", "parent: 2-instruct.yaml\n", "", ["3-dpo.yaml:1", "`parent`"]),
    ("3-dpo", "parent: 2-instruct.yaml", "parent: 3-dpo.yaml", ["its own ancestor"]),
    ("3-dpo", "rows: 8", "rows: 0", ["3-dpo.yaml:4", "data.0.rows"]),
    ("3-dpo", "rows: 8", "rowes: 8", ["3-dpo.yaml:4", "unknown key `data.0.rowes` (did you mean `rows`?)."]),
    ("3-dpo", "format: shapes", "format: shape", ["`data.0.format` is 'shape' (did you mean `shapes`?); give one of"]),
    ("3-dpo", "content: pairs", "content: captions", ["3-dpo.yaml:4", "content: pairs"]),
    ("3-dpo", "stage: dpo", "stage: dpoo", ["3-dpo.yaml:1", "'dpoo'", "did you mean `dpo`"]),
    ("3-dpo", "stage: dpo", "stage: dpo\n  x: [", ["3-dpo.yaml:2", "not YAML"]),
    ("1-align", "{projector: 1.0e-2}", "{}", ["1-align.yaml:3", "every part is frozen"]),
    ("1-align", "language: base/language", "langauge: base/language", ["1-align.yaml:2", "model.langauge", "language"]),
    ("1-align", "vision: base/vision, ", "", ["1-align.yaml:2: `model.vision` is missing"]),
    ("1-align", "{vision: base/vision, language: base/language, feature_layer: -2}", "qwen", ["`model` is 'qwen'"]),
    ("4-mllm", "mllm: base/mllm", "mlm: base/mllm", ["4-mllm.yaml:2: unknown key `model.mlm` (did you mean `mllm`?)."]),
    ("4-mllm", "revision: main", "revison: main", ["4-mllm.yaml:2", "`model.revison` (did you mean `revision`?)."]),
    ("4-mllm", "revision: main", "vision: base/vision", ["4-mllm.yaml:2", "parts of its own; leave out `vision`."]),
    ("4-mllm", "stage: sft", "stage: align", ["4-mllm.yaml:2: stage align does not start from an MLLM: give `model`"]),
    ("4-mllm", "model: {mllm: base/mllm, revision: main}\n", "", ["4-mllm.yaml:1", "`parent`", "`model.mllm`"]),
]
MLLM_RECIPE = (
    "stage: sft\nmodel: {mllm: base/mllm, revision: main}\nlearning_rate: {vision: 1.0e-3}\n"
    "data: [{format: shapes, content: pairs, rows: 8}]\n"
)


@pytest.mark.parametrize(("name", "old", "new", "phrases"), MISTAKES)
def test_mistakes_name_file_line_and_remedy(
    own_recipes: Path, name: str, old: str, new: str, phrases: list[str]
) -> None:
    (own_recipes / "4-mllm.yaml").write_text(MLLM_RECIPE)
    path = _edit(own_recipes, name, old, new)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert "\n" not in message
    for phrase in phrases:
        assert phrase in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("args.betta=0.2", "did you mean `beta`"),
        ("args.beta", "dotted.key=value"),
        ("data.3.rows=4", "not an index"),
        ("learning_rate.vision=-1", "leave it out to freeze"),
    ],
)
def test_bad_overrides_are_named(recipes: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match="override") as caught:
        load_recipe(recipes / "3-dpo.yaml", [override])
    assert message in str(caught.value)


def test_overrides_reach_values_of_any_depth(recipes: Path) -> None:
    changed = ["args.beta=0.2", "data.0.rows=4", "learning_rate.vision=null", "seed=3"]
    recipe = load_recipe(recipes / "3-dpo.yaml", changed).recipe
    assert recipe.args["beta"] == 0.2
    assert recipe.data[0].rows == 4  # type: ignore[union-attr]
    assert recipe.learning_rate.trained() == {"projector": 1e-3, "language": 1e-3}
    assert recipe.seed == 3
    assert recipe.sha256() != load_recipe(recipes / "3-dpo.yaml").recipe.sha256()


def test_exponents_without_a_point_are_numbers(own_recipes: Path) -> None:
    recipe = load_recipe(_edit(own_recipes, "3-dpo", "vision: 1.0e-3", "vision: 1e-3")).recipe
    assert recipe.learning_rate.vision == 1e-3


def test_model_is_inherited_and_resolved_copy_reads_back(recipes: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipes / "3-dpo.yaml")
    assert [r.recipe.stage for r in loaded.lineage()] == ["align", "instruct", "dpo"]
    assert loaded.recipe.model is not None
    write_recipe(loaded, tmp_path / "recipe.yaml")
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == loaded.recipe.resolved()


def test_a_recipe_starts_from_the_mllm_that_it_names_and_later_stages_from_their_parent(
    own_recipes: Path, tmp_path: Path
) -> None:
    (own_recipes / "4-mllm.yaml").write_text(MLLM_RECIPE)
    (own_recipes / "5-mllm.yaml").write_text(
        MLLM_RECIPE.replace("sft", "dpo").replace("model: {mllm: base/mllm, revision: main}", "parent: 4-mllm.yaml")
    )
    first, later = (load_recipe(own_recipes / f"{name}.yaml") for name in ("4-mllm", "5-mllm"))
    assert later.recipe.model == first.recipe.model == MllmSpec(mllm="base/mllm", revision="main")
    assert first.start(None) == ("base/mllm", "main")  # nothing is there, so it is a name on the Hub
    (own_recipes / "base" / "mllm").mkdir()
    assert first.start(None) == (str((own_recipes / "base" / "mllm").resolve()), "main")
    assert later.start(tmp_path) == (str(tmp_path), None)
    assert load_recipe(own_recipes / "1-align.yaml").start(None) is None
    write_recipe(first, tmp_path / "recipe.yaml")
    assert is_recorded_recipe(tmp_path / "recipe.yaml", first.recipe)
    other = load_recipe(own_recipes / "5-mllm.yaml", ["model.revision=v2"])
    assert other.parent is not None
    assert (other.recipe.model, other.parent.start(None)[1:]) == (other.parent.recipe.model, ("v2",))  # type: ignore[index]


def test_what_needs_parts_says_that_a_recipe_starts_from_an_mllm(own_recipes: Path) -> None:
    (own_recipes / "4-mllm.yaml").write_text(MLLM_RECIPE)
    with pytest.raises(RecipeError, match=r"the test needs a recipe whose `model` joins .* starts from base/mllm\."):
        load_recipe(own_recipes / "4-mllm.yaml").parts("the test")


class RecipeWithOneMoreKey(Recipe):
    """A later version of the recipe, with a key that has a default."""

    grad_cam_weight: float = 0.0


def test_a_key_added_with_a_default_leaves_hashes_as_they_are(recipes: Path) -> None:
    recipe = load_recipe(recipes / "3-dpo.yaml").recipe
    later = RecipeWithOneMoreKey.model_validate(recipe.resolved())
    assert later.sha256() == recipe.sha256()
    assert later.model_copy(update={"grad_cam_weight": 0.5}).sha256() != recipe.sha256()


def test_a_run_is_recognised_by_its_recorded_recipe(recipes: Path, tmp_path: Path) -> None:
    """A default that has changed since is another recipe; a hash of the first version is still known."""
    loaded = load_recipe(recipes / "3-dpo.yaml")
    file = tmp_path / "recipe.yaml"
    write_recipe(loaded, file)
    assert is_recorded_recipe(file, loaded.recipe)
    file.write_text(file.read_text().replace("on_bad_row: stop\n", ""))  # as a version without this key wrote it
    assert is_recorded_recipe(file, loaded.recipe)
    file.write_text(file.read_text().replace("seed: 0", "seed: 1"))
    assert not is_recorded_recipe(file, loaded.recipe)
    every_value = json.dumps(loaded.recipe.resolved(), sort_keys=True).encode()
    assert loaded.recipe.has_sha256(hashlib.sha256(every_value).hexdigest())
    assert loaded.recipe.has_sha256(loaded.recipe.sha256())
    assert not loaded.recipe.has_sha256("0" * 64)


def test_unknown_name_lists_the_folders_of_shipped_recipes() -> None:
    with pytest.raises(RecipeError, match=r"did you mean `shapes/3-dpo`.*folders of shipped recipes: clip-large"):
        load_recipe("shapes/3-dppo")


def test_a_mistake_is_found_before_any_weight_is_read(own_recipes: Path, tmp_path: Path) -> None:
    """The parts do not even exist: the message is about the recipe's own mistake."""
    path = _edit(own_recipes, "1-align", "base/vision", "base/nothing")
    command = [sys.executable, "-m", "pivot_hub", "train", str(path), "args.beta=1", "--runs", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown argument `beta`" in done.stderr
    assert not (tmp_path / "runs").exists()
