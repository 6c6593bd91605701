"""Any number of rows in micro-batches: the same numbers, within the budget, and once more when memory runs out."""

import logging

import pytest
import torch

from dsd_fast.kernels.common.backend import force
from dsd_fast.unet import Output, Plan, UNetProgram, UnsupportedNetworkError
from dsd_fast.unet.stream import HEADROOM, default_budget
from tests.memory import peak_bytes
from tests.tiny import CROSS_ATTENTION_DIM, FAMILIES, POOLED_DIM, tiny_unet

TOKENS = 11


class Rows:
    def __init__(self, family, latents=5, texts=4, rows=17, size=(16, 16)):
        g = torch.Generator().manual_seed(0)
        self.program = UNetProgram(tiny_unet(family))
        name = self.program.score_ids[-2]
        self.plan = self.program.plan(features=["mid-vit-out"], scores=[name], maps=[name], noise_pred=True)
        self.latents = torch.randn(latents, 4, *size, generator=g)
        pooled = torch.randn(texts, POOLED_DIM, generator=g) if family == "sdxl" else None
        self.text = self.plan.encode_text(
            torch.randn(texts, TOKENS, CROSS_ATTENTION_DIM[family], generator=g).requires_grad_(False), pooled=pooled
        )
        ids = torch.randint(0, 64, (latents, 6), generator=g).float() if family == "sdxl" else None
        self.times = torch.randint(0, 1000, (latents,), generator=g)
        self.arguments = {
            "latent_index": torch.randint(latents, (rows,), generator=g),
            "text_index": torch.randint(texts, (rows,), generator=g),
            "time_ids": ids,
            "map_tokens": torch.randint(TOKENS, (rows, 2), generator=g),
        }

    def budget(self, rows):
        return self.text.nbytes + HEADROOM["cpu"] * self.plan.run_bytes(rows, 16, 16, TOKENS, map_tokens=2)

    def run(self):
        with torch.no_grad():
            return self.plan.run(self.latents, self.times, self.text, **self.arguments)

    def stream(self, rows_at_once=None, **kwargs):
        if rows_at_once:
            kwargs["memory_budget"] = self.budget(rows_at_once)
        return self.plan.stream(self.latents, self.times, self.text, **self.arguments, **kwargs)


@pytest.fixture(params=FAMILIES)
def rows(request):
    return Rows(request.param)


def same(got, want, tolerance=1e-5):
    for (a, x), (b, y) in zip(got.tensors(), want.tensors(), strict=True):
        assert a == b
        assert float((x - y).abs().max()) <= tolerance * float(y.abs().max()), a


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_micro_batches_fill_out_with_the_numbers_of_one_run(rows, at_once):
    out = rows.plan.empty_output(17, 16, 16, tokens=TOKENS, map_tokens=2)
    for _, value in out.tensors():
        value.fill_(float("nan"))
    assert rows.stream(at_once, out=out) is out
    same(out, rows.run())


def test_every_row_is_answered_once_and_rows_of_a_latent_stay_together(rows):
    want, seen, latents = rows.run(), [], []
    for numbers, part in rows.stream(4):
        assert len(numbers) <= 4
        seen += numbers.tolist()
        latents += rows.arguments["latent_index"][numbers].tolist()
        whole = rows.plan.empty_output(len(numbers), 16, 16, tokens=TOKENS, map_tokens=2)
        for (_, target), (_, source) in zip(whole.tensors(), want.tensors(), strict=True):
            target.copy_(source[numbers])
        same(part, whole)
    assert sorted(seen) == list(range(17))
    assert latents == sorted(latents)


def test_residuals_are_split_with_their_rows():
    rows = Rows("sd15")
    g = torch.Generator().manual_seed(5)
    sizes = [(16, 16)] * 3 + [(8, 8)] * 3 + [(4, 4)] * 3 + [(2, 2)] * 3
    channels = [16, 16, 16, 16, 32, 32, 32, 32, 32, 32, 32, 32]
    down = [torch.randn(17, c, *size, generator=g) for c, size in zip(channels, sizes, strict=True)]
    rows.arguments["residuals"] = (down, torch.randn(17, 32, 2, 2, generator=g))
    out = rows.plan.empty_output(17, 16, 16, tokens=TOKENS, map_tokens=2)
    same(rows.stream(5, out=out), rows.run())


