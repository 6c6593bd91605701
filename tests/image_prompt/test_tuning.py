"""Tuning against a plain loop on the stock pipeline, and what becomes of a converter."""

import json
from dataclasses import replace

import pytest
import torch

import dsd_fast as dsd
from dsd_fast.engine.noise_loss import NoiseLoss
from dsd_fast.image_prompt import ImagePromptConverter, TuneConfig
from dsd_fast.image_prompt.deep_prompts import PromptedVision
from dsd_fast.image_prompt.files import ABOUT, LORA, PROMPTS
from dsd_fast.image_prompt.tuning import Pictures
from dsd_fast.jobs import LockedError, locked, read_tensors
from dsd_fast.reference import image_prompt as reference
from dsd_fast.training import CHECKPOINT, seed_of, seeded
from dsd_fast.training.order import batch_of
from tests.image_prompt.parts import SIDE, converter, pictures, pipeline

CONFIG = TuneConfig(
    steps=3,
    batch_size=2,
    rank=2,
    prompt_tokens=3,
    prompt_dropout=0.0,
    learning_rate=0.02,
    prompt_learning_rate=0.01,
    weight_decay=0.1,
    clip_norm=1e-3,
    warmup=2,
    validate_every=2,
    save_every=0,
)


def tuned(config=CONFIG, own=None, **options):
    own = own or converter()
    return own.finetune(pictures(3), config, progress=False, **options)


def unet_parameters(found, lora=".fitted."):
    return {
        name.replace(".fitted.", ".x."): value for name, value in found.model.unet.named_parameters() if lora in name
    }


@pytest.fixture(scope="module")
def first():
    """What a tuning begins with."""
    return tuned(replace(CONFIG, learning_rate=1e-300, prompt_learning_rate=1e-300, steps=1))


def plain(config, begin, full=False):
    """The same steps by hand: the network of diffusers, torch's optimiser."""
    own = converter()
    pipe, clip = pipeline()
    pipe.scheduler.alphas_cumprod = own.model.schedule.alphas_cumprod
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, clip):
        part.requires_grad_(False)
    groups = {}
    if full:
        names = [f"attn2.to_{letter}.weight" for letter in "kv"]
        groups["unet"] = {n: p for n, p in pipe.unet.named_parameters() if n.endswith(tuple(names))}
    elif config.attention == "lora":
        from peft import LoraConfig

        targets = ["attn2.to_k", "attn2.to_v"]
        pipe.unet.add_adapter(LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=targets), "x")
        groups["unet"] = {name: p for name, p in pipe.unet.named_parameters() if ".x." in name}
        values = unet_parameters(begin)
        assert values.keys() == groups["unet"].keys()
        for name, parameter in groups["unet"].items():
            parameter.data = values[name].detach().clone()
    vision = clip.vision_model
    if config.prompt_tokens:
        vision = reference.DeepPrompts(clip, config.prompt_tokens, dropout=config.prompt_dropout)
        vision.load_state_dict(begin.vision.prompts.state_dict())
        groups["prompts"] = dict(vision.named_parameters())
    for parameters in groups.values():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
    rates = {"unet": config.learning_rate, "prompts": config.prompt_learning_rate}
    options = [
        {"params": [p], "lr": rates[key], "weight_decay": config.weight_decay * (p.ndim > 1), "key": key}
        for key, parameters in groups.items()
        for p in parameters.values()
    ]
    adam = torch.optim.AdamW(options)
    latents = torch.cat([own.engine.encode_images([torch.from_numpy(image)]) for image in _resized(pictures(3))])
    pixels = torch.stack(list(own.prepared(pictures(3)))).double()
    losses = []
    for step in range(config.steps):
        rows = batch_of(3, config.batch_size, step, config.seed)
        times, noise = [], []
        for n in range(len(rows)):
            random = torch.Generator().manual_seed(seed_of(config.seed, step, n))
            times.append(torch.randint(1000, (), generator=random))
            noise.append(torch.randn(latents.shape[1:], generator=random))
        with seeded(seed_of(config.seed, step, 0, 2), torch.device("cpu")):
            h = reference.vectors(clip, pixels[rows], cut=0.1, norm=own.map.norm, vision=vision)
        loss = reference.tuning_loss(pipe, h, latents[rows], torch.stack(times), torch.stack(noise).double()).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for each in groups.values() for p in each.values()], config.clip_norm)
        for group in adam.param_groups:
            falls = min(1.0, 2 * (1 - step / config.steps))
            group["lr"] = rates[group["key"]] * min(1.0, (step + 1) / config.warmup) * falls
        adam.step()
        losses.append(loss.item())
    return groups, losses


