"""The site builds without a warning, its links work, and it needs nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_blocks import ROOT

needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("material") is None
    or importlib.util.find_spec("mkdocstrings") is None,
    reason="mkdocs-material and mkdocstrings are not installed: pip install -e '.[docs]'",
)
pytestmark = needs_mkdocs


class Page(HTMLParser):
    """Links, what is loaded, and anchors of one page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], set()
        self.prose = ""
        self._code = self._paragraphs = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self._code += tag in ("code", "pre")
        self._paragraphs += tag == "p"
        if given.get("id"):
            self.anchors.add(given["id"])
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in ("img", "script", "iframe", "source") and given.get("src"):
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(given["href"])

    def handle_endtag(self, tag):
        self._code -= tag in ("code", "pre")
        self._paragraphs -= tag == "p"

    def handle_data(self, data):
        if self._paragraphs and not self._code:
            self.prose += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, without a network: any connection that is tried is refused."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mkdocs", "build", "--strict"),
            *("--config-file", str(ROOT / ".mkdocs.yml"), "--site-dir", str(folder)),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "NO_MKDOCS_2_WARNING": "1",
            "https_proxy": "http://127.0.0.1:9",
            "http_proxy": "http://127.0.0.1:9",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_page_of_docs_is_there(site, pages):
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs")).with_suffix(".html") in pages


def test_no_link_is_broken(site, pages):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path
            if parts.path:
                target = Path(os.path.normpath(path.parent / unquote(parts.path)))
            target = target / "index.html" if target.is_dir() else target
            if not target.is_relative_to(site) or not target.is_file():
                broken.append(f"{path.name}: {link}")
                continue
            anchors = pages[target].anchors if target in pages else set()
            if parts.fragment and unquote(parts.fragment) not in anchors:
                broken.append(f"{path.name}: no anchor {link}")
    assert not broken


def test_no_list_or_table_is_shown_as_prose(pages):
    """GitHub takes a list or a table right below a line of text, MkDocs wants an empty line."""
    for path, page in pages.items():
        marks = re.findall(r"^(?:- |\d+\. |\|).*", page.prose, re.MULTILINE)
        assert not marks, f"{path.name}: {marks[0]}"


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for path, page in pages.items():
        for source in page.loaded:
            assert not urlsplit(source).netloc, f"{path.name} loads {source}"
            assert (path.parent / urlsplit(source).path).exists(), f"{path.name}: {source}"


def test_docstrings_are_read_as_text(site):
    text = (site / "api.html").read_text(encoding="utf-8")
    assert "ghost_dist.config_file.load_config" in text
    assert ":class:" not in text


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_site_opens_from_the_file_system_and_is_searched_there(browser, site, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.goto((site / "index.html").as_uri())
    if width < 1000:
        page.locator("label[for=__search].md-header__button").click()
    page.locator(".md-search__input").click()
    page.keyboard.type("residual")
    page.locator(".md-search-result__link").first.wait_for(timeout=20_000)
    assert complaints == []
    page.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "dark")])
@pytest.mark.parametrize("name", ["index", "start", "tutorial", "serving"])
def test_axe_finds_nothing_serious(browser, site, name, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page.goto((site / f"{name}.html").as_uri())
    found = axe.Axe().run(page).response
    assert len(found["passes"]) > 20  # it did look
    grave = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert [(v["id"], [node["html"][:120] for node in v["nodes"]]) for v in grave] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()
