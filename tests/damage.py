"""Seeded damages of files, rows and configs: what a disk, a download or an editor leaves behind."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

# No large numbers of steps, rows or layers: a run of them is long, and not wrong.
ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    0.5,
    2,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "x",
    "../x",
    "\ud800",
    "data:image/png;base64,iVBORw0KGgo=",
    [],
    {},
    [[1]],
    {"a": 1},
)


def flipped(content: bytes, rng: random.Random) -> bytes:
    """Flip one to eight bits."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def emptied(content: bytes, rng: random.Random) -> bytes:
    return b""


def noise(content: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((1, 100, 5000)))


def encoded(content: bytes, rng: random.Random) -> bytes:
    """Another encoding than UTF-8, with a letter that they write differently."""
    text = content.decode("utf-8", "replace").replace("e", "é", 1)
    return text.encode(rng.choice(("latin-1", "utf-16", "utf-8-sig")), "replace")


def nested(content: bytes, rng: random.Random) -> bytes:
    """Brackets that are deeper than a parser's stack."""
    return rng.choice((b"[", b'{"a":', b"- ")) * 100_000


def html(content: bytes, rng: random.Random) -> bytes:
    """The page that a proxy answers with in place of the file."""
    return b"<!DOCTYPE html><html><body>502 Bad Gateway</body></html>"


def pointer(content: bytes, rng: random.Random) -> bytes:
    """The pointer that a clone without git-lfs holds in place of the file."""
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a tree with each of its keys."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


def _edited(name: str, content: bytes, rng: random.Random, edit: Callable[[Any, Any], None]) -> bytes:
    """Edit one random place of a YAML, JSON or JSONL file."""
    text = content.decode()
    if name.endswith(".yaml"):
        tree = yaml.safe_load(text)
        edit(*rng.choice(_places(tree)))
        return yaml.safe_dump(tree, allow_unicode=False).encode("utf-8", "surrogatepass")
    trees = [json.loads(line) for line in text.splitlines()] if name.endswith(".jsonl") else [json.loads(text)]
    edit(*rng.choice([place for tree in trees for place in _places(tree)]))
    return "\n".join(json.dumps(tree) for tree in trees).encode()


CONTENTS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bits": flipped,
    "truncated": truncated,
    "empty": emptied,
    "noise": noise,
    "encoding": encoded,
    "nested": nested,
    "page": html,
    "pointer": pointer,
}
BINARY = ("bits", "truncated", "empty", "noise", "page", "pointer", "missing", "folder", "loop")
TEXT = ("bits", "truncated", "empty", "noise", "encoding", "nested", "page", "missing", "folder")
TREE = ("key", "value", "value", "value", "encoding", "nested", "truncated", "bits", "empty", "missing", "folder")


def kinds_for(name: str) -> tuple[str, ...]:
    """Return the kinds of damage that a file can have, those that are likely several times."""
    if name.endswith((".yaml", ".json", ".jsonl")):
        return TREE
    return TEXT if name.endswith((".txt", ".py", ".md", ".jinja")) else BINARY


def damage(file: Path, kind: str, rng: random.Random) -> None:
    """Damage a file in one way. The file may be a hard link: its other names keep their content."""
    content = file.read_bytes()
    file.unlink()
    if kind == "missing":
        return
    if kind == "folder":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "key":
        file.write_bytes(_edited(file.name, content, rng, lambda tree, key: tree.__delitem__(key)))
    elif kind == "value":
        value = rng.choice(ODD)
        file.write_bytes(_edited(file.name, content, rng, lambda tree, key: tree.__setitem__(key, value)))
    else:
        file.write_bytes(CONTENTS[kind](content, rng))


def copy_linked(source: Path, target: Path) -> None:
    """Copy a folder by hard links, which costs no time."""
    shutil.copytree(source, target, copy_function=lambda a, b: Path(b).hardlink_to(a))
