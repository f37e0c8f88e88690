"""Commands that measure encoders and MLLMs, and compare results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from pivot_hub.cli.app import (
    Boxes,
    ClassNames,
    FeatureLayer,
    IgnoredIds,
    JsonPath,
    Masks,
    app,
    bar,
    evaluation,
    log,
    numbers,
    out,
    show,
    warn,
    write,
)
from pivot_hub.config.data_section import OnBadRow


@app.command()
def probe(
    encoder: Annotated[str, typer.Argument(help="Folder, Hub name or short name (`pivot list`) of an encoder.")],
    data: Annotated[
        str, typer.Option(help="`shapes`; a folder, .zip or .tar of class folders; Parquet; a Hub data set.")
    ] = "shapes",
    protocols: Annotated[
        str, typer.Option(help="For class data, comma-separated: prototypes, fast, full, knn, attention.")
    ] = "prototypes,fast,full,knn",
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub data set.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of splits, samples and bootstrap.")] = 0,
    dtype: Annotated[str, typer.Option(help="Type that the encoder computes in: float32 or bfloat16.")] = "float32",
    on_bad_row: Annotated[
        OnBadRow, typer.Option(help="Raise an error for an image that cannot be decoded (stop), or skip it.")
    ] = OnBadRow.STOP,
    cache: Annotated[Path | None, typer.Option(help="Folder of cached features; below HF_HOME by default.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode images; one per core by default.")
    ] = None,
    feature_layer: FeatureLayer = None,
    json_path: JsonPath = None,
) -> None:
    """Measure a frozen encoder on the synthetic Shapes dataset, or on classes of images.

    Example: `pivot probe hub/pivot/shapes-dpo --data imagenet --json results.json`

    On 8 GPUs, which divide the images: `torchrun --nproc-per-node 8 -m pivot_hub probe ENCODER --data imagenet`
    """
    from pivot_hub.encoder.image_shapes import parse_layer
    from pivot_hub.encoder.share import find_share
    from pivot_hub.probes.features import EncodingOptions
    from pivot_hub.probes.run import probe_encoder

    share = find_share(None)
    with bar("images") as advance:
        results, skipped = probe_encoder(
            encoder,
            data,
            seed,
            on_bad_row,
            protocols=tuple(protocols.split(",")),
            revision=revision,
            encoding=EncodingOptions(dtype, cache, workers=workers, progress=advance, share=share),
            warn=warn,
            feature_layer=parse_layer(feature_layer),
        )
    if share.number > 1:
        return
    for reason in skipped:
        log(f"left out: {reason}")
    show(results, json_path)


@app.command()
def compare(
    encoders: Annotated[
        list[str],
        typer.Argument(
            help="Two or more encoders: folders, Hub names, files that `--json` of a probe wrote, or folders with one "
            "such file for each training seed, as a study writes them."
        ),
    ],
    data: Annotated[str, typer.Option(help="Data to probe encoders on, as for `pivot probe`.")] = "shapes",
    protocols: Annotated[str, typer.Option(help="Protocols, as for `pivot probe`.")] = "prototypes,fast,full,knn",
    seed: Annotated[int, typer.Option(help="Seed of splits, samples and bootstrap.")] = 0,
    draws: Annotated[int, typer.Option(min=1, max=1_000_000, help="Number of draws of the paired bootstrap.")] = 10_000,
    figure: Annotated[Path | None, typer.Option(help="Draw the differences here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table here.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Compare encoders with the first one on the same test items, to find out which is better.

    Example: `pivot compare hub/pivot/shapes-sft hub/pivot/shapes-dpo --figure compare.png`
    """
    from pivot_hub.files import write_whole
    from pivot_hub.probes.run import probe_all
    from pivot_hub.probes.significance import compare_results, compare_seeds, draw_comparisons, read_seeds

    if seeds := read_seeds(encoders):
        comparisons = compare_seeds(seeds, draws, seed)
    else:
        with bar("images") as advance:
            results = probe_all(encoders, data, seed, tuple(protocols.split(",")), progress=advance, warn=warn)
        comparisons = compare_results(results, draws, seed)
    out.print(comparisons.table())
    log(comparisons.method())
    if markdown:
        write_whole(markdown, comparisons.markdown())
    if figure:
        draw_comparisons(comparisons, figure)
    write(json_path, comparisons.to_dict())


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="Model before training: folder or Hub name of an MLLM or an encoder.")],
    b: Annotated[str, typer.Argument(help="Model after training: folder or Hub name of an MLLM or an encoder.")],
    images: Annotated[
        Path | None, typer.Option(help="Compare the features of images of this folder too, layer by layer.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of images, the first ones by name.")] = 64,
    figure: Annotated[Path | None, typer.Option(help="Draw the change of each block here.")] = None,
    revision_a: Annotated[str | None, typer.Option(help="Revision of the first Hub repository.")] = None,
    revision_b: Annotated[str | None, typer.Option(help="Revision of the second Hub repository.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Compare the vision towers of two models, to find out whether training moved the tower, and in which blocks.

    Example: `pivot diff Qwen/Qwen2.5-VL-3B-Instruct my-finetune --images photos --figure diff.png`
    """
    from pivot_hub.mllm.diff import diff_towers
    from pivot_hub.mllm.diff_figure import draw_diff

    with bar("images") as advance:
        towers = diff_towers(a, b, images, revision_a, revision_b, limit, progress=advance)
    log(towers.summary())
    if not towers.frozen:
        out.print(towers.table())
    if towers.features is not None:
        for reason in towers.features.skipped:
            log(f"left out: {reason}")
        out.print(towers.features.table())
    log(towers.method())
    if figure:
        draw_diff(towers, figure)
        log(f"figure: {figure}")
    write(json_path, towers.to_dict())


@app.command()
def localize(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of an MLLM: a finished stage.")],
    data: Annotated[Path, typer.Option(help="Folder of images; or YOLO's layout, with `images` and `labels` in it.")],
    boxes: Boxes = None,
    masks: Masks = None,
    names: ClassNames = None,
    ignore: IgnoredIds = "255",
    explain: Annotated[str, typer.Option(help="One or more of answer, sft, dpo, comma-separated.")] = "answer",
    reference: Annotated[Path | None, typer.Option(help="Checkpoint of the parent, for dpo.")] = None,
    question: Annotated[str, typer.Option(help="Template of the question.")] = "Is there {article} {name}?",
    answer: Annotated[str, typer.Option(help="Template of the right answer.")] = "Yes, there is {article} {name}.",
    rejected: Annotated[str, typer.Option(help="Template of the wrong answer, for dpo.")] = "No, there is no {name}.",
    limit: Annotated[int | None, typer.Option(help="Number of images, drawn by the seed; all by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split, the bootstrap and random weights.")] = 0,
    on_bad_row: Annotated[
        OnBadRow, typer.Option(help="Raise an error for a bad image or label (stop), or skip the image.")
    ] = OnBadRow.STOP,
    name: Annotated[
        str | None, typer.Option(help="Name of the encoder in the results; the checkpoint's by default.")
    ] = None,
    random_vision: Annotated[
        bool, typer.Option("--random-vision", help="Give the vision tower random weights first, to measure the floor.")
    ] = False,
    json_path: JsonPath = None,
) -> None:
    """Score an MLLM's gradient maps against boxes or masks of images: pointing game, energy inside, IoU.

    Example: `pivot localize runs/shapes/3-sft --data images --boxes labels --names data.yaml --json results.json`
    """
    from pivot_hub.probes.localization.gradient_maps import LabelFiles, Wording, localize_folder

    ignored = numbers("--ignore", ignore, int) if ignore else []
    results, left_out = localize_folder(
        checkpoint,
        data,
        LabelFiles(boxes, masks, names, ignored, on_bad_row),
        explain.split(","),
        reference,
        Wording(question, answer, rejected),
        limit,
        seed,
        name,
        random_vision,
    )
    if left_out:
        log(f"{len(left_out)} images or targets left out, the first: {left_out[0]}")
    show(results, json_path)


@app.command()
def segment(
    encoder: Annotated[str, typer.Argument(help="Folder, Hub name or short name (`pivot list`) of an encoder.")],
    data: Annotated[str, typer.Option(help="Images with masks: a folder, a .zip or .tar, or a Hub data set.")],
    masks: Annotated[Path | None, typer.Option(help="The masks, if --data contains only the images.")] = None,
    ignore: Annotated[
        str | None, typer.Option(help='Ids that are never counted, as in 255,0; 255 by default, "" for none.')
    ] = None,
    classes: Annotated[int | None, typer.Option(help="Number of ids; by default found in the masks.")] = None,
    names: Annotated[Path | None, typer.Option(help="File with the names of ids: .txt, .json or .yaml.")] = None,
    heads: Annotated[str, typer.Option(help="linear, mlp (2 layers), or both.")] = "linear,mlp",
    image_px: Annotated[
        str | None,
        typer.Option(help="Image sizes, as in 384,512; by default the encoder's own, or 32 patches a side."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split, the heads and the bootstrap.")] = 0,
    on_bad_row: Annotated[
        OnBadRow, typer.Option(help="Raise an error for a file that cannot be used (stop), or skip it.")
    ] = OnBadRow.STOP,
    cache: Annotated[
        Path | None,
        typer.Option(help="Keep the tokens in this folder, so that a stopped run resumes; temporary by default."),
    ] = None,
    feature_layer: FeatureLayer = None,
    json_path: JsonPath = None,
) -> None:
    """Measure a frozen encoder by segmentation: mIoU, pixel accuracy and recall of heads on its patch tokens.

    The per-example scores (.npz) and the scores of single classes (.classes.json) are written beside the JSON.

    Example: `pivot segment hub/pivot/shapes-dpo --data ADEChallengeData2016 --image-px 384,512 --json ade20k.json`
    """
    import torch

    from pivot_hub.config.encoder_names import resolve_encoder
    from pivot_hub.encoder.device import compute_device
    from pivot_hub.encoder.image_shapes import parse_layer
    from pivot_hub.encoder.repository import encoder_metadata, read_encoder
    from pivot_hub.files import write_json
    from pivot_hub.probes.segmentation.labelled_masks import open_masks, read_names
    from pivot_hub.probes.segmentation.protocols import SegmentationOptions, cached_encode, per_class, segment_masks

    ignored = None if ignore is None else numbers("--ignore", ignore, int) if ignore else []
    sizes = None if image_px is None else numbers("--image-px", image_px, int)
    given_names = None if names is None else read_names(names)
    opened = open_masks(data, masks, seed, on_bad_row)
    encoder = resolve_encoder(encoder)
    model, image_processor = read_encoder(encoder, feature_layer=parse_layer(feature_layer))
    cast(torch.nn.Module, model).to(compute_device())
    metadata = encoder_metadata(encoder)
    with bar("images") as advance:
        results, skipped = segment_masks(
            model,
            image_processor,
            opened,
            conditions={**metadata, "feature_layer": model.config.pivot["feature_layer"]},
            options=SegmentationOptions(
                ignored, classes, given_names, heads.split(","), sizes, seed=seed, on_bad_row=on_bad_row
            ),
            encode=None if cache is None else cached_encode(model, image_processor, metadata, cache, advance),
            log=log,
        )
    if skipped:
        log(f"{len(skipped)} files skipped, the first: {skipped[0]}")
    show(results, json_path)
    if json_path is not None:
        scores = {
            r.task: per_class(r.example_scores, given_names or opened.names)
            for r in results
            if r.example_scores is not None
        }
        write_json(json_path.with_suffix(".classes.json"), {"skipped": skipped, "classes": scores})


@app.command()
def read(
    language: Annotated[str, typer.Argument(help="Folder or Hub name of a causal language model.")],
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    json_path: JsonPath = None,
) -> None:
    """Measure what a language model reads of scenes of the synthetic Shapes dataset in words, before it sees any.

    Example: `pivot read recipes/shapes/base/language`
    """
    from pivot_hub.probes.run import probe_language

    show(probe_language(language, seed=seed), json_path)


@evaluation.command("vqa")
def eval_vqa(
    mllm: Annotated[Path, typer.Argument(help="Folder of an MLLM: a finished stage.")],
    output: Annotated[Path, typer.Option(help="Folder for the results of one MLLM; run again to resume.")] = Path(
        "vqa"
    ),
    tasks: Annotated[
        str | None, typer.Option(help="Tasks, comma-separated, as in gqa,mmvp; the paper's 16 by default.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Number of questions per task, for a trial; never averaged.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Number of questions in one pass.")] = 8,
    dtype: Annotated[str, typer.Option(help="Type to compute in: float32, float16 or bfloat16.")] = "float32",
    include_path: Annotated[Path | None, typer.Option(help="Folder with your own lmms-eval task files.")] = None,
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
    results = evaluate_vqa(mllm, output, names, limit, batch_size, dtype, include_path, python, log=log)
    out.print(results.table())
    for reason in results.refused:
        log(reason)
    log(f"results: {output / 'results.json'}")
    write(json_path, results.to_dict())
