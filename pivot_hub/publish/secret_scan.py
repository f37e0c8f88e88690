"""Scan files for what must not be published: secrets, absolute paths of this machine, and user names."""

from __future__ import annotations

import getpass
import mmap
import os
import re
import socket
import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from pivot_hub.publish.decoded_parts import Budget, NotScannable, decoded_parts

SECRETS = {
    "a Hugging Face token": rb"\b(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "a GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{22,})",
    "an AWS key": rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "an npm token": rb"\bnpm_[A-Za-z0-9]{36}|:_authToken=[^\s\"'$]{16,}",
    "an API key": rb"\b(?:sk-[A-Za-z0-9_-]{20,}|AIza[0-9A-Za-z_-]{35}|xox[abprs]-[A-Za-z0-9-]{10,})",
    "a private key": rb"-----BEGIN [A-Z0-9 ]{0,20}PRIVATE KEY",
    "a web token": rb"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "a password in an address": rb"://[^/\s:@\"']{0,64}:[^/\s:@\"']{3,64}@",
    # A digit tells a token from a word that follows "bearer".
    "a bearer token": rb"(?i)\bbearer\s{1,4}(?=[^\s\"'\d]{0,64}\d)[A-Za-z0-9._~+/=-]{16,}",
    "a secret": rb"(?i)(?:api|secret|access|auth|private|client)[_-]?(?:key|token|secret)[\"']?\s{0,4}[:=]\s{0,4}[\"']?"
    rb"[A-Za-z0-9+/_-]{16,}"
    rb"|pass(?:word|wd|phrase)[\"']?\s{0,4}[:=]\s{0,4}[\"']?[^\s\"']{6,}"
    rb"|(?-i:\b[A-Z][A-Z0-9_]{0,32}_(?:PASS|PWD|SECRET|TOKEN)=[\"']?[^\s\"'$]{6,})",
}
# Rules of detect-secrets for tokens with a form of their own. Its rules for words such as "key" and for addresses
# report ordinary texts and numbers of a card.
DETECTORS = (
    "aws.AWSKeyDetector",
    "azure_storage_key.AzureStorageKeyDetector",
    "discord.DiscordBotTokenDetector",
    "github_token.GitHubTokenDetector",
    "gitlab_token.GitLabTokenDetector",
    "mailchimp.MailchimpDetector",
    "npm.NpmDetector",
    "openai.OpenAIDetector",
    "private_key.PrivateKeyDetector",
    "pypi_token.PypiTokenDetector",
    "sendgrid.SendGridDetector",
    "slack.SlackDetector",
    "square_oauth.SquareOAuthDetector",
    "stripe.StripeDetector",
    "telegram_token.TelegramBotTokenDetector",
    "twilio.TwilioKeyDetector",
)
ROOTS = (
    rb"home|homes|Users|root|tmp|private|mnt|media|scratch|workspace|srv|data|datasets|nfs\d*|net|lustre|gpfs|beegfs|fsx|"
    rb"efs|cluster|storage|shared|work|projects?|Volumes|content|kaggle|opt/ml|dev/shm|var/(?:folders|tmp|lib)"
)
# A slash that follows a letter is part of an address or of a relative path, unless the address is that of a file.
PATHS = rb"(?:(?<![\w./~-])|(?<=\bfile:/)|(?<=\bfile://))/(?:" + ROOTS + rb")/[\w.-]+"
WINDOWS_PATHS = (
    rb"\b[A-Za-z]:(?:\\{1,2}|/)(?:Users|Documents and Settings|ProgramData|home|data|datasets|projects?|work)"
    rb"(?:\\{1,2}|/)[\w.-]+"
)
# User and host names that identify nobody, and that occur in texts for other reasons.
COMMON_NAMES = frozenset({"root", "user", "admin", "ubuntu", "runner", "docker", "nobody", "localhost", "python"})
# Characters of a secret that a finding repeats: enough to locate it, too few to use it.
EXCERPT = 12
NEWLINE = b"\n"
PRINTABLE = re.compile(rb"[\t\n\r\x20-\x7e]{6,}")
Patterns = list[tuple[str, re.Pattern[bytes]]]


