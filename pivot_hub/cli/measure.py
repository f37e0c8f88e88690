"""Commands that measure encoders and MLLMs, and hold results against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from pivot_hub.cli.app import JsonPath, app, bar, evaluation, log, numbers, out, show, write


@app.command()
def probe(
    encoder: Annotated[str, typer.Argument(help="Folder or Hub name of an encoder.")],
    data: Annotated[
        str, typer.Option(help="`shapes`; a folder, .zip or .tar of class folders; a Hub data set.")
    ] = "shapes",
    protocols: Annotated[
        str, typer.Option(help="For classes, comma-separated: prototypes, fast, full, knn, attention.")
    ] = "prototypes,fast,full,knn",
    revision: Annotated[str | None, typer.Option(help="Of a Hub data set.")] = None,
    seed: Annotated[int, typer.Option(help="Of splits, samples and bootstrap.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, that the encoder computes in.")] = "float32",
    on_bad_row: Annotated[str, typer.Option(help="stop at an image that cannot be decoded, or skip it.")] = "stop",
    cache: Annotated[Path | None, typer.Option(help="Folder of computed features; below HF_HOME by default.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that decode; one a core by default.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Measure a frozen encoder: classification and segmentation of the built-in world, or classes of images.

    Example: `pivot probe hub/pivot/shapes-dpo --data imagenet --json results.json`
    """
    from pivot_hub.probes.run import probe_encoder

    with bar("images") as advance:
        results, skipped = probe_encoder(
            encoder,
            data,
            seed,
            on_bad_row,
            protocols=tuple(protocols.split(",")),
            revision=revision,
            dtype=dtype,
            cache=cache,
            workers=workers,
            progress=advance,
        )
    for reason in skipped:
        log(f"left out: {reason}")
    show(results, json_path)


