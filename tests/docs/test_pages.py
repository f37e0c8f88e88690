"""What pages promise: the README's length, quoted messages, the reference, and that the site asks no other host."""

from __future__ import annotations

import ast
import re
from functools import cache
from typing import Any

import pytest

import pivot_hub
from docs.generate import reference
from docs.generate.hooks import with_blank_lines
from docs.generate.links import ROOT

MESSAGES = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 200
    assert len(text.split()) < 1200
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []
    assert {"make quickstart", "make test"} <= {line.split("  ")[0].strip() for line in text.splitlines()}


@cache
def messages_of_the_code() -> tuple[str, ...]:
    """Return the texts in the package's code; what is filled in is `...`."""
    texts = []
    for file in (ROOT / "pivot_hub").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values))  # type: ignore[misc]
    return tuple(re.sub(r"%[sdg]", "...", text) for text in texts)


def is_in_the_code(message: str) -> bool:
    return any(message.strip(". ") in text for text in messages_of_the_code())


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_one_of_the_code(message: str) -> None:
    assert is_in_the_code(message)


def test_messages_are_looked_up_in_the_code() -> None:
    assert len(MESSAGES) > 30
    assert len(set(MESSAGES)) == len(MESSAGES)
    assert not is_in_the_code("every part is thawed: give at least one part a learning rate.")


def test_every_public_name_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    documented = set(re.findall(r"^::: pivot_hub\.[\w.]*?(\w+)$", page, re.MULTILINE))
    assert set(pivot_hub.__all__) - {"__version__"} <= documented


def test_the_reference_has_every_key_and_every_option() -> None:
    keys = reference.recipe_keys()
    for section in reference.RECIPE_SECTIONS:
        assert all(f"\n| `{key}` | " in keys for key in section.model_fields)
    assert "| `on_bad_row` | `stop`, `skip` | `stop` |" in keys
    assert "| `feature_layer` | integer | `-2` |" in keys
    assert "| `data` | list of a section | required |" in keys
    commands = reference.commands()
    assert "### pivot bench dpo-step\n" in commands
    assert "### pivot data check\n" in commands
    assert "| `--batch` | Images in one forward pass. | `32` |" in commands
    assert "--hf-job" not in commands  # hidden


def test_a_key_without_a_meaning_is_refused() -> None:
    from pydantic import BaseModel

    class Section(BaseModel):
        """A section.

        Args:
            named: A key.
        """

        named: int
        silent: int

    with pytest.raises(KeyError, match="Section does not document silent"):
        reference._documented(Section)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n- b\n- c\n  d\n- e", "a\n\n- b\n- c\n  d\n- e"),
        ("a\n| b |\n|---|", "a\n\n| b |\n|---|"),
        ("```\na\n- b\n```", "```\na\n- b\n```"),
        ("a\n1. b\n2. c", "a\n\n1. b\n2. c"),
    ],
)
def test_lists_and_tables_get_the_blank_line_that_they_need(text: str, expected: str) -> None:
    assert with_blank_lines(text) == expected


@pytest.mark.slow
def test_the_site_builds_and_asks_no_other_host(tmp_path: Any) -> None:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        requested = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?(https?://[^\s\">]+)", page.read_text()
        )
        assert requested == [], page
        assert "<!-- generated:" not in page.read_text()
