import re
from html.parser import HTMLParser
from pathlib import Path

from sqft.checks import Check
from sqft.report.content import ModelRow, read_report
from sqft.report.page import render_page, write_report

from .invented import invent_report


class Page(HTMLParser):
    """Collects the text, and complains about tags that are closed in the wrong order."""

    EMPTY = frozenset({"meta", "br", "link"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_page_is_well_formed_and_loads_nothing() -> None:
    page = Page(render_page(invent_report()))
    links = [v for k, v in page.attributes if k in {"src", "href", "xlink:href"} and v and v[0] != "#"]
    assert links == []
    assert not re.search(r"url\((?!#)", render_page(invent_report()))


def test_every_plot_is_there_once_its_figures_are() -> None:
    titles = re.findall(r"<h3>(.*?)</h3>", render_page(invent_report()))
    assert {
        "Accuracy",
        "Loss",
        "Training loss",
        "Sparsity per layer",
        "Compression error per layer",
        "Rank per layer",
    } <= set(titles)
    bare = render_page(invent_report(models=[], training=[], layers=[], ranks={}))
    assert "<svg" not in bare


def test_plots_follow_the_colours_of_the_page() -> None:
    page = render_page(invent_report())
    assert "var(--ink)" in page
    assert not re.search(r"#0[147]0[258]0[369]", page)


def test_a_failed_check_is_shown() -> None:
    page = render_page(invent_report(checks=[Check("zeros", False, "17 are missing")]))
    assert "certificate FAILED: 0 of 1 checks" in page
    assert "17 are missing" in page


def test_text_from_outside_is_escaped() -> None:
    page = render_page(
        invent_report(name="<script>alert(1)</script>", models=[ModelRow("<i>x</i>", loss=1.0)])
    )
    assert "<script>alert" not in page
    assert "<i>" not in page
    assert "a &lt;b&gt; model" in page


def test_one_rank_one_layer_one_step(tmp_path: Path) -> None:
    data = invent_report(ranks={"all": 8}, training=[(1, 2.0)], models=[ModelRow("base", accuracy=1.0)])
    write_report(data, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["report.html", "report.json"]
    assert read_report(tmp_path) == data
    titles = re.findall(r"<h3>(.*?)</h3>", (tmp_path / "report.html").read_text())
    assert {"Accuracy", "Rank per layer"} <= set(titles)
    assert "Training loss" not in titles  # a single step is no curve
