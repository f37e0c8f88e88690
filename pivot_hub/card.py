"""Cards: facts of an encoder repository and its prose in, a model card out; a fact that is missing raises.

Facts are the repository's own files (config.json, recipe.yaml, provenance.json, results/*.json, export.json); prose is
`model_cards/<encoder>.yaml`, which holds no number of a result. Nothing else enters: the same facts give the same card.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import yaml
from huggingface_hub import ModelCard, ModelCardData
from pydantic import Field

from pivot_hub.errors import CardError, ProbeError
from pivot_hub.model_index import eval_files, eval_results, file_differences, index_differences
from pivot_hub.probes.result import ProbeResult, read_results
from pivot_hub.recipe import PACKAGE, LoadedRecipe, ShapesData, load_recipe
from pivot_hub.yaml_file import Strict, check_keys, read_yaml

CARDS = PACKAGE / "model_cards" if (PACKAGE / "model_cards").is_dir() else PACKAGE.parent / "model_cards"
FIGURE = "sft-against-dpo.png"
NOT_TRAINED = "**Not trained yet: there are no weights and no results, only the plan.**"
# What a card's metadata may hold; another key is a mistake, not an extension.
METADATA_KEYS = frozenset(
    {
        "license",
        "license_name",
        "license_link",
        "library_name",
        "pipeline_tag",
        "base_model",
        "base_model_relation",
        "datasets",
        "metrics",
        "tags",
        "model-index",
    }
)
# A share or a score, as in 47%, 3.7 points: not a name, as in So400m/16 or Qwen2.5-1.5B.
NUMBER = re.compile(r"\d\s*(?:%|percent\b|points?\b)")
ORDER = ("base", "sft", "dpo")
LOSS_MAPS = (" of sft", " of dpo")


class DataProse(Strict):
    """A source of training data: its Hub id, if it has one, and its licence as its page states it."""

    hub: str | None = None
    licence: str


class Prose(Strict):
    """What a card says that no run can know: `model_cards/<encoder>.yaml`.

    Args:
        repository: where the encoder lies on the Hub.
        version: of the published encoder; the tag of its commit.
        recipe: that makes it.
        about: what it is, in a few sentences.
        license: of the weights, by the Hub's identifier; license_name and license_link go with `other`.
        names: what recipes name, as a folder beside them, and what it is called on the Hub.
        data: each source of the lineage, by the path its recipes give.
        benchmarks: Hub ids of the data sets that results are on.
        pair: repositories of the SFT and the DPO encoder that are held against each other.
        paper: what the paper reports, quoted as the paper's.
        limits: what to know before using it.
        commands: what makes it again, where the repository does not know.
        tags: further tags.
    """

    repository: str
    version: str
    recipe: str
    about: str
    license: str
    license_name: str | None = None
    license_link: str | None = None
    names: dict[str, str] = Field({})
    data: dict[str, DataProse]
    benchmarks: dict[str, str] = Field({})
    pair: dict[Literal["sft", "dpo"], str] = Field({})
    paper: str | None = None
    limits: list[str]
    commands: list[str] | None = None
    tags: list[str] = Field([])


@dataclass(frozen=True)
class Facts:
    """What is known of an encoder: the contents of its repository's files."""

    config: dict[str, Any]
    provenance: dict[str, Any]
    recipe: dict[str, Any]
    results: list[ProbeResult]
    report: dict[str, Any] | None = None
    export: dict[str, Any] | None = None

    @property
    def encoder_sha256(self) -> str:
        """Hash of the weights, as results name it: `provenance.weights_sha256` from the sealed hashes of the files."""
        sealed = _fact(self.provenance, "provenance", "files")
        weights = sorted(name for name in sealed if name.endswith(".safetensors") and "/" not in name)
        return hashlib.sha256("".join(f"{name}{sealed[name]}" for name in weights).encode()).hexdigest()

    def own_results(self) -> list[ProbeResult]:
        """Results measured on these weights; maps that explain a training loss and no answer stay in results/.

        Raises:
            CardError: there are none.
        """
        own = [r for r in self.results if r.encoder_sha256 == self.encoder_sha256]
        own = [r for r in own if not r.task.endswith(LOSS_MAPS)]
        if not own:
            raise CardError(
                "results/*.json are missing for these weights: `pivot probe ENCODER --json dpo.json`, then "
                "`pivot card ENCODER --results dpo.json`."
            )
        return own


