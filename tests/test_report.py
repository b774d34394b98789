"""The report: what it says, that it needs nothing else, that hostile text stays text, and how it works in a browser."""

import copy
import html
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bittern import jobs
from bittern.analysis.charts import LETTER, contour, heat_map, lines, names_beside, styles, surface
from bittern.analysis.findings import add_findings
from bittern.analysis.report import write_report
from bittern.analysis.study import analyze
from bittern.demo import DIGITS
from bittern.options import Curvature, Distill, Training
from bittern.recipe import Format, Rule
from material import save_text_model, write_tables

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports of a trained image model, beside one with mixed precision, and of a text model on hostile texts."""
    place = tmp_path_factory.mktemp("reports")
    training = Training(steps=6, batch_size=32, learning_rate=1e-3, evaluations=2)
    jobs.qat(DIGITS, "ternary-2-2-8", place / "taught", data="digits", distill=Distill(), training=training)
    jobs.ptq(DIGITS, "w8a8", place / "mixed", data="digits", samples=16, method="omse", mixed=jobs.Mixed(5.0, (4, 6)))
    analyze(
        place / "taught",
        DIGITS,
        "digits",
        place / "images",
        against=place / "mixed",
        samples=24,
        subset=8,
        curvature=Curvature(2, 2, 2, 3),
    )
    save_text_model(place / "bert")
    texts = ["a bittern booms", f"a {HOSTILE} bittern", "in the reeds of still water", "a day"] * 3
    tables = write_tables(place / HOSTILE.replace("/", "_")[:40], sentence=texts, label=[0, 1, 2, 0] * 3)
    jobs.quantize(place / "bert", "ternary-2-2-8", place / "small")
    analyze(place / "small", place / "bert", str(tables), place / "texts", samples=12, subset=4)
    return place


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def test_complete(place: Path) -> None:
    """One page, its numbers, and each of its plots as SVG that an XML parser reads and that needs no style sheet."""
    page = (place / "images" / "report.html").read_text()
    figures = re.findall(r'<figure id="([^"]+)"', page)
    wanted = {
        "divergence-taught",
        "cover-mixed",
        "sa-gen-classes",
        "depth",
        "min-max",
        "blocks",
        "classes",
        "spectrum",
        "nuclear-map",
        "losses-taught",
        "metric-taught",
        "frontier-mixed",
        "surface-taught",
    }
    assert wanted <= set(figures)
    files = list((place / "images" / "plots").iterdir())
    assert sorted(f"{name}.svg" for name in figures) == sorted(file.name for file in files)
    for file in files:
        root = ElementTree.fromstring(file.read_text())
        assert root.tag.endswith("svg")
        assert "var(" not in file.read_text()
    assert len(page.encode()) < 3_000_000


def test_summary(place: Path) -> None:
    """The summary has what the run measured on all test data, sizes, speed, what stayed float; and the worst three."""
    page, run = (
        (place / "images" / "report.html").read_text(),
        json.loads((place / "taught" / "bittern.json").read_text()),
    )
    summary = page[page.index('id="summary"') : page.index("</table>")]
    for text in (
        "accuracy (360 samples)",
        f"{run['packed']['accuracy']:.4f}",
        "smaller)",
        "bits per quantized weight",
        "weights are quantized",
        "stayed float",
        "classifier",
        "ms (",
    ):
        assert text in summary
    worst = result_of(place / "images")["students"][0]["worst"]
    assert len(worst) == 3
    assert [b["error"] for b in worst] == sorted((b["error"] for b in worst), reverse=True)
    assert all(block["advice"] in page.replace("&#34;", '"') for block in worst)


def test_self_contained(place: Path) -> None:
    """Nothing in a page names another file or address, and its policy forbids every request."""
    for name in ("images", "texts"):
        page = (place / name / "report.html").read_text()
        assert "default-src 'none'" in page
        without = page.replace("http://www.w3.org/2000/svg", "")
        assert not re.findall(r"https?://|@import|<link|src=\"(?!data:)", without.replace(HOSTILE, ""))


def test_hostile_text(place: Path) -> None:
    """Texts, tokens and paths that look like markup appear as text: in the page, in its data and in no element."""
    page = (place / "texts" / "report.html").read_text()
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in page
    assert "alert(1)" in page


def test_phases(place: Path, tmp_path: Path) -> None:
    """Phases of a run, where it has some, are marked in its training curves by name."""
    result = result_of(place / "images")
    result["students"][0]["phases"] = [{"name": "TI-O <b>", "from": 0, "to": 3}, {"name": "all", "from": 3, "to": 6}]
    write_report(result, tmp_path)
    text = (tmp_path / "plots" / "losses-taught.svg").read_text()
    assert "TI-O &lt;b&gt;" in text
    assert ElementTree.fromstring(text) is not None


def test_float_products(place: Path, tmp_path: Path) -> None:
    """What multiplies activations out of Bittern's reach is named among what is quantized and what is not."""
    result = result_of(place / "texts")
    assert re.search(r"^\d\d\.\d% of [\d,]+ weights are quantized", result["students"][0]["notes"][0])
    result["students"][0]["notes"].append("products of activations stay float in layer.0.<b>")
    write_report(result, tmp_path)
    assert "products of activations stay float in layer.0.&lt;b&gt;" in (tmp_path / "report.html").read_text()


