"""Pull: download a repository, check it, and only then move it to its folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download

from pivot_hub.config.encoder_names import hub_repository
from pivot_hub.errors import PublishError
from pivot_hub.outputs import ENCODER, check_replaceable, whole_folder
from pivot_hub.publish.card_check import card_problems
from pivot_hub.publish.manifest import check_name, manifest_files
from pivot_hub.publish.remote import repository_info
from pivot_hub.publish.retry import RetryPolicy, explain_hub_errors


def pull(
    repo: str,
    output: str | Path,
    revision: str | None = None,
    retry_policy: RetryPolicy = RetryPolicy(),
    log: Callable[[str], None] = print,
) -> Path:
    """Download an encoder repository, check it as `verify` does, and only then move it to its folder.

    A download that was stopped resumes from the Hub's cache.

    Args:
        repo: Name of the repository on the Hub, or the short name of an encoder.
        output: Folder that the repository is written to. An encoder repository that is there is replaced.
        revision: Tag, branch or commit; the newest commit of `main` by default.
        retry_policy: How long a Hub that does not answer is tried again.
        log: Callback that receives progress messages.

    Returns:
        The output folder.

    Raises:
        OutputError: The output holds other files, or another process is working on it; nothing was touched.
        PublishError: The repository cannot be downloaded, or fails the checks.
    """
    check_replaceable(Path(output), ENCODER)  # before the download
    snapshot = fetch(repo, revision, retry_policy, log)
    problems = published_problems(snapshot)
    if problems:
        log(f"{problems[0]} The cached copy is downloaded once more.")
        snapshot = fetch(repo, revision, retry_policy, log, force=True)
        problems = published_problems(snapshot)
    if problems:
        raise PublishError(f"{repo} is not what was published: {problems[0]}")
    files = manifest_files(snapshot)
    with explain_hub_errors(repo), whole_folder(Path(output), ENCODER) as folder:
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(snapshot / name, folder / name)
    return Path(output)


def fetch(
    repo: str,
    revision: str | None = None,
    retry_policy: RetryPolicy = RetryPolicy(),
    log: Callable[[str], None] = print,
    force: bool = False,
) -> Path:
    """Download a repository into the Hub's cache.

    Args:
        repo: Name of the repository on the Hub, or the short name of an encoder.
        revision: Tag, branch or commit; the newest commit of `main` by default.
        retry_policy: How long a Hub that does not answer is tried again.
        log: Callback that receives progress messages.
        force: Whether files that are in the cache are downloaded again.

    Returns:
        Folder of the snapshot in the cache.

    Raises:
        PublishError: The repository does not exist, or cannot be downloaded.
    """
    repo = hub_repository(repo)
    # Not snapshot_download: some of its requests have no time-out and wait indefinitely for a silent hub.
    with explain_hub_errors(repo):
        info = repository_info(HfApi(), repo, "model", retry_policy, revision)
        names = sorted(s.rfilename for s in info.siblings)
        if not names:
            raise PublishError(f"{repo} is empty: nothing was published there yet.")
        for name in names:
            check_name(name, repo)
        for name in names:
            download = partial(hf_hub_download, repo, name, revision=info.sha, force_download=force)
            file = Path(retry_policy.call(download, log))
        return file.parents[names[-1].count("/")]


def published_problems(folder: str | Path) -> list[str]:
    """Check a published repository: hashes, keys, golden vectors, and the card's numbers against its results.

    Args:
        folder: Folder of the encoder repository.

    Returns:
        One message for each problem; empty for a sound repository.
    """
    return repository_problems(folder) or card_problems(folder)


def repository_problems(folder: str | Path) -> list[str]:
    """Check a repository without its card: hashes, keys and golden vectors."""
    from pivot_hub.encoder.repository import verify_repository  # loads torch, which this module does not need elsewhere

    return verify_repository(folder)
