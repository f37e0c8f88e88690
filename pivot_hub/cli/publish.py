"""Commands that make an encoder of a checkpoint, use it, and bring it to a hub and back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pivot_hub.cli.app import JsonPath, app, bar, log, write
from pivot_hub.errors import PublishError


@app.command()
def extract(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a finished stage.")],
    output: Annotated[Path, typer.Argument(help="Folder of the encoder repository; replaced if it exists.")],
    json_path: JsonPath = None,
) -> None:
    """Detach the encoder of an MLLM and write it in its native format.

    Example: `pivot extract runs/shapes/3-dpo hub/pivot/shapes-dpo`
    """
    from pivot_hub.mllm.extract import extract_encoder

    folder = extract_encoder(checkpoint, output)
    log(f"encoder: {folder}; load it with AutoModel.from_pretrained({str(folder)!r})")
    write(json_path, {"encoder": str(folder), "files": sorted(p.name for p in folder.iterdir())})


@app.command()
def verify(
    encoder: Annotated[str, typer.Argument(help="Folder of an encoder repository, or its name on the Hub.")],
    json_path: JsonPath = None,
) -> None:
    """Check a repository: hashes, keys, golden vectors, no pickle, no unexpected file, the card against the results.

    Example: `pivot verify hub/pivot/shapes-dpo`
    """
    from pivot_hub.publish.pull import fetch, published_problems, repository_problems

    if Path(encoder).exists() or "/" not in encoder:
        with_card = (Path(encoder) / "README.md").is_file()  # an encoder that was just extracted has none yet
        problems = published_problems(encoder) if with_card else repository_problems(encoder)
    else:
        problems = published_problems(fetch(encoder, log=log))
    for problem in problems:
        log(problem)
    write(json_path, {"encoder": encoder, "problems": problems})
    if problems:
        raise typer.Exit(1)
    log(f"{encoder}: sound")


@app.command()
def card(
    encoder: Annotated[Path, typer.Argument(help="Folder of an encoder repository.")],
    results: Annotated[
        list[Path] | None, typer.Option(help="Results to put in; base.json, sft.json, dpo.json name their columns.")
    ] = None,
    prose: Annotated[str | None, typer.Option(help="The card's prose: a YAML file, or a name of model_cards.")] = None,
    repository: Annotated[str | None, typer.Option(help="Its name on the Hub, when not the prose's.")] = None,
) -> None:
    """Put results and the card made of them into an encoder repository; a missing fact is an error that names it.

    Example: `pivot card hub/pivot/mine --prose mine.yaml --results sft.json --results dpo.json`
    """
    from dataclasses import replace

    from pivot_hub.probes.result import read_results
    from pivot_hub.publish.card_inputs import read_prose
    from pivot_hub.publish.staging import write_card

    given = {f.stem: [replace(r, encoder=f.stem) for r in read_results(f)] for f in results or []}
    changed = write_card(encoder, read_prose(prose or encoder.resolve().name), repository, given or None)
    log(f"card: {encoder / 'README.md'}{'' if changed else ', as it was'}")


@app.command()
def push(
    targets: Annotated[
        list[str],
        typer.Argument(help="ENCODER REPO: a folder, and owner/name. With --space: Hub names, the Space last."),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make it private, when it is made.")] = False,
    also: Annotated[str | None, typer.Option(help="Exports to add, comma-separated: onnx, int8.")] = None,
    prose: Annotated[str | None, typer.Option(help="The card's prose: a YAML file, or a name of model_cards.")] = None,
    space: Annotated[bool, typer.Option("--space", help="Publish the app; of two MLLMs it starts with them.")] = False,
    collection: Annotated[str | None, typer.Option(help="Title of a collection for SFT, DPO and base.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Publish an encoder with its card: shows what will change, asks, and makes one commit with the version's tag.

    Example: `pivot push hub/pivot/shapes-dpo me/shapes-dpo --also onnx --private`; the app over published encoders:
    `pivot push me/shapes-sft me/shapes-dpo me/gradcam --space`
    """
    from pivot_hub.publish.card_inputs import read_prose
    from pivot_hub.publish.push import add_to_collection, plan_push
    from pivot_hub.publish.push import push as carry_out
    from pivot_hub.publish.remote import models_of
    from pivot_hub.publish.staging import stage_encoder, stage_space

    if len(targets) < 2 or (len(targets) > 2 and not space):
        raise PublishError("push takes ENCODER REPO, or ENCODER ... SPACE with --space.", exit_code=2)
    repo = targets[-1]
    if space:
        staged = stage_space(repo, targets[:-1], models_of(targets[:-1]))
    else:
        text = read_prose(prose or Path(targets[0]).resolve().name)
        staged = stage_encoder(targets[0], repo, text, also.split(",") if also else (), log)
    with staged as publication:
        plan = plan_push(publication, private)
        log(plan.text())
        if plan.changes and not yes:
            if not sys.stdin.isatty():
                raise PublishError("there is nobody to ask: look at the changes above, and add --yes.", exit_code=2)
            typer.confirm("Publish this?", abort=True)
        pushed = carry_out(plan, log=log)
        metadata = plan.to_dict() | {"commit": pushed.commit, "url": pushed.url, "kind": pushed.kind}
        if collection is not None:
            metadata["collection"], members = add_to_collection(collection, publication, private)
            log(f"collection: {metadata['collection']} with {', '.join(members)}")
    write(json_path, metadata)
    log(f"{repo}: {pushed.kind} {pushed.commit[:8]}, {pushed.url}")


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(help="Its name on the Hub.")],
    output: Annotated[Path | None, typer.Argument(help="Folder of the repository; hub/REPO by default.")] = None,
    revision: Annotated[str | None, typer.Option(help="A tag, branch or commit; the newest by default.")] = None,
) -> None:
    """Download an encoder repository; it appears once its hashes, golden vectors and card were checked.

    Example: `pivot pull pivot/shapes-dpo --revision v0.1.0`
    """
    from pivot_hub.publish.pull import pull as download

    folder = download(repo, output or Path("hub") / repo, revision, log=log)
    log(f"encoder: {folder}; load it with AutoModel.from_pretrained({str(folder)!r})")


