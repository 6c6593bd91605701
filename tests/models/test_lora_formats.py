"""LoRA files in every naming that people have: against diffusers and PEFT where they read them, by hand where not."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

import dsd_fast as dsd
from dsd_fast.models import ModelError
from dsd_fast.models.lora_formats import read_lora
from tests.tiny import tiny_pipeline

OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
PARTS = ("unet", "text_encoder", "text_encoder_2")
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def peft(part, path):
    return f"{part}.{path}.lora_A.weight", f"{part}.{path}.lora_B.weight"


def wrapped(part, path):
    """Of a module that PEFT has wrapped, with the text tower's name, which not every version of transformers has."""
    if part != "unet" and path != "text_projection":
        path = f"text_model.{path.removeprefix('text_model.')}"
    return peft(f"{part}.base_model.model", path)


def diffusers(part, path):
    middle = "lora" if part == "unet" or path == "text_projection" else "lora_linear_layer"
    return f"{part}.{path}.{middle}.down.weight", f"{part}.{path}.{middle}.up.weight"


def processors(part, path):
    """Of 2023; layers other than the attentions' projections did not have any."""
    block, _, projection = path.rpartition(".attn1." if ".attn1." in path else ".attn2.")
    if part == "unet" and block:
        projection = projection.removesuffix(".0")
        stem = f"unet.{path[: path.rindex('.to_')]}.processor.{projection}_lora"
    elif part != "unet" and path.rpartition(".")[2] in OLD_TEXT:
        block, _, projection = path.rpartition(".")
        stem = f"{part}.{block}.{OLD_TEXT[projection]}_lora"
    else:
        return None
    return f"{stem}.down.weight", f"{stem}.up.weight"


def kohya(part, path):
    inner = path if part == "unet" or path == "text_projection" else f"text_model.{path.removeprefix('text_model.')}"
    stem = KOHYA[part] + inner.replace(".", "_")
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"


def layers_of(networks):
    for part, network in networks.items():
        for path, layer in network.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                yield part, path, layer


def draw(layer, rank, generator):
    down = torch.randn(rank, *layer.weight.shape[1:], generator=generator)
    up = torch.randn(len(layer.weight), rank, *(1 for _ in layer.weight.shape[2:]), generator=generator)
    return down / math.prod(down.shape[1:]) ** 0.5, up / rank**0.5


@pytest.mark.parametrize("naming", [peft, wrapped, diffusers, processors, kohya])
def test_every_naming_is_read_as_what_it_holds(naming):
    pipe, generator = tiny_pipeline("sdxl"), torch.Generator().manual_seed(0)
    networks = {part: getattr(pipe, part) for part in PARTS}
    tensors, want = {}, {part: {} for part in PARTS}
    for number, (part, path, layer) in enumerate(layers_of(networks)):
        names = naming(part, path)
        if names is not None:
            # Without an alpha, and with ranks that differ.
            matrices = want[part][path] = draw(layer, 2 + number % 3, generator)
            tensors |= zip(names, matrices, strict=True)
    assert all(want.values())
    assert ("text_projection" in want["text_encoder_2"]) == (naming is not processors)
    settings = {part: {"lora_alpha": 3, "alpha_pattern": {"^mid_block.*": 5}} for part in PARTS}
    parts = read_lora(tensors, pipe.unet, (pipe.text_encoder, pipe.text_encoder_2), "x", settings)
    assert parts.keys() == want.keys()
    for part, layers in parts.items():
        assert layers.keys() == want[part].keys()
        for path, layer in layers.items():
            assert all(map(torch.equal, (layer.down, layer.up), want[part][path]))
            assert layer.alpha == (5 if path.startswith("mid_block.") else 3)


@torch.no_grad()
def states_and_noise(model, adapter=None):
    """Text states, and the prediction by the plan from states that no adapter changes."""
    states = model.encode_prompts(["a red circle"])
    fixed = torch.randn(states.states.shape, generator=torch.Generator().manual_seed(1))
    pooled = None if states.pooled is None else torch.ones_like(states.pooled)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    plan = dsd.unet.UNetProgram(model.unet).plan(noise_pred=True, adapter=adapter)
    out = plan.run(latents, torch.tensor([261]), plan.encode_text(fixed, pooled), time_ids=model.time_ids(32, 32))
    return states.states, states.pooled, out.noise_pred


