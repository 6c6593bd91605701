import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file

import dsd_fast as dsd
from dsd_fast.models import ModelError, mini
from dsd_fast.models.load import _patterns
from tests.tiny import FAMILIES, tiny_clip, tiny_pipeline


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of the sd15-like folder to spoil."""
    return shutil.copytree(folders["sd15"], tmp_path / "model")


def edit(file, **changes):
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps(content))


def refused(message, *args, **options):
    with pytest.raises(ModelError, match=message) as info:
        dsd.load(*args, **options)
    assert "\n" not in str(info.value)
    return info.value


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.newest
def test_load_equals_the_pipeline(family, folders):
    model, pipe = dsd.load(folders[family]), tiny_pipeline(family)
    for name in ("unet", "vae"):
        ours, theirs = getattr(model, name).state_dict(), getattr(pipe, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(model.encode_prompts(["a cat"]).states, dsd.from_pipeline(pipe).encode_prompts(["a cat"]).states)
    assert model.name == str(folders[family])
    assert model.revision is None
    assert str(folders[family]) in repr(model)
    assert dsd.load(str(folders[family])).family == model.family


def test_load_freezes_and_evaluates(folders):
    model = dsd.load(folders["sd15"])
    for network in (model.unet, model.vae, model.clip, *model.text_encoders):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(
    ("given", "dtype"),
    [("bfloat16", torch.bfloat16), ("fp16", torch.float16), (torch.float64, torch.float64), ("float32", torch.float32)],
)
def test_load_dtype(given, dtype, folders):
    model = dsd.load(folders["sd15"], dtype=given)
    assert model.dtype == dtype
    for network in (model.unet, model.vae, model.clip, *model.text_encoders):
        assert {p.dtype for p in network.parameters()} == {dtype}
    assert model.encode_prompts(["a"]).states.dtype == dtype
    assert model.encode_images(torch.zeros(1, 3, 64, 64)).dtype == dtype


@pytest.mark.newest
def test_load_mini():
    model = dsd.load()
    assert model.name == "mini"
    assert model.revision is None
    assert model.image_size == (64, 64)
    assert model.vae_scale_factor == 4
    assert model.clip is not None
    assert model.dtype == torch.float32
    with torch.no_grad():
        assert model.encode_images(torch.zeros(1, 3, 64, 64)).shape == (1, 4, 16, 16)
        out = model.unet(torch.zeros(1, 4, 16, 16), 10, model.encode_prompts(["a red circle"]).states).sample
    assert out.shape == (1, 4, 16, 16)
    files = [file for part in ("unet", "vae", "text_encoder", "clip") for file in (mini.path() / part).iterdir()]
    assert sum(file.stat().st_size for file in files) <= 16_000_000


def test_load_missing_folder(tmp_path):
    refused("model '.*nowhere' is a folder that does not exist", tmp_path / "nowhere")
    refused("model '.*nowhere' is a folder that does not exist", str(tmp_path / "nowhere"))
    refused("model './nowhere' is a folder that does not exist", "./nowhere")
    refused("model 'nowhere' is a folder that does not exist", Path("nowhere"))
    refused("model 'a/b/c' is a folder that does not exist", "a/b/c")
    refused("model is an empty string, expected a folder or a hub id", "")
    refused("model 'sd.safetensors' is a file that does not exist", "sd.safetensors")


def test_load_folder_without_index(folder):
    (folder / "model_index.json").unlink()
    refused("model '.*' has no model_index.json, expected a folder in diffusers' layout", folder)
    (folder / "model_index.json").write_text("{not json")
    refused("model '.*': model_index.json cannot be read", folder)
    (folder / "model_index.json").write_text("[]")
    refused("model '.*': model_index.json holds no JSON object", folder)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_load_missing_component(component, folder):
    shutil.move(folder / component, folder / "elsewhere")
    refused(f"lacks component '{component}': .*{component} does not exist", folder)
    edit(folder / "model_index.json", **{component: [None, None]})
    refused(f"has no component '{component}' in its model_index.json", folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("unet/config.json", "component 'unet' has no config.json"),
        ("unet/diffusion_pytorch_model.safetensors", "component 'unet' has no .safetensors weights"),
        ("text_encoder/model.safetensors", "component 'text_encoder' has no .safetensors weights"),
        ("scheduler/scheduler_config.json", "component 'scheduler' has no scheduler_config.json"),
    ],
)
def test_load_missing_file(file, message, folder):
    (folder / file).unlink()
    refused(message, folder)


def test_load_missing_vocabulary(folder):
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    refused("component 'tokenizer' has neither tokenizer.json nor vocab.json and merges.txt", folder)


@pytest.mark.parametrize(
    ("component", "stem", "pickle"),
    [
        ("unet", "diffusion_pytorch_model", "diffusion_pytorch_model.bin"),
        ("text_encoder", "model", "pytorch_model.bin"),
    ],
)
def test_load_refuses_pickle(component, stem, pickle, folder, monkeypatch):
    weights = load_file(folder / component / f"{stem}.safetensors")
    (folder / component / f"{stem}.safetensors").unlink()
    torch.save(weights, folder / component / pickle)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was opened"))
    refused(f"component '{component}' has its weights only as pickle .{pickle}., which can run code", folder)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "clip"])
def test_load_refuses_incomplete_weights(component, folder):
    # Libraries would fill the gap with random numbers and only warn.
    (file,) = (folder / component).glob("*.safetensors")
    weights = load_file(file)
    key = sorted(key for key in weights if key.endswith("weight"))[0]
    del weights[key]
    save_file(weights, file, metadata={"format": "pt"})
    refused(f"{component}' .*cannot be loaded: its weights lack 1 tensors, the first", folder)


def test_load_refuses_broken_weights(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    error = refused("component 'unet' of model '.*' cannot be loaded: ", folder)
    assert error.__cause__ is not None
    file.write_bytes(whole)
    edit(folder / "text_encoder" / "config.json", intermediate_size=40)
    refused(
        r"'text_encoder' .* cannot be loaded: 9 of its tensors .* the first, 'encoder.layers.0.mlp.fc1.bias', \(48,\), "
        r"expected \(40,\)",
        folder,
    )
    edit(folder / "unet" / "config.json", block_out_channels=[16, 32, 32, 48])
    refused(r"component 'unet' of model '.*' cannot be loaded: .*_blocks\.\d\..*\[(48|32)", folder)


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline", "DiTPipeline", None])
def test_load_refuses_other_pipelines(name, folder):
    edit(folder / "model_index.json", _class_name=name)
    refused(f"model '.*' is a {name}, expected StableDiffusionPipeline or .*StableDiffusionXLPipeline", folder)


@pytest.mark.parametrize(
    ("component", "given", "expected"),
    [
        ("unet", "UNet3DConditionModel", "UNet2DConditionModel"),
        ("vae", "AutoencoderTiny", "AutoencoderKL"),
        ("text_encoder", "T5EncoderModel", "CLIPTextModel"),
    ],
)
def test_load_refuses_other_components(component, given, expected, folder):
    edit(folder / "model_index.json", **{component: ["diffusers", given]})
    refused(f"component '{component}' is a {given}, expected {expected}", folder)


def test_load_refuses_other_unets(folder):
    edit(folder / "unet" / "config.json", in_channels=9)
    refused("in_channels = 9 .an inpainting UNet., expected the VAE's 4", folder)


def test_load_refuses_other_schedulers(folder):
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="Nothing")
    refused("component 'scheduler' of model '.*' cannot be loaded: .*'Nothing', expected the name of", folder)
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")
    refused("scheduler is a FlowMatchEulerDiscreteScheduler, expected one of a discrete", folder)


@pytest.mark.parametrize("dtype", ["float8", "int8", torch.int32, None, 16])
def test_load_bad_dtype(dtype):
    refused("dtype is .*, expected float32, float16, bfloat16 or float64", dtype=dtype)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device is 'gpu', expected cpu, cuda or cuda:N"),
        ("cuda:99", "device is 'cuda:99', but torch sees [0-9]+ devices of type 'cuda'"),
        ("mps:7", "device is 'mps:7', but torch sees [01] devices of type 'mps'"),
        ("meta", "device is 'meta', expected one that holds weights"),
        (None, "device is None, expected cpu, cuda or cuda:N"),
    ],
)
def test_load_bad_device(device, message):
    refused(message, device=device)


def test_load_bad_revision(folder, tmp_path):
    refused("revision is 'main', but model '.*' is a folder; expected a hub id", folder, revision="main")
    refused("revision is 'main', but model 'mini' is a folder", revision="main")
    refused(
        "model 'someone/sd' at revision 'v2' is neither a folder nor in the hub cache, and the hub was not asked",
        "someone/sd",
        revision="v2",
        cache_dir=tmp_path,
    )


def test_load_variant(folder):
    refused(
        "has no weights of variant 'fp16', but diffusion_pytorch_model.safetensors; choose with variant=",
        folder,
        variant="fp16",
    )
    wanted = dsd.load(folder)
    # Networks that have none of it are taken as they are, as diffusers takes them; here the VAE.
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    wanted.unet.save_pretrained(folder / "unet", variant="fp16", max_shard_size="1MB")
    assert (folder / "unet/diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    (folder / "text_encoder/model.safetensors").rename(folder / "text_encoder/model.fp16.safetensors")
    model = dsd.load(folder, variant="fp16")
    for got, want in zip(networks(model), networks(wanted), strict=True):
        assert all(torch.equal(value, want.state_dict()[key]) for key, value in got.state_dict().items())
    refused("'unet' has no weights without a variant, but diffusion_pytorch_model.fp16", folder)


def networks(model):
    return (model.unet, model.vae, *model.text_encoders)


def test_load_sharded_weights(folder):
    unet = dsd.load(folder).unet
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="1MB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    again = dsd.load(folder).unet.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in unet.state_dict().items())


def hub_error(kind):
    error = kind.__new__(kind)
    Exception.__init__(error, "from the hub\nand more")
    return error


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (hub_errors.RepositoryNotFoundError, "is neither a folder nor a repository on the hub"),
        (hub_errors.GatedRepoError, "is gated: its terms must be accepted on the hub"),
        (hub_errors.RevisionNotFoundError, "the repository has no such revision; expected a branch, tag or commit"),
        (hub_errors.LocalEntryNotFoundError, "nor in the hub cache"),
        (hub_errors.HfHubHTTPError, "cannot be downloaded"),
        (OSError, "cannot be downloaded: from the hub and more"),
        (RuntimeError, "cannot be downloaded: from the hub and more"),
    ],
)
def test_load_hub_errors(kind, message, monkeypatch):
    def fail(*args, **kwargs):
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    error = refused(f"model 'someone/sd' at revision 'x'.* {message}|{message}", "someone/sd", revision="x")
    assert isinstance(error.__cause__, kind)


def test_load_bad_hub_id():
    refused("model 'not a/hub id' is neither a folder nor a valid hub id", "not a/hub id")


def test_load_from_the_hub(folders, monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(repo, **options):
        asked.update(options, repo=repo)
        return str(shutil.copytree(folders["sdxl"], tmp_path / "snapshots" / "c0ffee"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = dsd.load("someone/sd", revision="main", local_files_only=True, cache_dir=tmp_path)
    assert (model.name, model.revision, model.family) == ("someone/sd", "c0ffee", "sdxl")
    assert asked["repo"] == "someone/sd"
    assert asked["revision"] == "main"
    assert asked["local_files_only"] is True
    assert asked["cache_dir"] == tmp_path


def test_a_variant_of_some_parts_from_the_hub(folders, monkeypatch, tmp_path):
    asked = []

    def snapshot_download(repo, *, revision, allow_patterns, **options):
        asked.append(revision)
        files = [str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()]
        for file in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file, folder / file)
        return str(folder)

    source, folder = shutil.copytree(folders["sd15"], tmp_path / "hub"), tmp_path / "c0ffee"
    plain = source / "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(plain, plain.with_suffix(".fp16.safetensors"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert dsd.load("someone/sd", variant="fp16").revision == "c0ffee"
    assert asked == [None, "c0ffee"]
    # What is not needed is not downloaded.
    assert [file.name for file in (folder / "unet").glob("*.safetensors")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]


def test_load_from_the_cache(folders, tmp_path):
    # The hub's own layout of its cache; the commit is what the branch pointed at.
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--sd"
    shutil.copytree(folders["sd15"], repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for revision in (None, "main", commit):
        model = dsd.load("someone/sd", revision=revision, cache_dir=tmp_path, local_files_only=True)
        assert (model.name, model.revision) == ("someone/sd", commit)
    refused("model 'someone/sd' at revision 'v2' is neither", "someone/sd", revision="v2", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("variant", "wanted", "unwanted"),
    [
        (
            None,
            [
                "model_index.json",
                "unet/diffusion_pytorch_model.safetensors",
                "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
                "unet/diffusion_pytorch_model.safetensors.index.json",
                "text_encoder_2/model.safetensors",
                "tokenizer/vocab.json",
                "scheduler/scheduler_config.json",
            ],
            [
                "unet/diffusion_pytorch_model.fp16.safetensors",
                "unet/diffusion_pytorch_model.non_ema.safetensors",
                "unet/diffusion_pytorch_model.bin",
                "safety_checker/model.safetensors",
                "v1-5-pruned.safetensors",
                "unet/openvino_model.bin",
            ],
        ),
        (
            "fp16",
            [
                "unet/diffusion_pytorch_model.fp16.safetensors",
                "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            ],
            ["unet/diffusion_pytorch_model.safetensors"],
        ),
    ],
)
def test_files_asked_from_the_hub(variant, wanted, unwanted):
    kept = list(huggingface_hub.utils.filter_repo_objects(wanted + unwanted, allow_patterns=_patterns(variant)))
    assert kept == wanted


def test_clip(folders, tmp_path):
    expected = tiny_clip().state_dict()
    for model in (
        dsd.load(folders["sd15"]),
        dsd.load(folders["sd21"], clip=folders["sd15"] / "clip"),
        dsd.from_pipeline(tiny_pipeline("sd21"), clip=str(folders["sd15"] / "clip")),
    ):
        assert all(torch.equal(value, expected[key]) for key, value in model.clip.state_dict().items())
        assert not any(parameter.requires_grad for parameter in model.clip.parameters())
    assert dsd.load(folders["sd21"]).clip is None
    own = tiny_clip(seed=1)
    assert dsd.from_pipeline(tiny_pipeline("sd21"), clip=own).clip is own
    assert all(parameter.requires_grad for parameter in own.parameters())


def test_clip_refused(folders, tmp_path):
    sd21 = folders["sd21"]
    refused("clip '.*nowhere' is a folder that does not exist", sd21, clip=tmp_path / "nowhere")
    refused("clip 'someone/clip' is neither a folder nor in the hub cache", sd21, clip="someone/clip")
    refused("clip '.*' has no config.json", sd21, clip=tmp_path)
    refused("clip '.*' is a model of type 'clip_text_model', expected 'clip'", sd21, clip=sd21 / "text_encoder")
    refused("clip is of type int, expected a CLIPModel, a folder or a hub id", sd21, clip=3)


def test_offline_in_a_fresh_process(folders):
    # HF_HUB_OFFLINE is read once per process; no library may look for the network while a folder is loaded.
    code = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise SystemExit('network')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "import dsd_fast as dsd\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
        f"model = dsd.load({str(folders['sd15'])!r})\n"
        "try: dsd.load('someone/sd', local_files_only=True)\n"
        "except dsd.models.ModelError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "nor in the hub cache" in result.stdout
