"""Commands that show which parts of an image a model uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pivot_hub.cli.app import JsonPath, app, bar, log, numbers, out, write
from pivot_hub.errors import RecipeError


@app.command()
def gradcam(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of an MLLM: a finished stage.")],
    image: Annotated[Path | None, typer.Argument(help="Image file; not for --tokens.")] = None,
    question: Annotated[str | None, typer.Option(help="Question about the image.")] = None,
    answer: Annotated[str | None, typer.Option(help="Answer to explain; for dpo and grpo the right one.")] = None,
    rejected: Annotated[str | None, typer.Option(help="Wrong answer, for dpo.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Checkpoint of the parent, for dpo and losses of two images.")
    ] = None,
    explain: Annotated[
        str,
        typer.Option(
            help="Quantity to explain: answer, sft, dpo, or grpo, whose answers are generated and rewarded if right."
        ),
    ] = "answer",
    generations: Annotated[int, typer.Option(help="For grpo, number of answers that are generated at once.")] = 8,
    seed: Annotated[int, typer.Option(help="For grpo, seed of these answers.", min=0)] = 0,
    output: Annotated[Path, typer.Option(help="File that the figure is written to.")] = Path("gradcam.png"),
    overfit: Annotated[
        bool,
        typer.Option(
            "--overfit", help="Train on this question alone, by SFT, DPO, GRPO, and draw the maps on the way."
        ),
    ] = False,
    steps: Annotated[
        str, typer.Option(help="For --overfit, steps after which maps are drawn, comma-separated; 0 is the parent.")
    ] = "10,20,30",
    learning_rate: Annotated[
        str | None,
        typer.Option(
            help="For --overfit, learning rate of all losses, as in 3e-5, or of some, as in sft=1e-5,dpo=3e-5."
        ),
    ] = None,
    beta: Annotated[float, typer.Option(help="For --overfit and --tokens, beta of the losses that compare.")] = 0.1,
    mask: Annotated[
        Path | None, typer.Option(help="For --overfit, an image that is black outside the object of the question.")
    ] = None,
    tokens: Annotated[
        bool,
        typer.Option(
            "--tokens", help="Over many pairs, draw which kinds of words learn from the image, by loss, not where."
        ),
    ] = False,
    loss: Annotated[
        str,
        typer.Option(
            help="For --tokens, losses, comma-separated: sft, dpo, image_sigmoid, image_symmetric, anchor or "
            "module:function."
        ),
    ] = "sft,dpo",
    data: Annotated[
        Path | None,
        typer.Option(
            help="For --tokens, .json, .jsonl or .parquet file of image, question, chosen, rejected and, for losses of "
            "two images, rejected_image; by default pairs of the synthetic Shapes dataset."
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="For --data, folder or archive of the images; by default the folder of the file."),
    ] = None,
    rows: Annotated[int, typer.Option(help="For --tokens, number of rows, from the first on.")] = 200,
    words: Annotated[
        Path | None, typer.Option(help="For --data, YAML file of the words of each kind, as in `colour: [red, green]`.")
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Draw saliency maps: where an answer, or a loss on it, depends on the image.

    Example: `pivot gradcam runs/shapes/3-dpo scene.png --question "What is it?" --answer "It is a star."`; the paper's
    experiment on one preference pair: `pivot gradcam runs/shapes/2-instruct scene.png --question "What is it?" --answer
    "It is a star." --rejected "It is a ring." --overfit --json overfit.json`; which words learn from the image: `pivot
    gradcam runs/shapes/3-dpo --tokens --loss sft,dpo --reference runs/shapes/2-instruct --output words.png`
    """
    if tokens:
        if overfit or image is not None or question is not None or answer is not None:
            raise RecipeError("--tokens reads many pairs: leave out the image, --question, --answer and --overfit.")
        _draw_word_gradients(checkpoint, loss.split(","), data, images, rows, words, reference, beta, output, json_path)
        return
    if image is None or question is None or answer is None:
        raise RecipeError("one answer is explained: give an image, --question and --answer; or give --tokens.")
    if overfit:
        from pivot_hub.explain.overfit_pair import LOSSES, Groups

        step_numbers = numbers("--steps", steps, int)
        learning_rates = {} if learning_rate is None else _learning_rates(learning_rate, LOSSES)
        groups = Groups(answers=generations, seed=seed)
        arguments = (checkpoint, image, question, answer, rejected, step_numbers, learning_rates, beta, mask, groups)
        _draw_overfitting(arguments, output, json_path)
        return
    from pivot_hub.explain.figure import draw_maps
    from pivot_hub.explain.gradcam import explain_file

    explanation, encoder_image, group = explain_file(
        checkpoint, image, question, answer, explain, rejected, reference, generations, seed
    )
    draw_maps(encoder_image, [(f"{method} of {explain}", grid) for method, grid in explanation.maps.items()], output)
    maps = {method: grid.tolist() for method, grid in explanation.maps.items()}
    values = {"explain": explain, "value": explanation.value, "maps": maps}
    if group is None:
        log(f"figure: {output}; {explain} is {explanation.value:.4f}")
    else:
        for (text, reward), count in Counter(zip(group.texts, group.rewards, strict=True)).most_common():
            log(f"{count} x {text!r}, reward {reward:g}")
        log(f"figure: {output}; the mean reward is {group.mean_reward:.4f}")
        values |= {"answers": group.texts, "rewards": group.rewards, "seed": seed}
    write(json_path, values)


