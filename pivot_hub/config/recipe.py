"""Recipes: one YAML file names the parts, the data and the learning rates of a stage of training.

A recipe is checked in full before a weight or an image is loaded: unknown keys raise with the nearest valid key,
arguments are checked against the trainer config that its stage registered, and parents are followed. Each error names
the file and the line.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pivot_hub.config.data_section import DataSpec, FileData, OnBadRow, ShapesData
from pivot_hub.config.stages import Stage, argument_types, stage_names, stage_of
from pivot_hub.config.yaml_loader import Strict, Where, check_keys, nearest, parse_yaml, read_yaml
from pivot_hub.errors import RecipeError
from pivot_hub.files import shipped_folder

RECIPES = shipped_folder("recipes")
PARTS = ("vision", "projector", "language")
JoinedFamily = Literal["internvl", "qwen2_5_vl"]  # families besides LLaVA that an align stage builds from two parts
NO_COMPILE = "nothing: batches differ in length and layout, so torch compiles again and again"
# The runner sets these arguments from other keys of the recipe; two values of one argument could contradict.
RESERVED_ARGS = {
    "output_dir": "--output",
    "learning_rate": "the recipe's learning_rate, one learning rate per part",
    "seed": "the recipe's seed",
    "data_seed": "the recipe's seed",
    "accelerator_config": "an Accelerate config, as in recipes/accelerate",
    "remove_unused_columns": "nothing: rows have the trainer's columns already",
    "resume_from_checkpoint": "nothing: a stopped run resumes by itself",
    "push_to_hub": "`pivot push`, after the run",
    "save_only_model": "nothing: a run could not resume without its optimizer",
    "ignore_data_skip": "nothing: a resumed run would see other rows than one that was never stopped",
    "reward_weights": "the recipe's rewards, each with its weight",
    "sync_ref_model": "nothing: a checkpoint does not hold the reference, so a resumed run would have another one",
    "enable_jit_checkpoint": "nothing: a signal saves a checkpoint by itself",
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), NO_COMPILE),
}


class ModelSpec(Strict):
    """The parts that an align stage joins to an MLLM: each a folder beside the recipe, or a Hub repository.

    Args:
        vision: Folder or Hub name of the encoder, of any backbone.
        language: Folder or Hub name of the language model.
        feature_layer: Hidden state of the encoder that LLaVA's projector reads; those of other families read the last.
        family: Model type of the MLLM: LLaVA's by default; `internvl` or `qwen2_5_vl`, which take an encoder of their
            own architecture and join 2x2 patches to a token.
        vision_revision: Commit or branch of a Hub encoder.
        language_revision: Commit or branch of a Hub language model.
    """

    vision: str
    language: str
    feature_layer: int = -2
    family: JoinedFamily | None = None
    vision_revision: str | None = None
    language_revision: str | None = None

    @model_validator(mode="after")
    def _check_feature_layer(self) -> ModelSpec:
        if self.family is not None and self.feature_layer != -2:
            raise ValueError(f"the projector of {self.family} reads the last hidden state; remove `feature_layer`")
        return self


class MllmSpec(Strict):
    """An MLLM that training starts from: a folder beside the recipe, or a Hub repository.

    Args:
        mllm: Folder or Hub name of the MLLM.
        revision: Commit or branch of a Hub MLLM.
    """

    mllm: str
    revision: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_parts(cls, values: Any) -> Any:
        if isinstance(values, dict) and (parts := sorted(ModelSpec.model_fields.keys() & values.keys())):
            names = " and ".join(f"`{part}`" for part in parts)
            raise PydanticCustomError("model", f"`mllm` is a whole MLLM with parts of its own; leave out {names}")
        return values


def _model_kind(values: Any) -> str:
    """Return the name of the class that a recipe's `model` is of; a mistyped `mllm` counts as `mllm`."""
    if isinstance(values, dict):
        return "MllmSpec" if any(nearest(str(key), ["mllm"]) for key in values) else "ModelSpec"
    return "MllmSpec" if isinstance(values, MllmSpec) else "ModelSpec"


