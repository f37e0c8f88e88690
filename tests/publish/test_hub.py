"""Publishing: the commands against a hub, in processes of their own with the unmodified client."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import SpaceCard

from pivot_hub.demo.launch import SPACES, load_module
from pivot_hub.errors import PublishError
from pivot_hub.provenance import file_sha256
from pivot_hub.publish import remote
from pivot_hub.publish.staging import stage_space, stage_static_space
from tests.publish.hub_faults import PAGE, SCENARIOS, insert_table, refuse_from_each_request, render, try_faults
from tests.publish.hub_server import ROOT, HubServer, hub_server, state
from tests.publish.publishable import PROSE, make_publishable

PACKAGE = ["--package", "https://files.example/pivot_hub-0.1.0-py3-none-any.whl"]  # of the Spaces that are pushed
NAME = "pivot/siglip2-so400m"  # a small encoder under the name of one that is not trained yet


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with hub_server(tmp_path_factory.mktemp("hub")) as served:
        yield served


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_publishable(tmp_path_factory.mktemp("encoder") / "tiny-dpo")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working folder of the commands: prose in three versions, images, and the commands' output."""
    folder = tmp_path_factory.mktemp("work")
    for version in ("0.1.0", "0.2.0"):
        (folder / f"{version}.yaml").write_text(yaml.safe_dump({**PROSE, "version": version}))
    (folder / "worse.yaml").write_text(yaml.safe_dump({**PROSE, "limits": ["It is random, and small."]}))
    return folder


def commands(
    server: HubServer, work: Path, *argument_lists: list[str], user: str = "ada", **variables: str
) -> list[dict[str, Any]]:
    """Run several commands one after the other in one process; exit code, stdout and stderr of each."""
    environment = server.environment(work / f"home-{user}", user) | variables
    command = [sys.executable, "-m", "tests.publish.hub_commands"]
    options: dict[str, Any] = {"env": environment, "cwd": work, "input": json.dumps(argument_lists)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    for answer in answers:
        assert "Traceback" not in answer["err"], answer["err"]
        assert not any(token in answer["out"] + answer["err"] for token in server.tokens.values())
    return answers


@pytest.fixture(scope="module")
def published(server: HubServer, encoder: Path, work: Path) -> list[dict[str, Any]]:
    """The first publication: without a terminal, then with --yes, then again, then with a changed card."""
    push = ["push", str(encoder), NAME, "--prose"]
    return commands(
        server,
        work,
        [*push, "0.1.0.yaml"],
        [*push, "0.1.0.yaml", "--yes", "--private", "--json", "push.json"],
        [*push, "0.1.0.yaml", "--yes"],
        [*push, "worse.yaml", "--yes"],
        ["push", str(encoder), NAME],
    )


def test_a_push_shows_what_will_change_and_asks(published: list[dict[str, Any]]) -> None:
    answer = published[0]
    assert answer["code"] == 2
    assert f"{NAME} at http://127.0.0.1:" in answer["out"]
    assert "a new model repository" in answer["out"]
    assert "+ model.safetensors" in answer["out"]
    assert "add --yes" in answer["err"]


def test_a_push_is_one_commit_with_the_versions_tag(
    server: HubServer, published: list[dict[str, Any]], work: Path
) -> None:
    report = json.loads((work / "push.json").read_text())
    assert published[1]["code"] == 0, published[1]["err"]
    repo = server.repo(NAME)
    assert repo is not None
    assert repo.private
    assert [c.title for c in repo.commits.values()] == ["initial commit", repo.commit_at("main").title]
    assert repo.commit_at("main").title.startswith("0.1.0: dpo encoder, weights ")
    assert repo.refs == {"refs/heads/main": report["commit"], "refs/tags/v0.1.0": report["commit"]}
    paths = set(repo.commit_at("main").tree) - {".gitattributes"}
    assert paths == {c["path"] for c in report["changes"]}
    assert {"README.md", "sft-against-dpo.png", ".eval_results/shapes.yaml", "results/dpo.json"} <= paths
    assert f'AutoModel.from_pretrained("{NAME}")' in server.text(NAME, "README.md")


def test_pushing_again_changes_nothing(server: HubServer, published: list[dict[str, Any]]) -> None:
    assert published[2]["code"] == 0
    assert "nothing to change" in published[2]["out"]
    assert "unchanged" in published[2]["out"]


def test_another_card_needs_another_version(published: list[dict[str, Any]]) -> None:
    assert published[3]["code"] == 1
    assert "has v0.1.0 at" in published[3]["err"]
    assert "raise `version`" in published[3]["err"]
    assert published[4]["code"] == 2
    assert "there is no prose of this name" in published[4]["err"]


def test_no_token_is_in_any_file(server: HubServer, published: list[dict[str, Any]], encoder: Path, work: Path) -> None:
    files = [f for folder in (server.store.folder, encoder, work) for f in folder.rglob("*") if f.is_file()]
    assert len(files) > 30
    for file in files:
        content = file.read_bytes()
        assert not any(token.encode() in content for token in server.tokens.values()), file


def test_the_encoder_stays_as_it_was(encoder: Path, published: list[dict[str, Any]]) -> None:
    assert not (encoder / "README.md").exists()


def test_transformers_loads_it_by_name_from_an_empty_cache(
    server: HubServer, published: list[dict[str, Any]], tmp_path: Path
) -> None:
    """In a process that cannot import this package; `make conformance` does the same with transformers 4.57.6."""
    environment = server.environment(tmp_path / "empty") | {"PYTHONPATH": ""}
    script = tmp_path / "load.py"
    shutil.copyfile(ROOT / "tests" / "publish" / "hub_load.py", script)
    done = subprocess.run(
        [sys.executable, str(script), NAME], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])["loaded"][NAME]
    assert loaded["keys"] == []
    assert loaded["classes"][:2] == ["SiglipVisionModel", "PivotVisionModel"]
    assert loaded["difference"] < 1e-5