@app.command()
def compare(
    encoders: Annotated[
        list[str],
        typer.Argument(
            help="Two or more: folders, Hub names, files that `--json` of a probe wrote, or folders of such files, one "
            "a training seed, as a study's results are."
        ),
    ],
    data: Annotated[str, typer.Option(help="For encoders, as for `pivot probe`.")] = "shapes",
    protocols: Annotated[str, typer.Option(help="For encoders, as for `pivot probe`.")] = "prototypes,fast,full,knn",
    seed: Annotated[int, typer.Option(help="Of splits, samples and bootstrap.")] = 0,
    draws: Annotated[int, typer.Option(help="Of the paired bootstrap.")] = 10_000,
    figure: Annotated[Path | None, typer.Option(help="Draw the differences here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table here.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Which encoder is better, on the same test items; each is compared with the first.

    Example: `pivot compare hub/pivot/shapes-sft hub/pivot/shapes-dpo --figure compare.png`
    """
    from pivot_hub.files import write_whole
    from pivot_hub.probes.run import probe_all
    from pivot_hub.probes.significance import compare_results, compare_seeds, draw_comparisons, read_seeds

    if seeds := read_seeds(encoders):
        made = compare_seeds(seeds, draws, seed)
    else:
        with bar("images") as advance:
            measured = probe_all(encoders, data, seed, tuple(protocols.split(",")), progress=advance)
        made = compare_results(measured, draws, seed)
    out.print(made.table())
    log(made.method())
    if markdown:
        write_whole(markdown, made.markdown())
    if figure:
        draw_comparisons(made, figure)
    write(json_path, made.to_dict())


@app.command()
def localize(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of an MLLM: a finished stage.")],
    data: Annotated[Path, typer.Option(help="A folder of photos; with `images` and `labels` in it, YOLO's layout.")],
    boxes: Annotated[Path | None, typer.Option(help="A folder of YOLO label files, or a COCO JSON file.")] = None,
    masks: Annotated[Path | None, typer.Option(help="A folder of id masks, PNG.")] = None,
    names: Annotated[
        Path | None, typer.Option(help="YAML with the names of ids; else looked for by the labels.")
    ] = None,
    ignore: Annotated[str, typer.Option(help="For --masks, ids that are no class, comma-separated.")] = "255",
    explain: Annotated[str, typer.Option(help="Some of answer, sft, dpo, comma-separated.")] = "answer",
    reference: Annotated[Path | None, typer.Option(help="The parent's checkpoint, for dpo.")] = None,
    question: Annotated[str, typer.Option(help="Template of the question.")] = "Is there {article} {name}?",
    answer: Annotated[str, typer.Option(help="Template of the right answer.")] = "Yes, there is {article} {name}.",
    rejected: Annotated[str, typer.Option(help="Template of the wrong one, for dpo.")] = "No, there is no {name}.",
    limit: Annotated[int | None, typer.Option(help="How many photos, drawn by the seed; all by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of the split, the bootstrap and random weights.")] = 0,
    on_bad_row: Annotated[str, typer.Option(help="stop at a bad photo or label, or skip the photo.")] = "stop",
    name: Annotated[
        str | None, typer.Option(help="Of the encoder in the results; the checkpoint's by default.")
    ] = None,
    random_vision: Annotated[
        bool, typer.Option("--random-vision", help="First give the vision tower random weights: the floor.")
    ] = False,
    json_path: JsonPath = None,
) -> None:
    """Score an MLLM's gradient maps against boxes or masks of photos: pointing game, energy inside, IoU.

    Example: `pivot localize runs/shapes/3-sft --data photos --boxes labels --names data.yaml --json results.json`
    """
    from pivot_hub.probes.localization.gradient_maps import Wording, localize_folder

    results, left_out = localize_folder(
        checkpoint,
        data,
        boxes,
        masks,
        names,
        numbers("--ignore", ignore, int) if ignore else [],
        explain.split(","),
        reference,
        Wording(question, answer, rejected),
        limit,
        seed,
        on_bad_row,
        name,
        random_vision,
    )
    if left_out:
        log(f"{len(left_out)} photos or targets left out, the first: {left_out[0]}")
    show(results, json_path)


@app.command()
def segment(
    encoder: Annotated[str, typer.Argument(help="Folder or Hub name of an encoder.")],
    data: Annotated[str, typer.Option(help="Images with masks: a folder, a .zip or .tar, or a Hub data set.")],
    masks: Annotated[Path | None, typer.Option(help="The masks, where --data holds the images alone.")] = None,
    ignore: Annotated[str | None, typer.Option(help="Ids that count nowhere, as in 255,0; 255 by default.")] = None,
    classes: Annotated[int | None, typer.Option(help="How many ids there are; by default what the masks hold.")] = None,
    names: Annotated[Path | None, typer.Option(help="Names of ids: .txt, .json or .yaml.")] = None,
    heads: Annotated[str, typer.Option(help="linear, mlp (2 layers), or both.")] = "linear,mlp",
    image_px: Annotated[str | None, typer.Option(help="Sizes of images, as in 384,512; the encoder's own.")] = None,
    seed: Annotated[int, typer.Option(help="Of the split, the heads and the bootstrap.")] = 0,
    on_bad_row: Annotated[str, typer.Option(help="stop at a file that cannot be used, or skip it.")] = "stop",
    cache: Annotated[
        Path | None, typer.Option(help="Keep the tokens here, so that a stopped run goes on; else they are temporary.")
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Measure a frozen encoder by the classes of pixels: mIoU, pixel accuracy and recall of heads on its patch tokens.

    Beside the JSON go the tallies of images (.npz) and the scores of single classes (.classes.json).

    Example: `pivot segment hub/pivot/shapes-dpo --data ADEChallengeData2016 --image-px 384,512 --json ade20k.json`
    """
    import torch

    from pivot_hub.encoder.repository import check_golden, encoder_metadata, read_encoder
    from pivot_hub.files import write_json
    from pivot_hub.probes.segmentation.labelled_masks import open_masks, read_names
    from pivot_hub.probes.segmentation.protocols import cached_encode, per_class, segment_masks

    ignored = None if ignore is None else numbers("--ignore", ignore, int) if ignore else []
    sizes = None if image_px is None else numbers("--image-px", image_px, int)
    known = None if names is None else read_names(names)
    found = open_masks(data, masks, seed, on_bad_row)
    model, image_processor = read_encoder(encoder)
    check_golden(encoder, model)
    cast(torch.nn.Module, model).to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    metadata = encoder_metadata(encoder)
    with bar("images") as advance:
        results, skipped = segment_masks(
            model,
            image_processor,
            found,
            conditions={**metadata, "feature_layer": model.config.pivot["feature_layer"]},
            ignore_ids=ignored,
            classes=classes,
            names=known,
            heads=heads.split(","),
            image_px=sizes,
            seed=seed,
            on_bad_row=on_bad_row,
            encode=None if cache is None else cached_encode(model, image_processor, metadata, cache, advance),
            log=log,
        )
    if skipped:
        log(f"{len(skipped)} files skipped, the first: {skipped[0]}")
    show(results, json_path)
    if json_path is not None:
        scores = {
            r.task: per_class(r.example_scores, known or found.names) for r in results if r.example_scores is not None
        }
        write_json(json_path.with_suffix(".classes.json"), {"skipped": skipped, "classes": scores})


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

    show(probe_language(language, seed=seed), json_path)


@evaluation.command("vqa")
def eval_vqa(
    mllm: Annotated[Path, typer.Argument(help="Folder of an MLLM: a finished stage.")],
    output: Annotated[Path, typer.Option(help="Folder of the results, of one MLLM; run again to go on.")] = Path("vqa"),
    tasks: Annotated[
        str | None, typer.Option(help="Comma-separated, as in gqa,mmvp; the paper's 16 by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task, for a trial; never averaged.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions of one pass.")] = 8,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16, to compute in.")] = "float32",
    include_path: Annotated[Path | None, typer.Option(help="A folder with lmms-eval task files of your own.")] = None,
    python: Annotated[
        Path | None, typer.Option(help="Python with lmms-eval; by default $PIVOT_LMMS_PYTHON, else this one.")
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Run the paper's 16 VQA benchmarks through lmms-eval and average them by group; finished tasks are not run again.

    Example: `pivot eval vqa runs/siglip2-so400m/3-dpo --output vqa/dpo --dtype bfloat16`
    """
    from pivot_hub.probes.vqa.lmms_eval import evaluate_vqa

    names = [t.strip() for t in tasks.split(",")] if tasks else []
    made = evaluate_vqa(mllm, output, names, limit, batch_size, dtype, include_path, python, log=log)
    out.print(made.table())
    for sentence in made.refused:
        log(sentence)
    log(f"results: {output / 'results.json'}")
    write(json_path, made.to_dict())
