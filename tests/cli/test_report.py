"""The report's parts, and that it is one file with every text escaped."""

import base64
import hashlib
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dsd_fast.cli.heatmaps import shown
from dsd_fast.cli.report import Card, card, cards, page, paragraph, section, settings, share, table, visible

IMAGE = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
CAPTION = "a <b>red</b> 'ring' & \"ring\""


class Seen(HTMLParser):
    """Tags with their attributes, and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.marked, self._in_mark = [], "", [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "mark":
            self.marked.append("")
            self._in_mark = True

    def handle_endtag(self, tag):
        self._in_mark = self._in_mark and tag != "mark"

    def handle_data(self, data):
        self.text += data
        if self._in_mark:
            self.marked[-1] += data


def made(**changes):
    maps = [("ring", (14, 18), np.eye(8, dtype=np.float32)), ("ring", (23, 27), np.full((8, 8), 0.25, np.float32))]
    rows = [{"caption": CAPTION, "score": 2.0, "note": "<true>", "right": True}, {"caption": "b", "score": 1.0}]
    arguments = {"name": '<i>"x"', "picture": IMAGE, "ranked": rows, "lowest": 0.0, "highest": 2.0}
    return card(Card(**{**arguments, "maps": [shown(IMAGE, CAPTION, maps, 9)], **changes}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<script>alert('1')</script>", "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;"),
        ('a & "b"', "a &amp; &quot;b&quot;"),
        ("\u202ered\u202c \u200f\u2066", "\\u202ered\\u202c \\u200f\\u2066"),
        ("\x00\x1b[31m\n\x7f\x85\ufeff\u2028", "\\x00\\x1b[31m\\n\\x7f\\x85\\ufeff\\u2028"),
        ("caf\udce9", "caf\\udce9"),
        ("אדום 熊\u3000é e\u0301 👩\u200d🚀", "אדום 熊\u3000é e\u0301 👩\u200d🚀"),
    ],
)
def test_visible(text, expected):
    assert visible(text) == expected
    assert visible(text).isprintable() or "\u200d" in text or "\u3000" in text


def test_a_page_stands_by_itself_and_escapes_everything():
    whole = page(
        "<title>&", ["<p>lead"],
        [
            section("<h2>", paragraph("<em>"), table("<caption>", ["<th>", "n"], [["<i>cell</i>", "1"]], numbers=1)),
            cards([made()], 3), settings({"<dt>": "<dd>"}),
        ],
    ).decode()  # fmt: skip
    seen = Seen(whole)
    # Cells are HTML already; all else was text.
    for tag in ("em", "b", "script", "link-x"):
        assert tag not in [name for name, _ in seen.tags]
    assert [name for name, _ in seen.tags].count("i") == 1
    for text in (
        "<title>&",
        "<p>lead",
        "<h2>",
        "<em>",
        "<caption>",
        "<th>",
        CAPTION,
        "<true>",
        '<i>"x"',
        "<dt>",
        "<dd>",
    ):
        assert text in seen.text
    for name, attributes in seen.tags:
        assert "style" not in attributes
        assert not [key for key in attributes if key.startswith("on")]
        for key in ("src", "href"):
            assert attributes.get(key, "data:").startswith("data:"), (name, attributes)
    assert not re.search(r"url\(|@import", whole)
    policy = next(a["content"] for name, a in seen.tags if a.get("http-equiv") == "Content-Security-Policy")
    style = re.search(r"<style>(.*?)</style>", whole, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert (
        policy == f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def test_a_card_shows_scores_marks_words_and_describes_pictures():
    text = cards([made()], 1)
    seen = Seen(text)
    assert seen.marked == ["ring", "ring"]
    assert "<bdi>a &lt;b&gt;red&lt;/b&gt; &#x27;<mark>ring</mark>&#x27; &amp; &quot;ring&quot;</bdi>" in text
    assert "<bdi>a &lt;b&gt;red&lt;/b&gt; &#x27;ring&#x27; &amp; &quot;<mark>ring</mark>&quot;</bdi>" in text
    pictures = [attributes for name, attributes in seen.tags if name == "img"]
    assert [each["alt"] for each in pictures] == ['<i>"x"', *['Heat map of “ring” over <i>"x"'] * 2, "dark to light"]
    for each in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(each["src"].partition("base64,")[2])))
        assert image.size == (int(each["width"]), int(each["height"]))
    assert [attributes.get("class") for name, attributes in seen.tags if name == "li"] == ["right", None]
    # From the lowest to the highest score of the image.
    assert re.findall(r'class="fill" width="([\d.]+)"', text) == ["100.00", "50.00"]
    assert "2.0000" in seen.text
    assert "0" in seen.text
    assert "1 attention probability, one scale for all words of this caption" in seen.text


def test_what_a_card_says_about_what_is_missing():
    assert "The file could not be read a second time." in made(picture=None, maps=[])
    assert "This caption has no words to map." in made(maps=[shown(IMAGE, "!", [], 9)])
    maps = [("a", (0, 1), np.ones((8, 8), np.float32))] * 5
    text = made(maps=[shown(IMAGE, "a", maps, 2)])
    assert "The maps of 3 more words are in the files." in text
    assert text.count("<figure>") == 2
    text = made(maps=[shown(IMAGE, "a", maps, 0)])
    assert "The maps of 5 words are in the files." in text
    assert "<figure>" not in text
    assert re.findall(r'class="fill" width="([\d.]+)"', made(lowest=1.0, highest=1.0)) == ["100.00", "100.00"]


def test_what_is_left_out_is_said():
    assert "The first 2 images are shown of 1,234; 1,232 more are in results.json" in cards([made()] * 2, 1234)
    assert "The first image is shown of 2; 1 more is in results.json" in cards([made()], 2)
    assert "results.json" not in cards([made()], 1)


def test_share_puts_values_on_a_line_from_0_to_100():
    assert 'cx="75.00"' in share(0.75, (0.5, 0.9), 0.25)
    assert 'class="interval" x="50.00" y="3.5" width="40.00"' in share(0.75, (0.5, 0.9), 0.25)
    assert 'class="chance" x="24.50"' in share(0.75, (0.5, 0.9), 0.25)
