"""Commands that extract an encoder from a checkpoint, use it, and publish it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from pivot_hub.cli.app import JsonPath, PackageSource, app, bar, log, write
from pivot_hub.errors import CardError, PublishError, RecipeError


@app.command()
def extract(
    mllm: Annotated[str, typer.Argument(help="Folder of a finished stage; folder or Hub name of any MLLM.")],
    output: Annotated[Path, typer.Argument(help="Folder of the encoder repository; an earlier one is replaced.")],
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub repository.")] = None,
    compare_with_base: Annotated[
        bool,
        typer.Option(help="Compare the vision tower with that of the base model that the card of the MLLM names."),
    ] = True,
    json_path: JsonPath = None,
) -> None:
    """Take the encoder out of an MLLM and write it in its native format; only its own weights are read.

    Example: `pivot extract Qwen/Qwen2.5-VL-7B-Instruct qwen-encoder`
    """
    from pivot_hub.mllm.extract import extract_encoder

    started = time.monotonic()
    with bar("MB") as advance:

        def show_bytes(done: int, total: int) -> None:
            seconds = max(time.monotonic() - started, 1e-3)
            advance(done // 1_000_000, total // 1_000_000, done / 1e6 / seconds)

        folder = extract_encoder(
            mllm, output, revision=revision, progress=show_bytes, compare_with_base=compare_with_base, log=log
        )
    log(f"encoder: {folder}; {_how_to_load(folder)}")
    write(json_path, {"encoder": str(folder), "files": sorted(p.name for p in folder.iterdir())})


@app.command()
def verify(
    encoder: Annotated[str, typer.Argument(help="Folder of an encoder repository, its Hub name or its short name.")],
    json_path: JsonPath = None,
) -> None:
    """Check a repository: hashes, keys, golden vectors, no foreign code, no unexpected file, and the card's numbers.

    Example: `pivot verify hub/pivot/shapes-dpo`
    """
    from pivot_hub.config.encoder_names import resolve_encoder
    from pivot_hub.encoder.repository import bystanders
    from pivot_hub.publish.pull import fetch, published_problems, repository_problems

    name = resolve_encoder(encoder)
    folder = Path(name)
    if folder.exists():
        with_card = (folder / "README.md").is_file()  # an encoder has no card before `pivot card`
        problems = published_problems(folder) if with_card else repository_problems(folder)
    else:
        folder = fetch(name, log=log)
        problems = published_problems(folder)
    for problem in problems:
        log(problem)
    write(json_path, {"encoder": encoder, "problems": problems})
    if problems:
        raise typer.Exit(1)
    passed_over = bystanders(folder)
    others = f"; {len(passed_over)} files of git, the Hub's client or a file manager passed over" if passed_over else ""
    log(f"{encoder}: sound: undamaged and with no code but this package's{others}. A hash is no signature: it does not")
    log("show who wrote the repository.")


@app.command()
def card(
    encoder: Annotated[Path | None, typer.Argument(help="Folder of an encoder repository.")] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="Results to add; the names base.json, sft.json and dpo.json become column headings."),
    ] = None,
    prose: Annotated[str | None, typer.Option(help="Prose of the card: a YAML file, or a name of model_cards.")] = None,
    repository: Annotated[str | None, typer.Option(help="Name on the Hub, where it differs from the prose's.")] = None,
    all_cards: Annotated[
        bool, typer.Option("--all", help="Render all cards of model_cards/ in the source checkout.")
    ] = False,
    quickstart: Annotated[
        Path | None,
        typer.Option(help="With --all, folder of a finished quickstart; its results are recorded first."),
    ] = None,
) -> None:
    """Write results and the card rendered from them into an encoder repository; an error names what is missing.

    Example: `pivot card hub/pivot/mine --prose mine.yaml --results sft.json --results dpo.json`
    """
    from dataclasses import replace

    from pivot_hub.probes.result import read_results
    from pivot_hub.publish.card_collection import write_all_cards
    from pivot_hub.publish.extracted_card import choose_prose
    from pivot_hub.publish.staging import write_card

    if all_cards:
        if encoder or results or prose or repository:
            raise CardError("card --all takes no other argument than --quickstart FOLDER.")
        changed = write_all_cards(quickstart)
        log(f"cards changed: {', '.join(changed) or 'none'}")
        return
    if encoder is None or quickstart is not None:
        raise CardError("card takes the folder of an encoder repository, or --all [--quickstart FOLDER].")
    by_name = {f.stem: [replace(r, encoder=f.stem) for r in read_results(f)] for f in results or []}
    is_changed = write_card(encoder, choose_prose(encoder, prose, repository), repository, by_name or None)
    log(f"card: {encoder / 'README.md'}{'' if is_changed else ', unchanged'}")


@app.command()
def push(
    targets: Annotated[
        list[str],
        typer.Argument(help="ENCODER REPO: a folder, and owner/name. With --space: Hub names, the Space's last."),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Publish without asking.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Create a new repository as private.")] = False,
    also: Annotated[str | None, typer.Option(help="Exports to add, comma-separated: onnx, int8.")] = None,
    prose: Annotated[str | None, typer.Option(help="Prose of the card: a YAML file, or a name of model_cards.")] = None,
    space: Annotated[
        bool, typer.Option("--space", help="Publish the app; with two or more MLLMs it starts with them.")
    ] = False,
    static: Annotated[
        bool,
        typer.Option(
            "--static",
            help="With --space: publish the page without a server, over two encoders pushed with --also onnx.",
        ),
    ] = False,
    package: PackageSource = None,
    collection: Annotated[
        str | None, typer.Option(help="Title of a collection for the SFT, the DPO and the base encoder.")
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Publish an encoder with its card: show what will change, ask, and make one commit with the version's tag.

    Example: `pivot push hub/pivot/shapes-dpo me/shapes-dpo --also onnx --private`; the app over published encoders:
    `pivot push me/shapes-sft me/shapes-dpo me/gradcam --space`; the page without a server:
    `pivot push me/shapes-sft me/shapes-dpo me/page --space --static`
    """
    from pivot_hub.package_source import package_requirement
    from pivot_hub.publish.extracted_card import choose_prose
    from pivot_hub.publish.push import add_to_collection, plan_push
    from pivot_hub.publish.push import push as carry_out
    from pivot_hub.publish.remote import check_exports, find_mllms
    from pivot_hub.publish.staging import stage_encoder, stage_space, stage_static_space

    if len(targets) < 2 or (len(targets) > 2 and not space):
        raise PublishError("push takes ENCODER REPO, or ENCODER ... SPACE with --space.", exit_code=2)
    if static and not (space and len(targets) == 3):
        raise PublishError("push --static takes LEFT RIGHT SPACE with --space.", exit_code=2)
    if package is not None and (static or not space):
        raise PublishError("--package is what the app of push --space installs; leave it out.", exit_code=2)
    repo = targets[-1]
    if static:
        left, right = targets[:-1]
        staged = stage_static_space(repo, left, right, check_exports([left, right]))
    elif space:
        requirement = package_requirement(package, extra="space")
        staged = stage_space(repo, targets[:-1], requirement, find_mllms(targets[:-1]))
    else:
        card_prose = choose_prose(targets[0], prose, repo)
        staged = stage_encoder(targets[0], repo, card_prose, also.split(",") if also else (), log)
    with staged as publication:
        plan = plan_push(publication, private)
        log(plan.text())
        if plan.changes and not yes:
            if not sys.stdin.isatty():
                raise PublishError("no terminal to confirm on: check the changes above, and add --yes.", exit_code=2)
            typer.confirm("Publish this?", abort=True)
        result = carry_out(plan, log=log)
        report = plan.to_dict() | {"commit": result.commit, "url": result.url, "kind": result.kind}
        if collection is not None:
            report["collection"], members = add_to_collection(collection, publication, private)
            log(f"collection: {report['collection']} with {', '.join(members)}")
    write(json_path, report)
    log(f"{repo}: {result.kind} {result.commit[:8]}, {result.url}")


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(help="Name on the Hub, or short name.")],
    output: Annotated[Path | None, typer.Argument(help="Folder of the repository; hub/REPO by default.")] = None,
    revision: Annotated[str | None, typer.Option(help="A tag, branch or commit; the newest by default.")] = None,
) -> None:
    """Download an encoder repository; it appears once its hashes, golden vectors and card were checked.

    Example: `pivot pull pivot/shapes-dpo --revision v0.1.0`
    """
    from pivot_hub.publish.pull import pull as download

    folder = download(repo, output or Path("hub") / repo, revision, log=log)
    log(f"encoder: {folder}; {_how_to_load(folder)}")


