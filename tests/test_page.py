"""The published pages in a real browser: size, first screen, narrow and dark, sorting, names of points, print."""

import re
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pypdf
import pytest
from browser import browser, needs_chromium

from ctbprn_lib.report import figures

REPORTS = Path(__file__).parent.parent / "reports"
PAGES = sorted(path.relative_to(REPORTS).as_posix() for path in REPORTS.glob("*/report.html"))
STUDY = (REPORTS / "ctbprn" / "report.html").as_uri()
pytestmark = needs_chromium

# Of every text that is shown, its contrast with what lies behind it (WCAG 2.2), the least of all and where it is.
LEAST_CONTRAST = """
(() => {
  const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  let least = [99, ""];
  for (const e of document.querySelectorAll("body *:not(svg *)")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !e.checkVisibility()) continue;
    const pair = [light(parse(getComputedStyle(e).color)), light(behind(e))].sort((a, b) => b - a);
    const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (contrast < least[0]) least = [contrast, e.outerHTML.slice(0, 80)];
  }
  return least;
})()
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_is_small_and_nothing_is_cut(page, name, width):
    assert (REPORTS / name).stat().st_size <= 700_000
    page.size(width, 800)
    page.open((REPORTS / name).as_uri())
    assert page.run("document.scrollingElement.scrollWidth") <= width
    outside = """[...document.querySelectorAll("main *")].filter((e) => e.checkVisibility() && !e.closest(".table, svg")
        && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"""
    assert page.run(outside) == []
    # what is wider than the window scrolls by itself, can be reached with the keyboard, and its ends are shaded
    wide = """[...document.querySelectorAll(".table")].filter((e) => e.scrollWidth > e.clientWidth)
        .every((e) => e.tabIndex === 0 && getComputedStyle(e).backgroundImage.includes("gradient"))"""
    assert page.run(wide)


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("is_dark", [False, True])
def test_text_can_be_read_in_light_and_dark(page, name, is_dark):
    page.size(1280, 800)
    page.dark(is_dark)
    page.open((REPORTS / name).as_uri())
    contrast, where = page.run(LEAST_CONTRAST)
    page.dark(False)
    assert contrast >= 4.5, where


def test_marks_can_be_seen_on_white():
    for colour in (*figures.CYCLE, figures.GREY):
        channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        assert 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05) >= 3, colour


def test_the_verdict_is_on_the_first_screen(page):
    page.size(1280, 800)
    page.open(STUDY)
    ends = page.run("""(() => {
        const headings = [...document.querySelectorAll("h2")];
        const verdict = headings.findIndex((h) => h.textContent === "Verdict");
        return headings[verdict + 1].getBoundingClientRect().top;
    })()""")
    assert ends <= 800


def test_a_claim_takes_five_lines_at_most_on_a_narrow_screen(page):
    page.size(390, 800)
    page.open(STUDY)
    most = page.run("""(() => {
        const tables = [...document.querySelectorAll("table")];
        const table = tables.find((t) => t.tHead.textContent.includes("Least favourable"));
        const height = (row) => row.getBoundingClientRect().height;
        const line = parseFloat(getComputedStyle(table).lineHeight);
        return Math.max(...[...table.tBodies[0].rows].map((row) => (height(row) - 8) / line));
    })()""")
    assert most < 5.5


def test_tables_sort_on_a_click_by_number_and_back(page):
    page.size(1280, 800)
    page.open(STUDY)
    column = """(name) => {
        const table = [...document.querySelectorAll("table")].find((t) => t.tHead.textContent.includes("Val accuracy"));
        const heading = [...table.tHead.rows[0].cells].find((c) => c.textContent === name);
        heading.click();
        return [...table.tBodies[0].rows].map((row) => row.cells[heading.cellIndex].textContent);
    }"""
    trials = pd.read_csv(REPORTS / "ctbprn" / "optuna_results_detailed.csv")
    rising = [float(text) for text in page.run(f"({column})('Learning rate')")]
    falling = [float(text) for text in page.run(f"({column})('Learning rate')")]
    assert rising == sorted(rising) == falling[::-1] and len(rising) == len(trials)
    accuracies = [float(text.split(" [")[0]) for text in page.run(f"({column})('Val accuracy (%)')")]
    assert accuracies == sorted(accuracies)
    assert page.run("document.querySelectorAll('th[aria-sort]').length") == 1


def test_contents_lead_to_every_section_and_tables_say_what_they_are(page):
    page.open(STUDY)
    assert page.run("""[...document.querySelectorAll("nav a")].map((a) => a.textContent)""") == page.run(
        """[...document.querySelectorAll("h2")].map((h) => h.textContent)"""
    )
    assert page.run("""[...document.querySelectorAll("nav a")].every((a) =>
        document.getElementById(decodeURIComponent(a.hash.slice(1))))""")
    assert page.run("""[...document.querySelectorAll("table")].every((t) => t.caption?.textContent
        && [...t.tHead.rows[0].cells].every((c) => c.scope === "col")
        && [...t.tBodies[0].rows].every((r) => r.cells[0].scope === "row"))""")


def test_points_have_names(page):
    page.open(STUDY)
    names = page.run("""[...document.querySelectorAll("svg use title")].map((t) => t.textContent)""")
    assert sum(name.startswith("trial 28: accuracy 97.3%, CE 0.070, lr 0.00114") for name in names) >= 2
    assert any(re.fullmatch(r"defaults, seed 64: \d\d\.\d\d %", name) for name in names)
    assert any(re.fullmatch(r"Batch size 64: \+0\.8 \[\+0\.5, \+1\.1\], better", name) for name in names)


def test_print_holds_every_cell_of_every_table(page, tmp_path):
    page.size(1280, 800)
    page.open(STUDY)
    cells = page.run("""[...document.querySelectorAll("table")].flatMap((t) =>
        [...t.querySelectorAll("th, td")].map((c) => c.textContent.trim()))""")
    page.pdf(tmp_path / "page.pdf")
    printed = "".join(page.extract_text() for page in pypdf.PdfReader(tmp_path / "page.pdf").pages)
    joined = squeezed(printed)
    assert len(cells) > 500
    assert [cell for cell in cells if squeezed(cell) not in joined] == []


def squeezed(text):
    """A text without spaces, and with its ligatures taken apart."""
    return re.sub(r"\s", "", unicodedata.normalize("NFKC", text))
