"""A repository as it is on the Hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, get_session, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers

from pivot_hub.errors import PublishError
from pivot_hub.publish.retry import RetryPolicy, explain_hub_errors
from pivot_hub.publish.staging import Publication

HUB_OWN_FILE = ".gitattributes"  # the Hub adds it to every repository
EXPORTED = ("onnx/model.onnx", "preprocessor_config.json")  # what the page without a server reads


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hub: its size in bytes, and its hash, which is the SHA-256 of a large file, else git's."""

    size: int
    digest: str
    large: bool


@dataclass(frozen=True)
class Remote:
    """A repository as it is on the Hub: its commit, its files by path, and the commit of each tag."""

    sha: str
    private: bool
    files: dict[str, RemoteFile]
    tags: dict[str, str]


def repository_info(api: HfApi, repo: str, type_: str, retry_policy: RetryPolicy, revision: str | None = None) -> Any:
    """Ask for a repository's commit and files at a revision."""
    options: dict[str, Any] = {"revision": revision, "files_metadata": True, "timeout": retry_policy.timeout_s}
    return retry_policy.call(partial(api.repo_info, repo, repo_type=type_, **options))


def read_remote(api: HfApi, repo: str, type_: str, retry_policy: RetryPolicy) -> Remote | None:
    """Read the state of a repository; None where it does not exist."""
    try:
        info = repository_info(api, repo, type_, retry_policy)
    except RepositoryNotFoundError:
        return None
    refs = retry_policy.call(lambda: api.list_repo_refs(repo, repo_type=type_))
    return Remote(info.sha, bool(info.private), remote_files(info), {tag.name: tag.target_commit for tag in refs.tags})


def remote_files(info: Any) -> dict[str, RemoteFile]:
    """List the files of `repository_info` by path, without the one that the Hub adds."""
    return {
        s.rfilename: RemoteFile(s.size, s.lfs["sha256"] if s.lfs else s.blob_id, bool(s.lfs))
        for s in info.siblings
        if s.rfilename != HUB_OWN_FILE
    }


def local_files(pub: Publication) -> dict[str, Path]:
    """List the files of a publication by path."""
    return {str(f.relative_to(pub.folder)): f for f in pub.folder.rglob("*") if f.is_file()}


def read_remote_file(pub: Publication, remote: Remote, name: str, retry_policy: RetryPolicy) -> bytes:
    """Read a file of the remote repository; empty where there is no such file."""
    if name not in remote.files:
        return b""
    with TemporaryDirectory() as folder:
        options: dict[str, Any] = {"repo_type": pub.type, "revision": remote.sha, "local_dir": folder}
        return Path(retry_policy.call(partial(hf_hub_download, pub.repo, name, **options))).read_bytes()


def has_xet(api: HfApi, pub: Publication) -> bool:
    """Whether the hub stores large files by Xet."""
    address = f"{api.endpoint}/api/{pub.type}s/{pub.repo}/xet-write-token/main"
    return get_session().get(address, headers=build_hf_headers()).status_code != 404


def repository_url(api: HfApi, pub: Publication) -> str:
    """Address of a repository's page."""
    return f"{api.endpoint}/{'spaces/' if pub.type == 'space' else ''}{pub.repo}"


def check_exports(names: Sequence[str], retry_policy: RetryPolicy = RetryPolicy()) -> str:
    """Check that visitors' browsers can download encoders from the Hub, before a page refers to them.

    Args:
        names: Names of the repositories on the Hub.
        retry_policy: How long a Hub that does not answer is tried again.

    Returns:
        Address of the Hub.

    Raises:
        PublishError: A repository does not exist, is not public, or has no export to ONNX.
    """
    api = HfApi()
    for name in names:
        with explain_hub_errors(name):
            info = repository_info(api, name, "model", retry_policy)
        if info.private or info.gated:
            raise PublishError(f"{name} is not public: visitors' browsers could not download it; publish it first.")
        if missing := [file for file in EXPORTED if file not in remote_files(info)]:
            raise PublishError(f"{name} has no {missing[0]}: push it with `pivot push FOLDER {name} --also onnx`.")
    return api.endpoint


def find_mllms(names: Sequence[str], retry_policy: RetryPolicy = RetryPolicy()) -> list[str]:
    """Check that encoders or MLLMs are on the Hub, before a Space refers to them.

    Args:
        names: Names of the repositories on the Hub.
        retry_policy: How long a Hub that does not answer is tried again.

    Returns:
        Names of those that are MLLMs, which the app can start with.

    Raises:
        PublishError: A repository or its config.json does not exist.
    """
    api, mllms = HfApi(), []
    for name in names:
        with explain_hub_errors(name):
            info = repository_info(api, name, "model", retry_policy)
            config = retry_policy.call(partial(hf_hub_download, name, "config.json", revision=info.sha))
            if json.loads(Path(config).read_text())["model_type"] == "llava":
                mllms.append(name)
    return mllms
