"""The pictures and the report of a race: drawn, self-contained, accessible, and opened in a real browser."""

from __future__ import annotations

import base64
import importlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser
from itertools import pairwise
from math import inf, nan

import numpy as np
import pytest
from race_cases import QUICK, quick

pytest.importorskip("scipy")
pytest.importorskip("threadpoolctl")
image = pytest.importorskip("matplotlib.image")

from fastadam.race import drawing, output, pictures, report, tables  # noqa: E402
from fastadam.race.optimizers import _ALL, OPTIMIZERS  # noqa: E402
from fastadam.race.problems import PROBLEMS  # noqa: E402
from fastadam.race.results import Entry, Result, Run, Standing, Trial  # noqa: E402

KINDS = {
    "rosenbrock": ["curves", "seeds", "learning-rates", "paths"],
    "noisy": ["curves", "seeds", "learning-rates", "paths"],
    "logistic": ["curves", "seeds", "learning-rates"],
    "reddi": ["curves", "seeds", "learning-rates", "paths"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("race") / "made"
    seen = []
    output.write(quick(), folder, on_problem=lambda standing: seen.append(standing.problem.name))
    assert seen == list(KINDS)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "race.html").read_text(encoding="utf-8")


def pixels(png):
    return image.imread(io.BytesIO(png))[..., :3]


# --- The pictures -------------------------------------------------------------------------------------------


def test_files(folder):
    names = {f"{problem}-{kind}.png" for problem, kinds in KINDS.items() for kind in kinds}
    assert {path.name for path in folder.iterdir()} == {"race.json", "race.html", *names}
    for name in names:
        assert (folder / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def share_of(png, name):
    """Share of the pixels that have nearly the color of an optimizer."""
    color = drawing._LOOKS[name][0].removeprefix("#")
    wanted = np.array([int(color[k : k + 2], 16) for k in (0, 2, 4)]) / 255
    return np.mean(np.abs(pixels(png) - wanted).max(axis=-1) < 0.08)


@pytest.mark.parametrize("kind", KINDS["reddi"])
def test_a_picture_shows_who_took_part(folder, kind):
    png = (folder / f"reddi-{kind}.png").read_bytes()
    for name in ("adam", "amsgrad"):
        assert share_of(png, name) > 3e-4
    assert share_of(png, "rmsprop") == 0
    assert np.mean(pixels(png).min(axis=-1) > 0.98) > 0.6  # most of it is white


def test_everybody_has_a_look_of_their_own():
    assert list(drawing._LOOKS) == [entrant.name for entrant in _ALL]
    assert len({color for color, _ in drawing._LOOKS.values()}) == len(_ALL)


def test_alt_texts_say_what_is_seen(folder):
    drawn = {picture.name: picture for picture in pictures.draw(quick().standings[3])}
    assert re.fullmatch(
        r"Loss curves on Reddi's counterexample\. In the end .* \(0\) is lowest, .* \(0\.\d+\) highest\.",
        drawn["curves"].alt,
    )
    assert "at most 0.01: adam 0 of 3; adamax" not in drawn["learning-rates"].alt
    assert re.search(r"at most 0\.01: adam 0 of 3; amsgrad \d of 3\.$", drawn["learning-rates"].alt)
    assert re.search(r"lbfgs 0 to 0;", drawn["seeds"].alt)
    assert "one panel for each of 3 optimizers, by step" in drawn["paths"].alt


def made(problem, finals, *, path=False):
    """A standing with these final losses of one learning rate, inf for one that diverged."""
    entries = []
    for name, values in finals.items():
        runs = tuple(
            Run(
                seed,
                np.arange(3),
                np.array([1.0, 0.5, value if np.isfinite(value) else nan]),
                np.array([[0.5, 0.5], [1e200, -1e200], [nan, nan]]) if path else None,
                None if np.isfinite(value) else 2,
                1e-6,
            )
            for seed, value in enumerate(values)
        )
        entries.append(Entry(OPTIMIZERS[name], {}, (Trial(0.1, runs),)))
    return Standing(PROBLEMS[problem](), 2, tuple(entries))


@pytest.mark.parametrize(
    ("problem", "finals"),
    [
        ("quadratic", {"adam": [inf, inf, inf]}),
        ("logistic", {"adam": [0.1, inf, inf], "lbfgs": [0.2, 0.2, 0.2]}),
        ("quadratic", {"adam": [0.1, 0.2, inf], "amsgrad": [1e300, 1e300, 1e300]}),
        ("logistic", {"adam": [0.0], "amsgrad": [0.0], "lbfgs": [0.0]}),
        ("quadratic", {"adam": [0.0], "lbfgs": [0.0]}),
        ("logistic", {"lbfgs": [inf]}),
    ],
    ids=[
        "all diverged",
        "most diverged",
        "one diverged",
        "all arrived",
        "arrived in logs",
        "reference diverged",
    ],
)
def test_pictures_and_report_of_odd_results(problem, finals):
    standing = made(problem, finals, path=problem == "quadratic")
    drawn = pictures.draw(standing)
    assert [picture.name for picture in drawn][-1] == (
        "paths" if problem == "quadratic" else "learning-rates"
    )
    made_of = replace(QUICK, problems=(problem,), optimizers=tuple(finals), seeds=len(finals))
    page = report.page(Result(made_of, (standing,)), {problem: drawn})
    assert ("diverged to" in page or "to diverged" in page) == any(
        not np.isfinite(value) for values in finals.values() for value in values
    )


# --- The report ---------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Collects what a report is made of; every element must be closed."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.cells, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in {"td", "th"}:
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in {"td", "th"}:
            self.cells[-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def test_report_needs_no_other_file(page):
    reader = Reader(page)
    tags = Counter(tag for tag, _ in reader.elements)
    assert not {"script", "link", "iframe", "object", "base", "form"} & tags.keys()
    assert "http" not in re.sub(r"http-equiv", "", page)
    assert "url(" not in page
    assert "@import" not in page
    policy = next(meta["content"] for meta in reader.all("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    addresses = [value for _, attributes in reader.elements for value in (attributes.get("src"),) if value]
    assert len(addresses) == sum(map(len, KINDS.values()))
    assert all(address.startswith("data:image/png;base64,") for address in addresses)


def test_pictures_of_the_report_are_the_files(page, folder):
    shown = [base64.b64decode(img["src"].partition(",")[2], validate=True) for img in Reader(page).all("img")]
    files = [(folder / f"{name}-{kind}.png").read_bytes() for name, kinds in KINDS.items() for kind in kinds]
    assert shown == files


def test_report_is_accessible(page):
    reader = Reader(page)
    (html,) = reader.all("html")
    assert html["lang"] == "en"
    assert "<title>fastadam race</title>" in page
    assert all(len(img["alt"]) > 30 for img in reader.all("img"))
    assert all(th["scope"] in {"col", "row"} for th in reader.all("th"))
    levels = [int(tag[1]) for tag, _ in reader.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {link["href"] for link in reader.all("a")} <= {f"#{name}" for name in ids}
    assert {"main", "header", "footer", "nav"} <= {tag for tag, _ in reader.elements}


def test_tables_of_the_report_are_those_of_the_terminal(page):
    rows = [tuple(cells) for cells in Reader(page).cells]
    expected = [row for standing in quick().standings for row in [tables.COLUMNS, *tables.rows(standing)]]
    assert rows == expected


def test_report_says_what_was_asked_for_and_what_was_prescribed(page):
    reader = Reader(page)
    runs = (3 + 3 + 1) * 2 * 4
    assert (
        f"3 optimizers on 4 problems, {runs} runs: 2 seeds from 0 on, 3 learning rates of each" in reader.text
    )
    assert "adam betas=(0.0, 0.1)" in reader.text
    assert "amsgrad=True" in reader.text
    for standing in quick().standings:
        assert standing.problem.lesson in reader.text


def test_what_comes_from_elsewhere_is_escaped(monkeypatch):
    standing = made("quadratic", {"adam": [0.1]})
    monkeypatch.setattr(type(standing.problem), "title", '<b>"&amp;')
    picture = pictures.Picture("curves", "<i>", '" onerror="x', b"")
    page = report.page(Result(QUICK, (standing,)), {"quadratic": [picture]})
    reader = Reader(page)
    assert not {"b", "i"} & {tag for tag, _ in reader.elements}
    assert reader.all("img")[0].keys() == {"alt", "src"}
    assert '<b>"&amp;' in reader.text


# --- In a browser -------------------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)

LOOK = """<!DOCTYPE html><meta charset="utf-8"><title>look</title>
<iframe id="page" style="width: {width}px; height: 900px; border: 0" srcdoc="{page}"></iframe>
<pre id="seen"></pre>
<script>
window.addEventListener("load", () => {{
  const frame = document.getElementById("page").contentWindow;
  const page = frame.document;
  document.getElementById("seen").textContent = JSON.stringify({{
    title: page.title,
    mode: page.compatMode,
    images: [...page.images].map((image) => [image.naturalWidth, image.naturalHeight, image.clientWidth]),
    rows: page.querySelectorAll("tbody tr").length,
    width: page.documentElement.scrollWidth,
    family: frame.getComputedStyle(page.body).fontFamily,
    target: page.querySelector(page.querySelector("nav a").getAttribute("href")).textContent,
    loaded: frame.performance.getEntriesByType("resource").map((entry) => entry.name.slice(0, 20)),
  }});
}});
</script>"""


def look(page, folder, width):
    """Open a page in a frame of a width; return what a browser makes of it."""
    (folder / "look.html").write_text(LOOK.format(page=escape(page), width=width), encoding="utf-8")
    # No sandbox: containers of CI allow none. The page is our own, and may load nothing.
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--dump-dom",
    ]
    command += [
        "--window-size=1300,1000",
        "--virtual-time-budget=20000",
        f"--user-data-dir={folder / 'user'}",
    ]
    dumped = subprocess.run(
        [*command, (folder / "look.html").as_uri()],
        check=True,
        capture_output=True,
        encoding="utf-8",
        timeout=180,
    ).stdout
    return json.loads(unescape(re.search(r'<pre id="seen">(.*?)</pre>', dumped, re.DOTALL)[1]))


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
@pytest.mark.parametrize("width", [1200, 360])
def test_report_in_a_browser(page, tmp_path, width):
    seen = look(page, tmp_path, width)
    assert seen["title"] == "fastadam race"
    assert seen["mode"] == "CSS1Compat"
    assert len(seen["images"]) == sum(map(len, KINDS.values()))
    for drawn_width, height, shown_width in seen["images"]:
        assert drawn_width > 500
        assert height > 300
        assert 250 < shown_width <= width
    assert seen["rows"] == 3 * 4
    assert seen["width"] <= width  # nothing but the tables scrolls sideways
    assert "system-ui" in seen["family"]  # so its style is there
    assert seen["target"] == "Rosenbrock's valley"
    assert [name for name in seen["loaded"] if not name.startswith("data:")] == []


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_the_look_in_a_browser_bites(page, tmp_path):
    broken = page.replace("iVBORw0KGgo", "AAAAAAAAAAA", 1).replace(".scroll {", ".no {")
    seen = look(broken, tmp_path, 360)
    assert [size[0] == 0 for size in seen["images"]].count(True) == 1
    assert seen["width"] > 360


# --- Errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", "output must be a folder; got {}, a file."),
        ("missing/race", "output must be in a folder that exists; got {}."),
    ],
    ids=["file", "missing"],
)
def test_output_that_cannot_be(tmp_path, name, message):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        output.require_output(tmp_path / name)
    assert str(caught.value) == message.format(tmp_path / name)
    output.require_output(tmp_path)
    output.require_output(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_output_that_may_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(output.os, "access", lambda *_: False)
    for path, rule in ((tmp_path, "a folder"), (tmp_path / "new", "in a folder")):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            output.require_output(path)
        assert str(caught.value) == f"output must be {rule} that can be written; got {path}."


def test_drawing_needs_no_pyplot():
    code = "import sys, fastadam.race.output; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "fastadam.race.drawing")
    with pytest.raises(ImportError) as caught:
        importlib.import_module("fastadam.race.drawing")
    assert str(caught.value) == 'the pictures of the race need matplotlib. pip install "fastadam[race]"'