def read_facts(folder: str | Path) -> Facts:
    """Read the facts of an encoder repository.

    Raises:
        CardError: a file is missing or cannot be read.
    """
    path = Path(folder)
    results = [r for file in sorted((path / "results").glob("*.json")) for r in _results(file)]
    return Facts(
        config=_read(path / "config.json"),
        provenance=_read(path / "provenance.json"),
        recipe=_read(path / "recipe.yaml"),
        results=results,
        report=_read(path / "report.json") if (path / "report.json").is_file() else None,
        export=_read(path / "export.json") if (path / "export.json").is_file() else None,
    )


def read_prose(path: str | Path) -> Prose:
    """Read the prose of a card: a file, or the name of an encoder that `model_cards` has prose for.

    Raises:
        CardError: there is none, it is not as `Prose` says, or it holds a number that belongs to results.
    """
    file = Path(path) if Path(path).suffix == ".yaml" else CARDS / f"{path}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(f.stem for f in CARDS.glob("*.yaml")))
        raise CardError(f"{file.name}: there is no prose of this name; give a file with --prose, or one of {known}.")
    raw, where = read_yaml(file, "the prose of a card is a mapping of keys; start with `about:`", CardError)
    prose = check_keys(Prose, raw, where, CardError)
    for text in (prose.about, *prose.limits):
        if found := NUMBER.search(text):
            said = text[max(0, found.start() - 20) : found.end()]
            raise CardError(f"{file.name} says {said!r}: numbers come from results, or stand under `paper` as its own.")
    return prose


def render_card(facts: Facts, prose: Prose, repository: str | None = None) -> ModelCard:
    """Render the card of a trained encoder.

    Args:
        facts: of its repository.
        prose: its text.
        repository: its name on the Hub, where it is not the prose's.

    Raises:
        CardError: a fact is missing; the message names it.
    """
    name = repository or prose.repository
    chain = _chain(facts.provenance)
    stages = [_stage(step, prose, facts) for step in chain]
    metadata = _metadata(facts, prose, name, chain)
    text = _template().render(
        trained=True,
        name=name,
        prose=prose,
        stage=_fact(facts.config, "config", "pivot.stage"),
        base_model=metadata.base_model,
        language=_hub_name(_language(facts), prose),
        shape=_shape(facts.config),
        tables=_tables(facts),
        apart=_apart(facts),
        figure=FIGURE if _pair(facts) else None,
        results=facts.own_results(),
        lineage=_lineage(stages, name, metadata.get("base_model"), _hub_name(_language(facts), prose), prose),
        sources=_sources([_fact(step, "provenance", "data") for step in chain], prose),
        stages=stages,
        gpu_hours=_sum([s["gpu_hours"] for s in stages]),
        energy_kwh=_sum([s["energy_kwh"] for s in stages]),
        commands=_commands(facts, prose),
        commit=_fact(chain[-1], "provenance", "commit", may_be_none=True),
        versions=_fact(chain[-1], "provenance", "versions"),
        weights=facts.encoder_sha256,
        exports=_exports(facts.export),
    )
    return _checked(ModelCard(f"---\n{metadata.to_yaml()}\n---\n{text}"))


def render_plan(prose: Prose) -> str:
    """The page of an encoder that is not trained yet: prose and recipe, said so in its first line.

    Raises:
        CardError: a fact is missing; the message names it.
    """
    loaded = load_recipe(prose.recipe)
    assert loaded.recipe.model is not None
    return f"{NOT_TRAINED}\n" + _template().render(
        trained=False,
        name=prose.repository,
        prose=prose,
        stage=loaded.recipe.stage,
        base_model=_hub_name(loaded.recipe.model.vision, prose),
        language=_hub_name(loaded.recipe.model.language, prose),
        plan=[_planned(step) for step in loaded.lineage()],
        sources=_sources([[d.model_dump(mode="json") for d in s.recipe.data] for s in loaded.lineage()], prose),
        commands=prose.commands or [f"pivot train {prose.recipe} --parents"],
    )


def card_files(facts: Facts, prose: Prose, repository: str | None = None) -> dict[str, bytes]:
    """What a card consists of, by file name: README.md, its figure and `.eval_results/*.yaml`.

    Raises:
        CardError: a fact is missing.
    """
    made = {"README.md": str(render_card(facts, prose, repository)).encode()}
    if pair := _pair(facts):
        made[FIGURE] = _draw(pair)
    return made | {n: t.encode() for n, t in eval_files(facts.own_results(), prose.benchmarks).items()}


