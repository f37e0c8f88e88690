"""The `pivot` command: parse, dispatch, print. Exit codes: 0 done, 1 failed, 2 bad usage or bad input."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pivot_hub import __version__
from pivot_hub.errors import PivotError

if TYPE_CHECKING:
    from pivot_hub.probes.result import ProbeResult

# Reports and progress are ours; the libraries' own bars and advice would bury them. --debug shows all.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DATASETS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
if not sys.stderr.isatty():  # bars of loading and saving are for terminals; elsewhere they are thousands of lines
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

app = typer.Typer(
    name="pivot",
    help="Make, measure and publish PIVOT vision encoders.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
# Where there is no terminal to ask for its width, a table keeps its rows on one line each.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)

JsonPath = Annotated[Path | None, typer.Option("--json", help="Also write the result here as JSON.")]
Runs = Annotated[Path, typer.Option(help="Folder of all runs; a stage goes to RUNS/<recipe folder>/<recipe>.")]


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' own messages.")] = False,
) -> None:
    if version:
        out.print(f"pivot_hub {__version__}")
        raise typer.Exit
    if not debug:
        warnings.filterwarnings("ignore")


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder of the run; run again to go on or to reuse.")] = Path(
        "quickstart"
    ),
    seed: Annotated[int, typer.Option(help="Of the MLLM's training, both branches alike.")] = 0,
) -> None:
    """Train an SFT and a DPO encoder from one parent on the built-in world, and compare them.

    Example: `pivot quickstart --output quickstart`
    """
    from pivot_hub.quickstart import run_quickstart

    report = run_quickstart(output, seed=seed, say=_say)
    out.print(report.table())
    _say(f"report: {output / 'report.md'}; encoders: {output / 'hub' / 'pivot'}")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a shipped one by name, as shapes/3-dpo.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value, as in args.beta=0.2.")] = None,
    runs: Runs = Path("runs"),
    output: Annotated[Path | None, typer.Option(help="The stage's folder, when not below RUNS.")] = None,
    parent: Annotated[Path | None, typer.Option(help="The parent's checkpoint, when not below RUNS.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Train one stage; a stopped run goes on where it was, a finished one is reused.

    Example: `pivot train shapes/1-align args.max_steps=20 --runs runs`
    """
    from pivot_hub.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from pivot_hub.training.stage import run_stage

    folder = run_stage(loaded, runs, output, parent, say=_say)
    _say(f"checkpoint: {folder}")
    _write(json_path, json.loads((folder / "report.json").read_text()) | {"checkpoint": str(folder)})


@app.command()
def search(
    recipe: Annotated[str, typer.Argument(help="A recipe with a parent that is finished below RUNS.")],
    rates: Annotated[str, typer.Option(help="Candidates, comma-separated.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value, for every candidate.")] = None,
    runs: Runs = Path("runs"),
    output: Annotated[Path, typer.Option(help="The record, JSON.")] = Path("search.json"),
) -> None:
    """Choose a stage's learning rate on validation questions, recording every candidate.

    Example: `pivot search shapes/3-dpo --rates 3e-5,1e-4,3e-4 --output search-dpo.json`
    """
    from pivot_hub.errors import RecipeError

    try:
        candidates = [float(r) for r in rates.split(",")]
    except ValueError:
        raise RecipeError(f"--rates {rates!r}: give numbers, as in 3e-5,1e-4,3e-4.") from None
    from pivot_hub.training.search import search_rate

    record = search_rate(recipe, candidates, runs, output, overrides=overrides or [], say=_say)
    _say(f"chosen: {record['chosen']:g}; record: {output}")


@app.command()
def extract(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a finished stage.")],
    output: Annotated[Path, typer.Argument(help="Folder of the encoder repository; replaced if it exists.")],
    json_path: JsonPath = None,
) -> None:
    """Detach the encoder of an MLLM and write it in its native format.

    Example: `pivot extract runs/shapes/3-dpo hub/pivot/shapes-dpo`
    """
    from pivot_hub.encoder.extract import extract_encoder

    folder = extract_encoder(checkpoint, output)
    _say(f"encoder: {folder}; load it with AutoModel.from_pretrained({str(folder)!r})")
    _write(json_path, {"encoder": str(folder), "files": sorted(p.name for p in folder.iterdir())})


@app.command()
def verify(
    encoder: Annotated[Path, typer.Argument(help="Folder of an encoder repository.")], json_path: JsonPath = None
) -> None:
    """Check a repository: hashes, keys, golden vectors, no pickle, no unexpected file.

    Example: `pivot verify hub/pivot/shapes-dpo`
    """
    from pivot_hub.encoder.repository import verify_repository

    problems = verify_repository(encoder)
    for problem in problems:
        _say(problem)
    _write(json_path, {"encoder": str(encoder), "problems": problems})
    if problems:
        raise typer.Exit(1)
    _say(f"{encoder}: sound")


