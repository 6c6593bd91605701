"""The guards that conftest puts around every test hold."""

import importlib.util
import itertools
import socket
from pathlib import Path

import pytest
import torch

from tests.conftest import NetworkBlockedError
from tests.repository.processes import run_python
from tests.repository.source import ROOT

ALLOCATIONS = """
import torch

def allocate(like):
    return [
        torch.empty(3), torch.empty(3, dtype=torch.float16), torch.empty_like(like), torch.empty_strided((3,), (1,)),
        like.new_empty(3), like.new_empty_strided((3,), (1,)),
    ]

def integers():
    return torch.empty(3, dtype=torch.int64)
"""


def module_from(folder: Path, name: str):
    file = folder / "allocations.py"
    file.write_text(ALLOCATIONS)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_memory_allocated_by_the_package_is_poisoned(tmp_path):
    module = module_from(tmp_path, "dsd_fast.kernels.probe")
    assert all(tensor.isnan().all() for tensor in module.allocate(torch.zeros(3)))
    assert module.integers().tolist() == [torch.iinfo(torch.int64).max] * 3


def test_memory_of_a_device_is_allocated_there(tmp_path):
    module = module_from(tmp_path, "dsd_fast.kernels.probe")
    with torch.device("meta"):
        assert torch.nn.Linear(2, 3).weight.is_meta
        assert module.integers().is_meta


def test_memory_allocated_elsewhere_is_not_poisoned(tmp_path, monkeypatch):
    # What fresh memory holds is unknown, so the filling itself is watched.
    monkeypatch.setattr(torch.Tensor, "fill_", lambda *_: pytest.fail("filled"))
    module_from(tmp_path, "somewhere.else").allocate(torch.zeros(3))


@pytest.mark.parametrize("tracer", ["compile", "export"])
def test_traced_code_is_not_poisoned(tmp_path, tracer):
    allocate = module_from(tmp_path, "dsd_fast.kernels.probe").allocate
    like = torch.zeros(3)
    if tracer == "compile":
        graphs = []
        torch.compile(allocate, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)(like)
        (graph,) = graphs
    else:

        class Allocate(torch.nn.Module):
            def forward(self, like):
                return allocate(like)

        graph = torch.export.export(Allocate(), (like,), strict=False).graph_module
    parts = [part.graph for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
    targets = [str(node.target) for part in parts for node in part.nodes]
    assert any("empty" in target for target in targets)
    assert not any("fill" in target for target in targets)


def test_network_is_blocked():
    with pytest.raises(NetworkBlockedError, match=r"getaddrinfo of 'example\.com'"):
        socket.create_connection(("example.com", 443), timeout=1)
    with socket.socket() as client, pytest.raises(NetworkBlockedError, match=r"connect of '192\.0\.2\.1'"):
        client.connect(("192.0.2.1", 443))
    with socket.socket(type=socket.SOCK_DGRAM) as client, pytest.raises(NetworkBlockedError, match="sendto"):
        client.sendto(b"", ("192.0.2.1", 9))


def test_loopback_is_not_blocked():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        server.accept()[0].close()
        assert client.recv(1) == b""


GPU_TESTS = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("case", range(3))
def test_on_a_gpu(case):
    raise AssertionError

@pytest.mark.parametrize("target", ["gpu"])
def test_on_a_cpu(target):
    pass
"""


SKIPPED_MODULE = "import pytest\npytest.importorskip('not_there')\npytest.mark.gpu\n"


def test_skipped_gpu_tests_are_counted(tmp_path):
    (tmp_path / "test_gpu.py").write_text(GPU_TESTS)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/conftest.py").write_text("import not_there\n")
    (tmp_path / "broken/test_broken.py").write_text("import not_there\n")
    (tmp_path / "test_other.py").write_text(SKIPPED_MODULE)
    options = ["-m", "pytest", "-p", "tests.conftest", "--rootdir", tmp_path, "-c", ROOT / "pyproject.toml"]
    everything = [*options, "--continue-on-collection-errors", tmp_path]
    done = run_python(everything, cwd=tmp_path, path=[ROOT], check=False)
    assert "3 GPU tests skipped: no CUDA device" in done.stdout
    assert "1 passed, 4 skipped, 1 error" in done.stdout
    # Chosen alone, they run where the imports of other tests fail.
    done = run_python([*options, "-m", "gpu", tmp_path], cwd=tmp_path, path=[ROOT])
    assert "3 GPU tests skipped: no CUDA device" in done.stdout
    assert "all GPU tests of test_other.py skipped: could not import 'not_there'" in done.stdout
    assert "4 skipped, 1 deselected" in done.stdout


TURNS = """
import time
import pytest

def turn(kind):
    begin = time.monotonic()
    time.sleep(0.1)
    with open("turns", "a") as file:
        file.write(f"{kind} {begin} {time.monotonic()}\\n")

@pytest.mark.parametrize("case", range(12))
def test_beside(case):
    turn("beside")

@pytest.mark.alone
@pytest.mark.parametrize("case", range(3))
def test_alone(case):
    turn("alone")
"""


def test_workers_count_together_and_leave_a_test_alone(tmp_path):
    for name, text in (("gpu", GPU_TESTS), ("other", SKIPPED_MODULE), ("turns", TURNS)):
        (tmp_path / f"test_{name}.py").write_text(text)
    options = ["-p", "tests.conftest", "--rootdir", tmp_path, "-c", ROOT / "pyproject.toml", "-n", "2"]
    done = run_python(["-m", "pytest", *options, "--dist", "worksteal", tmp_path], cwd=tmp_path, path=[ROOT])
    assert "3 GPU tests skipped: no CUDA device" in done.stdout
    assert "all GPU tests of test_other.py skipped: could not import 'not_there'" in done.stdout
    assert "16 passed, 4 skipped" in done.stdout
    turns = [line.split() for line in (tmp_path / "turns").read_text().splitlines()]
    turns = sorted((float(begin), float(end), kind) for kind, begin, end in turns)
    assert len(turns) == 15
    together = [{a[2], b[2]} for a, b in itertools.combinations(turns, 2) if b[0] < a[1]]
    assert {"beside"} in together
    assert not any("alone" in kinds for kinds in together)