@app.command()
def encode(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="A folder of images; a .zip or .tar; a pattern of shards; Parquet; a Hub data set; a .txt of paths; "
            "or - for stdin. With --merge, folders that encode wrote.",
        ),
    ],
    encoder: Annotated[
        str | None, typer.Option(help="Folder, Hub name or short name (`pivot list`) of an encoder.")
    ] = None,
    out_path: Annotated[
        Path, typer.Option("--out", help="File of the features, .parquet or .npy, or a folder of Parquet parts.")
    ] = Path("features.parquet"),
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Write all patch tokens of an image, not their mean.")
    ] = False,
    batch: Annotated[int, typer.Option(help="Images in one forward pass.")] = 32,
    dtype: Annotated[str, typer.Option(help="Type to compute in: float32, float16 or bfloat16.")] = "float32",
    store: Annotated[
        str | None, typer.Option(help="Type to store: float32, float16, bfloat16 or int8; that of --dtype by default.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that decode images; one for each core by default.")
    ] = None,
    feature_layer: Annotated[
        str | None,
        typer.Option(
            help="Hidden state: a number, last_hidden_state or merged; several as in -2,-5; by default that of the "
            "encoder's config."
        ),
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="Encode one of n shares, as in 1/8; torchrun and accelerate need no option.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Encode on a Ray cluster: auto, host:port, or local to start one here."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Join folders that encode wrote, into a folder or a file.")
    ] = False,
    image_column: Annotated[str | None, typer.Option(help="Column of the images in tables.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Column of the ids in tables.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a data set; all by default.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub data set.")] = None,
) -> None:
    """Compute features of every image of a source; a stopped run resumes, and corrupt images are listed.

    Exits with 1 if a part of the source could not be read, or shares that are joined lack blocks; what could be read is
    written, and the same command completes it.

    Example: `pivot encode images --encoder hub/pivot/shapes-dpo --out features.parquet`

    The first of 8 jobs: `pivot encode "shards-{000..099}.tar" --encoder hub/pivot/shapes-dpo --out all --shard 1/8`
    """
    from pivot_hub.data.image_blocks import SourceOptions
    from pivot_hub.encoder.encode import encode_source
    from pivot_hub.encoder.image_shapes import parse_layer
    from pivot_hub.encoder.merge import merge_features
    from pivot_hub.encoder.share import find_share

    if merge:
        report = merge_features([Path(source) for source in sources], out_path)
    else:
        if encoder is None or len(sources) != 1:
            raise RecipeError("give one source and --encoder; or --merge and the folders to join.")
        texts = feature_layer.split(",") if feature_layer else []
        layers = [layer for text in texts if (layer := parse_layer(text)) is not None] or None
        options = SourceOptions(image_column, id_column, split, revision)
        share = find_share(shard)
        with bar("images") as advance:
            report = encode_source(
                encoder,
                sources[0],
                out_path,
                tokens,
                batch,
                dtype,
                workers,
                advance,
                layers or None,
                store,
                share,
                options,
                ray,
            )
    _show_features(out_path, report)
    # The missing blocks of one share are another's work; where the shares are joined, they are missing.
    if report["problems"] or (merge and report["missing_blocks"]):
        raise typer.Exit(1)


