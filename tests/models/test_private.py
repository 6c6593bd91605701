import torch
from peft import LoraConfig

from dsd_fast.models.private import private
from tests.tiny import tiny_unet


def outputs(unet):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    states = torch.randn(1, 5, 24, generator=generator)
    with torch.no_grad():
        return unet(latents, 300, states).sample


def test_the_same_network_on_the_same_memory():
    unet = tiny_unet("sd15").requires_grad_(True)
    own = private(unet)
    ours, theirs = dict(unet.named_parameters()), dict(own.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(theirs[name].data_ptr() == value.data_ptr() for name, value in ours.items())
    assert {p.requires_grad for p in theirs.values()} == {False}
    assert {p.requires_grad for p in ours.values()} == {True}
    assert {id(module) for module in unet.modules()}.isdisjoint(id(module) for module in own.modules())
    assert own.config == unet.config
    assert own.training == unet.training
    want = outputs(unet)
    assert torch.equal(outputs(own), want)
    # A write to a weight is seen by both.
    with torch.no_grad():
        unet.conv_in.bias.add_(1)
    assert not torch.equal(outputs(unet), want)
    assert torch.equal(outputs(own), outputs(unet))


def test_what_is_attached_to_one_does_not_touch_the_other():
    unet = tiny_unet("sd15")
    own, want = private(unet), outputs(unet)
    own.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "mine")
    assert not torch.equal(outputs(own), want)
    assert torch.equal(outputs(unet), want)
    assert not getattr(unet, "peft_config", None)


def test_chosen_parameters_are_copied():
    unet = tiny_unet("sd15")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "mine")
    unet.requires_grad_(False)
    own = private(unet, lambda name: ".mine." in name)
    for (name, ours), theirs in zip(unet.named_parameters(), own.parameters(), strict=True):
        assert (ours.data_ptr() == theirs.data_ptr()) == (".mine." not in name)
        assert torch.equal(ours, theirs)
    want = outputs(unet)
    assert torch.equal(outputs(own), want)
    with torch.no_grad():
        next(p for name, p in own.named_parameters() if ".mine." in name).add_(1)
    assert not torch.equal(outputs(own), want)
    assert torch.equal(outputs(unet), want)


def test_weights_and_buffers_that_are_shared_inside_stay_so():
    unet = tiny_unet("sd15")
    unet.register_buffer("numbers", torch.arange(3.0))
    unet.up_blocks[1].resnets[0].norm1.weight = unet.up_blocks[1].resnets[1].norm1.weight
    own = private(unet)
    assert own.up_blocks[1].resnets[0].norm1.weight is own.up_blocks[1].resnets[1].norm1.weight
    assert own.numbers is unet.numbers