def test_nothing_stands_out(place: Path, tmp_path: Path) -> None:
    """A student without any error has no worst blocks, and the page says so."""
    result = copy.deepcopy(result_of(place / "texts"))
    result["students"][0]["worst"] = []
    write_report(result, tmp_path)
    assert "Nothing: no block" in (tmp_path / "report.html").read_text()


def test_verdict(place: Path, tmp_path: Path) -> None:
    """The page begins with a sentence about each student; a collapse is said as such, and marked."""
    result = result_of(place / "images")
    for student in result["students"]:
        student["run"] = {}
        student["metrics"] = {"accuracy": 0.52}
    result["teacher"]["metrics"] = {"accuracy": 0.97}
    add_findings(result, [{"vit.layers.0": Rule(weight=Format(kind="ternary"))}] * 2)
    write_report(result, tmp_path)
    page = (tmp_path / "report.html").read_text()
    said = re.findall(r'<p class="verdict collapse">(.*?)</p>', page)
    assert len(said) == 2
    assert "The model collapsed: accuracy 0.9700 in float, 0.5200 now" in said[0]
    assert "What to try: longer training" in said[0]
    assert "What to try: training (bittern qat)" in said[1]
    assert page.index("verdict collapse") < page.index('id="summary"') < page.index("What stands out")


def test_same_scale(place: Path) -> None:
    """Plots of two students that show the same thing have the same marks on their axes and the same colours."""
    plots = place / "images" / "plots"
    for name in ("interventions", "divergence", "cover", "ranking", "sa-gen", "surface"):
        own, other = (
            re.findall(r"<text[^>]*>([^<]*)</text>", (plots / f"{name}-{student}.svg").read_text())
            for student in ("taught", "mixed")
        )
        assert own == other, name
    with_peak, flat = ({"a": [(0.0, 0.0), (1.0, top)]} for top in (8.0, 1.0))
    assert ">8<" not in lines(flat, "y").svg
    assert ">8<" in lines(flat, "y", beside=[with_peak]).svg


def test_plots() -> None:
    """Cells and points say what they are; missing values leave gaps; the teacher has its colour in every plot."""
    plot = heat_map([[0.1, None], [0.2, 0.4]], "x", rows=["layer 0", "layer <1>"])
    assert plot.svg.count("data-head") == 3
    assert "layer &lt;1&gt;, head 1: x 0.4" in plot.svg
    assert plot.rows[1] == ["layer 0", 0.1, None]
    broken = lines({"a": [(0, 1.0), (1, 2.0), (0, float("nan")), (0, -1.0), (1, -2.0)]}, "")
    assert re.search(r'd="M[\d., ]+M[\d., ]+"', broken.svg)
    assert styles(["a", "teacher", "b"]) == [1, 0, 2]
    assert "no values" in lines({"a": []}, "").svg


@pytest.mark.parametrize("crowd", [1, 30, 150], ids=lambda width: f"within-{width}")
def test_names_of_points(crowd: int) -> None:
    """Names beside points meet no mark, no bar, and no other name, however close the points lie, and stay inside."""
    draw = random.Random(0)
    bars = [(60.0, 62.0, 40.0, 190.0), (20.0, 330.0, 100.0, 102.0)]
    points = [(60 + draw.random() * crowd, 150 + draw.random() * crowd / 4, f"rung-{k}") for k in range(9)]
    points.append((330.0, 30.0, "a very long name of a rung of one's own, which is cut"))
    svg = "".join(names_beside(points, bars, (20.0, 334.0, 18.0, 240.0)))
    assert svg == "".join(names_beside(points, bars, (20.0, 334.0, 18.0, 240.0)))  # the same each time
    places = [(x - 6, x + 6, y - 6, y + 6) for x, y, _ in points] + bars
    texts = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)"[^>]*>([^<]+)<', html.unescape(svg))
    assert [name for *_, name in texts][:9] == [name for *_, name in points][:9]
    for x, y, anchor, name in texts:
        left = float(x) - (LETTER * len(name) if anchor == "end" else 0)
        place = (left, left + LETTER * len(name), float(y) - 9, float(y) + 2)
        assert not any(place[0] < b and a < place[1] and place[2] < d and c < place[3] for a, b, c, d in places), name
        assert left >= 20
        assert place[1] <= 334
        places.append(place)


