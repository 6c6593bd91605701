"""What the program would ignore or get wrong is refused by name, and bad arguments are named."""

import functools

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from dsd_fast.unet import UNetProgram, UnsupportedNetworkError
from dsd_fast.unet.shipped import is_shipped
from tests.tiny import CROSS_ATTENTION_DIM, tiny_pipeline, tiny_unet


class ForeignProcessor(AttnProcessor2_0):
    pass


def foreign(unet):
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(ForeignProcessor())


def freeu(unet):
    unet.enable_freeu(0.9, 0.2, 1.2, 1.4)


def hook(unet):
    unet.down_blocks[1].register_forward_hook(lambda m, a, o: o)


def offload(unet):
    add_hook_to_module(unet.conv_in, ModelHook())


def layerwise(unet):
    unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def quantised(unet):
    linear = unet.time_embedding.linear_1
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e5m2), requires_grad=False)


def other_forward(unet):
    block = unet.mid_block
    block.forward = type(block).forward.__get__(block)


ATTACHED = {
    other_forward: r"mid_block: another forward was put on",
    foreign: r"mid_block.attentions.0.transformer_blocks.0.attn2: an attention processor is set \(ForeignProcessor\)",
    freeu: r"up_blocks.0: FreeU is enabled",
    hook: r"down_blocks.1: a forward hook is registered",
}
BUILT_IN = {
    offload: r"conv_in: an offload hook of accelerate",
    layerwise: r"a hook of diffusers|quantised layers",
    quantised: r"time_embedding.linear_1: quantised layers .* found Linear with a Parameter of torch.float8",
}


@pytest.mark.parametrize("attach", [*ATTACHED, *BUILT_IN], ids=lambda f: f.__name__)
def test_refused_when_the_program_is_made(attach):
    unet = tiny_unet("sd15")
    attach(unet)
    with pytest.raises(UnsupportedNetworkError, match=(ATTACHED | BUILT_IN)[attach]):
        UNetProgram(unet)


@pytest.mark.parametrize("attach", ATTACHED, ids=lambda f: f.__name__)
def test_refused_when_it_is_attached_later(attach):
    unet = tiny_unet("sd15")
    program = UNetProgram(unet)
    plan = program.plan(noise_pred=True)
    text = plan.encode_text(torch.zeros(1, 3, CROSS_ATTENTION_DIM["sd15"]))
    attach(unet)
    for call in (
        lambda: program.plan(noise_pred=True),
        lambda: plan.encode_text(torch.zeros(1, 3, CROSS_ATTENTION_DIM["sd15"])),
        lambda: plan.run(torch.zeros(1, 4, 16, 16), 0, text),
        lambda: plan.stream(torch.zeros(1, 4, 16, 16), 0, text),
    ):
        with pytest.raises(UnsupportedNetworkError, match=ATTACHED[attach]):
            call()


BLOCK = "mid_block.attentions.0.transformer_blocks.0"


def halving(kind):
    """A class of the same name that gives half of what ``kind`` gives."""

    def forward(self, *args, **options):
        return kind.forward(self, *args, **options) / 2

    return type(kind.__name__, (kind,), {"forward": forward})


def swapped(patch, unet):
    patch.setattr(unet.get_submodule(BLOCK), "__class__", halving(BasicTransformerBlock))


def swapped_network(patch, unet):
    patch.setattr(unet, "__class__", halving(UNet2DConditionModel))


def other_method(kind, name):
    def patched(patch, unet):
        original = getattr(kind, name)

        # As careful as a decorator can be.
        @functools.wraps(original)
        def changed(*args, **options):
            return original(*args, **options)

        patch.setattr(kind, name, changed)

    return patched


def stock_name(patch, unet):
    kind = type("AttnProcessor2_0", (), {"__call__": AttnProcessor2_0.__call__})
    patch.setattr(unet.get_submodule(BLOCK).attn1, "processor", kind())


