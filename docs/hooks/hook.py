"""mkdocs' hook: pages that are made as the site is built, links between them, and a check that it stands alone."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.hooks.cli_page import cli_page
from docs.hooks.drawing import with_drawings
from docs.hooks.notebook import notebook_page
from docs.hooks.offline import loaded_from_elsewhere
from docs.hooks.small_pages import errors_page, python_page, settings_page
from docs.hooks.specs_page import specs_page
from docs.hooks.views_page import views_page

ROOT = Path(__file__).parents[2]
REFERENCE: dict[str, Callable[[], str]] = {
    "reference/cli.md": cli_page,
    "reference/errors.md": errors_page,
    "reference/python.md": python_page,
    "reference/settings.md": settings_page,
    "reference/specs.md": specs_page,
    "reference/views.md": views_page,
}
ELSEWHERE = {
    "benchmarks/README.md": "figures.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
}
"""Files of the repository outside of docs/ that are pages of the site, README apart: its place has the home page."""
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that no file in docs/ holds."""
    for name, make in REFERENCE.items():
        files.append(File.generated(config, name, content=make()))
    for source, name in ELSEWHERE.items():
        if source != "README.md":
            files.append(File.generated(config, name, content=_from_root(source)))
    for notebook in sorted((ROOT / "docs").rglob("*.ipynb")):
        files.append(File.generated(config, _page_of(notebook), content=notebook_page(notebook)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository become links to their pages; Mermaid's drawings become SVG."""
    here = posixpath.dirname(page.file.src_uri)

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", here, found[1]))
        name = ELSEWHERE.get(target)
        if target.endswith(".ipynb"):
            name = posixpath.relpath(target, "docs").removesuffix(".ipynb") + ".md"
        return posixpath.relpath(name, here or ".") if name else found[1]

    return with_drawings(LINK.sub(link, markdown))


def on_post_build(config: MkDocsConfig) -> None:
    """Raise PluginError where a page would load something from another host."""
    found = loaded_from_elsewhere(Path(config.site_dir))
    if found:
        raise PluginError("the site loads from other hosts:\n" + "\n".join(found))


def _from_root(source: str) -> str:
    """A file of the repository as a page at the top: links are from docs/, as everywhere."""
    folder = posixpath.dirname(source)
    text = (ROOT / source).read_text(encoding="utf-8")
    return LINK.sub(lambda found: posixpath.relpath(posixpath.join(folder, found[1]), "docs"), text)


def _page_of(notebook: Path) -> str:
    return notebook.relative_to(ROOT / "docs").with_suffix(".md").as_posix()
