"""Words, phrases and ranges of a caption, and the tokens that stand for them."""

import itertools

import pytest
import torch

import dsd_fast as dsd
from dsd_fast.matching.words import find_spans, positions, words
from dsd_fast.models.offsets import token_offsets
from dsd_fast.reference import heatmaps as reference
from tests.tiny import tiny_pipeline


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a small red circle", ["a", "small", "red", "circle"]),
        ("  A  red\tcircle,\nleft of (a) BLUE square! ", ["A", "red", "circle", "left", "of", "a", "BLUE", "square"]),
        ("it's a red-brown dog’s 3.5 m -- 'toy'...", ["it's", "a", "red-brown", "dog’s", "3.5", "m", "toy"]),
        ("café cafe\u0301 İstanbul 熊と猫 🐻", ["café", "cafe\u0301", "İstanbul", "熊と猫", "🐻"]),
        ("a <cat>_1 <cat-toy>", ["a", "<cat>_1", "<cat-toy>"]),
        ("\u202eאדום עיגול\u200f \u200f a\u200db", ["אדום", "עיגול", "a\u200db"]),
        ("a\x1b[2J red\x00circle", ["a", "2J", "red", "circle"]),
        ("-a- '", ["a"]),
        ("", []),
        (" .,;!? \u200b \u0301", []),
    ],
)
def test_words(caption, expected):
    found = words(caption)
    assert [caption[start:end] for start, end in found] == expected
    assert found == sorted(set(found))
    # The reference says the same in another way.
    assert reference._words(caption) == found


def test_phrases_are_found_wherever_they_stand_as_whole_words():
    caption = "A red circle above a small RED  circle, not red-hot: a_b"
    assert find_spans(caption, ["a"]) == [(0, 1), (19, 20), (53, 54)]
    assert find_spans(caption, ["red circle"]) == [(2, 12), (27, 38)]
    assert find_spans(caption, ["small", (2, 5), "A red"]) == [(21, 26), (2, 5), (0, 5)]
    # A part of a joined word is a word of its own, a part of a plain one is not.
    assert find_spans(caption, ["hot"]) == [(48, 51)]
    assert find_spans("(a+b)* .", ["(a+b)*"]) == [(0, 6)]


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        (["blue"], "'blue' is not in the caption 'a red circle' as whole words"),
        (["circ"], "'circ' is not in"),
        ([""], "'' is not in"),
        ([" "], "' ' is not in"),
        ("red", "spans: got 'red', expected at least one"),
        ([], r"spans: got \[\], expected at least one"),
        ([(0, 13)], r"got \(0, 13\), expected \(start, end\) with 0 <= start < end <= 12"),
        ([(3, 3)], "expected .start, end."),
        ([(-1, 3)], "expected .start, end."),
        ([(0.0, 3.0)], "expected .start, end."),
        ([(1, 2, 3)], "expected .start, end."),
    ],
)
def test_bad_spans_are_named(spans, message):
    with pytest.raises(ValueError, match=message):
        find_spans("a red circle", spans)


CAPTIONS = [
    "a small red circle",
    "  A  Small RED-circle,\tleft of\na blue square's ring!",
    "café cafe\u0301 ÉCLAIR 🐻 İstanbul ﬁne ½",
    "tap\u200bx 熊",
    "",
    "!!! !",
]


@pytest.mark.parametrize(
    ("source", "caption"),
    # The mini model's prompts end at 24 tokens.
    [*itertools.product(["sd15", "sd21", "sdxl"], CAPTIONS), ("mini", CAPTIONS[0]), ("mini", "A  Red-brown É 🐻 a, b")],
)
def test_offsets_are_those_of_the_encoded_tokens(source, caption):
    model = dsd.load("mini") if source == "mini" else dsd.from_pipeline(tiny_pipeline(source))
    limit = 24 if source == "mini" else 77
    offsets = token_offsets(model.tokenizers, caption, limit)
    states = model.encode_prompts([caption])
    length = int(states.lengths[0])
    assert len(offsets) == limit
    # Begin, end and padding have no characters; "!" is SD 2.x's padding and a token like any other in a text.
    assert [i for i, own in enumerate(offsets) if own is None] == [0, *range(length - 1, limit)]
    tokenizer = model.tokenizers[0]
    used = states.token_ids[0, 1 : length - 1].tolist()
    # Each word by itself becomes the very tokens that the offsets give it.
    place = 0
    for start, end in words(caption):
        alone = tokenizer(caption[start:end])["input_ids"][1:-1]
        found = positions((start, end), offsets)
        assert [used[i - 1] for i in found] == alone
        assert found == list(range(found[0], found[0] + len(alone)))
        assert found[0] > place
        place = found[-1]


def test_a_learned_token_of_several_vectors_is_one_word():
    pipe = tiny_pipeline("sd15")
    pipe.load_textual_inversion({"<bird>": torch.randn(3, 24)})
    tokenizers, caption = [pipe.tokenizer], "a <bird> and a <bird>"
    offsets = token_offsets(tokenizers, caption, 77)
    model = dsd.from_pipeline(pipe)
    ids = model.encode_prompts([caption]).token_ids[0].tolist()
    for span in find_spans(caption, ["<bird>"]):
        names = pipe.tokenizer.convert_ids_to_tokens([ids[i] for i in positions(span, offsets)])
        assert names == ["<bird>", "<bird>_1", "<bird>_2"]
    with pytest.raises(ValueError, match="characters are unknown"):
        token_offsets(tokenizers, "a <bird> <bird>_1", 77)


def test_tokenizers_that_do_not_tell_or_do_not_agree():
    pipe = tiny_pipeline("sdxl")
    pipe.tokenizer_2.add_tokens(["reddog"])
    with pytest.raises(ValueError, match="the model's tokenizers split 'a reddog' differently"):
        token_offsets([pipe.tokenizer, pipe.tokenizer_2], "a reddog", 77)
    assert token_offsets([pipe.tokenizer, pipe.tokenizer_2], "a dog", 77)[1] == (0, 1)

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="tokenizer: Slow does not tell"):
        token_offsets([Slow()], "a", 77)
