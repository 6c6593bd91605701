"""What neither weights nor configs tell of a network: told where it changes answers, refused where it has no name."""

import functools
import json

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

import dsd_fast as dsd
from dsd_fast.diffusion import SAMPLERS, named_scheduler
from dsd_fast.engine.changes import changes
from dsd_fast.engine.fingerprint import scheduler_settings
from dsd_fast.jobs import tensors_hash
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def shared():
    return dsd.load("mini")


@pytest.fixture
def model(shared):
    """The parts, checked to be as they were shipped before and after."""
    parts = (shared.unet, shared.vae, *shared.text_encoders)
    assert not any(map(changes, parts))
    yield shared
    assert not any(map(changes, parts))


class Halved(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) / 2


class Heavy(AttnProcessor):
    def __init__(self, factor):
        self.factor = factor


def halve(module, args, out):
    return out / 2


def scaled(module, args, out, factor):
    return out * factor


def tiled(conv, x, weight, bias):
    return nn.functional.conv2d(x, weight, bias)


class Steer:
    def __init__(self, factor):
        self.factor = factor

    def steer(self, module, args, out):
        return out * self.factor

    __call__ = steer


class Slotted:
    __slots__ = ()


class Deep:
    def __init__(self, levels):
        self.inner = Deep(levels - 1) if levels else object()


def hook(function):
    return lambda patch, module: patch.setitem(module._forward_hooks, 0, function)


def attribute(name, value):
    return lambda patch, module: patch.setattr(module, name, value)


def own(name, function):
    return lambda patch, module: patch.setitem(vars(module), name, function.__get__(module))


UNET = "mid_block.resnets.0"
HERE = __name__


@pytest.mark.parametrize(
    ("part", "path", "change", "told"),
    [
        ("unet", "conv_in", attribute("padding_mode", "circular"), {"padding_mode": "circular"}),
        ("unet", f"{UNET}.norm1", attribute("eps", 0.1), {"eps": 0.1}),
        ("unet", UNET, attribute("output_scale_factor", 2.0), {"output_scale_factor": 2.0}),
        (
            "unet",
            f"{UNET}.nonlinearity",
            attribute("__class__", nn.ReLU),
            {"class": "torch.nn.modules.activation.ReLU", "inplace": False},
        ),
        ("unet", f"{UNET}.conv1", attribute("__class__", Halved), {"class": f"{HERE}.Halved"}),
        ("unet", f"{UNET}.conv1", hook(halve), {"_forward_hooks": [f"{HERE}.halve"]}),
        (
            "unet",
            f"{UNET}.conv1",
            hook(functools.partial(scaled, factor=3)),
            {"_forward_hooks": [{f"{HERE}.scaled": [[], {"factor": 3}]}]},
        ),
        ("unet", f"{UNET}.conv1", hook(Steer(2.0)), {"_forward_hooks": [{f"{HERE}.Steer": {"factor": 2.0}}]}),
        (
            "unet",
            f"{UNET}.conv1",
            hook(Steer(np.float32(2)).steer),
            {"_forward_hooks": [{f"{HERE}.Steer.steer": {"factor": tensors_hash({"": torch.tensor(2.0)})}}]},
        ),
        (
            "unet",
            "conv_in",
            own("_conv_forward", tiled),
            {"_conv_forward": f"{HERE}.tiled"},
        ),
        ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1", attribute("scale", 0.5), {"scale": 0.5}),
        ("vae", "", attribute("use_tiling", True), {"use_tiling": True}),
        (
            "vae",
            "encoder.mid_block.attentions.0",
            attribute("processor", Heavy(2)),
            {"processor": {f"{HERE}.Heavy": {"factor": 2}}},
        ),
        ("text", "encoder.layers.0.self_attn", attribute("scale", 0.5), {"scale": 0.5}),
    ],
)
def test_what_changes_answers_is_told(model, part, path, change, told, monkeypatch):
    network = {"unet": model.unet, "vae": model.vae, "text": model.text_encoders[0]}[part]
    path = path if path in dict(network.named_modules()) else f"text_model.{path}"
    with monkeypatch.context() as patch:
        change(patch, network.get_submodule(path))
        assert changes(network) == {path: told}


