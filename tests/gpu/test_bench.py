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

    suite = Suite("tiny", "", [Group("g", "G")], [Case("product", "g", prepare)])
    ((record, text),) = Runner(suite, Context("cuda")).run(suite.cases[0])
    check(record, "record")
    assert (record["kind"], text) == ("speed", "")
    assert record["machine"]["kind"] == "cuda"
    assert record["machine"]["name"] == torch.cuda.get_device_name()
    assert record["machine"]["driver"]
    assert record["ratio"]["median"] > 1
    assert record["subject"]["memory"] >= 512 * 512 * 4
