"""Scores of many images in a folder: what lies there, what is made again, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

import dsd_fast as dsd
from dsd_fast.jobs import Counts, ManifestError, file_digest, read_index, read_manifest, row_id
from dsd_fast.matching import score_to
from tests.jobs.numbers import files
from tests.tiny import tiny_pipeline

CAPTIONS = ["a red dog", "a cat", "the ball"]
TIMES = [901]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd15")


@pytest.fixture(scope="module")
def matcher(pipe):
    return matcher_of(pipe)


def matcher_of(pipe, **settings):
    return dsd.Matcher(dsd.from_pipeline(pipe), dsd.MatchConfig(**{"timesteps": TIMES, "seed": 5, **settings}))


@pytest.fixture
def pictures(tmp_path):
    """Six images in files, of which the fourth is damaged."""
    draw = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    paths = [tmp_path / "pictures" / f"p{number}.png" for number in range(6)]
    for number, path in enumerate(paths):
        Image.fromarray(draw.integers(0, 256, (40 + number, 64, 3), np.uint8)).save(path)
    paths[3].write_bytes(paths[3].read_bytes()[:100])
    return paths


def scores_of(folder):
    """Name → scores, from the index."""
    return {row["name"]: row["scores"] for row in read_index(folder).to_pylist() if row["status"] == "ok"}


def test_a_row_is_an_image_with_its_scores(matcher, pictures, tmp_path):
    seen, told = [], []
    given = [*pictures, pictures[0]]
    done = score_to(matcher, tmp_path / "out", given, CAPTIONS, shard_rows=2, seen=seen.append, progress=told.append)
    assert done.counts == Counts(inputs=7, ok=5, errors=1, duplicates=1)
    rows = read_index(tmp_path / "out").to_pylist()
    assert [row["name"] for row in rows] == [path.stem for path in pictures]
    assert seen == [*(row["id"] for row in rows), rows[0]["id"]]
    assert told == sorted(told)
    assert told[-1] == 7
    good = [path for path in pictures if path != pictures[3]]
    expected = dict(zip([path.stem for path in good], matcher.score(good, CAPTIONS), strict=True))
    for number, (row, path) in enumerate(zip(rows, pictures, strict=True)):
        assert row["id"] == row_id(file_digest(path), "", "5", path.stem)
        assert (row["path"], row["height"], row["width"]) == (str(path), 40 + number, 64)
        assert row["shard"] == rows[number // 2 * 2]["shard"]
        if number == 3:
            assert (row["status"], row["reason"], row["scores"]) == ("error", "truncated", None)
        else:
            # Batches of other sizes.
            torch.testing.assert_close(torch.tensor(row["scores"]), expected[row["name"]], rtol=1e-5, atol=1e-5)
    assert str(read_index(tmp_path / "out").schema.field("scores").type.value_type) == "float"
    assert read_manifest(tmp_path / "out")["settings"]["captions"] == CAPTIONS


def test_what_was_stopped_goes_on_to_the_same_bytes(matcher, pictures, tmp_path, monkeypatch):
    run = {"captions": CAPTIONS, "shard_rows": 2}
    score_to(matcher, tmp_path / "whole", pictures, **run)
    scores = dsd.Matcher._scores

    def stopped(self, *arguments, **options):
        for number, row in scores(self, *arguments, **options):
            if number == 5:
                raise KeyboardInterrupt
            yield number, row

    with monkeypatch.context() as patch:
        patch.setattr(dsd.Matcher, "_scores", stopped)
        with pytest.raises(KeyboardInterrupt):
            score_to(matcher, tmp_path / "out", pictures, **run)
    assert len(read_index(tmp_path / "out")) == 4
    done = score_to(matcher, tmp_path / "out", pictures, **run)
    assert done.counts == Counts(inputs=6, ok=2, done=4, done_errors=1)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert score_to(matcher, tmp_path / "out", pictures, **run).counts == Counts(inputs=6, done=6, done_errors=1)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_what_ends_early_keeps_what_has_been_computed(matcher, pictures, tmp_path):
    def first(parts):
        for _ in range(3):
            yield next(parts)

    done = score_to(matcher, tmp_path / "out", pictures, CAPTIONS, until=first)
    assert done.counts.ok == len(read_index(tmp_path / "out")) == 3
    assert score_to(matcher, tmp_path / "out", pictures, CAPTIONS).counts.ok == 2


def test_workers_make_what_one_makes(matcher, pictures, tmp_path):
    score_to(matcher, tmp_path / "one", pictures, CAPTIONS)
    counts = [
        score_to(matcher, tmp_path / "two", pictures, CAPTIONS, worker=worker, workers=2).counts for worker in (0, 1)
    ]
    assert [each.inputs + each.elsewhere for each in counts] == [6, 6]
    assert sum(each.inputs for each in counts) == 6
    one, two = scores_of(tmp_path / "one"), scores_of(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, scores in one.items():
        torch.testing.assert_close(torch.tensor(two[name]), torch.tensor(scores), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "captions", "named"),
    [
        ({"seed": 6}, CAPTIONS, "seed 5 there, 6 now"),
        ({"timesteps": [900]}, CAPTIONS, r"timesteps \[901\] there, \[900\] now"),
        ({"pool": "max"}, CAPTIONS, 'pool "mean" there, "max" now'),
        ({}, CAPTIONS[:2], r'captions \["a red dog", "a cat", "the ball"\] there, \["a red dog", "a cat"\] now'),
        ({}, [f"{CAPTIONS[0]} {number}" for number in range(17)], "captions.count not set there, 17 now"),
    ],
)
def test_other_scores_are_refused_by_name(pipe, matcher, pictures, tmp_path, changes, captions, named):
    score_to(matcher, tmp_path, pictures[:1], CAPTIONS)
    before = files(tmp_path)
    with pytest.raises(ManifestError, match=named):
        score_to(matcher_of(pipe, **changes), tmp_path, pictures, captions)
    assert files(tmp_path) == before


def test_what_changes_no_score_is_no_setting(pipe, matcher, pictures, tmp_path):
    score_to(matcher, tmp_path, pictures[:1], CAPTIONS)
    other = matcher_of(pipe, memory_budget=64 << 20)
    assert score_to(other, tmp_path, pictures[:2], CAPTIONS, shard_rows=1).counts == Counts(inputs=2, ok=1, done=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"captions": ["a word " * 99]}, r"prompts\[0\]"),
        ({"captions": []}, "captions: got none, expected at least one"),
        ({"shard_rows": 0}, "shard_rows: got 0, expected at least 1"),
        ({"names": ["a"]}, "names: got 1 for 6 images, expected one each"),
    ],
)
def test_what_does_not_fit_is_refused_before_there_is_a_folder(matcher, pictures, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        score_to(matcher, tmp_path / "out", pictures, **{"captions": CAPTIONS, **arguments})
    assert not (tmp_path / "out").exists()


def test_a_budget_that_holds_no_row_is_refused_before_there_is_a_folder(pipe, pictures, tmp_path):
    with pytest.raises(ValueError, match="memory_budget: 1,000 bytes cannot hold"):
        score_to(matcher_of(pipe, memory_budget=1000), tmp_path / "out", pictures, CAPTIONS)
    assert not (tmp_path / "out").exists()
