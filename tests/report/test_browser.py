"""The page as a person meets it: in a browser, in both schemes, on a phone, by keyboard."""

import pytest

from ghost_dist.report.page import write_comparison, write_report
from ghost_dist.report.text import DASH

FACTS = {"Time and memory", "Configuration", "Provenance"}
EVERY = FACTS | {"What was removed", "Perplexity", "Why these layers", "What the operator does"}
SECTIONS = {
    "joint": EVERY | {"How well the gap is bridged", "What was tried"},
    "spans": EVERY | {"How well the gap is bridged"},
    "cut": EVERY,
    "comparison": {
        "The runs", "Perplexity", "What was removed", "Where they are configured differently",
    },
    "compare": {"The rows", "Quality against size", "Not possible"},
}  # fmt: skip
TABLE = {
    "dense": {"text": 8.0},
    "rows": [
        {
            "selection": "search", "remove": remove, "spans": [[3, 3 + remove]],
            "operator": operator, "perplexity": {"text": remove * perplexity / 2},
            "intervals": {"text": {"of_best": ratio}}, "kl": kl,
            "parameters": 2_000_000 - remove * 500_000,
        }
        for operator, perplexity, ratio, kl, remove in [
            ("fold", 12.5, [1.1, 1.3], 0.4, 2), ("ghost-joint", 10.0, [1, 1], None, 2),
            ("fold", 12.5, [1.1, 1.3], 0.4, 3), ("ghost-joint", 10.0, [1, 1], None, 3),
        ]
    ] + [{"selection": "search", "remove": 2, "spans": [], "operator": "ghost", "refused": "<b>"}],
}  # fmt: skip
"""What ``compare`` writes."""
STOPS = "a[href], summary, input, [tabindex='0']"
WIDTHS = {"desktop": (1280, 860), "phone": (375, 812)}


@pytest.fixture(scope="session")
def pages(made_runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    found = {name: folder / f"{name}.html" for name in SECTIONS}
    for name, run in made_runs.items():
        write_report([run], found[name])
    write_report(list(made_runs.values()), found["comparison"])
    write_comparison(TABLE, found["compare"])
    return found


@pytest.fixture(params=sorted(SECTIONS))
def name(request):
    return request.param


@pytest.fixture(params=[("desktop", "light"), ("phone", "dark")], ids="-".join)
def look(request):
    return request.param


@pytest.fixture
def page(browser, pages, name, look):
    """The page of a name, and everything that went wrong while it was opened."""
    width, scheme = look
    size = dict(zip(("width", "height"), WIDTHS[width], strict=True))
    opened = browser.new_page(viewport=size, color_scheme=scheme)
    opened.complaints, opened.requests = [], []
    opened.on("console", lambda message: opened.complaints.append(message.text))
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.on("request", lambda request: opened.requests.append(request.url))
    opened.goto(pages[name].as_uri())
    yield opened
    opened.close()


def test_opens_alone_and_has_every_section(page, pages, name):
    assert page.complaints == []
    assert page.requests == [pages[name].as_uri()]
    headings = page.locator("h2").all_inner_texts()
    assert set(headings) >= SECTIONS[name]
    assert len(headings) == len(set(headings))
    assert page.locator("h1").count() == 1
    targets = page.locator("nav a").evaluate_all("links => links.map(a => a.hash)")
    assert len(targets) == len(headings)
    assert all(page.locator(target).count() == 1 for target in targets)


def test_nothing_is_wider_than_the_screen(page):
    for details in page.locator("details").all():
        details.evaluate("d => { d.open = true }")
    # Only what scrolls by itself may reach past the edge.
    outside = page.evaluate(
        """() => [...document.querySelectorAll('body *')].filter(e =>
             e.getBoundingClientRect().right > window.innerWidth + 1
             && !e.closest('.scroll, pre')).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert outside == []
    widths = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert widths[0] <= widths[1]


def test_axe_finds_nothing_serious(page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    for details in page.locator("details").all():
        details.evaluate("d => { d.open = true }")
    found = axe.Axe().run(page).response
    assert len(found["passes"]) > 20  # it did look
    grave = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert [(v["id"], [node["html"][:120] for node in v["nodes"]]) for v in grave] == []


def test_every_drawing_has_words_and_numbers_behind_it(page):
    for drawing in page.locator("[role=img]").all():
        assert len(drawing.get_attribute("aria-label")) > 20
    for figure in page.locator("figure").all():
        assert figure.locator("figcaption strong").count() == 1
        assert figure.locator("details table tbody tr").count() > 1


def test_letters_in_drawings_can_be_read(page):
    sizes = page.evaluate(
        """() => [...document.querySelectorAll('figure > svg')].map(svg =>
             11 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)"""
    )
    assert len(sizes) == page.locator("figure").count()
    assert all(9.5 <= size <= 16 for size in sizes), sizes


def test_keyboard_reaches_everything_and_shows_where_it_is(page):
    expected = page.locator(STOPS).count()
    reached, outlined = set(), set()
    for _ in range(expected + 1):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            """() => { const e = document.activeElement;
                 return [[...document.querySelectorAll('*')].indexOf(e),
                         getComputedStyle(e).outlineStyle] }"""
        )
        if focused[1] != "none":
            outlined.add(focused[0])
        reached.add(focused[0])
    shown = page.locator(STOPS).evaluate_all(
        "all => all.filter(e => e.checkVisibility({contentVisibilityAuto: true})).length"
    )
    assert len(outlined) >= shown > 5
    assert reached - outlined <= {
        page.evaluate("[...document.querySelectorAll('*')].indexOf(document.body)")
    }


@pytest.mark.parametrize("name", ["comparison", "compare"])
def test_two_rows_are_chosen_and_their_difference_is_shown(page, name):
    rows, difference = page.locator(".choose tbody tr"), page.locator("#difference tr")
    rows.nth(0).click()
    assert difference.count() == 0
    page.keyboard.press("Tab")
    rows.nth(1).locator("input").focus()
    page.keyboard.press("Space")
    assert difference.first.inner_text().endswith("Second less first")
    if name == "compare":
        told = [row.split("\t") for row in difference.all_inner_texts()]
        assert told == [
            ["Operator", "ghost-joint", "fold", "Second less first"],  # the best stands first
            ["text", "10.00", f"12.50 (1.100 {DASH} 1.300)", "+2.5 (25.0 %)"],
            ["KL, nats / token", DASH, "0.400", ""],
        ]
    rows.nth(0).click()
    assert difference.count() == 0
    rows.nth(0).click()
    if rows.count() > 2:  # a third one takes the place of the one that was chosen first
        rows.nth(2).locator("input").click()
        assert page.locator(".choose :checked").count() == 2
        assert not rows.nth(1).locator("input").is_checked()


def test_names_from_outside_are_text(page, name):
    if name in ("joint", "comparison"):
        assert page.get_by_text("joint <b>&").count() >= 1
    assert page.locator("h3 b, .kind b, th b").count() == 0