def test_no_gradients(rows):
    rows.program.unet.requires_grad_(True)
    for _, part in rows.stream(6):
        assert not part.noise_pred.requires_grad


def test_out_of_memory_halves_once_and_says_so(rows, monkeypatch, caplog):
    answer, sizes = Plan._answer, []

    def fails_above(limit):
        def limited(self, request, out):
            sizes.append(request.rows)
            if sizes[-1] > limit:
                raise torch.OutOfMemoryError("out of memory")
            return answer(self, request, out)

        return limited

    want = rows.run()
    out = rows.plan.empty_output(17, 16, 16, tokens=TOKENS, map_tokens=2)
    monkeypatch.setattr(Plan, "_answer", fails_above(8))
    with caplog.at_level(logging.WARNING, "dsd_fast"):
        rows.stream(10, out=out)
    assert sizes == [10, 5, 5, 5, 2]
    same(out, want)
    assert "out of memory with 10 rows in one micro-batch; going on with 5" in caplog.text
    monkeypatch.setattr(Plan, "_answer", fails_above(4))
    with pytest.raises(torch.OutOfMemoryError):
        rows.stream(10, out=out)


def test_a_budget_too_small_is_refused_with_what_is_needed(rows):
    message = r"memory_budget: 1,000 bytes cannot hold the texts' keys \([\d,]+ bytes\) and one row \([\d,]+ bytes\)"
    with pytest.raises(ValueError, match=message):
        rows.stream(memory_budget=1000)


def test_without_a_budget_one_row_always_fits(rows, monkeypatch):
    monkeypatch.setattr("dsd_fast.unet.stream.CPU_BUDGET", 1000)
    out = rows.plan.empty_output(17, 16, 16, tokens=TOKENS, map_tokens=2)
    same(rows.stream(out=out), rows.run())
    assert {len(numbers) for numbers, _ in rows.stream()} == {1}


