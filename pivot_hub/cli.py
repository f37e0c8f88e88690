"""The `pivot` command: parse, dispatch, print. Exit codes: 0 done, 1 failed, 2 bad usage or bad input."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pivot_hub import __version__
from pivot_hub.errors import PivotError, TrainingError

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


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder of the run; run again to go on or to reuse.")] = Path(
        "quickstart"
    ),
    seed: Annotated[int, typer.Option(help="Of the MLLM's training, both branches alike.")] = 0,
    push_local: Annotated[
        bool, typer.Option("--push-local", help="Then publish both to a hub on this machine, and load them by name.")
    ] = False,
) -> None:
    """Train an SFT and a DPO encoder from one parent on the built-in world, and compare them.

    Example: `pivot quickstart --output quickstart`
    """
    from pivot_hub.quickstart import push_quickstart, run_quickstart

    if push_local:
        from pivot_hub.local_hub.serve import need_server

        need_server()
    report = run_quickstart(output, seed=seed, say=_say)
    out.print(report.table())
    _say(f"report: {output / 'report.md'}; encoders: {output / 'hub' / 'pivot'}")
    if push_local:
        push_quickstart(output, say=_say)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a shipped one by name, as shapes/3-dpo.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value, as in args.beta=0.2.")] = None,
    runs: Runs = Path("runs"),
    output: Annotated[Path | None, typer.Option(help="The stage's folder, when not below RUNS.")] = None,
    parent: Annotated[Path | None, typer.Option(help="The parent's checkpoint, when not below RUNS.")] = None,
    parents: Annotated[bool, typer.Option("--parents", help="First train the parents that are not finished.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will cost, and load no weight.")] = False,
    machine: Annotated[str, typer.Option(help="For --dry-run, a file of recipes/accelerate.")] = "ddp",
    processes: Annotated[int, typer.Option(help="For --dry-run, GPUs.")] = 8,
    mfu: Annotated[
        float | None, typer.Option(help="For --dry-run, the share of a GPU's peak that is reached; 0.35 by default.")
    ] = None,
    lengths: Annotated[
        Path | None, typer.Option(help="For --dry-run, what `pivot data check --json` wrote, instead of `expect`.")
    ] = None,
    hf_job: Annotated[bool, typer.Option("--hf-job", help="Print the command of a Hugging Face Job instead.")] = False,
    submit: Annotated[bool, typer.Option("--submit", help="With --hf-job, run that command.")] = False,
    flavor: Annotated[str, typer.Option(help="For --hf-job, hardware, as `hf jobs hardware` lists it.")] = "a100x8",
    bucket: Annotated[str | None, typer.Option(help="For --hf-job, owner/name of the bucket that keeps runs.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Train one stage; a stopped run goes on where it was, a finished one is reused.

    Example: `pivot train shapes/1-align args.max_steps=20 --runs runs`; what a large one costs:
    `pivot train siglip2-so400m/3-dpo --dry-run --machine fsdp2 --processes 8`
    """
    from pivot_hub.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if dry_run:
        from pivot_hub.plan import MFU, plan_stage

        measured = json.loads(lengths.read_text()) if lengths else None
        with out.status("a step is rehearsed without weights, in about half a minute"):  # on a terminal only
            plan = plan_stage(loaded, machine, processes, MFU if mfu is None else mfu, measured)
        out.print(plan.table(), markup=False)
        _write(json_path, plan.facts())
        return
    if hf_job:
        from pivot_hub.errors import RecipeError
        from pivot_hub.training.jobs import hf_job_command

        if bucket is None:
            raise RecipeError("--hf-job: give --bucket owner/name, in which runs and checkpoints outlive the job.")
        command = hf_job_command(loaded, overrides or [], flavor=flavor, bucket=bucket)
        _say(shlex.join(command))
        _write(json_path, {"command": command})
        if submit:
            raise typer.Exit(subprocess.run(command, check=False).returncode)
        return
    from pivot_hub.training.stage import run_stage

    for earlier in loaded.lineage()[:-1] if parents else []:
        run_stage(earlier, runs, say=_say)
    folder = run_stage(loaded, runs, output, parent, say=_say)
    if _is_first():
        _say(f"checkpoint: {folder}")
        _write(json_path, json.loads((folder / "report.json").read_text()) | {"checkpoint": str(folder)})
    from accelerate import PartialState

    PartialState().destroy_process_group()


