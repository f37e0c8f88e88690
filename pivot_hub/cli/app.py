"""The command groups, the options that commands share, and functions that print and write results."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pivot_hub import __version__
from pivot_hub.errors import RecipeError

if TYPE_CHECKING:
    from pivot_hub.probes.result import ProbeResult

# The libraries' own progress bars and advice would bury our reports and progress. --debug shows all of it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DATASETS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
if not sys.stderr.isatty():  # outside of a terminal, bars of loading and saving are thousands of lines
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

app = typer.Typer(
    name="pivot",
    help="Make, measure and publish PIVOT vision encoders.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
bench = typer.Typer(
    help="Compare the time of two ways to do the same in one run.\n\nExample: `pivot bench encoder --json bench.json`",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(bench, name="bench")
data = typer.Typer(
    help="Check a recipe's data before training, and make preference rows.\n\nExample: `pivot data check shapes/3-dpo`",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(data, name="data")
evaluation = typer.Typer(
    help="Measure an MLLM on published benchmarks.\n\nExample: `pivot eval vqa runs/shapes/3-dpo --output vqa/dpo`",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(evaluation, name="eval")
# Without a terminal, which has a width, a table keeps each row on one line.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)

JsonPath = Annotated[Path | None, typer.Option("--json", help="Also write the result here as JSON.")]
FeatureLayer = Annotated[
    str | None,
    typer.Option(help="Hidden state: a number, last_hidden_state or merged; by default that of the encoder's config."),
]
Boxes = Annotated[Path | None, typer.Option(help="Folder of YOLO label files or VOC XML files, or a COCO JSON file.")]
Masks = Annotated[Path | None, typer.Option(help="Folder of id masks in PNG format.")]
ClassNames = Annotated[
    Path | None, typer.Option(help="YAML file with the names of ids; by default the one beside the labels.")
]
IgnoredIds = Annotated[str, typer.Option(help="Ids of --masks that are no class, comma-separated.")]
Runs = Annotated[Path, typer.Option(help="Folder of all runs; a stage goes to `RUNS/<folder>/<recipe>`.")]
PackageSource = Annotated[
    str | None,
    typer.Option(
        "--package",
        help="What is installed there: a git URL with its commit, the URL of a wheel, or a requirement; by default "
        "this checkout's commit at its remote.",
    ),
]
RecipeName = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe, as shapes/3-dpo.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes of the recipe: dotted.key=value, as in args.beta=0.2.")
]


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' own messages.")] = False,
) -> None:
    if version:
        out.print(f"pivot_hub {__version__}")
        raise typer.Exit
    if not debug:
        warnings.filterwarnings("ignore")


@contextmanager
def bar(unit: str) -> Iterator[Callable[[int, int | None, float], None]]:
    """Show a progress bar with speed and time left on a terminal, and a line every ten seconds elsewhere.

    The block calls what it is given with the units done, all units or None, and the units per second.
    """
    if sys.stdout.isatty():
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]:.1f} " + unit + "/s"))
        with Progress(TextColumn(unit), *columns, TimeRemainingColumn(), console=out) as progress:
            task = progress.add_task(unit, total=None, speed=0.0)
            yield lambda done, total, speed: progress.update(task, completed=done, total=total, speed=speed)
        return
    last_line = time.monotonic()

    def advance(done: int, total: int | None, speed: float) -> None:
        nonlocal last_line
        if time.monotonic() - last_line > 10:
            last_line = time.monotonic()
            # A run that resumes has no speed until it has done something new.
            left = "" if total is None or not speed else f", {(total - done) / speed:.0f} s left"
            log(f"{done}{'' if total is None else f' of {total}'} {unit}, {speed:.1f}/s{left}")

    yield advance


def show(results: list[ProbeResult], path: Path | None) -> None:
    """Print results with their intervals, and write them if a file is named."""
    for result in results:
        low, high = result.ci95
        log(f"{result.task:28} {result.metric:18} {result.value:6.1f} [{low:.1f}, {high:.1f}]  {result.protocol}")
    if path is not None:
        from pivot_hub.probes.result import write_results

        write_results(path, results)


def numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """Parse the value of an option that takes several numbers, separated by commas."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"{option} {text!r}: give numbers separated by commas.") from None


def is_first() -> bool:
    """Return whether this is the only process, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def log(text: str) -> None:
    """Print text without markup."""
    out.print(text, markup=False)


def warn(text: str) -> None:
    """Print a warning to stderr, so that the command's output stays as it is."""
    print(f"pivot: {text}", file=sys.stderr)


def write(path: Path | None, values: Any) -> None:
    """Write values as JSON if a file is named."""
    if path is not None:
        from pivot_hub.files import write_json

        write_json(path, values)