def _resized(images):
    """As the VAE is shown them."""
    from dsd_fast.images import load_image, to_tensor

    side = SIDE * converter().model.vae_scale_factor
    return [to_tensor(load_image(each), (side, side)).numpy() for each in images]


@pytest.mark.parametrize(
    "settings",
    [{"prompt_dropout": 0.3}, {"attention": "full"}, {"attention": None}, {"prompt_tokens": 0, "steps": 2}],
    ids=["lora and prompts", "full", "prompts alone", "lora alone"],
)
def test_steps_are_those_of_a_plain_loop(settings, first):
    """In float64: both round at 1e-16, which Adam's quotients bring to 1e-9 at most."""
    config, losses = replace(CONFIG, **settings), {}
    found = tuned(config, callback=lambda step, loss, _: losses.setdefault(step, loss))
    groups, right = plain(config, first, full=config.attention == "full")
    assert list(losses.values())[: config.steps] == pytest.approx(right, rel=1e-10)
    network = dict(found.model.unet.named_parameters())
    for name, value in groups.get("unet", {}).items():
        own = network[name.replace(".x.", f".{found.lora}.")]
        assert (own - value).abs().max() <= 1e-9
        if config.attention == "full":
            assert (own - dict(converter().model.unet.named_parameters())[name]).abs().max() > 1e-3
    for name, value in groups.get("prompts", {}).items():
        assert (found.vision.prompts.get_parameter(name.replace("clip.", "")) - value).abs().max() <= 1e-9
    assert isinstance(found.vision, PromptedVision) == bool(config.prompt_tokens)
    assert found.tuning.parameters == sum(p.numel() for each in groups.values() for p in each.values())