@app.command()
def study(
    study: Annotated[str, typer.Argument(help="A study's file, or the name of a shipped one, as shapes/study.")],
    output: Annotated[Path | None, typer.Option(help="Folder of runs, table and report; `study` by default.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time: the GPUs in turn, or a share of the cores.")] = 1,
    report: Annotated[
        bool,
        typer.Option(
            "--report", help="Train nothing: write the report anew from the table in OUTPUT, or beside the file."
        ),
    ] = False,
) -> None:
    """Train and measure a grid of recipes over seeds and factors, and report it from one table; resumes.

    Example: `pivot study shapes/study --jobs 2`, then `pivot study shapes/study --report --output study`
    """
    from pivot_hub.study.design import load_study
    from pivot_hub.study.report import write_report
    from pivot_hub.study.runner import run_study
    from pivot_hub.study.table import collect_table, read_table, write_table

    made = load_study(study)
    if report:
        folder = output or made.path.parent
        table = read_table(folder / f"{made.path.stem}.parquet")
    else:
        folder = output or Path("study")
        try:
            run_study(made.path, folder, jobs, say=_say)
        finally:
            table = collect_table(made, folder)
            write_table(table, folder / f"{made.path.stem}.parquet")
    text = folder / f"{made.path.stem.upper()}.md"
    write_report(made, table, text)
    _say(f"report: {text}")


@app.command()
def search(
    recipe: Annotated[str, typer.Argument(help="A recipe with a parent that is finished below RUNS.")],
    rates: Annotated[str, typer.Option(help="Candidates, comma-separated.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value, for every candidate.")] = None,
    runs: Runs = Path("runs"),
    output: Annotated[Path, typer.Option(help="The record, JSON.")] = Path("search.json"),
) -> None:
    """Choose a stage's learning rate on validation questions, recording every candidate.

    Example: `pivot search shapes/3-dpo --rates 3e-5,1e-4,3e-4 --output search-dpo.json`
    """
    candidates = _numbers("--rates", rates, float)
    from pivot_hub.training.search import search_rate

    record = search_rate(recipe, candidates, runs, output, overrides=overrides or [], say=_say)
    _say(f"chosen: {record['chosen']:g}; record: {output}")


@app.command()
def extract(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a finished stage.")],
    output: Annotated[Path, typer.Argument(help="Folder of the encoder repository; replaced if it exists.")],
    json_path: JsonPath = None,
) -> None:
    """Detach the encoder of an MLLM and write it in its native format.

    Example: `pivot extract runs/shapes/3-dpo hub/pivot/shapes-dpo`
    """
    from pivot_hub.encoder.extract import extract_encoder

    folder = extract_encoder(checkpoint, output)
    _say(f"encoder: {folder}; load it with AutoModel.from_pretrained({str(folder)!r})")
    _write(json_path, {"encoder": str(folder), "files": sorted(p.name for p in folder.iterdir())})