@pytest.mark.slow
def test_without_access_the_message_names_the_remedy(
    server: HubServer, published: list[dict[str, Any]], work: Path
) -> None:
    (answer,) = commands(server, work, ["verify", NAME], user="bob")
    assert answer["code"] == 1
    assert "there is no such repository, or your login may not see it" in answer["err"]
    (answer,) = commands(server, work, ["push", NAME, "bob/app", "--space", *PACKAGE], user="")
    assert answer["code"] == 1
    (answer,) = commands(server, work, ["pull", NAME], HF_HUB_OFFLINE="1")
    assert "offline mode is on; unset HF_HUB_OFFLINE" in answer["err"]


def test_pull_verify_and_use_by_name(server: HubServer, published: list[dict[str, Any]], work: Path) -> None:
    from PIL import Image

    (work / "images").mkdir()
    Image.effect_noise((40, 40), 60).convert("RGB").save(work / "images" / "a.png")
    verified, pulled, encoded, unknown = commands(
        server,
        work,
        ["verify", NAME, "--json", "verify.json"],
        ["pull", NAME, "--revision", "v0.1.0"],
        ["encode", "images", "--encoder", NAME, "--out", "features.npy"],
        ["pull", NAME, "other", "--revision", "v9"],
    )
    assert verified["code"] == pulled["code"] == encoded["code"] == 0, (verified, pulled, encoded)
    assert json.loads((work / "verify.json").read_text())["problems"] == []
    folder = work / "hub" / NAME
    checksums = json.loads((folder / "provenance.json").read_text())["files"]
    assert {str(f.relative_to(folder)): file_sha256(f) for f in folder.rglob("*") if f.is_file()} == {
        **checksums,
        "provenance.json": file_sha256(folder / "provenance.json"),
    }
    assert np.load(work / "features.npy").shape == (1, 32)
    repo = server.repo(NAME)
    assert repo is not None
    report = json.loads((work / "features.npy.json").read_text())
    assert report["encoder"] == NAME
    assert report["encoder_sha256"] == repo.refs["refs/heads/main"]
    assert unknown["code"] == 1
    assert "no such revision" in unknown["err"]
    assert not (work / "other").exists()


@pytest.mark.slow
def test_a_file_edited_on_the_hub_fails_verify_and_pull(
    server: HubServer, published: list[dict[str, Any]], encoder: Path, work: Path
) -> None:
    name = "ada/changed"
    push = ["push", str(encoder), name, "--yes", "--prose", "0.1.0.yaml"]
    assert commands(server, work, push)[0]["code"] == 0
    card = server.text(name, "README.md")
    server.write(name, "README.md", card.replace("value: 70.0", "value: 99.0"))
    verified, pulled = commands(server, work, ["verify", name], ["pull", name, "changed"])
    assert verified["code"] == pulled["code"] == 1
    assert "README.md differs from the hash it was published with" in verified["out"]
    assert "is not what was published" in pulled["err"]
    assert not (work / "changed").exists()
    # The next push detects the edit, and opens a pull request.
    before = state(server, name)
    proposed, again = commands(server, work, push, push)
    assert proposed["code"] == again["code"] == 0, proposed["err"]
    assert "One pull request, because its card was edited by hand" in proposed["out"]
    assert "-      value: 99.0" in proposed["out"].replace("  -", "-")
    after = state(server, name)
    assert after["refs"]["refs/heads/main"] == before["refs"]["refs/heads/main"]
    assert after["pulls"] == [1]


