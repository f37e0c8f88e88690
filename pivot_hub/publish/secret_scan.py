"""What must not be published: secrets, absolute paths of this machine, user names. A scan of files that refuses."""

from __future__ import annotations

import getpass
import mmap
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import get_token

SECRETS = {
    "a Hugging Face token": rb"\b(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "a GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{22,})",
    "an AWS key": rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "an API key": rb"\b(?:sk-[A-Za-z0-9_-]{20,}|AIza[0-9A-Za-z_-]{35}|xox[abprs]-[A-Za-z0-9-]{10,})",
    "a private key": rb"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----",
    "a web token": rb"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "a password in an address": rb"://[^/\s:@\"']{1,64}:[^/\s:@\"']{3,64}@",
    "a secret": rb"(?i)(?:api|secret|access)[_-]?(?:key|token)[\"']?\s{0,4}[:=]\s{0,4}[\"']?[A-Za-z0-9+/_-]{16,}"
    rb"|\bpass(?:word|wd)[\"']?\s{0,4}[:=]\s{0,4}[\"']?[^\s\"']{6,}",
}
# Behind a letter a slash is part of an address or of a relative path.
PATHS = rb"(?<![\w.:/~-])/(?:home|Users|root|tmp|private|mnt|media|scratch|workspace|srv|var/folders)/[\w.-]+"
WINDOWS_PATHS = rb"\b[A-Za-z]:\\{1,2}(?:Users|Documents and Settings)\\{1,2}[\w.-]+"
# Names that say nothing of a person, and stand in texts for other reasons.
COMMON_NAMES = frozenset({"root", "user", "admin", "ubuntu", "runner", "docker", "nobody", "localhost", "python"})
SHOWN = 12  # characters of a secret's beginning, so that its reader finds it and nobody can use it


def find_leaks(folder: Path, allowed: str = "") -> list[str]:
    """Look through every file of a folder for what must not be published.

    Args:
        folder: what would be published; weights are looked at in their header only.
        allowed: the repository's name, whose owner may be called like the user of this machine.

    Returns:
        A sentence for each finding, naming file, line or byte, and kind.
    """
    patterns = [(kind, re.compile(pattern)) for kind, pattern in SECRETS.items()]
    patterns += [("an absolute path", re.compile(pattern)) for pattern in (PATHS, WINDOWS_PATHS)]
    patterns += [(kind, re.compile(re.escape(word.encode()))) for kind, word in _own_places()]
    patterns += [
        (kind, re.compile(rb"(?<!\w)" + re.escape(w.encode()) + rb"(?!\w)")) for kind, w in _own_names(allowed)
    ]
    found = []
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        name = str(file.relative_to(folder))
        for kind, at, seen in _search(file, patterns):
            found.append(f"{name}{at} holds {kind} ({seen}); take it out.")
        for kind, pattern in patterns:
            if pattern.search(name.encode()):
                found.append(f"{name} has {kind} in its name; rename it.")
    return found


def _search(file: Path, patterns: list[tuple[str, re.Pattern[bytes]]]) -> Iterator[tuple[str, str, str]]:
    size = file.stat().st_size
    if size == 0:
        return
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = 8 + int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else size
        is_text = b"\0" not in content[:8192]
        seen: set[tuple[int, int]] = set()
        for kind, pattern in patterns:
            for match in pattern.finditer(content, 0, min(end, size)):
                if any(a < match.end() and match.start() < b for a, b in seen):
                    continue  # one finding a place
                seen.add(match.span())
                at = content[: match.start()].count(b"\n") + 1 if is_text else match.start()
                text = match.group().decode("utf-8", "replace")
                shown = text if kind in ("an absolute path", "a folder of this machine") else text[:SHOWN] + "..."
                yield kind, f":{at}" if is_text else f" at byte {at}", shown


def _own_places() -> Iterator[tuple[str, str]]:
    """The login token, and folders of this machine that no general pattern knows."""
    if token := get_token():
        yield "your Hugging Face token", token
    for folder in {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), Path(os.environ.get("HF_HOME", Path.home()))}:
        if len(folder.parts) > 2:  # shorter ones, as /data or /root, are words elsewhere
            yield "a folder of this machine", str(folder)


def _own_names(allowed: str) -> Iterator[tuple[str, str]]:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # no account at all, as in some containers
        user = ""
    for kind, name in (("your user name", user), ("this machine's name", socket.gethostname())):
        if len(name) > 2 and name.lower() not in COMMON_NAMES and name not in re.split(r"[/\s]", allowed):
            yield kind, name
