"""The local Hub server of `pivot quickstart --push-local`: it comes from the source checkout, not from the package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pivot_hub.errors import PublishError
from pivot_hub.publish import push_local


def test_the_server_is_loaded_from_the_checkout_as_a_package_of_its_own() -> None:
    server = push_local.load_local_server()
    assert Path(str(server.__file__)).parent == push_local.SERVER
    assert server.__name__ == f"{push_local.SERVER_NAME}.serve"
    assert push_local.load_local_server() is server


def test_without_a_checkout_the_message_names_the_alternatives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_local, "SERVER", tmp_path / "tests" / "local_server")
    with pytest.raises(PublishError, match="clone the repository, or publish to the Hub with `pivot push`"):
        push_local.load_local_server()


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_local, "find_spec", lambda name: None if name == "uvicorn" else sys)
    with pytest.raises(PublishError, match=r"needs uvicorn: pip install 'pivot-hub\[local-hub\]'"):
        push_local.load_local_server()
