"""Learning against the official loop written plainly, and classes together against each alone."""

from dataclasses import replace

import pytest
import torch

from dsd_fast.class_tokens.learning import Learning
from dsd_fast.class_tokens.prompts import Prompts
from dsd_fast.reference import class_tokens as reference
from tests.class_tokens.parts import CONFIG, NAMES, guide, learn, model, pipeline


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


@pytest.mark.parametrize(
    ("dtype", "scheduler", "most"), [(torch.float64, "ddim", 1e-9), (torch.float32, "euler-a", 1e-5)], ids=str
)
def test_together_as_each_alone(dtype, scheduler, most, kept):
    """20 updates in which the tokens move, three classes through two places, noise of their own."""
    settings = {"images": 1, "gradient_steps": 1, "scheduler": scheduler, "updates": 20, "noise": "fresh"}
    config, own = replace(CONFIG, templates=("one {}",), **settings), model("sd15", dtype)
    learn(replace(config, together=2, checkpointing=True), own=own)
    together = dict(kept)
    begin = own.text_encoders[0].get_input_embeddings().weight[own.tokenizers[0].encode("a")[1]]
    for name in NAMES:
        learn(config, [name], own)
        assert (kept[name] - together[name]).abs().max() <= most
        assert (kept[name] - begin).abs().max() > 0.05


def test_the_model_stays_as_it_is():
    own = model()
    parts = {"unet": own.unet, "vae": own.vae, "text": own.text_encoders[0]}
    before = {name: {key: value.clone() for key, value in part.state_dict().items()} for name, part in parts.items()}
    words, grads = (
        len(own.tokenizers[0]),
        {name: [p.requires_grad for p in part.parameters()] for name, part in parts.items()},
    )
    with torch.no_grad():
        tokens, _ = learn(replace(CONFIG, updates=1))
    assert set(tokens) == {"<ring>", "<red-cat>", "<dog>"}
    assert len(own.tokenizers[0]) == words
    for name, part in parts.items():
        assert all(torch.equal(value, before[name][key]) for key, value in part.state_dict().items())
        assert [p.requires_grad for p in part.parameters()] == grads[name]
        assert all(p.grad is None for p in part.parameters())
