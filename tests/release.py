"""A dry run of a release: build, check, install in a clean environment, run the quickstart from the wheel. No upload.

`make release`, or `python -m tests.release [DIST] [--torch REQUIREMENT] [--no-quickstart]`. DIST keeps what it builds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

import pivot_hub

ROOT = Path(__file__).parents[1]


def stated_versions(root: Path = ROOT) -> dict[str, str]:
    """Return the version that each file of a release states; pyproject.toml takes that of the package."""
    changelog = re.search(r"^## \[([^\]]+)\]", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    notes = re.search(r"^# pivot_hub (\S+)$", (root / "RELEASE_NOTES.md").read_text(), re.MULTILINE)
    code = re.search(r'^__version__ = "(.+)"$', (root / "pivot_hub" / "__init__.py").read_text(), re.MULTILINE)
    return {
        "pivot_hub/__init__.py": code[1] if code else "none",
        "CITATION.cff": str(yaml.safe_load((root / "CITATION.cff").read_text())["version"]),
        "CHANGELOG.md": changelog[1] if changelog else "none",
        "RELEASE_NOTES.md": notes[1] if notes else "none",
    }


def build(dist: Path) -> tuple[Path, Path]:
    """Build the sdist from the checkout and the wheel from the sdist, so that the sdist is known to be complete.

    Args:
        dist: Folder that both are written to; earlier builds of this package in it are deleted, and nothing else.

    Returns:
        The sdist and the wheel.
    """
    dist.mkdir(parents=True, exist_ok=True)
    for earlier in (*dist.glob("pivot_hub-*.tar.gz"), *dist.glob("pivot_hub-*.whl")):
        earlier.unlink()
    _run([sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(dist)], ROOT)
    (sdist,) = dist.glob("pivot_hub-*.tar.gz")
    with tempfile.TemporaryDirectory() as temporary:
        with tarfile.open(sdist) as archive:
            archive.extractall(temporary, filter="data")
        (source,) = Path(temporary).iterdir()
        _run([sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(dist)], source)
    (wheel,) = dist.glob("pivot_hub-*.whl")
    _run([sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)], dist)
    return sdist, wheel


def try_wheel(wheel: Path, version: str, torch: str, folder: Path, quickstart: bool) -> None:
    """Install the wheel in a clean environment and use it there, where no checkout can be imported.

    Args:
        wheel: The wheel.
        version: Version that it should have.
        torch: Requirement of torch, which constraints.txt leaves out.
        folder: Empty folder outside of the checkout.
        quickstart: Whether the quickstart is run too, which takes minutes.
    """
    with _timed("clean environment"):
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        constraints = ["--constraint", str(ROOT / "constraints.txt")]
        _run([str(python), "-m", "pip", "install", "--quiet", torch], folder)
        _run([str(python), "-m", "pip", "install", "--quiet", *constraints, str(wheel)], folder)
        _run([str(python), "-m", "pip", "check"], folder)
    where = _run([str(python), "-c", "import pivot_hub; print(pivot_hub.__file__)"], folder).strip()
    if not Path(where).is_relative_to(folder / "venv"):
        raise SystemExit(f"the environment imports {where}, and not the wheel")
    pivot = str(folder / "venv" / "bin" / "pivot")
    if version not in (printed := _run([pivot, "--version"], folder)):
        raise SystemExit(f"the wheel says it is version {printed.strip()}, and not {version}")
    if not quickstart:
        return
    with _timed("quickstart"):
        _run([pivot, "quickstart"], folder)
    report = json.loads((folder / "quickstart" / "report.json").read_text())
    print(f"quickstart: {report['duration_s']:.0f} s, {report['peak_memory_mb']} MB, {len(report['results'])} results")
    for branch in ("sft", "dpo"):
        _run([pivot, "verify", f"quickstart/hub/pivot/shapes-{branch}"], folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Carry out the dry run; the exit code is 1 at the first step that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dist", nargs="?", type=Path, default=ROOT / "dist")
    parser.add_argument("--torch", default="torch", help="Requirement of torch for the clean environment.")
    parser.add_argument("--no-quickstart", action="store_true")
    given = parser.parse_args(arguments)
    versions = stated_versions()
    if len(set(versions.values())) != 1:
        raise SystemExit(f"the versions differ: {versions}")
    with _timed("sdist and wheel, checked by twine"):
        sdist, wheel = build(given.dist.resolve())
    for file in (sdist, wheel):
        print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB")
    with tempfile.TemporaryDirectory(prefix="pivot-release-") as temporary:
        try_wheel(wheel, pivot_hub.__version__, given.torch, Path(temporary).resolve(), not given.no_quickstart)
    print(f"{pivot_hub.__version__} could be released. Nothing was uploaded.")


def _run(command: list[str], folder: Path) -> str:
    """Return what a command prints.

    Raises:
        SystemExit: The command failed.
    """
    # Without PYTHONPATH, so that the clean environment does not import the checkout.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


@contextmanager
def _timed(step: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    print(f"{step}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
