"""The file of a study: its runs and seeds, and how they are measured and compared; checked before any run starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pivot_hub.config.data_section import ShapesSettings
from pivot_hub.config.recipe import RECIPES, LearningRate, LoadedRecipe, load_recipe
from pivot_hub.config.stages import stage_of
from pivot_hub.config.yaml_loader import Strict, check_keys, nearest, read_yaml
from pivot_hub.data.synthetic import ShapesDataset
from pivot_hub.errors import RecipeError
from pivot_hub.probes.run import Sizes

Measure = Literal["encoder", "maps", "answers", "harder", "distance", "gradients", "counterfactuals", "blind"]

WRONG_ANSWERS = "data.0.wrong_answers"  # key of the recipe of a run with a policy


class RunSpec(Strict):
    """One run of a study. It is trained once for each seed; a base part and a shared run are trained once in all.

    Args:
        label: Name of the run in figures and tables.
        recipe: Name of a recipe beside the study's file, such as `3-dpo`; None for an encoder that exists already.
        encoder: Folder beside the study's file that holds an encoder, which is measured and not trained.
        parent: Run whose checkpoint this one starts from.
        vision, language: Runs whose encoder or language model replaces the recipe's base part.
        change: Overrides of the recipe; {seed} is replaced by the seed.
        frozen: Parts that the recipe trains and this run does not.
        rates: Candidates for the learning rate of every trained part; the one with the best validation score is used.
        rate_of: Run whose learning rate this one shares.
        policy: Run whose MLLM's own wrong answers are the rejected ones: it answers each question of the recipe's first
            source once, and the rows that it answers right are left out.
        shared: Whether this run is trained once, with seed 0, and all seeds share its checkpoint, as where its training
            would take most of the study's time. Intervals then say nothing of other checkpoints of it. The runs that it
            starts from are shared, too.
        measure: Names of what is measured: `encoder` (probes), `maps` (gradient maps), `answers` (answers, the
            probability of true ones, and ranked pairs), `harder` (probes and answers on the harder datasets too),
            `distance` (of the weights, and of each layer's features, from the parent), `gradients` (of words and of
            pairs), `counterfactuals` (features and ranked answers of two scenes that differ in one thing), `blind`
            (answers given a grey image).
    """

    label: str
    recipe: str | None = None
    encoder: str | None = None
    parent: str | None = None
    vision: str | None = None
    language: str | None = None
    change: list[str] = Field([])
    frozen: list[Literal["vision", "projector", "language"]] = Field([])
    rates: list[LearningRate] | None = Field(None, min_length=2)
    rate_of: str | None = None
    policy: str | None = None
    shared: bool = False
    measure: list[Measure] = Field([])


class Curve(Strict):
    """Runs along an axis: for each line, the run at each position of the axis."""

    axis: str
    lines: dict[str, dict[float, str]]


class Frontier(Strict):
    """Methods in the plane of two measures, each a line through its runs: what it gains against how far it moved.

    Args:
        x, y: Names of measures.
        baseline: Run whose `y` is subtracted, seed by seed.
        lines: Runs of each line, in the order in which they are joined.
    """

    x: str
    y: str
    baseline: str
    lines: dict[str, list[str]]


class Levels(Strict):
    """Runs whose means over seeds are listed, and the measures that are listed."""

    runs: list[str]
    measures: list[str]


class FactorSpec(Strict):
    """One question of a study: runs that are compared with others on a list of measures.

    Args:
        title: Title of the section in the report.
        question: Question of the section, in one sentence.
        pairs: Pairs [first, other] of runs; a difference is `other` minus `first`.
        measures: Names of entries of `StudySpec.measures`.
        curve: Curve that is drawn besides the differences.
        frontier: Plane of two measures that is drawn besides the differences.
        levels: Means that are listed besides the differences.
        note: Note that a reader of the section needs.
        change_of_mind: Result that would change the section's conclusion, written before the runs.
    """

    title: str
    question: str
    pairs: list[tuple[str, str]] = Field(min_length=1)
    measures: list[str] = Field(min_length=1)
    curve: Curve | None = None
    frontier: Frontier | None = None
    levels: Levels | None = None
    note: str = ""
    change_of_mind: str = ""


class StudySpec(Strict):
    """A study as its file has it; `recipes/shapes/study.yaml` is an example.

    Args:
        title, question: Title and question of the report.
        method: Paragraphs of the report on the method, written before the runs.
        threats: Paragraphs of the report on threats to validity, written before the runs.
        seeds: Seeds of training; runs of one seed share parents and rows.
        search_seed: Seed of the runs that choose learning rates; it is none of `seeds`.
        change: Overrides of the recipes of all runs except base parts.
        world: Settings of the Shapes dataset that probes are fitted and tested on.
        harder: Settings of further Shapes datasets, by name, on which the same probes and questions are tested.
        sizes: Sizes of the probes.
        measures: Task and metric of each measure, by name, as in `Shape: shapes/shape balanced_accuracy`.
        composites: Further measures, each the mean of some of `measures`.
        runs: Runs by name; each comes after those it needs.
        factors: Sections of the report; the first is the primary comparison.
        brief: Whether the report begins with the comparisons, with the frontiers as their only figures, and has the
            method and all else behind them, as details.
        remarks: Remarks written after the runs; they are not part of the plan and its hash.
    """

    title: str
    question: str
    method: list[str]
    threats: list[str]
    seeds: list[int] = Field(min_length=2)
    search_seed: int
    change: list[str] = Field([])
    world: ShapesSettings = ShapesSettings()
    harder: dict[str, ShapesSettings] = Field({})
    sizes: dict[str, Annotated[int, Field(ge=1)]] = Field({})
    measures: dict[str, str]
    composites: dict[str, Annotated[list[str], Field(min_length=1)]] = Field({})
    runs: dict[str, RunSpec]
    factors: list[FactorSpec] = Field(min_length=1)
    brief: bool = False
    remarks: list[str] = Field([])


@dataclass(frozen=True)
class Cell:
    """One training, or one encoder that exists already.

    Args:
        run: Name of the run in the study.
        seed: Seed of the training; None for a run that all seeds share.
        learning_rate: Learning rate of a candidate in the search for one; None for every other cell.
    """

    run: str
    seed: int | None
    learning_rate: float | None = None

    @property
    def name(self) -> str:
        """Path of the cell in every folder of the output: `dpo/seed-0`, `dpo@0.0001/seed-100`, `language-64/once`."""
        run = self.run if self.learning_rate is None else f"{self.run}@{self.learning_rate:g}"
        return f"{run}/once" if self.seed is None else f"{run}/seed-{self.seed}"


@dataclass(frozen=True)
class Study:
    """A checked study and the file it was read from."""

    spec: StudySpec
    path: Path

    @property
    def name(self) -> str:
        """Folder and file stem, as in `shapes/study`."""
        return f"{self.path.parent.name}/{self.path.stem}"

    @cached_property
    def sha256(self) -> str:
        """Hash of the plan: everything in the file except the remarks."""
        plan = self.spec.model_dump(mode="json", exclude={"remarks"})
        # Keys that came later are left out where they are not used, so that older plans keep their hashes.
        optional = [(plan, "composites"), (plan, "brief")]
        optional += [(run, key) for run in plan["runs"].values() for key in ("policy", "shared")]
        optional += [(factor, key) for factor in plan["factors"] for key in ("frontier", "change_of_mind")]
        for section, key in optional:
            if not section[key]:
                del section[key]
        return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()

    @cached_property
    def recipes_sha256(self) -> str:
        """Hash of the recipes that the runs change."""
        recipes = {run: loaded.recipe.sha256() for run, loaded in self._recipes.items()}
        return hashlib.sha256(json.dumps(recipes, sort_keys=True).encode()).hexdigest()

    @cached_property
    def sizes(self) -> Sizes:
        return Sizes(**self.spec.sizes)

    @cached_property
    def dataset(self) -> ShapesDataset:
        return ShapesDataset(**self.spec.world.model_dump())

    @cached_property
    def harder(self) -> dict[str, ShapesDataset]:
        return {name: ShapesDataset(**settings.model_dump()) for name, settings in self.spec.harder.items()}

    def stage(self, run: str) -> str | None:
        """Return the stage of a run's recipe; None for an encoder that exists already."""
        return None if self.spec.runs[run].recipe is None else self._recipes[run].recipe.stage

    def shared_by_seeds(self, run: str) -> bool:
        """Whether all seeds share one cell of a run: a base part, an encoder that exists already, or a shared run."""
        return self.spec.runs[run].shared or not self.trains_mllm(run)

    def trains_mllm(self, run: str) -> bool:
        """Whether a run trains an MLLM; otherwise it is a base part, or an encoder that exists already."""
        stage = self.stage(run)
        return stage is not None and not stage_of(stage).base_part

    def cells(self, seeds: Sequence[int] | None = None) -> list[Cell]:
        """The cells in the order of the runs: base parts, candidates of searches, and final ones.

        Args:
            seeds: Seeds whose cells are listed, besides those that all seeds share and those of the search; all by
                default.

        Raises:
            RecipeError: The study has no such seed.
        """
        if unknown := set(seeds or ()) - set(self.spec.seeds):
            known = ", ".join(map(str, self.spec.seeds))
            raise RecipeError(f"{self.path}: no seed {min(unknown)}; the study's seeds are {known}.")
        cells = [cell for run in self.spec.runs for cell in (*self.candidates(run), *self.finals(run))]
        left_out = set() if seeds is None else set(self.spec.seeds) - set(seeds)
        return [cell for cell in cells if cell.seed not in left_out]

    def finals(self, run: str) -> list[Cell]:
        """The cells of a run that are reported, one a seed or one in all.

        A run that a search starts from has one more, for the seed of the search.
        """
        if self.shared_by_seeds(run):
            return [Cell(run, None)]
        search_seeds = [self.spec.search_seed] if run in self._parents_of_searches else []
        return [Cell(run, seed) for seed in (*search_seeds, *self.spec.seeds)]

    def candidates(self, run: str) -> list[Cell]:
        """The cells of the search for a run's learning rate."""
        return [Cell(run, self.spec.search_seed, rate) for rate in self.spec.runs[run].rates or []]

    def needs(self, cell: Cell) -> list[Cell]:
        """The cells that must be finished before a cell starts."""
        spec = self.spec.runs[cell.run]
        needed = [self.same_seed(run, cell) for run in (spec.parent, spec.vision, spec.language, spec.policy) if run]
        if cell.learning_rate is None:
            needed += self.candidates(spec.rate_of or cell.run)
        return needed

    def same_seed(self, run: str, cell: Cell) -> Cell:
        """The cell of another run that a cell builds on."""
        return Cell(run, None if self.shared_by_seeds(run) else cell.seed)

    def changes(self, run: str) -> list[str]:
        """Overrides of a run's recipe by the study's file, with {seed} for the seed, which is 0 in a shared run."""
        own = self.spec.runs[run].change
        return [*self.spec.change, *own] if self.trains_mllm(run) else own

    def overrides(self, cell: Cell, learning_rate: float | None, files: Mapping[str, str]) -> list[str]:
        """Overrides of a cell's recipe.

        Args:
            cell: Cell of a run with a recipe.
            learning_rate: Learning rate of every trained part; None keeps the recipe's own.
            files: Files and folders of the study's output that the recipe reads, by their keys in it.
        """
        spec = self.spec.runs[cell.run]
        seed = cell.seed or 0
        overrides = [change.replace("{seed}", str(seed)) for change in self.changes(cell.run)] + [f"seed={seed}"]
        if learning_rate is not None:
            trained = self._recipes[cell.run].recipe.learning_rate.trained()
            overrides += [f"learning_rate.{part}={learning_rate}" for part in trained]
        overrides += [f"learning_rate.{part}=null" for part in spec.frozen]
        return overrides + [f"{key}={path}" for key, path in files.items()]

    def load(self, cell: Cell, learning_rate: float | None = None, files: Mapping[str, str] = {}) -> LoadedRecipe:
        """Load the recipe of a cell; see `overrides` for the arguments."""
        recipe = self.spec.runs[cell.run].recipe
        assert recipe is not None
        return load_recipe(self.path.parent / f"{recipe}.yaml", self.overrides(cell, learning_rate, files))

    @cached_property
    def _recipes(self) -> dict[str, LoadedRecipe]:
        """Each run's recipe without overrides."""
        return {
            name: load_recipe(self.path.parent / f"{run.recipe}.yaml")
            for name, run in self.spec.runs.items()
            if run.recipe is not None
        }

    @cached_property
    def _parents_of_searches(self) -> set[str]:
        """Runs that candidates start from, directly or through other runs."""
        parents: set[str] = set()
        pending = [run for run, spec in self.spec.runs.items() if spec.rates]
        while pending:
            spec = self.spec.runs[pending.pop()]
            new = {run for run in (spec.parent, spec.vision, spec.policy) if run} - parents
            pending += new
            parents |= new
        return parents


