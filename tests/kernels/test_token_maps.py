"""Token maps against the softmax written out."""

import pytest
import torch

from dsd_fast.kernels.common import attention, backend
from dsd_fast.kernels.token_maps import token_maps


@pytest.mark.parametrize("chunk", [1 << 20, 50])
def test_maps_equal_the_softmax_averaged_over_heads(monkeypatch, chunk):
    monkeypatch.setitem(attention.CHUNK_ELEMENTS, "cpu", chunk)
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, 6, 8, generator=g, dtype=torch.float64).requires_grad_() for n in (3, 2))
    index, length = torch.tensor([1, 0, 1]), torch.tensor([4, 6])
    bias = torch.randn(2, 6, generator=g, dtype=torch.float64)
    tokens = torch.tensor([[0, 3], [2, 2], [5, 1]])
    got = token_maps(q, k, tokens, index, length, bias, heads=2, scale=0.5)
    split = [x.reshape(3, 6, 2, 4).transpose(1, 2) for x in (q, k[index])]
    logits = split[0] @ split[1].transpose(-1, -2) * 0.5 + bias[index][:, None, None]
    logits = logits.masked_fill((torch.arange(6) >= length[index][:, None])[:, None, None], float("-inf"))
    p = torch.softmax(logits, -1).mean(1)
    want = p.gather(-1, tokens[:, None, :].expand(-1, 6, -1)).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    for mine, true in zip(
        torch.autograd.grad(got.square().sum(), (q, k)), torch.autograd.grad(want.square().sum(), (q, k)), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-13)


def test_a_backend_it_does_not_have_is_an_error():
    index = torch.zeros(1, dtype=torch.int64)
    with backend.force("triton"), pytest.raises(ValueError, match="token_maps has no 'triton' implementation"):
        token_maps(torch.zeros(1, 5, 4), torch.zeros(1, 3, 4), index[None], index, None, None, heads=2, scale=1.0)


def test_no_rows_no_maps():
    none = torch.zeros(0, dtype=torch.int64)
    empty = token_maps(
        torch.zeros(0, 5, 4), torch.zeros(1, 3, 4), none.view(0, 2), none, None, None, heads=2, scale=1.0
    )
    assert empty.shape == (0, 2, 5)
