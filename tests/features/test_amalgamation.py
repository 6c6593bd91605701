import pytest
import torch
import torch.nn.functional as F

from dsd_fast.features.amalgamation import Amalgamation, add_loss_terms, loss_terms

EVERY = pytest.mark.parametrize("kind", ["conv", "pixel"]), pytest.mark.parametrize("weights", ["map", "channel"])


def every_kind(function):
    for mark in EVERY:
        function = mark(function)
    return function


def maps(*channels, batch=3, side=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, each, side, side, generator=generator) for each in channels]


def amalgamation(*args, seed=0, **settings):
    torch.manual_seed(seed)
    return Amalgamation(*args, **settings).eval()


@every_kind
def test_weights_sum_to_one_and_the_feature_is_their_sum(kind, weights):
    given, attention = maps(6, 6, 6), maps(4, seed=1)[0]
    features, found = amalgamation([6, 6, 6], 2, kind=kind, weights=weights).amalgamate(given, attention)
    assert found.shape == (3, 2, 3, 6 if weights == "channel" else 1, *((5, 5) if kind == "pixel" else (1, 1)))
    # Three probabilities rounded to 6e-8 each.
    torch.testing.assert_close(found.sum(2), torch.ones_like(found[:, :, 0]), rtol=0, atol=4e-7)
    assert found.std() > 1e-3
    expected = [sum(found[:, j, i] * given[i] for i in range(3)) for j in range(2)]
    assert features.shape == (3, 2 * 6 + 4, 5, 5)
    torch.testing.assert_close(features[:, :12], torch.cat(expected, 1))
    assert torch.equal(features[:, 12:], attention)


@every_kind
@pytest.mark.parametrize("training", [False, True])
def test_equal_maps_are_returned_unchanged(kind, weights, training):
    given = maps(6)[0]
    mixer = amalgamation([6] * 4, 3, kind=kind, weights=weights, projection="conv").train(training)
    # Four products with weights whose sum is 1 to 4e-7.
    torch.testing.assert_close(mixer([given] * 4), torch.cat([given] * 3, 1), rtol=1e-6, atol=1e-6)


@every_kind
def test_gradients_reach_every_assigner_and_map(kind, weights):
    given = [each.requires_grad_() for each in maps(6, 4, 6)]
    mixer = amalgamation([6, 4, 6], 3, kind=kind, weights=weights, projection="conv").train()
    features = mixer(given)
    (features * torch.randn(features.shape)).sum().backward()
    # The last bias of an assigner adds the same to the logits of all maps, which softmax does not see.
    last = ".6.bias" if kind == "conv" else ".4.bias"
    for name, value in mixer.named_parameters():
        assert name.endswith(last) or value.grad.abs().max() > 1e-3, name
    assert all(each.grad.any() for each in given)


