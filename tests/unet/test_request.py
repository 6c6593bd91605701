"""A request checked once: what its micro-batches are given."""

import pytest
import torch

from dsd_fast.unet.request import Request
from tests.unet.compiled import SCORE, TOKENS, Case

HOST = torch.device("cpu")


@pytest.fixture
def case():
    return Case("sdxl")


def whole(case, plan, **change):
    asked = case.request() | {"map_tokens": torch.arange(10).view(5, 2) % TOKENS, "residuals": None} | change
    text = plan.encode_text(asked.pop("states"), **asked.pop("text"))
    names = ("latent_index", "text_index", "timestep_cond", "time_ids", "residuals", "map_tokens")
    rows = [asked.get(name) for name in names]
    return Request(plan, asked["latents"], asked["timesteps"], text, *rows, device=HOST), asked, text


def test_rows_are_taken_with_the_latents_that_they_use(case):
    name = case.program.score_ids[0]
    plan = case.program.plan(maps=[name])
    latents = torch.randn(3, 4, 16, 16)
    residual = torch.arange(5.0).view(5, 1, 1, 1)
    shapes = case.program.residual_shapes(16, 16)
    *down, mid = (residual.expand(5, *shape) for shape in shapes)
    with torch.no_grad():
        request, asked, text = whole(
            case,
            plan,
            latents=latents,
            timesteps=[10, 20, 30],
            time_ids=torch.arange(18.0).view(3, 6),
            latent_index=[2, 0, 2, 1, 2],
            residuals=(down, mid),
        )
    part = request.take(torch.tensor([4, 1]), HOST)
    assert part.rows == 2
    assert torch.equal(part.latents, latents[[0, 2]])
    assert part.latents.is_contiguous(memory_format=torch.channels_last)
    assert part.times.tolist() == [10, 30]
    assert part.time_ids.tolist() == [[0, 1, 2, 3, 4, 5], [12, 13, 14, 15, 16, 17]]
    assert part.index.latent.tolist() == [1, 0]
    assert part.index.text.tolist() == asked["text_index"][[4, 1]].tolist()
    assert part.index.tokens.tolist() == [[8, 9], [2, 3]]
    assert [value[:, 0, 0, 0].tolist() for value in part.every_residual] == [[4, 1]] * len(shapes)
    assert part.text is request.text
    assert part.text.k[name] is text.k[name]
    # The whole is as it was.
    assert (request.rows, request.index.latent.tolist()) == (5, [2, 0, 2, 1, 2])
    assert torch.equal(request.latents, latents)


def test_without_indices_row_b_is_latent_b_with_text_b():
    case = Case("sd15")
    plan = case.program.plan(scores=[SCORE])
    with torch.no_grad():
        text = plan.encode_text(case.request()["states"])
        request = Request(plan, torch.randn(3, 4, 16, 16), 5, text, *[None] * 6, device=HOST)
    part = request.take(torch.tensor([1, 2]), HOST)
    assert torch.equal(part.latents, request.latents[1:])
    assert (part.index.latent.tolist(), part.index.text.tolist(), part.index.tokens) == ([0, 1], [1, 2], None)
    assert request.index == (None, None, None)
