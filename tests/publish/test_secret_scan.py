"""The secret scan before a push: it finds planted secrets, paths and names, and passes what may be published."""

from __future__ import annotations

import bz2
import getpass
import gzip
import io
import json
import lzma
import random
import socket
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from pivot_hub.config.encoder_names import CARDS
from pivot_hub.config.recipe import RECIPES
from pivot_hub.errors import PublishError
from pivot_hub.publish import secret_scan
from pivot_hub.publish.decoded_parts import Budget
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
    "database": f"DB_PASSWORD={random_text(12)}",
    "PostgreSQL": f"PGPASSWORD={random_text(12)}",
    "environment": f"SMTP_PASS={random_text(12)}",
    "GitLab": "glpat-" + random_text(20),
    "npm": "npm_" + random_text(36),
    "npm, in .npmrc": f"//registry.npmjs.org/:_authToken=npm_{random_text(36)}",
    "bearer": f"Authorization: Bearer 7{random_text(40)}",
    "PyPI": "pypi-AgEIcHlwaS5vcmc" + random_text(80),
    "Stripe": "sk_live_" + random_text(24),
    "password alone in an address": f"redis://:{random_text(12)}@db:6379/0",
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
    "C:/Users/ada",
    "file:///home/ada",
    "file:/home/ada",
    "path:/home/ada",
    "host:/home/ada/x",
    "/data/images/a.png",
    "/nfs/ada/runs",
    "/nfs4/ada/runs",
    "/lustre/ada/runs",
    "/work/ada/runs",
    "/Volumes/disk/x",
    "/opt/ml/input",
]


def as_png(text: str, compressed: bool) -> bytes:
    info, buffer = PngInfo(), io.BytesIO()
    info.add_text("Comment", text, zip=compressed)
    info.add_itxt("Title", "a title", zip=compressed)
    Image.new("RGB", (4, 4)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def as_international_png(text: str) -> bytes:
    info, buffer = PngInfo(), io.BytesIO()
    info.add_itxt("Comment", text, lang="en", zip=True)
    Image.new("RGB", (4, 4)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def as_npz(text: str) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, note=np.array([text, "b"]), numbers=np.arange(100))
    return buffer.getvalue()


def as_parquet(value: Any, codec: str) -> bytes:
    buffer = io.BytesIO()
    table = pa.table({"row": [{"messages": [{"content": value}]}] * 3})
    pq.write_table(table, buffer, compression=codec)
    return buffer.getvalue()


def as_feather(text: str) -> bytes:
    buffer = io.BytesIO()
    pa.feather.write_feather(pa.table({"a": [text]}), buffer, compression="zstd")
    return buffer.getvalue()


def as_zstd(text: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(text.encode() * 9)
    return bytes(sink.getvalue())


# The same text in the forms that a search of the bytes does not see.
FORMS: dict[str, Callable[[str], bytes]] = {
    "a PNG's text": lambda text: as_png(text, compressed=False),
    "a PNG's compressed text": lambda text: as_png(text, compressed=True),
    "a PNG's international text": as_international_png,
    "npz": as_npz,
    "Parquet, zstd": lambda text: as_parquet(text, "zstd"),
    "Parquet, snappy, an image's text": lambda text: as_parquet(as_png(text, compressed=True), "snappy"),
    "Feather": as_feather,
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16, big": lambda text: text.encode("utf-16-be"),
    "UTF-32": lambda text: text.encode("utf-32"),
    "JSON escapes": lambda text: json.dumps(text).replace("/", "\\/").replace("a", "\\u0061").encode(),
    "gzip": lambda text: gzip.compress(text.encode() * 9),
    "bz2": lambda text: bz2.compress(text.encode()),
    "xz": lambda text: lzma.compress(text.encode()),
    "zstd": as_zstd,
    "gzip of npz": lambda text: gzip.compress(as_npz(text)),
}


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


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("text", [SECRETS["Hugging Face"], "/home/ada/runs", "file:///home/ada/runs"])
def test_what_is_compressed_or_encoded_is_scanned(tmp_path: Path, text: str, form: Callable[[str], bytes]) -> None:
    """The name says nothing of the form: the content does."""
    (tmp_path / "notes.bin").write_bytes(form(f" {text} "))
    assert any("Hugging Face token" in f or "an absolute path" in f for f in scan_for_secrets(tmp_path))
    (tmp_path / "notes.bin").write_bytes(form("a harmless text of the model, and its results"))
    assert scan_for_secrets(tmp_path) == []


def test_what_cannot_be_decoded_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.npz").write_bytes(as_npz("x")[:-40])
    assert "a.npz cannot be decoded" in scan_for_secrets(tmp_path)[0]
    (tmp_path / "a.npz").write_bytes(gzip.compress(bytes(1_000_000)))
    monkeypatch.setattr(secret_scan, "Budget", lambda: Budget(100_000))
    assert "a.npz unpacks to more than" in scan_for_secrets(tmp_path)[0]
    nested = b"text"
    for _ in range(6):
        nested = gzip.compress(nested)
    (tmp_path / "a.npz").write_bytes(nested)
    assert "a.npz holds archives 4 deep" in scan_for_secrets(tmp_path)[0]


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
        "the bearer of responsibilities; Bearer authentication; a password: see below",
        "https://example.org/data/x.zip, recipes/data/x, data/x, a/work/b, ./data/x",
    ):
        (tmp_path / "README.md").write_text(text)
        assert scan_for_secrets(tmp_path) == [], text


@pytest.mark.parametrize("folder", [*RECIPES.glob("*/base"), RECIPES / "shapes" / "pair", CARDS, ROOT / "spaces"])
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
