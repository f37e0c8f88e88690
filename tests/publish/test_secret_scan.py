"""The secret scan before a push: it finds planted secrets, paths and names, and passes what may be published."""

from __future__ import annotations

import getpass
import json
import random
import socket
import string
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pivot_hub.config.recipe import RECIPES
from pivot_hub.errors import PublishError
from pivot_hub.publish.card_collection import RECORDED
from pivot_hub.publish.secret_scan import scan_for_secrets
from pivot_hub.publish.staging import stage_encoder
from tests.publish.hub_server import ROOT
from tests.publish.publishable import make_prose, make_publishable


def random_text(length: int, letters: str = string.ascii_letters + string.digits) -> str:
    """Text in the form of a secret, so that none is written in this file."""
    return "".join(random.Random(length).choices(letters, k=length))


SECRETS = {
    "Hugging Face": "hf_" + random_text(34),
    "Hugging Face organisation": "api_org_" + random_text(34),
    "GitHub": "ghp_" + random_text(36),
    "GitHub, fine": "github_pat_" + random_text(40),
    "AWS": "AKIA" + random_text(16, string.ascii_uppercase + string.digits),
    "OpenAI": "sk-" + random_text(40),
    "Google": "AIza" + random_text(35),
    "Slack": "xoxb-" + random_text(24),
    "key": "-----BEGIN RSA PRIVATE " + "KEY-----",
    "web": ".".join(("eyJ" + random_text(20), "eyJ" + random_text(30), random_text(30))),
    "address": f"https://ada:{random_text(12)}@example.org/x",
    "assigned": f'WANDB_API_KEY="{random_text(40)}"',
    "password": f"password: {random_text(12)}",
}
PLACES = [
    "/home/ada/runs/3-dpo",
    "/Users/ada/models",
    "/root/.cache/huggingface",
    "/tmp/pytest-of-ada/x",
    "/mnt/data/images.zip",
    "/scratch/ada/run",
    r"C:\Users\ada\models",
    r"C:\\Users\\ada",
]


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
@pytest.mark.parametrize("name", ["README.md", "config.json", "onnx/model.onnx", "code.py"])
def test_a_planted_secret_is_found_and_not_repeated(tmp_path: Path, name: str, secret: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    start = b"\0\1binary\n" if name.endswith(".onnx") else b"text\n"
    file.write_bytes(start * 1000 + secret.encode() + b"\n")
    findings = scan_for_secrets(tmp_path)
    assert len(findings) == 1
    assert findings[0].startswith(name)
    assert secret[:30] not in findings[0] or len(secret) < 30
    assert ("at byte" if name.endswith(".onnx") else ":1001 ") in findings[0]


@pytest.mark.parametrize("place", PLACES)
def test_a_planted_path_is_found(tmp_path: Path, place: str) -> None:
    (tmp_path / "provenance.json").write_text(json.dumps({"path": place}) if "\\" not in place else place)
    findings = scan_for_secrets(tmp_path)
    assert len(findings) == 1
    assert "an absolute path" in findings[0]


def test_the_headers_of_weights_are_scanned(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "model.safetensors", metadata={"from": PLACES[0]})
    assert "model.safetensors at byte" in scan_for_secrets(tmp_path)[0]


def test_own_token_home_and_names_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "somewhere" / "deep"
    monkeypatch.setenv("HF_TOKEN", "no-known-form")
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.setattr(getpass, "getuser", lambda: "adalovelace")
    monkeypatch.setattr(socket, "gethostname", lambda: "analytical-engine")
    folder = tmp_path / "staged"
    folder.mkdir()
    for text, kind in (
        ("x = no-known-form", "your Hugging Face token"),
        (f"see {home}/x", "a folder of this machine"),
        ("trained by adalovelace.", "your user name"),
        ("on analytical-engine", "this machine's name"),
    ):
        (folder / "notes.md").write_text(text)
        findings = scan_for_secrets(folder)
        # The general pattern may match the folder of the test itself.
        assert any(kind in f for f in findings) or "an absolute path" in findings[0], kind
    (folder / "notes.md").write_text("adalovelace/encoder")
    assert scan_for_secrets(folder)
    assert scan_for_secrets(folder, allowed="adalovelace/encoder") == []


def test_harmless_text_passes(tmp_path: Path) -> None:
    for text in (
        "https://huggingface.co/home/x and github.com/root/y",
        "runs/home/x, ../tmp/y, ~/home/z",
        "pad_token: <pad>, tokens: 64, token_type_ids",
        "sha256: " + "0123456789abcdef" * 4,
        "the root of the tree, a user of the model",
    ):
        (tmp_path / "README.md").write_text(text)
        assert scan_for_secrets(tmp_path) == [], text


@pytest.mark.parametrize("folder", [RECIPES / "shapes" / "base", RECORDED, ROOT / "spaces"])
def test_what_ships_with_the_package_is_clean(folder: Path) -> None:
    assert scan_for_secrets(folder) == []


def test_a_push_with_a_finding_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    """No hub is reachable from this process, so that sending anything would fail."""
    encoder = make_publishable(tmp_path / "tiny-dpo")
    for text in ("It lies in /home/ada/runs.", f"Read it with {SECRETS['Hugging Face']}."):
        with (
            pytest.raises(PublishError, match=r"nothing was published: README.md:\d+ holds"),
            stage_encoder(encoder, "pivot/tiny-dpo", make_prose(limits=[text])),
        ):
            pass
