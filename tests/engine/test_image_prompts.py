"""Images as prompts: their states in short and in full, what is refused, and their files."""

from dataclasses import replace
from functools import cache
from weakref import ref

import pytest
import torch

import dsd_fast as dsd
from dsd_fast.engine import Engine, ImagePrompt, Texts
from dsd_fast.engine.image_prompts import KIND, SUFFIX
from dsd_fast.jobs import Job, row_id, stream_tensors
from dsd_fast.models.controlnet import Control
from dsd_fast.models.prompts import PromptStates
from tests.models.test_controlnet import net_for
from tests.tiny import tiny_pipeline

TEXTS = ["", "a red cat"]


@cache
def model(family, dtype=torch.float32):
    return dsd.from_pipeline(tiny_pipeline(family).to(dtype))


def image_prompts(of, count=3, alpha=0.0, texts=TEXTS, seed=0, **more):
    """Random vectors as large as the states of texts, which take turns."""
    with torch.no_grad():
        states = of.encode_prompts(texts)
    tokens = states.states.shape[1]
    generator = torch.Generator().manual_seed(seed)

    def like(value):
        drawn = torch.randn(count, value.shape[-1], generator=generator, dtype=torch.float64)
        return (drawn * float(value.std())).to(value.dtype)

    ends = states.lengths - 1
    kept = tokens if alpha else int(ends.max())
    given = {
        "pooled": None if states.pooled is None else like(states.pooled),
        "names": tuple(f"image {number}" for number in range(count)),
        "tokens": tokens,
        **more,
    }
    text_of = torch.arange(count) % len(texts)
    return ImagePrompt(like(states.states), states.states[:, :kept], ends, text_of, alpha=alpha, **given)


def full(prompts):
    """Their states, each as often as it counts."""
    return prompts.states().expanded()


def test_they_are_as_short_as_equal_states_make_them():
    for alpha in (0.0, 0.6):
        prompts = image_prompts(model("sd15"), alpha=alpha)
        short = prompts.states()
        assert short.states.shape[1] == (77 if alpha else 5)
        assert (short.counts is None) == bool(alpha)
        assert prompts[0].states().states.shape[1] == (77 if alpha else 2)
        # All their states are real, which says nothing of words.
        assert full(prompts).lengths.tolist() == [77] * 3


@pytest.mark.newest
def test_padded_beside_texts_they_equal_all_their_states_in_every_layer_with_gradients():
    """In float64, to rounding: the sums of a layer are over other numbers of keys."""
    of = model("sd15", torch.float64)
    program = Engine(of).program
    # Probabilities are by key.
    layers = [name for name in program.layer_ids if not name.endswith("-cross-map")]
    plan = program.plan(features=layers, scores=program.score_ids, noise_pred=True)
    prompts = image_prompts(of)
    with torch.no_grad():
        beside = of.encode_prompts(["a dog on a red cat"])
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    answers = []
    for states in (ImagePrompt.states, full):
        leaf = replace(prompts, vectors=prompts.vectors.clone().requires_grad_())
        keys = Texts(PromptStates.joined([states(leaf), beside])).keys(plan)
        out = plan.run(z, torch.tensor([500]), keys, latent_index=[0] * 4, text_index=[0, 1, 2, 3])
        answer = {**out.features, **{f"score {name}": score for name, score in out.scores.items()}}
        total = out.noise_pred.square().sum() + sum(score.sum() for score in out.scores.values())
        answers.append({**answer, "gradient": torch.autograd.grad(total, leaf.vectors)[0]})
    short, long = answers
    for name, value in long.items():
        wrong = (short[name] - value).detach().abs().max()
        assert float(wrong) <= 1e-12 * float(value.detach().abs().max()), name


def test_each_is_encoded_once_by_its_content_beside_texts():
    engine = Engine(model("sd15"))
    prompts = image_prompts(engine.model)
    again = replace(prompts[0], names=("another name",), vectors=prompts.vectors[:1].clone())
    assert prompts[0] == again != prompts[2]
    texts, numbers = engine.texts([prompts[0], "a dog", None, again, prompts[1]], [1, None, None, None, None])
    assert numbers.tolist() == [1, 0, 3, 1, 2]
    assert texts.tokens == 77
    dog = engine.encode_prompts(["a dog"])
    assert torch.equal(texts.states.expanded().states, torch.cat([dog.states, full(prompts[:2]).states]))
    # Without a text they are as short as they can be, and the absent one keeps its own.
    texts, numbers = engine.texts([prompts[2], prompts[0]])
    assert numbers.tolist() == [0, 1]
    assert texts.tokens == 2
    assert engine.texts([prompts[2], None])[0].tokens == 77


