"""The reference on a GPU."""

import pytest
import torch


@pytest.mark.gpu
def test_score_on_a_gpu_equals_the_cpu(monkeypatch):
    pytest.importorskip("diffusers")
    from dsd_fast.reference import matching
    from tests.tiny import tiny_pipeline

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    images = list(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    pipe = tiny_pipeline("sd15")
    expected = matching.score(pipe, images, ["a red dog", "a cat"], timesteps=3)
    scores = matching.score(pipe.to("cuda"), images, ["a red dog", "a cat"], timesteps=3)
    assert scores.device.type == "cpu"
    # Differences of two norms of about 32, each off by at most 3e-5 on either side.
    torch.testing.assert_close(scores, expected, rtol=0, atol=1.2e-4)