@app.command()
def encode(
    folder: Annotated[Path, typer.Argument(help="Images, in it and below it.")],
    encoder: Annotated[str, typer.Option(help="Folder or Hub name of an encoder.")],
    out_path: Annotated[Path, typer.Option("--out", help="The features, .parquet or .npy.")] = Path("features.parquet"),
    tokens: Annotated[bool, typer.Option("--tokens", help="All patch tokens of an image, not their mean.")] = False,
    batch: Annotated[int, typer.Option(help="Images of one pass.")] = 32,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16, to compute in.")] = "float32",
    workers: Annotated[int | None, typer.Option(help="Processes that decode; one a core by default.")] = None,
) -> None:
    """Features of every image of a folder; a stopped run goes on where it was, corrupt images are listed.

    Example: `pivot encode photos --encoder hub/pivot/shapes-dpo --out features.parquet`
    """
    from pivot_hub.encoder.encode import encode_folder

    with bar("images") as advance:
        report = encode_folder(encoder, folder, out_path, tokens, batch, dtype, workers, advance)
    for bad in report["corrupt"]:
        log(f"left out: {bad['reason']}")
    for kind, paths in report["not_read"].items():
        if paths["count"]:
            log(f"not read: {paths['count']} {kind.replace('_', ' ')} ({', '.join(paths['first'])})")
    log(
        f"{out_path}: {report['images']} images of shape {report['shape']}, {len(report['corrupt'])} left out, "
        f"{report['images_per_s']} images/s; report: {out_path}.json"
    )


@app.command()
def export(
    encoder: Annotated[str, typer.Argument(help="Folder or Hub name of an encoder.")],
    output: Annotated[Path, typer.Argument(help="Folder of the export; replaced if it exists.")],
    fp16: Annotated[bool, typer.Option("--fp16", help="Also float16.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Also int8, by ONNX Runtime and by optimum-quanto.")] = False,
    images: Annotated[Path | None, typer.Option(help="A folder of pictures to check it on, besides our own.")] = None,
    probe: Annotated[bool, typer.Option(help="Measure what int8 costs in probe accuracy.")] = True,
) -> None:
    """Export to ONNX, for ONNX Runtime and for Node and browsers, checked against torch.

    Example: `pivot export hub/pivot/shapes-dpo exported --fp16 --int8`
    """
    from pivot_hub.data.image import image_files, open_image
    from pivot_hub.encoder.export import export_encoder
    from pivot_hub.probes.run import probe_export

    files = image_files(images)[:16] if images else []
    pictures = [open_image(f, "--images") for f in files]
    report = export_encoder(encoder, output, fp16, int8, pictures, probe_export if probe else None, log=log)
    for form, results in report.get("probe", {}).items():
        scores = ", ".join(f"{r['task'].split('/')[1]} {r['value']:.1f}" for r in results)
        log(f"probe of {form}: {scores}")
    log(f"export: {output}; report: {output / 'export.json'}")
