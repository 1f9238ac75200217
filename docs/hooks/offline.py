"""What a page of the built site would load from another host as it opens. Links that a reader follows are no loads."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "object": "data"}
REMOTE = re.compile(r"^\s*(?:https?:)?//")
IN_STYLE = re.compile(r"(?:url\(\s*|@import\s+)[\"']?\s*((?:https?:)?//[^\"')\s;]+)")
IN_SCRIPT = re.compile(r"\b(?:from|import\(?)\s*[\"']((?:https?:)?//[^\"']+)")
NOT_LOADED = ("canonical", "license", "me")


class _Loads(HTMLParser):
    """Collects what one page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        given = {name: value or "" for name, value in attrs}
        address = given.get(LOADING.get(tag, ""), "")
        if REMOTE.match(address) and given.get("rel") not in NOT_LOADED:
            self.found.append(f"<{tag}> {address}")
        self.found += [f"style {address}" for address in IN_STYLE.findall(given.get("style", ""))]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.found += [f"<style> {address}" for address in IN_STYLE.findall(data)]
        if self._inside == "script":
            self.found += [f"<script> {address}" for address in IN_SCRIPT.findall(data)]


def loaded_from_elsewhere(site: Path) -> list[str]:
    """PAGE: what, for each load of an HTML page or a style sheet."""
    found: list[str] = []
    for page in sorted(site.rglob("*.html")):
        loads = _Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        found += [f"{page.relative_to(site)}: {each}" for each in loads.found]
    for sheet in sorted(site.rglob("*.css")):
        addresses = IN_STYLE.findall(sheet.read_text(encoding="utf-8"))
        found += [f"{sheet.relative_to(site)}: {address}" for address in addresses]
    return found
