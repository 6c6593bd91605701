"""Learning against the official loop written plainly, and classes together against each alone."""

import json
import math
import signal
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

import dsd_fast as dsd
from dsd_fast.class_tokens import ClassTokenLearner
from dsd_fast.class_tokens.gradients import ThroughImages, ThroughNoise
from dsd_fast.class_tokens.learning import CHECKPOINT, Learning
from dsd_fast.class_tokens.prompts import Prompts
from dsd_fast.engine import Engine
from dsd_fast.generation import GenerateConfig, Sampler
from dsd_fast.generation.rows import GenerateRow
from dsd_fast.images import load_image, to_tensor
from dsd_fast.models.splice import Splice
from dsd_fast.reference import class_tokens as reference
from tests.class_tokens.parts import CONFIG, NAMES, SIDE, Linear, guide, learn, model, pipeline
from tests.repository.processes import run_python
from tests.repository.source import ROOT


@pytest.fixture
def kept(monkeypatch):
    """What a learning keeps of each class, in the type that it learns in."""
    vectors = {}
    run = Learning.run

    def watched(self):
        run(self)
        vectors.update(
            {name: torch.cat([each.flatten() for each in self.kept(n)]) for n, name in enumerate(self._names)}
        )

    monkeypatch.setattr(Learning, "run", watched)
    return vectors


def orders(name, config):
    prompts = Prompts([name], config)
    return [[prompts.every(0).index(text) for text in prompts.texts(0, update)] for update in range(config.updates)]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("sd15", {"gradient_steps": 2}),
        ("sd15", {"gradient_steps": 1, "vectors": 2}),
        ("sd15", {"gradient_steps": 3, "guidance": 1.0, "class_name": False}),
        ("sdxl", {"gradient_steps": 2}),
    ],
    ids=["last two", "last one", "unguided", "sdxl"],
)
def test_classes_are_learned_as_by_the_official_loop(family, settings, kept):
    """In float64, where both round at 1e-16; sums and the optimiser's quotients bring that to 1e-11 at most."""
    config = replace(CONFIG, templates=("A photo of {}", "one {}"), updates=2, keep="after-best", **settings)
    own = model(family)
    names = NAMES[:2]
    _, history = learn(config, names, own)
    pipe, classify = pipeline(family), guide(own)
    for target, name in enumerate(names):
        options = {key: getattr(config, key) for key in ("vectors", "updates", "learning_rate", "weight_decay", "seed")}
        options |= {key: getattr(config, key) for key in ("steps", "guidance", "gradient_steps", "class_name")}
        found = reference.learn(
            pipe,
            lambda images: classify.logits(2 * images - 1),
            name,
            target,
            templates=config.templates,
            orders=orders(name, config),
            count=config.images,
            accuracy=1.0,
            patience=config.updates,
            batch_size=config.images,
            checkpointing=False,
            **options,
        )
        assert history[name].losses == pytest.approx(found.losses, rel=1e-11)
        assert history[name].accuracies == found.accuracies
        assert torch.allclose(kept[name], torch.cat([each.flatten() for each in found.vectors]), rtol=0, atol=1e-11)


