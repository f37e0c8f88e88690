"""A study's file: which runs, over which seeds, how they are measured and compared; checked before any is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
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

Measure = Literal["encoder", "maps", "answers", "harder", "distance", "gradients"]


class RunSpec(Strict):
    """One run of a study; it is trained once for each seed, a base part once in all.

    Args:
        label: in figures and tables.
        recipe: beside the study's file, as in `3-dpo`; None for an encoder that is there.
        encoder: folder beside the study's file, of an encoder that is measured and not trained.
        parent: the run whose checkpoint this one starts from.
        vision, language: runs whose encoder or language head take the place of the base part.
        change: overrides of the recipe; {seed} stands for the seed.
        frozen: parts that the recipe trains and this run does not.
        rates: candidates for the rate of every trained part; the best on validation questions is taken.
        rate_of: the run whose rate this one shares.
        measure: what is measured of it: probes of its `encoder`, gradient `maps`, `answers` and ranked pairs, both on
            `harder` worlds too, the `distance` from its parent, `gradients` of words and pairs.
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
    measure: list[Measure] = Field([])


class Curve(Strict):
    """Runs along an axis: for each line the run at each place."""

    axis: str
    lines: dict[str, dict[float, str]]


class Levels(Strict):
    """Runs whose means over seeds are listed, on some of the measures."""

    runs: list[str]
    measures: list[str]


class FactorSpec(Strict):
    """One question of a study: runs held against others, on some of the measures.

    Args:
        title: of its section.
        question: in one sentence.
        pairs: [first, other]: the difference is `other` minus `first`.
        measures: names of `StudySpec.measures`.
        curve: drawn besides.
        levels: listed besides.
        note: what a reader must know of it.
    """

    title: str
    question: str
    pairs: list[tuple[str, str]] = Field(min_length=1)
    measures: list[str] = Field(min_length=1)
    curve: Curve | None = None
    levels: Levels | None = None
    note: str = ""


class StudySpec(Strict):
    """A study: see `recipes/shapes/study.yaml`.

    Args:
        title, question: of the report.
        method: paragraphs of the report, written before the runs.
        threats: likewise, to validity.
        seeds: of training; runs of one seed share parents and rows.
        search_seed: of the runs that choose rates; none of `seeds`.
        change: overrides of the recipes of all runs but base parts.
        world: that probes are fitted and tested on.
        harder: worlds by name that the same probes and questions are tested on too.
        sizes: of the probes.
        measures: names of tasks and their metric, as in `Shape: shapes/shape balanced_accuracy`.
        runs: by name, each after those it needs.
        factors: sections of the report; the first is the primary one.
        remarks: written after the runs, and so no part of the plan and its hash.
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
    runs: dict[str, RunSpec]
    factors: list[FactorSpec] = Field(min_length=1)
    remarks: list[str] = Field([])


@dataclass(frozen=True)
class Cell:
    """One training, or one encoder that is there.

    Args:
        run: its name in the study.
        seed: None for what is made once: base parts, and encoders that are there.
        rate: of a candidate that takes part in the choice of a rate.
    """

    run: str
    seed: int | None
    rate: float | None = None

    @property
    def name(self) -> str:
        """As in `dpo/seed-0`, `dpo@0.0001/seed-100`, `language-64/once`: its place in every folder of the output."""
        run = self.run if self.rate is None else f"{self.run}@{self.rate:g}"
        return f"{run}/once" if self.seed is None else f"{run}/seed-{self.seed}"


@dataclass(frozen=True)
class Study:
    """A checked study and the file it came from."""

    spec: StudySpec
    path: Path

    @property
    def name(self) -> str:
        """Folder and file stem, as in `shapes/study`."""
        return f"{self.path.parent.name}/{self.path.stem}"

    @cached_property
    def sha256(self) -> str:
        plan = self.spec.model_dump(mode="json", exclude={"remarks"})
        return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()

    @cached_property
    def sizes(self) -> Sizes:
        return Sizes(**self.spec.sizes)

    @cached_property
    def dataset(self) -> ShapesDataset:
        return ShapesDataset(**self.spec.world.model_dump())

    @cached_property
    def harder(self) -> dict[str, ShapesDataset]:
        return {name: ShapesDataset(**dataset.model_dump()) for name, dataset in self.spec.harder.items()}

    def stage(self, run: str) -> str | None:
        """Stage of a run's recipe, None for an encoder that is there."""
        return None if self.spec.runs[run].recipe is None else self._recipes[run].recipe.stage

    def made_once(self, run: str) -> bool:
        """Whether a run is made once and not for each seed: a base part, or an encoder that is there already."""
        stage = self.stage(run)
        return stage is None or stage_of(stage).base_part

    def cells(self) -> list[Cell]:
        """All of them: base parts, the search's and the final ones, in the order of the runs."""
        return [cell for run in self.spec.runs for cell in (*self.candidates(run), *self.finals(run))]

    def finals(self, run: str) -> list[Cell]:
        """The cells of a run that are reported: one a seed, or one in all. What a search starts from is with them."""
        if self.made_once(run):
            return [Cell(run, None)]
        seeds = [*([self.spec.search_seed] if run in self._searched_from else []), *self.spec.seeds]
        return [Cell(run, seed) for seed in seeds]

    def candidates(self, run: str) -> list[Cell]:
        return [Cell(run, self.spec.search_seed, rate) for rate in self.spec.runs[run].rates or []]

    def needs(self, cell: Cell) -> list[Cell]:
        """What must be finished before a cell starts."""
        spec = self.spec.runs[cell.run]
        needed = [self.same_seed(run, cell) for run in (spec.parent, spec.vision, spec.language) if run]
        if cell.rate is None:
            needed += self.candidates(spec.rate_of or cell.run)
        return needed

    def same_seed(self, run: str, cell: Cell) -> Cell:
        """The cell of another run that a cell builds on."""
        return Cell(run, None if self.made_once(run) else cell.seed)

    def overrides(self, cell: Cell, rate: float | None, parts: Mapping[str, str]) -> list[str]:
        """Overrides of a cell's recipe.

        Args:
            rate: of every trained part; None leaves the recipe's own.
            parts: encoder and language head by the name they have in `model`, where they are not the base parts.
        """
        spec = self.spec.runs[cell.run]
        seed = 0 if cell.seed is None else cell.seed
        shared = [] if cell.seed is None else self.spec.change
        made = [c.replace("{seed}", str(seed)) for c in (*shared, *spec.change)] + [f"seed={seed}"]
        if rate is not None:
            made += [f"learning_rate.{part}={rate}" for part in self._recipes[cell.run].recipe.learning_rate.trained()]
        made += [f"learning_rate.{part}=null" for part in spec.frozen]
        return made + [f"model.{part}={place}" for part, place in parts.items()]

    def load(self, cell: Cell, rate: float | None = None, parts: Mapping[str, str] = {}) -> LoadedRecipe:
        """The recipe of a cell."""
        recipe = self.spec.runs[cell.run].recipe
        assert recipe is not None
        return load_recipe(self.path.parent / f"{recipe}.yaml", self.overrides(cell, rate, parts))

    @cached_property
    def _recipes(self) -> dict[str, LoadedRecipe]:
        """Each run's recipe as its file has it."""
        return {
            name: load_recipe(self.path.parent / f"{run.recipe}.yaml")
            for name, run in self.spec.runs.items()
            if run.recipe is not None
        }

    @cached_property
    def _searched_from(self) -> set[str]:
        """Runs that candidates start from, directly or through others."""
        found: set[str] = set()
        ahead = [run for run, spec in self.spec.runs.items() if spec.rates]
        while ahead:
            spec = self.spec.runs[ahead.pop()]
            ahead += (new := {run for run in (spec.parent, spec.vision) if run} - found)
            found |= new
        return found