@pytest.mark.parametrize(("held", "message"), [(Deep(8), "too deep inside"), (Slotted(), "whose state a later run")])
def test_state_that_cannot_be_told_is_refused(model, held, message, monkeypatch):
    with monkeypatch.context() as patch:
        hook(Steer(held))(patch, model.unet.conv_in)
        with pytest.raises(ValueError, match=f"conv_in: a hook.*{message}"):
            changes(model.unet)


def test_methods_of_a_librarys_class_are_told(model, monkeypatch):
    kind = type(model.vae.encoder)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", functools.wraps(kind.forward)(halve))
        assert changes(model.vae) == {"methods": {"diffusers.models.autoencoders.vae.Encoder.forward": f"{HERE}.halve"}}
        assert not changes(model.unet)


def test_a_dropout_counts_while_it_drops(model, monkeypatch):
    dropout = model.unet.mid_block.resnets[0].dropout
    with monkeypatch.context() as patch:
        patch.setattr(dropout, "p", 0.5)
        assert not changes(model.unet)
        patch.setattr(dropout, "training", True)
        assert changes(model.unet) == {"mid_block.resnets.0.dropout": {"p": 0.5, "training": True}}


def test_modules_put_in_or_taken_out_are_told():
    vae = tiny_pipeline("sd15").vae
    vae.quant_conv, vae.encoder.conv_out = None, nn.Sequential(vae.encoder.conv_out, nn.Tanh())
    told = changes(vae)
    assert told.pop("encoder.conv_out.0")["class"] == "torch.nn.modules.conv.Conv2d"
    assert told == {
        "quant_conv": None,
        "encoder.conv_out": {"class": "torch.nn.modules.container.Sequential"},
        "encoder.conv_out.1": {"class": "torch.nn.modules.activation.Tanh"},
    }


def test_what_gives_the_same_answers_is_not_told():
    pipe = tiny_pipeline("sdxl")
    pipe.unet.train()
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].set_chunk_feed_forward(1, 1)
    pipe.unet.conv_out.forward = pipe.unet.conv_out.forward
    pipe.unet.conv_in.compile()
    pipe.vae.enable_slicing()
    pipe.vae.set_default_attn_processor()
    pipe.vae.note = object()
    pipe.to(torch.bfloat16)
    encoder = pipe.text_encoder_2
    # transformers registers hooks of its own.
    encoder(torch.ones(1, 3, dtype=torch.long), output_hidden_states=True)
    assert not any(map(changes, (pipe.unet, pipe.vae, encoder)))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (hook(lambda m, args, out: out / 2), r"quant_conv: a hook is .*<lambda>"),
        (attribute("__class__", type("<locals>.Mine", (nn.Conv2d,), {})), r"quant_conv is .*Mine"),
        (
            lambda patch, module: patch.setitem(vars(module), "forward", lambda x: x),
            r"quant_conv.forward is .*<lambda>",
        ),
    ],
)
def test_what_a_later_run_could_not_tell_is_refused(model, change, name, monkeypatch):
    with monkeypatch.context() as patch:
        change(patch, model.vae.quant_conv)
        with pytest.raises(ValueError, match=f"{name}.*, which a later run could not tell from another; expected a"):
            changes(model.vae)


def test_a_scheduler_is_told_alike_in_any_process():
    """Diffusers lists the values that are defaults in the order of a set."""
    model = dsd.from_pipeline(tiny_pipeline("sd15"))
    assert model.scheduler_config["_use_default_values"]
    told = scheduler_settings(model)
    assert told == {name: told[name] for name in model.scheduler_config if name != "_use_default_values"}


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_scheduler_is_told_as_json(name, model):
    told = scheduler_settings(model.with_scheduler(named_scheduler(name, model.new_scheduler())))
    assert json.loads(json.dumps(told, allow_nan=False)) == told