def test_the_terms_are_those_of_the_paper():
    # Two rows, two assigners, three maps.
    weights = torch.tensor(
        [[[0.6, 0.0, 0.8], [0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]], dtype=torch.float64
    )
    apart = (0.36 + 1 + 0.64) ** 0.5
    for shaped in (weights, weights[..., None, None, None], weights[..., None, None, None].expand(2, 2, 3, 5, 4, 4)):
        # Sparsity: 1 + 1 in both rows. Diversity: both orders of the pair, halved, in the first row; 0 in the second.
        assert loss_terms(shaped, sparsity=0.5).item() == pytest.approx(-0.5 * 2)
        assert loss_terms(shaped, diversity=0.5).item() == pytest.approx(-0.5 * apart / 2)
    both = loss_terms(weights, sparsity=0.5, diversity=0.25).item()
    assert both == pytest.approx(-1 - 0.25 * apart / 2)
    assert loss_terms(weights).item() == 0


def test_equal_assigners_have_finite_gradients():
    weights = torch.full((1, 2, 2), 0.5, requires_grad=True)
    loss_terms(weights, sparsity=1.0, diversity=1.0).backward()
    assert weights.grad.isfinite().all()


@every_kind
def test_diversity_pushes_assigners_apart_and_sparsity_chooses(kind, weights):
    given = maps(6, 6, 6)

    def trained(**factors):
        mixer = amalgamation([6, 6, 6], 2, kind=kind, weights=weights, dropout=0)
        optimizer = torch.optim.Adam(mixer.parameters(), 1e-2)
        for _ in range(15):
            optimizer.zero_grad()
            result = mixer.amalgamate(given)
            add_loss_terms(result.features.square().mean(), result, **factors).backward()
            optimizer.step()
        found = mixer.amalgamate(given).weights
        return (found[:, 0] - found[:, 1]).norm(dim=1).mean(), found.norm(dim=2).mean()

    task, diverse, sparse = trained(), trained(diversity=10.0), trained(sparsity=10.0)
    # The distance of two distributions is at most sqrt 2, the norm of one at most 1 and at least sqrt 1/3.
    assert diverse[0] > task[0] + 0.3
    assert sparse[1] > task[1] + 0.15


@every_kind
def test_a_saved_one_computes_the_same(kind, weights, tmp_path):
    given, attention = maps(6, 4, 8), maps(2)[0]
    mixer = amalgamation([6, 4, 8], 2, kind=kind, weights=weights, width=5, projection="conv").train()
    mixer(given)
    mixer.eval().save(tmp_path / "mixer.safetensors")
    state = torch.get_rng_state()
    loaded = Amalgamation.load(tmp_path / "mixer.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loaded(given, attention), mixer(given, attention))
    assert torch.equal(loaded(given, attention), loaded(given, attention))
    assert all(each.requires_grad for each in loaded.parameters())


def test_its_type_is_saved(tmp_path):
    mixer = amalgamation([6, 6]).double()
    mixer.save(tmp_path / "mixer.safetensors")
    given = maps(6, 6)
    assert torch.equal(Amalgamation.load(tmp_path / "mixer.safetensors")(given), mixer(given))
    assert mixer([each.half() for each in given]).dtype == torch.float64


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(ValueError, match="missing"):
        Amalgamation.load(tmp_path / "none")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="no safetensors file"):
        Amalgamation.load(tmp_path / "text")
    save_file({"a": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="expected one that Amalgamation"):
        Amalgamation.load(tmp_path / "other")
    about = '{"kind": "amalgamation", "format": 1, "config": {"channels": [3]}}'
    save_file({"a": torch.ones(1)}, tmp_path / "torn", {"about": about})
    with pytest.raises(ValueError, match="not written by Amalgamation"):
        Amalgamation.load(tmp_path / "torn")


def test_one_convolutional_assigner_per_channel_is_the_official_arithmetic():
    given = maps(6, 6, 6)
    mixer = amalgamation([6, 6, 6], kind="conv", weights="channel")
    own = mixer.assigners[0]
    own[2].running_mean.uniform_(-1, 1)
    own[2].running_var.uniform_(0.5, 2)
    logits = []
    for each in given:
        inner = F.conv2d(each, own[0].weight, padding=1).relu()
        inner = (inner - own[2].running_mean[:, None, None]) / (own[2].running_var[:, None, None] + 1e-5).sqrt()
        logits.append(inner.mean((2, 3)) @ own[6].weight.T + own[6].bias)
    weights = torch.stack(logits).softmax(0)
    expected = (weights[..., None, None] * torch.stack(given)).sum(0)
    # Float32: some 128 products in another order, at most 1e-5 of the logits and so of the weights.
    torch.testing.assert_close(mixer(given), expected, rtol=1e-5, atol=1e-5)


def test_one_pixel_assigner_per_channel_is_the_official_arithmetic():
    given = maps(6, 6)
    mixer = amalgamation([6, 6], kind="pixel", weights="channel")
    first, _, norm, _, second = mixer.assigners[0]
    norm.running_mean.uniform_(-1, 1)
    rows = torch.stack([each.permute(0, 2, 3, 1).reshape(-1, 6) for each in given])
    inner = (rows @ first.weight[:, :, 0, 0].T + first.bias).relu()
    inner = (inner - norm.running_mean) / (norm.running_var + 1e-5).sqrt()
    weights = (inner @ second.weight[:, :, 0, 0].T + second.bias).softmax(0)
    expected = (weights * rows).sum(0)
    torch.testing.assert_close(mixer(given).permute(0, 2, 3, 1).reshape(-1, 6), expected, rtol=1e-5, atol=1e-5)
    # Positions alone, in training, have the batch statistics of positions in images.
    mixer = amalgamation([6, 6], kind="pixel", dropout=0).train()
    alone = mixer([each[..., None, None] for each in rows])[..., 0, 0]
    torch.testing.assert_close(alone, mixer(given).permute(0, 2, 3, 1).reshape(-1, 6), rtol=1e-5, atol=1e-5)


def test_maps_of_other_sizes_and_widths_are_brought_to_one():
    small, large = maps(4, side=3)[0], maps(6, side=9)[0]
    mixer = amalgamation([(4, 3, 3), (6, 9, 9)])
    features, weights = mixer.amalgamate([small, large], small)
    enlarged = F.interpolate(small, (9, 9), mode="bilinear")
    rows = enlarged.permute(0, 2, 3, 1).reshape(-1, 1, 4)
    wide = F.interpolate(rows, size=6, mode="linear").reshape(3, 9, 9, 6).permute(0, 3, 1, 2)
    torch.testing.assert_close(features[:, :6], weights[:, 0, 0] * wide + weights[:, 0, 1] * large)
    assert torch.equal(features[:, 6:], enlarged)
    assert mixer.amalgamate([small, large], size=(2, 4)).features.shape == (3, 6, 2, 4)
    learned = amalgamation([4, 6], width=6, projection="conv")
    assert {name for name, _ in learned.projections.named_parameters()} == {"0.weight", "0.bias"}


def test_bad_input_is_named():
    given = maps(6, 6)
    mixer = amalgamation([6, 6])
    cases = [
        (lambda: Amalgamation([]), "channels: got"),
        (lambda: Amalgamation([0]), "channels: got"),
        (lambda: Amalgamation([6], 0), "assigners: got 0"),
        (lambda: Amalgamation([6], width=0), "width: got 0"),
        (lambda: Amalgamation([6], dropout=1), "dropout: got 1"),
        (lambda: Amalgamation([6], kind="linear"), "kind: got 'linear', expected 'conv' or 'pixel'"),
        (lambda: Amalgamation([6], weights="all"), "weights: got 'all'"),
        (lambda: Amalgamation([6], projection="pca"), "projection: got 'pca'"),
        (lambda: mixer(given[:1]), r"maps: got shapes .* C = \(6, 6\)"),
        (lambda: mixer([given[0], given[1][0]]), "maps: got shapes"),
        (lambda: mixer([given[0], given[1][:2]]), "with one B"),
        (lambda: mixer(given, given[0][:2]), "with one B"),
        (lambda: mixer(given, given[0][..., 0]), "with one B"),
        (lambda: loss_terms(torch.ones(2, 2)), "weights: got shape"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
