"""The command's groups, and what its commands share: options, and ways to print and write."""

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
bench = typer.Typer(
    help="Time one thing against another in one run.\n\nExample: `pivot bench encoder --json bench.json`",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(bench, name="bench")
data = typer.Typer(
    help="Look at a recipe's data before training.\n\nExample: `pivot data check shapes/3-dpo`",
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


@contextmanager
def bar(unit: str) -> Iterator[Callable[[int, int | None, float], None]]:
    """A progress bar with rate and time left on a terminal, a line now and then elsewhere."""
    if sys.stdout.isatty():
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:.1f} " + unit + "/s"))
        with Progress(TextColumn(unit), *columns, TimeRemainingColumn(), console=out) as bar:
            task = bar.add_task(unit, total=None, rate=0.0)
            yield lambda done, total, rate: bar.update(task, completed=done, total=total, rate=rate)
        return
    said = time.monotonic()

    def advance(done: int, total: int | None, rate: float) -> None:
        nonlocal said
        if time.monotonic() - said > 10:
            said = time.monotonic()
            left = "" if total is None else f", {(total - done) / rate:.0f} s left"
            log(f"{done}{'' if total is None else f' of {total}'} {unit}, {rate:.1f}/s{left}")

    yield advance


def show(results: list[ProbeResult], path: Path | None) -> None:
    """Print results with their intervals, and write them where a file is named."""
    for result in results:
        low, high = result.ci95
        log(f"{result.task:28} {result.metric:18} {result.value:6.1f} [{low:.1f}, {high:.1f}]  {result.protocol}")
    if path is not None:
        from pivot_hub.probes.result import write_results

        write_results(path, results)


def numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """The numbers of an option that takes several, with commas between them."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"{option} {text!r}: give numbers with commas between them.") from None


def is_first() -> bool:
    """Whether this is the one process, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def log(text: str) -> None:
    """Print text as it is."""
    out.print(text, markup=False)


def write(path: Path | None, metadata: Any) -> None:
    """Write facts as JSON where a file is named."""
    if path is not None:
        from pivot_hub.files import write_json

        write_json(path, metadata)
