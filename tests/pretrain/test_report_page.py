"""The page of runs in a real browser: Debian's chromium, driven by playwright, at a desk, on a phone, in the dark, on paper, by keyboard.

Screenshots stay in the folder that each test prints. Where there is no chromium, or no playwright, the tests skip.
"""

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.report_view import gather
from pretrain.run.folder import RunFolder
from pretrain.watch.report import make_page
from tests.pretrain.watch.run_folders import write_run_folder

pytestmark = pytest.mark.long
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}

# Elements that show text of their own: what stands in them, where, and whether it is inside what scrolls by itself.
TEXTS = """() => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const text = node.textContent.trim(), parent = node.parentElement;
    if (!text || parent.closest("title") || !parent.checkVisibility({contentVisibilityAuto: true})) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects())
      if (box.width && box.right > 0)
        found.push({text: text.slice(0, 60), left: box.left, right: box.right, height: box.height, scrolls: !!parent.closest(".scroll")});
  }
  return found;
}"""
# Of every element with text of its own: its colour, and the first background behind it that is not transparent.
COLOURS = """() => [...document.querySelectorAll("body *")].filter(one =>
    !one.closest(".words") && one.checkVisibility() && [...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()))
  .map(one => {
    const style = getComputedStyle(one), ink = one.closest("svg") ? style.fill : style.color;
    let behind = one;
    while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    const paper = behind ? getComputedStyle(behind).backgroundColor : "rgb(255, 255, 255)";
    return {ink, paper, what: one.tagName, text: one.textContent.slice(0, 40)};
  })"""
PLOTS = """() => [...document.querySelectorAll("figure svg")].map(svg => ({
    box: (({width, height, left, right}) => ({width, height, left, right}))(svg.getBoundingClientRect()),
    drawn: [...svg.querySelectorAll("path")].filter(path => /--colour/.test(path.getAttribute("style"))).map(path => {
        const box = path.getBoundingClientRect(), style = getComputedStyle(path);
        return {width: box.width, height: box.height, stroke: style.stroke, fill: style.fill};
    }),
    label: svg.getAttribute("aria-label")}))"""
