"""The suite `features`, small: every side gives the reference's features with the rows and FLOPs that it claims."""

import json
import types

import pytest
import torch

from dsd_fast.bench import Case, Context, Quality, Target
from dsd_fast.bench.measure import count_flops
from dsd_fast.bench.run import checked
from dsd_fast.bench.suites import features, features_exit, features_gpu, features_rungs
from dsd_fast.bench.suites.shared import middles, mini
from dsd_fast.bench.suites.unet_networks import Architecture
from dsd_fast.models import from_pipeline
from dsd_fast.models.mini.scenes import EVAL_SEED, scene
from dsd_fast.reference import features as reference
from tests.tiny import tiny_pipeline, tiny_unet


@pytest.fixture(scope="module")
def context():
    return Context()


@pytest.fixture(scope="module")
def job(context):
    pictures = [scene(EVAL_SEED + i).image for i in range(3)]
    return features_rungs.Job(mini(context), pictures, middles(2), batch=4)


@pytest.fixture(scope="module")
def right(job):
    found = reference.extract(job.pipe, job.images, layers=job.ids, timesteps=[250, 750])
    # Images differ by more than the tolerance.
    assert all((value[0] - value[1]).abs().max() > 0.1 * value.abs().max() for value in found.values())
    return found


RUNGS = [
    ("one image and timestep a call", 1),
    ("VAE once per image", 1),
    ("all timesteps in one call", 2),
    ("several images in one call", 4),
    ("the same rows by the plan", 4),
    ("text keys and values once", 4),
    ("stop after the last layer", 4),
    ("FeatureExtractor", 6),
]


def test_the_ladders_rungs(job):
    sides = features_rungs.ladder(job)
    assert [(side.name, side.batch) for side in sides] == RUNGS
    assert all(side.sizes == {"images": 3, "timesteps": 2, "rows": 6} for side in sides)


@pytest.mark.parametrize("place", range(len(RUNGS)), ids=[name for name, _ in RUNGS])
def test_a_rung_gives_the_references_features_by_the_rows_that_it_claims(job, right, place, monkeypatch):
    side = features_rungs.ladder(job)[place]
    batches, forward = [], torch.nn.Conv2d.forward

    def run(self, sample):
        # Each row passes the first convolution once.
        if self is job.model.unet.conv_in:
            batches.append(len(sample))
        return forward(self, sample)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", run)
    found = side.run()
    assert features_rungs.difference(found, right) <= features.FEATURE_TOLERANCE
    assert (sum(batches), max(batches)) == (6, side.batch)


def test_each_saving_saves_flops(job):
    flops = [count_flops(side.run)[1] for side in features_rungs.ladder(job)]
    vae_once, together, batched, planned, keys_once, early, extractor = flops[1:]
    assert flops[0] > vae_once > together == batched == planned > keys_once > early
    # Of the last: the plan's own count for 6 rows and a text, beside the VAE and the text encoder.
    size = {"height": 16, "width": 16, "tokens": job.pipe.tokenizer.model_max_length}
    others = count_flops(lambda: (features_rungs._clean(job), features_rungs.states(job)))[1]
    assert early == extractor == job.short.flops(latents=6, texts=1, rows=6, **size) + others


def test_a_difference_is_that_of_the_worst_feature():
    right = {"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([[2.0]])}
    assert features_rungs.difference(right, right) == 0
    assert features_rungs.difference({**right, "b": torch.tensor([[1.5]])}, right) == 0.25
    assert features_rungs.difference({"a": right["a"]}, right) == float("inf")
    assert not features_rungs.difference({**right, "b": torch.tensor([[float("nan")]])}, right) <= 1


@pytest.mark.parametrize("batch", [1, 32])
def test_extraction(job, batch):
    work = features._extract_job(job, batch, Context())
    names = [side.name for side in work.sides]
    called = f"reference, {batch} image{'' if batch == 1 else 's'} a call"
    assert names == [called, "diffusers batched by hand", "FeatureExtractor"]
    assert [side.batch for side in work.sides] == [min(batch, 3), 4, 6]
    flops, _ = checked(work)
    assert flops[0] > flops[1] > flops[2]
    target = [Target("ratio", {1: 4.0, 32: 1.5}[batch])]
    assert work.comparisons() == [(1, 0, ()), (2, 0, target), (2, 1, ())]
    assert (work.item, work.items) == ("image", 3)


def small():
    """A tiny network of SD 1.5's shape."""
    config = {key: value for key, value in tiny_unet("sd15").config.items() if not key.startswith("_")}
    return Architecture(config, 16)


@pytest.mark.parametrize("block", ["up0", "up1", "up2", "up3"])
def test_early_exit(block):
    exits = features_exit.Exits(small(), "cpu", 16)
    ran = []
    for name, module in exits.unet.named_modules():
        if name.endswith(("conv_out", "resnets.0.conv1")):
            module.register_forward_hook(lambda _, __, ___, name=name: ran.append(name))
    work = features_exit.work_of(exits, block)
    checked(work)
    level = int(block[-1])
    last = {f"up_blocks.{level}.resnets.0.conv1"}
    later = {"conv_out", *(f"up_blocks.{other}.resnets.0.conv1" for other in range(level + 1, 4))}
    for side in work.sides:
        ran.clear()
        result = side.run()
        # What comes after the block does not run, in the broken-off forwards either.
        assert last <= set(ran)
        assert not later & set(ran)
        assert work.difference(result, work.oracle()) <= work.tolerance
    # The hooks that break off are gone: a whole forward gives the same value there, and goes on.
    ran.clear()
    with reference.tapping(exits.unet, [features_exit.LEVELS[block]]) as tapped, torch.no_grad():
        exits.unet(exits.latents, 500, exits.states)
    assert "conv_out" in ran
    torch.testing.assert_close(tapped.features[features_exit.LEVELS[block]], work.oracle(), rtol=1e-5, atol=1e-5)
    target = [Target("ratio", 1 / 1.05)]
    assert work.comparisons() == [(2, 0, target), (2, 1, target)]


def test_types_are_compared_layer_by_layer(monkeypatch):
    monkeypatch.setattr(features, "IMAGES", 2)
    monkeypatch.setattr(features, "TIMESTEPS", 2)
    work = features._types(Context())
    right, result = (side.run() for side in work.sides)
    each = [
        float((result[name].double() - right[name].double()).norm() / right[name].double().norm()) for name in right
    ]
    assert work.difference(result, right) == pytest.approx(max(each))
    assert 1e-3 < max(each) <= work.tolerance
    assert {value.dtype for value in result.values()} == {torch.bfloat16}
    assert work.difference({}, right) == float("inf")
    assert [side.dtype for side in work.sides] == ["float32", "bfloat16"]


def test_the_share_of_writing_that_overlaps(job, monkeypatch):
    """By an own count of the spans that the timeline files hold."""
    shares, written = [], features.extract_to

    def kept(extractor, folder, images, *args, **options):
        done = written(extractor, folder, images, *args, **options)
        spans = json.loads((folder / "timeline.json").read_text())["spans"]
        of = {name: [(s["start"], s["end"]) for s in spans if s["name"] == name] for name in ("write", "compute")}
        shared = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in of["write"] for b in of["compute"])
        shares.append(shared / sum(end - start for start, end in of["write"]))
        assert len(images) == 3
        return done

    monkeypatch.setattr(features, "extract_to", kept)
    monkeypatch.setattr(features, "SHARD_ROWS", 1)
    monkeypatch.setattr(features, "RUNS", 3)
    (figure,) = features.overlap(job)
    assert figure.value == pytest.approx(sorted(shares)[1], abs=0.01)
    assert figure.low == pytest.approx(min(shares), abs=0.01)
    assert figure.high == pytest.approx(max(shares), abs=0.01)
    assert (figure.n, figure.unit, figure.item) == (3, "share", "image")
    assert figure.seconds > 0


