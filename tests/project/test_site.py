"""The site, built and opened page by page in a browser."""

import functools
import http.server
import json
import re
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag

import build_docs
import nbformat
import pytest
import yaml
from conftest import ALL, ROOT

# In `make test` the site's notebooks have been executed by test_notebooks.py;
# this file alone shows them without outputs
NOT_HERE = (
    frozenset()
    if ALL
    else frozenset(n for n in build_docs.notebooks() if not n.startswith("runs/"))
)
LOOK = """() => ({
    title: document.title,
    ids: [...document.querySelectorAll('[id]')].map(e => e.id),
    links: [...document.querySelectorAll('a[href]')].map(a => a.href),
    images: document.images.length,
    missing: [...document.images].filter(i => !i.complete || !i.naturalWidth)
        .map(i => i.src.slice(0, 99)),
})"""


@pytest.fixture(scope="module")
def shown() -> list[str]:
    """Notebooks that the site shows with their outputs."""
    return [n for n in build_docs.notebooks() if n not in NOT_HERE or build_docs.kept(n).exists()]


@pytest.fixture(scope="module")
def site(tmp_path_factory, shown) -> Path:
    return build_docs.build(tmp_path_factory.mktemp("site") / "out", NOT_HERE)


@pytest.fixture(scope="module")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=site)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def pages(site, address, browser) -> tuple[dict, list]:
    """What a browser finds on each page, and what it complains about."""
    found, complaints = {}, []
    page = browser.new_page()
    page.on(
        "console",
        lambda m: (
            complaints.append(f"{page.url}: {m.text}")
            if m.type == "error" and m.location["url"].startswith(address)
            else None
        ),
    )
    page.on("pageerror", lambda e: complaints.append(f"{page.url}: {e}"))
    for file in sorted(site.rglob("*.html")):
        name = file.relative_to(site).as_posix()
        if page.goto(address + name).status != 200:
            complaints.append(f"{name}: does not load")
        found[name] = page.evaluate(LOOK)
    page.close()
    return found, complaints


def entries(contents) -> list[str]:
    return [
        n
        for e in contents
        for n in (
            [e]
            if isinstance(e, str)
            else entries(e["contents"])
            if "contents" in e
            else [e["href"]]
        )
    ]


def test_sidebar_lists_every_notebook():
    listed = entries(
        yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    )
    assert sorted(listed) == build_docs.notebooks()


def test_no_text_is_lost_with_the_title():
    """nbdev makes title and description of the first Markdown cell and drops what else stands
    there.
    """
    for name in build_docs.notebooks():
        first = next(
            c.source
            for c in nbformat.read(ROOT / "nbs" / name, 4).cells
            if c.cell_type == "markdown"
        )
        assert re.fullmatch(r"# .+\n\n> .+", first), name


def test_every_notebook_is_a_page(pages):
    assert {n.replace(".ipynb", ".html") for n in build_docs.notebooks()} <= set(pages[0])


def test_pages_load_without_an_error(pages):
    assert not pages[1]
    assert not [
        (name, p["missing"]) for name, p in pages[0].items() if p["missing"] or not p["title"]
    ]


def test_no_broken_internal_link(pages, site, address):
    broken = []
    for name, page in pages[0].items():
        for link in page["links"]:
            url, anchor = urldefrag(link)
            if not url.startswith(address):
                continue
            target = unquote(url.removeprefix(address)).split("?")[0]
            target += "index.html" * (target == "" or target.endswith("/"))
            if (
                not (site / target).is_file()
                or anchor
                and unquote(anchor) not in pages[0][target]["ids"]
            ):
                broken.append(f"{name}: {link.removeprefix(address)}")
    assert not broken


def test_figures_are_in_place(pages, shown):
    """As many pictures as the executed notebook has; the run notebooks are always executed."""
    for name in shown:
        outputs = [
            o
            for c in nbformat.read(build_docs.kept(name), 4).cells
            if c.cell_type == "code"
            for o in c.outputs
        ]
        assert pages[0][name.replace(".ipynb", ".html")]["images"] >= sum(
            "image/png" in o.get("data", {}) for o in outputs
        ), name
    assert (
        pages[0]["runs/train.html"]["images"] >= 2 and pages[0]["runs/evaluate.html"]["images"] >= 2
    )


def test_docments_are_shown(site):
    def text(name):
        return re.sub(r"<[^>]+>|\s", "", (site / name).read_text())

    assert "lora_rint16rankofAandB" in text(
        "0_core/recipe.html"
    )  # a field of a dataclass: type, default, comment
    assert "namestrfolder,hubidorbuilt-inname" in text("2_model/resolve.html")  # a parameter
    assert "Returnsstrfolderorhubid,forfrom_pretrained" in text("2_model/resolve.html")


def test_nothing_of_this_machine_is_published(site):
    """No traceback, no path of the checkout."""
    told = [
        f.name
        for f in site.rglob("*.html")
        if str(ROOT) in f.read_text() or "Traceback (most" in f.read_text()
    ]
    assert not told


def test_llms_txt(site):
    lines = (site / "llms.txt").read_text().splitlines()
    assert lines[0] == "# medmcqa_lora" and lines[2].startswith("> LoRA fine-tuning")
    assert re.search(r"^## ", "\n".join(lines), re.M)
    linked = [
        re.fullmatch(r"- \[.+\]\((\S+)\): .+", line)[1] for line in lines if line.startswith("- ")
    ]
    assert all((site / name).is_file() for name in linked)
    assert len(linked) == len(build_docs.notebooks()) == len(set(linked))


def test_search_index_has_the_text(site):
    assert "LoRA" in json.dumps(json.loads((site / "search.json").read_text()))
