"""What a pull and a push take from a folder: the files of its manifest, and nothing from elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pivot_hub.errors import OutputError, PublishError
from pivot_hub.outputs import ENCODER
from pivot_hub.provenance import write_manifest
from pivot_hub.publish import pull as pulling
from pivot_hub.publish import staging
from pivot_hub.publish.card_collection import RECORDED
from pivot_hub.publish.manifest import manifest_files
from pivot_hub.publish.push_local import _run_python
from tests.publish.publishable import make_prose


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("config.json", "modeling_pivot.py"):
        (folder / name).write_text("{}")
    write_manifest(folder, {})
    return folder


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch, repository: Path) -> Path:
    """The repository as a download that `verify` finds sound."""
    monkeypatch.setattr(pulling, "fetch", lambda *_, **__: repository)
    monkeypatch.setattr(pulling, "published_problems", lambda _: [])
    return repository


def link_out(repository: Path) -> None:
    """Put a link to a file of the user in the repository, and seal it again: every hash is right."""
    (repository.parent / "private.txt").write_text("private")
    (repository / "notes.md").symlink_to(repository.parent / "private.txt")
    write_manifest(repository, {})


def test_a_folder_with_other_files_is_not_replaced_by_a_pull(sound: Path, tmp_path: Path) -> None:
    output = tmp_path / "papers"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"papers holds thesis.tex.*Nothing was touched"):
        pulling.pull("pivot/x", output)
    assert (output / "thesis.tex").read_text() == "years of work"
    assert [p.name for p in output.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_is_filled_and_an_encoder_is_replaced(sound: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (sound / "extra.txt").write_text("in the snapshot, but not in the manifest")
    for text in ("{}", '{"second": 1}'):
        (sound / "config.json").write_text(text)
        assert pulling.pull("pivot/x", output) == output
        assert (output / "config.json").read_text() == text
    assert sorted(p.name for p in output.iterdir()) == ["config.json", "modeling_pivot.py", "provenance.json"]
    assert not [p for p in tmp_path.iterdir() if ".pivot-" in p.name]


def test_a_link_out_of_the_repository_is_neither_pulled_nor_published(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link_out(sound)
    with pytest.raises(PublishError, match=r"notes.md is a link out of the repository"):
        pulling.pull("pivot/x", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("pivot_hub.encoder.repository.verify_repository", lambda _: [])
    with (
        pytest.raises(PublishError, match=r"notes.md is a link out"),
        staging.stage_encoder(sound, "a/b", make_prose()),
    ):
        pass


def test_links_of_the_hubs_cache_are_files_of_the_repository(repository: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in repository.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert manifest_files(snapshot) == ["config.json", "modeling_pivot.py", "provenance.json"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\\..\\x", ""])
def test_a_name_that_leads_out_is_refused(repository: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (repository / "provenance.json").write_text(json.dumps({"files": {name: "0"}, "sha256": "0"}))
    with pytest.raises(PublishError, match="leads out of the repository"):
        manifest_files(repository)
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name)], sha="0" * 40)
    monkeypatch.setattr(pulling, "repository_info", lambda *_: info)
    with pytest.raises(PublishError, match="leads out of the repository"):
        pulling.fetch("pivot/x")


def test_the_recorded_metadata_of_the_cards_can_be_replaced() -> None:
    """`pivot card --all --quickstart` replaces these folders, which hold files of an encoder repository."""
    assert [ENCODER.foreign_file(folder) for folder in sorted(RECORDED.iterdir())] == [None, None]


def test_code_in_the_working_directory_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`quickstart --push-local` starts this package in processes of its own."""
    package = tmp_path / "pivot_hub"
    package.mkdir()
    for name in ("__init__", "__main__"):
        (package / f"{name}.py").write_text("raise SystemExit('a stranger')")
    (tmp_path / "json.py").write_text("raise SystemExit('a stranger')")
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "pivot_hub", "--version"]
    plain = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "a stranger" in plain.stderr, "without -P the planted code runs, so that this test can fail"
    assert "pivot_hub 0" in _run_python(["-m", "pivot_hub", "--version"], dict(os.environ))
