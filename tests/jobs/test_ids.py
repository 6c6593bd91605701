import hashlib
import os
from types import SimpleNamespace

import pytest
import torch

from dsd_fast.jobs import config_hash, file_digest, row_id, weights_hash, worker_of
from tests.repository.processes import run_python
from tests.repository.source import ROOT


def test_an_id_is_the_hash_of_its_parts_and_their_lengths():
    content = (2).to_bytes(8, "little") + b"ab" + (2).to_bytes(8, "little") + "é".encode()
    assert row_id(b"ab", "é") == hashlib.blake2b(content, digest_size=16).hexdigest()
    assert len({row_id("ab", "c"), row_id("a", "bc"), row_id("abc"), row_id("abc", ""), row_id("", "abc")}) == 5
    # A file's name that is no UTF-8.
    assert row_id(os.fsdecode(b"\xff")) == row_id(b"\xff")


def test_workers_share_the_ids_evenly():
    ids = [row_id(str(number)) for number in range(4000)]
    shares = [sum(worker_of(name, 4) == worker for name in ids) for worker in range(4)]
    assert sum(shares) == 4000
    # Binomial: 1000 each, standard deviation √(4000 · ¼ · ¾) ≈ 27.4; five of them.
    assert max(abs(share - 1000) for share in shares) < 137
    assert {worker_of(name, 1) for name in ids} == {0}


@pytest.mark.parametrize("name", ["", "ab", "g" * 32, "0" * 34, "0 " * 16 + "00"])
def test_what_is_no_id_is_refused(name):
    with pytest.raises(ValueError, match=r"row is .*expected 32 hexadecimal digits"):
        worker_of(name, 2)


def test_a_files_digest_is_its_contents(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 300_000)
    assert file_digest(tmp_path / "a") == hashlib.blake2b(b"x" * 300_000, digest_size=16).hexdigest()
    with pytest.raises(FileNotFoundError):
        file_digest(tmp_path / "b")


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(torch.bfloat16)


def change_value(net):
    net[0].weight.data.view(-1)[-1] += 1


def change_buffer(net):
    net[1].running_mean[0] = 1


def change_shape(net):
    net[0].bias.data = net[0].bias.data[None]


def change_name(net):
    net.add_module("2", net[1])


def change_dtype(net):
    # The same bytes.
    net[0].bias.data = net[0].bias.data.view(torch.float16)


def add_adapter(net):
    net[0].lora = torch.nn.Linear(1, 1)


@pytest.mark.parametrize("change", [change_value, change_buffer, change_shape, change_name, change_dtype, add_adapter])
def test_every_part_of_the_weights_counts(change):
    net = network()
    assert weights_hash({"unet": net}) == (before := weights_hash({"unet": network()}))
    change(net)
    assert weights_hash({"unet": net}) != before


def test_names_and_order_of_modules_count_and_the_layout_in_memory_does_not():
    one, two = network(), torch.nn.Linear(2, 2)
    assert (
        weights_hash({"a": one, "b": two}) == weights_hash({"b": two, "a": one}) != weights_hash({"a": two, "b": one})
    )
    assert weights_hash([one, two]) != weights_hash([two, one])
    before = weights_hash([one])
    assert weights_hash([one.to(memory_format=torch.channels_last)]) == before


def test_another_process_finds_the_same_hash():
    code = "from tests.jobs import test_ids as t; print(t.weights_hash([t.network()]))"
    assert run_python(["-c", code], cwd=ROOT).stdout == f"{weights_hash([network()])}\n"


def test_a_configs_hash_is_that_of_what_is_set():
    def told(**values):
        return config_hash(SimpleNamespace(config={"width": 8, "vision": {"depth": 2}} | values))

    other_version = {"depth": 2, "dtype": "float32", "transformers_version": "9.9", "_name": "x", "bias": False}
    assert told() == told(vision=other_version, architectures=["X"], dropout=None)
    assert len({told(), told(width=9), told(vision={"depth": 3}), told(vision={"depth": 2, "bias": True})}) == 4
