"""Images as prompts in the place of captions."""

import pytest
import torch

import dsd_fast as dsd
from dsd_fast import matching
from dsd_fast.engine import Engine, ImagePrompt
from dsd_fast.jobs import JobError, read_index
from dsd_fast.matching.score import PairScorer
from tests.engine.test_image_prompts import image_prompts, model

CAPTIONS = ["a dog", "a red cat on a dog"]


def pictures(count=2):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, 64, 64, generator=generator) for _ in range(count)]


def of_texts(of, texts):
    """Prompts whose states are those of texts: no vector, and all of the text's own."""
    states = of.encode_prompts(texts)
    width = states.states.shape[2]
    return ImagePrompt(
        torch.zeros(len(texts), width), states.states, states.lengths - 1, torch.arange(len(texts)), states.pooled, 1.0
    )


class Full(ImagePrompt):
    """With all states instead of the short form."""

    def states(self):
        return super().states().expanded()


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("sdxl", {"noise_weight": 0.5, "attention_weight": 0.3}),
        ("sd15", {"noise_weight": 0.0, "tokens": "real"}),
        ("sd15", {"official": True}),
    ],
)
def test_they_score_as_all_their_states_and_as_the_texts_that_they_equal(family, config):
    of = model(family)
    matcher = dsd.Matcher(of, dsd.MatchConfig(timesteps=2, **config))
    prompts = image_prompts(of, 2)
    with torch.no_grad():
        texts = of_texts(of, CAPTIONS)
    scores = matcher.score(pictures(), prompts)
    assert scores.shape == (2, 2)
    close(scores, matcher.score(pictures(), Full(**{name: vars(prompts)[name] for name in prompts.__match_args__})))
    expected = matcher.score(pictures(), CAPTIONS)
    if config.get("tokens") != "real":
        # Padding of an image as a prompt is real.
        close(matcher.score(pictures(), texts), expected)
    mixed = matcher.score(pictures(), [CAPTIONS[0], prompts[1], CAPTIONS[1], prompts[0]])
    close(mixed, torch.stack([expected[:, 0], scores[:, 1], expected[:, 1], scores[:, 0]], dim=1))
    close(
        matcher.predict([(pictures()[0], prompts[1]), (pictures()[1], "a dog"), (pictures()[0], prompts[1])]),
        torch.stack([scores[0, 1], expected[1, 0], scores[0, 1]]),
    )


def test_they_are_ranked_for_an_image_and_rank_images():
    of = model("sd15")
    matcher = dsd.Matcher(of, dsd.MatchConfig(timesteps=2))
    prompts = image_prompts(of)
    scores = matcher.score(pictures(), prompts)
    ranked = matcher.rank(image=pictures()[0], texts=prompts)
    assert [each["corpus_id"] for each in ranked] == scores[0].argsort(descending=True).tolist()
    ranked = matcher.rank(text=prompts[1], images=pictures())
    assert [each["corpus_id"] for each in ranked] == scores[:, 1].argsort(descending=True).tolist()
    with pytest.raises(ValueError, match="prompts: got ImagePrompt"):
        matcher.score(pictures(), ["a dog", prompts])
    with pytest.raises(ValueError, match="captions: expected a sequence of strings, or of images as prompts"):
        matcher.score(pictures(), [3])
    with pytest.raises(ValueError, match="captions: got none"):
        matcher.score(pictures(), prompts[:0])
    with pytest.raises(ValueError, match="expected a str"):
        matcher.fit([(pictures()[0], list(prompts[:2]), 0)])


def test_learned_vectors_follow_them():
    of = model("sd15")
    config = dsd.MatchConfig(timesteps=2, tokens="real")
    vectors = image_prompts(of, 2, seed=3).vectors
    scorer = PairScorer(Engine(of, image_size=config.image_size), config, vectors)
    prompts = image_prompts(of, 2)
    every = torch.tensor([0, 1])
    latents = scorer.engine.encode_images(pictures())
    got = scorer.score(latents, scorer.encode_texts([*prompts, "a dog"]), every, every)
    states = scorer.texts(prompts.states().expanded(), scorer.engine.encode_prompts(None))
    expected = scorer.score(latents, states, every, every)
    close(got, expected)
    close(scorer.score(latents, scorer.encode_texts(prompts), every, every), expected)


def test_a_folder_of_scores_knows_them_by_their_content(tmp_path):
    of = model("sd15")
    matcher = dsd.Matcher(of, dsd.MatchConfig(timesteps=1))
    prompts = image_prompts(of, 2)
    matching.score_to(matcher, tmp_path, pictures(), [*prompts, "a dog"])
    rows = read_index(tmp_path).to_pylist()
    close(torch.tensor([row["scores"] for row in rows]), matcher.score(pictures(), [*prompts, "a dog"]))
    same = image_prompts(of, 2, names=("x", "y"))
    assert matching.score_to(matcher, tmp_path, pictures(), [*same, "a dog"]).counts.done == 2
    with pytest.raises(JobError, match="captions"):
        matching.score_to(matcher, tmp_path, pictures(), [*image_prompts(of, 2, seed=1), "a dog"])
    many = tmp_path / "many"
    matching.score_to(matcher, many, pictures(1), image_prompts(of, 20))
    with pytest.raises(JobError, match="captions"):
        matching.score_to(matcher, many, pictures(1), image_prompts(of, 20, seed=1))
