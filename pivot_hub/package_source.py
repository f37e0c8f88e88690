"""Where another machine installs this package from: a given requirement, or this checkout's commit at its remote."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from urllib.parse import urlsplit

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from pivot_hub.errors import SourceError, shown_text
from pivot_hub.files import PACKAGE

DISTRIBUTION = "pivot-hub"
# The package is on no index yet, so each remedy names what exists.
REMEDY = (
    "give --package: a git URL with its commit, as git+https://github.com/me/pivot-hub@COMMIT, the URL of a wheel, "
    "or a requirement that an index serves"
)
# What a wheel is built of; the recipe's own folder reaches a job by another way.
INSTALLED_PATHS = ("pivot_hub", "pyproject.toml", "recipes/parts.yaml")
SCP_FORM = re.compile(r"(?:[^@/\s]+@)?(?P<host>[^:/\s]+):(?P<path>[^/\s].*)")  # git@github.com:me/pivot-hub.git


def package_requirement(given: str | None = None, extra: str | None = None, checkout: Path = PACKAGE.parent) -> str:
    """Return the requirement by which pip or uv installs this package on another machine.

    Args:
        given: A git URL, the URL of a wheel, or a requirement. By default the commit of the checkout that this package
            runs from, at its remote.
        extra: Extra of the package that is installed too.
        checkout: Folder of the checkout.

    Raises:
        SourceError: The requirement is invalid, is of another package, or is a file of this machine. Without one: there
            is no checkout, it has changes that are not committed, or its commit was not pushed.
    """
    if given is None:
        given = _checkout_url(checkout)
    given = given.strip()
    if re.match(r"[a-z+]+://", given, re.IGNORECASE):
        given = f"{DISTRIBUTION} @ {given}"
    try:
        requirement = Requirement(given)
    except InvalidRequirement:
        local = given.startswith((".", "/", "~")) or given.endswith((".whl", ".tar.gz")) or Path(given or "-").exists()
        reason = "is on this machine, of whose files the other has none" if local else "is no requirement"
        raise SourceError(f"--package {shown_text(given)!r} {reason}; {REMEDY}.") from None
    if canonicalize_name(requirement.name) != DISTRIBUTION:
        raise SourceError(f"--package {shown_text(given)!r} is not {DISTRIBUTION}; {REMEDY}.")
    url = requirement.url
    if url is not None and (urlsplit(url).scheme in ("file", "git+file") or not urlsplit(url).scheme):
        raise SourceError(
            f"--package {shown_text(given)!r} is on this machine, of whose files the other has none; {REMEDY}."
        )
    if url is not None and urlsplit(url).password is not None:
        raise SourceError(f"--package holds a password, which everybody who sees the command could read; {REMEDY}.")
    extras = sorted({*requirement.extras, *([extra] if extra else [])})
    name = f"{DISTRIBUTION}[{','.join(extras)}]" if extras else DISTRIBUTION
    return f"{name} @ {url}" if url is not None else f"{name}{requirement.specifier}"


def check_installable(requirement: str) -> None:
    """Resolve a requirement without installing it, as the other machine will.

    Args:
        requirement: What `package_requirement` returned.

    Raises:
        SourceError: It cannot be found, or installs another package.
    """
    # find_spec("pip") would turn off setuptools' distutils in this process.
    if any(distributions(name="pip")):
        command = [sys.executable, "-m", "pip", "install", "--ignore-installed"]
    elif uv := shutil.which("uv"):
        command = [uv, "pip", "install", "--python", sys.executable, "--reinstall"]
    else:
        raise SourceError("the package's source is checked by pip or uv; install one of them.")
    done = subprocess.run(
        [*command, "--dry-run", "--no-deps", requirement],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},  # the other machine has nobody to ask for a password
    )
    if done.returncode:
        reason = shown_text((done.stderr.strip().splitlines() or ["no reason given"])[-1])
        raise SourceError(f"{requirement} cannot be installed ({reason}). Nothing was submitted; {REMEDY}.")
    if DISTRIBUTION not in (done.stdout + done.stderr).replace("_", "-").lower():
        raise SourceError(f"{requirement} installs no {DISTRIBUTION}. Nothing was submitted; {REMEDY}.")


def _checkout_url(checkout: Path) -> str:
    """Return the git URL of a checkout's commit.

    Raises:
        SourceError: There is no checkout, it has changes that are not committed, or its commit was not pushed.
    """
    if not (checkout / ".git").exists():
        raise SourceError(f"this package runs from no checkout, so its source is unknown; {REMEDY}.")
    if changed := _git(checkout, "status", "--porcelain", "--", *INSTALLED_PATHS):
        first = changed.splitlines()[0].split(maxsplit=1)[1]
        raise SourceError(
            f"{first} is not committed, so no other machine can install it; commit and push it, or {REMEDY}."
        )
    commit = _git(checkout, "rev-parse", "HEAD")
    # As the last fetch or push saw the remotes; check_installable asks them.
    branches = _git(checkout, "for-each-ref", "--format=%(refname)", "--contains", commit, "refs/remotes").splitlines()
    remotes = [
        r for r in _git(checkout, "remote").splitlines() if any(b.startswith(f"refs/remotes/{r}/") for b in branches)
    ]
    if not remotes:
        raise SourceError(f"commit {commit[:12]} is on no remote of this checkout; push it (git push), or {REMEDY}.")
    remote = "origin" if "origin" in remotes else remotes[0]
    return f"git+{_public_url(remote, _git(checkout, 'remote', 'get-url', remote))}@{commit}"


def _public_url(remote: str, url: str) -> str:
    """Return the HTTPS address of a remote, without a login: another machine has neither its keys nor its passwords.

    Raises:
        SourceError: The remote is a folder of this machine.
    """
    parts = urlsplit(url)
    if parts.scheme in ("http", "https", "ssh", "git") and parts.hostname:
        port = f":{parts.port}" if parts.port and parts.scheme in ("http", "https") else ""
        scheme = "http" if parts.scheme == "http" else "https"
        return f"{scheme}://{parts.hostname}{port}{parts.path}"
    if not parts.scheme and (scp := SCP_FORM.fullmatch(url)):
        return f"https://{scp['host']}/{scp['path']}"
    raise SourceError(f"the remote {remote} is on this machine, of whose files the other has none; {REMEDY}.")


def _git(checkout: Path, *arguments: str) -> str:
    """Return what a git command prints.

    Raises:
        SourceError: git is missing, or the command fails.
    """
    try:
        done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SourceError(f"git is not installed, so the commit of this checkout is unknown; {REMEDY}.") from None
    if done.returncode:
        raise SourceError(f"git {arguments[0]} failed ({shown_text(done.stderr.strip())}); {REMEDY}.")
    return done.stdout.strip()
