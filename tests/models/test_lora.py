import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import dsd_fast as dsd
from dsd_fast.models import ModelError
from dsd_fast.models.attn_procs import to_official
from dsd_fast.models.lora import lora_layers, put_unet_lora, save_lora
from tests.tiny import FAMILIES, save_tiny_lora, tiny_pipeline, tiny_unet


def unet_output(unet, model):
    states = model.encode_prompts(["a red cat"])
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    added = None
    if model.family == "sdxl":
        added = {"text_embeds": states.pooled, "time_ids": model.time_ids(32, 32)[None]}
    return unet(latents, 261, states.states, added_cond_kwargs=added).sample


def near(got, want):
    # The same weights at another address may be multiplied in another order.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max())


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return {family: save_tiny_lora(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_before_or_after_equals_stock(family, lora, folders):
    stock = tiny_pipeline(family)
    plain = unet_output(stock.unet, dsd.from_pipeline(stock))
    stock.load_lora_weights(lora[family].parent, weight_name=lora[family].name, use_safetensors=True)
    before = dsd.from_pipeline(stock)
    expected = unet_output(stock.unet, before)
    # Both the UNet and the text encoder have their part in it.
    assert (expected - plain).abs().mean() > 0.05 * plain.abs().mean()
    states = before.encode_prompts(["a red cat"]).states
    assert not torch.equal(states, dsd.load(folders[family]).encode_prompts(["a red cat"]).states)

    # Of a path, its folder and its name the families make no difference.
    for source in (lora[family], lora[family].parent, str(lora[family]))[: 3 if family == "sd15" else 1]:
        model = dsd.load(folders[family])
        model.load_lora(source, "style")
        near(unet_output(model.unet, model), expected)
        torch.testing.assert_close(model.encode_prompts(["a red cat"]).states, states, rtol=0, atol=1e-5)


def test_load_lora_keeps_eval_mode_and_frozen_weights(lora, folders):
    model = dsd.load(folders["sd15"])
    model.load_lora(lora["sd15"], "style")
    for network in (model.unet, model.text_encoders[0]):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert "style" in network.peft_config


def test_load_lora_leaves_flags_of_a_pipeline(lora):
    pipe = tiny_pipeline("sd15")
    pipe.unet.requires_grad_(False)
    pipe.unet.conv_out.requires_grad_(True)
    names = {id(p): p.requires_grad for p in pipe.unet.parameters()}
    dsd.from_pipeline(pipe).load_lora(lora["sd15"], "style")
    assert all(p.requires_grad == names.get(id(p), True) for p in pipe.unet.parameters())


@torch.no_grad()
def test_two_adapters(lora, folders, tmp_path):
    second = save_tiny_lora("sd15", tmp_path, seed=5)
    model = dsd.load(folders["sd15"])
    model.load_lora(lora["sd15"], "one")
    one = unet_output(model.unet, model)
    model.load_lora(second, "two")
    pipe = model.to_pipeline()
    assert pipe.get_list_adapters()["unet"] == ["one", "two"]
    pipe.set_adapters("one")
    assert torch.equal(unet_output(model.unet, model), one)


def test_load_lora_refuses(lora, folders, tmp_path):
    model = dsd.load(folders["sd15"])
    (tmp_path / "a.bin").write_bytes(b"pickle")

    def refused(message, source, name="style", weight_name=None):
        with pytest.raises(ModelError, match=message):
            model.load_lora(source, name, weight_name)

    refused("'a.bin' is a pickle, which can run code when loaded; expected .safetensors", tmp_path / "a.bin")
    refused("'a.bin' is a pickle", tmp_path)
    refused("'x.bin' is a pickle", lora["sd15"].parent, weight_name="x.bin")
    refused("'x.bin' is a pickle", "someone/style", weight_name="x.bin")
    refused("has no file 'x.safetensors'", tmp_path, weight_name="x.safetensors")
    refused("LoRA '.*nowhere' does not exist", tmp_path / "nowhere")
    refused("LoRA './nowhere' does not exist", "./nowhere")
    refused("neither a folder nor in the hub cache", "someone/style")
    refused("adapter name is 'a.b', expected a non-empty name without a dot", lora["sd15"], name="a.b")
    (tmp_path / "a.bin").unlink()
    refused("has no .safetensors file", tmp_path)
    for name in ("one.safetensors", "two.safetensors"):
        (tmp_path / name).write_bytes(lora["sd15"].read_bytes())
    refused("has several files .one.safetensors, two.safetensors.; choose one with weight_name", tmp_path)
    model.load_lora(tmp_path, "style", "two.safetensors")
    refused("adapter name 'style' is taken, expected a new one", lora["sd15"])


def test_load_lora_from_the_cache_of_the_hub(lora, folders, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--style"
    snapshot = repo / "snapshots" / commit
    (snapshot / "sub").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    model = dsd.load(folders["sd15"], cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(ModelError, match=r"LoRA 'someone/style' has no \.safetensors file"):
        model.load_lora("someone/style", "a")
    for name in ("pytorch_lora_weights.safetensors", "sub/other.safetensors"):
        (snapshot / name).write_bytes(lora["sd15"].read_bytes())
    model.load_lora("someone/style", "a")
    model.load_lora("someone/style", "b", "sub/other.safetensors")
    assert list(model.unet.peft_config) == ["a", "b"]
    with pytest.raises(ModelError, match=r"LoRA 'someone/style' has no file 'third\.safetensors'"):
        model.load_lora("someone/style", "c", "third.safetensors")


@torch.no_grad()
def test_load_lora_that_does_not_fit_leaves_nothing(lora, folders, tmp_path):
    model = dsd.load(folders["sd15"])
    before = unet_output(model.unet, model)
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 20)
    # The UNet's part fits, the text encoder's does not.
    fits, other = load_file(lora["sd15"]), load_file(lora["sd21"])
    mixed = {key: (other if key.startswith("text_encoder") else fits)[key] for key in fits}
    save_file(mixed, tmp_path / "mixed.safetensors")
    place = r"encoder\.layers\.\d\.self_attn\.\w_proj"
    for source, message in (
        (
            lora["sd21"],
            rf"'text_encoder.{place}\.lora_A\.weight' has shape \(2, 32\), expected \(2, 24\) for '.*{place}'",
        ),
        (tmp_path / "broken.safetensors", "broken.safetensors' cannot be read: .*header"),
        (tmp_path / "mixed.safetensors", r"has shape \(2, 32\), expected \(2, 24\) for '.*' of the text_encoder"),
    ):
        with pytest.raises(ModelError, match=rf"LoRA '.*{message}"):
            model.load_lora(source, "style")
    assert torch.equal(unet_output(model.unet, model), before)
    model.load_lora(lora["sd15"], "style")


def peft_unet(family, **options):
    """A UNet with the LoRA "mine", as PEFT makes it for training."""
    unet = tiny_unet(family).requires_grad_(False)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(init_lora_weights=False, **options), "mine")
    return unet


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("sd15", {"r": 4, "lora_alpha": 1, "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "conv1"]}),
        ("sd21", {"r": 2, "lora_alpha": 7, "use_rslora": True, "target_modules": r".*attn2\.to_[kv]"}),
        ("sdxl", {"r": 4, "target_modules": ["to_q", "proj"], "rank_pattern": {"mid_block.*": 3, "to_q": 2}}),
        ("sd15", {"r": 3, "target_modules": ["to_out.0"], "alpha_pattern": {"attn1.to_out.0": 5}, "lora_dropout": 0.1}),
    ],
    ids=["alpha", "root", "ranks", "alphas"],
)
@pytest.mark.newest
def test_a_saved_lora_is_what_stock_diffusers_loads(family, options, folders, tmp_path):
    unet = peft_unet(family, **options)
    own = dsd.load(folders[family])
    want = unet_output(unet.eval(), own)
    # A strength is the network's and not the adapter's.
    unet.set_adapters("mine", 0.5)
    file = tmp_path / "new" / "pytorch_lora_weights.safetensors"
    save_lora(unet, "mine", file)
    assert list(file.parent.iterdir()) == [file]

    stock = tiny_pipeline(family)
    stock.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="again", use_safetensors=True)
    assert torch.equal(unet_output(stock.unet, own), want)
    own.load_lora(file, "ours")
    near(unet_output(own.unet, own), want)
    # The same tensors under the same names as diffusers' own function writes.
    state = get_peft_model_state_dict(unet, adapter_name="mine")
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
    theirs, ours = load_file(tmp_path / file.name), load_file(file)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_save_lora_refuses(tmp_path):
    unet = peft_unet("sd15", target_modules=["to_q"])
    for name, file, message in (
        ("other", "a.safetensors", "the UNet has no adapter 'other'; it has mine"),
        ("mine", "a.bin", r"LoRA file is '.*a\.bin', expected a name that ends in \.safetensors"),
    ):
        with pytest.raises(ModelError, match=message):
            save_lora(unet, name, tmp_path / file)
    with pytest.raises(ModelError, match="of another kind than plain LoRA, such as DoRA"):
        save_lora(peft_unet("sd15", target_modules=["to_q"], use_dora=True), "mine", tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_load_lora_reads_the_official_codes_file(folders, tmp_path):
    unet = peft_unet("sd21", r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    weights = to_official(unet, "mine", lora_layers(unet, "mine"))
    save_file(weights, tmp_path / "pytorch_lora_weights.safetensors")
    model = dsd.load(folders["sd21"])
    want = unet_output(unet, model)
    assert not torch.equal(unet_output(model.unet, model), want)
    model.load_lora(tmp_path, "official")
    near(unet_output(model.unet, model), want)
    assert not any(parameter.requires_grad for parameter in model.unet.parameters())
    key = next(iter(weights))
    save_file({**weights, key: weights[key][:2]}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ModelError, match=r"LoRA '.*up\.weight' has shape \(\d+, 4\), expected \(\d+, 2\) for '.*to_q'"):
        model.load_lora(tmp_path, "wrong")
    assert list(model.unet.peft_config) == ["official"]


def matrices(unet, name):
    return dict(get_peft_model_state_dict(unet, adapter_name=name))


@torch.no_grad()
def test_a_lora_takes_the_place_of_another_only_if_it_fits(folders):
    unet = peft_unet("sd15", r=4, target_modules=["to_q"]).eval()
    unet.add_adapter(LoraConfig(r=3, init_lora_weights=False, target_modules=["to_v"]), "other")
    unet.set_adapters(["mine", "other"], [0.5, 2.0])
    model, before = dsd.load(folders["sd15"]), matrices(unet, "mine")
    want = unet_output(unet, model)
    key = next(iter(before))
    for wrong in ({**before, key: before[key][:, 1:]}, matrices(peft_unet("sd21", target_modules=["to_k"]), "mine")):
        with pytest.raises(ModelError, match=r"LoRA 'x': .* has shape .*, expected \(.*\) for '.*to_.' of the unet"):
            put_unet_lora(unet, wrong, "mine", "LoRA 'x'")
        assert torch.equal(unet_output(unet, model), want)
    second = matrices(peft_unet("sd15", r=2, target_modules=["to_k"]), "mine")
    put_unet_lora(unet, second, "mine", "LoRA 'x'")
    assert {key: value.tolist() for key, value in matrices(unet, "mine").items()} == {
        key: value.tolist() for key, value in second.items()
    }
    alone = tiny_unet("sd15").eval()
    put_unet_lora(alone, second, "mine", "LoRA 'x'")
    unet.set_adapters("mine", 1.0)
    assert torch.equal(unet_output(unet, model), unet_output(alone, model))


def test_what_has_no_matrices_of_a_lora_is_refused_by_name():
    unet = tiny_unet("sd15")
    for weights, message in (
        ({}, r"cannot be loaded into the UNet: it has no matrices named '<module>\.lora_A\.weight'"),
        ({"mid_block.resnets.0.conv1.weight": torch.zeros(4, 4)}, "has '.*conv1.weight', which is no part of a LoRA"),
    ):
        with pytest.raises(ModelError, match=f"LoRA 'x' {message}"):
            put_unet_lora(unet, weights, "mine", "LoRA 'x'")
    assert not getattr(unet, "peft_config", {})