def weights(own):
    parts = {"unet": own.model.unet, "vision": own.vision}
    return {f"{part}.{name}": value.clone() for part, net in parts.items() for name, value in net.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_what_was_learned_is_kept_in_a_folder_and_the_rest_stays_as_it_is(tmp_path):
    own = converter()
    before, wanting = weights(own), [p.requires_grad for p in own.model.unet.parameters()]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = tuned(replace(CONFIG, prompt_dropout=0.5), out=tmp_path)
    assert same(weights(own), before)
    assert [p.requires_grad for p in own.model.unet.parameters()] == wanting
    assert all(p.grad is None for p in (*own.model.unet.parameters(), *own.vision.parameters()))
    assert own.tuning is None
    assert own.lora is None
    assert not any(p.requires_grad for p in (*found.model.unet.parameters(), *found.vision.parameters()))
    shown = pictures(2, seed=5)
    prompt, plain = found.convert(shown), own.convert(shown)
    assert (prompt.vectors - plain.vectors).norm() > 0.01 * plain.vectors.norm()
    # Nothing is left out any more.
    assert torch.equal(found.convert(shown).vectors, prompt.vectors)
    read = ImagePromptConverter.load(tmp_path, own.model, own.model.clip)
    assert same(weights(read), weights(found))
    assert torch.equal(read.convert(shown).vectors, prompt.vectors)
    read.save(tmp_path / "again")
    for name in (PROMPTS, ABOUT):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    settings = dsd.GenerateConfig(steps=2, guidance=3.0, scheduler="ddim")
    made = {
        key: [image.tobytes() for image in dsd.generate(each.model, prompt, settings, seeds=[1, 2])]
        for key, each in {"found": found, "read": read, "plain": own}.items()
    }
    assert made["found"] == made["read"]
    assert made["found"] != made["plain"]
    pipe, _ = pipeline()
    pipe.load_lora_weights(tmp_path, weight_name=LORA)
    theirs = {name.replace(".default_0.", ".fitted."): p for name, p in pipe.unet.named_parameters() if "lora" in name}
    assert len(theirs) == 2 * len(_kv(own))
    for name, value in theirs.items():
        assert torch.equal(value, dict(found.model.unet.named_parameters())[name])


def _kv(own):
    return [name for name, _ in own.model.unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]


@pytest.mark.parametrize("attention", ["lora", "full"])
def test_a_second_tuning_goes_on_from_the_first(attention, tmp_path):
    config = replace(CONFIG, attention=attention, steps=1)
    one = tuned(config)
    before = weights(one)
    two = tuned(replace(config, seed=1), own=one)
    assert same(weights(one), before)
    after = weights(two)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    # No more than AdamW's first step moves anything.
    assert all((after[name] - before[name]).abs().max() < 0.03 for name in moved)
    assert len(moved) == len(one.vision.prompts.state_dict()) + len(_kv(one)) * (2 if attention == "lora" else 1)
    two.save(tmp_path)
    assert same(weights(ImagePromptConverter.load(tmp_path, converter().model, converter().model.clip)), after)
    with pytest.raises(ValueError, match="prompt_tokens: got 4, expected 3"):
        tuned(replace(config, prompt_tokens=4), own=one)
    if attention == "lora":
        with pytest.raises(ValueError, match="rank: got 4, expected 2"):
            tuned(replace(config, rank=4), own=one)


def test_an_interrupted_tuning_leaves_what_it_went_on_from_as_it_was(monkeypatch):
    """Deep prompts that are not learned any more are the first converter's own, and are not left out in parts."""
    one = tuned(replace(CONFIG, steps=1))
    shown = pictures(1, seed=5)
    before, seen = one.convert(shown).vectors, []

    def stopped(self, *given):
        seen.append(one.vision.prompts.dropout)
        raise KeyboardInterrupt

    monkeypatch.setattr(NoiseLoss, "__call__", stopped)
    with pytest.raises(KeyboardInterrupt):
        tuned(replace(CONFIG, prompt_tokens=0, prompt_dropout=0.5), own=one)
    assert seen == [0.0]
    assert torch.equal(one.convert(shown).vectors, before)


@pytest.mark.parametrize("stop", [(1, False), (2, True)], ids=["in a step", "at a record"])
def test_an_interrupted_tuning_goes_on(tmp_path, stop):
    config = replace(CONFIG, prompt_dropout=0.3)
    options = {"validation": pictures(2, seed=9)}

    def interrupt(step, loss, record):
        if stop == (step, record is not None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(config, out=tmp_path / "killed", callback=interrupt, **options)
    assert read_tensors(tmp_path / "killed" / CHECKPOINT)[1]["step"] == stop[0]
    assert not (tmp_path / "killed" / ABOUT).exists()
    with pytest.raises(ValueError, match=r"differs in tune\.seed"):
        tuned(replace(config, seed=1), out=tmp_path / "killed", **options)
    with locked(tmp_path / "killed"), pytest.raises(LockedError):
        tuned(config, out=tmp_path / "killed", **options)
    steps = []
    again = tuned(config, out=tmp_path / "killed", callback=lambda step, loss, _: steps.append((step, loss)), **options)
    assert min(step for step, loss in steps if loss is not None) == stop[0] + 1
    whole = tuned(config, out=tmp_path / "whole", **options)
    assert again.tuning.history == whole.tuning.history
    assert same(weights(again), weights(whole))
    for name in (PROMPTS, ABOUT, CHECKPOINT):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    records = whole.tuning.history.records
    losses = [record.validation_loss for record in records]
    assert [record.step for record in records] == [0, 2, 3]
    assert whole.tuning.history.best_step == records[losses.index(min(losses))].step


@pytest.mark.parametrize("shape", [(20, 31), (47, 20), (20, 20)])
def test_the_vae_is_shown_the_centre_as_clip_is(shape):
    own, image = converter(), pictures(1, side=48)[0][: shape[0], : shape[1]]
    found = Pictures(own, [image])
    top, left = ((side - 20) // 2 for side in shape)
    cut = image[top : top + 20, left : left + 20]
    (pixels,) = _resized([cut])
    torch.testing.assert_close(found.latents, own.engine.encode_images([torch.from_numpy(pixels)]).cpu())
    torch.testing.assert_close(found.prepared[0], next(own.prepared([image])))


@pytest.mark.parametrize(("family", "dtype"), [("sdxl", torch.float32), ("sd15", torch.bfloat16)])
def test_other_families_and_types(family, dtype):
    own = converter(dtype, family)
    found = tuned(replace(CONFIG, batch_size=1, learning_rate=1e-6, clip_norm=1.0), own=own)
    moved = unet_parameters(found)
    # Too small a step for 16 bits, were the matrices in them.
    assert all(value.dtype == torch.float32 for value in moved.values())
    assert all(value.abs().max() > 0 for name, value in moved.items() if ".lora_B." in name)
    assert found.vision.prompts.prompt_proj.weight.dtype == torch.float32
    assert found.convert(pictures(1)).vectors.dtype == dtype
    if dtype == torch.bfloat16:
        with pytest.raises(ValueError, match=r"attention: got 'full' for a UNet of torch\.bfloat16"):
            tuned(replace(CONFIG, attention="full"), own=own)


def test_few_images_are_tuned_to_with_their_own_defaults():
    seen = []
    found = converter().customize(pictures(1), 2, callback=lambda step, *_: seen.append(step), progress=False)
    assert seen == [1, 2, 2]
    assert found.tuning.history.steps == 2
    assert found.tuning.seconds > 0
    assert found.tuning.peak_bytes > 0
    assert found.lora is not None
    assert found.vision is converter().vision


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ([], {}, "images: got none"),
        (pictures(1)[0], {}, "image"),
        (pictures(1), {"validation": []}, "validation: got none"),
        (pictures(1), {"config": replace(CONFIG, patience=1)}, "patience: needs validation"),
        (pictures(1), {"config": replace(CONFIG, timestep_range=(0, 1001))}, r"expected at most \(0, 1000\)"),
    ],
)
def test_what_cannot_be_tuned_to_is_refused(images, options, message):
    with pytest.raises(ValueError, match=message):
        converter().finetune(images, **options)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"steps": 0}, "steps"),
        ({"attention": "all"}, "attention"),
        ({"prompt_dropout": 1.0}, "prompt_dropout"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"timestep_range": (5, 5)}, "timestep_range"),
        ({"attention": None, "prompt_tokens": 0}, "prompt_tokens"),
    ],
)
def test_settings_are_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=f"{name}: got"):
        TuneConfig(**settings)


