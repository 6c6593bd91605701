"""What is learned lives in the matcher: the model that it shares stays as it is, bit for bit."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import dsd_fast as dsd
from dsd_fast.diffusion import noise
from dsd_fast.matching.fitting.config import FitConfig
from tests.matching.fitting.parts import TEXTS, TIMES, groups, learned, matcher, pictures, pipeline, using
from tests.tiny import load_tiny_lora

ALL = ("lora", "prompt", "heads")
FIT = FitConfig(steps=1, batch_size=2, learning_rate=3e-2, warmup=0)


def networks(model):
    return (model.unet, model.vae, *model.text_encoders)


def snapshot(model):
    """Everything of the networks that a fit could change; weights as copies."""
    return [
        {
            "weights": {name: (p.data_ptr(), p.detach().clone()) for name, p in network.state_dict().items()},
            "modules": [(name, id(module), module.training) for name, module in network.named_modules()],
            "gradients": [(name, p.requires_grad, p.grad) for name, p in network.named_parameters()],
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in network.modules()],
            "adapters": copy.deepcopy(getattr(network, "peft_config", None)),
            "active": [getattr(module, "active_adapters", None) for module in network.modules()],
        }
        for network in networks(model)
    ]


def assert_same(before, after):
    for was, now in zip(before, after, strict=True):
        assert was["weights"].keys() == now["weights"].keys()
        for name, (place, value) in was["weights"].items():
            assert now["weights"][name][0] == place, name
            assert torch.equal(now["weights"][name][1], value), name
        for key in was.keys() - {"weights"}:
            assert was[key] == now[key], key


def test_the_shared_model_is_untouched(tmp_path):
    pipe = pipeline()
    load_tiny_lora(pipe, "sd15", tmp_path, adapter_name="x")
    pipe.unet.requires_grad_(True)
    pipe.text_encoder.requires_grad_(True)
    pipe.unet.mid_block.train()
    other = matcher(pipe)
    own = dsd.Matcher(other.model, other.config)
    images = pictures(2)
    want, before, random = other.score(images, TEXTS), snapshot(other.model), torch.get_rng_state()
    seen = []

    def callback(step, loss, record):
        seen.append(torch.equal(other.score(images, TEXTS), want))
        assert_same(before, snapshot(other.model))

    own.fit(groups(), ALL, config=FIT, callback=callback, progress=False)
    assert seen == [True] * 2
    assert_same(before, snapshot(other.model))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(other.score(images, TEXTS), want)
    assert own.model is other.model
    fitted = own.score(images, TEXTS)
    assert not torch.equal(fitted, want)
    # One that is made on the model later has learned nothing either.
    assert torch.equal(dsd.Matcher(other.model, other.config).score(images, TEXTS), want)

    own.save(tmp_path / "saved")
    loaded = dsd.Matcher.load(tmp_path / "saved", other.model)
    assert torch.equal(torch.get_rng_state(), random)
    assert_same(before, snapshot(other.model))
    assert torch.equal(loaded.score(images, TEXTS), fitted)


def test_a_failed_fit_changes_nothing():
    own = matcher(pipeline())
    want, before = own.score(pictures(1), TEXTS), snapshot(own.model)

    def callback(step, loss, record):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        own.fit(groups(), ALL, config=FIT, callback=callback, progress=False)
    assert torch.equal(own.score(pictures(1), TEXTS), want)
    assert_same(before, snapshot(own.model))


def test_matchers_of_one_model_do_not_see_each_other():
    base = matcher(pipeline())
    images = pictures(2)
    alone = []
    for seed in (0, 1):
        own = matcher(pipeline())
        own.fit(groups(seed), ALL[seed:], config=FIT, progress=False)
        alone.append(own.score(images, TEXTS))
    both = [dsd.Matcher(base.model, base.config) for _ in range(2)]
    for seed, own in enumerate(both):
        own.fit(groups(seed), ALL[seed:], config=FIT, progress=False)
    wanted = [base.score(images, TEXTS), *alone]
    assert not torch.equal(*alone)
    for own, want in zip((base, *both), wanted, strict=True):
        assert torch.equal(own.score(images, TEXTS), want)

    # At once, in threads that begin together.
    barrier = threading.Barrier(3)

    def score(own):
        barrier.wait()
        return [own.score(images, TEXTS) for _ in range(4)]

    with ThreadPoolExecutor(3) as pool:
        for rounds, want in zip(pool.map(score, (base, *both)), wanted, strict=True):
            assert all(torch.equal(got, want) for got in rounds)


def test_a_second_fit_goes_on_from_the_first():
    own = matcher(pipeline())
    images = pictures(1)
    own.fit(groups(), ("lora", "heads"), config=FIT, progress=False)
    first, before = own._scorer, own.score(images, TEXTS)
    weights = {name: p.clone() for name, p in first.model.unet.state_dict().items() if ".fitted." in name}
    kept = own.layers
    own.fit(groups(), "prompt", config=FIT, progress=False)
    # What the second does not train stays.
    now = {name: p for name, p in own._scorer.model.unet.state_dict().items() if ".fitted." in name}
    assert all(torch.equal(now[name], value) for name, value in weights.items())
    assert all(torch.equal(own.layers[name], value) for name, value in kept.items())
    own.fit(groups(), "lora", config=FIT, progress=False)
    now = {name: p for name, p in own._scorer.model.unet.state_dict().items() if ".fitted." in name}
    assert now.keys() == weights.keys()
    assert not any(torch.equal(now[name], value) for name, value in weights.items() if "lora_B" in name and value.any())
    # The first matcher's LoRA has memory of its own.
    assert all(torch.equal(first.model.unet.state_dict()[name], value) for name, value in weights.items())
    assert not torch.equal(own.score(images, TEXTS), before)
    for name, value in (("rank", 2), ("attention", "all"), ("prompt_tokens", 2)):
        method = "prompt" if name == "prompt_tokens" else "lora"
        with pytest.raises(ValueError, match=rf"{name}: the matcher"):
            own.fit(groups(), method, config=FitConfig(steps=1, **{name: value}), progress=False)


@pytest.mark.parametrize("adapter", [None, "x", ()], ids=["as-it-stands", "x", "none"])
def test_before_the_first_step_a_lora_changes_nothing(tmp_path, adapter):
    """The user's own adapter stays on, or off, under the new one."""
    pipe = pipeline()
    load_tiny_lora(pipe, "sd15", tmp_path, adapter_name="x")
    images = pictures(2)
    own = matcher(pipe, adapter)
    want = own.score(images, TEXTS)
    fresh = matcher(pipe, adapter)
    # Steps too small to be seen beside any number of float32.
    fresh.fit(groups(), config=FitConfig(steps=1, learning_rate=1e-40, weight_decay=0.0), progress=False)
    assert torch.equal(fresh.score(images, TEXTS), want)
    other = matcher(pipe, "x" if adapter == () else ())
    assert not torch.equal(other.score(images, TEXTS), want)
    if adapter != "x":
        return
    fresh.fit(groups(), config=FIT, progress=False)
    fitted = fresh.score(images, TEXTS)
    assert not torch.equal(fitted, want)
    fresh.save(tmp_path / "saved")
    assert torch.equal(dsd.Matcher.load(tmp_path / "saved", fresh.model).score(images, TEXTS), fitted)


