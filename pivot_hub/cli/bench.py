"""`pivot bench`: alternatives timed within one run, and compared by their ratios."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pivot_hub.cli.app import JsonPath, bench, log, numbers, write


@bench.command("shapes")
def bench_shapes(json_path: JsonPath = None) -> None:
    """Measure whether drawing the synthetic Shapes dataset keeps up with training.

    Example: `pivot bench shapes --json bench.json`
    """
    from pivot_hub.bench.synthetic import bench_shapes

    measured = bench_shapes()
    for name, seconds in measured["seconds_per_batch"].items():
        log(f"{name:8} {1000 * seconds:8.1f} ms for a batch of {measured['batch']}")
    log(f"rendering takes {100 * measured['render_share_of_step']:.0f}% of the step's time")
    write(json_path, measured)


@bench.command("train-step")
def bench_train_step(
    recipe: Annotated[str, typer.Argument(help="Recipe of instruct, sft or dpo.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides, dotted.key=value, as for train.")] = None,
    steps: Annotated[int, typer.Option(help="Steps that are timed.")] = 50,
    json_path: JsonPath = None,
) -> None:
    """Compare time and memory of a recipe's steps, at its real shapes with random weights, with the planner's figures.

    Example: `pivot bench train-step siglip2-so400m/3-dpo --json train-step.json`
    """
    from pivot_hub.bench.train_step import bench_train_step
    from pivot_hub.config.recipe import load_recipe

    write(json_path, bench_train_step(load_recipe(recipe, overrides or []), steps, log=log))


@bench.command("loader")
def bench_loader(
    recipe: Annotated[str, typer.Argument(help="Recipe that gives the image size and the time of a step.")] = (
        "siglip2-so400m/2-instruct"
    ),
    rows: Annotated[int, typer.Option(help="Rows of the data set.")] = 512,
    rounds: Annotated[int, typer.Option(help="Passes over the data set.")] = 5,
    json_path: JsonPath = None,
) -> None:
    """Measure whether reading rows keeps up with the GPU that trains on them.

    Example: `pivot bench loader --json loader.json`
    """
    from pivot_hub.bench.loader import bench_loader

    write(json_path, bench_loader(recipe, rows, rounds=rounds, log=log))


@bench.command("encoder")
def bench_encoder(
    encoder: Annotated[
        str, typer.Argument(help="Folder, Hub name, or a size of SigLIP, which gets random weights.")
    ] = "siglip-base-patch16-224",
    batch: Annotated[int, typer.Option(help="Images of one pass.")] = 8,
    rounds: Annotated[int, typer.Option(help="Passes of each form.")] = 5,
    forms: Annotated[
        str | None, typer.Option(help="Comma-separated forms such as native,pivot; all by default.")
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Measure speed and memory of an encoder: native, PivotVisionModel, compiled, bfloat16, ONNX, int8.

    Example: `pivot bench encoder siglip-so400m-patch14-384 --batch 2 --json bench.json`
    """
    from pivot_hub.bench.encoder import FORMS, bench_encoder

    measured = bench_encoder(encoder, batch, rounds, tuple(forms.split(",")) if forms else FORMS, log=log)
    write(json_path, measured)


@bench.command("encode")
def bench_encode(
    encoder: Annotated[
        str, typer.Argument(help="Folder, Hub name, or a size of SigLIP, which gets random weights.")
    ] = "siglip-base-patch16-224",
    photos: Annotated[
        Path | None, typer.Option(help="Folder of photographs; by default noise with the detail of one.")
    ] = None,
    images: Annotated[int, typer.Option(help="Number of files.")] = 128,
    batch: Annotated[int, typer.Option(help="Images of one pass.")] = 16,
    workers: Annotated[int, typer.Option(help="Processes that decode.")] = 2,
    rounds: Annotated[int, typer.Option(help="Rounds in which the ways take turns.")] = 3,
    json_path: JsonPath = None,
) -> None:
    """Measure whether `pivot encode` keeps its model busy, against bare forward passes and a plain loop.

    Example: `pivot bench encode --photos photos --json encode.json`
    """
    from pivot_hub.bench.encode import bench_encode

    write(json_path, bench_encode(encoder, photos, images, batch, workers, rounds, log=log))