@pytest.mark.slow
def test_other_edits_by_hand_become_a_pull_request_too(server: HubServer, encoder: Path, work: Path) -> None:
    names = {"ada/foreign": "notes.txt", "ada/config": "config.json", "ada/theirs": "README.md"}
    pushes = [["push", str(encoder), n, "--yes", "--prose", "0.1.0.yaml"] for n in names]
    assert [s["code"] for s in commands(server, work, *pushes[:2])] == [0, 0]
    server.store.create("model", "ada/theirs", False, None, "ada")
    for name, path in names.items():
        server.write(name, path, "{}")
    heads = {name: state(server, name)["refs"]["refs/heads/main"] for name in names}
    next_version = [[*p[:-1], "0.2.0.yaml"] for p in pushes]
    for name, answer, reason in zip(
        names,
        commands(server, work, *next_version),
        ("notes.txt was added or deleted by hand", "config.json was edited by hand", "was not made by this package"),
        strict=True,
    ):
        assert answer["code"] == 0, answer["err"]
        assert "One pull request" in answer["out"]
        assert reason in answer["out"]
        assert state(server, name)["refs"]["refs/heads/main"] == heads[name]


@pytest.mark.slow
def test_the_question_can_be_answered_no(server: HubServer, encoder: Path, work: Path) -> None:
    """On a terminal, the question comes after the changes, and `n` publishes nothing."""
    import os
    import pty

    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "pivot_hub", "push", str(encoder), "ada/declined", "--prose", "0.1.0.yaml"]
    options: dict[str, Any] = {"env": server.environment(work / "home-ada"), "cwd": work, "stdin": terminal}
    os.write(main, b"n\n")
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    os.close(main)
    os.close(terminal)
    assert done.returncode == 1
    assert done.stdout.index("+ README.md") < done.stdout.index("Publish this?")
    assert server.repo("ada/declined") is None


@pytest.mark.slow
def test_exports_collection_and_space(server: HubServer, encoder: Path, work: Path) -> None:
    """SFT and DPO are added to one collection with their base encoder; the Space refers to both."""
    server.store.create("model", "pivot/tiny-base", False, None, "ada")
    push = ["push", str(encoder), "pivot/tiny-dpo", "--yes", "--prose", "0.1.0.yaml"]
    sft = ["push", str(encoder), "pivot/tiny-sft", "--yes", "--prose", "0.1.0.yaml"]
    missing = ["push", "pivot/none", "pivot/app", "--space", "--yes", *PACKAGE]
    space = ["push", "pivot/tiny-sft", "pivot/tiny-dpo", "pivot/app", "--space", "--yes", *PACKAGE]
    page = ["push", "pivot/tiny-dpo", "pivot/tiny-dpo", "pivot/page", "--space", "--static", "--yes"]
    answers = commands(
        server, work, sft, [*push, "--also", "onnx", "--collection", "PIVOT tiny"], missing, space, space, page, page
    )
    codes = [a["code"] for a in answers]
    assert codes == [0, 0, 1, 0, 0, 0, 0], [a["err"] for a in answers]
    repo = server.repo("pivot/tiny-dpo")
    assert repo is not None
    tree = repo.commit_at("v0.1.0").tree
    assert "onnx/model.onnx" in tree
    assert tree["onnx/model.onnx"].sha256
    assert "| `onnx/model.onnx` | " in server.text("pivot/tiny-dpo", "README.md")
    (collection,) = server.store.collections
    assert [(i["id"], i["note"]["text"]) for i in collection["items"]] == [
        ("pivot/tiny-dpo", "DPO"),
        ("pivot/tiny-sft", "SFT"),
        ("pivot/tiny-base", "base"),
    ]
    assert "no such repository" in answers[2]["err"]
    app = server.repo("pivot/app", "space")
    assert app is not None
    assert len(app.commits) == 2
    tree = app.commit_at("main").tree
    assert {"app.py", "requirements.txt", "README.md"} <= tree.keys()
    assert server.store.path(app, tree["requirements.txt"]).read_text() == f"pivot-hub[space] @ {PACKAGE[1]}\n"
    header = SpaceCard(server.store.path(app, tree["README.md"]).read_text())
    assert header.data.get("models") == ["pivot/tiny-sft", "pivot/tiny-dpo"]
    assert header.data.get("sdk") == "gradio"
    assert "pair.json" not in app.commit_at("main").tree  # without MLLMs, the app starts with the bundle that it ships
    assert "nothing to change" in answers[4]["out"]
    static = server.repo("pivot/page", "space")
    assert static is not None
    assert static.sdk == "static"
    tree = static.commit_at("main").tree
    assert SpaceCard(server.store.path(static, tree["README.md"]).read_text()).data.get("sdk") == "static"
    assert {"index.html", "app.js", "worker.js", "models/shapes-sft/onnx/model.onnx"} <= tree.keys()
    settings = json.loads(server.store.path(static, tree["settings.json"]).read_text())
    assert (settings["left"], settings["right"], settings["hub"]) == (
        "pivot/tiny-dpo",
        "pivot/tiny-dpo",
        server.address,
    )
    assert "nothing to change" in answers[6]["out"]


