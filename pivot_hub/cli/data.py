"""Commands on rows: the check of a recipe's data, and preference rows from labelled photographs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pivot_hub.cli.app import (
    Boxes,
    ClassNames,
    IgnoredIds,
    JsonPath,
    Masks,
    Overrides,
    RecipeName,
    bar,
    data,
    log,
    numbers,
    out,
    write,
)
from pivot_hub.config.data_section import FileData, OnBadRow

if TYPE_CHECKING:
    from pivot_hub.config.recipe import LoadedRecipe
    from pivot_hub.data.report import RowReport


@data.command("check")
def data_check(
    recipe: RecipeName,
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of processes that decode images; one for each core by default.")
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Read every row of a recipe, decode every image, count every token. Nothing is trained and no weight loaded.

    Example: `pivot data check siglip2-so400m/3-dpo --json check.json`
    """
    from pivot_hub.config.recipe import load_recipe
    from pivot_hub.training.reward_guards import form_warning, weighted_names
    from pivot_hub.training.row_check import check_data

    loaded = load_recipe(recipe, overrides or [])
    # The check lists all bad rows, also where training would stop at the first.
    skipping = loaded.recipe.model_copy(update={"on_bad_row": OnBadRow.SKIP})
    with bar("rows") as advance:
        index = check_data(loaded.model_copy(update={"recipe": skipping}), advance=advance, fresh=True, workers=workers)
    report, policy = index.report, loaded.recipe.on_bad_row
    out.print(report.text(), markup=False)
    write(json_path, {"recipe": loaded.name, "on_bad_row": policy, **report.to_dict()})
    for message in _unexpected_sizes(loaded, report):
        log(message)
    if warning := form_warning(weighted_names(loaded.recipe.rewards or ())):
        log(warning)
    if report.skipped_rows and policy is OnBadRow.STOP:
        log("training would stop at the first of these rows: fix them, or set `on_bad_row: skip` in the recipe")
        raise typer.Exit(1)


@data.command("pairs")
def data_pairs(
    photos: Annotated[
        Path, typer.Argument(help="Folder of images; or YOLO's layout, with `images` and `labels` in it.")
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for rows, images and report; one of an earlier run is replaced.")
    ],
    boxes: Boxes = None,
    masks: Masks = None,
    names: ClassNames = None,
    ignore: IgnoredIds = "255",
    questions: Annotated[
        Path | None,
        typer.Option(
            help="JSON, JSONL or Parquet file of multiple-choice questions: image, question, answer, options; with "
            "--policy, options may be missing."
        ),
    ] = None,
    kinds: Annotated[
        str, typer.Option(help="Kinds of questions that labels answer, comma-separated.")
    ] = "presence,count,position,size,box",
    counterfactual: Annotated[
        str,
        typer.Option(
            help="Also make rows with a rejected image, comma-separated: erase (presence, count), crop (presence), "
            "mirror (position), swap (presence)."
        ),
    ] = "",
    inpaint: Annotated[
        bool, typer.Option("--inpaint", help="Fill erased regions by OpenCV's inpainting, not with a blur.")
    ] = False,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub name of an MLLM that answers the questions: a row has a right and a wrong answer of "
            "its own."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="For --policy, number of answers that are sampled for a question.")] = 8,
    temperature: Annotated[float, typer.Option(help="For --policy, temperature of the answers.")] = 1.0,
    written_truth: Annotated[
        bool,
        typer.Option(
            "--written-truth",
            help="For --policy, choose the written right answer where no answer of the MLLM is right.",
        ),
    ] = False,
    batch: Annotated[int, typer.Option(help="For --policy, number of questions in one forward pass.")] = 4,
    dtype: Annotated[str, typer.Option(help="For --policy, type of the weights: float32, float16 or bfloat16.")] = (
        "float32"
    ),
    limit: Annotated[
        int | None,
        typer.Option(
            min=2, help="Number of rows of each kind, with --policy of questions, drawn by the seed; all by default."
        ),
    ] = None,
    validation: Annotated[float, typer.Option(help="Share of the photographs that go to validation.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of the split and of all draws.")] = 0,
    margin: Annotated[
        float,
        typer.Option(help="Points above chance beyond which rows are refused, if a probe of their text reaches them."),
    ] = 5.0,
    allow_priors: Annotated[
        bool, typer.Option("--allow-priors", help="Write rows beyond the margin too, with a line in the report.")
    ] = False,
    on_bad_row: Annotated[
        OnBadRow, typer.Option(help="Raise an error for a bad image, label or question (stop), or skip it.")
    ] = OnBadRow.STOP,
    json_path: JsonPath = None,
) -> None:
    """Make preference rows from photographs with boxes, masks or multiple-choice questions. No model is needed.

    A dpo recipe reads them by `data: [{format: mmpr, path: OUTPUT/train.jsonl, images: OUTPUT}]`.

    Example: `pivot data pairs photos --boxes instances.json --counterfactual erase,mirror --output pairs`; of an MLLM's
    own answers: `pivot data pairs photos --boxes instances.json --policy runs/shapes/2-instruct --output pairs`
    """
    from pivot_hub.data.pairs import PairOptions, write_pairs

    options = PairOptions(
        boxes=boxes,
        masks=masks,
        names=names,
        ignore=numbers("--ignore", ignore, int) if ignore else [],
        questions=questions,
        kinds=kinds.split(",") if kinds else [],
        counterfactuals=counterfactual.split(",") if counterfactual else [],
        inpaint=inpaint,
        limit=limit,
        validation=validation,
        seed=seed,
        margin_pct=margin,
        allow_priors=allow_priors,
        written_truth=written_truth,
        on_bad_row=on_bad_row,
    )
    mllm = None
    if policy is not None:
        from pivot_hub.training.policy_answers import MllmPolicy

        options.check()  # before weights are loaded
        mllm = MllmPolicy(policy, samples, temperature, batch, dtype)
    with bar("edits" if mllm is None else "answers") as advance:
        report = write_pairs(photos, output, options, advance, mllm)
    log(report.text())
    log(f"rows: {output / 'train.jsonl'}")
    write(json_path, report.to_dict())


def _unexpected_sizes(loaded: LoadedRecipe, report: RowReport) -> list[str]:
    """Return a message for each source that has another number of rows than its recipe expects."""
    messages = []
    for number, (spec, source) in enumerate(zip(loaded.recipe.data, report.sources, strict=True)):
        if isinstance(spec, FileData) and spec.expect is not None:
            expected = min(spec.sample or spec.expect.rows, spec.expect.rows)
            if source["rows"] != expected:
                messages.append(f"source {number}: {source['rows']} rows, where the recipe expects {expected}")
    return messages