def hook_on_all(patch, unet):
    register_module_forward_hook(lambda m, args, out: None)


def backward_hook(patch, unet):
    unet.get_submodule(BLOCK).register_full_backward_hook(lambda m, grads, out: None)


def another_block(patch, unet):
    unet.mid_block.resnets[1] = halving(ResnetBlock2D)(in_channels=32, temb_channels=64, groups=8)


REPLACED = {
    swapped: rf"{BLOCK}: (.*BasicTransformerBlock has a forward|the module, or its class, was replaced)",
    swapped_network: "unet: (.*UNet2DConditionModel has a forward|the module, or its class, was replaced)",
    other_method(BasicTransformerBlock, "forward"): "BasicTransformerBlock has a forward .*that is not diffusers' own",
    other_method(UNet2DConditionModel, "get_time_embed"): "unet: .*UNet2DConditionModel has a get_time_embed",
    other_method(ResnetBlock2D, "__call__"): "ResnetBlock2D has a __call__",
    other_method(Attention, "get_attention_scores"): "Attention has a get_attention_scores",
    other_method(GEGLU, "forward"): "ff.net.0: .*GEGLU has a forward",
    other_method(SlicedAttnProcessor, "__call__"): "SlicedAttnProcessor has a __call__",
    stock_name: rf"{BLOCK}.attn1: an attention processor is set \(.*test_refusals.AttnProcessor2_0",
    hook_on_all: r"unet: a forward hook \(.*<lambda>\) is registered on all modules",
    backward_hook: f"{BLOCK}: a backward hook is registered",
    another_block: r"mid_block.resnets.1: (.*ResnetBlock2D has a forward|the module, or its class, was replaced)",
}


@pytest.mark.parametrize("replace", REPLACED, ids=REPLACED.values())
def test_what_is_not_diffusers_own_is_refused_whatever_its_name(replace, monkeypatch):
    unet = tiny_unet("sd15")
    plan = UNetProgram(unet).plan(noise_pred=True)
    text = plan.encode_text(STATES[:1])
    replace(monkeypatch, unet)
    try:
        with pytest.raises(UnsupportedNetworkError, match=REPLACED[replace]):
            plan.run(torch.zeros(1, 4, 16, 16), 0, text)
        with pytest.raises(UnsupportedNetworkError, match=REPLACED[replace]):
            UNetProgram(unet)
    finally:
        torch.nn.modules.module._global_forward_hooks.clear()


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        (f"{BLOCK}.attn2", "norm_q", nn.LayerNorm(4)),
        (f"{BLOCK}.attn1", "residual_connection", True),
        (BLOCK, "pos_embed", nn.Identity()),
        ("mid_block.resnets.0", "skip_time_act", True),
    ],
)
def test_a_part_that_the_configuration_does_not_tell_of_is_refused(part, key, value):
    unet = tiny_unet("sd15")
    setattr(unet.get_submodule(part), key, value)
    with pytest.raises(UnsupportedNetworkError, match=rf"{part}.{key}: .* is not supported, expected"):
        UNetProgram(unet)


def subclassed(kind):
    def change(unet):
        for module in unet.modules():
            if type(module) is kind:
                module.__class__ = halving(kind)

    return change


def without_forward(unet):
    unet.get_submodule(BLOCK).__class__ = type("Mine", (BasicTransformerBlock,), {"extra": 1})
    unet.__class__ = type("Mine", (UNet2DConditionModel,), {})


def activation(unet):
    unet.mid_block.resnets[0].nonlinearity = nn.ReLU()


def activations(unet):
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            module.nonlinearity.register_forward_hook(lambda m, args, out: out / 2)


def scale_that_is_read(unet):
    unet.set_attn_processor(AttnProcessor())
    unet.get_submodule(BLOCK).attn2.scale = 0.1


def scale_that_is_not(unet):
    unet.get_submodule(BLOCK).attn2.scale = 0.1