def test_contour() -> None:
    """Lines of equal value run where a plane has that value."""
    plane = [[float(x + 10 * y) for x in range(4)] for y in range(3)]
    pieces = list(contour(plane, 10.5))
    assert pieces
    assert all(abs(x + 10 * y - 10.5) < 1e-9 for piece in pieces for x, y in piece)
    assert "<path" in surface([[3.0, 2.0, 3.0], [2.0, 1.0, 2.0], [3.0, 2.0, 3.0]], "loss", steps=[-1.0, 0.0, 1.0]).svg


# ---- in a browser


def browser_path() -> str | None:
    return os.environ.get("BITTERN_BROWSER") or shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a window. CI names it in BITTERN_BROWSER, so that a missing one is an error there."""
    path = browser_path()
    if path is None:
        pytest.skip("no chromium on the PATH and no BITTERN_BROWSER: the report is not opened in a browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=["images", "texts"])
def page(request: Any, browser: Any, place: Path) -> Iterator[Any]:
    """An open report. Anything on the console and any request but for the page itself fails the test."""
    opened, problems, requests = browser.new_page(viewport={"width": 1300, "height": 900}), [], []
    opened.on("console", lambda message: problems.append(message.text))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda asked: requests.append(asked.url))
    opened.goto((place / request.param / "report.html").as_uri())
    yield opened
    assert not problems
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == requests[:1]
    opened.close()


def picture(page: Any) -> str:
    """The pixels of the teacher's map, as text."""
    found: str = page.evaluate("document.querySelector('#maps canvas').toDataURL()")
    return found


def test_opens(page: Any) -> None:
    """All plots are drawn, with marks in them; the maps have colours; no text runs out of its plot."""
    assert page.evaluate("performance.timing.domComplete - performance.timing.navigationStart") < 2000
    empty = (
        "[...document.querySelectorAll('figure svg')].filter(s => !s.querySelector('rect,circle,path,polygon')).length"
    )
    assert page.evaluate(empty) == 0
    assert len(picture(page)) > 1000
    outside = """[...document.querySelectorAll('figure svg')].flatMap(svg => {
        const box = svg.getBoundingClientRect();
        return [...svg.querySelectorAll('text')].filter(t => {
            const b = t.getBoundingClientRect();
            return b.right > box.right + 4 || b.left < box.left - 4 || b.bottom > box.bottom + 4;
        }).map(t => svg.closest('figure').id + ': ' + t.textContent);
    })"""
    assert page.evaluate(outside) == []


def test_linked(page: Any) -> None:
    """A click on a cell marks it in all heat maps, names its numbers, and shows its attention maps."""
    page.click("svg[data-heat] [data-layer='0'][data-head='3']")
    before = picture(page)
    page.click("svg[data-heat] [data-layer='1'][data-head='2']")
    assert page.input_value("#layer") == "1"
    assert page.input_value("#head") == "2"
    heat_maps = page.locator("svg[data-heat]").count()
    assert page.locator("svg[data-heat] .on").count() == heat_maps
    assert page.text_content("#readout").startswith("layer 1, head 2: KL divergence")
    assert picture(page) != before


def test_keyboard(page: Any) -> None:
    """Heat maps are reached by Tab and walked by arrows, the ends hold; the selectors work too."""
    page.click("svg[data-heat] [data-layer='0'][data-head='0']")
    page.focus("svg[data-heat]")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
    assert (page.input_value("#layer"), page.input_value("#head")) == ("0", "1")
    before = picture(page)
    page.select_option("#sample", index=1)
    assert picture(page) != before
    assert page.evaluate("document.querySelector('svg[data-heat]').tabIndex") == 0