def test_the_callers_gradients_stay_on(rows):
    for _ in rows.stream(6):
        assert torch.is_grad_enabled()
    for _ in rows.stream(6):
        break
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_index": [0.5] * 17}, "latent_index: got"),
        ({"text_index": [7] * 17}, "text_index: values from 7 to 7"),
        ({"text_index": [0]}, "text_index: got 1 entries, expected 17"),
        ({"map_tokens": [[0, 1]]}, "map_tokens: got"),
        ({"map_tokens": [0.5]}, "map_tokens: got torch.float32"),
        ({"timesteps": [1, 2, 3]}, "timesteps: got"),
        ({"latents": torch.zeros(5, 3, 16, 16)}, r"latents: got \(5, 3, 16, 16\), expected \(P, 4, h, w\)"),
        ({"latents": torch.zeros(5, 4, 16, 16).double()}, "latents: got torch.float64 on cpu"),
        ({"text": None}, "text: needed by step"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments_are_named_at_the_call(change, message):
    rows = Rows("sd15")
    arguments = {"latents": rows.latents, "timesteps": rows.times, "text": rows.text} | rows.arguments | change
    with pytest.raises(ValueError, match=message):
        rows.plan.stream(**arguments)


def test_what_is_attached_between_micro_batches_is_refused():
    rows = Rows("sd15")
    batches = rows.stream(6)
    next(batches)
    handle = rows.program.unet.down_blocks[1].register_forward_hook(lambda m, a, o: o)
    with pytest.raises(UnsupportedNetworkError, match=r"down_blocks.1: a forward hook is registered"):
        next(batches)
    handle.remove()


def test_no_rows(rows):
    none = {"latent_index": [], "text_index": [], "map_tokens": [0]}
    assert list(rows.plan.stream(rows.latents, 5, rows.text, time_ids=rows.arguments["time_ids"], **none)) == []
    out = rows.plan.run(rows.latents, 5, rows.text, time_ids=rows.arguments["time_ids"], **none)
    assert out.noise_pred.shape == (0, 4, 16, 16)


def test_an_output_of_another_size_or_plan_is_refused(rows):
    for count in (16, 40):
        with pytest.raises(ValueError, match=f"out: .* has {count} rows, expected 17"):
            rows.stream(out=rows.plan.empty_output(count, 16, 16, tokens=TOKENS, map_tokens=2))
    with pytest.raises(ValueError, match="out: holds nothing, expected"):
        rows.stream(out=Output())
    for count, tokens in ((20, 2), (17, 1)):
        other = rows.plan.empty_output(count, 16, 16, tokens=TOKENS, map_tokens=tokens)
        with torch.no_grad(), pytest.raises(ValueError, match=r"out: .* has \(.*\) for these rows, expected"):
            rows.plan.run(rows.latents, rows.times, rows.text, **rows.arguments, out=other)


def test_budget_from_the_environment(monkeypatch):
    monkeypatch.setenv("DSD_FAST_MEMORY_BUDGET", "12345")
    assert default_budget(torch.device("cpu")) == 12345
    monkeypatch.setenv("DSD_FAST_MEMORY_BUDGET", "much")
    with pytest.raises(ValueError, match="DSD_FAST_MEMORY_BUDGET: got 'much'"):
        default_budget(torch.device("cpu"))


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.float32) for family in FAMILIES), ("sd15", torch.bfloat16)], ids=str
)
def test_the_estimate_of_memory_is_an_upper_bound_and_not_a_loose_one(family, dtype):
    g = torch.Generator().manual_seed(0)
    program = UNetProgram(tiny_unet(family).to(dtype))
    count, size, tokens = 12, 32, 77
    latents = torch.randn(count, 4, size, size, generator=g).to(dtype)
    states = torch.randn(2, tokens, CROSS_ATTENTION_DIM[family], generator=g).to(dtype)
    pooled = torch.randn(2, POOLED_DIM, generator=g).to(dtype) if family == "sdxl" else None
    options = {"latent_index": torch.arange(count), "text_index": torch.arange(count) % 2}
    if family == "sdxl":
        options["time_ids"] = torch.ones(6)
    for plan in (
        program.plan(noise_pred=True),
        program.plan(scores=program.score_ids[-1:]),
        program.plan(features=["mid-vit-out"]),
        program.plan(features=[f"{program.score_ids[0]}-map"]),
        program.plan(maps=[name for name in program.map_ids if name.endswith("-self")][-1:]),
    ):
        with torch.no_grad():
            text = plan.encode_text(states, pooled=pooled)
            measured = peak_bytes(lambda plan=plan, text=text: plan.run(latents, 5, text, **options))
        assert measured <= plan.run_bytes(count, size, size, tokens) <= 3 * measured


def test_the_estimate_of_a_plan_that_was_asked_before_is_that_of_a_new_one():
    program = UNetProgram(tiny_unet("sd15"))
    name = program.score_ids[-2]
    plans = [program.plan(scores=[name], maps=[name], noise_pred=True) for _ in range(10)]
    before = None
    for dtype, backend, size, tokens, maps in (
        (torch.float32, "cpu", 16, 77, 2),
        (torch.float32, "cpu", 24, 77, 2),
        (torch.float32, "cpu", 24, 77, 500),
        (torch.float32, "reference", 24, 9000, 2),
        (torch.float32, "cpu", 24, 9000, 2),
        (torch.bfloat16, "cpu", 24, 9000, 2),
    ):
        program.unet.to(dtype)
        with force(backend):
            known, new = (each.run_bytes(3, size, size, tokens, map_tokens=maps) for each in (plans[0], plans.pop()))
        assert known == new != before
        before = known