def _show_features(out_path: Path, report: dict[str, Any]) -> None:
    """Print what was encoded, and each image that was left out."""
    corrupt = report["corrupt"] if "corrupt" in report else [c for b in report["blocks"] for c in b["corrupt"]]
    for image in corrupt:
        log(f"left out: {image['reason']}")
    for problem in report["problems"]:
        log(f"not whole: {problem}")
    for kind, paths in report.get("not_read", {}).items():
        if paths["count"]:
            log(f"not read: {paths['count']} {kind.replace('_', ' ')} ({', '.join(paths['first'])})")
    if report.get("busy_blocks"):
        log(f"{len(report['busy_blocks'])} blocks are left to other processes, the first: {report['busy_blocks'][0]}")
    if (repeated := report.get("repeated_ids", {"count": 0}))["count"]:
        log(f"{repeated['count']} ids are of more than one image: {', '.join(repeated['first'][:3])}")
    if report.get("missing_blocks"):
        log(f"{report['missing_blocks']} of {report['source_blocks']} blocks are not encoded yet.")
    if "error" in report:
        error = report["error"]
        log(f"relative L2 error of storing: {error['mean']:.1e} on average, {error['largest']:.1e} at most")
    shapes = report["shapes"].values() if "shapes" in report else [report["shape"]]
    shape = "; ".join(f"({', '.join(map(str, one))})" for one in shapes)
    speed = f", {report['images_per_s']} images/s" if "images_per_s" in report else ""
    place = f"{out_path}.json" if out_path.suffix else out_path / "manifest.json"
    log(f"{out_path}: {report['images']} images of shape {shape}, {len(corrupt)} left out{speed}; report: {place}")