def card_problems(folder: str | Path) -> list[str]:
    """Hold the numbers of a published card against the repository's results.

    Returns:
        What differs, a sentence each; empty where every number of the card is one of the results, and the other way.
    """
    path = Path(folder)
    if not (path / "README.md").is_file():
        return ["README.md is missing: the repository has no card."]
    try:
        facts = read_facts(path)
        own = facts.own_results()
        card = ModelCard((path / "README.md").read_text())
    except (CardError, ValueError, yaml.YAMLError) as error:
        return [f"README.md cannot be held against the results: {error}"]
    problems = index_differences(own, card.data.get("eval_results", []))
    names = {f".eval_results/{r.task.split('/')[0]}.yaml" for r in own}
    for name in sorted(names):
        if not (path / name).is_file():
            problems.append(f"{name} is missing.")
            continue
        problems += file_differences(own, name, (path / name).read_text())
    rows = {line.strip() for line in card.text.splitlines() if line.startswith("|")}
    for table in _tables(facts):
        for row in table["rows"]:
            if "| " + " | ".join(row) + " |" not in rows:
                problems.append(f"README.md has no row with the results of {row[0]} {row[1]}.")
    return problems


def _checked(card: ModelCard) -> ModelCard:
    """A card whose metadata holds nothing but what is allowed, and reads back as it was written."""
    written = card.data.to_dict()
    if unknown := sorted(written.keys() - METADATA_KEYS):
        raise CardError(f"metadata key {unknown[0]!r} is not one of {', '.join(sorted(METADATA_KEYS))}.")
    if ModelCard(str(card)).data.to_dict() != written:
        raise CardError("the card's metadata does not read back as it was written.")
    return card


def _metadata(facts: Facts, prose: Prose, name: str, chain: list[dict[str, Any]]) -> ModelCardData:
    own = facts.own_results()
    stage = _fact(facts.config, "config", "pivot.stage")
    base = facts.config["pivot"].get("base_model")
    if base is None and stage != "base":
        raise CardError("config.pivot.base_model is missing: extract the encoder again.")
    sources = _sources([_fact(step, "provenance", "data") for step in chain], prose)
    data = sorted({s["hub"] for s in sources if s["hub"]})
    return ModelCardData(
        license=prose.license,
        license_name=prose.license_name,
        license_link=prose.license_link,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        base_model=_hub_name(base, prose) if base else None,
        base_model_relation="finetune" if base else None,
        datasets=data or None,
        metrics=sorted({r.metric for r in own}),
        tags=["pivot", "vision-encoder", stage, _fact(facts.config, "config", "model_type"), *prose.tags],
        model_name=name,
        eval_results=eval_results(own, prose.benchmarks),
    )