def test_tooltip(page: Any) -> None:
    """A cell under the pointer tells its number."""
    page.hover("svg[data-heat] [data-layer='1'][data-head='1']")
    assert re.match(r"layer 1, head 1: divergence [\d.e-]+", page.text_content("#tip"))
    page.mouse.move(1, 1)
    assert page.is_hidden("#tip")


def test_files(page: Any, tmp_path: Path) -> None:
    """The buttons save a plot as PNG and as SVG in the colours of paper."""
    for kind in ("png", "svg"):
        with page.expect_download() as download:
            page.click(f"#depth button[data-save={kind}]")
        file = tmp_path / download.value.suggested_filename
        download.value.save_as(file)
        assert file.name == f"depth.{kind}"
        if kind == "png":
            from PIL import Image

            with Image.open(file) as image:
                assert image.size[0] == 3 * 340
                assert len(image.convert("RGB").getcolors(1 << 20)) > 20
        else:
            assert "var(" not in file.read_text()
            assert ElementTree.fromstring(file.read_text()).tag.endswith("svg")


@pytest.mark.parametrize("name", ["images", "texts"])
def test_phone_dark_print(browser: Any, place: Path, name: str) -> None:
    """On a phone nothing is wider than the screen; in the dark text is light; print leaves the controls out."""
    page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme="dark")
    page.goto((place / name / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    red = page.evaluate("getComputedStyle(document.body).color.match(/\\d+/)[0]")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
    assert int(red) > 200
    assert int(background) < 60
    page.emulate_media(media="print", color_scheme="light")
    assert page.is_hidden("nav")
    assert page.is_hidden("#depth button")
    assert page.is_visible("#depth svg")
    page.close()


@pytest.mark.parametrize("name", ["images", "texts"])
def test_narrow(browser: Any, place: Path, name: str) -> None:
    """On a phone no word is broken, letters of plots keep 11 pixels, and no text of a plot lies over another."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto((place / name / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    broken = """[...document.querySelectorAll('#summary th, #summary td, h1, h2, h3, nav a, label')].flatMap(cell => {
        const texts = [...cell.childNodes].filter(node => node.nodeType === Node.TEXT_NODE), range = new Range();
        return texts.flatMap(node => [...node.data.matchAll(/[\\p{L}\\p{N}]+/gu)].filter(word => {
            range.setStart(node, word.index);
            range.setEnd(node, word.index + word[0].length);
            return new Set([...range.getClientRects()].filter(r => r.width).map(r => r.top)).size > 1;
        }).map(word => word[0]));
    })"""
    assert page.evaluate(broken) == []
    sizes = """[...document.querySelectorAll('figure svg')].map(svg =>
        svg.clientWidth / svg.viewBox.baseVal.width * Math.min(...[...svg.querySelectorAll('text')].map(
            t => +t.getAttribute('font-size'))))"""
    assert min(page.evaluate(sizes)) >= 11
    over = """[...document.querySelectorAll('figure svg')].flatMap(svg => {
        const texts = [...svg.querySelectorAll('text')].map(t => [t, t.getBoundingClientRect()]);
        return texts.flatMap(([t, a], i) => texts.slice(i + 1).filter(([u, b]) =>
            !(t.getAttribute('transform') && u.getAttribute('transform')) && a.right > b.left + 1 &&
            b.right > a.left + 1 && a.bottom > b.top + 4 && b.bottom > a.top + 4).map(([u]) =>
            `${svg.closest('figure').id}: ${t.textContent} over ${u.textContent}`));
    })"""
    assert page.evaluate(over) == []
    page.close()


def test_contrast(browser: Any, place: Path) -> None:
    """Text stands out from its ground by 4.5 to 1, curves by 3 to 1, light and dark (WCAG AA)."""
    script = """names => { const s = getComputedStyle(document.documentElement), c = document.createElement('canvas');
        const x = c.getContext('2d');
        return names.map(n => { x.fillStyle = s.getPropertyValue('--' + n).trim(); return x.fillStyle; }); }"""
    names = ["card", "ink", "quiet", "s0", "s1", "s2", "s3", "s4", "s5"]
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto((place / "texts" / "report.html").as_uri())
        ground, *others = (luminance(colour) for colour in page.evaluate(script, names))
        for name, value in zip(names[1:], others, strict=True):
            ratio = (max(ground, value) + 0.05) / (min(ground, value) + 0.05)
            assert ratio >= (4.5 if name in ("ink", "quiet") else 3), (scheme, name, ratio)
        page.close()


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
