"""What the benchmarks share: the device and threads, from the command line, and one context for the session."""

import pytest
import torch

from dsd_fast.bench import Context


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.addoption("--threads", type=int, help="CPU threads")


@pytest.fixture(scope="session")
def context(pytestconfig: pytest.Config) -> Context:
    if pytestconfig.option.threads is not None:
        torch.set_num_threads(pytestconfig.option.threads)
    # What a case calls float32 has IEEE products; cuDNN would take tf32.
    torch.backends.cudnn.allow_tf32 = False
    return Context(pytestconfig.option.device)
