"""A repository as it is on the Hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import (
    HfApi,
    get_session,
    hf_hub_download,
)
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers

from pivot_hub.publish.retry import RetryPolicy, in_words
from pivot_hub.publish.staging import Publication

HUBS_OWN = ".gitattributes"


@dataclass(frozen=True)
class Remote:
    """A repository as it is on the Hub: its commit, its files' sizes and hashes (SHA-256 of large ones, else git's)."""

    sha: str
    private: bool
    files: dict[str, tuple[int, str, bool]]
    tags: dict[str, str]


def repository_info(api: HfApi, repo: str, type_: str, retry_policy: RetryPolicy, revision: str | None = None) -> Any:
    """A repository's commit and files at a revision."""
    options: dict[str, Any] = {"revision": revision, "files_metadata": True, "timeout": retry_policy.timeout_s}
    return retry_policy.call(partial(api.repo_info, repo, repo_type=type_, **options))


def read_remote(api: HfApi, repo: str, type_: str, retry_policy: RetryPolicy) -> Remote | None:
    try:
        info = repository_info(api, repo, type_, retry_policy)
    except RepositoryNotFoundError:
        return None
    refs = retry_policy.call(lambda: api.list_repo_refs(repo, repo_type=type_))
    return Remote(info.sha, bool(info.private), remote_files(info), {tag.name: tag.target_commit for tag in refs.tags})


def remote_files(info: Any) -> dict[str, tuple[int, str, bool]]:
    return {
        s.rfilename: (s.size, s.lfs["sha256"] if s.lfs else s.blob_id, bool(s.lfs))
        for s in info.siblings
        if s.rfilename != HUBS_OWN
    }


def local_files(pub: Publication) -> dict[str, Path]:
    return {str(f.relative_to(pub.folder)): f for f in pub.folder.rglob("*") if f.is_file()}


def read_remote_file(pub: Publication, remote: Remote, name: str, retry_policy: RetryPolicy) -> bytes:
    """A file of the remote; nothing where there is none."""
    if name not in remote.files:
        return b""
    with TemporaryDirectory() as folder:
        options: dict[str, Any] = {"repo_type": pub.type, "revision": remote.sha, "local_dir": folder}
        return Path(retry_policy.call(partial(hf_hub_download, pub.repo, name, **options))).read_bytes()


def has_xet(api: HfApi, pub: Publication) -> bool:
    place = f"{api.endpoint}/api/{pub.type}s/{pub.repo}/xet-write-token/main"
    return get_session().get(place, headers=build_hf_headers()).status_code != 404


def repository_url(api: HfApi, pub: Publication) -> str:
    return f"{api.endpoint}/{'spaces/' if pub.type == 'space' else ''}{pub.repo}"


def models_of(names: Sequence[str], retry_policy: RetryPolicy = RetryPolicy()) -> list[str]:
    """Check that encoders or MLLMs are on the Hub, before a Space points at them.

    Returns:
        Those that are MLLMs, which the app can start with.

    Raises:
        PublishError: one is not there, or no config.json is.
    """
    api, mllms = HfApi(), []
    for name in names:
        with in_words(name):
            info = repository_info(api, name, "model", retry_policy)
            config = retry_policy.call(partial(hf_hub_download, name, "config.json", revision=info.sha))
            if json.loads(Path(config).read_text())["model_type"] == "llava":
                mllms.append(name)
    return mllms