AnyModel = Annotated[
    Annotated[ModelSpec, Tag("ModelSpec")] | Annotated[MllmSpec, Tag("MllmSpec")], Discriminator(_model_kind)
]


def _positive(learning_rate: float) -> float:
    if not 0 < learning_rate < math.inf:  # NaN is refused too
        raise PydanticCustomError(
            "learning_rate", "a learning rate is a positive, finite number; leave it out to freeze the part"
        )
    return learning_rate


LearningRate = Annotated[float, AfterValidator(_positive)]


class LearningRates(Strict):
    """Peak learning rate of each part; a part without one is frozen.

    Args:
        vision: Peak learning rate of the encoder.
        projector: Peak learning rate of the projector.
        language: Peak learning rate of the language model.
    """

    vision: LearningRate | None = None
    projector: LearningRate | None = None
    language: LearningRate | None = None

    def trained(self) -> dict[str, float]:
        """Return the learning rate of each part that trains."""
        return {part: value for part in PARTS if (value := getattr(self, part)) is not None}


def _registered(stage: str) -> str:
    if stage not in stage_names():
        names = ", ".join(stage_names())
        raise PydanticCustomError(
            "stage", f"there is no such stage{nearest(stage, stage_names())}; give one of {names}"
        )
    return stage


def _without_default(loss_over: Any) -> Any:
    """Return None for the default, so that naming it is the same recipe as leaving it out."""
    return None if loss_over == "tokens" else loss_over


class LoraSpec(Strict):
    """Low-rank adapters that train in place of the language model's own weights; needs peft.

    Args:
        rank: Rank of the adapters.
        alpha: Scale of the adapters, which is divided by the rank.
        dropout: Dropout before the adapters.
    """

    rank: int = Field(64, ge=1)
    alpha: int = Field(128, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)


class RewardSpec(Strict):
    """A reward of a stage of reinforcement learning.

    Args:
        name: One of `pivot_hub.training.rewards`, or a function of your own as `module:function`.
        weight: Its weight in the sum of all rewards.
        args: Its own settings, as keyword arguments.
    """

    name: str
    weight: float = Field(1.0, allow_inf_nan=False)
    args: dict[str, Any] = Field({})


class Recipe(Strict):
    """A stage of training.

    Args:
        stage: Name of a registered stage: vision and language make base parts; align, instruct, sft, dpo, grpo and
            rloo train an MLLM.
        parent: File name of the recipe whose checkpoint this stage starts from; it lies beside this recipe.
        model: Parts that an align stage joins, or the MLLM that a later stage starts from where it has no
            parent. Later stages inherit it from their parent.
        architecture: Sizes of a base part, under the names of its transformers config.
        tokenizer_size: Number of tokens in the byte-level BPE vocabulary that a language stage trains.
        learning_rate: Peak learning rate of each part.
        data: Sources of the rows, which are concatenated.
        args: Arguments of the stage's trainer config, under their own names: TRL's SFTConfig, or PivotDPOConfig, which
            is TRL's DPOConfig with two more options of speed.
        global_batch: Rows of an optimizer step over all processes, from which args.gradient_accumulation_steps
            follows.
        lora: Adapters that train on the language model at its learning rate and are merged when the stage ends.
        labels: Tokens that the loss of align, instruct and sft is computed on: the answers by default. With
            llava_next, as the paper's authors train: answers with the header of their turn, and every turn marker and
            newline of the conversation.
        loss_over: What the loss of align, instruct and sft is a mean over: `tokens`, the labels of a whole step, as
            TRL's, or `rows`, the rows of a step, each with the mean of its labels.
        rewards: What a stage of reinforcement learning maximises: the weighted sum of these.
        weights: Data type of the weights that train: float32 by default, with autocast. With bfloat16 they take half
            the memory, and updates that are small against their weight are lost.
        on_bad_row: Whether a row that cannot be used raises an error, or is skipped and counted.
        seed: Seed of initialisation, shuffling and dropout.
    """

    stage: Annotated[str, AfterValidator(_registered)]
    parent: str | None = None
    model: AnyModel | None = None
    architecture: dict[str, Any] | None = None
    tokenizer_size: int | None = Field(None, ge=300)
    learning_rate: LearningRates
    data: list[DataSpec] = Field(min_length=1)
    args: dict[str, Any] = Field({})
    global_batch: int | None = Field(None, ge=1)
    lora: LoraSpec | None = None
    labels: Literal["llava_next"] | None = None
    loss_over: Annotated[Literal["rows"] | None, BeforeValidator(_without_default)] = None
    rewards: list[RewardSpec] | None = Field(None, min_length=1)
    weights: Literal["bfloat16"] | None = None
    on_bad_row: OnBadRow = OnBadRow.STOP
    seed: int = 0

    def resolved(self) -> dict[str, Any]:
        """Return the recipe as plain values, with every default written out."""
        return self.model_dump(mode="json", exclude_none=True)

    def sha256(self) -> str:
        """Hash the values that differ from their defaults, so that a new key with a default changes no hash."""
        return _sha256(self.model_dump(mode="json", exclude_defaults=True))

    def has_sha256(self, sha256: str) -> bool:
        """Return whether a recorded hash is this recipe's, under this rule or under that of the first version.

        The first version hashed every value, defaults included.
        """
        return sha256 in (self.sha256(), _sha256(self.resolved()))


