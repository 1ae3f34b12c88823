"""One page leads to the next. `python tests/routes.py` writes, from the order of the sidebar in _quarto.yml, the last
line of each page of a route and the tables of the index page; with `--check` it only names what is stale."""

import json
import math
import posixpath
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
FOOT, TABLES = "route-foot", "route-tables"  # ids of the two kinds of cells
HEAD = "| page | the question it answers | minutes |\n| --- | --- | --- |"


def read(href: str) -> dict:
    "A page by its path in nbs/."
    return json.loads((NBS / href).read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def sections() -> dict:
    "The sidebar's sections: name -> {href: title}. A title that _quarto.yml does not give is the page's first line."
    menu = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]

    def title(entry):
        return entry.get("text") or source(read(entry["href"])["cells"][0]).partition("\n")[0].removeprefix("# ")

    return {s["section"]: {e["href"]: title(e) for e in s["contents"]} for s in menu if "section" in s}


def minutes(href: str) -> int:
    "How long a page takes to read, up to the next five: 200 words or 60 lines of code a minute."
    took = 0.0
    for cell in read(href)["cells"]:
        if cell.get("id") == FOOT:
            continue
        if cell["cell_type"] == "markdown":
            took += len(source(cell).split()) / 200
        elif not source(cell).startswith("#| hide"):
            took += len(source(cell).splitlines()) / 60
    return 5 * math.ceil(took / 5)


def foot(href: str, pages: dict) -> str:
    "The last line of a page: where one comes from in its route, and where one goes."
    order = ["index.ipynb", *pages, "index.ipynb"]
    at, names = order.index(href), pages | {"index.ipynb": "All routes"}

    def link(to):
        return f"[{names[to]}]({posixpath.relpath(to, posixpath.dirname(href))})"

    return f"Previous: {link(order[at - 1])} · Next: {link(order[at + 1])}"


def tables(routes: dict, now: str) -> str:
    "A table for each section; the questions are those that stand there now."
    asked = dict(re.findall(r"^\| \[.*?\]\((.*?)\) \| (.*?) \|", now, re.M))
    return "\n\n".join(
        f"### {name}\n\n{HEAD}\n"
        + "\n".join(f"| [{t}]({href}) | {asked.get(href, '?')} | {minutes(href)} |" for href, t in pages.items())
        for name, pages in routes.items()
    )


def put(nb: dict, id: str, text: str) -> str:
    "A page's file with a cell's new text; a cell that is not there becomes the last one."
    cell = next((c for c in nb["cells"] if c.get("id") == id), None)
    if cell is None:
        nb["cells"].append(cell := dict(cell_type="markdown", id=id, metadata={}))
    cell["source"] = text.splitlines(True)
    if id == FOOT:
        nb["cells"] = [c for c in nb["cells"] if c is not cell] + [cell]
    return written(nb)


def written(nb: dict) -> str:
    "A page as its file's text."
    return json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def without_foot(href: str) -> str:
    "The file of a page that stands in no route."
    nb = read(href)
    return written(nb | dict(cells=[c for c in nb["cells"] if c.get("id") != FOOT]))


def wanted() -> dict:
    "href -> what the file should be: the pages and the index. Reference has tables, and no feet."
    routes = sections()
    found = {
        href: without_foot(href) if name == "Reference" else put(read(href), FOOT, foot(href, pages))
        for name, pages in routes.items()
        for href in pages
    }
    index = read("index.ipynb")
    now = next((source(c) for c in index["cells"] if c.get("id") == TABLES), "")
    return found | {"index.ipynb": put(index, TABLES, tables(routes, now))}


def stale() -> dict:
    "Those of `wanted` that differ from the file."
    return {href: text for href, text in wanted().items() if (NBS / href).read_text(encoding="utf-8") != text}


if __name__ == "__main__":
    found = stale()
    if sys.argv[1:] == ["--check"]:
        sys.exit(f"stale, run `python tests/routes.py`: {', '.join(found)}" if found else 0)
    for href, text in found.items():
        (NBS / href).write_text(text, encoding="utf-8")
