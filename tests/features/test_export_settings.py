"""What a folder of features knows of how they were made: all that changes them, and nothing else."""

import functools
import json
from dataclasses import dataclass

import pytest
import torch
from tokenizers.normalizers import NFC

import dsd_fast as dsd
from dsd_fast.features.export import extract_to, job_settings
from dsd_fast.images.canny import canny
from dsd_fast.models.controlnet import Control, load_controlnet
from dsd_fast.models.errors import ModelError
from dsd_fast.models.tuners import tuner_layers
from dsd_fast.unet.adapters import activate
from tests.features.test_export import LAYERS
from tests.tiny import put_adapter


@pytest.fixture
def model():
    return dsd.load("mini")


def settings(model, **technique):
    extractor = dsd.FeatureExtractor(model, LAYERS, technique=dsd.Technique(**technique))
    return json.loads(json.dumps(job_settings(extractor, extractor.technique, "", 0, "shards")))


def differing(one, other):
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def lora_layers(model):
    return {path: layer for path, layer in model.unet.named_modules() if hasattr(layer, "lora_A")}


def test_the_strength_of_an_adapter_counts_in_every_layer(model):
    model.load_lora("mini", "lora")
    whole = settings(model)
    assert whole["adapters"].keys() <= {"unet", "text_encoder_0"}
    (strength,) = whole["adapters"]["unet"]["lora"]
    layers = lora_layers(model)
    chosen = [path for path in layers if path.startswith("up_blocks")]
    assert 0 < len(chosen) < len(layers)
    for path in chosen:
        layers[path].scaling["lora"] = 0.0
    partly = settings(model)
    assert partly["adapters"]["unet"] == {"lora": [0.0, strength]}
    assert differing(whole, partly) == {"adapters", "adapter_strengths"}
    # The same strengths, in other layers.
    for path, layer in layers.items():
        layer.scaling["lora"] = strength if path in chosen else 0.0
    assert differing(partly, settings(model)) == {"adapter_strengths"}


def test_adapters_that_do_not_act_do_not_count(model):
    plain, without = settings(model), settings(model, adapter=())
    for name in ("a", "b"):
        model.load_lora("mini", name)
    assert settings(model, adapter=()) == without
    with_a = settings(model, adapter="a")
    assert differing(with_a, without) == {"weights", "adapters", "adapter_strengths", "technique"}
    layers = list(lora_layers(model).values())
    with torch.no_grad():
        for layer in layers:
            layer.scaling["b"] = 0.5
            layer.lora_B["b"].weight.add_(1)
    assert settings(model, adapter="a") == with_a
    with torch.no_grad():
        layers[0].lora_B["a"].weight.add_(1)
    assert differing(settings(model, adapter="a"), with_a) == {"weights"}
    for network in (model.unet, *model.text_encoders):
        activate(network, ())
    assert settings(model) == plain


def change_vae(model):
    model.vae.register_to_config(scaling_factor=2 * model.vae.config.scaling_factor)


def change_shift(model):
    model.vae.register_to_config(shift_factor=0.5)


def change_unet(model):
    model.unet.register_to_config(center_input_sample=True)


def change_text_encoder(model):
    model.text_encoders[0].config.use_attention_mask = True


def change_padding(model):
    for module in model.unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.padding_mode = "circular"


def change_normalizer(model):
    model.tokenizers[0].backend_tokenizer.normalizer = NFC()


def change_limit(model):
    model.tokenizers[0].model_max_length -= 1


def change_vocabulary(model):
    model.tokenizers[0].add_tokens("dsdtoken")


@pytest.mark.parametrize(
    ("change", "key", "name"),
    [
        (change_vae, "configs", "vae"),
        (change_shift, "configs", "vae"),
        (change_unet, "configs", "unet"),
        (change_text_encoder, "configs", "text_encoder_0"),
        (change_padding, "changes", "unet"),
        (change_normalizer, "tokenizers", 0),
        (change_limit, "tokenizers", 0),
        (change_vocabulary, "tokenizers", 0),
    ],
)
def test_configs_and_tokenizers_count(model, change, key, name):
    before = settings(model)
    change(model)
    after = settings(model)
    assert differing(before, after) == {key}
    assert key == "changes" or before[key][name] != after[key][name]
    assert after[key][name]
    assert len(before[key]) == {"changes": 0, "configs": 3, "tokenizers": 1}[key]


def test_where_a_network_came_from_does_not_count(model):
    before = settings(model)
    model.unet.register_to_config(_name_or_path="elsewhere", _diffusers_version="0.0.0", mid_block_only_attention=None)
    config = model.text_encoders[0].config
    config._name_or_path, config.transformers_version, config.dtype = "elsewhere", "0.0.0", None
    model.encode_prompts(["a word", "b"])
    assert settings(model) == before


def test_a_control_counts_by_its_weights_its_function_and_its_scale(model):
    net = load_controlnet()
    plain = settings(model, controls=[Control(net)])
    assert plain["technique"]["controls"] == [{"condition": "dsd_fast.images.canny.canny", "scale": 1.0}]
    low = settings(model, controls=[Control(net, functools.partial(canny, low=50))])
    assert low["technique"]["controls"][0]["condition"] == "dsd_fast.images.canny.canny(low=50)"
    assert differing(plain, low) == {"technique"}
    ours = settings(model, controls=[Control(net, Edges(50))])
    assert ours["technique"]["controls"][0]["condition"] == f"{__name__}.Edges(low=50)"
    with torch.no_grad():
        next(net.parameters()).add_(1)
    assert differing(plain, settings(model, controls=[Control(net)])) == {"weights"}


@dataclass(frozen=True)
class Edges:
    low: int

    def __call__(self, picture):
        return canny(picture, low=self.low)


class Nameless:
    def __call__(self, picture):
        return picture


def test_a_condition_without_a_lasting_name_is_refused_in_a_job(model, tmp_path):
    net = load_controlnet()

    def local(picture):
        return picture

    for condition in (lambda picture: picture, local, functools.partial(local), Nameless(), Nameless().__call__):
        technique = dsd.Technique(controls=[Control(net), Control(net, condition)])
        extractor = dsd.FeatureExtractor(model, LAYERS, technique=technique)
        with pytest.raises(ValueError, match=r"controls\[1\]: condition is .*, which a later run could not tell"):
            extract_to(extractor, tmp_path / "out", [])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["loha", "ia3", "modules_to_save"])
def test_an_adapter_of_any_kind_counts_where_it_acts(model, kind):
    plain = settings(model)
    put_adapter(model.unet, kind)
    on = settings(model)
    assert differing(plain, on) == {"weights", "adapters", "adapter_strengths"}
    assert on["adapters"]["unet"] == {"x": {"loha": [4.0], "ia3": [1.0]}.get(kind, [1.0, 4.0])}
    for _, layer in tuner_layers(model.unet):
        layer._disable_adapters = True
    assert settings(model) == plain
    with pytest.raises(ModelError, match="adapter name 'x' is taken"):
        model.load_lora("mini", "x")
