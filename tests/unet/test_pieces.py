"""The memory-bound pieces as operators: the same numbers, and only where the modules are what they seem."""

import pytest
import torch
from torch.autograd import forward_ad

from dsd_fast.kernels.common import backend, elementwise
from dsd_fast.unet import UNetProgram, pieces
from dsd_fast.unet.inductor import Inductor
from tests.tiny import CROSS_ATTENTION_DIM, FAMILIES, POOLED_DIM, save_tiny_lora, tiny_pipeline, tiny_unet

OPERATORS = ("group_norm_silu", "geglu", "add_layer_norm")


@pytest.fixture
def operators(monkeypatch):
    """Takes the operators, as on a GPU; and what they were asked."""
    called = []
    monkeypatch.setattr(pieces, "INTERPRETED", True)
    for name in OPERATORS:
        operator = getattr(pieces, name)

        def counted(*args, name=name, operator=operator, **kwargs):
            called.append(name)
            return operator(*args, **kwargs)

        monkeypatch.setattr(pieces, name, counted)
    return called


def run(family, unet):
    g = torch.Generator().manual_seed(0)
    program = UNetProgram(unet)
    plan = program.plan(
        features=["up-level0-repeat0-res-increment", *[x for x in program.layer_ids if "mid-vit-block0" in x]],
        scores=program.score_ids[::3],
        noise_pred=True,
    )
    xl = family == "sdxl"
    with torch.no_grad():
        text = plan.encode_text(
            torch.randn(3, 7, CROSS_ATTENTION_DIM[family], generator=g),
            pooled=torch.randn(3, POOLED_DIM, generator=g) if xl else None,
        )
        return plan.run(
            torch.randn(2, 4, 16, 16, generator=g),
            [17, 800],
            text,
            latent_index=[0, 1, 1],
            text_index=[2, 0, 1],
            time_ids=torch.ones(6) if xl else None,
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_operators_give_the_modules_numbers(family, request):
    unet = tiny_unet(family)
    want = run(family, unet)
    called = request.getfixturevalue("operators")
    got = run(family, unet)
    for (name, a), (_, b) in zip(got.tensors(), want.tensors(), strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max()), name
    norms = [m for m in unet.modules() if isinstance(m, torch.nn.GroupNorm)]
    blocks = [m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    # A block's first norm has nothing to add.
    assert {name: called.count(name) for name in OPERATORS} == {
        "group_norm_silu": len(norms),
        "geglu": len(blocks),
        "add_layer_norm": 2 * len(blocks),
    }
    assert backend.last("group_norm_silu") == "reference"


def test_modules_with_hooks_or_of_other_classes_are_called(operators):
    unet = tiny_unet("sd15")
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    resnet = unet.mid_block.resnets[0]
    seen = []
    for module in (block.norm2, block.ff.net[0], resnet.norm1):
        module.register_forward_hook(lambda m, args, out: seen.append(m))
    resnet.nonlinearity = torch.nn.ReLU()
    run("sd15", unet)
    whole = {name: operators.count(name) for name in OPERATORS}
    assert seen == [resnet.norm1, block.norm2, block.ff.net[0]]
    operators.clear()
    run("sd15", tiny_unet("sd15"))
    # Two GroupNorms: the one with a hook, and the one whose activation is another.
    assert {name: operators.count(name) - whole[name] for name in OPERATORS} == {
        "group_norm_silu": 2,
        "geglu": 1,
        "add_layer_norm": 1,
    }


class Doubling(torch.nn.Dropout):
    def forward(self, x):
        return 2 * x


def test_dropouts_that_do_more_than_torchs_are_called():
    unet = tiny_unet("sd15")
    resnet = unet.mid_block.resnets[0]
    want = run("sd15", unet).noise_pred
    seen = []
    handle = resnet.dropout.register_forward_hook(lambda m, args, out: seen.append(m))
    # With a hook anywhere all modules are called, and torch's own norm rounds elsewhere.
    torch.testing.assert_close(run("sd15", unet).noise_pred, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert seen == [resnet.dropout]
    handle.remove()
    weight = resnet.conv2.weight
    resnet.dropout = Doubling(0.0)
    doubled = run("sd15", unet).noise_pred
    resnet.dropout = torch.nn.Dropout(0.0)
    with torch.no_grad():
        weight.mul_(2)
    assert not torch.equal(doubled, want)
    assert torch.equal(doubled, run("sd15", unet).noise_pred)


def halved(self, x, *args):
    return torch.nn.functional.linear(x, 0.5 * self.weight, self.bias)


def taken_out(module):
    """A weight that is made anew at each call, as old weight normalisation leaves it, and no hook."""
    weight = module.weight.detach()
    del module._parameters["weight"]
    module.weight = 0.5 * weight


CHANGES = {
    "a forward of the class": lambda unet, patch: patch.setattr(torch.nn.Linear, "forward", halved),
    "padding of a convolution": lambda unet, patch: patch.setattr(unet.conv_in, "padding_mode", "circular"),
    "a convolution's own way": lambda unet, patch: patch.setattr(
        unet.conv_in,
        "_conv_forward",
        lambda x, weight, bias: torch.nn.functional.conv2d(x.roll(1, -1), weight, bias, padding=1),
        raising=False,
    ),
    "a weight taken out": lambda unet, patch: taken_out(unet.down_blocks[0].resnets[0].conv1),
    "a weight that is no parameter": lambda unet, patch: taken_out(unet.up_blocks[0].resnets[0].conv2),
    "a subclass": lambda unet, patch: patch.setattr(
        unet.conv_out, "__class__", type("Conv2d", (torch.nn.Conv2d,), {"forward": lambda self, x: 2 * x[:, :4]})
    ),
    "eps of a norm": lambda unet, patch: patch.setattr(unet.mid_block.resnets[0].norm2, "eps", 1.0),
    "no affine": lambda unet, patch: patch.setattr(
        unet, "conv_norm_out", torch.nn.GroupNorm(2, unet.conv_norm_out.num_channels, affine=False)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_leaf_modules_are_is_computed(change, monkeypatch):
    unet = tiny_unet("sd15")
    g = torch.Generator().manual_seed(0)
    latents, states = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 7, CROSS_ATTENTION_DIM["sd15"], generator=g)
    plan = UNetProgram(unet).plan(noise_pred=True)

    def both():
        with torch.no_grad():
            stock = unet(latents, torch.tensor([17, 800]), states).sample
            return plan.run(latents, [17, 800], plan.encode_text(states)).noise_pred, stock

    before, _ = both()
    CHANGES[change](unet, monkeypatch)
    got, want = both()
    assert float((want - before).abs().max()) > 1e-3 * float(want.abs().max())
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


def test_a_weight_taken_out_before_the_program_is_made_and_strided_weights_are_computed():
    unet = tiny_unet("sd15")
    taken_out(unet.up_blocks[0].resnets[0].conv2)
    norm = unet.mid_block.resnets[0].norm1
    norm.weight = torch.nn.Parameter(torch.randn(norm.num_channels, 2)[:, 0], requires_grad=False)
    g = torch.Generator().manual_seed(0)
    latents, states = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 7, CROSS_ATTENTION_DIM["sd15"], generator=g)
    plan = UNetProgram(unet).plan(noise_pred=True)
    with torch.no_grad():
        want = unet(latents, torch.tensor([17]), states).sample
        got = plan.run(latents, [17], plan.encode_text(states)).noise_pred
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


def test_tangents_of_forward_mode_are_not_dropped():
    unet = tiny_unet("sd15")
    plan = UNetProgram(unet).plan(features=["up-level0-repeat0-res-increment"])
    with torch.no_grad():
        text = plan.encode_text(torch.randn(1, 7, CROSS_ATTENTION_DIM["sd15"]))
    with torch.no_grad(), forward_ad.dual_level():
        latents = forward_ad.make_dual(torch.randn(1, 4, 8, 8), torch.ones(1, 4, 8, 8))
        # Torch's own norm has no such gradient in this layout.
        with pytest.raises(RuntimeError, match=r"view size is not compatible|forward"):
            plan.run(latents, 17, text)


@pytest.mark.parametrize(("backend_name", "native"), [("reference", False), ("cpu", True)])
def test_the_compiled_library_serves_where_no_gradient_is_wanted(backend_name, native, monkeypatch):
    if not elementwise.prefers_native("geglu"):
        pytest.skip("the CPU library is not built, or slower than torch on this processor")
    monkeypatch.setenv("DSD_FAST_BACKEND", backend_name)
    unet = tiny_unet("sd15")
    asked = []
    for name in ("native_norm", "native_gate"):
        function = getattr(pieces, name)

        def counted(*args, name=name, function=function):
            asked.append(name)
            return function(*args)

        monkeypatch.setattr(pieces, name, counted)
    run("sd15", unet)
    assert ("native_norm" in asked and "native_gate" in asked) is native
    asked.clear()
    plan = UNetProgram(unet).plan(noise_pred=True)
    text = plan.encode_text(torch.randn(1, 7, CROSS_ATTENTION_DIM["sd15"]).requires_grad_())
    plan.run(torch.randn(1, 4, 8, 8), 17, text).noise_pred.sum().backward()
    assert not asked


@pytest.mark.parametrize(
    ("name", "adapted"),
    [("self-q", False), ("self-v", False), ("cross-q", False), ("cross-q", True)],
    ids=lambda x: x if isinstance(x, str) else "with an adapter" if x else "plain",
)
def test_projections_of_self_attention_are_one_product_in_compiled_code(adapted, name, operators, tmp_path):
    pipe = tiny_pipeline("sd15")
    if adapted:
        file = save_tiny_lora("sd15", tmp_path, seed=1)
        pipe.load_lora_weights(file.parent, weight_name=file.name)
    program = UNetProgram(pipe.unet.requires_grad_(False))
    products = []

    def count(graph, inputs):
        products.extend(node for node in graph.graph.nodes if node.target is torch._C._nn.linear)
        return graph

    program.inductor = Inductor(count)
    name = f"down-level0-repeat0-vit-block0-{name}"
    plain, compiled = (program.plan(features=[name]) for _ in range(2))
    compiled.compile("inductor")
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    with torch.no_grad():
        want, got = (plan.run(latents, 5, None).features[name] for plan in (plain, compiled))
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
    # Three of the time embedding; an adapter has two products of its own beside each weight's.
    attention = {"self-q": 1, "self-v": 3, "cross-q": 5}[name.removeprefix("down-level0-repeat0-vit-block0-")]
    joined = {1: 1, 3: 1, 5: 3}[attention]
    assert len(products) == 3 + (3 * attention if adapted else joined)
