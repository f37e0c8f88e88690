"""Recipes: one YAML file says what a stage trains, on what, how fast; every mistake in it has a line.

A recipe is checked in full before a weight or an image is loaded: unknown keys raise with the nearest valid key,
arguments are checked against the trainer config that its stage registered, and parents are followed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from pivot_hub.config.data_section import DataSpec, OnBadRow, ShapesData
from pivot_hub.config.stages import argument_types, stage_names, stage_of
from pivot_hub.config.yaml_loader import Strict, Where, check_keys, nearest, read_yaml
from pivot_hub.errors import RecipeError
from pivot_hub.files import shipped_folder

RECIPES = shipped_folder("recipes")
PARTS = ("vision", "projector", "language")
# Set by the runner from other keys of the recipe; a second way to say them would be a contradiction.
RESERVED_ARGS = {
    "output_dir": "--output",
    "learning_rate": "the recipe's learning_rate, one rate per part",
    "seed": "the recipe's seed",
    "data_seed": "the recipe's seed",
    "accelerator_config": "the machine file, as in recipes/accelerate",
    "remove_unused_columns": "nothing: rows are made in the trainer's columns",
    "resume_from_checkpoint": "nothing: a stopped run resumes by itself",
    "push_to_hub": "`pivot push`, after the run",
}


class ModelSpec(Strict):
    """The MLLM's parts: a folder beside the recipe, or a Hub repository."""

    vision: str
    language: str
    feature_layer: int = -2
    vision_revision: str | None = None
    language_revision: str | None = None


def _positive(rate: float) -> float:
    if not rate > 0:  # nor is what is no number
        raise PydanticCustomError("rate", "a rate is positive; leave it out to freeze")
    return rate


Rate = Annotated[float, AfterValidator(_positive)]


class Rates(Strict):
    """Peak learning rate of each part; a part left out is frozen."""

    vision: Rate | None = None
    projector: Rate | None = None
    language: Rate | None = None

    def trained(self) -> dict[str, float]:
        return {part: rate for part in PARTS if (rate := getattr(self, part)) is not None}


def _registered(stage: str) -> str:
    if stage not in stage_names():
        names = ", ".join(stage_names())
        raise PydanticCustomError(
            "stage", f"there is no such stage{nearest(stage, stage_names())}; give one of {names}"
        )
    return stage


class LoraSpec(Strict):
    """Low-rank adapters on the language head, in place of its own weights; needs peft."""

    rank: int = Field(64, ge=1)
    alpha: int = Field(128, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)


