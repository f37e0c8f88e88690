"""Links of the pages lead to files and headings that exist; addresses of other hosts are well formed."""

from __future__ import annotations

import re
from functools import cache
from urllib.parse import urlsplit

import pytest

from docs.generate.hooks import site_pages
from docs.generate.links import ROOT, links, resolve, without_code

PAGES = list(dict.fromkeys([*site_pages(), "recipes/README.md"]))


@cache
def anchors(page: str) -> frozenset[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them of simple headings."""
    text = without_code((ROOT / page).read_text())
    original = (ROOT / page).read_text().split("\n")
    headings = [
        original[i][line.index(" ") + 1 :] for i, line in enumerate(text.split("\n")) if re.match(r"#{1,6} ", line)
    ]
    plain = [re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h)).strip().lower() for h in headings]
    return frozenset(re.sub(r"\s", "-", heading) for heading in plain)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    wrong = []
    for link in links((ROOT / page).read_text()):
        if link.is_external:
            parts = urlsplit(link.target)
            if parts.scheme not in ("https", "http", "mailto") or (
                parts.scheme != "mailto" and "." not in parts.netloc
            ):
                wrong.append(link.target)
            continue
        path, anchor = resolve(page, link.target)
        if not (ROOT / path).is_file() or (anchor and anchor not in anchors(path)):
            wrong.append(link.target)
    assert wrong == []


def test_links_are_found_and_code_is_not_searched() -> None:
    text = "[a](b.md) ![c](d.png) [![e](f.svg)](g.md#h) `[no](x)`\n```bash\n[no](y)\n```\n<!-- [no](z) -->"
    assert [link.target for link in links(text)] == ["b.md", "d.png", "f.svg", "g.md#h"]
    assert resolve("docs/a/b.md", "../c.md#d") == ("docs/c.md", "d")
    assert resolve("README.md", "#e") == ("README.md", "e")


def test_pages_and_their_neighbours_are_on_the_site() -> None:
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "pivot_hub/probes/README.md"} <= set(PAGES)
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    from docs.generate.hooks import site_path

    assert [page for page in PAGES if page.startswith("docs/") and site_path(page) not in nav] == []