# What can be reached, and what Tab should reach.
TABBABLE = 'a[href], summary, [tabindex="0"]'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser is installed ({', '.join(BROWSERS)}); on Debian: apt-get install chromium")
    with sync.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of one run, and of three compared, with a name and a cause that are as long as they get."""
    place = tmp_path_factory.mktemp("pages")
    long = "a-run-with-a-very-long-name-" * 4
    folders = [write_run_folder(place / "runs" / name, seed=seed) for seed, name in enumerate(("one", "two", long), 2)]
    (folders[0] / "attempts.jsonl").write_text(
        (folders[0] / "attempts.jsonl").read_text().replace("was killed by SIGKILL", "/a/very/long/path/without/a/blank" * 8)
    )
    found = {"one": place / "one.html", "several": place / "several.html"}
    found["one"].write_text(make_page(gather([RunFolder(folders[0])], place)), encoding="utf-8")
    found["several"].write_text(make_page(gather([RunFolder(folder) for folder in folders], place)), encoding="utf-8")
    print(f"pages and screenshots: {place}")
    return found


class Opened:
    """A page in a browser, and what it said and asked for."""

    def __init__(self, browser: Any, path: Path, viewport: dict[str, int] = DESK, scheme: str = "light") -> None:
        self.path = path
        self.said: list[str] = []
        self.asked: list[str] = []
        self.context = browser.new_context(viewport=viewport, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.route("**/*", self._ask)
        self.page.goto(path.as_uri(), wait_until="load")

    def _ask(self, route: Any) -> None:
        self.asked.append(route.request.url)
        if route.request.url.startswith(("file://", "data:")):
            route.continue_()
        else:
            route.abort()

    def keep(self, name: str) -> None:
        """A screenshot of the whole page."""
        self.page.screenshot(path=self.path.with_name(f"{self.path.stem}-{name}.png"), full_page=True)

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *error: object) -> None:
        self.context.close()


@pytest.mark.parametrize("kind", ["one", "several"])
def test_every_plot_is_drawn_and_nothing_asked_for(browser: Any, pages: dict[str, Path], kind: str) -> None:
    with Opened(browser, pages[kind]) as opened:
        opened.keep("light")
        plots = opened.page.evaluate(PLOTS)
        assert len(plots) >= 7
        for plot in plots:
            assert plot["label"]
            assert plot["box"]["width"] > 250 and plot["box"]["height"] > 20
            lines = [one for one in plot["drawn"] if one["width"] > 0.2 * plot["box"]["width"] or one["fill"] != "none"]
            assert lines, plot["label"]
            assert all((one["stroke"] if one["fill"] == "none" else one["fill"]).startswith("rgb(") for one in lines)
        # A value is said where the pointer rests.
        words = opened.page.locator("#learning figure .words rect title, #curves figure .words rect title").first
        assert "tokens" in words.text_content()
        assert opened.said == []
        assert opened.asked == [pages[kind].as_uri()]


@pytest.mark.parametrize("kind", ["one", "several"])
def test_nothing_is_clipped_on_a_phone(browser: Any, pages: dict[str, Path], kind: str) -> None:
    with Opened(browser, pages[kind], PHONE) as opened:
        opened.keep("phone")
        for is_open in (False, True):
            if is_open:
                opened.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
            assert opened.page.evaluate("document.documentElement.scrollWidth") <= 360
            texts = opened.page.evaluate(TEXTS)
            assert len(texts) > 50
            wrong = [one for one in texts if not one["scrolls"] and not (one["left"] >= -0.5 and one["right"] <= 360.5)]
            assert wrong == []
        # What does not fit scrolls inside its own box, which is no wider than the screen.
        boxes = opened.page.evaluate("[...document.querySelectorAll('.scroll')].map(one => one.getBoundingClientRect().right)")
        assert max(boxes) <= 360
        small = opened.page.evaluate(
            "[...document.querySelectorAll('figure svg text')].filter(one => one.textContent)"
            ".map(one => one.getBoundingClientRect().height)"
        )
        assert min(small) >= 9
        assert opened.said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["one", "several"])
def test_text_can_be_read_in_light_and_dark(browser: Any, pages: dict[str, Path], kind: str, scheme: str) -> None:
    with Opened(browser, pages[kind], scheme=scheme) as opened:
        opened.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        opened.keep(f"{scheme}-open")
        colours = opened.page.evaluate(COLOURS)
        assert len(colours) > 100
        papers = {one["paper"] for one in colours}
        assert all((luminance(paper) > 0.5) == (scheme == "light") for paper in papers)
        low = [one | {"ratio": ratio} for one in colours if (ratio := contrast(one["ink"], one["paper"])) < 4.5]
        assert low == []
        # Curves are no text: 3 is what graphics need (WCAG 2.1, 1.4.11).
        lines = opened.page.evaluate(
            "Array.from({length: 8}, (_, i) => { const one = document.createElement('i'); one.style.color = `var(--colour-${i + 1})`;"
            " document.body.append(one); return getComputedStyle(one).color; })"
        )
        card = opened.page.evaluate("getComputedStyle(document.querySelector('figure')).backgroundColor")
        assert [(line, card) for line in lines if contrast(line, card) < 3] == []


@pytest.mark.parametrize("kind", ["one", "several"])
def test_the_keyboard_reaches_everything(browser: Any, pages: dict[str, Path], kind: str) -> None:
    with Opened(browser, pages[kind]) as opened:
        page = opened.page
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        page.evaluate(f"[...document.querySelectorAll('{TABBABLE}')].forEach((one, i) => one.dataset.number = i)")
        wanted = page.evaluate(f"[...document.querySelectorAll('{TABBABLE}')].filter(one => one.checkVisibility()).length")
        assert wanted > 15
        reached: set[str] = set()
        for _ in range(wanted + 5):
            page.keyboard.press("Tab")
            now = page.evaluate(
                "(one => [one.dataset.number ?? null, one.matches(':focus-visible'), getComputedStyle(one).outlineStyle,"
                " parseFloat(getComputedStyle(one).outlineWidth)])(document.activeElement)"
            )
            if now[0] is not None:
                reached.add(now[0])
                assert now[1:3] == [True, "solid"] and now[3] >= 2
        assert len(reached) == wanted
        # Every table of numbers is behind a summary that Enter opens.
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = false)")
        page.locator("figure summary").first.focus()
        page.keyboard.press("Enter")
        assert page.locator("figure details[open] table").count() == 1


@pytest.mark.parametrize("kind", ["one", "several"])
def test_paper_shows_the_plots_in_light_colours(browser: Any, pages: dict[str, Path], kind: str) -> None:
    with Opened(browser, pages[kind], scheme="dark") as opened:
        opened.page.emulate_media(media="print", color_scheme="dark")
        opened.keep("print")
        plots = opened.page.evaluate(PLOTS)
        assert all(plot["box"]["width"] > 200 and plot["drawn"] for plot in plots)
        assert luminance(opened.page.evaluate("getComputedStyle(document.body).backgroundColor")) > 0.8
        assert [one for one in opened.page.evaluate(COLOURS) if contrast(one["ink"], one["paper"]) < 4.5] == []
        pdf = opened.page.pdf(path=pages[kind].with_suffix(".pdf"), format="A4", print_background=False)
        assert pdf.startswith(b"%PDF") and len(pdf) > 20_000


def test_a_live_page_shows_the_same(browser: Any, pages: dict[str, Path]) -> None:
    import threading

    from pretrain.report_server import open_server

    with open_server(pages["one"].read_text, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        context = browser.new_context()
        page, said, asked = context.new_page(), [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server.address)
        plots = page.evaluate(PLOTS)
        context.close()
        server.shutdown()
        thread.join(60)
    assert said == []
    assert set(asked) == {server.address}
    assert len(plots) >= 16 and all(plot["box"]["height"] > 20 for plot in plots)


# --- colours (WCAG 2.1) -------------------------------------------------------------------------------------


@functools.cache
def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`."""
    parts = [float(part) / 255 for part in colour.split("(")[1].rstrip(")").split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    """Contrast ratio of two colours, 1 to 21."""
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.01)
