"""The blocks of code on the pages of the documentation site."""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

from docs.generate.hooks import site_pages
from docs.generate.links import ROOT

_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]*?) -->\n)?(?P<indent> *)```(?P<language>[\w-]*)\n(?P<text>.*?)^ *```[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
# Pages that commands write, whose blocks are tested where they are written.
WRITTEN = {
    "model_cards/": "tests/publish/test_card.py",
    "recipes/shapes/STUDY": "tests/study/test_study.py",
    "pivot_hub/metrics/": "tests/metrics/test_metrics.py",
}
SHOWN = ("text", "json")  # what a command prints, or what a file holds


class Block(NamedTuple):
    """A block of code.

    Args:
        page: Path of its page, from the root of the repository.
        line: Number of its first line.
        language: What stands behind its fence.
        text: The code.
        reason: Why it is not run, or None.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def all_blocks() -> tuple[Block, ...]:
    """Return the blocks of all pages that are written by hand, in order."""
    pages = [page for page in site_pages() if not page.startswith(tuple(WRITTEN))]
    return tuple(
        Block(page, text.count("\n", 0, match.start("text")), match["language"], match["text"], match["reason"])
        for page in pages
        for text in [(ROOT / page).read_text()]
        for match in _BLOCK.finditer(text)
    )


def run_blocks(page: str) -> list[Block]:
    """Return the blocks of a page that are run: those without a reason not to, which are no output."""
    return [block for block in all_blocks() if block.page == page and not block.reason and block.language not in SHOWN]


RUN_PAGES = list(dict.fromkeys(block.page for block in all_blocks() if run_blocks(block.page)))