@app.command()
def verify(
    encoder: Annotated[str, typer.Argument(help="Folder of an encoder repository, or its name on the Hub.")],
    json_path: JsonPath = None,
) -> None:
    """Check a repository: hashes, keys, golden vectors, no pickle, no unexpected file, the card against the results.

    Example: `pivot verify hub/pivot/shapes-dpo`
    """
    from pivot_hub.hub import fetch, published_problems, repository_problems

    if Path(encoder).exists() or "/" not in encoder:
        with_card = (Path(encoder) / "README.md").is_file()  # an encoder that was just extracted has none yet
        problems = published_problems(encoder) if with_card else repository_problems(encoder)
    else:
        problems = published_problems(fetch(encoder, say=_say))
    for problem in problems:
        _say(problem)
    _write(json_path, {"encoder": encoder, "problems": problems})
    if problems:
        raise typer.Exit(1)
    _say(f"{encoder}: sound")


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

    from pivot_hub.card import read_prose
    from pivot_hub.probes.result import read_results
    from pivot_hub.publication import write_card

    given = {f.stem: [replace(r, encoder=f.stem) for r in read_results(f)] for f in results or []}
    changed = write_card(encoder, read_prose(prose or encoder.resolve().name), repository, given or None)
    _say(f"card: {encoder / 'README.md'}{'' if changed else ', as it was'}")


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
    from pivot_hub.card import read_prose
    from pivot_hub.errors import PublishError
    from pivot_hub.hub import add_to_collection, models_of, plan_push
    from pivot_hub.hub import push as carry_out
    from pivot_hub.publication import stage_encoder, stage_space

    if len(targets) < 2 or (len(targets) > 2 and not space):
        raise PublishError("push takes ENCODER REPO, or ENCODER ... SPACE with --space.", exit_code=2)
    repo = targets[-1]
    if space:
        staged = stage_space(repo, targets[:-1], models_of(targets[:-1]))
    else:
        text = read_prose(prose or Path(targets[0]).resolve().name)
        staged = stage_encoder(targets[0], repo, text, also.split(",") if also else (), _say)
    with staged as publication:
        plan = plan_push(publication, private)
        _say(plan.text())
        if plan.changes and not yes:
            if not sys.stdin.isatty():
                raise PublishError("there is nobody to ask: look at the changes above, and add --yes.", exit_code=2)
            typer.confirm("Publish this?", abort=True)
        pushed = carry_out(plan, say=_say)
        facts = plan.facts() | {"commit": pushed.commit, "url": pushed.url, "kind": pushed.kind}
        if collection is not None:
            facts["collection"], members = add_to_collection(collection, publication, private)
            _say(f"collection: {facts['collection']} with {', '.join(members)}")
    _write(json_path, facts)
    _say(f"{repo}: {pushed.kind} {pushed.commit[:8]}, {pushed.url}")


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(help="Its name on the Hub.")],
    output: Annotated[Path | None, typer.Argument(help="Folder of the repository; hub/REPO by default.")] = None,
    revision: Annotated[str | None, typer.Option(help="A tag, branch or commit; the newest by default.")] = None,
) -> None:
    """Download an encoder repository; it appears once its hashes, golden vectors and card were checked.

    Example: `pivot pull pivot/shapes-dpo --revision v0.1.0`
    """
    from pivot_hub.hub import pull as download

    folder = download(repo, output or Path("hub") / repo, revision, say=_say)
    _say(f"encoder: {folder}; load it with AutoModel.from_pretrained({str(folder)!r})")


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

    with _bar("images") as advance:
        report = encode_folder(encoder, folder, out_path, tokens, batch, dtype, workers, advance)
    for bad in report["corrupt"]:
        _say(f"left out: {bad['reason']}")
    _say(
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

    files = image_files(images)[:16] if images else []
    pictures = [open_image(f, "--images") for f in files]
    report = export_encoder(encoder, output, fp16, int8, pictures, probe, say=_say)
    for form, results in report.get("probe", {}).items():
        scores = ", ".join(f"{r['task'].split('/')[1]} {r['value']:.1f}" for r in results)
        _say(f"probe of {form}: {scores}")
    _say(f"export: {output}; report: {output / 'export.json'}")


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

    with _bar("images") as advance:
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
        _say(f"left out: {reason}")
    _show(results, json_path)


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
    from pivot_hub.probes.compare import compare_results, compare_seeds, draw_comparisons, read_seeds
    from pivot_hub.probes.run import probe_all

    if seeds := read_seeds(encoders):
        made = compare_seeds(seeds, draws, seed)
    else:
        with _bar("images") as advance:
            measured = probe_all(encoders, data, seed, tuple(protocols.split(",")), progress=advance)
        made = compare_results(measured, draws, seed)
    out.print(made.table())
    _say(made.method())
    if markdown:
        write_whole(markdown, made.markdown())
    if figure:
        draw_comparisons(made, figure)
    _write(json_path, made.facts())


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
    from pivot_hub.probes.localize import Wording, localize_folder

    results, left_out = localize_folder(
        checkpoint,
        data,
        boxes,
        masks,
        names,
        _numbers("--ignore", ignore, int) if ignore else [],
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
        _say(f"{len(left_out)} photos or targets left out, the first: {left_out[0]}")
    _show(results, json_path)


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

    from pivot_hub.encoder.repository import check_golden, encoder_facts, read_encoder
    from pivot_hub.files import write_json
    from pivot_hub.probes.masks import open_masks, read_names
    from pivot_hub.probes.segment_masks import cached_encode, per_class, segment_masks

    ignored = None if ignore is None else _numbers("--ignore", ignore, int) if ignore else []
    sizes = None if image_px is None else _numbers("--image-px", image_px, int)
    known = None if names is None else read_names(names)
    found = open_masks(data, masks, seed, on_bad_row)
    model, image_processor = read_encoder(encoder)
    check_golden(encoder, model)
    cast(torch.nn.Module, model).to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    facts = encoder_facts(encoder)
    with _bar("images") as advance:
        results, skipped = segment_masks(
            model,
            image_processor,
            found,
            conditions={**facts, "feature_layer": model.config.pivot["feature_layer"]},
            ignore_ids=ignored,
            classes=classes,
            names=known,
            heads=heads.split(","),
            image_px=sizes,
            seed=seed,
            on_bad_row=on_bad_row,
            encode=None if cache is None else cached_encode(model, image_processor, facts, cache, advance),
            say=_say,
        )
    if skipped:
        _say(f"{len(skipped)} files skipped, the first: {skipped[0]}")
    _show(results, json_path)
    if json_path is not None:
        scores = {r.task: per_class(r.tallies, known or found.names) for r in results if r.tallies is not None}
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

    _show(probe_language(language, seed=seed), json_path)


@data.command("check")
def data_check(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a shipped one by name, as shapes/3-dpo.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value, as for train.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that decode and count; one a core by default.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Read every row of a recipe, decode every image, count every token; nothing is trained and no weight loaded.

    Example: `pivot data check siglip2-so400m/3-dpo --json check.json`
    """
    from pivot_hub.recipe import FileData, load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from pivot_hub.training.row_check import check_data

    # All of the bad rows are wanted, whatever training would do at the first.
    every = loaded.model_copy(update={"recipe": loaded.recipe.model_copy(update={"on_bad_row": "skip"})})
    with _bar("rows") as advance:
        report = check_data(every, advance=advance, fresh=True, workers=workers).report
    out.print(report.text(), markup=False)
    on_bad_row = loaded.recipe.on_bad_row
    _write(json_path, {"recipe": loaded.name, "on_bad_row": on_bad_row, **report.facts()})
    for number, (spec, source) in enumerate(zip(loaded.recipe.data, report.sources, strict=True)):
        if isinstance(spec, FileData) and spec.expect is not None:
            wanted = min(spec.sample or spec.expect.rows, spec.expect.rows)
            if source["rows"] != wanted:
                _say(f"source {number}: {source['rows']} rows, where the recipe expects {wanted}")
    if report.skipped_rows and on_bad_row == "stop":
        _say("training would stop at the first of these rows: mend them, or set `on_bad_row: skip` in the recipe")
        raise typer.Exit(1)


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
    from pivot_hub.probes.lmms import evaluate_vqa

    names = [t.strip() for t in tasks.split(",")] if tasks else []
    made = evaluate_vqa(mllm, output, names, limit, batch_size, dtype, include_path, python, say=_say)
    out.print(made.table())
    for sentence in made.refused:
        _say(sentence)
    _say(f"results: {output / 'results.json'}")
    _write(json_path, made.facts())


@bench.command("shapes")
def bench_shapes(json_path: JsonPath = None) -> None:
    """Does drawing the built-in world keep up with training?

    Example: `pivot bench shapes --json bench.json`
    """
    from pivot_hub.bench.shapes import bench_shapes

    measured = bench_shapes()
    for name, seconds in measured["seconds_per_batch"].items():
        _say(f"{name:8} {1000 * seconds:8.1f} ms for a batch of {measured['batch']}")
    _say(f"drawing takes {100 * measured['render_share_of_step']:.0f}% of the step's time")
    _write(json_path, measured)


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
    from pivot_hub.recipe import load_recipe

    _write(json_path, bench_train_step(load_recipe(recipe, overrides or []), steps, say=_say))


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

    _write(json_path, bench_loader(recipe, rows, rounds=rounds, say=_say))


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

    measured = bench_encoder(encoder, batch, rounds, tuple(forms.split(",")) if forms else FORMS, say=_say)
    _write(json_path, measured)


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

    _write(json_path, bench_space(visitors, clicks, say=_say))


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

    _write(json_path, bench_dpo_step(size, batch, rounds, checkpointing, say=_say))


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

    chosen = _numbers("--cs", cs, float)
    measured = bench_probe(images, width, classes, chosen, tolerance, max_iter, tuple(kinds.split(",")), say=_say)
    _write(json_path, measured)


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
    from pivot_hub.figure import draw_maps, draw_rows

    if overfit:
        from pivot_hub.overfit import LOSSES, figure_rows, overfit_file

        looked = _numbers("--steps", steps, int)
        rates = {} if learning_rate is None else _rates(learning_rate, LOSSES)
        runs, picture, seen, facts = overfit_file(
            checkpoint, image, question, answer, rejected, looked, rates, beta, mask
        )
        heading = f"{question}\nright: {answer}   wrong: {rejected}"
        heading += "" if seen is None else f"   target: {100 * seen.mean():.0f}% of the image"
        draw_rows(figure_rows(runs, picture, seen), output, heading, rows_a_scale=len(LOSSES))
        for run in runs:
            _say(f"{run.loss} loss {run.losses[0]:.4f} -> {run.losses[-1]:.4f} after {max(looked)} steps")
        _say(f"figure: {output}")
        _write(json_path, facts)
        return
    from pivot_hub.gradcam import explain_file

    made, picture = explain_file(checkpoint, image, question, answer, explain, rejected, reference)
    draw_maps(picture, [(f"{method} of {explain}", grid) for method, grid in made.maps.items()], output)
    _say(f"figure: {output}; {explain} is {made.value:.4f}")
    maps = {method: grid.tolist() for method, grid in made.maps.items()}
    _write(json_path, {"explain": explain, "value": made.value, "maps": maps})


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
    from pivot_hub.mllm_pair import PairNames
    from pivot_hub.space import names_of_runs, serve

    names = PairNames(first, second, parent)
    if runs is not None and names == PairNames():
        names = names_of_runs(runs)
    _say(f"http://{host}:{port}")
    serve(names, runs, port, host)


@app.command()
def pair(
    runs: Annotated[Path, typer.Argument(help="Folder with the stages 2-instruct, 3-sft and 3-dpo.")],
    output: Annotated[Path, typer.Argument(help="Folder of the pack; replaced if it exists.")],
) -> None:
    """Pack an SFT and a DPO MLLM with their parent, small enough to ship with the app.

    Example: `pivot pair quickstart/runs/shapes recipes/shapes/pair`
    """
    from pivot_hub.mllm_pair import pack_pair

    folder = pack_pair(runs, output)
    size = sum(f.stat().st_size for f in folder.iterdir())
    _say(f"pair: {folder}, {size / 1e6:.1f} MB")


@contextmanager
def _bar(unit: str) -> Iterator[Callable[[int, int | None, float], None]]:
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
            _say(f"{done}{'' if total is None else f' of {total}'} {unit}, {rate:.1f}/s{left}")

    yield advance


def _show(results: list[ProbeResult], path: Path | None) -> None:
    for result in results:
        low, high = result.ci95
        _say(f"{result.task:28} {result.metric:18} {result.value:6.1f} [{low:.1f}, {high:.1f}]  {result.protocol}")
    if path is not None:
        from pivot_hub.probes.result import write_results

        write_results(path, results)


def _numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    from pivot_hub.errors import RecipeError

    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"{option} {text!r}: give numbers with commas between them.") from None


def _rates(text: str, losses: Sequence[str]) -> dict[Any, float]:
    """A rate for all losses, or `loss=rate` with commas between them."""
    if "=" not in text:
        return dict.fromkeys(losses, _numbers("--learning-rate", text, float)[0])
    rates = dict(part.partition("=")[::2] for part in text.split(","))
    if unknown := [loss for loss in rates if loss not in losses]:
        from pivot_hub.errors import RecipeError

        raise RecipeError(f"--learning-rate {text!r}: {unknown[0]!r} is no loss; it is one of {', '.join(losses)}.")
    return {loss: _numbers("--learning-rate", rate, float)[0] for loss, rate in rates.items()}


def _is_first() -> bool:
    """Whether this is the one process, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def _say(text: str) -> None:
    out.print(text, markup=False)


def _write(path: Path | None, facts: Any) -> None:
    if path is not None:
        from pivot_hub.files import write_json

        write_json(path, facts)


def main() -> None:
    """Run the command; what goes wrong is one sentence on stderr, a traceback only with --debug."""
    try:
        app()
    except PivotError as error:
        if "--debug" in sys.argv:
            raise
        if _is_first() or isinstance(error, TrainingError):  # others fail alike, of a loss one alone may know
            print(f"pivot: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("pivot: stopped; run the same command again to go on.", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        print(
            f"pivot: {type(error).__name__}: {reason[0]} (run `pivot --debug ...` for the traceback)", file=sys.stderr
        )
        sys.exit(1)