class Recipe(Strict):
    """A stage of training, in full.

    Args:
        stage: vision and language make base parts; align, instruct, sft and dpo train an MLLM.
        parent: the recipe whose checkpoint this starts from, beside this file.
        model: the parts an align stage joins; later stages inherit it from their parent.
        architecture: sizes of a base part, in the names of its transformers config.
        tokenizer_size: tokens of the byte-level BPE vocabulary a language stage trains.
        learning_rate: peak rate per part.
        data: where the rows come from; several sources are concatenated.
        args: arguments of the stage's trainer config, in their own names: TRL's SFTConfig, or PivotDPOConfig, which is
            TRL's DPOConfig with four switches.
        global_batch: rows of an optimizer step over all processes; args.gradient_accumulation_steps follows from it.
        lora: train adapters on the language head at its rate, and merge them in the end.
        labels: what the loss is on in align, instruct and sft. Answers by default; llava_next as the paper's authors
            train: answers with their turn's header, and every turn marker and newline of the conversation.
        on_bad_row: stop at the first row that cannot be used, or skip and count it.
        seed: of initialisation, shuffling and dropout.
    """

    stage: Annotated[str, AfterValidator(_registered)]
    parent: str | None = None
    model: ModelSpec | None = None
    architecture: dict[str, Any] | None = None
    tokenizer_size: int | None = Field(None, ge=300)
    learning_rate: Rates
    data: list[DataSpec] = Field(min_length=1)
    args: dict[str, Any] = Field({})
    global_batch: int | None = Field(None, ge=1)
    lora: LoraSpec | None = None
    labels: Literal["llava_next"] | None = None
    on_bad_row: OnBadRow = OnBadRow.STOP
    seed: int = 0

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default written out, as plain values."""
        return self.model_dump(mode="json", exclude_none=True)

    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()


class LoadedRecipe(BaseModel):
    """A checked recipe with the file it came from and its parent, oldest ancestor last."""

    model_config = ConfigDict(frozen=True)

    recipe: Recipe
    path: Path
    parent: LoadedRecipe | None = None

    @property
    def name(self) -> str:
        """Folder and file stem, as in `shapes/3-dpo`: where the stage's checkpoint goes."""
        return f"{self.path.parent.name}/{self.path.stem}"

    def lineage(self) -> list[LoadedRecipe]:
        """This recipe and its ancestors, from the first stage to this one."""
        return [*(self.parent.lineage() if self.parent else []), self]

    def locate(self, reference: str) -> str:
        """Resolve a path written in the recipe against its folder; anything else is a Hub name."""
        beside = (self.path.parent / reference).resolve()
        return str(beside) if beside.exists() else reference


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read, override and check a recipe and its ancestors.

    Args:
        path: the YAML file; a name such as `shapes/3-dpo` finds the shipped recipe.
        overrides: `dotted.key=value`, the value in YAML, as in `args.beta=0.2` or `data.0.rows=64`.

    Raises:
        RecipeError: naming file, line, key and the nearest valid key.
    """
    file = _find(Path(path))
    return _load(file, overrides, children=())


def recipe_files(root: Path = RECIPES) -> list[Path]:
    """Every stage recipe below a folder: files named `<n>-<stage>.yaml`."""
    return sorted(p for p in root.rglob("*.yaml") if p.stem[0].isdigit())


def write_recipe(loaded: LoadedRecipe, path: Path) -> None:
    """Write the resolved recipe: what was run, with no default left unsaid."""
    lines = ["# Resolved by pivot_hub: every default written out.", f"# sha256 {loaded.recipe.sha256()}"]
    path.write_text("\n".join(lines) + "\n" + yaml.safe_dump(loaded.recipe.resolved(), sort_keys=False))


def _find(path: Path) -> Path:
    for candidate in (path, RECIPES / path, RECIPES / f"{path}.yaml"):
        if candidate.is_file():
            return candidate.resolve()
    known = [str(p.relative_to(RECIPES).with_suffix("")) for p in recipe_files()]
    folders = ", ".join(sorted({name.split("/")[0] for name in known}))
    raise RecipeError(f"{path}: no such recipe{nearest(str(path), known)}; folders of shipped ones: {folders}.")


def _load(path: Path, overrides: Sequence[str], children: tuple[Path, ...]) -> LoadedRecipe:
    if path in children:
        raise RecipeError(f"{path}: the recipe is its own ancestor; name another parent.")
    raw, where = read_yaml(path, "a recipe is a mapping of keys; start with `stage:`", RecipeError)
    # Parts are named once, by the oldest ancestor: an override of them is for it.
    inherited = [o for o in overrides if o.startswith("model.") and "model" not in raw and "parent" in raw]
    for override in overrides:
        if override not in inherited:
            where.lines[_override(raw, override)] = f"override {override}"
    recipe = check_keys(Recipe, raw, where, RecipeError)
    parent = _parent(recipe, path, where, children, inherited)
    if recipe.model is None and parent is not None:
        recipe = recipe.model_copy(update={"model": parent.recipe.model})
    _check_stage(recipe, where, parent)
    recipe = recipe.model_copy(update={"args": _check_args(recipe, where)})
    return LoadedRecipe(recipe=recipe, path=path, parent=parent)


def _parent(
    recipe: Recipe, path: Path, where: Where, children: tuple[Path, ...], overrides: Sequence[str]
) -> LoadedRecipe | None:
    if recipe.parent is None:
        return None
    file = path.parent / recipe.parent
    if not file.is_file():
        near = nearest(recipe.parent, [p.name for p in path.parent.glob("*.yaml")])
        raise RecipeError(f"{where('parent')}: parent {recipe.parent!r} is not beside this recipe{near}.")
    return _load(file.resolve(), overrides, (*children, path))


def _check_stage(recipe: Recipe, where: Where, parent: LoadedRecipe | None) -> None:
    """What a stage needs beyond the types of its keys."""
    stage, spec = recipe.stage, stage_of(recipe.stage)
    base_part = spec.base_part
    if base_part and recipe.architecture is None:
        raise RecipeError(f"{where()}: stage {stage} makes a base part: give its sizes under `architecture`.")
    if spec.needs_parent and parent is None:
        raise RecipeError(f"{where()}: stage {stage} starts from a checkpoint: name its recipe as `parent`.")
    if not base_part and recipe.model is None:
        raise RecipeError(f"{where()}: stage {stage} needs `model` with `vision` and `language`, or a parent.")
    if not base_part and recipe.architecture is not None:
        raise RecipeError(f"{where('architecture')}: only stages vision and language take `architecture`.")
    if parent is not None and recipe.model != parent.recipe.model:
        raise RecipeError(f"{where('model')}: `model` differs from the parent's: remove it, it is inherited.")
    if not recipe.learning_rate.trained():
        raise RecipeError(f"{where('learning_rate')}: every part is frozen: give at least one part a rate.")
    if recipe.lora is not None and (base_part or recipe.learning_rate.language is None):
        raise RecipeError(f"{where('lora')}: `lora` trains the language head: give `learning_rate.language`.")
    if recipe.labels is not None and not spec.takes_labels:
        raise RecipeError(f"{where('labels')}: `labels` is for align, instruct and sft: a loss on answers has none.")
    for i, source in enumerate(recipe.data):
        if source.format not in spec.formats:
            fit = " or ".join(spec.formats)
            raise RecipeError(f"{where('data', i)}: stage {stage} reads {fit}, not {source.format}.")
        if isinstance(source, ShapesData) and spec.content and source.content != spec.content:
            raise RecipeError(f"{where('data', i, 'content')}: stage {stage} reads content: {spec.content}.")
        if isinstance(source, ShapesData) and source.slip and source.content != "pairs":
            raise RecipeError(f"{where('data', i, 'slip')}: `slip` is for content: pairs.")


def _check_args(recipe: Recipe, where: Where) -> dict[str, Any]:
    """Check trainer arguments by name and type against the config class that will receive them."""
    known = argument_types(stage_of(recipe.stage))
    checked = {}
    if recipe.global_batch is not None and "gradient_accumulation_steps" in recipe.args:
        place = where("args", "gradient_accumulation_steps")
        raise RecipeError(f"{place}: `gradient_accumulation_steps` follows from `global_batch`; give one of the two.")
    for key, value in recipe.args.items():
        if key in RESERVED_ARGS:
            raise RecipeError(f"{where('args', key)}: `{key}` is not set here; use {RESERVED_ARGS[key]}.")
        if key not in known:
            raise RecipeError(f"{where('args', key)}: unknown argument `{key}`{nearest(key, known)}.")
        try:
            checked[key] = TypeAdapter(known[key]).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise RecipeError(f"{where('args', key)}: `{key}` is {value!r}: {reason}.") from error
        number = checked[key]
        positive = key.startswith(("per_device", "num_train_epochs", "gradient_acc", "save_steps", "logging_"))
        if isinstance(number, int | float) and ((number < 0 and key != "max_steps") or (positive and number == 0)):
            raise RecipeError(f"{where('args', key)}: `{key}` is {value!r}: it must be positive.")
    return checked


def _override(raw: dict[str, Any], override: str) -> tuple[str | int, ...]:
    """Apply `dotted.key=value` in place and return the key as a path."""
    dotted, sign, text = override.partition("=")
    if not sign or not dotted:
        raise RecipeError(f"override {override!r}: write dotted.key=value, as in args.beta=0.2.")
    keys: list[str | int] = [int(k) if k.isdigit() else k for k in dotted.split(".")]
    place: Any = raw
    for key in keys[:-1]:
        if isinstance(place, list):
            if not isinstance(key, int) or key >= len(place):
                raise RecipeError(f"override {override}: {key!r} is not an index of a list of {len(place)}.")
            place = place[key]
        elif isinstance(place, dict):
            place = place.setdefault(key, {})
        else:
            raise RecipeError(f"override {override}: `{dotted}` goes deeper than the recipe does.")
    try:
        place[keys[-1]] = yaml.safe_load(text)
    except (IndexError, TypeError, yaml.YAMLError) as error:
        raise RecipeError(f"override {override}: cannot be set there: {error}.") from error
    return tuple(keys)
