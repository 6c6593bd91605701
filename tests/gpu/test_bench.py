"""The harness on a GPU: time by events, memory by the allocator, peaks that no kernel beats."""

import pytest

pytestmark = pytest.mark.gpu


def test_a_call_takes_as_long_as_its_work():
    import torch

    from dsd_fast.bench.measure import timer_for

    timer = timer_for("cuda")
    a = torch.randn(2048, 2048, device="cuda")

    def run(times):
        for _ in range(times):
            a @ a

    run(3)
    once, often = (min(timer(lambda times=times: run(times)) for _ in range(5)) for times in (10, 40))
    # Four times the work; launches and clocks take their share.
    assert 2.5 < often / once < 5.5


def test_launches_count_only_where_they_should():
    import torch

    from dsd_fast.bench.measure import timer_for

    x = torch.zeros(256, device="cuda")

    def run():
        for _ in range(200):
            x.add_(1)

    run()
    with_launches, without = (min(timer_for("cuda", each)(run) for _ in range(5)) for each in (True, False))
    # Work of about two microseconds a kernel, launched in about five.
    assert without < with_launches
    assert 200 * 0.5e-6 < without < 200 * 10e-6


def test_a_call_that_waits_for_the_device_is_timed_all_the_same():
    import torch

    from dsd_fast.bench.measure import timer_for

    a = torch.randn(1024, 1024, device="cuda")
    seconds = timer_for("cuda", False)(lambda: (a @ a).sum().item())
    assert 0 < seconds < 1


def test_the_cache_is_cold():
    import torch

    from dsd_fast.bench.measure import peaks, timer_for

    timer, rate = timer_for("cuda", False), peaks("cuda", "float32")["copy_bytes"]
    # A quarter of the cache: warm, it would be read several times faster than memory is.
    size = torch.cuda.get_device_properties("cuda").L2_cache_size // 4
    source = torch.ones(size, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    assert min(timer(lambda: target.copy_(source)) for _ in range(7)) > 0.9 * size / rate


@pytest.mark.parametrize("name", ["cpu/forward/width-80", "cpu/backward/width-80", "cpu/token-maps/width-80"])
def test_the_operators_sides_are_right_on_a_gpu(name):
    from dataclasses import replace

    from dsd_fast.bench import Context
    from dsd_fast.bench.run import checked
    from dsd_fast.bench.suites.ops import suite

    case = next(case for case in suite.cases if case.name == name)
    shape = replace(case.prepare.args[0], dtype="bfloat16")
    flops, differences = checked(case.prepare.func(shape, Context("cuda")))
    assert all(flops)
    assert all(0 <= difference <= 1 for difference in differences)


@pytest.mark.parametrize("name", ["group-norm-silu", "geglu", "add-layer-norm"])
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_the_elementwise_sides_are_right(name, kind):
    from dsd_fast.bench import Context
    from dsd_fast.bench.run import checked
    from dsd_fast.bench.suites import ops_elementwise

    work = getattr(ops_elementwise, kind)(name, "1280x16", "bfloat16", Context("cuda"), rows=2)
    _, differences = checked(work)
    assert [side.name for side in work.sides] == ["plain torch", "plain torch, compiled", "triton"]
    assert all(0 <= difference <= 1 for difference in differences)


def test_memory_and_peaks():
    import torch

    from dsd_fast.bench.measure import peak_memory, peaks

    size = 64 << 20
    assert size <= peak_memory("cuda", lambda: torch.zeros(size // 4, device="cuda").add_(1)) < size + (2 << 20)
    found = peaks("cuda", "bfloat16")
    assert found["matmul_flops"] > peaks("cuda", "float32")["matmul_flops"] > 1e12
    assert found["copy_bytes"] > 1e11


def test_a_case_is_checked_timed_and_recorded():
    import torch

    from dsd_fast.bench import Case, Context, Group, Side, Suite, Work
    from dsd_fast.bench.records import check
    from dsd_fast.bench.run import Runner

    def prepare(context):
        a, b = torch.randn(512, 512, device=context.device), torch.randn(512, 512, device=context.device)
        sides = [
            Side("rows", lambda: torch.cat([part @ b for part in a.split(64)]), 64),
            Side("all", lambda: a @ b, 512),
        ]
        return Work(sides, lambda x, y: float((x - y).abs().max()), 1e-2, "difference", "rows", "row", 512)

    suite = Suite("tiny", [Group("g", "G")], [Case("product", "g", prepare)])
    ((record, text),) = Runner(suite, Context("cuda")).run(suite.cases[0])
    check(record, "record")
    assert (record["kind"], text) == ("speed", "")
    assert record["machine"]["kind"] == "cuda"
    assert record["machine"]["name"] == torch.cuda.get_device_name()
    assert record["machine"]["driver"]
    assert record["ratio"]["median"] > 1
    assert record["subject"]["memory"] >= 512 * 512 * 4
