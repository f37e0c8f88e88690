"""What a job or a Space installs exists elsewhere: the checkout's pushed commit, or what `--package` names."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pivot_hub.errors import SourceError
from pivot_hub.package_source import check_installable, package_requirement

WHEEL = "https://files.example/pivot_hub-0.1.0-py3-none-any.whl"


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *identity, "-C", str(folder), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of this package's form, pushed to a repository on this machine."""
    folder = tmp_path_factory.mktemp("source")
    checkout = folder / "checkout"
    (checkout / "pivot_hub").mkdir(parents=True)
    (checkout / "pivot_hub" / "__init__.py").write_text('__version__ = "0.1.0"\n')
    build = '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
    (checkout / "pyproject.toml").write_text(f'{build}[project]\nname = "pivot-hub"\nversion = "0.1.0"\n')
    git(folder, "init", "--bare", "--quiet", "remote.git")
    git(checkout, "init", "--quiet")
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "--message", "First")
    git(checkout, "remote", "add", "origin", str(folder / "remote.git"))
    git(checkout, "push", "--quiet", "origin", "HEAD:main")
    return checkout


@pytest.fixture
def checkout(pushed: Path, tmp_path: Path) -> Path:
    """A copy of the checkout, which a test may change."""
    copy = tmp_path / "checkout"
    subprocess.run(["cp", "-r", str(pushed), str(copy)], check=True)
    return copy


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("https://github.com/me/pivot-hub.git", "https://github.com/me/pivot-hub.git"),
        ("git@github.com:me/pivot-hub.git", "https://github.com/me/pivot-hub.git"),
        ("ssh://git@git.example:2222/me/pivot-hub", "https://git.example/me/pivot-hub"),
        ("https://ada:password@git.example:8443/me/pivot-hub", "https://git.example:8443/me/pivot-hub"),
    ],
)
def test_a_pushed_checkout_is_installed_at_its_commit(checkout: Path, remote: str, address: str) -> None:
    git(checkout, "remote", "set-url", "origin", remote)
    commit = git(checkout, "rev-parse", "HEAD")
    assert package_requirement(checkout=checkout) == f"pivot-hub @ git+{address}@{commit}"
    assert package_requirement(None, "space", checkout) == f"pivot-hub[space] @ git+{address}@{commit}"


def test_a_checkout_that_no_other_machine_sees_is_refused_with_the_remedy(checkout: Path, tmp_path: Path) -> None:
    def refusal() -> str:
        with pytest.raises(SourceError, match="--package: a git URL with its commit") as refused:
            package_requirement(checkout=checkout)
        return str(refused.value)

    assert "the remote origin is on this machine" in refusal()
    git(checkout, "remote", "set-url", "origin", "https://github.com/me/pivot-hub")
    (checkout / "notes.txt").write_text("not a part of the package")
    assert package_requirement(checkout=checkout)
    (checkout / "pivot_hub" / "new.py").touch()
    assert "pivot_hub/new.py is not committed" in refusal()
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "--message", "Second")
    assert "is on no remote of this checkout; push it (git push)" in refusal()
    git(checkout, "remote", "remove", "origin")
    assert "is on no remote of this checkout" in refusal()
    with pytest.raises(SourceError, match="runs from no checkout"):
        package_requirement(checkout=tmp_path / "site-packages")


@pytest.mark.parametrize(
    ("given", "requirement"),
    [
        (WHEEL, f"pivot-hub @ {WHEEL}"),
        ("git+https://github.com/me/pivot-hub@v1", "pivot-hub @ git+https://github.com/me/pivot-hub@v1"),
        ("pivot_hub @ git+https://github.com/me/p@v1", "pivot-hub @ git+https://github.com/me/p@v1"),
        ("pivot-hub[lora]==1.0", "pivot-hub[lora]==1.0"),
    ],
)
def test_a_given_source_becomes_a_requirement(given: str, requirement: str) -> None:
    assert package_requirement(given) == requirement
    extras = "[lora,space]" if "lora" in given else "[space]"
    assert package_requirement(given, "space").startswith(f"pivot-hub{extras}")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (".", "is on this machine"),
        ("dist/pivot_hub-0.1.0-py3-none-any.whl", "is on this machine"),
        ("file:///tmp/pivot_hub-0.1.0-py3-none-any.whl", "is on this machine"),
        ("git+file:///tmp/pivot-hub", "is on this machine"),
        ("--index-url=https://files.example", "is no requirement"),
        ("torch==2.13.0", "is not pivot-hub"),
        ("git+https://ada:password@git.example/p", "holds a password"),
        ("", "is no requirement"),
    ],
)
def test_what_another_machine_cannot_install_is_refused(given: str, reason: str) -> None:
    with pytest.raises(SourceError, match=reason) as refused:
        package_requirement(given)
    assert "give --package:" in str(refused.value)
    assert "ada:password" not in str(refused.value)


def test_a_commit_is_looked_up_before_it_is_sent(pushed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip clones the repository as a job will; that this one is a folder of this machine makes no difference to it."""
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # which means: use the installed hatchling
    remote = git(pushed, "remote", "get-url", "origin")
    commit = git(pushed, "rev-parse", "HEAD")
    check_installable(f"pivot-hub @ git+file://{remote}@{commit}")
    with pytest.raises(SourceError, match="cannot be installed"):
        check_installable(f"pivot-hub @ git+file://{remote}@{'0' * 40}")
    assert os.environ.get("GIT_TERMINAL_PROMPT") is None