@pytest.mark.parametrize("class_name", [False, True], ids=["texts that say the same", "the class's name"])
def test_a_class_begins_as_words_in_whose_images_the_guide_sees_it(class_name, kept):
    """By the pictures of plain prompts that have the words in the token's place."""
    words = ("of", "photo", "one {}" if class_name else "one")
    config = replace(CONFIG, templates=("a {}", "one {}"), initial=words, compared=3, class_name=class_name, updates=1)
    own = model("sd15")
    tokens, _ = learn(config, own=own)
    sampler = Sampler(own, GenerateConfig(steps=config.steps, guidance=config.guidance))
    found = torch.empty(len(words), len(NAMES), dtype=torch.float64)
    for (s, said), (n, name) in product(enumerate(words), enumerate(NAMES)):
        # Words of several tokens are their mean, which no prompt says.
        vectors = Splice(own, {"<v>": 1}).initial("<v>", said.replace("{}", name))[0]
        spliced = Sampler(own.with_tokens({"<v>": vectors}), sampler.config)
        texts = [template.replace("{}", f"<v> {name}" if class_name else "<v>") for template in config.templates]
        rows = [spliced.resolve(GenerateRow(texts[i % 2], seed=config.seed + i)) for i in range(3)]
        logits = guide(own).logits(spliced.pixels(rows)) / config.temperature
        found[s, n] = logits.double().softmax(1)[:, n].mean()
    best = found.argmax(0)
    assert [about["initial"] for about in tokens.about.values()] == [
        words[s].replace("{}", name) for s, name in zip(best.tolist(), NAMES, strict=True)
    ]
    margin = found.sort(0).values
    assert float((margin[-1] - margin[-2]).min()) > 1e-6
    alone = learn(replace(config, initial=words[best[0]]), NAMES[:1], own)[0]
    assert torch.equal(tokens[f"<{NAMES[0]}>"], alone[f"<{NAMES[0]}>"])


@pytest.mark.parametrize(
    ("dtype", "scheduler", "steps", "most"),
    [(torch.float64, "ddim", 1, 1e-9), (torch.float32, "euler-a", 2, 1e-5)],
    ids=["float64", "float32"],
)
def test_together_as_each_alone(dtype, scheduler, steps, most, kept):
    """20 updates in which the tokens move, three classes through two places, noise of their own."""
    settings = {
        "images": 1,
        "steps": steps,
        "gradient_steps": 1,
        "scheduler": scheduler,
        "updates": 20,
        "noise": "fresh",
    }
    config, own = replace(CONFIG, templates=("one {}",), **settings), model("sd15", dtype)
    learn(replace(config, together=2, checkpointing=True), own=own)
    together = dict(kept)
    begin = own.text_encoders[0].get_input_embeddings().weight[own.tokenizers[0].encode("a")[1]]
    for name in NAMES[:1] + NAMES[2:]:
        learn(config, [name], own)
        assert (kept[name] - together[name]).abs().max() <= most
        assert (kept[name] - begin).abs().max() > 0.05


@pytest.mark.parametrize("images", [2, 3, 7])
def test_every_template_has_its_turn(images):
    prompts, seen = Prompts(NAMES, replace(CONFIG, images=images)), set()
    every = prompts.every(1)
    for update in range(20):
        texts = prompts.texts(1, update)
        counts = [texts.count(text) for text in every]
        assert sum(counts) == len(texts) == images
        assert max(counts) - min(counts) <= 1
        seen.update(texts)
    assert seen == set(every)


def test_the_model_stays_as_it_is():
    own = model()
    parts = {"unet": own.unet, "vae": own.vae, "text": own.text_encoders[0]}
    before = {name: {key: value.clone() for key, value in part.state_dict().items()} for name, part in parts.items()}
    words = len(own.tokenizers[0])
    wanting = [p.requires_grad for part in parts.values() for p in part.parameters()]
    assert any(wanting)
    classifier = guide(own)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        tokens, _ = learn(replace(CONFIG, updates=1), classifier=classifier)
    assert set(tokens) == {"<ring>", "<red-cat>", "<dog>"}
    assert len(own.tokenizers[0]) == words
    for name, part in parts.items():
        assert all(torch.equal(value, before[name][key]) for key, value in part.state_dict().items())
        assert all(p.grad is None for p in part.parameters())
    assert [p.requires_grad for part in parts.values() for p in part.parameters()] == wanting


