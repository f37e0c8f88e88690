"""What huggingface_hub asks of a hub, call by call; run by an unmodified client of any version, on HF_ENDPOINT."""

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

README = "---\nlicense: apache-2.0\ntags:\n- pivot\n---\n# A model\n"


def status(call: Callable[[], Any]) -> int:
    try:
        call()
    except HfHubHTTPError as error:
        return int(error.response.status_code)
    raise AssertionError("it was answered")


def refused(kind: type[Exception], call: Callable[[], Any]) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


def main() -> None:
    api = hub.HfApi()
    name = "pivot/calls"
    assert api.whoami()["name"] == "ada"
    assert status(hub.HfApi(token="nobody's").whoami) == 401
    reader = hub.HfApi(token=os.environ["READER"])

    # Repositories: made once, seen by whom they are for.
    assert api.create_repo(name, private=True).repo_id == name
    api.create_repo(name, private=True, exist_ok=True)
    assert status(lambda: api.create_repo(name)) == 409
    assert status(lambda: reader.create_repo("bob/x")) == 403
    assert status(lambda: api.create_repo("somebody/x")) == 403
    assert api.model_info(name).private
    for other in (reader, hub.HfApi(token=False)):
        refused(RepositoryNotFoundError, lambda o=other: o.model_info(name))  # type: ignore[misc]

    # One commit of small and large files, the largest in parts, then read back byte by byte.
    folder = Path(tempfile.mkdtemp())
    (folder / "sub").mkdir()
    files = {
        "README.md": README.encode(),
        "model.safetensors": os.urandom(2_500_000),
        "small.safetensors": b"abc",
        "sub/a b#.json": b"{}",
        "empty.txt": b"",
    }
    for path, content in files.items():
        (folder / path).write_bytes(content)
    first = api.model_info(name).sha
    assert first is not None
    done = api.upload_folder(repo_id=name, folder_path=folder, parent_commit=first, commit_message="all")
    assert [c.title for c in api.list_repo_commits(name)] == ["all", "initial commit"]
    snapshot = Path(hub.snapshot_download(name))
    assert snapshot.name == done.oid
    assert all((snapshot / path).read_bytes() == content for path, content in files.items())
    listed = {f.path: f for f in api.list_repo_tree(name, recursive=True)}
    assert {*files, ".gitattributes", "sub"} == listed.keys()
    assert listed["model.safetensors"].lfs is not None  # type: ignore[union-attr]
    assert listed["README.md"].lfs is None  # type: ignore[union-attr]
    assert len(list(api.get_paths_info(name, ["README.md", "model.safetensors", "none"]))) == 2
    assert api.file_exists(name, "model.safetensors")
    refused(EntryNotFoundError, lambda: hub.hf_hub_download(name, "none"))
    refused(RevisionNotFoundError, lambda: hub.hf_hub_download(name, "README.md", revision="none"))

    # Nothing is overwritten blindly, nothing empty is committed, nothing wrong in its form is taken.
    add = lambda content: [hub.CommitOperationAdd("notes.txt", content)]  # noqa: E731
    assert status(lambda: api.create_commit(name, add(b"1"), commit_message="late", parent_commit=first)) == 412
    same = api.upload_folder(repo_id=name, folder_path=folder, commit_message="again")
    assert same.oid == done.oid
    for wrong in ("tags: 3", "model-index: 3", "datasets: [a b]", "- list"):
        operation = hub.CommitOperationAdd("README.md", f"---\n{wrong}\n---\n".encode())
        refused(ValueError, lambda o=operation: api.create_commit(name, [o], commit_message="x"))  # type: ignore[misc]
    api.create_commit(name, [hub.CommitOperationDelete("sub/", is_folder=True)], commit_message="less")
    assert not api.file_exists(name, "sub/a b#.json")

    # Tags, branches, pull requests, their discussions.
    api.create_tag(name, tag="v1", revision=done.oid)
    assert status(lambda: api.create_tag(name, tag="v1")) == 409
    api.create_branch(name, branch="side")
    proposed = api.create_commit(name, add(b"2"), commit_message="please", create_pr=True)
    assert proposed.pr_num == 1
    assert [(d.title, d.status) for d in api.get_repo_discussions(name)] == [("please", "open")]
    assert api.get_discussion_details(name, 1).events
    assert not api.file_exists(name, "notes.txt")
    assert Path(hub.hf_hub_download(name, "notes.txt", revision="refs/pr/1")).read_text() == "2"
    api.merge_pull_request(name, 1)
    assert api.file_exists(name, "notes.txt")
    refs = api.list_repo_refs(name, include_pull_requests=True)
    assert [t.target_commit for t in refs.tags] == [done.oid]
    assert {b.name for b in refs.branches} == {"main", "side"}
    assert [p.ref for p in refs.pull_requests or []] == ["refs/pr/1"]
    api.delete_tag(name, tag="v1")

    # Collections, Spaces, deletion.
    made = api.create_collection("PIVOT", namespace="pivot")
    assert api.create_collection("PIVOT", namespace="pivot", exists_ok=True).slug == made.slug
    api.add_collection_item(made.slug, name, "model", note="DPO")
    filled = api.add_collection_item(made.slug, name, "model", exists_ok=True)
    assert [(i.item_id, i.note) for i in filled.items] == [(name, "DPO")]
    assert status(lambda: api.add_collection_item(made.slug, "pivot/none", "model")) == 404
    api.create_repo("pivot/app", repo_type="space", space_sdk="gradio")
    (folder / "README.md").write_text("---\ntitle: App\nsdk: gradio\n---\n")
    api.upload_folder(repo_id="pivot/app", repo_type="space", folder_path=folder)
    place = hub.hf_hub_download("pivot/app", "model.safetensors", repo_type="space")
    assert Path(place).read_bytes() == files["model.safetensors"]
    api.delete_repo(name)
    refused(RepositoryNotFoundError, lambda: api.model_info(name))
    print(hub.__version__)


if __name__ == "__main__":
    main()
