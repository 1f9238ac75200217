"""A law's report: one file that needs nothing else, with all that is known of the law and nothing that runs."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from escala.laws import Law, fit_law, note
from escala.laws.report import ForecastLine, TrackRecord, backtest_lines, html

PNGS = {"residuals": b"\x89PNG"}
EVIL = '<script>alert("1")</script><img src=http://evil.example/x>'


class Parsed(HTMLParser):
    """Tags, attributes and text of a document; every tag that is opened is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def law() -> Law:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"n_active": 10 ** rng.uniform(6, 9, 16), "tokens": 10 ** rng.uniform(8, 10, 16)})
    frame["loss_nats"] = 1.8 + 480 * frame.n_active**-0.35 + 2000 * frame.tokens**-0.36
    frame.loc[3, "loss_nats"] = np.nan
    return fit_law(frame, bootstrap=40)


def test_the_report_has_everything_and_needs_nothing(law: Law) -> None:
    evil = replace(law, findings=(*law.findings, EVIL, "a finding & its sign <"))
    evidence = TrackRecord(
        [
            ForecastLine(f"big {EVIL}", 1.79e9, 4.0, 2.3, 2.2, 2.4, 2.5),
            ForecastLine("open", None, None, 2, None, None),
        ],
    )
    origin = {"by": EVIL, "created_at": 0.0, "sources": ["points.csv"], "configuration": {"model": {"x": 3}}}
    made = html(evil, "small@1", origin, evidence, PNGS)
    parsed = Parsed(made)
    assert not parsed.open
    assert all(link.startswith("data:image/png;base64,") for link in parsed.links)
    assert not {"script", "link", "iframe", "object", "form", "base"} & set(parsed.tags)
    assert parsed.tags.count("img") == len(PNGS)
    for finding in evil.findings:
        assert finding in parsed.text
    for said in (
        "small@1",
        law.form.formula,
        *law.parameters,
        "OUTSIDE",
        "open",
        "1970-01-01",
    ):
        assert said in parsed.text
    assert len(backtest_lines(law)) == len(law.rolling.cuts) > 1
    for line in backtest_lines(law):
        assert line.fitted in parsed.text
    assert "configuration.model.x" in parsed.text
    assert "loss_nats is missing" in parsed.text


def test_what_is_not_known_is_a_sentence(law: Law) -> None:
    made = html(
        replace(law, replicates_BP=np.empty((0, 0)), rolling=None, findings=()), "a@2", {}, None, PNGS
    )
    for said in ("no intervals", "No backtest:", "No forecast of this law", "No findings."):
        assert said in made


def test_the_plots_are_drawn_where_none_are_given(law: Law) -> None:
    links = Parsed(html(law, "a@2", {})).links
    assert len(links) > 3
    assert all(len(link) > 1000 for link in links)


@pytest.mark.parametrize("rows", [0, 400])
def test_a_note_keeps_within_what_mlflow_stores(rows: int) -> None:
    text = "# law\n" + "| a row of some length |\n" * rows
    cut = note.within(text, note.OF_A_VERSION)
    assert len(cut) <= note.OF_A_VERSION
    assert (cut == text) == (not rows)
    assert cut.startswith("# law\n")
    assert cut.endswith("\n")