def test_folders_of_others_are_refused(tmp_path):
    own = converter()
    tuned(replace(CONFIG, steps=1), out=tmp_path)

    def load():
        return ImagePromptConverter.load(tmp_path, own.model, own.model.clip)

    about = json.loads((tmp_path / ABOUT).read_text())
    for change, message in (
        ({"model": {**about["model"], "family": "sdxl"}}, "family sdxl, got sd1"),
        ({"format": 2}, "another format"),
        ({"vision": {**about["vision"], "weights": "0"}}, "another CLIP's image encoder"),
        ({"config": {**about["config"], "cot": 1}}, "unknown settings: cot"),
    ):
        (tmp_path / ABOUT).write_text(json.dumps({**about, **change}))
        with pytest.raises(ValueError, match=message):
            load()
    (tmp_path / ABOUT).write_text(json.dumps({**about, "model": {**about["model"], "name": "other"}}))
    with pytest.warns(UserWarning, match="was fitted to another model: name 'other'") as told:
        load()
    assert told[0].filename == __file__
    (tmp_path / ABOUT).write_text(json.dumps({**about, "strengths": [{"style": [1.0]}, {}], "strengths_by_layer": ""}))
    with pytest.warns(
        UserWarning, match=r"was fitted under the adapters \[{'style': \[1\.0\]}, {}\], now \[{}, {}\]"
    ) as told:
        load()
    assert told[0].filename == __file__
    (tmp_path / ABOUT).write_text(json.dumps(about))
    for name in (LORA, PROMPTS):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:100])
        with pytest.raises(ValueError, match="no safetensors file"):
            load()
        (tmp_path / name).unlink()
        with pytest.raises(ValueError, match="is missing"):
            load()
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"has no {ABOUT}"):
        ImagePromptConverter.load(tmp_path / "none", own.model, own.model.clip)
