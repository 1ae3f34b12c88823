"The website: whole, offline, readable at a desk and on a phone."

import functools
import importlib.util
import json
import re
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from layerdiffusion.base.core import BadInput
from layerdiffusion.evidence.docs import _Page, _faults, _words_before, build_site

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PAGES = [p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(ROOT).parts)]
QUIET = "nbs/nbdev.yml", "_proc", "_docs"
needs_tools = pytest.mark.skipif(
    importlib.util.find_spec("smalldocs") is None, reason="smalldocs is not installed: pip install -e '.[docs]'"
)


def menu():
    "The pages that the sidebar lists."

    def hrefs(node):
        if isinstance(node, dict):
            return [h for k, v in node.items() for h in ([v] if k == "href" else hrefs(v))]
        return [h for v in node for h in hrefs(v)] if isinstance(node, list) else []

    return hrefs(yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"])


def test_every_page_is_in_the_sidebar():
    assert sorted(menu()) == sorted(p.relative_to(ROOT / "nbs").as_posix() for p in PAGES), (
        "each page once, and no page that is not there"
    )


def test_workflows_are_yaml():
    "GitHub's three files parse, run on pushes or at night, and call what exists."

    def read(name):
        return yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text(encoding="utf-8"))

    docs, tests, nightly = map(read, ("docs", "tests", "nightly"))
    assert docs[True] and tests[True] and nightly[True]["schedule"]  # YAML reads the key `on` as true
    assert any(step.get("run") == "python tests/mutants.py" for step in nightly["jobs"]["mutants"]["steps"])
    assert (ROOT / "tests/mutants.py").exists()
    steps = [step.get("run", "") for job in docs["jobs"].values() for step in job["steps"]]
    assert any("layerdiffusion docs" in s for s in steps)
    assert tests["jobs"]["tests"]["strategy"]["matrix"]["python"] == ["3.10", "3.12"]


