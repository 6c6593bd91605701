"""The loop that can be killed: what a checkpoint holds, when it is written, and what goes on from it."""

import os

import numpy as np
import pytest
import torch

from dsd_fast.jobs import read_tensors
from dsd_fast.training import CHECKPOINT, Loop, seed_of, seeded

MOMENTS = [("before", 0.0), ("before", 100.0), ("inside", 0.0), ("inside", 100.0), ("after", 100.0), ("settling", 0.0)]


class Sum(Loop):
    """Adds a drawn number at each step, which a settling tells of one step later."""

    def __init__(self, folder, *, count=5, stop=None, save_every=0.0, **fingerprint):
        super().__init__(folder, fingerprint, save_every)
        self.count, self.stop = count, stop
        self.taken, self.total, self.told, self.computed = 0, torch.zeros(2), [], []

    @property
    def done(self):
        return self.taken >= self.count

    def check(self, moment):
        if self.stop == (moment, self.taken):
            self.stop = None
            raise KeyboardInterrupt

    def step(self):
        self.check("before")
        self.computed.append(self.taken)
        drawn = torch.randn(2, generator=torch.Generator().manual_seed(seed_of(0, self.taken)))
        with self.changing():
            self.total = self.total + drawn
            self.check("inside")
            self.taken += 1
        self.check("after")

    def settle(self, *, report):
        if self.told != list(range(self.taken)):
            with self.changing():
                self.told = list(range(self.taken))
        if report:
            self.check("settling")

    def state(self):
        return {"total": self.total}, {"taken": self.taken, "told": self.told}

    def restore(self, tensors, values):
        self.total, self.taken, self.told = tensors["total"], values["taken"], values["told"]


@pytest.mark.parametrize(("moment", "save_every"), MOMENTS)
def test_what_was_interrupted_goes_on_to_the_same_state(tmp_path, moment, save_every):
    whole = Sum(tmp_path / "whole")
    whole.run()
    stop = (moment, 3)
    with pytest.raises(KeyboardInterrupt):
        Sum(tmp_path, stop=stop, save_every=save_every).run()
    # Half a step is not kept: without an earlier checkpoint nothing is.
    kept = 0 if moment == "inside" and save_every else 3
    if kept:
        assert read_tensors(tmp_path / CHECKPOINT)[1] == {"taken": kept, "told": [0, 1, 2], "fingerprint": {}}
    else:
        assert not (tmp_path / CHECKPOINT).exists()
    again = Sum(tmp_path)
    again.run()
    assert again.computed == list(range(kept, 5))
    assert torch.equal(again.total, whole.total)
    assert (tmp_path / CHECKPOINT).read_bytes() == (tmp_path / "whole" / CHECKPOINT).read_bytes()


def test_a_state_that_cannot_settle_is_kept(tmp_path, monkeypatch):
    def broken(self, *, report):
        raise FloatingPointError

    monkeypatch.setattr(Sum, "settle", broken)
    with pytest.raises(FloatingPointError):
        Sum(tmp_path).run()
    assert read_tensors(tmp_path / CHECKPOINT)[1]["taken"] == 1


def test_checkpoints_are_written_by_time_and_once(tmp_path, monkeypatch):
    written, rename = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (written.append(b), rename(a, b)))

    def count(**options):
        written.clear()
        Sum(tmp_path, **options).run()
        return len(written)

    assert count(save_every=100.0) == 1
    assert count() == 0
    assert count(count=8) == 3
    stale = tmp_path / f".{CHECKPOINT}.0123abcd.tmp"
    stale.touch()
    Sum(tmp_path).run()
    assert not stale.exists()
    # Without a folder there is nothing to keep.
    loop = Sum(None)
    loop.run()
    assert loop.taken == 5


def test_another_fingerprint_is_refused_by_the_names_of_what_differs(tmp_path):
    Sum(tmp_path, size=(2, 3), steps=range(3), rates=np.array([1.0, 0.5]), seed=0).run()
    same = {"size": [2, 3], "steps": [0, 1, 2], "rates": (1.0, np.float64(0.5)), "seed": np.int64(0)}
    Sum(tmp_path, **same).run()
    before = (tmp_path / CHECKPOINT).read_bytes()
    for other, names in ({"seed": 1, "size": [2]}, "seed, size"), ({"new": 1}, "new"):
        with pytest.raises(ValueError, match=rf"^out: .*differs in {names}; choose another folder$"):
            Sum(tmp_path, **{**same, **other}).run()
    same.pop("rates")
    with pytest.raises(ValueError, match="differs in rates;"):
        Sum(tmp_path, **same).run()
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    (tmp_path / CHECKPOINT).write_bytes(before[:50])
    with pytest.raises(ValueError, match=r"^out: .* is no checkpoint .*; choose another folder$"):
        Sum(tmp_path).run()


def test_draws_are_the_keys_own_and_leave_the_process_generators_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with seeded(seed_of(0, 1), torch.device("cpu")):
        first = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    with seeded(seed_of(0, 1), torch.device("cpu")):
        assert torch.equal(torch.rand(4), first)
    with seeded(seed_of(1, 0, 0, 2), torch.device("cpu")):
        assert not torch.equal(torch.rand(4), first)
    keys = [(0, 1), (1, 0, 1), (0, 1, 1), (1, 1), (0, 0, 1), (2**40, 1)]
    assert len({seed_of(*key) for key in keys}) == len(keys)