def test_some_of_them_and_none():
    prompts = image_prompts(model("sdxl"))
    for rows in ([2, 0], (2, 0), range(0, 3, 2), slice(None, None, 2), torch.tensor([2, 0])):
        assert set(prompts[rows].names) == {"image 0", "image 2"}
    for none in (prompts[:0], image_prompts(model("sdxl"), alpha=0.5)[:0], ImagePrompt.cat([prompts[:0]])):
        assert len(none) == len(none.states()) == 0
        assert none.embeds.shape == (0, *prompts.embeds.shape[1:])


def test_padded_states_are_not_read():
    """What stands for none may be anything: the kernels end before it."""
    engine = Engine(model("sd15"))
    texts, _ = engine.texts([*image_prompts(engine.model, texts=[""]), "a dog"])
    # The text comes first.
    assert texts.keys(engine.noise_plan).lengths.tolist() == [77, 2, 2, 2]
    assert engine.texts(image_prompts(engine.model, texts=[""]))[0].keys(engine.noise_plan).lengths is None


def test_of_many_beside_an_absent_text_the_keys_stay_short():
    """Where all padded do not fit the budget they go by themselves, to the same answers."""
    engine = Engine(model("sdxl"))
    prompts = image_prompts(engine.model, 40, texts=[""])
    plan = engine.noise_plan
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text_of = torch.tensor([3, 40, 39])
    answers, widths = [], []
    held = []
    needed = Texts(prompts.states()).keys(plan).nbytes
    for budget in (None, plan.run_bytes(1, 16, 16, 77) + 2 * needed):
        texts = Texts(engine.encode_prompts(prompts), engine.encode_prompts(None))
        assert texts.fits(plan, (16, 16), budget) == (budget is None)
        widths.append([])
        found = torch.empty(3, 4, 16, 16)
        for keys, rows, local in texts.groups(plan, text_of, (16, 16), budget):
            # What other rows have read takes none of the budget any more.
            assert not any(other() for other in held)
            held = [] if budget is None else [*held, ref(keys)]
            widths[-1].append(keys.tokens)
            out = plan.run(
                z, torch.tensor([500]), keys, latent_index=[0] * len(rows), text_index=local,
                time_ids=engine.model.time_ids(32, 32),
            )  # fmt: skip
            found[rows] = out.noise_pred.detach()
        answers.append(found)
    assert widths == [[77], [2, 77]]
    torch.testing.assert_close(answers[1], answers[0], rtol=0, atol=1e-5 * float(answers[0].abs().max()))


def test_controlnets_read_all_their_states():
    pipe = tiny_pipeline("sd15")
    of = dsd.from_pipeline(pipe)
    control = Control(net_for(pipe.unet, 0))
    engine = Engine(of, controls=[control])
    prompts = image_prompts(of, 2)
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    shown = [torch.rand(2, 3, *engine.size, generator=torch.Generator().manual_seed(1))]
    answers = []
    for states in (prompts.states(), full(prompts)):
        predict = engine.predict(
            Texts(states), torch.tensor([0, 1]), conditions=shown, condition_of=torch.tensor([0, 1])
        )
        with torch.no_grad():
            answers.append(predict(z, 500))
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=1e-5 * float(answers[1].abs().max()))
    assert not torch.allclose(answers[0][0], answers[0][1], atol=1e-3)


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({"vectors": torch.zeros(3)}, r"vectors: got \(\(3,\), torch.float32\), expected a tensor \(N, E\)"),
        ({"vectors": torch.zeros(3, 4, dtype=torch.int64)}, "vectors: got"),
        ({"vectors": torch.full((3, 24), torch.nan)}, "vectors: got numbers that are not finite"),
        ({"vectors": torch.zeros(3, 4)}, "texts: got 24 numbers a state, expected 4"),
        ({"vectors": torch.zeros(2, 24)}, r"text_of: got .*, expected a tensor \(2,\) of int64"),
        ({"texts": torch.zeros(2, 3, 24)}, "texts: got 3 states each, expected 4 to 77"),
        ({"ends": torch.tensor([0, 4])}, "ends: got 0 to 4, expected 1 to 76"),
        ({"ends": [1, 4]}, "ends: got list, expected a tensor"),
        ({"text_of": torch.tensor([0, 1, 2])}, "text_of: got 0 to 2, expected 0 to 1"),
        ({"alpha": float("nan")}, "alpha: got nan, expected a finite number"),
        ({"alpha": 0.5}, "texts: got 4 states each, expected 77 to 77"),
        ({"tokens": 1}, "tokens: got 1, expected an integer from 2"),
        ({"names": ("a",)}, "names: got 1, expected 3"),
        ({"names": "abc"}, "names: got 'abc', expected a tuple of strings"),
        ({"names": (1, 2, 3)}, r"names: got \(1, 2, 3\), expected a tuple of strings"),
        ({"pooled": torch.zeros(2, 5)}, "pooled: got 2, expected 3"),
    ],
)
def test_what_fits_not_together_is_refused(changed, wrong):
    with pytest.raises(ValueError, match=wrong):
        replace(image_prompts(model("sd15")), **changed)