def _sha256(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class LoadedRecipe(BaseModel):
    """A checked recipe with its file and its parent."""

    model_config = ConfigDict(frozen=True)

    recipe: Recipe
    path: Path
    parent: LoadedRecipe | None = None

    @property
    def name(self) -> str:
        """Folder and file stem, as in `shapes/3-dpo`; the stage's checkpoint goes to the folder of this name."""
        return f"{self.path.parent.name}/{self.path.stem}"

    def lineage(self) -> list[LoadedRecipe]:
        """Return this recipe and its ancestors, from the first stage to this one."""
        return [*(self.parent.lineage() if self.parent else []), self]

    def parts(self, user: str) -> ModelSpec:
        """Return the parts that the first stage of this recipe's lineage joins.

        Args:
            user: What needs the parts, for the error message.

        Raises:
            RecipeError: The recipe starts from an MLLM, or makes a base part.
        """
        if not isinstance(self.recipe.model, ModelSpec):
            start = "makes a base part" if self.recipe.model is None else f"starts from {self.recipe.model.mllm}"
            raise RecipeError(
                f"{self.path}: {user} needs a recipe whose `model` joins `vision` and `language`; this one {start}."
            )
        return self.recipe.model

    def start(self, parent: Path | None) -> tuple[str, str | None] | None:
        """Return folder or Hub name, and revision, of the MLLM whose weights this stage starts from.

        Args:
            parent: The parent's checkpoint; None for a stage without a parent.

        Returns:
            Name and revision; None for a stage that joins parts, or makes one.
        """
        if parent is not None:
            return str(parent), None
        if isinstance(self.recipe.model, MllmSpec):
            return self.locate(self.recipe.model.mllm), self.recipe.model.revision
        return None

    def locate(self, reference: str) -> str:
        """Resolve a path of the recipe against its folder; a path that does not exist is returned as a Hub name."""
        beside = (self.path.parent / reference).resolve()
        return str(beside) if beside.exists() else reference


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read, override and check a recipe and its ancestors.

    Args:
        path: The YAML file, or the name of a shipped recipe, such as `shapes/3-dpo`.
        overrides: Values in YAML under dotted keys, as in `args.beta=0.2` or `data.0.rows=64`.

    Raises:
        RecipeError: The recipe or an ancestor is wrong. The message names file, line, key and the nearest valid key.
    """
    file = _find(Path(path))
    return _load(file, overrides, children=())


def recipe_files(root: Path = RECIPES) -> list[Path]:
    """List the stage recipes below a folder: files named `<n>-<stage>.yaml`."""
    return sorted(p for p in root.rglob("*.yaml") if p.stem[0].isdigit())


def write_recipe(loaded: LoadedRecipe, path: Path) -> None:
    """Write the resolved recipe of a run, with every default written out."""
    lines = ["# Resolved by pivot_hub: every default written out.", f"# sha256 {loaded.recipe.sha256()}"]
    path.write_text("\n".join(lines) + "\n" + yaml.safe_dump(loaded.recipe.resolved(), sort_keys=False))


def is_recorded_recipe(file: Path, recipe: Recipe) -> bool:
    """Return whether `write_recipe` wrote this recipe to a file.

    Values are compared, not hashes: a default that has changed since is another recipe, and a key that has been added
    since counts with its default.
    """
    try:
        return Recipe.model_validate(parse_yaml(file.read_bytes(), str(file), RecipeError)[0]) == recipe
    except (RecipeError, ValidationError):  # written by hand, or by a version with other keys
        return False


def _find(path: Path) -> Path:
    for candidate in (path, RECIPES / path, RECIPES / f"{path}.yaml"):
        if candidate.is_file():
            return candidate.resolve()
    known = [str(p.relative_to(RECIPES).with_suffix("")) for p in recipe_files()]
    folders = ", ".join(sorted({name.split("/")[0] for name in known}))
    near = nearest(str(path), known)
    raise RecipeError(f"{path}: there is no such recipe{near}; folders of shipped recipes: {folders}.")


def _load(path: Path, overrides: Sequence[str], children: tuple[Path, ...]) -> LoadedRecipe:
    if path in children:
        raise RecipeError(f"{path}: the recipe is its own ancestor; name another parent.")
    raw, where = read_yaml(path, "a recipe is a mapping of keys; start with `stage:`", RecipeError)
    # The oldest ancestor alone names the parts, so an override of them is passed on to it.
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
    """Check the keys that a stage needs or excludes, beyond their types."""
    stage, spec = recipe.stage, stage_of(recipe.stage)
    base_part = spec.base_part
    if base_part and recipe.architecture is None:
        raise RecipeError(f"{where()}: stage {stage} makes a base part: give its sizes under `architecture`.")
    starts_from_mllm = parent is None and isinstance(recipe.model, MllmSpec)
    if spec.needs_parent and parent is None and not starts_from_mllm:
        raise RecipeError(
            f"{where()}: stage {stage} starts from a checkpoint: name its recipe as `parent`, or an MLLM as "
            "`model.mllm`."
        )
    if starts_from_mllm and not spec.needs_parent:
        raise RecipeError(
            f"{where('model', 'mllm')}: stage {stage} does not start from an MLLM: give `model` with `vision` and "
            "`language`, or take one of the stages instruct, sft, dpo, grpo and rloo."
        )
    if not base_part and recipe.model is None:
        raise RecipeError(f"{where()}: stage {stage} needs `model` with `vision` and `language`, or a parent.")
    if not base_part and recipe.architecture is not None:
        raise RecipeError(f"{where('architecture')}: only stages vision and language take `architecture`.")
    if parent is not None and recipe.model != parent.recipe.model:
        raise RecipeError(f"{where('model')}: `model` differs from the parent's: remove it, it is inherited.")
    if not recipe.learning_rate.trained():
        raise RecipeError(f"{where('learning_rate')}: every part is frozen: give at least one part a learning rate.")
    if recipe.lora is not None and (base_part or recipe.learning_rate.language is None):
        raise RecipeError(f"{where('lora')}: `lora` trains the language model: give `learning_rate.language`.")
    if recipe.labels is not None and not spec.takes_labels:
        raise RecipeError(f"{where('labels')}: `labels` is for stages whose loss is on labelled tokens; remove it.")
    if recipe.loss_over is not None and not spec.takes_labels:
        raise RecipeError(
            f"{where('loss_over')}: `loss_over` is for stages whose loss is on labelled tokens; remove it."
        )
    if recipe.rewards is not None and not spec.takes_rewards:
        raise RecipeError(f"{where('rewards')}: stage {stage} learns from its rows alone; remove `rewards`.")
    if recipe.rewards is None and spec.takes_rewards:
        raise RecipeError(f"{where()}: stage {stage} learns from rewards: list them as `rewards`.")
    if recipe.weights is not None and not spec.takes_labels:
        raise RecipeError(
            f"{where('weights')}: `weights: bfloat16` is for align, instruct and sft: a base part is small, and "
            "updates of dpo are smaller than bfloat16's rounding; remove it."
        )
    _check_sources(recipe, where, spec)


def _check_sources(recipe: Recipe, where: Where, stage: Stage) -> None:
    """Check that a stage reads the formats and contents of its sources."""
    for i, source in enumerate(recipe.data):
        if source.format not in stage.formats:
            formats = " or ".join(stage.formats)
            raise RecipeError(f"{where('data', i)}: stage {stage.name} reads {formats}, not {source.format}.")
        if isinstance(source, ShapesData) and stage.content and source.content != stage.content:
            raise RecipeError(f"{where('data', i, 'content')}: stage {stage.name} reads content: {stage.content}.")
        if isinstance(source, ShapesData) and source.slip and source.content != "pairs":
            raise RecipeError(f"{where('data', i, 'slip')}: `slip` is for content: pairs.")
        if isinstance(source, ShapesData) and source.counterfactual and (source.content != "pairs" or source.slip):
            raise RecipeError(
                f"{where('data', i, 'counterfactual')}: `counterfactual` is for content: pairs, without slip."
            )
        if isinstance(source, ShapesData) and source.forms and source.content not in ("instruct", "pairs"):
            raise RecipeError(f"{where('data', i, 'forms')}: `forms` is for content: instruct or pairs.")
        if isinstance(source, ShapesData) and source.wrong_images and (source.counterfactual or source.rows < 2):
            raise RecipeError(
                f"{where('data', i, 'wrong_images')}: `wrong_images` needs two rows or more, without counterfactual."
            )
        if (
            isinstance(source, ShapesData)
            and source.wrong_answers
            and (source.content != "pairs" or source.slip or source.counterfactual or source.forms)
        ):
            raise RecipeError(
                f"{where('data', i, 'wrong_answers')}: `wrong_answers` is for content: pairs, without slip, "
                "counterfactual and forms."
            )
        if isinstance(source, ShapesData) and source.kinds and source.content != "questions":
            raise RecipeError(f"{where('data', i, 'kinds')}: `kinds` is for content: questions.")
        if isinstance(source, FileData) and source.answer_words and source.format != "vqa":
            raise RecipeError(f"{where('data', i, 'answer_words')}: `answer_words` is for format: vqa.")
        if isinstance(source, FileData) and source.format == "boxes" and source.images is None:
            raise RecipeError(f"{where('data', i)}: format boxes needs `images`, the folder of the labels' images.")
        if isinstance(source, FileData) and source.format == "boxes" and source.subsets is not None:
            raise RecipeError(f"{where('data', i, 'subsets')}: format boxes has no subsets; list several sources.")


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
        if isinstance(number, float) and not math.isfinite(number):
            raise RecipeError(f"{where('args', key)}: `{key}` is {value!r}: it must be a finite number.")
        positive = key.startswith(("per_device", "num_train_epochs", "gradient_acc", "save_steps", "logging_"))
        if isinstance(number, int | float) and ((number < 0 and key != "max_steps") or (positive and number == 0)):
            raise RecipeError(f"{where('args', key)}: `{key}` is {value!r}: it must be positive.")
    return checked


def _override(raw: dict[str, Any], override: str) -> tuple[str | int, ...]:
    """Apply `dotted.key=value` in section and return the key's path."""
    dotted, sign, text = override.partition("=")
    if not sign or not dotted:
        raise RecipeError(f"override {override!r}: write dotted.key=value, as in args.beta=0.2.")
    keys: list[str | int] = [int(k) if k.isdigit() else k for k in dotted.split(".")]
    section: Any = raw
    for key in keys[:-1]:
        if isinstance(section, list):
            if not isinstance(key, int) or key >= len(section):
                raise RecipeError(f"override {override}: {key!r} is not an index of a list of {len(section)}.")
            section = section[key]
        elif isinstance(section, dict):
            section = section.setdefault(key, {})
        else:
            raise RecipeError(f"override {override}: `{dotted}` goes deeper than the recipe does.")
    try:
        section[keys[-1]] = parse_yaml(text, f"override {override}", RecipeError)[0]
    except (IndexError, TypeError) as error:
        raise RecipeError(f"override {override}: cannot be set there: {error}.") from error
    return tuple(keys)
