"""What a release needs: one version in all files, the cards' citation, and templates that GitHub reads."""

from __future__ import annotations

import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import pivot_hub
from tests.release import ROOT, build, stated_versions

TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
FORMS = [path for path in TEMPLATES if path.stem != "config"]


def test_all_files_state_one_version() -> None:
    assert set(stated_versions().values()) == {pivot_hub.__version__}


def test_another_version_is_seen(tmp_path: Path) -> None:
    for name in stated_versions():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    page = (ROOT / "CHANGELOG.md").read_text()
    (tmp_path / "CHANGELOG.md").write_text(page.replace("## [", "## [0.9.9]\n\n## [", 1))
    assert stated_versions(tmp_path) == {**stated_versions(), "CHANGELOG.md": "0.9.9"}


def test_the_citation_is_that_of_the_cards() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license", "preferred-citation"} <= set(citation)
    paper = citation["preferred-citation"]
    card = (ROOT / "model_cards" / "encoder.md.jinja").read_text()
    bibtex = dict(re.findall(r"^  (\w+) = \{(.*?)\},?$", card, re.MULTILINE))
    assert bibtex["title"] == paper["title"]
    assert bibtex["author"] == " and ".join(f"{a['family-names']}, {a['given-names']}" for a in paper["authors"])
    assert (bibtex["year"], bibtex["booktitle"]) == (str(paper["year"]), paper["collection-title"])
    assert paper["identifiers"][0]["value"] == f"arXiv:{bibtex['eprint']}"
    assert paper["url"].endswith(bibtex["eprint"])
    assert citation["license"] == "Apache-2.0"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_is_one_that_github_reads(path: Path) -> None:
    """The rules of https://docs.github.com/communities/using-templates-to-encourage-useful-issues-and-pull-requests."""
    form: dict[str, Any] = yaml.safe_load(path.read_text())
    assert form["name"]
    assert form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"input", "textarea", "dropdown", "checkboxes"}
    ids = [field["id"] for field in fields]
    assert len(set(ids)) == len(ids) > 0
    for field in form["body"]:
        attributes = field["attributes"]
        assert attributes["value"] if field["type"] == "markdown" else attributes["label"]
        if field["type"] in ("dropdown", "checkboxes"):
            labels = [option["label"] if isinstance(option, dict) else option for option in attributes["options"]]
            assert all(isinstance(label, str) for label in labels)  # an unquoted Yes is a truth value
            assert len(set(labels)) == len(labels)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_there_are_templates_for_bugs_models_and_ideas() -> None:
    assert [path.stem for path in FORMS] == ["bug", "family", "idea"]
    assert (ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md").read_text().count("## ") == 3


@pytest.mark.slow
def test_sdist_and_wheel_are_built_and_pass_twine(tmp_path: Path) -> None:
    (tmp_path / "dist").mkdir()
    for name in ("notes.txt", "pivot_hub-0.0.1-py3-none-any.whl"):
        (tmp_path / "dist" / name).touch()
    sdist, wheel = build(tmp_path / "dist")
    assert {file.name for file in (tmp_path / "dist").iterdir()} == {"notes.txt", sdist.name, wheel.name}
    assert sdist.name == f"pivot_hub-{pivot_hub.__version__}.tar.gz"
    assert wheel.name == f"pivot_hub-{pivot_hub.__version__}-py3-none-any.whl"
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CITATION.cff", "RELEASE_NOTES.md", "CHANGELOG.md", "LICENSE", "notebooks/use_an_encoder.ipynb"} <= names
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "pivot_hub").rglob("*.py")}
    assert modules <= set(zipfile.ZipFile(wheel).namelist())
