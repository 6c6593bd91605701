"""Scores of batches of columns."""

import numpy as np
import pytest

import dsd_fast as dsd
from dsd_fast.matching import MatchConfig, Matcher, ScoreBatch
from tests.engine.batches import encoded, objects, pictures


def test_a_batch_has_the_scores_of_its_pairs():
    model, images = dsd.load("mini"), pictures(3)
    # The first image twice as one object, under two captions; one that is cut short; a caption that is too long.
    content = [encoded(image) for image in images]
    captions = ["a red circle", "a blue square", "a red circle", "a red circle", "word " * 90]
    batch = {
        "image": objects([content[0], content[1], content[2][:-40], content[0], content[1]]),
        "caption": objects(captions),
        "key": np.arange(5),
    }
    found = ScoreBatch(model, timesteps=2)(batch)
    assert set(found) == {"caption", "key", "score", "error"}
    assert list(found["error"][[0, 1, 3]]) == ["", "", ""]
    assert found["error"][2] == "image 2 of the batch ends before its last pixel"
    assert found["error"][4].startswith("the prompt has")
    assert np.isnan(found["score"]).tolist() == [False, False, True, False, True]
    matcher = Matcher(model, MatchConfig(timesteps=2))
    alone = matcher.predict([(images[0], captions[0]), (images[1], captions[1])]).numpy()
    # A score is a mean of norms, whose parts agree to 1e-5 across sizes of batches.
    assert np.allclose(found["score"][[0, 1, 3]], alone[[0, 1, 0]], rtol=1e-5, atol=1e-5)
    nothing = ScoreBatch(model, timesteps=2)({"image": content[:1], "caption": ["word " * 90]})
    assert np.isnan(nothing["score"]).all()
    with pytest.raises(ValueError, match="batch: has no column 'caption', expected it among image"):
        ScoreBatch(model, timesteps=2)({"image": content[:1]})
