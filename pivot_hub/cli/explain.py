"""Commands that show what models look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pivot_hub.cli.app import JsonPath, app, log, numbers, write
from pivot_hub.errors import RecipeError


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
    overfit: Annotated[
        bool, typer.Option("--overfit", help="Train on this pair alone, by each loss, and draw both on the way.")
    ] = False,
    steps: Annotated[str, typer.Option(help="For --overfit, when to look, comma-separated; 0 is before.")] = "10,20,30",
    learning_rate: Annotated[
        str | None, typer.Option(help="For --overfit, as in 3e-5, or one a loss, as in sft=1e-5,dpo=3e-5.")
    ] = None,
    beta: Annotated[float, typer.Option(help="For --overfit, of the DPO loss.")] = 0.1,
    mask: Annotated[
        Path | None, typer.Option(help="For --overfit, a picture that is black outside of the thing asked about.")
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Draw where an answer, or a loss on it, depends on the image.

    Example: `pivot gradcam runs/shapes/3-dpo scene.png --question "What is it?" --answer "It is a star."`; the paper's
    experiment on one pair: `pivot gradcam runs/shapes/2-instruct scene.png --question "What is it?" --answer
    "It is a star." --rejected "It is a ring." --overfit --json overfit.json`
    """
    from pivot_hub.explain.figure import draw_maps, draw_rows

    if overfit:
        from pivot_hub.explain.overfit_pair import LOSSES, figure_rows, overfit_file

        looked = numbers("--steps", steps, int)
        rates = {} if learning_rate is None else _rates(learning_rate, LOSSES)
        runs, picture, seen, metadata = overfit_file(
            checkpoint, image, question, answer, rejected, looked, rates, beta, mask
        )
        heading = f"{question}\nright: {answer}   wrong: {rejected}"
        heading += "" if seen is None else f"   target: {100 * seen.mean():.0f}% of the image"
        draw_rows(figure_rows(runs, picture, seen), output, heading, rows_per_scale=len(LOSSES))
        for run in runs:
            log(f"{run.loss} loss {run.losses[0]:.4f} -> {run.losses[-1]:.4f} after {max(looked)} steps")
        log(f"figure: {output}")
        write(json_path, metadata)
        return
    from pivot_hub.explain.gradcam import explain_file

    made, picture = explain_file(checkpoint, image, question, answer, explain, rejected, reference)
    draw_maps(picture, [(f"{method} of {explain}", grid) for method, grid in made.maps.items()], output)
    log(f"figure: {output}; {explain} is {made.value:.4f}")
    maps = {method: grid.tolist() for method, grid in made.maps.items()}
    write(json_path, {"explain": explain, "value": made.value, "maps": maps})


def _rates(text: str, losses: Sequence[str]) -> dict[Any, float]:
    """A rate for all losses, or `loss=rate` with commas between them."""
    if "=" not in text:
        return dict.fromkeys(losses, numbers("--learning-rate", text, float)[0])
    rates = dict(part.partition("=")[::2] for part in text.split(","))
    if unknown := [loss for loss in rates if loss not in losses]:
        raise RecipeError(f"--learning-rate {text!r}: {unknown[0]!r} is no loss; it is one of {', '.join(losses)}.")
    return {loss: numbers("--learning-rate", rate, float)[0] for loss, rate in rates.items()}


@app.command()
def space(
    first: Annotated[str, typer.Option(help="An MLLM, shown on the left: a folder.")] = "",
    second: Annotated[str, typer.Option(help="Another, shown on the right.")] = "",
    parent: Annotated[str, typer.Option(help="The parent of both, for the DPO loss.")] = "",
    runs: Annotated[
        Path | None,
        typer.Option(
            help="Folder of checkpoints that visitors may name; its 3-sft and 3-dpo are shown without --first."
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="Where it listens.")] = 7860,
    host: Annotated[str, typer.Option(help="Address it listens at; this machine only by default.")] = "127.0.0.1",
) -> None:
    """Serve the app that shows what DPO changed: one picture under two encoders' maps; the shipped pair by default.

    Example: `pivot space --port 7860`, or `pivot space --runs quickstart/runs/shapes`
    """
    from pivot_hub.demo.launch import names_of_runs, serve
    from pivot_hub.demo.model_bundle import BundleNames

    names = BundleNames(first, second, parent)
    if runs is not None and names == BundleNames():
        names = names_of_runs(runs)
    log(f"http://{host}:{port}")
    serve(names, runs, port, host)


@app.command()
def pair(
    runs: Annotated[Path, typer.Argument(help="Folder with the stages 2-instruct, 3-sft and 3-dpo.")],
    output: Annotated[Path, typer.Argument(help="Folder of the pack; replaced if it exists.")],
) -> None:
    """Pack an SFT and a DPO MLLM with their parent, small enough to ship with the app.

    Example: `pivot pair quickstart/runs/shapes recipes/shapes/pair`
    """
    from pivot_hub.demo.model_bundle import pack_bundle

    folder = pack_bundle(runs, output)
    size = sum(f.stat().st_size for f in folder.iterdir())
    log(f"pair: {folder}, {size / 1e6:.1f} MB")