def _chain(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """The provenance of each stage, the first one first."""
    step = provenance if "stage" in provenance else _fact(provenance, "provenance", "mllm")
    made = []
    while step:
        made.append(step)
        step = (step.get("parent") or {}).get("provenance")
    return made[::-1]


def _stage(step: dict[str, Any], prose: Prose, facts: Facts) -> dict[str, Any]:
    """A stage of the lineage with its cost; what was not measured is None."""
    where = f"provenance of {_fact(step, 'provenance', 'recipe')}"
    machine = _fact(step, where, "machine")
    cost = step.get("cost")
    if cost is None and facts.report is not None and facts.report.get("recipe") == step["recipe"]:
        cost = {"duration_s": facts.report["duration_s"], "processes": 1, "energy_kwh": None}
    if cost is None:
        raise CardError(f"{where}: cost is missing: train it with this version, which records it.")
    duration, processes = cost["duration_s"], cost["processes"]
    gpu = _fact(machine, where, "gpu", may_be_none=True)
    return {
        "recipe": step["recipe"],
        "stage": _fact(step, where, "stage"),
        "data": "; ".join(_amount(source, prose) for source in _fact(step, where, "data")),
        "hours": None if duration is None else duration / 3600,
        "on": f"{processes} x {gpu}" if gpu else f"{machine['cpu_cores']} CPU cores ({machine['processor']})",
        "gpu_hours": (None if duration is None else duration / 3600 * processes) if gpu else 0.0,
        "energy_kwh": cost["energy_kwh"],
        "weights": _fact(step, where, "weights_sha256")[:12],
    }


def _planned(step: LoadedRecipe) -> dict[str, Any]:
    rates = step.recipe.learning_rate.trained()
    rows = []
    for source in step.recipe.data:
        if isinstance(source, ShapesData):
            drawn: int | None = source.rows
        else:
            drawn = source.sample or (source.expect.rows if source.expect else None)
        rows.append("unknown" if drawn is None else f"{drawn:,}")
    return {"recipe": step.name, "stage": step.recipe.stage, "trains": ", ".join(rates), "rows": " + ".join(rows)}


def _amount(source: dict[str, Any], prose: Prose) -> str:
    name = "shapes" if source["format"] == "shapes" else source["path"]
    drawn = source.get("sample") or source.get("rows")
    return f"{drawn:,} rows of {name}" if drawn else name


def _sources(stages: Sequence[Sequence[dict[str, Any]]], prose: Prose) -> list[dict[str, Any]]:
    """Each source once, with what the prose says of it.

    Raises:
        CardError: the prose says nothing of one.
    """
    made: dict[str, dict[str, Any]] = {}
    for source in [s for stage in stages for s in stage]:
        path = "shapes" if source["format"] == "shapes" else source["path"]
        # Provenance keeps of a folder its name alone.
        known = [key for key in prose.data if Path(key).name == Path(path).name]
        if not known:
            raise CardError(f"prose.data.{path} is missing: say the licence of this source, and its Hub id.")
        made[known[0]] = {"name": known[0], **prose.data[known[0]].model_dump()}
    return list(made.values())


def _lineage(stages: list[dict[str, Any]], name: str, base: str | None, language: str | None, prose: Prose) -> str:
    """A tree of the stages, for a code block: it shows wherever Markdown does."""
    width = max(len(s["recipe"]) + 3 * (i + bool(base)) for i, s in enumerate(stages))
    lines = [f"{base} + {language}"] if base else []
    for depth, stage in enumerate(stages, start=len(lines)):
        lead = ("   " * (depth - 1) + "└─ ") if depth else ""
        lines.append(f"{lead + stage['recipe']:{width}}  {stage['stage']:8}  {stage['data']}")
    lines[-1] += f"  -> {name}"
    for kind, other in prose.pair.items():
        if kind != stages[-1]["stage"] and stages[-1]["stage"] in prose.pair:
            lines.append(f"{'':{width}}  held against {other} ({kind.upper()})")
    return "\n".join(lines)


def _tables(facts: Facts) -> list[dict[str, Any]]:
    """Results as rows of text: of the encoder alone, then with its MLLM, encoders side by side."""
    own_name = facts.own_results()[0].encoder
    names = {r.encoder for r in facts.results}
    columns = [name for name in ORDER if name in names] + sorted(names - set(ORDER))
    cells: dict[tuple[str, str], dict[str, ProbeResult]] = {}
    for result in facts.results:
        cells.setdefault((result.task, result.metric), {})[result.encoder] = result
    tables = []
    for title, alone in (("The encoder alone, frozen", True), ("With the MLLM it was trained in", False)):
        rows = []
        for (task, metric), found in cells.items():
            own = found.get(own_name)
            if own is None or (own.partner is None) != alone or task.endswith(LOSS_MAPS):
                continue
            shown = [_cell(found[c]) if c in found else "-" for c in columns]
            partner = [] if alone else [own.partner or "-"]
            rows.append(
                [task, metric, *shown, *partner, str(own.n), f"{own.protocol}; {own.split} split, seed {own.seed}"]
            )
        if rows:
            heads = [f"**{c}** (this)" if c == own_name else c for c in columns]
            partner = [] if alone else ["partner"]
            tables.append(
                {"title": title, "head": ["probe", "metric", *heads, *partner, "n", "conditions"], "rows": rows}
            )
    return tables


def _pair(facts: Facts) -> list[tuple[ProbeResult, ProbeResult]]:
    """SFT's and DPO's results on the same task, in order; empty for an encoder that is neither.

    Raises:
        CardError: the other one's results are missing.
    """
    if _fact(facts.config, "config", "pivot.stage") not in ("sft", "dpo"):
        return []
    by_name = {name: {(r.task, r.metric): r for r in facts.results if r.encoder == name} for name in ("sft", "dpo")}
    for name, found in by_name.items():
        if not found:
            raise CardError(
                f"results of the {name} encoder are missing: the card holds SFT against DPO; put them in with "
                f"`pivot card ENCODER --results {name}.json`."
            )
    tasks = [k for k in by_name["sft"] if k in by_name["dpo"] and not k[0].endswith(LOSS_MAPS)]
    return [(by_name["sft"][k], by_name["dpo"][k]) for k in tasks]


def _apart(facts: Facts) -> str | None:
    """What the intervals of SFT and DPO show, in a sentence."""
    pair = _pair(facts)
    if not pair:
        return None
    better: dict[str, list[str]] = {"DPO": [], "SFT": []}
    for sft, dpo in pair:
        if dpo.ci95[0] > sft.ci95[1]:
            better["DPO"].append(f"{dpo.task} ({dpo.metric})")
        elif sft.ci95[0] > dpo.ci95[1]:
            better["SFT"].append(f"{sft.task} ({sft.metric})")
    said = [f"{name} is higher on {', '.join(tasks)}" for name, tasks in better.items() if tasks]
    if not said:
        return f"On all {len(pair)} measures the intervals of SFT and DPO overlap: no difference is shown."
    rest = len(pair) - sum(map(len, better.values()))
    return f"Of {len(pair)} measures, {'; '.join(said)}; on {rest} the intervals overlap."


def _draw(pair: list[tuple[ProbeResult, ProbeResult]]) -> bytes:
    from pivot_hub.figure import draw_intervals

    rows = [
        (f"{sft.task.partition('/')[2]}\n{sft.metric}", {"SFT": (sft.value, *sft.ci95), "DPO": (dpo.value, *dpo.ci95)})
        for sft, dpo in pair
    ]
    picture = io.BytesIO()
    draw_intervals(rows, picture, pair[0][0].unit)
    return picture.getvalue()


def _cell(result: ProbeResult) -> str:
    low, high = result.ci95
    digits = 1 if result.unit == "percent" else 3
    return f"{result.value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _shape(config: dict[str, Any]) -> dict[str, Any]:
    image_px, patch_px = _fact(config, "config", "image_size"), _fact(config, "config", "patch_size")
    return {
        "native": _fact(config, "config", "architectures")[0],
        "image_px": image_px,
        "patch_px": patch_px,
        "tokens": (image_px // patch_px) ** 2,
        "width": _fact(config, "config", "hidden_size"),
        "layers": _fact(config, "config", "num_hidden_layers"),
        "feature_layer": _fact(config, "config", "pivot.feature_layer"),
    }


def _exports(export: dict[str, Any] | None) -> list[dict[str, Any]]:
    files = {} if export is None else _fact(export, "export", "files")
    return [
        {"name": name, "mb": facts["bytes"] / 1e6, "error": max(facts["relative_error"].values())}
        for name, facts in files.items()
    ]


def _commands(facts: Facts, prose: Prose) -> list[str]:
    made: list[str] | None = facts.provenance.get("commands") or prose.commands
    if not made:
        raise CardError("prose.commands is missing: its recipes are not all shipped ones; say what makes it again.")
    return made


def _language(facts: Facts) -> str | None:
    if facts.config["pivot"]["stage"] == "base":
        return None
    language: str = _fact(facts.config, "config", "pivot.language_head")
    return language


def _hub_name(name: str | None, prose: Prose) -> str | None:
    return prose.names.get(name, name) if name else None


def _sum(values: Sequence[float | None]) -> float | None:
    """A total, unknown where one part is."""
    return None if None in values else sum(v for v in values if v is not None)


def _fact(facts: Mapping[str, Any], where: str, key: str, may_be_none: bool = False) -> Any:
    found: Any = facts
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found or (found[part] is None and not may_be_none):
            raise CardError(f"{where}.{key} is missing.")
        found = found[part]
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        made = (yaml.safe_load if path.suffix == ".yaml" else json.loads)(path.read_text())
    except OSError as error:
        raise CardError(f"{path.name} is missing: give the folder of an encoder repository.") from error
    except (ValueError, yaml.YAMLError) as error:
        raise CardError(f"{path.name} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(made, dict):
        raise CardError(f"{path.name} is no mapping of facts.")
    return made


def _results(path: Path) -> list[ProbeResult]:
    try:
        return read_results(path)
    except ProbeError as error:
        raise CardError(str(error)) from error


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(CARDS),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, of files that are ours
    )
    return environment.get_template("encoder.md.jinja")