def test_heads_alone_run_the_network_without_gradients():
    pipe = pipeline()
    pipe.unet.requires_grad_(True)
    modes = []
    own = matcher(pipe)
    before = own.layers
    with torch.no_grad():
        want = own.score(pictures(1), TEXTS)
    pipe.unet.conv_out.register_forward_hook(lambda m, a, out: modes.append(out.requires_grad))
    own.fit(groups(), "heads", config=FIT, progress=False)
    assert modes
    assert not any(modes)
    assert all(p.grad is None for p in pipe.unet.parameters())
    assert own.model.unet is pipe.unet
    assert own.layers.keys() == before.keys()
    assert all(not torch.equal(own.layers[name], value) for name, value in before.items())
    assert own.config.layers == {name: tuple(value.tolist()) for name, value in own.layers.items()}
    # They are the configuration's, nothing else is needed.
    again = dsd.Matcher(own.model, own.config)
    assert torch.equal(again.score(pictures(1), TEXTS), own.score(pictures(1), TEXTS))
    assert not torch.equal(own.score(pictures(1), TEXTS), want)


def test_prompt_alone_gives_the_models_parameters_no_gradient():
    pipe = pipeline()
    for network in (pipe.unet, pipe.text_encoder, pipe.vae):
        network.requires_grad_(True)
    own = matcher(pipe)
    own.fit(groups(), "prompt", config=FIT, progress=False)
    assert all(p.grad is None for network in networks(own.model) for p in network.parameters())
    assert own.model.unet is pipe.unet
    assert own._scorer.prompt.shape == (FIT.prompt_tokens, 24)
    assert not own._scorer.prompt.requires_grad


@pytest.mark.parametrize("tokens", ["all", "real"])
def test_learned_vectors_follow_the_tokens_and_the_unconditional_row_has_none(tokens):
    made = learned(pipeline(), ("prompt",), tokens=tokens)
    own = matcher(pipeline(), tokens=tokens)
    with torch.no_grad():
        made.parameters["prompt"].add_(torch.randn(FIT.prompt_tokens, 24, generator=torch.Generator().manual_seed(0)))
    own = using(own, made.current())
    image, text = pictures(1)[0], TEXTS[0]
    got = float(own.score([image], [text]))

    model, plan = own.model, own._scorer.plan
    clean = own._latent(image)
    total = 0.0
    with torch.no_grad():
        said, absent = model.encode_prompts([text]), model.encode_unconditional()
        states = torch.cat([said.states, made.parameters["prompt"][None]], dim=1)
        mask = torch.ones(1, states.shape[1], dtype=torch.bool)
        if tokens == "real":
            mask[0, int(said.lengths) : 77] = False
        for draw, t in enumerate(TIMES):
            epsilon = noise(0, draw, clean.shape[1:])[None]
            noised = model.schedule.add_noise(clean, epsilon, [t])
            errors, attention = [], []
            for values, counted in ((states, mask), (absent.states, None)):
                out = plan.run(noised, [t], plan.encode_text(values, score_mask=counted))
                errors.append(float((epsilon - out.noise_pred).norm()))
                attention.append(sum(float(value.mean()) for value in out.scores.values()) / len(out.scores))
            total += 0.5 * attention[0] + errors[1] - errors[0]
    assert got == pytest.approx(total / len(TIMES), rel=1e-5)
    begin = matcher(pipeline(), tokens=tokens).score([image], [text])
    assert abs(got - float(begin)) > 1e-2