CALLED = [*map(subclassed, (nn.Linear, nn.Conv2d, Timesteps, TimestepEmbedding, Downsample2D, GEGLU))]
CALLED += [without_forward, activation, activations, scale_that_is_read, scale_that_is_not]


@torch.no_grad()
@pytest.mark.parametrize("change", CALLED)
def test_what_is_called_may_be_of_any_kind(change):
    unet = tiny_unet("sd15")
    latents, states = torch.randn(1, 4, 16, 16), torch.randn(1, 3, CROSS_ATTENTION_DIM["sd15"])
    plain = unet(latents, 5, states).sample
    change(unet)
    want = unet(latents, 5, states).sample
    plan = UNetProgram(unet).plan(noise_pred=True)
    with FlopCounterMode(display=False):
        # Which puts hooks of torch's own on all modules.
        got = plan.run(latents, 5, plan.encode_text(states)).noise_pred
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
    # As diffusers has it, a change that the processor does not look at is none.
    assert torch.equal(want, plain) == (change in (without_forward, scale_that_is_not))


def test_methods_are_told_by_where_they_were_written(monkeypatch):
    assert is_shipped(UNet2DConditionModel, "forward"), "diffusers' own decorator"
    assert is_shipped(BasicTransformerBlock, "__call__"), "torch's"
    monkeypatch.setattr(BasicTransformerBlock, "forward", torch.compile(BasicTransformerBlock.forward))
    assert is_shipped(BasicTransformerBlock, "forward"), "compiled"
    for other in (torch.no_grad()(ResnetBlock2D.forward), Attention.forward, functools.partial(ResnetBlock2D.forward)):
        monkeypatch.setattr(ResnetBlock2D, "forward", other)
        assert not is_shipped(ResnetBlock2D, "forward")
        monkeypatch.undo()


def test_ip_adapter_is_refused_by_its_name():
    unet = tiny_unet("sd15")

    processor = IPAdapterAttnProcessor2_0(hidden_size=16, cross_attention_dim=24)
    unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.set_processor(processor)
    with pytest.raises(UnsupportedNetworkError, match="an IP-Adapter is loaded"):
        UNetProgram(unet)