@bench.command("space")
def bench_space(
    visitors: Annotated[int, typer.Option(help="Number of simultaneous visitors.")] = 20,
    clicks: Annotated[int, typer.Option(help="Scenes that one client requests, one after the other.")] = 20,
    looks: Annotated[int, typer.Option(help="Further scenes, after which memory is measured again; 0 for none.")] = 0,
    json_path: JsonPath = None,
) -> None:
    """Measure the app: seconds until it is ready, from a click to its image, and with many simultaneous visitors.

    Example: `pivot bench space --json space.json`
    """
    from pivot_hub.bench.space import bench_space

    write(json_path, bench_space(visitors, clicks, looks, log=log))


@bench.command("dpo-step")
def bench_dpo_step(
    size: Annotated[str, typer.Option(help="tiny, tiny-qwen2.5-vl; on a GPU so400m-1.5b, qwen2.5-vl-3b.")] = "tiny",
    batch: Annotated[int, typer.Option(help="Preference pairs of a step.")] = 4,
    rounds: Annotated[int, typer.Option(help="Steps of each variant.")] = 5,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Use gradient checkpointing.")] = False,
    json_path: JsonPath = None,
) -> None:
    """Time a DPO step with TRL's trainer, with each option of PivotDPOTrainer alone, and with all of them.

    Example: `pivot bench dpo-step --size tiny --json dpo-step.json`
    """
    from pivot_hub.bench.dpo_step import bench_dpo_step

    write(json_path, bench_dpo_step(size, batch, rounds, checkpointing, log=log))


@bench.command("grpo-step")
def bench_grpo_step(
    size: Annotated[str, typer.Option(help="tiny, tiny-qwen2.5-vl; on a GPU so400m-1.5b, qwen2.5-vl-3b.")] = "tiny",
    prompts: Annotated[int, typer.Option(help="Prompts of a step.")] = 1,
    generations: Annotated[int, typer.Option(help="Answers of each prompt.")] = 8,
    rounds: Annotated[int, typer.Option(help="Steps of each trainer.")] = 5,
    json_path: JsonPath = None,
) -> None:
    """Time a GRPO step with TRL's trainer and with PivotGRPOTrainer, on the same answers.

    Example: `pivot bench grpo-step --size tiny --json grpo-step.json`
    """
    from pivot_hub.bench.grpo_step import bench_grpo_step

    write(json_path, bench_grpo_step(size, prompts, generations, rounds, log=log))


@bench.command("probe")
def bench_probe(
    images: Annotated[int, typer.Option(help="Rows that are fitted.")] = 50_000,
    width: Annotated[int, typer.Option(help="Width of a feature.")] = 1152,
    classes: Annotated[int, typer.Option(help="Number of classes.")] = 1000,
    cs: Annotated[str, typer.Option(help="Inverse penalties, comma-separated.")] = "0.01,0.03,0.1,0.316,1,3.16",
    tolerance: Annotated[float, typer.Option(help="scikit-learn's tol.")] = 1e-6,
    max_iter: Annotated[int, typer.Option(help="scikit-learn's max_iter.")] = 100,
    kinds: Annotated[str, typer.Option(help="Kinds of features, comma-separated.")] = "random,correlated",
    json_path: JsonPath = None,
) -> None:
    """Compare our logistic regression with scikit-learn's: time, loss and accuracy.

    Example: `pivot bench probe --images 5000 --width 128 --classes 100 --json probe.json`
    """
    from pivot_hub.bench.probe import bench_probe

    penalties = numbers("--cs", cs, float)
    measured = bench_probe(images, width, classes, penalties, tolerance, max_iter, tuple(kinds.split(",")), log=log)
    write(json_path, measured)
