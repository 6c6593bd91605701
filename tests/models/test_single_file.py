"""Checkpoints of one file against the folder that they were written from."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsd_fast as dsd
from dsd_fast.models import ModelError
from tests.models.original import checkpoint
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def files(folders, tmp_path_factory):
    """A file and the folder with its configuration, per family."""
    folder = tmp_path_factory.mktemp("single")
    result = {}
    for family, config in (("mini", "mini"), *folders.items()):
        pipe = dsd.load("mini").to_pipeline() if family == "mini" else tiny_pipeline(family)
        result[family] = (folder / f"{family}.safetensors", config)
        save_file(checkpoint(pipe), result[family][0])
    return result


@torch.no_grad()
@pytest.mark.parametrize("family", ["mini", "sd15", "sd21", "sdxl"])
def test_a_file_equals_its_folder(family, files):
    file, config = files[family]
    model, want = dsd.load(file, config=config, local_files_only=True), dsd.load(config)
    assert (model.name, model.revision, model.clip, model.family) == (str(file), None, None, want.family)
    assert model.scheduler_config == want.scheduler_config
    for got, network in zip(
        (model.unet, model.vae, *model.text_encoders), (want.unet, want.vae, *want.text_encoders), strict=True
    ):
        state = network.state_dict()
        assert got.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in got.state_dict().items())
        assert not any(parameter.requires_grad for parameter in got.parameters())
        assert not any(module.training for module in got.modules())
    states, others = (each.encode_prompts(["a red circle"]) for each in (model, want))
    assert torch.equal(states.states, others.states)
    latents, ids = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), model.time_ids(32, 32)
    got, predicted = (
        (plan := dsd.unet.UNetProgram(unet).plan(noise_pred=True))
        .run(latents, torch.tensor([261]), plan.encode_text(states.states, states.pooled), time_ids=ids)
        .noise_pred
        for unet in (model.unet, want.unet)
    )
    torch.testing.assert_close(got, predicted, rtol=1e-5, atol=1e-5 * float(predicted.abs().max()))


def test_other_namings_of_the_text_encoders(files, tmp_path):
    """Without "text_model.", with the numbers of positions, and SDXL's projection as diffusers' script writes it."""
    for family, key in (("sd15", "cond_stage_model.transformer."), ("sdxl", "conditioner.embedders.0.transformer.")):
        file, config = files[family]
        tensors = {name.replace(f"{key}text_model.", key): value for name, value in load_file(file).items()}
        tensors[f"{key}text_model.embeddings.position_ids"] = torch.arange(77)[None]
        projection = tensors.pop("conditioner.embedders.1.model.text_projection", None)
        if projection is not None:
            tensors["conditioner.embedders.1.model.text_projection.weight"] = projection.T.contiguous()
        save_file(tensors, tmp_path / "other.safetensors")
        model, want = (dsd.load(each, config=config) for each in (tmp_path / "other.safetensors", file))
        for got, encoder in zip(model.text_encoders, want.text_encoders, strict=True):
            state = encoder.state_dict()
            assert all(torch.equal(value, state[name]) for name, value in got.state_dict().items())


def test_load_dtype(files):
    model = dsd.load(files["sdxl"][0], config=files["sdxl"][1], dtype="bfloat16")
    for network in (model.unet, model.vae, *model.text_encoders):
        assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}


def refused(message, *args, **options):
    with pytest.raises(ModelError, match=message) as info:
        dsd.load(*args, **options)
    assert "\n" not in str(info.value)


def test_what_is_no_checkpoint_of_a_model_is_refused(files, tmp_path):
    file, config = files["sd15"]
    for name in ("sd.ckpt", "sd.bin"):
        (tmp_path / name).write_bytes(b"x")
        refused(f"model '.*{name}' is a pickle, which can run code when loaded; expected .safetensors", tmp_path / name)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"x")
    refused("model '.*broken.safetensors' cannot be read as a .safetensors file: .*header", broken)
    tensors = load_file(file)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    for changed, message in (
        ({key: value for key, value in tensors.items() if "diffusion" not in key}, f"has no '{first}', expected all"),
        (tensors | {first: torch.zeros(16, 9, 3, 3)}, "in_channels = 9 .an inpainting UNet., expected the VAE's 4"),
        (
            {key: value for key, value in tensors.items() if "first_stage" not in key},
            r"component 'vae' of model '.*' cannot be loaded: its weights lack \d+ tensors, the first 'decoder",
        ),
        (
            {key: value for key, value in tensors.items() if "cond_stage" not in key},
            r"component 'text_encoder' of model '.*' cannot be loaded: its weights lack \d+ tensors, the first",
        ),
        (
            {**tensors, "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.bias": torch.zeros(48)},
            r"component 'text_encoder' .*its config has no layers for 1 of its tensors, the first '.*layers\.3\.mlp",
        ),
        (
            {**tensors, first: torch.zeros(24, 4, 3, 3)},
            r"'unet' .*: 1 of its tensors .* the first, 'conv_in\.weight', \(24, 4, 3, 3\), expected \(16, 4, 3, 3\)",
        ),
        (
            {**tensors, "edm_vpred.sigma_max": torch.zeros(())},
            "the mark 'edm_vpred.sigma_max' of a continuous diffusion process",
        ),
        ({**tensors, "v_pred": torch.zeros(0)}, "the mark 'v_pred', expected a config whose scheduler has prediction_"),
        ({**tensors, "ztsnr": torch.zeros(0)}, "the mark 'ztsnr', expected a config whose scheduler has rescale_betas"),
    ):
        save_file(changed, broken)
        refused(message, broken, config=config)


def test_its_configuration(files, folders, tmp_path):
    file, config = files["sd15"]
    refused("config is 'mini', but model 'mini' has its own, expected None", config="mini")
    refused("revision is 'main', but model '.*sd15.safetensors' is a file; expected None", file, revision="main")
    refused("variant is 'fp16', but model '.*sd15.safetensors' is a file; expected None", file, variant="fp16")
    missing = (
        r"config of model '.*', '.*' is neither a folder nor in the hub cache.*; give config=, a folder in diffusers"
    )
    refused(missing, file, local_files_only=True, cache_dir=tmp_path)
    refused(missing.replace("'.*' is", "'someone/sd' is"), file, config="someone/sd", cache_dir=tmp_path)
    refused("config of model '.*', '.*nowhere' is a folder that does not exist", file, config=tmp_path / "nowhere")
    refused("has one text encoder, as SD 1.x .*, but config is of a model with two", file, config=folders["sdxl"])
    refused("has two text encoders, as SDXL has, but config is of a model with one", files["sdxl"][0], config=config)
    # A configuration without weights, as the cache has it.
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--sd"
    shutil.copytree(config, repo / "snapshots" / commit, ignore=shutil.ignore_patterns("*.safetensors", "clip"))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    model = dsd.load(file, config="someone/sd", cache_dir=tmp_path, local_files_only=True)
    assert (model.name, model.family, model.revision) == (str(file), "sd1", None)
    settings = repo / "snapshots" / commit / "text_encoder/config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"num_hidden_layers": 2}))
    refused(
        "'text_encoder' .*its config has no layers for 16 of its tensors",
        file,
        config="someone/sd",
        cache_dir=tmp_path,
    )
    settings.unlink()
    refused("component 'text_encoder' has no config.json", file, config="someone/sd", cache_dir=tmp_path)


def test_sd2_does_not_tell_what_it_predicts(files, tmp_path):
    tensors = load_file(files["sd21"][0])
    key = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({**tensors, key: torch.zeros(16, 1024)}, tmp_path / "two.safetensors")
    refused(
        "is an SD 2.x, whose weights do not tell whether they predict noise or velocity; give",
        tmp_path / "two.safetensors",
    )