@app.command()
def probe(
    encoder: Annotated[str, typer.Argument(help="Folder or Hub name of an encoder.")],
    data: Annotated[str, typer.Option(help="`shapes`, or a folder of class folders.")] = "shapes",
    seed: Annotated[int, typer.Option(help="Of splits and bootstrap.")] = 0,
    on_bad_row: Annotated[str, typer.Option(help="stop at an image that cannot be decoded, or skip it.")] = "stop",
    json_path: JsonPath = None,
) -> None:
    """Measure a frozen encoder: classification and segmentation of the world, or classes of a folder.

    Example: `pivot probe hub/pivot/shapes-dpo --data shapes --json results.json`
    """
    from pivot_hub.probes.run import probe_encoder

    results, skipped = probe_encoder(encoder, data, seed, on_bad_row)
    if skipped:
        _say(f"{len(skipped)} images skipped, the first: {skipped[0]}")
    _show(results, json_path, skipped)


@app.command()
def read(
    language: Annotated[str, typer.Argument(help="Folder or Hub name of a causal language model.")],
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    json_path: JsonPath = None,
) -> None:
    """Measure what a language model reads of the built-in world's scenes in words, before it sees any.

    Example: `pivot read recipes/shapes/base/language`
    """
    from pivot_hub.probes.run import probe_language

    _show(probe_language(language, seed=seed), json_path)


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="shapes: does drawing the built-in world keep up with training?")],
    json_path: JsonPath = None,
) -> None:
    """Time one part against another in one run.

    Example: `pivot bench shapes --json bench.json`
    """
    from pivot_hub.bench import bench_shapes
    from pivot_hub.errors import RecipeError

    if what != "shapes":
        raise RecipeError(f"there is no benchmark {what!r}; give shapes.")
    measured = bench_shapes()
    for name, seconds in measured["seconds_per_batch"].items():
        _say(f"{name:8} {1000 * seconds:8.1f} ms for a batch of {measured['batch']}")
    _say(f"drawing takes {100 * measured['render_share_of_step']:.0f}% of the step's time")
    _write(json_path, measured)


@app.command()
def gradcam(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of an MLLM: a finished stage.")],
    image: Annotated[Path, typer.Argument(help="The image to look at.")],
    question: Annotated[str, typer.Option(help="What is asked.")],
    answer: Annotated[str, typer.Option(help="The answer to explain; for dpo the right one.")],
    rejected: Annotated[str | None, typer.Option(help="The wrong answer, for dpo.")] = None,
    reference: Annotated[Path | None, typer.Option(help="The parent's checkpoint, for dpo.")] = None,
    explain: Annotated[str, typer.Option(help="answer, sft or dpo.")] = "answer",
    output: Annotated[Path, typer.Option(help="The figure.")] = Path("gradcam.png"),
    json_path: JsonPath = None,
) -> None:
    """Draw where an answer, or a loss on it, depends on the image.

    Example: `pivot gradcam runs/shapes/3-dpo scene.png --question "What is it?" --answer "It is a star."`
    """
    from pivot_hub.figure import draw_maps
    from pivot_hub.gradcam import explain_file

    made, picture = explain_file(checkpoint, image, question, answer, explain, rejected, reference)
    draw_maps(picture, [(f"{method} of {explain}", grid) for method, grid in made.maps.items()], output)
    _say(f"figure: {output}; {explain} is {made.value:.4f}")
    maps = {method: grid.tolist() for method, grid in made.maps.items()}
    _write(json_path, {"explain": explain, "value": made.value, "maps": maps})


@app.command()
def space(
    runs: Annotated[Path, typer.Option(help="Folder with the stages 2-instruct, 3-sft and 3-dpo.")] = Path(
        "quickstart/runs/shapes"
    ),
    port: Annotated[int, typer.Option(help="Where it listens, on this machine only.")] = 7860,
) -> None:
    """Serve the app that shows one scene under both encoders' maps.

    Example: `pivot space --port 7860`
    """
    from pivot_hub.space import load_app

    app_ = load_app(runs)
    _say(f"http://127.0.0.1:{port}")
    app_.launch(server_name="127.0.0.1", server_port=port, quiet=True)


def _show(results: list[ProbeResult], path: Path | None, skipped: Sequence[str] = ()) -> None:
    for result in results:
        low, high = result.ci95
        _say(f"{result.task:28} {result.metric:18} {result.value:6.1f} [{low:.1f}, {high:.1f}]  {result.protocol}")
    _write(path, {"results": [r.facts() for r in results], "skipped": list(skipped)})


def _say(text: str) -> None:
    out.print(text, markup=False)


def _write(path: Path | None, facts: Any) -> None:
    if path is not None:
        from pivot_hub.files import write_json

        write_json(path, facts)


def main() -> None:
    """Run the command; what goes wrong is one sentence on stderr, a traceback only with --debug."""
    try:
        app()
    except PivotError as error:
        if "--debug" in sys.argv:
            raise
        print(f"pivot: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("pivot: stopped; run the same command again to go on.", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        print(
            f"pivot: {type(error).__name__}: {reason[0]} (run `pivot --debug ...` for the traceback)", file=sys.stderr
        )
        sys.exit(1)