def scan_for_secrets(folder: Path, allowed: str = "") -> list[str]:
    """Scan every file of a folder for secrets, absolute paths and names.

    Compressed and encoded contents are decoded first, as `decoded_parts` describes.

    Args:
        folder: Folder that would be published. Only the header of a weights file is scanned.
        allowed: Name of the repository, whose owner may have the same name as the user of this machine.

    Returns:
        One message for each finding, which names the file, the line or byte, and the kind. A file that cannot be
        decoded is a finding too.
    """
    patterns = [(kind, re.compile(pattern)) for kind, pattern in SECRETS.items()]
    patterns += [("an absolute path", re.compile(pattern)) for pattern in (PATHS, WINDOWS_PATHS)]
    patterns += [(kind, re.compile(re.escape(text.encode()))) for kind, text in _token_and_folders()]
    patterns += [
        (kind, re.compile(rb"(?<!\w)" + re.escape(name.encode()) + rb"(?!\w)"))
        for kind, name in _user_and_host(allowed)
    ]
    patterns += _detector_patterns()
    findings = []
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        name = str(file.relative_to(folder))
        try:
            for kind, position, excerpt in _scan_file(file, patterns):
                findings.append(f"{name}{position} holds {kind} ({excerpt}); remove it.")
        except NotScannable as error:
            findings.append(f"{name} {error}, so it cannot be scanned for secrets; remove it.")
        for kind, pattern in patterns:
            if pattern.search(name.encode()):
                findings.append(f"{name} has {kind} in its name; rename it.")
    return findings


def _detector_patterns() -> Patterns:
    """The rules of `DETECTORS`, for bytes."""
    patterns: Patterns = []
    for name in DETECTORS:
        module, _, detector = name.partition(".")
        rules = getattr(import_module(f"detect_secrets.plugins.{module}"), detector)
        for rule in rules.denylist:
            pattern = rb"(?<![A-Za-z0-9])(?:" + rule.pattern.encode() + rb")"
            patterns.append((f"a secret ({rules.secret_type})", re.compile(pattern, rule.flags & ~re.UNICODE)))
    return patterns


def _scan_file(file: Path, patterns: Patterns) -> Iterator[tuple[str, str, str]]:
    """Kind, position and excerpt of each finding in a file and in what it holds in another form."""
    size = file.stat().st_size
    if size == 0:
        return
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        known: set[tuple[str, str]] = set()
        header: Any = content
        if file.suffix == ".safetensors":
            header = content[: 8 + int.from_bytes(content[:8], "little")]
        for kind, position, excerpt in _scan_content(header, patterns):
            known.add((kind, excerpt))
            yield kind, position, excerpt
        for part, decoded in decoded_parts(header, Budget()):
            for kind, position, excerpt in _scan_content(decoded, patterns):
                if (kind, excerpt) not in known:  # the plain search found it, or an archive's list and its member
                    known.add((kind, excerpt))
                    yield kind, f" ({part}){position}", excerpt


def _scan_content(content: Any, patterns: Patterns) -> Iterator[tuple[str, str, str]]:
    """Kind, position and excerpt of each finding in a content as it is."""
    if b"\0" not in content[:8192]:
        for kind, match in _matches(content, patterns):
            yield kind, f":{content[: match.start()].count(NEWLINE) + 1}", _excerpt(kind, match)
        return
    # Weights are gigabytes: one search for printable runs is as fast as a search by one of the patterns.
    runs = [(run.start(), run.group()) for run in PRINTABLE.finditer(content)]
    starts = list(accumulate((len(text) + 1 for _, text in runs), initial=0))
    for kind, match in _matches(NEWLINE.join(text for _, text in runs), patterns):
        number = bisect_right(starts, match.start()) - 1
        yield kind, f" at byte {runs[number][0] + match.start() - starts[number]}", _excerpt(kind, match)


def _matches(content: Any, patterns: Patterns) -> Iterator[tuple[str, re.Match[bytes]]]:
    """Each match of a place that no earlier pattern has reported."""
    reported: set[tuple[int, int]] = set()
    for kind, pattern in patterns:
        for match in pattern.finditer(content):
            if not any(start < match.end() and match.start() < stop for start, stop in reported):
                reported.add(match.span())
                yield kind, match


def _excerpt(kind: str, match: re.Match[bytes]) -> str:
    text = match.group().decode("utf-8", "replace")
    return text if kind in ("an absolute path", "a folder of this machine") else text[:EXCERPT] + "..."


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