def test_the_noise_loss_is_the_scripts(kept):
    """Two images a class, three drawn an update; the token's step from the gradient of diffusers' loss, in float64."""
    config = replace(CONFIG, templates=("one {}",), class_name=False, loss="noise", images=3, updates=1, stopping=None)
    own, names = model(), NAMES[:2]
    random = np.random.default_rng(0)
    side = SIDE * own.vae_scale_factor
    images = {name: list(random.integers(0, 256, (2, side, side, 3), dtype=np.uint8)) for name in names}
    learner = ClassTokenLearner(own, None, config)
    tokens = learner.learn(names, images=images)
    assert [about["ended"] for about in tokens.about.values()] == ["updates"] * 2
    assert learner.history["ring"].accuracies == []
    pipe = reference.with_token(pipeline(), "<x>", "a")
    # diffusers holds them in float32.
    pipe.scheduler.alphas_cumprod = own.schedule.alphas_cumprod
    table = pipe.text_encoder.get_input_embeddings().weight
    row, drawer = pipe.tokenizer.convert_tokens_to_ids("<x>"), Prompts(names, config)
    for number, name in enumerate(names):
        pixels = [to_tensor(load_image(each), (side, side)) for each in images[name]]
        clean = own.encode_images(torch.stack(pixels)).detach()
        drawing = ThroughNoise(Engine(own), Splice(own, {"<y>": 1}), drawer, config, [clean, clean])
        drawn = [drawing.draw(number, drawer.image_seed(number, 0, image)) for image in range(3)]
        shown, times, noise = (torch.stack(each) for each in zip(*drawn, strict=True))
        loss = reference.noise_loss(pipe, ["one <x>"] * 3, shown, times, noise.double()).mean()
        assert learner.history[name].losses == pytest.approx([loss.item()], rel=1e-11)
        (slope,) = torch.autograd.grad(loss, [table])
        adam = torch.optim.AdamW(
            [word := table[row].detach().clone().requires_grad_()], config.learning_rate, weight_decay=0.1
        )
        word.grad = slope[row]
        adam.step()
        assert torch.allclose(kept[name], word, rtol=0, atol=1e-9)


def test_what_is_told_and_kept(tmp_path):
    events = []
    file = tmp_path / "classes.txt"
    file.write_text("ring\nred_cat\n")
    config = replace(CONFIG, vectors=2, updates=2, keep="best", stopping="gamma", gamma=0.0)
    own = model("sdxl")
    learner = ClassTokenLearner(own, guide(own, labels=("dog", "red cat", "ring")), config)
    tokens = learner.learn(file, out=tmp_path / "out", callback=events.append)
    assert [(event.name, event.update, event.ended) for event in events] == [
        ("ring", 1, "gamma"),
        ("red_cat", 1, "gamma"),
    ]
    assert tokens.classes == {"<ring>": "ring", "<red-cat>": "red_cat"}
    about = tokens.about["<ring>"]
    assert (about["updates"], about["ended"], about["best_update"]) == (1, "gamma", 1)
    assert about["loss"] == events[0].loss == learner.history["ring"].losses[0]
    assert math.exp(-about["loss"]) <= about["probability"] + 1e-12
    assert tokens.settings["targets"] == [2, 1]
    assert {name: tuple(value.shape) for name, value in tokens["<ring>"].items()} == {
        "clip_l": (2, 24),
        "clip_g": (2, 32),
    }
    # Kept is what the best loss was measured at: here what they began as.
    encoder, tokenizer = own.text_encoders[1], own.tokenizers[1]
    word = encoder.get_input_embeddings().weight[tokenizer.encode("a")[1]].float()
    assert torch.equal(tokens["<ring>"]["clip_g"], torch.stack([word, word]))
    norms = [each.get_input_embeddings().weight.detach().norm(dim=1).mean() for each in own.text_encoders]
    ratios = [
        tokens["<ring>"][name].norm(dim=1).max() / norm for name, norm in zip(("clip_l", "clip_g"), norms, strict=True)
    ]
    assert about["norm"] == pytest.approx(float(max(ratios)), rel=1e-6)
    again = ClassTokenLearner(own, guide(own, labels=("dog", "red cat", "ring")), config)
    calls = []
    same = again.learn(file, out=tmp_path / "out", callback=calls.append)
    assert not calls
    assert same.about == tokens.about
    assert again.history == learner.history
    assert dsd.LearnedTokens.load(tmp_path / "out").about == tokens.about