def load_study(path: str | Path) -> Study:
    """Read and check a study: every recipe with its overrides, every name that is referred to.

    Args:
        path: the YAML file; a name such as `shapes/study` finds the shipped one.

    Raises:
        RecipeError: naming the file and what is wrong in it.
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
    """What is wrong in a study whose keys are right."""
    spec, known = study.spec, list(study.spec.runs)
    if spec.search_seed in spec.seeds:
        yield f"`search_seed` {spec.search_seed} is one of `seeds`: rates are chosen on a seed that is not reported."
    if unknown := set(spec.sizes) - set(Sizes.__dataclass_fields__):
        yield f"`sizes.{min(unknown)}` is not known; give some of {', '.join(Sizes.__dataclass_fields__)}."
    for place, (name, run) in enumerate(spec.runs.items()):
        if (run.recipe is None) == (run.encoder is None):
            yield f"`runs.{name}` needs `recipe` or `encoder`, one of the two."
        for key in ("parent", "vision", "language", "rate_of"):
            other = getattr(run, key)
            if other is not None and other not in known[:place]:
                yield f"`runs.{name}.{key}` {other!r} is no run before it{nearest(other, known)}."
        if run.rate_of and not spec.runs[run.rate_of].rates:
            yield f"`runs.{name}.rate_of` {run.rate_of!r} has no `rates`."
    for i, factor in enumerate(spec.factors):
        curve = [run for line in (factor.curve.lines.values() if factor.curve else ()) for run in line.values()]
        listed = factor.levels or Levels(runs=[], measures=[])
        for name in (*(n for pair in factor.pairs for n in pair), *curve, *listed.runs):
            if name not in known:
                yield f"`factors.{i}` names {name!r}, which is no run{nearest(name, known)}."
        for measure in (*factor.measures, *listed.measures):
            if measure not in spec.measures:
                yield f"`factors.{i}.measures` names {measure!r}, which is no measure{nearest(measure, spec.measures)}."
    for cell in study.cells():
        if spec.runs[cell.run].recipe is not None:
            study.load(cell, cell.rate)
