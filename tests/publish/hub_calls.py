"""The requests that huggingface_hub sends to a hub, call by call, for an unmodified client of any version.

HF_ENDPOINT names the hub, and READER is the token of a user who may only read.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub as hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

NAME = "pivot/calls"
FILES = {
    "README.md": b"---\nlicense: apache-2.0\ntags:\n- pivot\n---\n# A model\n",
    "model.safetensors": os.urandom(2_500_000),
    "small.safetensors": b"abc",
    "sub/a b#.json": b"{}",
    "empty.txt": b"",
}


def status(call: Callable[[], Any]) -> int:
    """The HTTP status that a call is refused with."""
    try:
        call()
    except HfHubHTTPError as error:
        return int(error.response.status_code)
    raise AssertionError("the call succeeded")


def refused(kind: type[Exception], call: Callable[[], Any]) -> None:
    """Check that a call raises an error of a kind."""
    try:
        call()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


def notes(content: bytes) -> list[hub.CommitOperationAdd]:
    return [hub.CommitOperationAdd("notes.txt", content)]


def check_repositories(api: hub.HfApi, reader: hub.HfApi) -> None:
    """A repository is created once, and is visible to those who may see it."""
    assert api.whoami()["name"] == "ada"
    assert status(hub.HfApi(token="nobody's").whoami) == 401
    assert api.create_repo(NAME, private=True).repo_id == NAME
    api.create_repo(NAME, private=True, exist_ok=True)
    assert status(lambda: api.create_repo(NAME)) == 409
    assert status(lambda: reader.create_repo("bob/x")) == 403
    assert status(lambda: api.create_repo("somebody/x")) == 403
    assert api.model_info(NAME).private
    for other in (reader, hub.HfApi(token=False)):
        refused(RepositoryNotFoundError, lambda o=other: o.model_info(NAME))  # type: ignore[misc]


def check_upload_and_download(api: hub.HfApi, folder: Path) -> str:
    """One commit holds small and large files, the largest in parts, and reads back byte by byte; its hash."""
    (folder / "sub").mkdir()
    for path, content in FILES.items():
        (folder / path).write_bytes(content)
    first = api.model_info(NAME).sha
    assert first is not None
    commit = api.upload_folder(repo_id=NAME, folder_path=folder, parent_commit=first, commit_message="all")
    assert [c.title for c in api.list_repo_commits(NAME)] == ["all", "initial commit"]
    snapshot = Path(hub.snapshot_download(NAME))
    assert snapshot.name == commit.oid
    assert all((snapshot / path).read_bytes() == content for path, content in FILES.items())
    listed = {f.path: f for f in api.list_repo_tree(NAME, recursive=True)}
    assert {*FILES, ".gitattributes", "sub"} == listed.keys()
    assert listed["model.safetensors"].lfs is not None  # type: ignore[union-attr]
    assert listed["README.md"].lfs is None  # type: ignore[union-attr]
    assert len(list(api.get_paths_info(NAME, ["README.md", "model.safetensors", "none"]))) == 2
    assert api.file_exists(NAME, "model.safetensors")
    refused(EntryNotFoundError, lambda: hub.hf_hub_download(NAME, "none"))
    refused(RevisionNotFoundError, lambda: hub.hf_hub_download(NAME, "README.md", revision="none"))
    assert status(lambda: api.create_commit(NAME, notes(b"1"), commit_message="late", parent_commit=first)) == 412
    return str(commit.oid)


def check_commits(api: hub.HfApi, folder: Path, head: str) -> None:
    """An empty commit is no commit, malformed metadata is refused, and folders can be deleted."""
    same = api.upload_folder(repo_id=NAME, folder_path=folder, commit_message="again")
    assert same.oid == head
    for wrong in ("tags: 3", "model-index: 3", "datasets: [a b]", "- list"):
        operation = hub.CommitOperationAdd("README.md", f"---\n{wrong}\n---\n".encode())
        refused(ValueError, lambda o=operation: api.create_commit(NAME, [o], commit_message="x"))  # type: ignore[misc]
    api.create_commit(NAME, [hub.CommitOperationDelete("sub/", is_folder=True)], commit_message="less")
    assert not api.file_exists(NAME, "sub/a b#.json")


def check_refs(api: hub.HfApi, commit: str) -> None:
    """Tags, branches and pull requests."""
    api.create_tag(NAME, tag="v1", revision=commit)
    assert status(lambda: api.create_tag(NAME, tag="v1")) == 409
    api.create_branch(NAME, branch="side")
    proposed = api.create_commit(NAME, notes(b"2"), commit_message="please", create_pr=True)
    assert proposed.pr_num == 1
    assert [(d.title, d.status) for d in api.get_repo_discussions(NAME)] == [("please", "open")]
    assert api.get_discussion_details(NAME, 1).events
    assert not api.file_exists(NAME, "notes.txt")
    assert Path(hub.hf_hub_download(NAME, "notes.txt", revision="refs/pr/1")).read_text() == "2"
    api.merge_pull_request(NAME, 1)
    assert api.file_exists(NAME, "notes.txt")
    refs = api.list_repo_refs(NAME, include_pull_requests=True)
    assert [t.target_commit for t in refs.tags] == [commit]
    assert {b.name for b in refs.branches} == {"main", "side"}
    assert [p.ref for p in refs.pull_requests or []] == ["refs/pr/1"]
    api.delete_tag(NAME, tag="v1")


def check_collections(api: hub.HfApi) -> None:
    """A collection is created once, and takes repositories that exist."""
    collection = api.create_collection("PIVOT", namespace="pivot")
    assert api.create_collection("PIVOT", namespace="pivot", exists_ok=True).slug == collection.slug
    api.add_collection_item(collection.slug, NAME, "model", note="DPO")
    filled = api.add_collection_item(collection.slug, NAME, "model", exists_ok=True)
    assert [(i.item_id, i.note) for i in filled.items] == [(NAME, "DPO")]
    assert status(lambda: api.add_collection_item(collection.slug, "pivot/none", "model")) == 404


def check_spaces_and_deletion(api: hub.HfApi, folder: Path) -> None:
    api.create_repo("pivot/app", repo_type="space", space_sdk="gradio")
    (folder / "README.md").write_text("---\ntitle: App\nsdk: gradio\n---\n")
    api.upload_folder(repo_id="pivot/app", repo_type="space", folder_path=folder)
    file = hub.hf_hub_download("pivot/app", "model.safetensors", repo_type="space")
    assert Path(file).read_bytes() == FILES["model.safetensors"]
    api.delete_repo(NAME)
    refused(RepositoryNotFoundError, lambda: api.model_info(NAME))


def main() -> None:
    api = hub.HfApi()
    folder = Path(tempfile.mkdtemp())
    check_repositories(api, hub.HfApi(token=os.environ["READER"]))
    commit = check_upload_and_download(api, folder)
    check_commits(api, folder, commit)
    check_refs(api, commit)
    check_collections(api)
    check_spaces_and_deletion(api, folder)
    print(hub.__version__)


if __name__ == "__main__":
    main()
