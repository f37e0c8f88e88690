"""`pivot bench`: one thing timed against another in one run."""

from __future__ import annotations

from typing import Annotated

import typer

from pivot_hub.cli.app import JsonPath, bench, log, numbers, write


@bench.command("shapes")
def bench_shapes(json_path: JsonPath = None) -> None:
    """Does drawing the built-in world keep up with training?

    Example: `pivot bench shapes --json bench.json`
    """
    from pivot_hub.bench.synthetic import bench_shapes

    measured = bench_shapes()
    for name, seconds in measured["seconds_per_batch"].items():
        log(f"{name:8} {1000 * seconds:8.1f} ms for a batch of {measured['batch']}")
    log(f"drawing takes {100 * measured['render_share_of_step']:.0f}% of the step's time")
    write(json_path, measured)


@bench.command("train-step")
def bench_train_step(
    recipe: Annotated[str, typer.Argument(help="A recipe of instruct, sft or dpo.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value, as for train.")] = None,
    steps: Annotated[int, typer.Option(help="Steps that are timed.")] = 50,
    json_path: JsonPath = None,
) -> None:
    """Time and memory of a recipe's steps at its real shapes, with random weights, beside the planner's figures.

    Example: `pivot bench train-step siglip2-so400m/3-dpo --json train-step.json`
    """
    from pivot_hub.bench.train_step import bench_train_step
    from pivot_hub.config.recipe import load_recipe

    write(json_path, bench_train_step(load_recipe(recipe, overrides or []), steps, log=log))


@bench.command("loader")
def bench_loader(
    recipe: Annotated[str, typer.Argument(help="Whose image size and step time are taken.")] = (
        "siglip2-so400m/2-instruct"
    ),
    rows: Annotated[int, typer.Option(help="Rows of the data set.")] = 512,
    rounds: Annotated[int, typer.Option(help="Passes over it.")] = 5,
    json_path: JsonPath = None,
) -> None:
    """Does reading rows keep up with the GPU that trains on them?

    Example: `pivot bench loader --json loader.json`
    """
    from pivot_hub.bench.loader import bench_loader

    write(json_path, bench_loader(recipe, rows, rounds=rounds, log=log))


@bench.command("encoder")
def bench_encoder(
    encoder: Annotated[
        str, typer.Argument(help="Folder or Hub name, or a size of SigLIP with random weights.")
    ] = "siglip-base-patch16-224",
    batch: Annotated[int, typer.Option(help="Images of one pass.")] = 8,
    rounds: Annotated[int, typer.Option(help="Passes of each form.")] = 5,
    forms: Annotated[str | None, typer.Option(help="Comma-separated, as in native,pivot,onnx; all by default.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Images per second and memory of an encoder: native, ours, compiled, half, ONNX, int8.

    Example: `pivot bench encoder siglip-so400m-patch14-384 --batch 2 --json bench.json`
    """
    from pivot_hub.bench.encoder import FORMS, bench_encoder

    measured = bench_encoder(encoder, batch, rounds, tuple(forms.split(",")) if forms else FORMS, log=log)
    write(json_path, measured)


@bench.command("space")
def bench_space(
    visitors: Annotated[int, typer.Option(help="Clients at once.")] = 20,
    clicks: Annotated[int, typer.Option(help="Scenes one client asks for, one after the other.")] = 20,
    json_path: JsonPath = None,
) -> None:
    """How soon the app is ready, how soon a click has its picture, and how it serves many visitors at once.

    Example: `pivot bench space --json space.json`
    """
    from pivot_hub.bench.space import bench_space

    write(json_path, bench_space(visitors, clicks, log=log))


@bench.command("dpo-step")
def bench_dpo_step(
    size: Annotated[str, typer.Option(help="tiny, or so400m-1.5b for a GPU.")] = "tiny",
    batch: Annotated[int, typer.Option(help="Pairs of a step.")] = 4,
    rounds: Annotated[int, typer.Option(help="Steps of each variant.")] = 5,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="With gradient checkpointing.")] = False,
    json_path: JsonPath = None,
) -> None:
    """A DPO step with stock TRL, with each switch of PivotDPOTrainer alone, and with all.

    Example: `pivot bench dpo-step --size tiny --json dpo-step.json`
    """
    from pivot_hub.bench.dpo_step import bench_dpo_step

    write(json_path, bench_dpo_step(size, batch, rounds, checkpointing, log=log))


@bench.command("probe")
def bench_probe(
    images: Annotated[int, typer.Option(help="Rows that are fitted.")] = 50_000,
    width: Annotated[int, typer.Option(help="Of a feature.")] = 1152,
    classes: Annotated[int, typer.Option(help="Of the rows.")] = 1000,
    cs: Annotated[str, typer.Option(help="Inverse penalties, comma-separated.")] = "0.01,0.03,0.1,0.316,1,3.16",
    tolerance: Annotated[float, typer.Option(help="scikit-learn's tol.")] = 1e-6,
    max_iter: Annotated[int, typer.Option(help="scikit-learn's max_iter.")] = 100,
    kinds: Annotated[str, typer.Option(help="random and correlated features, comma-separated.")] = "random,correlated",
    json_path: JsonPath = None,
) -> None:
    """Our logistic regression against scikit-learn's: time, loss and accuracy.

    Example: `pivot bench probe --images 5000 --width 128 --classes 100 --json probe.json`
    """
    from pivot_hub.bench.probe import bench_probe

    chosen = numbers("--cs", cs, float)
    measured = bench_probe(images, width, classes, chosen, tolerance, max_iter, tuple(kinds.split(",")), log=log)
    write(json_path, measured)
