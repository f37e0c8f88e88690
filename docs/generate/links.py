"""Links between pages: found in Markdown, and resolved to files of the repository."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
_CODE = re.compile(
    r"^(?P<fence> *(?:```+|~~~+)).*?^(?P=fence)[ \t]*$|(?P<tick>`+)(?!`).+?(?<!`)(?P=tick)(?!`)|<!--.*?-->", re.S | re.M
)
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\[\]]*\](?:\([^()]*\))?)*\]\((?P<target>[^()\s]+)\)")
_IMAGE_IN_LINK = re.compile(r"!\[[^\[\]]*\]\((?P<target>[^()\s]+)\)")


class Link(NamedTuple):
    """A link or an image of a page.

    Args:
        target: What stands in its parentheses.
        start: Position of the target in the page's text.
    """

    target: str
    start: int

    @property
    def is_external(self) -> bool:
        """Whether the link leads to another host."""
        return "://" in self.target or self.target.startswith("mailto:")


def without_code(text: str) -> str:
    """Replace code and comments by spaces, so that positions stay and nothing in them is taken for a link."""
    return _CODE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def links(text: str) -> Iterator[Link]:
    """Find the links and images of a page, except those in code and comments."""
    plain = without_code(text)
    spans = {match.span("target") for pattern in (_LINK, _IMAGE_IN_LINK) for match in pattern.finditer(plain)}
    for start, end in sorted(spans):
        yield Link(text[start:end], start)


def resolve(page: str, target: str) -> tuple[str, str]:
    """Resolve a relative link.

    Args:
        page: Path of the page that has the link, from the root of the repository.
        target: The link.

    Returns:
        Path of the file that the link leads to, from the root of the repository, and its anchor or "".
    """
    path, _, anchor = target.partition("#")
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page, anchor


def replace_links(text: str, replacement: Callable[[str], str]) -> str:
    """Replace the target of each link that leads to no other host."""
    for link in reversed(list(links(text))):
        if not link.is_external:
            text = text[: link.start] + replacement(link.target) + text[link.start + len(link.target) :]
    return text