@app.command()
def export(
    encoder: Annotated[str, typer.Argument(help="Folder, Hub name or short name (`pivot list`) of an encoder.")],
    output: Annotated[Path, typer.Argument(help="Folder of the export; an earlier one is replaced.")],
    fp16: Annotated[bool, typer.Option("--fp16", help="Export float16 too.")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Export int8 too, by ONNX Runtime and by optimum-quanto.")
    ] = False,
    images: Annotated[
        Path | None, typer.Option(help="Folder of images to check the export on, besides the built-in ones.")
    ] = None,
    probe: Annotated[bool, typer.Option(help="Measure the loss of probe accuracy by int8.")] = True,
) -> None:
    """Export to ONNX, for ONNX Runtime, Node and browsers, and compare the outputs with torch.

    Example: `pivot export hub/pivot/shapes-dpo exported --fp16 --int8`
    """
    from pivot_hub.data.image import image_files, open_image
    from pivot_hub.encoder.export import export_encoder
    from pivot_hub.probes.run import probe_export

    files = image_files(images)[:16] if images else []
    check_images = [open_image(f, "--images") for f in files]
    report = export_encoder(encoder, output, fp16, int8, check_images, probe_export if probe else None, log=log)
    for form, results in report.get("probe", {}).items():
        scores = ", ".join(f"{r['task'].split('/')[1]} {r['value']:.1f}" for r in results)
        log(f"probe of {form}: {scores}")
    log(f"export: {output}; report: {output / 'export.json'}")


def _how_to_load(folder: Path) -> str:
    """Say how an encoder is loaded, and which output of plain AutoModel its features are."""
    layer = json.loads((folder / "config.json").read_text()).get("pivot", {}).get("feature_layer", -2)
    output = f"hidden_states[{layer}], not last_hidden_state" if isinstance(layer, int) else layer
    return (
        f"load it with PivotVisionModel.from_pretrained({str(folder)!r}); in plain AutoModel its features are {output}"
    )
