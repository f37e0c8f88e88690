"""Scan files for what must not be published: secrets, absolute paths of this machine, and user names."""

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
# A slash that follows a letter is part of an address or of a relative path.
PATHS = rb"(?<![\w.:/~-])/(?:home|Users|root|tmp|private|mnt|media|scratch|workspace|srv|var/folders)/[\w.-]+"
WINDOWS_PATHS = rb"\b[A-Za-z]:\\{1,2}(?:Users|Documents and Settings)\\{1,2}[\w.-]+"
# User and host names that identify nobody, and that occur in texts for other reasons.
COMMON_NAMES = frozenset({"root", "user", "admin", "ubuntu", "runner", "docker", "nobody", "localhost", "python"})
# Characters of a secret that a finding repeats: enough to locate it, too few to use it.
EXCERPT = 12
Patterns = list[tuple[str, re.Pattern[bytes]]]


def scan_for_secrets(folder: Path, allowed: str = "") -> list[str]:
    """Scan every file of a folder for secrets, absolute paths and names.

    Args:
        folder: Folder that would be published. Only the header of a weights file is scanned.
        allowed: Name of the repository, whose owner may have the same name as the user of this machine.

    Returns:
        One message for each finding, which names the file, the line or byte, and the kind.
    """
    patterns = [(kind, re.compile(pattern)) for kind, pattern in SECRETS.items()]
    patterns += [("an absolute path", re.compile(pattern)) for pattern in (PATHS, WINDOWS_PATHS)]
    patterns += [(kind, re.compile(re.escape(text.encode()))) for kind, text in _token_and_folders()]
    patterns += [
        (kind, re.compile(rb"(?<!\w)" + re.escape(name.encode()) + rb"(?!\w)"))
        for kind, name in _user_and_host(allowed)
    ]
    findings = []
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        name = str(file.relative_to(folder))
        for kind, position, excerpt in _scan_file(file, patterns):
            findings.append(f"{name}{position} holds {kind} ({excerpt}); remove it.")
        for kind, pattern in patterns:
            if pattern.search(name.encode()):
                findings.append(f"{name} has {kind} in its name; rename it.")
    return findings


def _scan_file(file: Path, patterns: Patterns) -> Iterator[tuple[str, str, str]]:
    """Kind, position and excerpt of each finding in a file."""
    size = file.stat().st_size
    if size == 0:
        return
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = 8 + int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else size
        is_text = b"\0" not in content[:8192]
        reported: set[tuple[int, int]] = set()
        for kind, pattern in patterns:
            for match in pattern.finditer(content, 0, min(end, size)):
                if any(start < match.end() and match.start() < stop for start, stop in reported):
                    continue  # another pattern reported this place
                reported.add(match.span())
                at = content[: match.start()].count(b"\n") + 1 if is_text else match.start()
                text = match.group().decode("utf-8", "replace")
                is_path = kind in ("an absolute path", "a folder of this machine")
                yield kind, f":{at}" if is_text else f" at byte {at}", text if is_path else text[:EXCERPT] + "..."


def _token_and_folders() -> Iterator[tuple[str, str]]:
    """The login token, and folders of this machine that no general pattern matches."""
    if token := get_token():
        yield "your Hugging Face token", token
    for folder in {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), Path(os.environ.get("HF_HOME", Path.home()))}:
        if len(folder.parts) > 2:  # shorter ones, such as /data or /root, occur in texts for other reasons
            yield "a folder of this machine", str(folder)


def _user_and_host(allowed: str) -> Iterator[tuple[str, str]]:
    """The names of the user and of this machine, unless they are common words or part of the repository's name."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # no account at all, as in some containers
        user = ""
    for kind, name in (("your user name", user), ("this machine's name", socket.gethostname())):
        if len(name) > 2 and name.lower() not in COMMON_NAMES and name not in re.split(r"[/\s]", allowed):
            yield kind, name
