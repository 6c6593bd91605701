"""The suite `ops`, small: every side gives the truth, and the suite has the cases and targets that it promises."""

import dataclasses
from functools import partial

import pytest
import torch

from dsd_fast.bench import Context, Target, UnavailableError
from dsd_fast.bench.run import checked
from dsd_fast.bench.suites import ops, ops_attention, ops_elementwise, ops_features, ops_rivals
from dsd_fast.bench.suites.ops_attention import Shape

SHAPE = Shape(4, 33, 2, 8, tokens=7)


@pytest.fixture(scope="module")
def context():
    return Context()


ATTENTION = {
    "forward": ops_attention.forward,
    "score-alone": ops_attention.score_alone,
    "token-maps": ops_attention.maps,
    "backward": ops_attention.backward,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("prepare", ATTENTION.values(), ids=ATTENTION.keys())
def test_every_side_is_right(context, prepare, dtype):
    work = prepare(dataclasses.replace(SHAPE, dtype=dtype), context)
    _, differences = checked(work)
    assert all(0 <= difference <= 1 for difference in differences)
    assert work.launches is False
    assert (work.items, work.dtype) == (4, dtype)
    ours = work.sides[-1]
    assert ours.bytes is not None
    assert (ours.batch, ours.sizes["texts"], ours.sizes["tokens"]) == (4, 2, 7)


@pytest.mark.parametrize("prepare", ATTENTION.values(), ids=ATTENTION.keys())
def test_a_wrong_side_is_seen(context, prepare):
    work = prepare(SHAPE, context)
    for place, tensor in enumerate(work.sides[-1].run()):
        result = list(work.sides[-1].run())
        result[place] = tensor + 1e-3 * tensor.abs().max()
        assert work.difference(result, work.oracle()) > 1


def test_flops_and_bytes_by_hand(context):
    work = ops_attention.forward(SHAPE, context)
    flops, _ = checked(work)
    # Two products of 4 rows, 33 positions, 7 keys and 2 heads of 8; the baseline's softmax has none.
    assert set(flops) == {2 * 2 * 4 * 33 * 7 * 16}
    sdpa, _, ours = work.sides
    assert sdpa.bytes == 4 * 16 * (2 * 4 * 33 + 2 * 4 * 7)
    assert ours.bytes == 4 * 16 * (2 * 4 * 33 + 2 * 2 * 7) + 4 * 4 * 2
    backward = ops_attention.backward(SHAPE, context).sides[-1]
    assert backward.bytes == 4 * 16 * (3 * 4 * 33 + 4 * 2 * 7) + 4 * 4 * 2 * 33


def test_ours_is_measured_against_both(context):
    work = ops_attention.forward(SHAPE, context, targets=(Target("ratio", 1.0),), least=2.0)
    names = [side.name for side in work.sides]
    assert names[:2] == ["SDPA, no score", "softmax, logsumexp and matmul"]
    assert names[2].startswith("cross_attention_score, ")
    assert work.comparisons() == [(2, 0, (Target("ratio", 1.0),)), (2, 1, (Target("ratio", 2.0),))]


def test_baselines_have_gradients_of_their_own_rows_which_are_summed_when_compared(context):
    work = ops_attention.backward(SHAPE, context)
    (_, plain, _), (_, ours, _) = (side.run() for side in work.sides)
    assert (len(plain), len(ours)) == (4, 2)


TABLES = ("LAUNCHES", "QUERY_LAUNCHES", "TEXT_LAUNCHES")


def test_what_a_machine_lacks_is_said(context):
    if not torch.cuda.is_available():
        for table in TABLES:
            with pytest.raises(UnavailableError, match="'triton'"):
                ops_rivals.launches(SHAPE, context, table)
        with pytest.raises(UnavailableError, match="'triton'"):
            ops_elementwise.forward("geglu", "320x64", "float32", context, rows=1)


@pytest.mark.parametrize("table", TABLES)
def test_each_launch_that_the_kernels_name_is_what_they_would_take(table):
    pytest.importorskip("triton")
    from dsd_fast.kernels.cross_attention_score import kernel

    taken = {
        "LAUNCHES": lambda: kernel.launch_for(torch.bfloat16, 80),
        "QUERY_LAUNCHES": lambda: kernel.query_launch(torch.bfloat16, 80, 77),
        "TEXT_LAUNCHES": lambda: kernel.text_launch(torch.bfloat16, 80),
    }[table]
    before = taken()
    assert len(kernel.TUNING_CANDIDATES[table]) > 3
    for launch in kernel.TUNING_CANDIDATES[table]:
        with ops_rivals._entry(getattr(kernel, table), 80, launch):
            assert taken() is launch
        assert taken() is before


@pytest.mark.parametrize("name", ops_elementwise.PIECES)
def test_plain_torch_is_what_the_elementwise_operators_compute(name, monkeypatch):
    monkeypatch.setattr(ops_elementwise, "LEVELS", {"small": (64, 4)})
    given = ops_elementwise._inputs(name, "small", "float32", "cpu", 2)
    piece = ops_elementwise.PIECES[name]
    for ours, plain in zip(piece.ours(*given), piece.plain(*given), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in given if x.ndim == 4)
    assert [x.ndim > 1 for x in given] == [True] * piece.flows + [False] * (len(given) - piece.flows)


@pytest.fixture
def small(monkeypatch):
    """The cases of features on a CPU, where every side but Triton's is plain torch: the operators' own there."""
    monkeypatch.setattr(ops_features, "LEVELS", {"small": (40, 6)})

    def forms(piece, given):
        return piece.plain, piece.ours, piece.plain

    monkeypatch.setattr(ops_features, "forms", forms)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_side_of_the_features_operators_is_right(context, dtype):
    prepared = [
        call(dtype, context, images=2, side=8) for call in (ops_features.noise_forward, ops_features.noise_backward)
    ]
    for resize in ops_features.RESIZES:
        prepared += [ops_features.pack(resize, "small", normal, dtype, context, rows=3) for normal in (False, True)]
    for work in prepared:
        _, differences = checked(work)
        assert all(0 <= difference <= 1 for difference in differences)
        right = work.oracle()
        assert work.difference([right[0] + 0.1 * right[0].abs().max(), *right[1:]], right) > 1


@pytest.mark.usefixtures("small")
def test_bytes_of_the_features_operators_by_hand(context):
    noised = 2 * ops_features.TIMESTEPS * ops_features.DRAWS * 4 * 8 * 8
    shared = 4 * (ops_features.DRAWS * 4 * 8 * 8 + 2 * ops_features.TIMESTEPS)
    for call in (ops_features.noise_forward, ops_features.noise_backward):
        assert call("bfloat16", context, images=2, side=8).sides[-1].bytes == 2 * (noised + 2 * 4 * 8 * 8) + shared
    for resize, places in (("as-is", 36), ("bilinear", 144), ("area", 9), ("max", 9)):
        work = ops_features.pack(resize, "small", True, "bfloat16", context, rows=3)
        assert work.sides[-1].bytes == 2 * 3 * 40 * (36 + places)


def cases(group):
    return {case.name: case for case in ops.suite.cases if case.group == group}


def test_the_cpu_cases_are_those_that_have_a_target():
    found = cases("cpu")
    for kind in ("forward", "score-alone", "token-maps", "backward"):
        assert {name for name in found if f"/{kind}/" in name} == {f"cpu/{kind}/width-{w}" for w in (40, 80, 64)}
    shapes = {name: case.prepare.args[0] for name, case in found.items()}
    assert shapes["cpu/forward/width-40"] == Shape(8, 1024, 8, 40, 77)
    assert shapes["cpu/forward/width-80"] == Shape(8, 256, 8, 80, 77)
    assert shapes["cpu/forward/width-64"] == Shape(4, 4096, 5, 64, 77)
    least = {name: case.prepare.keywords["least"] for name, case in found.items() if "/forward/" in name}
    assert least == {"cpu/forward/width-40": 2.0, "cpu/forward/width-80": None, "cpu/forward/width-64": 2.0}
    assert all(case.devices == ("cpu",) and not case.long for case in found.values())


TARGETS = {
    "sd15/4096": {"ratio": 1.0, "copy_share": 0.55},
    "sd15/1024": {"ratio": 1.0, "copy_share": 0.7},
    "sd15/256": {"ratio": 1.0},
    "sd15/64": {"ratio": 1.0},
    "sd21/4096": {"ratio": 1 / 1.1, "copy_share": 0.7},
    "sd21/256": {"ratio": 1 / 1.1},
    "sdxl/1024": {"ratio": 1 / 1.1, "copy_share": 0.7},
}


@pytest.mark.parametrize("name", TARGETS)
def test_the_gpu_cases_have_their_targets(name):
    case = cases("forward")[f"forward/{name}"]
    found = {target.measure: target.least for target in case.prepare.keywords["targets"]}
    assert found == TARGETS[name]
    assert case.prepare.keywords["least"] == 5.0
    assert cases("flex-backward")[f"flex-backward/{name}"].prepare.keywords == {"least": 1.5}
    assert case.prepare.args[0].rows == 32


def test_every_layer_has_every_measurement_on_a_gpu_alone():
    names = {f"{family}/{length}" for family, layers in ops.LAYERS.items() for length, _, _ in layers}
    assert len(names) == 10
    for group in ("flex-backward", "flex-forward", "backward", "score-alone", "token-maps"):
        assert {name.removeprefix(f"{group}/") for name in cases(group)} == names
    assert {name.removeprefix("forward/") for name in cases("forward")} == names | {"sd15/4096/float16"}
    tuned = {"": (40, 64, 80, 160), "query/": (40, 64, 80), "text/": (40, 64, 80, 160)}
    assert set(cases("tune")) == {f"tune/{part}width-{width}" for part, widths in tuned.items() for width in widths}
    on_gpu = [case for case in ops.suite.cases if case.group != "cpu"]
    assert all(case.devices == ("cuda",) for case in on_gpu)
    # From 6 repeats on the interval of a ratio covers 95 %.
    assert all(case.repeats >= 6 for case in ops.suite.cases)
    assert any(not case.long for case in on_gpu)
    # A short run, which may be cut off, takes the forward pass first.
    assert next(case.group for case in on_gpu) == "forward"
    assert all(isinstance(case.prepare, partial) for case in on_gpu)
