"""What is published: an encoder repository with results, card and exports, or the Space; sealed, free of leaks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import SpaceCard

from pivot_hub.errors import PublishError
from pivot_hub.files import shipped_folder, write_json, write_whole
from pivot_hub.probes.result import ProbeResult, read_results, results_text
from pivot_hub.provenance import source_commit, versions, write_manifest
from pivot_hub.publish.card_inputs import EncoderMetadata, Prose, read_metadata
from pivot_hub.publish.card_render import card_files
from pivot_hub.publish.secret_scan import find_leaks

EXPORTS = ("onnx", "int8")


@dataclass(frozen=True)
class Publication:
    """A folder as it will lie on the Hub.

    Args:
        folder: of the files.
        repo: owner and name on the Hub; type: model or space.
        summary: first line of the commit.
        tag: of the commit, or None.
        stage: of the encoder, None for a Space; base: the Hub name of what it was trained from.
        pair: the SFT and the DPO encoder's names on the Hub.
    """

    folder: Path
    repo: str
    type: str
    summary: str
    tag: str | None = None
    stage: str | None = None
    base: str | None = None
    pair: Mapping[str, str] | None = None


def write_card(
    folder: str | Path,
    prose: Prose,
    repository: str | None = None,
    results: Mapping[str, Sequence[ProbeResult]] | None = None,
) -> bool:
    """Put results and card into an encoder repository and seal it again.

    Args:
        folder: of the repository.
        prose: of its card.
        repository: its name on the Hub, where it is not the prose's.
        results: by the name of their file in `results/`, beside those that are there or in their place.

    Returns:
        Whether anything changed.

    Raises:
        CardError: a fact is missing; nothing was written.
    """
    path = Path(folder)
    metadata = read_metadata(path)
    if results is not None:
        known: dict[str, Sequence[ProbeResult]] = {f.stem: read_results(f) for f in (path / "results").glob("*.json")}
        known |= results
        metadata = EncoderMetadata(**{**vars(metadata), "results": [r for name in sorted(known) for r in known[name]]})
    made = card_files(metadata, prose, repository)
    for name, listed in (results or {}).items():
        made[f"results/{name}.json"] = results_text(listed).encode()
    stale = [f for f in (path / ".eval_results").glob("*.yaml") if str(f.relative_to(path)) not in made]
    changed = [n for n, content in made.items() if not (path / n).is_file() or (path / n).read_bytes() != content]
    for file in stale:
        file.unlink()
    for name in changed:
        write_whole(path / name, made[name])
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
    """Lay out what will be published of an encoder, in a folder that goes when the block ends.

    Args:
        encoder: folder of its repository, which stays as it is.
        repo: its name on the Hub.
        prose: of its card.
        also: exports to add: onnx; int8, which comes with onnx.
        say: gets progress.

    Raises:
        CardError: a fact of the card is missing.
        PublishError: the repository is not sound, or a file holds what must not be published.
    """
    from pivot_hub.encoder.repository import verify_repository

    source = Path(encoder)
    if unknown := [name for name in also if name not in EXPORTS]:
        raise PublishError(f"--also {unknown[0]}: give any of {', '.join(EXPORTS)}.")
    if problems := verify_repository(source):
        raise PublishError(f"{source} is not sound, so nothing was published: {problems[0]}")
    with TemporaryDirectory(prefix="pivot-push-") as made:
        folder = Path(made)
        for name in json.loads((source / "provenance.json").read_text())["files"]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to((source / name).resolve())
        shutil.copyfile(source / "provenance.json", folder / "provenance.json")
        if also:
            _add_exports(source, folder, also, log)
        write_card(folder, prose, repo)
        metadata = read_metadata(folder)
        _refuse_leaks(folder, repo)
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
            pair={str(stage): name for stage, name in prose.pair.items()},
        )


@contextmanager
def stage_space(repo: str, encoders: Sequence[str], mllms: Sequence[str] = ()) -> Iterator[Publication]:
    """Lay out the Space: the app, with the models it is about named in its header's `models`.

    Args:
        repo: the Space's name on the Hub.
        encoders: Hub names, of encoders or of MLLMs.
        mllms: those that are MLLMs: of two or three, the first, the second and their parent, the app starts with them,
            else with the pair it ships.

    Raises:
        PublishError: a file holds what must not be published.
    """
    with TemporaryDirectory(prefix="pivot-push-") as made:
        folder = Path(made) / "space"
        shutil.copytree(
            shipped_folder("spaces") / "gradcam", folder, ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
        card = SpaceCard.load(folder / "README.md")
        card.data["models"] = list(encoders)
        card.save(folder / "README.md")
        if len(mllms) >= 2:
            write_json(folder / "pair.json", dict(zip(("first", "second", "parent"), mllms, strict=False)))
        write_manifest(folder, {"encoders": list(encoders), "commit": source_commit(), "versions": versions()})
        _refuse_leaks(folder, repo)
        yield Publication(folder, repo, "space", f"The app over {', '.join(encoders)}")


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


def _refuse_leaks(folder: Path, repo: str) -> None:
    if leaks := find_leaks(folder, allowed=repo):
        more = f" ({len(leaks)} findings; the others: {' '.join(leaks[1:4])})" if len(leaks) > 1 else ""
        raise PublishError(f"nothing was published: {leaks[0]}{more}")


def _rewrite_manifest(folder: Path) -> None:
    metadata: dict[str, Any] = json.loads((folder / "provenance.json").read_text())
    write_manifest(folder, {k: v for k, v in metadata.items() if k not in ("files", "sha256")})