def test_freeu_switched_off_again_is_fine():
    unet = tiny_unet("sd15")
    freeu(unet)
    unet.disable_freeu()
    UNetProgram(unet)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("class_embed_type", "timestep", "class_embed_type: 'timestep' is not supported, expected None"),
        ("time_embedding_act_fn", "silu", "time_embedding_act_fn: 'silu'"),
        ("only_cross_attention", True, "only_cross_attention: True"),
        ("resnet_time_scale_shift", "scale_shift", "resnet_time_scale_shift: 'scale_shift'"),
        ("down_block_types", ("SimpleCrossAttnDownBlock2D",) * 2, "down_block_types: 'SimpleCrossAttnDownBlock2D'"),
    ],
)
def test_unknown_architectures_are_refused_by_the_setting(setting, value, message):
    given = {
        "block_out_channels": (8, 8),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    unet = UNet2DConditionModel(**(given | {setting: value}))
    with pytest.raises(UnsupportedNetworkError, match=message):
        UNetProgram(unet)


def test_other_models_are_refused_by_their_class():
    with pytest.raises(UnsupportedNetworkError, match="AutoencoderKL is not supported"):
        UNetProgram(tiny_pipeline("sd15").vae)


def test_an_unknown_id_names_the_nearest_legal_ones():
    program = UNetProgram(tiny_unet("sd15"))
    with pytest.raises(
        ValueError,
        match=r"features: unknown id 'up-level1-repeat1-vit-block0-cros-q'.*up-level1-repeat1-vit-block0-cross-q",
    ):
        program.plan(features=["up-level1-repeat1-vit-block0-cros-q"])
    with pytest.raises(ValueError, match=r"scores: unknown id 'mid-vit-block0-cross-q'.*mid-vit-block0-cross"):
        program.plan(scores=["mid-vit-block0-cross-q"])
    with pytest.raises(ValueError, match="features: got the string"):
        program.plan(features="unet-out")
    with pytest.raises(ValueError, match="features: an id is given twice"):
        program.plan(features=["unet-out", "unet-out"])
    with pytest.raises(ValueError, match="nothing is asked for"):
        program.plan()
    with pytest.raises(ValueError, match="pool: got 'median'"):
        program.plan(noise_pred=True, pool="median")


STATES = torch.zeros(2, 3, CROSS_ATTENTION_DIM["sd15"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(2, 3, 16, 16)}, r"latents: got \(2, 3, 16, 16\), expected \(P, 4, h, w\)"),
        ({"latents": torch.zeros(2, 4, 16, 16).double()}, "latents: got torch.float64 on cpu"),
        ({"timesteps": [1, 2, 3]}, r"timesteps: got \(3,\), expected one or \(2,\)"),
        ({"latent_index": [0, 2]}, "latent_index: values from 0 to 2, expected 0 to 1"),
        ({"text_index": [-1, 0]}, "text_index: values from -1 to 0"),
        ({"text_index": [0, 1, 0]}, "text_index: got 3 entries, expected 2"),
        ({"text_index": [0.0, 1.0]}, "text_index: got"),
        ({"latent_index": [0, 1, 0]}, "text_index: needed when there are 2 texts for 3 rows"),
        (
            {"residuals": ([torch.zeros(2, 16, 16, 16)], torch.zeros(2, 32, 2, 2))},
            "residuals: got 1 down residuals, expected 12",
        ),
        ({"residuals": ([torch.zeros(2, 16, 1, 1)] * 12, STATES)}, r"down residual 0 is \(2, 16, 1, 1\), expected"),
        ({"map_tokens": None}, "map_tokens: needed"),
        ({"map_tokens": [3]}, "map_tokens: positions outside 0 to 2"),
        ({"text": None}, "text: needed by step 'down-level0-repeat0-vit-block0-cross'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments_of_run_are_named(change, message):
    plan = UNetProgram(tiny_unet("sd15")).plan(noise_pred=True, maps=["mid-vit-block0-cross"])
    arguments = {
        "latents": torch.zeros(2, 4, 16, 16),
        "timesteps": 5,
        "text": plan.encode_text(STATES),
        "map_tokens": [0],
    }
    arguments |= change
    with pytest.raises(ValueError, match=message):
        plan.run(arguments.pop("latents"), arguments.pop("timesteps"), arguments.pop("text"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": torch.zeros(2, 3, 5)}, r"states: got \(2, 3, 5\), expected \(M, T, 24\)"),
        ({"states": STATES.half()}, "states: got torch.float16"),
        ({"lengths": [1, 4]}, "lengths: values from 1 to 4, expected 0 to 3"),
        ({"key_bias": torch.zeros(2, 4)}, "key_bias: got"),
        ({"score_mask": torch.zeros(2, 3)}, "score_mask: got"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments_of_encode_text_are_named(change, message):
    plan = UNetProgram(tiny_unet("sd15")).plan(noise_pred=True)
    arguments = {"states": STATES} | change
    with pytest.raises(ValueError, match=message):
        plan.encode_text(arguments.pop("states"), **arguments)


def test_sdxl_needs_pooled_text_and_sizes():
    plan = UNetProgram(tiny_unet("sdxl")).plan(noise_pred=True)
    states = torch.zeros(1, 3, CROSS_ATTENTION_DIM["sdxl"])
    with pytest.raises(ValueError, match="pooled: got None"):
        plan.encode_text(states)
    with pytest.raises(ValueError, match=r"pooled: got \(1, 19\), expected \(1, 20\)"):
        plan.encode_text(states, pooled=torch.zeros(1, 19))
    text = plan.encode_text(states, pooled=torch.zeros(1, 20))
    with pytest.raises(ValueError, match="time_ids: got None"):
        plan.run(torch.zeros(1, 4, 16, 16), 0, text)