def test_the_page_without_a_server_starts_with_the_encoders_it_is_pushed_for() -> None:
    with stage_static_space("me/page", "me/sft", "me/dpo", "https://hub.example") as publication:
        assert (publication.type, publication.sdk) == ("space", "static")
        staged = {str(f.relative_to(publication.folder)) for f in publication.folder.rglob("*") if f.is_file()}
        shipped = {str(f.relative_to(SPACES / "browser")) for f in (SPACES / "browser").rglob("*") if f.is_file()}
        assert staged == shipped | {"provenance.json"}
        settings = json.loads((publication.folder / "settings.json").read_text())
        assert settings == json.loads((SPACES / "browser" / "settings.json").read_text()) | {
            "left": "me/sft",
            "right": "me/dpo",
            "hub": "https://hub.example",
        }
        assert SpaceCard.load(publication.folder / "README.md").data["models"] == ["me/sft", "me/dpo"]


@pytest.mark.parametrize(
    ("files", "state", "message"),
    [
        (["onnx/model.onnx", "preprocessor_config.json"], {"private": True, "gated": False}, "me/sft is not public"),
        (["onnx/model.onnx", "preprocessor_config.json"], {"private": False, "gated": "auto"}, "me/sft is not public"),
        (["preprocessor_config.json"], {"private": False, "gated": False}, "me/sft has no onnx/model.onnx: push it"),
    ],
    ids=["private", "gated", "not exported"],
)
def test_an_encoder_that_browsers_cannot_download_is_refused(
    monkeypatch: pytest.MonkeyPatch, files: list[str], state: dict[str, Any], message: str
) -> None:
    siblings = [SimpleNamespace(rfilename=name, size=1, lfs=None, blob_id="0") for name in files]
    info = SimpleNamespace(sha="0", siblings=siblings, **state)
    monkeypatch.setattr(remote, "repository_info", lambda api, name, *rest: info)
    with pytest.raises(PublishError, match=message):
        remote.check_exports(["me/sft", "me/dpo"])


def test_a_space_starts_with_the_mllms_it_is_pushed_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "repository_info", lambda api, name, *rest: SimpleNamespace(sha="0"))

    def download_config(name: str, filename: str, revision: str) -> str:
        file = tmp_path / name.replace("/", "-")
        file.write_text(json.dumps({"model_type": "siglip_vision_model" if name == "me/encoder" else "llava"}))
        return str(file)

    monkeypatch.setattr(remote, "hf_hub_download", download_config)
    mllms = remote.find_mllms(["me/sft", "me/dpo", "me/encoder", "me/parent"])
    assert mllms == ["me/sft", "me/dpo", "me/parent"]
    everything = ["me/sft", "me/dpo", "me/encoder", "me/parent"]
    with stage_space("me/app", everything, "pivot-hub[space]==9", mllms) as publication:
        app = load_module(publication.folder / "app.py")
        names, _ = app.names_from_environment()
        assert (names.first, names.second, names.parent) == ("me/sft", "me/dpo", "me/parent")
        monkeypatch.setenv("PIVOT_FIRST", "you/sft")
        assert app.names_from_environment()[0].first == "you/sft"
    with stage_space("me/app", ["me/encoder"], "pivot-hub[space]==9") as publication:
        assert not (publication.folder / "pair.json").exists()