def _draw_word_gradients(
    checkpoint: Path,
    losses: Sequence[str],
    data: Path | None,
    images: Path | None,
    rows: int,
    words: Path | None,
    reference: Path | None,
    beta: float,
    output: Path,
    json_path: Path | None,
) -> None:
    """Measure which kinds of words learn from the image; print the table and draw the figure."""
    from pivot_hub.explain.word_gradients import measure_file, table_of
    from pivot_hub.explain.word_gradients_figure import draw_word_gradients

    with bar("rows") as advance:
        results, metadata = measure_file(
            checkpoint, losses, data, images, rows, words, reference, beta, progress=advance
        )
    out.print(table_of(results))
    draw_word_gradients(results, output, f"{metadata['mllm']}, {metadata['rows']} rows: {metadata['data']}")
    log(f"figure: {output}")
    write(json_path, metadata)


def _draw_overfitting(arguments: tuple[Any, ...], output: Path, json_path: Path | None) -> None:
    """Run `overfit_file` on its arguments, and draw the maps of all losses."""
    from pivot_hub.explain.figure import draw_rows
    from pivot_hub.explain.overfit_pair import LOSSES, figure_rows, overfit_file

    _, _, question, answer, rejected, step_numbers, *_ = arguments
    runs, encoder_image, encoder_mask, metadata = overfit_file(*arguments)
    heading = f"{question}\nright: {answer}   wrong: {rejected}"
    if encoder_mask is not None:
        heading += f"   target: {100 * encoder_mask.mean():.0f}% of the image"
    draw_rows(figure_rows(runs, encoder_image, encoder_mask), output, heading, rows_per_scale=len(LOSSES))
    for run in runs:
        name, values = ("mean reward", run.rewards) if run.rewards else ("loss", run.losses)
        log(f"{run.loss} {name} {values[0]:.4f} -> {values[-1]:.4f} after {max(step_numbers)} steps")
        if run.rewards:
            log(f"{run.loss}: {metadata[run.loss]['share_without_gradient']:.0%} of the steps had no gradient")
    log(f"figure: {output}")
    write(json_path, metadata)


def _learning_rates(text: str, losses: Sequence[str]) -> dict[Any, float]:
    """Read one learning rate for all losses, or `loss=learning rate` with commas between them."""
    if "=" not in text:
        return dict.fromkeys(losses, numbers("--learning-rate", text, float)[0])
    values = dict(part.partition("=")[::2] for part in text.split(","))
    unknown = [loss for loss in values if loss not in losses]
    if unknown:
        raise RecipeError(f"--learning-rate {text!r}: {unknown[0]!r} is not a loss; give one of {', '.join(losses)}.")
    return {loss: numbers("--learning-rate", value, float)[0] for loss, value in values.items()}


@app.command()
def space(
    first: Annotated[str, typer.Option(help="Folder of the first MLLM, shown on the left.")] = "",
    second: Annotated[str, typer.Option(help="Folder of the second MLLM, shown on the right.")] = "",
    parent: Annotated[str, typer.Option(help="Folder of the parent of both, for the DPO loss.")] = "",
    runs: Annotated[
        Path | None,
        typer.Option(
            help="Folder of checkpoints that visitors may name; its 3-sft and 3-dpo are shown without --first."
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="Port that the app listens on.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Address that the app listens on; reachable from this machine only by default.")
    ] = "127.0.0.1",
) -> None:
    """Serve the app that shows what DPO changed: saliency maps of two encoders on one image.

    Without --first and --runs it shows the models that ship with the package.

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
    output: Annotated[
        Path, typer.Argument(help="Folder that the model bundle is written to; an existing one is replaced.")
    ],
) -> None:
    """Pack an SFT and a DPO MLLM with their parent into a model bundle, small enough to ship with the app.

    Example: `pivot pair quickstart/runs/shapes recipes/shapes/pair`
    """
    from pivot_hub.demo.packed_bundle import pack_bundle

    folder = pack_bundle(runs, output)
    size = sum(f.stat().st_size for f in folder.iterdir())
    log(f"model bundle: {folder}, {size / 1e6:.1f} MB")
