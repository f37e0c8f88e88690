"""Stage a publication: an encoder repository with results, card and exports, or the Space.

A staged folder has a manifest with the checksum of every file, and has passed the secret scan.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCard

from pivot_hub.errors import PublishError
from pivot_hub.files import shipped_folder, write_whole
from pivot_hub.outputs import scratch_folder
from pivot_hub.probes.result import ProbeResult, read_results, results_text
from pivot_hub.provenance import source_commit, versions, write_manifest
from pivot_hub.publish.card_inputs import Prose, read_metadata
from pivot_hub.publish.card_render import card_files
from pivot_hub.publish.manifest import manifest_files
from pivot_hub.publish.secret_scan import scan_for_secrets

EXPORTS = ("onnx", "int8")


@dataclass(frozen=True)
class Publication:
    """A folder as it will be on the Hub.

    Args:
        folder: Folder of the files.
        repo: Owner and name on the Hub.
        type: Type of the repository, model or space.
        summary: First line of the commit message.
        tag: Tag of the commit, or None.
        stage: Stage of the encoder; None for a Space.
        base: Hub name of the encoder that it was trained from.
        branches: Hub names of the SFT and the DPO encoder by stage.
        sdk: SDK of a Space, gradio or static; None for an encoder.
    """

    folder: Path
    repo: str
    type: str
    summary: str
    tag: str | None = None
    stage: str | None = None
    base: str | None = None
    branches: Mapping[str, str] | None = None
    sdk: str | None = None


def write_card(
    folder: str | Path,
    prose: Prose,
    repository: str | None = None,
    results: Mapping[str, Sequence[ProbeResult]] | None = None,
) -> bool:
    """Write results and card into an encoder repository, and its manifest again.

    Args:
        folder: Folder of the encoder repository.
        prose: Prose of the card.
        repository: Name on the Hub, where it differs from the prose's.
        results: Results by the name of their file in `results/`; they join or replace those that are there.

    Returns:
        Whether anything changed.

    Raises:
        CardError: A required value is missing; nothing was written.
    """
    path = Path(folder)
    metadata = read_metadata(path)
    if results is not None:
        known: dict[str, Sequence[ProbeResult]] = {f.stem: read_results(f) for f in (path / "results").glob("*.json")}
        known |= results
        metadata = metadata.with_results([r for name in sorted(known) for r in known[name]])
    files = card_files(metadata, prose, repository)
    for name, listed in (results or {}).items():
        files[f"results/{name}.json"] = results_text(listed).encode()
    stale = [f for f in (path / ".eval_results").glob("*.yaml") if str(f.relative_to(path)) not in files]
    changed = [n for n, content in files.items() if not (path / n).is_file() or (path / n).read_bytes() != content]
    for file in stale:
        file.unlink()
    for name in changed:
        write_whole(path / name, files[name])
    if stale or changed:
        _rewrite_manifest(path)
    return bool(stale or changed)


@contextmanager
def stage_encoder(
    encoder: str | Path,
    repo: str,
    prose: Prose,
    also: Sequence[str] = (),
    log: Callable[[str], None] = print,
) -> Iterator[Publication]:
    """Stage an encoder in a temporary folder, which is deleted when the block ends.

    Args:
        encoder: Folder of the encoder repository, which is not changed.
        repo: Name on the Hub.
        prose: Prose of the card.
        also: Exports to add: onnx; int8, which includes onnx.
        log: Callback that receives progress messages.

    Raises:
        CardError: A value of the card is missing.
        PublishError: The repository is not sound, a file of it lies elsewhere, or the secret scan has findings.
    """
    from pivot_hub.encoder.repository import verify_repository

    source = Path(encoder)
    if unknown := [name for name in also if name not in EXPORTS]:
        raise PublishError(f"--also {unknown[0]}: give any of {', '.join(EXPORTS)}.")
    if problems := verify_repository(source):
        raise PublishError(f"{source} is not sound, so nothing was published: {problems[0]}")
    files = manifest_files(source)
    with scratch_folder("pivot-push") as folder:
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to((source / name).resolve())
        (folder / "provenance.json").unlink()  # a copy, because it is written again
        shutil.copyfile(source / "provenance.json", folder / "provenance.json")
        if also:
            _add_exports(source, folder, also, log)
        write_card(folder, prose, repo)
        metadata = read_metadata(folder)
        _refuse_secrets(folder, repo)
        stage = metadata.config["pivot"]["stage"]
        base = metadata.config["pivot"].get("base_model")
        yield Publication(
            folder=folder,
            repo=repo,
            type="model",
            summary=f"{prose.version}: {stage} encoder, weights {metadata.encoder_sha256[:12]}",
            tag=f"v{prose.version}",
            stage=stage,
            base=prose.names.get(base, base) if base else None,
            branches={str(branch): name for branch, name in prose.pair.items()},
        )


@contextmanager
def stage_space(
    repo: str, encoders: Sequence[str], requirement: str, mllms: Sequence[str] = ()
) -> Iterator[Publication]:
    """Stage the Space: the app, whose card lists the models it shows.

    Args:
        repo: Name of the Space on the Hub.
        encoders: Hub names of all models, encoders or MLLMs.
        requirement: What the Space installs, as `package_requirement` returns it.
        mllms: Hub names of those that are MLLMs. The app starts with two or three of them, as the first, the second
            and their parent; with fewer it starts with the bundle that it ships.

    Raises:
        PublishError: The secret scan has findings.
    """
    pair = dict(zip(("first", "second", "parent"), mllms, strict=False)) if len(mllms) >= 2 else None
    files = {"requirements.txt": f"{requirement}\n", **({"pair.json": json.dumps(pair, indent=2)} if pair else {})}
    with _stage_copy(repo, "gradcam", encoders, files) as folder:
        yield Publication(folder, repo, "space", f"The app over {', '.join(encoders)}", sdk="gradio")


@contextmanager
def stage_static_space(repo: str, left: str, right: str, hub: str) -> Iterator[Publication]:
    """Stage the page without a server, which starts with two exported encoders of the Hub.

    Args:
        repo: Name of the Space on the Hub.
        left: Hub name of the encoder on the left.
        right: Hub name of the encoder on the right.
        hub: Address of the Hub, from which the visitor's browser downloads the encoders.

    Raises:
        PublishError: The secret scan has findings.
    """
    shipped = json.loads((shipped_folder("spaces") / "browser" / "settings.json").read_text())
    settings = {**shipped, "left": left, "right": right, "hub": hub}
    with _stage_copy(repo, "browser", [left, right], {"settings.json": json.dumps(settings, indent=2)}) as folder:
        yield Publication(folder, repo, "space", f"The page over {left} and {right}", sdk="static")


@contextmanager
def _stage_copy(repo: str, name: str, encoders: Sequence[str], files: Mapping[str, str]) -> Iterator[Path]:
    """Copy a shipped Space, add the encoders that it shows to its card, and write files of its own beside those."""
    with scratch_folder("pivot-push") as temporary:
        folder = temporary / "space"
        shutil.copytree(shipped_folder("spaces") / name, folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        card = SpaceCard.load(folder / "README.md")
        card.data["models"] = list(dict.fromkeys(encoders))
        card.save(folder / "README.md")
        for file, text in files.items():
            (folder / file).write_text(text)
        write_manifest(folder, {"encoders": list(encoders), "commit": source_commit(), "versions": versions()})
        _refuse_secrets(folder, repo)
        yield folder


def _add_exports(source: Path, folder: Path, also: Sequence[str], log: Callable[[str], None]) -> None:
    from pivot_hub.encoder.export import export_encoder
    from pivot_hub.probes.run import probe_export

    exported = folder / ".export"
    export_encoder(source, exported, int8="int8" in also, probe=probe_export, log=log)
    for name in ("onnx", "quanto", "export.json"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).unlink(missing_ok=True)
        if (exported / name).exists():
            (exported / name).replace(folder / name)
    shutil.rmtree(exported)
    _rewrite_manifest(folder)


def _refuse_secrets(folder: Path, repo: str) -> None:
    """Raise an error if the secret scan has findings."""
    if findings := scan_for_secrets(folder, allowed=repo):
        others = f" ({len(findings)} findings; the others: {' '.join(findings[1:4])})" if len(findings) > 1 else ""
        raise PublishError(f"nothing was published: {findings[0]}{others}")


def _rewrite_manifest(folder: Path) -> None:
    metadata: dict[str, Any] = json.loads((folder / "provenance.json").read_text())
    write_manifest(folder, {k: v for k, v in metadata.items() if k not in ("files", "sha256")})