@pytest.mark.slow
def test_a_hub_without_xet_is_an_error_that_names_the_setting(server: HubServer, encoder: Path, work: Path) -> None:
    push = ["push", str(encoder), "ada/xet", "--yes", "--prose", "0.1.0.yaml"]
    (answer,) = commands(server, work, push, HF_HUB_DISABLE_XET="0")
    assert answer["code"] == 1
    assert "has no Xet storage: set HF_HUB_DISABLE_XET=1" in answer["err"]
    assert server.repo("ada/xet") is None


def test_bad_input_is_one_line(server: HubServer, encoder: Path, work: Path) -> None:
    mine, prose = str(encoder), ["--prose", "0.1.0.yaml", "--yes"]
    expected = [
        (["push", "nowhere"], 2, "push takes ENCODER REPO"),
        (["push", "a", "b", "c"], 2, "push takes ENCODER REPO"),
        (["push", "ada/sft", "ada/page", "--space", "--static"], 2, "push --static takes LEFT RIGHT SPACE"),
        (["push", "ada/sft", "ada/app", "--space", "--package", "torch==2.13.0"], 2, "is not pivot-hub"),
        (["push", "ada/none", "ada/none", "ada/page", "--space", "--static"], 1, "no such repository"),
        (["push", "nowhere", "ada/x", *prose], 1, "there is no such folder"),
        (["push", mine, "ada/x/y", *prose], 1, "is not a valid repository name"),
        (["push", mine, "ada/x", *prose, "--also", "tflite"], 1, "give any of onnx, int8"),
        (["push", mine, "somebody/x", *prose], 1, "the hub answered 403"),
        (["push", mine, NAME, "--prose", "none.yaml"], 2, "there is no prose of this name"),
        (["pull", "ada/none"], 1, "there is no such repository"),
        (["card", "nowhere", "--prose", "0.1.0.yaml"], 2, "config.json is missing"),
    ]
    answers = commands(server, work, *(arguments for arguments, _, _ in expected))
    for answer, (arguments, code, part) in zip(answers, expected, strict=True):
        assert answer["code"] == code, arguments
        assert part in answer["err"], arguments
        assert len(answer["err"].strip().splitlines()) == 1, arguments


@pytest.mark.parametrize("new", [False, True], ids=["existing", "new"])
def test_after_a_refused_request_the_remote_is_as_before_or_complete(tmp_path: Path, new: bool) -> None:
    rows = refuse_from_each_request(tmp_path, new)
    assert len(rows) > 8, "a push is several requests"
    trees = {row["whole"]["tree"] for row in rows}
    assert len(trees) == 1, "in the end all repositories are the same"
    for number, row in enumerate(rows):
        assert row["again"] in ("commit", "unchanged"), number
        assert row["ends"] in ("refused", "commit"), number
        assert row["whole"]["refs"]["refs/tags/v0.1.1"] == row["whole"]["refs"]["refs/heads/main"]
        if row["after"] == row["before"]:
            continue
        # Otherwise all files are there without the tag, or the repository is empty, as its deletion was refused too.
        empty = new and ".gitattributes" in row["after"]["tree"] and "README.md" not in row["after"]["tree"]
        assert row["after"]["tree"] == row["whole"]["tree"] or empty, number


@pytest.mark.slow
def test_every_fault_ends_as_the_table_says(tmp_path: Path) -> None:
    rows = try_faults(tmp_path)
    outcomes = [(r["fault"], r["tries"], r["ends"], r["remote"], r["again"]) for r in rows]
    assert outcomes == [(s.name, s.tries, s.ends, s.remote, s.again) for s in SCENARIOS]
    for row in rows:
        assert row["sound"], row["fault"]
        whole = "the whole folder" if row["ends"] == "pulled" else "no folder"
        assert row["local"] == (whole if "pull:" in row["fault"] else "as before"), row
        assert (row["message"] == "") == (row["ends"] in ("commit", "pull request", "pulled", "killed")), row
        # A large file that was uploaded is not sent again.
        assert row["uploaded_again"] == {
            "500 at an upload, once": 1,
            "the hub's disk is full": row["uploaded_again"],
        }.get(row["fault"], int("of an upload" in row["fault"] or "killed" in row["fault"])), row
    page = PAGE.read_text()
    assert insert_table(page, render(rows)) == page, "`python -m tests.publish.hub_faults` writes the table"
