"""report.html as a browser shows it: whole, quiet, no wider than the screen, and nothing in it runs."""

import re

import numpy as np
import pytest
from PIL import Image

from dsd_fast.cli.demo.report import render
from dsd_fast.cli.report import page, paragraph, section
from tests.cli.browser import BROWSER, Page

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no browser: none of chromium, chromium-browser and google-chrome is installed"
)

HOSTILE = ["<script>x()</script>", "<img src=x onerror=x()>", "a \u202ered\u202c \x1b[31m'\"& ring"]

PROBE = """(async () => {
  const images = [...document.images];
  await Promise.all(images.map(image => image.decode().catch(() => 0)));
  const wide = [...document.querySelectorAll("body *")].filter(
    element => !element.closest(".scroll, svg") && element.getBoundingClientRect().right > innerWidth + 0.5);
  return {
    images: images.map(image => image.naturalWidth), alts: images.map(image => image.alt),
    scripts: document.scripts.length, title: document.title, text: document.body.innerText,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    wide: wide.map(element => element.outerHTML.slice(0, 80)),
    ground: getComputedStyle(document.body).backgroundColor, handlers: document.querySelectorAll("[onerror]").length,
    width: innerWidth, rows: [...document.querySelectorAll("tr")].map(row => row.getBoundingClientRect().height),
  };
})()"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The reports of both commands, the first with a hostile file name and hostile captions."""
    from typer.testing import CliRunner

    from dsd_fast.cli.app import app

    folder = tmp_path_factory.mktemp("reports")
    picture = folder / '<img src=x onerror=x()>&".png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(picture)
    captions = [part for text in [*HOSTILE, "a " + "g" * 15] for part in ("--caption", text)]
    for name, arguments in {
        "match": ["match", picture, folder / "missing.png", *captions, "--heatmaps", 2],
        "demo": ["demo", "--scenes", 6, "--reference-scenes", 1],
    }.items():
        done = CliRunner().invoke(app, [*map(str, arguments), "--timesteps", "500,", "--out", str(folder / name)])
        assert done.exit_code == (1 if name == "match" else 0), done.stderr
    return {name: folder / name / "report.html" for name in ("match", "demo")}


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [("match", 1280, "light"), ("match", 390, "dark"), ("demo", 1280, "dark"), ("demo", 390, "light")],
)
def test_the_page_is_shown_whole(reports, tmp_path, name, width, scheme):
    with Page(reports[name], tmp_path / "profile", width=width, scheme=scheme) as shown:
        seen = shown.value(PROBE)
        shown.screenshot(tmp_path / "page.png")
    assert shown.complaints == []
    assert seen["width"] == width
    assert len(seen["images"]) > 3
    assert min(seen["images"]) > 0
    assert all(seen["alts"])
    assert (seen["overflow"], seen["wide"]) == (0, [])
    assert (seen["scripts"], seen["handlers"]) == (0, 0)
    # No column so narrow that its words fall apart into letters.
    assert max(seen["rows"]) < 200
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert pixels.shape[1] == width
    ground = [int(value) for value in re.findall(r"\d+", seen["ground"])[:3]]
    assert (sum(ground) < 3 * 64) == (scheme == "dark")
    # Neither blank nor unstyled: the ground is there, and so is much else, with the pictures' colours.
    own = (pixels == ground).all(-1).mean()
    assert 0.02 < own < 0.98
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000


def test_hostile_texts_are_text(reports, tmp_path):
    with Page(reports["match"], tmp_path / "profile") as shown:
        seen = shown.value(PROBE)
    assert shown.complaints == []
    assert seen["title"] == "Which caption describes the image?"
    for text in (*HOSTILE[:2], "a \\u202ered\\u202c \\x1b[31m'\"& ring", '<img src=x onerror=x()>&".png', "missing"):
        assert text in seen["text"]


def test_the_policy_stops_what_escaping_would_miss(tmp_path):
    """A page with active content put in on purpose: the browser refuses to run or load any of it, and says so."""
    active = (
        "<script>document.title = 'script'</script><img src=x onerror=\"document.title = 'handler'\">"
        "<img src='https://example.com/x.png'><p style='color: red'></p>"
    )
    (tmp_path / "page.html").write_bytes(page("quiet", [], [section("a", paragraph("b"), active)]))
    with Page(tmp_path / "page.html", tmp_path / "profile") as shown:
        assert shown.value("document.title") == "quiet"
    for refusal in (
        "Executing inline script violates the following Content Security Policy directive 'default-src 'none''",
        "Executing inline event handler violates the following Content Security Policy directive 'default-src 'none''",
        "Loading the image 'https://example.com/x.png' violates the following Content Security Policy directive: "
        '"img-src data:"',
        "Applying inline style violates the following Content Security Policy directive 'style-src 'sha256-",
    ):
        assert [text for text in shown.complaints if text.startswith(refusal)], refusal


def test_long_words_wrap(tmp_path):
    """The settings have the longest words, and are folded away in the other pages."""
    summary = {
        "counts": {"images": 1, "pairs": 1},
        "settings": {"timesteps": [1], "layers": {"x" * 300: 1}, "model": "y" * 300},
        "versions": {},
        "accuracy": {"official": [], "noise": []},
        "reference": {
            "scenes": 1, "pairs": 1, "max_difference": 0.0, "seconds": 1.0, "reference_seconds": 2.0, "threads": 1,
        },
        "pointing": [],
        "first_seed": 0,
        "images": [],
    }  # fmt: skip
    (tmp_path / "page.html").write_bytes(render(summary, [], []))
    with Page(tmp_path / "page.html", tmp_path / "profile", width=390) as shown:
        shown.value("document.querySelector('details').open = true")
        seen = shown.value(PROBE)
    assert (seen["overflow"], seen["wide"]) == (0, [])
