"""Tuning against a plain loop on the stock pipeline, and what becomes of a converter."""

from dataclasses import replace

import pytest
import torch

from dsd_fast.image_prompt import TuneConfig
from dsd_fast.image_prompt.deep_prompts import PromptedVision
from dsd_fast.reference import image_prompt as reference
from dsd_fast.training import seed_of
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
        vision = reference.DeepPrompts(clip, config.prompt_tokens, dropout=0.0)
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
        h = reference.vectors(clip, pixels[rows], cut=0.1, norm=own.map.norm, vision=vision)
        loss = reference.tuning_loss(pipe, h, latents[rows], torch.stack(times), torch.stack(noise).double()).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for each in groups.values() for p in each.values()], config.clip_norm)
        for group in adam.param_groups:
            falls = min(1.0, 2 * (1 - step / config.steps))
            group["lr"] = rates[group["key"]] * min(1.0, (step + 1) / config.warmup) * falls
        adam.step()
        losses.append(float(loss))
    return groups, losses


def _resized(images):
    """As the VAE is shown them."""
    from dsd_fast.images import load_image, to_tensor

    side = SIDE * converter().model.vae_scale_factor
    return [to_tensor(load_image(each), (side, side)).numpy() for each in images]


@pytest.mark.parametrize(
    "settings",
    [{}, {"attention": "full"}, {"attention": None}, {"prompt_tokens": 0, "steps": 2}],
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
