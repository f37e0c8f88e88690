"""Pull: download a repository, check it, and only then put it in its place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from huggingface_hub import (
    HfApi,
    hf_hub_download,
)

from pivot_hub.errors import PublishError
from pivot_hub.files import whole_folder
from pivot_hub.publish.card_check import card_problems
from pivot_hub.publish.remote import HUBS_OWN, repository_info
from pivot_hub.publish.retry import RetryPolicy, in_words


def pull(
    repo: str,
    output: str | Path,
    revision: str | None = None,
    retry_policy: RetryPolicy = RetryPolicy(),
    log: Callable[[str], None] = print,
) -> Path:
    """Download an encoder repository, check it as `verify` does, and only then put it in its place.

    A download that was stopped goes on from the Hub's cache.

    Raises:
        PublishError: it cannot be downloaded, or is not what was published.
    """
    snapshot = fetch(repo, revision, retry_policy, log)
    problems = published_problems(snapshot)
    if problems:
        log(f"{problems[0]} The cached copy is fetched once more.")
        snapshot = fetch(repo, revision, retry_policy, log, fresh=True)
        problems = published_problems(snapshot)
    if problems:
        raise PublishError(f"{repo} is not what was published: {problems[0]}")
    with in_words(repo), whole_folder(Path(output)) as folder:
        for file in (f for f in snapshot.rglob("*") if f.is_file() and f.name != HUBS_OWN):
            (folder / file.relative_to(snapshot)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / file.relative_to(snapshot))
    return Path(output)


def fetch(
    repo: str,
    revision: str | None = None,
    retry_policy: RetryPolicy = RetryPolicy(),
    log: Callable[[str], None] = print,
    fresh: bool = False,
) -> Path:
    """Download a repository into the Hub's cache; the folder of its snapshot.

    Raises:
        PublishError: it is not there, or cannot be downloaded.
    """
    # Not snapshot_download: some of its requests wait for ever on a hub that is silent.
    with in_words(repo):
        info = repository_info(HfApi(), repo, "model", retry_policy, revision)
        names = sorted(s.rfilename for s in info.siblings)
        if not names:
            raise PublishError(f"{repo} is empty: nothing was published there yet.")
        for name in names:
            download = partial(hf_hub_download, repo, name, revision=info.sha, force_download=fresh)
            file = Path(retry_policy.call(download, log))
        return file.parents[names[-1].count("/")]


def published_problems(folder: str | Path) -> list[str]:
    """What is wrong with a repository: hashes, keys, golden vectors, and the card's numbers against its results.

    Returns:
        A sentence each; empty for a sound one.
    """
    return repository_problems(folder) or card_problems(folder)


def repository_problems(folder: str | Path) -> list[str]:
    """What is wrong with a repository that needs no card: hashes, keys, golden vectors."""
    from pivot_hub.encoder.repository import verify_repository  # loads torch, which the rest here does without

    return verify_repository(folder)