def load_study(path: str | Path) -> Study:
    """Read and check a study: every recipe with its overrides, and every name that is referred to.

    Args:
        path: YAML file of the study, or the name of a shipped one, such as `shapes/study`.

    Raises:
        RecipeError: The file is missing or wrong; the message names the file and the mistake.
    """
    file = next((p for p in (Path(path), RECIPES / path, RECIPES / f"{path}.yaml") if p.is_file()), None)
    if file is None:
        shipped = ", ".join(sorted(f"{p.parent.name}/{p.stem}" for p in RECIPES.glob("*/study*.yaml")))
        raise RecipeError(f"{path}: no such study; give a file, or one of: {shipped}.")
    raw, where = read_yaml(file, "a study is a mapping of keys; start with `title:`", RecipeError)
    spec = check_keys(StudySpec, raw, where, RecipeError)
    study = Study(spec, file.resolve())
    for problem in _problems(study):
        raise RecipeError(f"{file}: {problem}")
    return study


def _problems(study: Study) -> Iterator[str]:
    """Yield the mistakes in a study whose keys are right."""
    spec, known = study.spec, list(study.spec.runs)
    if spec.search_seed in spec.seeds:
        yield f"`search_seed` {spec.search_seed} is one of `seeds`; choose learning rates on another seed."
    if unknown := set(spec.sizes) - set(Sizes.__dataclass_fields__):
        yield f"`sizes.{min(unknown)}` is not known; give some of {', '.join(Sizes.__dataclass_fields__)}."
    for place, (name, run) in enumerate(spec.runs.items()):
        if (run.recipe is None) == (run.encoder is None):
            yield f"`runs.{name}` needs either `recipe` or `encoder`."
        for key in ("parent", "vision", "language", "rate_of", "policy"):
            other = getattr(run, key)
            if other == name:
                yield f"`runs.{name}.{key}` names the run itself; give an earlier run."
            elif other in known[place:]:
                yield f"`runs.{name}.{key}` {other!r} stands below `{name}`, which needs it; move it up."
            elif other is not None and other not in known:
                yield f"`runs.{name}.{key}` {other!r} is not the name of an earlier run{nearest(other, known)}."
            elif run.shared and key != "rate_of" and other is not None and not study.shared_by_seeds(other):
                yield f"`runs.{name}` is shared by all seeds, and its `{key}` {other!r} is not; share that run too."
        if run.shared and run.rates:
            yield f"`runs.{name}` is shared by all seeds and has `rates`; give it a learning rate by `change`."
        if run.policy and (run.recipe is None or not study.trains_mllm(run.policy)):
            yield f"`runs.{name}.policy` {run.policy!r} must be a run that trains an MLLM, of a run with a recipe."
        measured = (study.stage(name), run.measure) if run.measure else None
        is_base_part = run.recipe is not None and not study.trains_mllm(name)
        if is_base_part and measured not in (None, ("vision", ["encoder"])):
            yield f"`runs.{name}.measure` is {run.measure}: of base parts only encoders are measured, as [encoder]."
        if run.rate_of and not spec.runs[run.rate_of].rates:
            yield f"`runs.{name}.rate_of` {run.rate_of!r} has no `rates`."
    for name, parts in spec.composites.items():
        if name in spec.measures:
            yield f"`composites.{name}` has the name of a measure."
        for part in parts:
            if part not in spec.measures:
                yield f"`composites.{name}` names {part!r}, which is not a measure{nearest(part, spec.measures)}."
    measures = [*spec.measures, *spec.composites]
    for i, factor in enumerate(spec.factors):
        curve = [run for line in (factor.curve.lines.values() if factor.curve else ()) for run in line.values()]
        frontier = factor.frontier or Frontier(x=measures[0], y=measures[0], baseline=known[0], lines={})
        curve += [frontier.baseline, *(run for line in frontier.lines.values() for run in line)]
        levels = factor.levels or Levels(runs=[], measures=[])
        for name in (*(n for pair in factor.pairs for n in pair), *curve, *levels.runs):
            if name not in known:
                yield f"`factors.{i}` names {name!r}, which is not a run{nearest(name, known)}."
        for measure in (*factor.measures, *levels.measures, frontier.x, frontier.y):
            if measure not in measures:
                hint = nearest(measure, measures)
                yield f"`factors.{i}.measures` names {measure!r}, which is not a measure{hint}."
    for cell in study.cells():
        if spec.runs[cell.run].recipe is not None:
            study.load(cell, cell.learning_rate, {WRONG_ANSWERS: "answers"} if spec.runs[cell.run].policy else {})
