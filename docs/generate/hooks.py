"""Hooks of mkdocs, which build the site from `docs/` and from pages that stay where they are in the repository.

README.md is the front page. A link from a page to a file outside of `docs/` works in the repository, and on the site
too, because the file is added to the site under `repository/`. Comments `<!-- generated: NAME -->` are replaced by
what `reference.py` makes of the code.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.generate import reference
from docs.generate.links import ROOT, links, replace_links, resolve

FRONT_PAGE = "README.md"
GENERATED = re.compile(r"<!-- generated: (?P<name>[\w-]+) -->")
NOT_RUN = re.compile(r"^( *)<!-- not run: (?P<reason>.*?) -->\n", re.M)


def site_path(path: str) -> str:
    """Return where a file of the repository is on the site."""
    if path == FRONT_PAGE:
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def repository_path(site: str) -> str:
    """Return the file of the repository that a file of the site was made from; the inverse of `site_path`."""
    if site == "index.md":
        return FRONT_PAGE
    return site.removeprefix("repository/") if site.startswith("repository/") else f"docs/{site}"


def linked_files(pages: list[str]) -> list[str]:
    """List the files outside of `docs/` that pages link to, and those that these link to in turn.

    Args:
        pages: Paths of pages, from the root of the repository.

    Returns:
        Paths of files, without the pages themselves.
    """
    found, waiting = list(pages), list(pages)
    while waiting:
        page = waiting.pop()
        for link in links((ROOT / page).read_text()):
            path, _ = resolve(page, link.target)
            if link.is_external or path in found or path.startswith("docs/") or not (ROOT / path).is_file():
                continue
            found.append(path)
            if path.endswith(".md"):
                waiting.append(path)
    return found[len(pages) :]


def site_pages() -> list[str]:
    """List all pages of the site, as paths from the root of the repository."""
    own = [FRONT_PAGE, *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
    return [*own, *(path for path in linked_files(own) if path.endswith(".md"))]


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the front page and the files outside of `docs/`."""
    own = [repository_path(file.src_uri) for file in files.documentation_pages()]
    for path in [FRONT_PAGE, *linked_files([FRONT_PAGE, *own])]:
        files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is generated, and rewrite links to where the files are on the site."""
    source = page.file.src_uri
    if source == "index.md":
        page.meta["hide"] = ["navigation"]  # it would hold this page alone
    path = repository_path(source)

    def on_site(target: str) -> str:
        to, anchor = resolve(path, target)
        if not (ROOT / to).is_file():
            return target  # mkdocs warns of it, which fails a strict build
        relative = posixpath.relpath(site_path(to), posixpath.dirname(source) or ".")
        return (relative if to != path else "") + (f"#{anchor}" if anchor else "")

    markdown = replace_links(markdown, on_site)
    markdown = GENERATED.sub(lambda match: reference.render(match["name"]), markdown)
    markdown = NOT_RUN.sub(lambda match: f'{match[1]}<p class="not-run">{_html(match["reason"])}</p>\n\n', markdown)
    return with_blank_lines(markdown)


def _html(reason: str) -> str:
    text = reason[0].upper() + reason[1:]
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


def with_blank_lines(markdown: str) -> str:
    """Put a blank line before lists and tables, which GitHub does not need there and Python-Markdown does."""
    lines: list[str] = []
    fence = ""
    for line in markdown.split("\n"):
        mark = re.match(r" *(```+)", line)
        if mark and (not fence or mark[1] == fence):
            fence = "" if fence else mark[1]
        before = lines[-1] if lines else ""
        begins = re.match(r"([-*] |\d+\. )", line) and not re.match(r"( *[-*] | *\d+\. | +)", before)
        begins = begins or (line.startswith("|") and not before.startswith("|"))
        if begins and before.strip() and not fence:
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def on_config(config: MkDocsConfig, **_: Any) -> MkDocsConfig:
    """Rebuild pages of `mkdocs serve` when the front page changes."""
    config.watch.append(str(Path(ROOT / FRONT_PAGE)))
    return config