def test_those_of_another_model_are_refused():
    engine = Engine(model("sdxl"))
    for prompts in (image_prompts(model("sd15")), replace(image_prompts(engine.model), pooled=None)):
        with pytest.raises(ValueError, match="an image prompt of another model: got 77 states of"):
            engine.texts(prompts)
    with pytest.raises(ValueError, match=r"prompts: got ImagePrompt\(3: image 0, image 1, image 2\) among them"):
        engine.texts(["a dog", image_prompts(engine.model)])


@pytest.mark.parametrize(("family", "alpha"), [("sdxl", 0.0), ("sd15", 0.5)])
def test_a_file_gives_them_back(family, alpha, tmp_path):
    prompts = image_prompts(model(family), 3, alpha, settings={"norm": 27.5}).to(dtype=torch.float16)
    file = tmp_path / "below" / "prompts.safetensors"
    prompts.save(file)
    loaded = ImagePrompt.load(file)
    assert loaded == prompts
    assert loaded.vectors.dtype == torch.float16
    assert (loaded.names, loaded.settings, loaded.alpha) == (prompts.names, {"norm": 27.5}, alpha)
    assert loaded.sources == tuple((file, row) for row in range(3))
    assert torch.equal(loaded.embeds, prompts.embeds)
    # The parts put together again have each text once.
    joined = ImagePrompt.cat([loaded[2], loaded[torch.tensor([0, 1])], loaded[-1]])
    assert joined == loaded[[2, 0, 1, 2]]
    assert len(joined.texts) == 2
    assert joined.sources[3] == (file, 2)
    other = replace(loaded, settings={"norm": 1})
    with pytest.raises(ValueError, match=r"prompts\[1\]: got settings {'norm': 1}, expected {'norm': 27.5} as of"):
        ImagePrompt.cat([loaded, other])


def test_the_whole_shards_of_a_folder_are_read(tmp_path):
    prompts = image_prompts(model("sd15"), 5)

    def write(files, rows):
        with files.open(suffix=SUFFIX) as stream:
            stream_tensors(stream, *ImagePrompt.cat([row.payload for row in rows]).content())

    with Job(tmp_path, KIND, {}, write=write, shard_rows=2) as job:
        for number in job.pending(range(6), lambda number: row_id(str(number))):
            if number == 1:
                job.fail(row_id(str(number)), "bad", "not-an-image", "it is no image")
            else:
                job.put(row_id(str(number)), f"image {number}", prompts[number - (number > 1)])
    loaded = ImagePrompt.load(tmp_path)
    assert loaded == prompts
    assert loaded.names == prompts.names
    assert {file.parent for file, _ in loaded.sources} == {tmp_path / "shards"}
    assert all(ImagePrompt.load(file)[row] == own for (file, row), own in zip(loaded.sources, loaded, strict=True))
    loaded.sources[-1][0].unlink()
    assert ImagePrompt.load(tmp_path) == prompts[:3]


def test_what_is_no_file_of_them_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"image prompts '.*none.safetensors' do not exist"):
        ImagePrompt.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"has no manifest.json, expected a folder that a job wrote"):
        ImagePrompt.load(tmp_path)
    file = tmp_path / "a.safetensors"
    with file.open("wb") as stream:
        stream_tensors(stream, {"vectors": torch.zeros(1, 2)})
    with pytest.raises(ValueError, match="cannot be read: it is another file"):
        ImagePrompt.load(file)
    prompts = image_prompts(model("sd15"))
    prompts.save(file)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="cannot be read: "):
        ImagePrompt.load(file)
    with Job(tmp_path / "features", "features", {}, write=lambda files, rows: None):
        pass
    with pytest.raises(ValueError, match="holds results of features, expected image prompts"):
        ImagePrompt.load(tmp_path / "features")