@needs_tools
def test_refuses_a_folder_that_is_no_site(tmp_path):
    (tmp_path / "diary.txt").touch()
    with pytest.raises(BadInput, match="not a site"):
        build_site(tmp_path, ROOT)
    assert [p.name for p in tmp_path.iterdir()] == ["diary.txt"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The site in a temporary folder; the checkout stays as it was."
    before = {name: (ROOT / name).exists() for name in QUIET}
    folder = build_site(tmp_path_factory.mktemp("site") / "docs", ROOT)
    assert {name: (ROOT / name).exists() for name in QUIET} == before
    return folder


@needs_tools
def test_links_pictures_and_markup(site):
    "`build_site` has refused faults; here it is known that there was something to ask, and that a fault is seen."
    assert {p.stem for p in site.glob("*.html")} == {re.sub(r"^\d\d_", "", Path(name).stem) for name in menu()}
    page = _Page((site / "fine_tuning.html").read_text(encoding="utf-8"))
    assert (
        len(page.links) > 50
        and len(page.loads) > 10
        and {"fine_tune", "stack_layers"} <= page.ids
        and any(link.startswith("pipeline.html") for link in page.links)
    )


@needs_tools
def test_a_fault_is_seen(site, tmp_path):
    text = (site / "guidance.html").read_text(encoding="utf-8")
    (tmp_path / "guidance.html").write_text(
        text.replace("</main>", '<a href="nowhere.html">x</a> {{< x >}}<img src="data:,"></main>'), encoding="utf-8"
    )
    found = "\n".join(_faults(tmp_path))
    assert "nowhere.html is not there" in found and "'{{' is left over" in found and "site_libs" in found
    assert "pictures without alternative text: 1" in found


def test_a_figure_says_what_the_words_before_it_say():
    "The last paragraph of prose before its cell, in plain words; never a heading, a table, or what comes after."
    cells = ["# Title\n\nWe look at `M`. See [the *two* masks](a.ipynb) in $x_t$:", "## Next", "", "| a |", "After"]
    cells = [dict(cell_type="code" if not text else "markdown", source=[text]) for text in cells]
    assert _words_before(cells, 2) == "We look at M. See the two masks in x_t"
    assert _words_before(cells[1:], 1) == "A figure of this page"
    cells[0]["source"] = ["a. " + "b" * 299 + ". c."]
    assert _words_before(cells, 2) == "c."


@needs_tools
def test_functions_have_tables(site):
    text = (site / "fine_tuning.html").read_text(encoding="utf-8")
    table = text[text.index('id="fine_tune"') :].split("<table", 1)[1].split("</table>")[0]
    assert (
        all(f"<code>{name}</code>" in table for name in ("models", "lambda_obj", "lambda_bg", "steps"))
        and "250" in table
    )


@needs_tools
def test_the_calls_of_a_user_are_told_whole(site):
    "What makes a model stands first; each argument of the public calls has its type and its meaning."
    text = (site / "pipeline.html").read_text(encoding="utf-8")
    assert 0 < text.index('id="layerdiffusion.from_pretrained"') < text.index('id="layerdiffusion"')
    calls = ["from_pretrained", "from_pipe", "prepare", "embed", "tune", "sample", "edit", "__call__", "reuse"]
    for name in (*(f"layerdiffusion.{call}" for call in calls), "load_edit"):
        told = text[text.index(f'id="{name}"') :]
        row = r"<tr>\s*<td>(.*?)</td>\s*<td>(.*?)</td>.*?<td>([^\n]*)</td>\s*</tr>"
        rows = re.findall(row, told.split("</table>")[0], re.S)
        assert len(rows) >= 2 and all(kind.strip() and meaning.strip() for _, kind, meaning in rows), (name, rows)
    assert "pipeline.py" in text[: text.index('id="layerdiffusion.edit"')][-200:]


@needs_tools
def test_long_sources_are_folded(site):
    text = (site / "pipeline.html").read_text(encoding="utf-8")
    folds = re.findall(r"<details([^>]*)>(.*?)</details>", text, re.S)
    assert {(source.count("\n") > 24, "open" in how) for how, source in folds} == {(True, False), (False, True)}


@needs_tools
def test_a_page_has_its_notebook_and_the_next_page(site):
    "No widget is left as Python's words for it, but where the page about this site quotes them."
    page = _Page((site / "fine_tuning.html").read_text(encoding="utf-8"))
    assert {"embeddings.html", "guidance.html"} <= set(page.links)
    at = "layerdiffusion/layerdiffusion/blob/main/nbs/method/05_fine_tuning.ipynb"
    assert {f"https://github.com/{at}", f"https://colab.research.google.com/github/{at}"} <= set(page.links)
    texts = {p.name: p.read_text(encoding="utf-8") for p in site.glob("*.html") if p.name != "docs.html"}
    assert not [name for name, text in texts.items() if re.search(r">\s*(interactive|VBox)\(children=\(", text)]


@needs_tools
def test_a_widget_becomes_a_line():
    "Pages are saved without live widgets (tests/clean.py); one that was not cleaned says so on the site."
    from layerdiffusion.evidence.docs import _still

    live = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": ["interactive(children=()"]}
    assert "a live widget stands here" in _still(dict(data=live))[0]["data"]["text/markdown"][0]
    assert _still(dict(data=live | {"image/png": ""}))[0]["data"] == live | {"image/png": ""}


@needs_tools
def test_search_covers_every_page(site):
    entries = json.loads((site / "search.json").read_text(encoding="utf-8"))
    assert {e["href"].split("#")[0] for e in entries} == {p.name for p in site.glob("*.html")}


@pytest.fixture(scope="module")
def address(site):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium here")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
    with sync_api.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield chromium
        chromium.close()


LOOK = """() => ({
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    words: document.querySelector('main').innerText.length,
    maths: document.querySelectorAll('span.math').length,
    katex: document.querySelectorAll('.katex').length,
    failed: document.querySelectorAll('.katex-error').length,
    cut: [...document.querySelectorAll(innerWidth > 700 ? 'main pre, main .sd-table'
        : 'main div.sourceCode > pre, main .cell-output:not(.columns) > pre')]
        .filter(e => e.scrollWidth > e.clientWidth + 1).length,
    broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src.slice(0, 80)),
    over: [...document.querySelectorAll('main img')]
        .filter(i => i.getBoundingClientRect().right > innerWidth + 1).length})"""


def look(page, url):
    "What is wrong with a page as a reader sees it."
    page.goto(url, wait_until="load")
    seen = page.evaluate(LOOK)
    wrong = [k for k in ("broken", "failed", "over", "cut") if seen[k]]
    if seen["wide"] > 0:
        wrong.append(f"{seen['wide']} px too wide")
    if seen["words"] < 200:
        wrong.append("empty")
    if seen["maths"] and seen["katex"] < seen["maths"]:
        wrong.append(f"{seen['katex']} of {seen['maths']} formulas drawn")
    return wrong


@needs_tools
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")], ids=["desk", "phone"])
def test_every_page_in_a_browser(site, address, browser, width, scheme):
    """No error in the console, nothing asked of another machine, no page that scrolls sideways, every formula drawn,
    every picture there."""
    context = browser.new_context(viewport=dict(width=width, height=800), color_scheme=scheme)
    page, errors, away = context.new_page(), [], []
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else away.append(r.url))
    found = {p.name: wrong for p in sorted(site.glob("*.html")) if (wrong := look(page, address + p.name))}
    context.close()
    assert (found, errors, away) == ({}, [], [])


FIRST = {  # what is typed: what is found first
    "edit": "pipeline.html#layerdiffusion.edit",
    "from_pretrained": "pipeline.html#layerdiffusion.from_pretrained",
    "LayerDiffusion": "pipeline.html#layerdiffusion",
    "EditConfig": "settings.html#editconfig",
    "take_turns": "guidance.html#take_turns",
    "Every setting": "settings.html",
    "the same individual": "identity.html",
    "What breaks": "failures.html",
}


@needs_tools
def test_search_answers_offline(address, browser):
    context = browser.new_context(viewport=dict(width=1280, height=800))
    page = context.new_page()
    page.goto(address + "index.html", wait_until="networkidle")
    typed = page.locator(".smalldocs-search input").first
    typed.fill("iterative guidance")
    page.locator(".search-result").first.wait_for(timeout=60_000)  # busy machines are slow
    for words, place in FIRST.items():
        typed.fill(words)
        page.wait_for_function(
            "place => [document.querySelector('.search-result')].every(a => a && a.pathname + a.hash === place)",
            arg=f"/{place}",
            timeout=60_000,
        )
    context.close()
