"One page leads to the next: feet and tables are what tests/routes.py makes of the sidebar."

import re

import pytest
from routes import FOOT, TABLES, foot, put, read, sections, source, stale, tables, wanted, without_foot

PAGES = {"a/1_x.ipynb": "X", "b/2_y.ipynb": "Y"}


@pytest.fixture(scope="module")
def found():
    return stale()


@pytest.mark.parametrize("href", wanted())
def test_nothing_is_stale(href, found):
    assert href not in found, "run `python tests/routes.py`"


def test_one_page_leads_to_the_next():
    first, last = (foot(href, PAGES) for href in PAGES)
    assert first == "Previous: [All routes](../index.ipynb) · Next: [Y](../b/2_y.ipynb)"
    assert last == "Previous: [X](../a/1_x.ipynb) · Next: [All routes](../index.ipynb)"


def test_the_foot_is_the_last_cell():
    "Also where a cell was added behind it."
    cells = [dict(id=FOOT, source=["old"]), dict(id="new", source=["x"])]
    written = put(dict(cells=cells), FOOT, "Next")
    assert written.index('"new"') < written.index('"Next"') and "old" not in written


def test_a_page_that_leaves_its_route_loses_its_foot():
    "Reference is for looking up: no page leads to the next."
    href = next(iter(sections()["Edit my photo"]))
    assert FOOT in put(read(href), FOOT, "Next") and FOOT not in without_foot(href)


def test_every_page_has_a_question_and_a_title_of_its_own():
    "A question stays with its page when the order changes."
    routes = sections()
    titles = [title for pages in routes.values() for title in pages.values()]
    assert len(routes) == 5 and len(set(titles)) == len(titles)
    text = next(source(c) for c in read("index.ipynb")["cells"] if c["id"] == TABLES)
    assert text.count("? |") == len(titles) and "| ? |" not in text
    href = next(iter(routes["Edit my photo"]))
    now = f"| [old]({href}) | Why? | 5 |"
    assert re.search(rf"\({href}\) \| Why\? \| \d+ \|", tables(routes, now))