def test_killed_processes_go_on_as_if_they_had_not_been(tmp_path):
    """Killed after an update, while a checkpoint takes its name, and while the tokens do."""
    done = run_python(["-m", "tests.class_tokens.killing", tmp_path], cwd=ROOT, path=[ROOT])
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ends"] == [signal.SIGKILL] * 4 + [0, 0], done.stderr
    assert found["killed"] == found["whole"]
    assert {CHECKPOINT, "bank.safetensors", "tokens.json", "ring-token.safetensors"} <= set(found["whole"])


LATENTS = torch.zeros(2, 4, 8, 8)


@pytest.mark.parametrize(
    ("message", "config", "names", "options"),
    [
        ("gradient_steps: got 4, expected at most the 3 calls", {"gradient_steps": 4}, NAMES, {}),
        (r"latents: got \(1, 4, 8, 8\) .*expected \(2, 4, 8, 8\)", {}, NAMES, {"latents": LATENTS[:1]}),
        ("latents: got .* for noise='fresh'", {"noise": "fresh"}, NAMES, {"latents": LATENTS}),
        ("latents: got one for the noise loss", {"loss": "noise"}, NAMES, {"classifier": None, "latents": LATENTS}),
        ("classifier: got one for the noise loss", {"loss": "noise"}, NAMES, {"classifier": "clip"}),
        ("classifier: got None", {}, NAMES, {"classifier": None}),
        ("images: got none with loss='noise'", {"loss": "noise"}, NAMES, {"classifier": None}),
        ("images: got some with loss='cross-entropy'", {}, NAMES, {"images": {}}),
        (
            "images: lacks class 'dog'",
            {"loss": "noise"},
            NAMES,
            {"classifier": None, "images": {name: [LATENTS] for name in NAMES[:2]}},
        ),
        ("images: got none of class 'dog'", {"loss": "noise"}, ["dog"], {"classifier": None, "images": {"dog": []}}),
        ("'dog' is there more than once", {}, ["dog", "dog"], {}),
        ("'red_cat' and 'red cat' both have the token '<red-cat>'", {}, ["red_cat", "red cat"], {}),
        (r"classes\[0\]: 'ring .*> dog': the prompt has", {"templates": "ring " * 80 + "{}"}, ["dog"], {}),
        ("targets: got None for 'ring'", {}, NAMES, {"targets": {"dog": 1}}),
    ],
)
def test_what_does_not_fit_is_refused(message, config, names, options):
    given = {"classifier": guide(model()), "targets": None, "latents": None, **options}
    images = given.pop("images", None)

    def refused():
        settings = replace(CONFIG, stopping=None, keep=None, **config)
        ClassTokenLearner(model(), given.pop("classifier"), settings, **given).learn(names, images=images)

    with pytest.raises(ValueError, match=message):
        refused()


def test_a_gradient_almost_too_small_for_float32_is_a_number():
    """What a guide leaves that is sure of the class: e⁻⁹⁷."""
    own = model("sd15", torch.float32)

    class Sure(Linear):
        def logits(self, pixels):
            return super().logits(pixels) + torch.tensor([97.0, 0.0, 0.0])

    sure = Sure(3 * (SIDE * own.vae_scale_factor) ** 2, scale=0.1)
    _, history = learn(replace(CONFIG, updates=1, scheduler="ddim"), NAMES[:1], own, sure)
    assert history["ring"].probabilities == [1.0]
    assert history["ring"].ended == "updates"


def test_small_gradients_pass_through_float16(monkeypatch):
    """At this temperature they are below float16's smallest number; its own rounding turns them by 1 % at most."""
    found, call = [], ThroughImages.__call__

    def watched(self, *given):
        found.append(call(self, *given))
        return found[-1]

    monkeypatch.setattr(ThroughImages, "__call__", watched)
    for dtype in (torch.float64, torch.float16):
        learn(replace(CONFIG, updates=1, temperature=1e5), own=model("sd15", dtype))
    exact, half = (each.gradients[0].double().flatten(1) for each in found)
    assert exact.abs().max() < 6e-6
    assert torch.cosine_similarity(exact, half).min() > 0.99
    assert half.norm() == pytest.approx(exact.norm().item(), rel=0.02)