def near(got, want, before=None, changed=(True, True, True)):
    """Equal but for the order of sums, and, where the file says something of it, not what they were before."""
    for number, (value, expected) in enumerate(zip(got, want, strict=True)):
        if expected is not None:
            torch.testing.assert_close(value, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
            if before is not None:
                differs = (expected - before[number]).abs().mean() > 0.01 * before[number].abs().mean()
                assert differs == changed[number]


@pytest.mark.newest
@pytest.mark.parametrize(("places", "text"), [("attn", True), ("attn2", True), ("attn2", False)])
def test_a_file_of_2023_equals_diffusers(places, text, tmp_path):
    pipe, generator, tensors = tiny_pipeline("sd15"), torch.Generator().manual_seed(0), {}
    before = states_and_noise(dsd.from_pipeline(pipe))
    for part, path, layer in layers_of({"unet": pipe.unet} | ({"text_encoder": pipe.text_encoder} if text else {})):
        names = processors(part, path)
        if names is not None and (part != "unet" or f".{places}" in path):
            tensors |= zip(names, draw(layer, 4, generator), strict=True)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    model = dsd.from_pipeline(tiny_pipeline("sd15"))
    model.load_lora(tmp_path, "x")
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors", adapter_name="x")
    pipe.unet.eval()
    near(states_and_noise(model), states_and_noise(dsd.from_pipeline(pipe)), before, (text, False, True))


@torch.no_grad()
def added(layer, down, up, scale=1.0):
    layer.weight += scale * (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)


def file_and_merged(family, naming, ranks, tmp_path, where):
    """A file of that naming, and a model with the products in its weights."""
    merged, generator, tensors = dsd.from_pipeline(tiny_pipeline(family)), torch.Generator().manual_seed(0), {}
    networks = dict(zip(PARTS, (merged.unet, *merged.text_encoders), strict=False))
    for number, (part, path, layer) in enumerate(layers_of(networks)):
        if where(part, path):
            matrices = draw(layer, ranks[number % len(ranks)], generator)
            tensors |= zip(naming(part, path), matrices, strict=True)
            added(layer, *matrices)
    save_file(tensors, tmp_path / "x.safetensors")
    return merged


@pytest.mark.parametrize(
    ("family", "naming", "ranks", "where"),
    [
        ("sd15", peft, (2, 8, 8), lambda part, path: path.endswith(("to_q", "to_v", "q_proj"))),
        ("sd21", diffusers, (8, 2), lambda part, path: path.endswith(("to_k", "conv1", "fc1"))),
        ("sdxl", kohya, (2, 4, 8), lambda part, path: path.endswith(("to_q", "_proj"))),
        ("sdxl", kohya, (4,), lambda part, path: path.endswith(("text_projection", "to_out.0"))),
        ("sdxl", diffusers, (4,), lambda part, path: path == "text_projection" or part == "unet"),
        ("sdxl", peft, (3, 2), lambda part, path: path.startswith("text_") or part == "text_encoder_2"),
    ],
)
def test_ranks_by_layer_and_every_text_encoder_by_hand(family, naming, ranks, where, tmp_path):
    """Without alphas the factor is 1 whatever the rank; SDXL's second text encoder counts, its projection too."""
    merged = file_and_merged(family, naming, ranks, tmp_path, where)
    model = dsd.from_pipeline(tiny_pipeline(family))
    model.load_lora(tmp_path, "x")
    assert {scale for network in (model.unet, *model.text_encoders) for scale in scales(network)} == {1.0}
    # Rounding of two products instead of one, as for files of kohya's.
    for got, want in zip(states_and_noise(model), states_and_noise(merged), strict=True):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


def scales(network):
    return {layer.scaling["x"] for layer in network.modules() if "x" in getattr(layer, "scaling", ())}


def test_a_files_header_says_the_strength(tmp_path):
    """As diffusers' `save_lora_weights` and `save_lora_adapter` write it: by part, or without one."""
    place = "mid_block.attentions.0.transformer_blocks.0.attn2"
    tensors = {}
    for name in ("to_q", "to_k"):
        tensors |= {f"{place}.{name}.lora_A.weight": torch.ones(4, 24 if name == "to_k" else 32)}
        tensors |= {f"{place}.{name}.lora_B.weight": torch.ones(32, 4)}
    header = {"r": 4, "lora_alpha": 2, "alpha_pattern": {"attn2.to_k": 6}, "use_rslora": False}
    for prefix, root in (("unet.", False), ("unet.", True), ("", True)):
        settings = {f"{prefix}{key}": value for key, value in (header | {"use_rslora": root}).items()}
        named = {f"{prefix}{key}": value for key, value in tensors.items()}
        save_file(named, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
        model = dsd.from_pipeline(tiny_pipeline("sd15"))
        model.load_lora(tmp_path, "x")
        assert scales(model.unet) == ({1.0, 3.0} if root else {0.5, 1.5})


PLACES = {"unet": ["to_q", "to_v", "conv2", "proj_in"], "text_encoder": ["q_proj", "fc2"]}


def peft_folder(pipe, folder, part, **options):
    """Puts an adapter with drawn weights on a part and writes PEFT's folder of it."""
    network = getattr(pipe, part)
    torch.manual_seed(0)
    options = {"target_modules": PLACES[part], "init_lora_weights": False} | options
    network.add_adapter(LoraConfig(r=4, **options), "default")
    state = get_peft_model_state_dict(network, adapter_name="default")
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"base_model.model.{key}": value.contiguous() for key, value in state.items()}
    save_file(named, folder / "adapter_model.safetensors")
    settings = network.peft_config["default"].to_dict() | {"init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps(settings, default=sorted))


@pytest.mark.newest
@pytest.mark.parametrize(
    ("folders", "options"),
    [
        ({"unet": "."}, {"lora_alpha": 6, "rank_pattern": {"to_v": 2}, "alpha_pattern": {"mid_block.*to_v": 3}}),
        ({"text_encoder": "."}, {"lora_alpha": 2, "use_rslora": True, "lora_dropout": 0.5}),
        ({"unet": "unet", "text_encoder": "text_encoder"}, {"lora_alpha": 8, "lora_bias": True}),
        ({"unet": "unet"}, {"lora_alpha": 8, "use_dora": True}),
    ],
    ids=["unet", "text", "both", "dora"],
)
def test_a_folder_of_peft_equals_peft(folders, options, tmp_path):
    pipe = tiny_pipeline("sd15")
    for part, place in folders.items():
        peft_folder(pipe, tmp_path / place, part, **options)
    pipe.unet.eval(), pipe.text_encoder.eval()
    model = dsd.from_pipeline(tiny_pipeline("sd15"))
    before = states_and_noise(model)
    model.load_lora(tmp_path, "x")
    changed = ("text_encoder" in folders, False, "unet" in folders)
    near(states_and_noise(model), states_and_noise(dsd.from_pipeline(pipe)), before, changed)


def test_folders_of_peft_that_are_refused(tmp_path):
    pipe = tiny_pipeline("sdxl")
    peft_folder(pipe, tmp_path, "text_encoder")
    file, beside = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    settings = json.loads(beside.read_text())
    model = dsd.from_pipeline(tiny_pipeline("sdxl"))

    def refused(message, source=tmp_path):
        with pytest.raises(ModelError, match=rf"LoRA '.*{message}"):
            model.load_lora(source, "x")
        assert not any(getattr(network, "peft_config", {}) for network in (model.unet, *model.text_encoders))

    for changed, message in (
        ({"peft_type": "LOHA"}, "settings for the part 'text_encoder' have peft_type = 'LOHA', expected 'LORA'"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "have init_lora_weights = 'pissa_niter_4', which changes the layers' own",
        ),
        ({"modules_to_save": ["conv_in"]}, "have modules_to_save = .*, expected none, as plain LoRA and DoRA have"),
    ):
        beside.write_text(json.dumps(settings | changed))
        refused(message)
    beside.write_text("{")
    refused("adapter_model.safetensors' cannot be read: ")
    beside.unlink()
    refused("is PEFT's, but its strength is nowhere, expected an adapter_config.json")
    file.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"'adapter_model\.bin' is a pickle"):
        model.load_lora(tmp_path, "x")
    # With its settings it is of the encoder whose widths it has.
    (tmp_path / "adapter_model.bin").rename(file)
    beside.write_text(json.dumps(settings))
    model.load_lora(tmp_path, "x")
    assert [hasattr(network, "peft_config") for network in (model.unet, *model.text_encoders)] == [False, True, False]


def dora(layer, down, up, scale, magnitude):
    """W' = m · (W + ΔW) / ‖W + ΔW‖, by the rows (LyCORIS' wd_on_out, PEFT)."""
    total = (layer.weight + scale * (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)).flatten(1)
    return (magnitude.view(-1, 1) * total / total.norm(dim=1, keepdim=True)).view_as(layer.weight)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "magnitudes", "strength"),
    [("sd15", "all", 1.0), ("sd15", "some", 1.0), ("sd15", "some", 0.5), ("sdxl", "all", 1.0)],
)
def test_kohyas_dora_by_hand(family, magnitudes, strength, tmp_path):
    """Linear layers and convolutions; a layer without norms is plain LoRA, at every strength."""
    merged, generator, tensors = dsd.from_pipeline(tiny_pipeline(family)), torch.Generator().manual_seed(0), {}
    before = states_and_noise(merged)
    networks = dict(zip(PARTS, (merged.unet, *merged.text_encoders), strict=False))
    for number, (part, path, layer) in enumerate(layers_of(networks)):
        if not path.endswith(("to_k", "conv1", "proj_out", "fc1", "text_projection")):
            continue
        names, (down, up) = kohya(part, path), draw(layer, 2, generator)
        stem = names[0].removesuffix(".lora_down.weight")
        tensors |= {**dict(zip(names, (down, up), strict=True)), f"{stem}.alpha": torch.tensor(1)}
        if magnitudes == "some" and number % 2:
            added(layer, down, up, 0.5 * strength)
            continue
        magnitude = layer.weight.flatten(1).norm(dim=1) * (1 + 0.3 * torch.rand(len(layer.weight), generator=generator))
        tensors[f"{stem}.dora_scale"] = magnitude.view(-1, *(1 for _ in layer.weight.shape[1:]))
        layer.weight.copy_(dora(layer, down, up, 0.5 * strength, magnitude))
    save_file(tensors, tmp_path / "x.safetensors")
    pipe = tiny_pipeline(family)
    model = dsd.from_pipeline(pipe)
    model.load_lora(tmp_path, "x")
    pipe.set_adapters("x", strength)
    for got, want, plain in zip(states_and_noise(model), states_and_noise(merged), before, strict=True):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))
            assert (want - plain).abs().mean() > 0.01 * plain.abs().mean()