@pytest.fixture
def small_gpu_job(monkeypatch):
    """The sides for a GPU on a tiny network; what torch.compile gives runs as it was written."""
    pipe = tiny_pipeline("sd15").to(torch.bfloat16)
    monkeypatch.setattr(features_gpu, "random_pipeline", lambda *_: pipe)
    monkeypatch.setattr(features_gpu, "IMAGES", 2)
    monkeypatch.setattr(features_gpu, "TIMESTEPS", 3)
    monkeypatch.setattr(features_gpu, "ROWS", 4)
    assert from_pipeline(pipe).image_size == (64, 64)
    with torch.compiler.set_stance("force_eager"):
        yield


def test_sides_for_a_gpu(small_gpu_job, monkeypatch):
    context, ours = Context(), features_gpu._ours
    # Recordings need a GPU.
    monkeypatch.setattr(features_gpu, "_ours", lambda *args: ours(*args[:2], args[2][:-1]))
    work = features_gpu.against_official(context)
    assert [side.name for side in work.sides] == [
        "reference, one image and timestep a call",
        "FeatureExtractor",
        "FeatureExtractor, inductor",
    ]
    _, differences = checked(work)
    assert all(0 < difference <= 1 for difference in differences)
    assert [targets for *_, targets in work.comparisons()] == [(), [Target("ratio", 3.5)]]
    assert (work.dtype, work.items, [side.batch for side in work.sides]) == ("bfloat16", 2, [1, 6, 6])
    wrong = {name: 1.1 * value for name, value in work.sides[1].run().items()}
    assert work.difference(wrong, work.oracle()) > 1

    compiled = features_gpu.against_compiled("default", context)
    assert [side.name for side in compiled.sides] == [
        "diffusers by hand, 4 rows a call, torch.compile (default)",
        "FeatureExtractor, inductor",
    ]
    checked(compiled)
    assert compiled.comparisons() == [(1, 0, [])]


def test_the_rate_is_of_one_device(monkeypatch):
    wanted = ("rate", "ratio")
    for name, rates in (("NVIDIA H200", [25.0]), ("NVIDIA A100", [])):
        monkeypatch.setattr(torch, "cuda", types.SimpleNamespace(get_device_name=lambda _, name=name: name))
        found = features_gpu._targets(wanted, torch.device("cuda"))
        assert [target.least for target in found] == [3.5, *rates]


def test_the_suite_has_what_it_promises():
    cases = {case.name: case for case in features.suite.cases}
    assert {"extract/mini/batch1", "extract/mini/batch32", "waterfall"} <= cases.keys()
    assert [name for name in cases if name.startswith("early-exit/")] == [f"early-exit/sd15/up{i}" for i in range(4)]
    assert isinstance(cases.pop("export/overlap"), Quality)
    on_gpu = [name for name, case in cases.items() if case.devices == ("cuda",)]
    assert on_gpu == ["sd15/against-official", "sd15/against-default", "sd15/against-max-autotune-no-cudagraphs"]
    assert [name for name, case in cases.items() if case.long] == on_gpu[2:]
    assert (features.IMAGES, features.TIMESTEPS, features_gpu.TIMESTEPS) == (32, 8, 16)
    # From 6 repeats on the interval of a ratio covers 95 %.
    assert all(isinstance(case, Case) and case.repeats >= 6 for case in cases.values())