def test_what_would_be_dropped_is_refused(tmp_path):
    model, generator = dsd.from_pipeline(tiny_pipeline("sd15")), torch.Generator().manual_seed(0)
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    layer = model.unet.get_submodule(path)
    names, matrices = kohya("unet", path), draw(layer, 4, generator)
    stem, fits = names[0].removesuffix(".lora_down.weight"), dict(zip(names, matrices, strict=True))
    inputs = layer.weight.norm(dim=0, keepdim=True)
    twice = dict(zip(peft("unet", path), draw(layer, 4, generator), strict=True))
    for more, message in (
        (
            {"bundle_emb.cat.string_to_param.*": torch.zeros(2, 24)},
            r"embeddings of words in it .'bundle_emb\.cat\.string",
        ),
        ({f"{stem}.dora_scale": inputs}, r"has shape \(1, 24\), expected \(32,\) .*a norm for each output, as PEFT's"),
        (twice, f"has weights for '{path}' of the unet under two names, one of them 'unet.{path}'"),
        (
            {"unet.conv_in.lora.down.weight": torch.ones(2, 4, 3, 3)},
            "'unet.conv_in.lora.down.weight' but no '.*lora.up.w",
        ),
        ({"lora_unet_conv_in.alpha": torch.ones(())}, "has 'lora_unet_conv_in.alpha' but no matrices for its layer"),
        ({"unet.conv_in.hada_w1_a": torch.ones(2)}, "of another kind than plain LoRA and DoRA: LoHa"),
        (
            {"lora_te2_text_projection.alpha": torch.ones(())},
            "has weights for 'lora_te2_text_projection', a layer that",
        ),
    ):
        save_file({**fits, **more}, tmp_path / "x.safetensors")
        with pytest.raises(ModelError, match=rf"LoRA '.*x\.safetensors' for '.*': .*{message}|LoRA '.*{message}"):
            model.load_lora(tmp_path, "x")
        assert not getattr(model.unet, "peft_config", {})
